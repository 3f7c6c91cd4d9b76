"""The broker, step by step: its name, its port, TLS, the login, the rights to publish and to be commanded."""

from __future__ import annotations

import socket
import ssl
import time
from datetime import datetime, timezone
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from edge.alerts.command_messages import CommandResult
from edge.alerts.message import build, encode
from edge.alerts.mqtt import Acked, Connected, Link, Lost, Subscribed
from edge.alerts.settings import Protocol
from edge.alerts.tls import tls_context, tls_trouble
from edge.alerts.topics import Identity, Kind, subscriptions
from edge.doctor.findings import doubt, fine, wrong
from edge.errors import LinewardError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge.alerts.mqtt import Event, Inbox
    from edge.alerts.settings import BrokerSettings
    from edge.doctor.findings import Finding
    from edge.settings import BoxSettings

VERB = "doctor"
CERTIFICATE_DAYS = 30
ROUND_TRIP_MS = 100.0
_DAY_S = 86_400


def look_at_broker(settings: BoxSettings) -> Iterator[Finding]:
    """Take the steps of a connection one by one and stop at the first that fails.

    The client id is the box's with ``-doctor`` behind it, so a running box keeps its connection. One message is
    published, to ``cmd/doctor/result``, which nobody acts on.

    Raises:
        SettingsError: a file of the settings is missing or open to others.
    """
    broker = settings.broker
    try:
        found = socket.getaddrinfo(broker.host, broker.port, type=socket.SOCK_STREAM)
    except OSError as error:
        cure = "correct broker.url, or this machine's name server (resolvectl status)"
        yield wrong("broker", "name", f"{broker.host} is not known ({error.strerror})", cure)
        return
    addresses = sorted({str(address[4][0]) for address in found})
    yield fine("broker", "name", f"{broker.host} is {', '.join(addresses)}", addresses=addresses)
    began = time.perf_counter()
    try:
        connection = socket.create_connection((broker.host, broker.port), timeout=broker.connect_timeout_s)
    except OSError as error:
        cure = "see whether the broker runs, listens on that port, and no firewall is between"
        yield wrong("broker", "port", f"{broker.address} does not answer ({error.strerror or error})", cure)
        return
    with connection:
        took = 1e3 * (time.perf_counter() - began)
        yield fine("broker", "port", f"{broker.address} answers in {took:.1f} ms", connect_ms=round(took, 2))
        if broker.tls:
            yield from _tls(connection, broker)
        else:
            text = "the connection is not encrypted: whoever is on the network reads and writes alerts"
            if broker.host not in ("localhost", "127.0.0.1", "::1"):
                yield doubt("broker", "tls", text, "use an mqtts:// address; docs/broker.md has the commands")
    yield from _mqtt(settings)


def _tls(connection: socket.socket, broker: BrokerSettings) -> Iterator[Finding]:
    context = tls_context(broker)
    try:
        with context.wrap_socket(connection, server_hostname=broker.host) as wrapped:
            certificate, version = wrapped.getpeercert() or {}, wrapped.version()
    except ssl.SSLError as error:
        # The login says the same again; here it has a name of its own.
        text, _, cure = tls_trouble(error, broker).removeprefix("TLS: ").partition("; ")
        yield wrong("broker", "tls", text, cure or "check ca_file and the broker's certificate")
        return
    except OSError as error:
        yield wrong("broker", "tls", f"the handshake ends ({error})", "see whether this port speaks TLS")
        return
    until = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    days = int((until - time.time()) // _DAY_S)
    shown = datetime.fromtimestamp(until, timezone.utc).strftime("%Y-%m-%d")
    text = f"{version}; the broker's certificate is valid until {shown}"
    if days < CERTIFICATE_DAYS:
        yield doubt("broker", "tls", f"{text}, {days} days", "have it renewed", days=days)
    else:
        yield fine("broker", "tls", text, days=days)


def _mqtt(settings: BoxSettings) -> Iterator[Finding]:
    broker = settings.broker
    client_id = f"{broker.client_id or f'lineward-{settings.site}-{settings.box}'}-{VERB}"
    protocols = (Protocol.V5, Protocol.V311) if broker.protocol is Protocol.AUTO else (broker.protocol,)
    for protocol in protocols:
        inbox: Inbox = SimpleQueue()
        link = Link(settings=broker, client_id=client_id, protocol=protocol, will=None, inbox=inbox)
        try:
            link.open()
            answer = _await(inbox, (Connected, Lost), broker.connect_timeout_s)
            if isinstance(answer, Connected):
                yield fine("broker", "login", f"taken, MQTT {protocol.value}", protocol=protocol.value)
                yield from _rights(link, inbox, settings, protocol)
                return
            if not (isinstance(answer, Lost) and answer.other_protocol and protocol is not protocols[-1]):
                yield _refused(answer)
                return
        except (LinewardError, OSError) as error:
            text, _, cure = str(error).rpartition("; ")
            yield wrong("broker", "login", text or cure, cure if text else "see the line above")
            return
        finally:
            link.close(goodbye=True)


def _refused(answer: Event | None) -> Finding:
    if not isinstance(answer, Lost):
        return wrong("broker", "login", "no answer to CONNECT", "see whether this is an MQTT broker")
    text, _, cure = answer.reason.partition("; ")
    return wrong("broker", "login", f"the broker refuses: {text}", cure or "see the broker's log")


def _rights(link: Link, inbox: Inbox, settings: BoxSettings, protocol: Protocol) -> Iterator[Finding]:
    broker = settings.broker
    identity = Identity(site=settings.site, box=settings.box, prefix=broker.prefix)
    link.subscribe(subscriptions(broker.prefix, site=settings.site, box=settings.box, kinds=frozenset({Kind.COMMAND})))
    answer = _await(inbox, (Subscribed, Lost), broker.connect_timeout_s)
    if isinstance(answer, Subscribed) and not answer.refusal:
        yield fine("broker", "commands", f"subscribed under {identity.root}/cmd")
    else:
        reason = answer.refusal if isinstance(answer, Subscribed) else "no answer"
        cure = f"let the user read {identity.root}/cmd/+ in the broker's access list"
        yield doubt("broker", "commands", f"cannot be read under {identity.root}/cmd ({reason})", cure)
    message = build(CommandResult, site=settings.site, box=settings.box, verb=VERB, ok=True)
    began = time.perf_counter()
    link.publish(identity.result(VERB), encode(message))
    answer = _await(inbox, (Acked, Lost), broker.connect_timeout_s)
    took = 1e3 * (time.perf_counter() - began)
    cure = f"let the user write {identity.root}/# in the broker's access list"
    if not isinstance(answer, Acked):
        yield wrong("broker", "publish", f"the broker does not acknowledge messages under {identity.root}/", cure)
    elif answer.refusal:
        yield wrong("broker", "publish", f"the broker refuses messages under {identity.root}/ ({answer.refusal})", cure)
    elif took > ROUND_TRIP_MS:
        text = f"taken under {identity.root}/, acknowledged after {took:.0f} ms"
        yield doubt("broker", "publish", text, "see what slows the network or the broker", round_trip_ms=round(took, 2))
    else:
        # MQTT 3.1.1 has no way to refuse a message: it is acknowledged and thrown away (clause 3.3.5).
        silent = "" if protocol is Protocol.V5 else "; MQTT 3.1.1 would not say if it were thrown away"
        text = f"taken under {identity.root}/, acknowledged after {took:.1f} ms{silent}"
        yield fine("broker", "publish", text, round_trip_ms=round(took, 2))


def _await(inbox: Inbox, kinds: tuple[type[Event], ...], timeout_s: float) -> Event | None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            event = inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            return None
        if isinstance(event, kinds):
            return event
