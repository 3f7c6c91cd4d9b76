"""A network camera of the tests: MJPEG over HTTP, that can be unplugged, frozen, resized or fed with garbage."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

FRAME_S = 0.02


class MjpegCamera:
    """Serves one picture after another, each a little brighter, until told otherwise; its port stays the same."""

    def __init__(self) -> None:
        self.size = (48, 64)
        self.garbage = 0
        self.connections = 0
        self._port = 0
        self._frozen = threading.Event()
        self._stop = threading.Event()
        self._clients: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self.plug_in()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unplug()

    @property
    def url(self) -> str:
        return f"http://admin:hunter2@127.0.0.1:{self._port}/stream.mjpg"

    def plug_in(self) -> None:
        self._stop = threading.Event()
        self._frozen.clear()
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._spawn(self._accept, self._listener, self._stop)

    def unplug(self) -> None:
        """Reset every connection and refuse further ones."""
        self._stop.set()
        self._frozen.set()
        assert self._listener is not None
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for client in self._clients:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            client.close()
        for thread in self._threads:
            thread.join()
        self._clients, self._threads = [], []

    def freeze(self) -> None:
        """Keep the connections and send no more; those made later send again."""
        frozen, self._frozen = self._frozen, threading.Event()
        frozen.set()

    def _spawn(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, stop: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                client, _ = listener.accept()
                self._clients.append(client)
                self.connections += 1
                self._spawn(self._serve, client, stop, self._frozen)

    def _serve(self, client: socket.socket, stop: threading.Event, frozen: threading.Event) -> None:
        with contextlib.suppress(OSError):
            client.recv(4096)
            client.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace;boundary=cut\r\n\r\n")
            number = 0
            while not stop.is_set() and not frozen.wait(FRAME_S):
                picture = np.full((*self.size, 3), number % 200 + 20, np.uint8)
                data = cv2.imencode(".jpg", picture)[1].tobytes()
                if self.garbage:
                    self.garbage -= 1
                    data = data[: len(data) // 2] if self.garbage % 2 else bytes(range(256)) * 4
                client.sendall(b"--cut\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data))
                client.sendall(data + b"\r\n")
                number += 1
