"""A broker of a few lines, MQTT 3.1.1, for what a well-behaved one never does: it sends what it is told to."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9


class RawBroker:
    """Serves one client at a time; a context manager. ``packets`` gets (type, flags, body) of what clients send."""

    def __init__(self, *, grants: bool = True) -> None:
        self.grants = grants
        self._server = socket.create_server(("127.0.0.1", 0))
        self._client: socket.socket | None = None
        self.packets: SimpleQueue[tuple[int, int, bytes]] = SimpleQueue()
        self.subscribed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self._server.getsockname()[1]}"

    def __enter__(self) -> RawBroker:  # noqa: PYI034 (Self needs Python 3.11)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        if self._client is not None:
            self._client.close()
        self._thread.join(5)

    def publish(self, topic: str | bytes, payload: bytes, *, mid: int, repeated: bool = False) -> None:
        """Send a QoS-1 message under a number of our choice."""
        assert self._client is not None
        name = topic.encode() if isinstance(topic, str) else topic
        body = struct.pack("!H", len(name)) + name + struct.pack("!H", mid) + payload
        self._client.sendall(_packet(PUBLISH, 0b1010 if repeated else 0b0010, body))

    def wait_for(self, kind: int, timeout: float = 10.0) -> bytes:
        """The body of the next packet of a type; others are dropped."""
        while True:
            found, _, body = self.packets.get(timeout=timeout)
            if found == kind:
                return body

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._client, _ = self._server.accept()
                with contextlib.suppress(OSError):
                    self._serve(self._client)

    def _serve(self, client: socket.socket) -> None:
        stream = client.makefile("rb")
        while head := stream.read(1):
            length, shift = 0, 0
            while True:
                byte = stream.read(1)[0]
                length |= (byte & 127) << shift
                shift += 7
                if not byte & 128:
                    break
            body = stream.read(length)
            kind, flags = head[0] >> 4, head[0] & 15
            if kind == CONNECT:
                client.sendall(_packet(CONNACK, 0, b"\0\0"))
            elif kind == SUBSCRIBE:
                client.sendall(_packet(SUBACK, 0, body[:2] + (b"\1" if self.grants else b"\x80")))
                self.subscribed.set()
            elif kind == PUBLISH and flags & 0b0110:
                size = struct.unpack("!H", body[:2])[0]
                client.sendall(_packet(PUBACK, 0, body[2 + size : 4 + size]))
            self.packets.put((kind, flags, body))


def _packet(kind: int, flags: int, body: bytes) -> bytes:
    length, left = b"", len(body)
    while True:
        left, digit = left >> 7, left & 127
        length += bytes([digit | (128 if left else 0)])
        if not left:
            return bytes([kind << 4 | flags]) + length + body
