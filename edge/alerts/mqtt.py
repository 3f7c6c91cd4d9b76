"""The link to an MQTT broker: one connection, never made again by itself. The only user of paho-mqtt.

Knows nothing of alerts: what is said over a connection is the business of whoever serves it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge.alerts.settings import BrokerSettings, Protocol
from edge.alerts.tls import tls_context, tls_trouble
from edge.errors import BrokerError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from queue import SimpleQueue

    from paho.mqtt.client import ConnectFlags, DisconnectFlags, MQTTMessage
    from paho.mqtt.reasoncodes import ReasonCode

# Long enough for a DISCONNECT to leave, short enough not to hold up a stop over a dead network.
GOODBYE_S = 1.0
# Messages that a broker may send us before one is acknowledged, and how long each may be: what we hold is bounded.
_RECEIVE_MAXIMUM = 64
_MAX_PACKET_BYTES = 512 * 1024
# MQTT 5, clause 3.2.2.3.6: the most that a packet can have where a broker names no limit.
_NO_PACKET_LIMIT = 268_435_460


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
                thread.join(GOODBYE_S)
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
