"""The link to an MQTT broker: one connection at a time, and the task that makes it again. The only user of paho-mqtt.

Knows nothing of alerts: what is said over a connection is the business of whoever serves it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from enum import Enum
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge.alerts.settings import BrokerSettings, Protocol
from edge.alerts.tls import tls_context, tls_trouble
from edge.errors import BrokerError, OutboxError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from paho.mqtt.client import ConnectFlags, DisconnectFlags, MQTTMessage
    from paho.mqtt.reasoncodes import ReasonCode

LOG = logging.getLogger("lineward.mqtt")
# Long enough for a DISCONNECT to leave, short enough not to hold up a stop over a dead network.
_GOODBYE_S = 1.0
# mosquitto 2.0 does not say that another client took the session over; what it looks like is all there is to go by.
_SHORT_LIVES = 3
# Messages that a broker may send us before one is acknowledged, and how long each may be: what we hold is bounded.
_RECEIVE_MAXIMUM = 64
_MAX_PACKET_BYTES = 512 * 1024
# MQTT 5, clause 3.2.2.3.6: the most that a packet can have where a broker names no limit.
_NO_PACKET_LIMIT = 268_435_460
_SHORT_LIVED = " soon after each connect; does another client use this client_id? Give each box its own name"


class LinkKind(str, Enum):
    """Where a connection stands. ``refused`` needs a person; attempts go on, at the longest interval."""

    CONNECTING = "connecting"
    CONNECTED = "connected"
    REFUSED = "refused"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class LinkState:
    """Where a connection stands, and why, in words that name the cure."""

    kind: LinkKind
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind.value} ({self.reason})" if self.reason else self.kind.value


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker has accepted us.

    Attributes:
        receive_maximum: unacknowledged messages that it takes at a time.
        maximum_packet: bytes of a packet that it takes.
    """

    receive_maximum: int
    maximum_packet: int = _NO_PACKET_LIMIT


@dataclass(frozen=True, slots=True)
class Lost:
    """There is no connection (any more).

    Attributes:
        reason: why, with the cure where there is one.
        refused: somebody has to change something.
        other_protocol: the broker may take the other version of MQTT.
        disliked: the broker hung up because of a message that we sent, without saying which.
    """

    reason: str
    refused: bool = False
    other_protocol: bool = False
    disliked: bool = False


@dataclass(frozen=True, slots=True)
class Acked:
    """The broker has answered message ``mid``; ``refusal`` is empty, or why it does not want it."""

    mid: int
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message from the broker; ``mid`` is to be acknowledged, 0 where there is nothing to acknowledge.

    ``repeated``: the broker has sent it under this number before (DUP, MQTT 5 clause 3.3.1.1).
    """

    topic: str
    payload: bytes
    retained: bool
    mid: int = 0
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The broker has answered a subscription; ``refusal`` is empty, or why it does not allow it."""

    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Wake:
    """Somebody has work for the thread that serves the connection."""


Event: TypeAlias = Connected | Lost | Acked | Incoming | Subscribed | Wake
Inbox: TypeAlias = "SimpleQueue[Event]"


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker says for us, retained, when we are gone."""

    topic: str
    payload: bytes


class Link:
    """One connection to the broker; never made again by itself.

    A client per connection: paho keeps what could not be sent and would send it after a reconnect on its own account,
    beside the outbox that does the same.

    Args:
        settings: the broker.
        client_id: unique at the broker.
        protocol: 5 or 3.1.1.
        will: published by the broker when the connection dies.
        inbox: gets every event; callbacks do nothing else, so they cannot deadlock with paho's locks.
        acknowledges: whoever takes messages from the inbox calls :meth:`acknowledge` for each once it is handled (MQTT
            5, clause 4.3.2); else they are acknowledged as they come in.
    """

    def __init__(
        self,
        *,
        settings: BrokerSettings,
        client_id: str,
        protocol: Protocol,
        will: Will | None,
        inbox: Inbox,
        acknowledges: bool = False,
    ) -> None:
        self._settings = settings
        self._inbox = inbox
        self._five = protocol is Protocol.V5
        self._accepted = False
        self._acknowledges = acknowledges
        self._last_words = _LastWords()
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=None if self._five else True,
            protocol=MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
            manual_ack=acknowledges,
        )
        self._client.enable_logger(self._last_words.logger)
        self._client.connect_timeout = settings.connect_timeout_s
        # Our own window is what limits; paho's, fixed once connected, must never queue.
        self._client.max_inflight_messages_set(0)
        if will is not None:
            self._client.will_set(will.topic, will.payload, qos=1, retain=True)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = self._on_publish
        self._client.on_message = self._on_message
        self._client.on_subscribe = self._on_subscribe

    def open(self) -> None:
        """Connect and send CONNECT; the answer comes as an event. Blocks for the connect time-out at most.

        Raises:
            BrokerError: TLS fails.
            SettingsError: a file of the settings is missing or open to others.
            OSError: nobody answers.
        """
        login = self._settings.login
        if login is not None:
            self._client.username_pw_set(login, self._settings.read_password())
        if self._settings.tls:
            self._client.tls_set_context(tls_context(self._settings))
        keepalive = self._settings.keepalive_s
        try:
            if self._five:
                limits = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho has no types here
                limits.ReceiveMaximum, limits.MaximumPacketSize = _RECEIVE_MAXIMUM, _MAX_PACKET_BYTES
                self._client.connect(
                    self._settings.host, self._settings.port, keepalive, clean_start=True, properties=limits
                )
            else:
                self._client.connect(self._settings.host, self._settings.port, keepalive)
        except ssl.SSLError as error:
            raise BrokerError(tls_trouble(error, self._settings)) from error
        sock = self._client.socket()
        if isinstance(sock, socket.socket):
            # Nagle's algorithm holds back the second small packet: 40 ms on some stacks.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.loop_start()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int | None:
        """Send with QoS 1; its number for the later :class:`Acked`, None when the connection is gone."""
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        return info.mid if info.rc == MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def subscribe(self, filters: Sequence[str]) -> None:
        """Ask for topics with QoS 1."""
        self._client.subscribe([(name, 1) for name in filters])

    def acknowledge(self, message: Incoming) -> None:
        """Tell the broker that a message was handled; nothing where the link acknowledges by itself."""
        if self._acknowledges and message.mid:
            self._client.ack(message.mid, 1)

    def close(self, *, goodbye: bool) -> None:
        """End the connection. With ``goodbye`` the broker is told, and drops our will."""
        thread = self._client._thread  # noqa: SLF001 (paho has no bounded wait for its own thread)
        if goodbye:
            self._client.disconnect()
            if thread is not None:
                thread.join(_GOODBYE_S)
        sock = self._client.socket()
        if sock is not None:
            # Over a dead network paho's thread would wait for the keep-alive; a closed socket ends it now.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]  # paho declares less than a socket has
        self._client.loop_stop()
        # Client and link refer to each other; its pair of sockets would stay open until the garbage collector comes by.
        for name in ("on_connect", "on_disconnect", "on_publish", "on_message", "on_subscribe"):
            setattr(self._client, name, None)

    def _on_connect(
        self, _client: Client, _data: object, _flags: ConnectFlags, reason: ReasonCode, properties: Properties | None
    ) -> None:
        if not reason.is_failure:
            self._accepted = True
            self._inbox.put(
                Connected(
                    getattr(properties, "ReceiveMaximum", 65_535),
                    getattr(properties, "MaximumPacketSize", _NO_PACKET_LIMIT),
                )
            )
            return
        name = str(reason)
        if "rotocol version" in name or "rotocol error" in name:
            text = f"the broker does not take this MQTT version ({name})"
            self._inbox.put(Lost(text, refused=True, other_protocol=True))
        else:
            self._inbox.put(Lost(_with_cure(name), refused=name not in _PASSING))

    def _on_disconnect(
        self, _client: Client, _data: object, flags: DisconnectFlags, reason: ReasonCode, _properties: Properties | None
    ) -> None:
        name = str(reason)
        if flags.is_disconnect_packet_from_server:
            self._inbox.put(Lost(_with_cure(name), refused=name not in _PASSING, disliked=name in _DISLIKES))
        elif self._accepted:
            # mosquitto's answer to a message over its message_size_limit has a code that paho does not know there.
            unread = name == "Protocol error"
            text = "an answer of the broker cannot be read; does it limit the size of messages?"
            self._inbox.put(Lost(text if unread else "the connection was lost", disliked=unread))
        elif refusal := tls_trouble(self._last_words.text, self._settings) if self._settings.tls else "":
            # With TLS 1.3 a broker looks at our certificate after the handshake has succeeded on our side.
            self._inbox.put(Lost(refusal, refused=True))
        else:
            # A broker that speaks 3.1.1 only may hang up on a version 5 CONNECT instead of answering it.
            self._inbox.put(Lost(_hung_up(self._settings), other_protocol=self._five))

    def _on_publish(
        self, _client: Client, _data: object, mid: int, reason: ReasonCode, _properties: Properties
    ) -> None:
        self._inbox.put(Acked(mid, str(reason) if reason.is_failure else ""))

    def _on_subscribe(
        self, _client: Client, _data: object, _mid: int, reasons: list[ReasonCode], _properties: Properties | None
    ) -> None:
        self._inbox.put(Subscribed(next((str(reason) for reason in reasons if reason.is_failure), "")))

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        mid = message.mid if message.qos else 0
        self._inbox.put(Incoming(topic, bytes(message.payload), message.retain, mid, bool(message.dup)))


class _LastWords(logging.Handler):
    """Keeps the last error that paho logs: the only place where it names the TLS alert that ended a connection."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.text = ""
        # Not in the registry of loggers: it goes with its connection.
        self.logger = logging.Logger("paho", logging.ERROR)  # noqa: LOG001
        self.logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.text = record.getMessage()


def _hung_up(settings: BrokerSettings) -> str:
    """Why a broker may hang up before it has answered CONNECT."""
    text = "the broker hung up before it answered"
    if not settings.tls:
        return f"{text}; does this port want TLS (mqtts://)?"
    return text if settings.cert_file else f"{text}; does it want a client certificate (cert_file and key_file)?"


# Reasons that pass by themselves; every other refusal needs somebody to change something.
_PASSING = frozenset({
    "Server unavailable", "Server busy", "Server shutting down", "Quota exceeded", "Connection rate exceeded",
    "Keep alive timeout", "Receive maximum exceeded", "Message rate too high", "Administrative action",
    "Unspecified error", "Normal disconnection", "Success",
})  # fmt: skip
# A DISCONNECT with one of these says that a packet of ours is at fault, without naming it (MQTT 5, clause 4.13).
_DISLIKES = frozenset({
    "Packet too large", "Malformed packet", "Protocol error", "Topic name invalid", "Payload format invalid",
    "Implementation specific error", "Not authorized", "Retain not supported",
})  # fmt: skip
_CURES = {
    "Not authorized": "check username and password_file, and the broker's access list",
    "Bad user name or password": "check username and password_file",
    "Bad authentication method": "check username and password_file",
    "Client identifier not valid": "set another client_id",
    "Session taken over": "another client uses this client_id; give each box its own name",
    "Banned": "ask whoever runs the broker",
    "Packet too large": "raise the broker's packet limit to 256 KiB",
}


def _with_cure(reason: str) -> str:
    cure = _CURES.get(reason)
    return f"{reason}; {cure}" if cure else reason


class Reconnector:
    """The one task that keeps a connection up: connects, lets ``serve`` use it, waits, connects again.

    Waits double from ``backoff_min_s`` to ``backoff_max_s`` with a random part, and start over once a connection has
    lasted for the longest wait. One log line per change of state.

    Args:
        settings: the broker.
        client_id: unique at the broker.
        will: what the broker says when we are gone.
        serve: called in the task's thread with each open link, its inbox and what the broker granted. Returns why it
            ended: :class:`Lost`, or None when :attr:`stopping` made it leave. OutboxError ends the connection.
        acknowledges: ``serve`` acknowledges what it takes from the inbox, see :class:`Link`.
    """

    def __init__(
        self,
        *,
        settings: BrokerSettings,
        client_id: str,
        will: Will | None,
        serve: Callable[[Link, Inbox, Connected], Lost | None],
        acknowledges: bool = False,
    ) -> None:
        self._acknowledges = acknowledges
        self.stopping = threading.Event()
        self.connections = 0
        self.defects = 0
        self._settings = settings
        self._client_id = client_id
        self._will = will
        self._serve = serve
        self._state = LinkState(LinkKind.CONNECTING)
        self._changed = threading.Condition()
        self._inbox: Inbox = SimpleQueue()
        self._protocol = Protocol.V5 if settings.protocol is Protocol.AUTO else settings.protocol
        self._thread = threading.Thread(target=self._run, name=f"mqtt {client_id}", daemon=True)

    @property
    def state(self) -> LinkState:
        """Where the connection stands."""
        return self._state

    def start(self) -> None:
        """Begin, in a thread of its own."""
        self._thread.start()

    def wake(self) -> None:
        """Give ``serve`` a :class:`Wake`."""
        self._inbox.put(Wake())

    def stop(self, timeout: float) -> None:
        """Ask ``serve`` to leave and wait for it, no longer than ``timeout``: a connect that hangs is left behind."""
        self.stopping.set()
        self.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        self.set_state(LinkState(LinkKind.STOPPED))

    def wait_for(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Wait until ``condition`` holds, looked at whenever the state changes or :meth:`notify` is called."""
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def notify(self) -> None:
        """Let those who wait look again."""
        with self._changed:
            self._changed.notify_all()

    def set_state(self, state: LinkState) -> None:
        """Change the state; a change is logged once."""
        with self._changed:
            if state == self._state:
                return
            before, self._state = self._state, state
            self._changed.notify_all()
        calm = state.kind in {LinkKind.CONNECTED, LinkKind.STOPPED} or before.kind is LinkKind.STOPPED
        LOG.log(logging.INFO if calm else logging.WARNING, "broker %s: %s", self._settings.address, state)

    def _run(self) -> None:
        delay = self._settings.backoff_min_s
        short_lives, older = 0, False
        while not self.stopping.is_set():
            began, before = time.monotonic(), self.connections
            lost = self._connect_and_serve()
            if lost is None or self.stopping.is_set():
                break
            if self._settings.protocol is Protocol.AUTO and not older:
                if lost.other_protocol and self._protocol is Protocol.V5:
                    # Said by the broker it stays so; a broker that hung up may only have been starting or ending.
                    self._protocol, older = Protocol.V311, lost.refused
                    continue
                self._protocol = Protocol.V5
            lasted = time.monotonic() - began
            if lasted > self._settings.backoff_max_s:
                delay = self._settings.backoff_min_s
            if lasted > 2 * self._settings.backoff_max_s:
                short_lives = 0
            short_lives += self.connections - before
            refused, restless = lost.refused or lost.other_protocol, short_lives >= _SHORT_LIVES
            reason = lost.reason + (_SHORT_LIVED if restless and not refused else "")
            if refused or restless:
                delay = self._settings.backoff_max_s
            self.set_state(LinkState(LinkKind.REFUSED if refused else LinkKind.CONNECTING, reason))
            # Many boxes lose one broker at the same moment; they shall not come back at the same moment.
            self.stopping.wait(delay * random.uniform(0.75, 1.0))  # noqa: S311 (no secret)
            delay = min(2 * delay, self._settings.backoff_max_s)

    def _connect_and_serve(self) -> Lost | None:
        inbox: Inbox = SimpleQueue()
        self._inbox = inbox
        link = Link(
            settings=self._settings,
            client_id=self._client_id,
            protocol=self._protocol,
            will=self._will,
            inbox=inbox,
            acknowledges=self._acknowledges,
        )
        goodbye = False
        try:
            link.open()
            answer = self._await_answer(inbox)
            if not isinstance(answer, Connected):
                return answer
            self.connections += 1
            self.set_state(LinkState(LinkKind.CONNECTED))
            lost = self._serve(link, inbox, answer)
            goodbye = lost is None
        except (BrokerError, SettingsError) as error:
            return Lost(str(error), refused=True)
        except OutboxError as error:
            return Lost(str(error))
        except (OSError, ValueError) as error:
            # ValueError: paho and the ssl module answer so to host names that cannot be encoded.
            answered = self._settings.tls and not isinstance(error, ConnectionRefusedError)
            question = "does this port speak TLS" if answered else "is the broker running at this address"
            return Lost(f"{getattr(error, 'strerror', None) or error}; {question}?")
        except Exception as error:
            # A defect of whoever serves must not leave a box mute: it is counted, and the next connection begins anew.
            self.defects += 1
            LOG.exception("a defect ended the connection")
            return Lost(f"a defect ended the connection ({type(error).__name__}); the log has it, please report it")
        else:
            return lost
        finally:
            link.close(goodbye=goodbye)

    def _await_answer(self, inbox: Inbox) -> Connected | Lost | None:
        deadline = time.monotonic() + self._settings.connect_timeout_s
        while not self.stopping.is_set():
            try:
                event = inbox.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                return Lost(
                    "no answer to CONNECT; is this an MQTT broker?", other_protocol=self._protocol is Protocol.V5
                )
            if isinstance(event, (Connected, Lost)):
                return event
        return None
