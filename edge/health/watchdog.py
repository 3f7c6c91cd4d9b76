"""Is the box still alive: heartbeats of its loops, and whether its clock is synchronised."""

from __future__ import annotations

import ctypes
import functools
import os
import socket
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

NS_PER_S = 1_000_000_000
NOTIFY_TIMEOUT_S = 0.5
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


class Watchdog:
    """Notices loops that have not reported for too long, on the monotonic clock.

    Args:
        limit_s: seconds of silence after which a loop counts as stuck.
        clock_ns: monotonic nanoseconds.
    """

    def __init__(self, *, limit_s: float, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._limit_ns = round(limit_s * NS_PER_S)
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._beats: dict[str, int] = {}

    def beat(self, loop: str) -> None:
        """Report that a loop goes round; the first call enters it."""
        with self._lock:
            self._beats[loop] = self._clock_ns()

    def forget(self, loop: str) -> None:
        """Take out a loop that has ended in order."""
        with self._lock:
            self._beats.pop(loop, None)

    def stuck(self) -> tuple[str, ...]:
        """Return the loops that are silent for too long, by name."""
        now = self._clock_ns()
        with self._lock:
            return tuple(sorted(name for name, at in self._beats.items() if now - at > self._limit_ns))


def notify_systemd(message: str) -> bool:
    """Send a state such as ``READY=1`` or ``WATCHDOG=1`` to systemd (sd_notify(3)).

    Returns:
        Whether it was sent; False where no service manager asked for it.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
            # A manager that does not read must not stop the box.
            client.settimeout(NOTIFY_TIMEOUT_S)
            client.connect(address.replace("@", "\0", 1) if address.startswith("@") else address)
            client.sendall(message.encode())
    except OSError:
        return False
    return True


@functools.cache
def _libc() -> ctypes.CDLL:
    # Each CDLL makes classes of its own, which only the garbage collector takes away again.
    return ctypes.CDLL(None, use_errno=True)


def clock_synchronised() -> bool | None:
    """Ask the kernel whether the clock follows a time server (adjtimex(2)).

    Returns:
        None where the system cannot say.
    """
    # struct timex has 208 bytes on 64-bit Linux; all zero means: read only.
    buffer = ctypes.create_string_buffer(512)
    try:
        state = _libc().adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR
