"""Transports of live signals: TCP, ZeroMQ, a serial port, an MQTT topic. Each speaks the format of signal_wire.

Optional libraries are imported where a source is opened. Knows nothing of windows.
"""

from __future__ import annotations

import hashlib
import os
import queue
import socket
import threading
import uuid
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from edge.capture.signal_wire import MAX_MESSAGE_BYTES, MAX_QUEUED_BYTES, Chunk, StreamParser, read_messages
from edge.errors import BrokerError, CaptureError, MissingExtraError, SettingsError

if TYPE_CHECKING:
    from edge.alerts.mqtt import Event, Link
    from edge.capture.settings import SourceSettings

POLL_S = 0.1
CONNECT_S = 5.0
_READ_BYTES = 65_536
_WAITING_BYTES = 4 * MAX_QUEUED_BYTES
_EVENT_BYTES = 512
# Unacknowledged messages that a sender repeats after it has connected anew: 20 with mosquitto and with paho.
_REPEATED_MOST = 20


class TcpTransport:
    """A TCP server that sends one stream to whoever connects.

    Args:
        url: tcp://host:port.
    """

    paced = True

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.hostname is None or parts.port is None:
            raise CaptureError(f"{url}: names no host and port; write tcp://host:port")
        self._place = (parts.hostname, parts.port)
        self._socket: socket.socket | None = None
        self._parser = StreamParser()
        self._broken = 0

    def open(self) -> None:
        """Connect.

        Raises:
            CaptureError: nobody answers.
        """
        self.close()
        host, port = self._place
        try:
            self._socket = socket.create_connection(self._place, timeout=CONNECT_S)
        except OSError as error:
            raise CaptureError(f"tcp://{host}:{port}: nobody answers ({error}); see the sender and its port") from error
        self._socket.settimeout(POLL_S)

    def read(self) -> list[Chunk]:
        """Return what came.

        Raises:
            CaptureError: the sender hung up, or sends another format.
        """
        assert self._socket is not None
        try:
            data = self._socket.recv(_READ_BYTES)
        except TimeoutError:
            return []
        except OSError as error:
            raise CaptureError(f"tcp://{self._place[0]}:{self._place[1]}: {error}") from error
        if not data:
            raise CaptureError(f"tcp://{self._place[0]}:{self._place[1]}: the sender hung up")
        return self._parser.feed(data)

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        # Half a message of an old connection has no other half.
        self._broken += self._parser.broken
        self._parser = StreamParser()

    @property
    def broken(self) -> int:
        """Lines that could not be read."""
        return self._broken + self._parser.broken


class ZmqTransport:
    """A ZeroMQ publisher; the last part of each message is the payload.

    Args:
        url: tcp://host:port to connect to.
        prefix: of the messages wanted.
    """

    paced = True

    def __init__(self, url: str, prefix: str) -> None:
        self._url, self._prefix = url, prefix.encode()
        self._socket: Any = None
        self.broken = 0

    def open(self) -> None:
        """Connect; a publisher that is away is waited for.

        Raises:
            CaptureError: the address is none.
        """
        import zmq  # noqa: PLC0415 (other sources do without)

        self.close()
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        # Together 16 MiB: the publisher keeps or drops what is not read, and the numbers of its samples tell.
        self._socket.setsockopt(zmq.MAXMSGSIZE, 2 * MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, _WAITING_BYTES // (2 * MAX_MESSAGE_BYTES))
        self._socket.setsockopt(zmq.SUBSCRIBE, self._prefix)
        try:
            self._socket.connect(self._url)
        except zmq.ZMQError as error:
            raise CaptureError(f"{self._url}: cannot be connected to ({error}); write tcp://host:port") from error

    def read(self) -> list[Chunk]:
        """Return what came; a message that cannot be read is counted and left out."""
        if not self._socket.poll(round(POLL_S * 1000)):
            return []
        try:
            return read_messages(self._socket.recv_multipart()[-1])
        except CaptureError:
            self.broken += 1
            return []

    def close(self) -> None:
        """Disconnect."""
        if self._socket is not None:
            self._socket.close(0)
            self._socket = None


class SerialTransport:
    """A serial port; after opening, what comes before the first newline is the rest of a line and left out.

    Args:
        device: such as /dev/ttyUSB0.
        baud: bits per second.
    """

    paced = True

    def __init__(self, device: str, baud: int) -> None:
        self._device, self._baud = device, baud
        self._port: Any = None
        self._parser = StreamParser()
        self._broken = 0
        self._begun = False

    def open(self) -> None:
        """Open the port.

        Raises:
            CaptureError: it is not there or taken.
            MissingExtraError: pyserial is not installed.
        """
        try:
            import serial  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise MissingExtraError(
                "kind signal_serial needs pyserial; run: pip install 'lineward[signals]'"
            ) from error
        self.close()
        try:
            self._port = serial.Serial(self._device, self._baud, timeout=POLL_S, exclusive=True)
        except (OSError, ValueError) as error:  # SerialException is an OSError
            raise CaptureError(
                f"{self._device}: cannot be opened ({error}); see its cable and who else has it"
            ) from error
        self._begun = False

    def read(self) -> list[Chunk]:
        """Return what came.

        Raises:
            CaptureError: the port is gone.
        """
        try:
            data: bytes = self._port.read(1)
            if data:
                data += self._port.read(min(_READ_BYTES, self._port.in_waiting))
        except (OSError, TypeError) as error:  # pyserial reads from a port that is closed under it as TypeError
            raise CaptureError(f"{self._device}: {error}") from error
        if not self._begun and data:
            _, newline, data = data.partition(b"\n")
            self._begun = bool(newline)
        return self._parser.feed(data) if data else []

    def close(self) -> None:
        """Let go of the port."""
        if self._port is not None:
            self._port.close()
            self._port = None
        self._broken += self._parser.broken
        self._parser = StreamParser()

    @property
    def broken(self) -> int:
        """Lines that could not be read."""
        return self._broken + self._parser.broken


class _Inbox(queue.SimpleQueue["Event"]):
    """Events of a connection that wait to be read, up to 16 MiB of messages: a broker does not wait for its reader.

    Attributes:
        left_out: messages for which there was no room.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._bytes = 0
        self.left_out = 0

    def put(self, item: Event, block: bool = True, timeout: float | None = None) -> None:  # noqa: FBT001, FBT002 (as the base's)
        size = _bytes_of(item)
        with self._lock:
            if size and self._bytes + size > _WAITING_BYTES:
                self.left_out += 1
                return
            self._bytes += size
        super().put(item, block, timeout)

    def get(self, block: bool = True, timeout: float | None = None) -> Event:  # noqa: FBT001, FBT002 (as the base's)
        item = super().get(block, timeout)
        with self._lock:
            self._bytes -= _bytes_of(item)
        return item


def _bytes_of(item: Event) -> int:
    """What a message takes; nothing for the few other events, which must always come through."""
    payload = getattr(item, "payload", None)
    return 0 if payload is None else len(payload) + _EVENT_BYTES


class MqttTransport:
    """An MQTT topic; each message is one or more chunks. Retained messages are of another time, and left out.

    A sender that connects anew sends again what was not acknowledged (QoS 1, MQTT 5 clause 4.4), to a broker that may
    have passed it on, and passes it on again as a new message: one that equals any of the last 20 is ``repeated``.

    Args:
        settings: of the source: url, and of its signal topic, login and certificates.
    """

    paced = True

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings
        self._link: Link | None = None
        self._inbox = _Inbox()
        self._last: deque[bytes] = deque(maxlen=_REPEATED_MOST)
        self._broken = 0

    def open(self) -> None:
        """Connect; the subscription is asked for once the broker has accepted us.

        Raises:
            CaptureError: the broker does not answer, or refuses.
        """
        from edge.alerts.mqtt import Link  # noqa: PLC0415 (other sources do without)
        from edge.alerts.settings import BrokerSettings, Protocol  # noqa: PLC0415

        self.close()
        self._broken += self._inbox.left_out
        self._inbox = _Inbox()
        signal = self._settings.signal
        parts = urlsplit(self._settings.url or "")
        netloc = f"{parts.hostname}:{parts.port}" if parts.port else f"{parts.hostname}"
        broker = BrokerSettings(
            url=f"{parts.scheme}://{netloc}",
            username=signal.username,
            password_file=signal.password_file,
            ca_file=signal.ca_file,
        )
        name = f"lineward-signal-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._link = Link(settings=broker, client_id=name, protocol=Protocol.V311, will=None, inbox=self._inbox)
        try:
            self._link.open()
        except (OSError, BrokerError, SettingsError) as error:
            raise CaptureError(f"{self._settings.label}: the broker cannot be reached ({error})") from error

    def read(self) -> list[Chunk]:
        """Return what came; a message that cannot be read is counted and left out.

        Raises:
            CaptureError: the broker hung up, or refuses the topic.
        """
        from edge.alerts.mqtt import Connected, Incoming, Lost, Subscribed  # noqa: PLC0415

        assert self._link is not None
        try:
            event = self._inbox.get(timeout=POLL_S)
        except queue.Empty:
            return []
        if isinstance(event, Connected):
            self._link.subscribe([self._settings.signal.topic])
        elif isinstance(event, Lost):
            raise CaptureError(f"{self._settings.label}: {event.reason}")
        elif isinstance(event, Subscribed) and event.refusal:
            raise CaptureError(f"{self._settings.label}: topic {self._settings.signal.topic}: {event.refusal}")
        elif isinstance(event, Incoming) and not event.retained:
            try:
                return self._chunks(event.payload)
            except CaptureError:
                self._broken += 1
        return []

    def _chunks(self, payload: bytes) -> list[Chunk]:
        chunks, known = read_messages(payload), hashlib.blake2b(payload, digest_size=16).digest()
        if known in self._last:
            return [replace(chunk, repeated=True) for chunk in chunks]
        self._last.append(known)
        return chunks

    @property
    def broken(self) -> int:
        """Messages that could not be read, or came faster than they were."""
        return self._broken + self._inbox.left_out

    def close(self) -> None:
        """Disconnect."""
        if self._link is not None:
            self._link.close(goodbye=True)
            self._link = None
