"""RecentFrames: the last frames of a box, small, so that an operator or PLC can still declare one of them good.

It must not know why a frame is kept nor what is learned from it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.adaptation.look import PLAIN

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge.adaptation.look import Look

MAX_BYTES = 64 * 2**20


@dataclass(slots=True)
class RecentFrame:
    """A frame as it was judged.

    Attributes:
        canvas: uint8 [canvas_height, canvas_width, 3] RGB.
        score: raw, of the memory that was in force.
        accepted: it was declared good already; it counts once.
        look: how it was seen.
    """

    canvas: npt.NDArray[np.uint8]
    score: float
    part_id: str | None
    accepted: bool = False
    look: Look = PLAIN


class RecentFrames:
    """The newest frames within a budget of bytes. Any thread may call any method.

    Args:
        max_bytes: of canvases; the oldest go first.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._lock = threading.Lock()
        self._frames: OrderedDict[tuple[str, int], RecentFrame] = OrderedDict()

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, camera: str, camera_seq: int, frame: RecentFrame) -> None:
        """Keep a frame, and forget the oldest ones where room is short."""
        with self._lock:
            before = self._frames.pop((camera, camera_seq), None)
            self._frames[camera, camera_seq] = frame
            self._bytes += frame.canvas.nbytes - (0 if before is None else before.canvas.nbytes)
            while self._bytes > self._max_bytes and len(self._frames) > 1:
                _, oldest = self._frames.popitem(last=False)
                self._bytes -= oldest.canvas.nbytes

    def find(self, camera: str, *, camera_seq: int | None = None, part_id: str | None = None) -> RecentFrame | None:
        """Return the frame of a number, or the newest one of a part; None where it is not kept."""
        with self._lock:
            if camera_seq is not None:
                return self._frames.get((camera, camera_seq))
            for (name, _), frame in reversed(self._frames.items()):
                if name == camera and frame.part_id == part_id:
                    return frame
            return None
