"""A network camera for benchmarks: MJPEG over HTTP at a steady pace, which can be cut and put back."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

HOST = "127.0.0.1"


class MjpegServer:
    """Shows pictures one after another, for ever; a context manager. Its port stays the same over :meth:`cut`.

    Args:
        pictures: JPEG files, in the order in which they are shown.
        fps: frames per second, for each client.
    """

    def __init__(self, pictures: Sequence[bytes], fps: float) -> None:
        self._pictures, self._interval = tuple(pictures), 1 / fps
        self._port = 0
        self._listener: socket.socket | None = None
        self._clients: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> MjpegServer:  # noqa: PYI034 (Self needs Python 3.11)
        self.plug_in()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}/stream.mjpg"

    def plug_in(self) -> None:
        """Take connections."""
        self._listener = socket.create_server((HOST, self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Reset every connection and refuse new ones."""
        listener, self._listener = self._listener, None
        with self._lock:
            clients, self._clients = self._clients, set()
        for one in (listener, *clients):
            if one is not None:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with self._lock:
                    self._clients.add(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        due = time.monotonic()
        with contextlib.suppress(OSError):
            client.recv(4096)
            client.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace;boundary=frame\r\n\r\n")
            while True:
                for data in self._pictures:
                    head = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data)
                    client.sendall(head + data + b"\r\n")
                    due += self._interval
                    time.sleep(max(0.0, due - time.monotonic()))
        with self._lock:
            self._clients.discard(client)
        client.close()
