"""Frame buffers that are used again once nobody holds them. Knows nothing of cameras."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


class BufferPool:
    """Buffers of one shape: a fresh 6 MB array a frame costs page faults.

    A buffer is free when its reference count is back to that of an untouched one; a view of a frame holds its
    buffer too, so a consumer may keep a frame as long as it likes. Used by one thread.

    Args:
        limit: buffers kept; beyond them each one taken is fresh and goes with its last holder.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffers: list[npt.NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return a buffer that nobody else refers to; another shape than before lets the old buffers go."""
        if self._buffers and self._buffers[0].shape != shape:
            self._buffers = []
        # The count of an untouched array in a list, read the same way, so no interpreter's convention is assumed.
        idle = _references([np.empty(0, np.uint8)], 0)
        for index in range(len(self._buffers)):
            if _references(self._buffers, index) == idle:
                return self._buffers[index]
        buffer: npt.NDArray[np.uint8] = np.empty(shape, np.uint8)
        if len(self._buffers) < self._limit:
            self._buffers.append(buffer)
        return buffer

    def clear(self) -> None:
        """Let go of all buffers; frames that somebody still holds stay as they are."""
        self._buffers = []

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the buffers kept lie in memory."""
        return tuple(buffer.ctypes.data for buffer in self._buffers)


def _references(buffers: list[npt.NDArray[np.uint8]], index: int) -> int:
    return sys.getrefcount(buffers[index])
