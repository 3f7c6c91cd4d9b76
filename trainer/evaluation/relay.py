"""A TCP relay on this machine whose line can be cut and mended: what a demonstration of a lost network needs."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

_HOST = "127.0.0.1"
_READ_BYTES = 65_536


class Relay:
    """Leads connections on to a port of this machine, until it is cut; a context manager.

    Attributes:
        port: where it listens.

    Args:
        target: port that connections are led on to.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._server = socket.create_server((_HOST, 0))
        self.port: int = self._server.getsockname()[1]
        self._lines: set[socket.socket] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Relay:  # noqa: PYI034 (Self needs Python 3.11)
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()

    def cut(self) -> None:
        """End every connection; new ones are refused as by a machine where nobody listens."""
        with self._lock:
            for line in (self._server, *self._lines):
                _close(line)
            self._lines.clear()

    def mend(self) -> None:
        """Lead new connections on again, on the same port.

        Raises:
            OSError: another program has taken the port meanwhile.
        """
        self._server = socket.create_server((_HOST, self.port))
        self._listen()

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=(self._server,), name="relay", daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                near, _ = server.accept()
                with contextlib.suppress(OSError):
                    self._join(near, server)

    def _join(self, near: socket.socket, server: socket.socket) -> None:
        far = socket.create_connection((_HOST, self._target), timeout=5)
        far.settimeout(None)
        with self._lock:
            if server.fileno() < 0:  # cut meanwhile
                _close(near)
                _close(far)
                return
            self._lines |= {near, far}
        for source, drain in ((near, far), (far, near)):
            threading.Thread(target=self._pump, args=(source, drain), name="relay", daemon=True).start()

    def _pump(self, source: socket.socket, drain: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_READ_BYTES):
                drain.sendall(data)
        with self._lock:
            self._lines -= {source, drain}
        _close(source)
        _close(drain)


def _close(line: socket.socket) -> None:
    with contextlib.suppress(OSError):
        line.shutdown(socket.SHUT_RDWR)
    line.close()
