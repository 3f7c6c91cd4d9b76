"""A sensor for tests: sends chunks of a signal over TCP when it is told to, may lose samples, stall and hang up."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from edge.capture.signal_wire import Chunk, pack

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import numpy as np

HOST = "127.0.0.1"


class SignalSender:
    """One stream to one listener at a time; a new listener gets what is sent from then on.

    Attributes:
        port: of the server.
        number: of the next sample.
    """

    def __init__(self, *, rate_hz: float | None = None, form: Callable[[Chunk], bytes] = pack) -> None:
        self._server = socket.create_server((HOST, 0))
        self.port = self._server.getsockname()[1]
        self.number, self.rate_hz, self.form = 0, rate_hz, form
        self._peer: socket.socket | None = None
        self._came = threading.Condition()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"tcp://{HOST}:{self.port}"

    def wait_for_listener(self, timeout: float = 30.0) -> None:
        with self._came:
            assert self._came.wait_for(lambda: self._peer is not None, timeout), "nobody connects"

    def send(self, samples: np.ndarray) -> None:
        """Send samples [T, K] with the numbers that follow."""
        self.send_raw(self.form(Chunk(self.number, samples, self.rate_hz)))
        self.number += len(samples)

    def send_raw(self, data: bytes) -> None:
        self.wait_for_listener()
        assert self._peer is not None
        try:
            self._peer.sendall(data)
        except OSError:
            self.hang_up()

    def lose(self, count: int) -> None:
        """Go on as if so many samples had been sent."""
        self.number += count

    def hang_up(self) -> None:
        with self._came:
            if self._peer is not None:
                self._peer.close()
                self._peer = None

    def __enter__(self) -> SignalSender:  # noqa: PYI034 (Self needs Python 3.11)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing alone does not wake an accept in progress.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.hang_up()
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._server.accept()
            except OSError:
                return
            with self._came:
                self._peer = peer
                self._came.notify_all()
