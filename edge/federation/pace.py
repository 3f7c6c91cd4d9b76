"""How large the next chunk is: about two seconds of the link, and less after a loss. No sockets, no clock."""

from __future__ import annotations

from edge.federation.messages import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES

# Below it headers and encryption cost more than a lost chunk would.
LEAST_BYTES = 2048
AIM_S = 2.0
_GROWTH = 2.0


class Pace:
    """Chunk size in bytes, between 2 KiB and 256 KiB.

    A cut costs what was on its way, and a long chunk delays heartbeats and looks like silence; a short one costs a
    header and a round trip.
    """

    def __init__(self) -> None:
        self._size = float(DEFAULT_CHUNK_BYTES)

    def within(self, most: int) -> int:
        """Return the size of the next chunk, at most ``most``."""
        self._size = max(1.0, min(self._size, most))
        return int(self._size)

    def arrived(self, size: int, seconds: float) -> None:
        """A chunk of ``size`` bytes was answered after ``seconds``."""
        if size < int(self._size):
            return  # the last of an update: its time is mostly the round trip's
        wanted = AIM_S * size / max(seconds, 1e-3)
        self._size = min(max(min(wanted, _GROWTH * self._size), LEAST_BYTES), MAX_CHUNK_BYTES)

    def lost(self) -> None:
        """The connection ended, or fell silent, in the middle of a chunk."""
        self._size = max(self._size / 2, LEAST_BYTES)
