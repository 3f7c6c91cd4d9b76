"""What a router's figures mean: which sub-class a frame shows, or none of them, and when a camera changes over.

It must not know frames, corrections or recipes' names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


def nearest(route: npt.NDArray[np.float32]) -> int | None:
    """Return the sub-class that a frame is nearest to.

    Args:
        route: float32 [E], how near it is to each; below 0 everywhere means near to none.

    Returns:
        Its index; None where the frame is near to none, or the router gave something that is no number.
    """
    if not len(route) or not np.isfinite(route).all():
        return None
    index = int(np.argmax(route))
    return index if route[index] >= 0 else None


class Switch:
    """When a camera changes over to another sub-class: after a run of frames that all show it.

    A frame itself is judged at once as what it shows. The camera follows only a run, because what it begins its frames
    with is a guess that costs a second look where it is wrong: one stray frame must not make the next ones wrong.

    Args:
        run: frames in a row that it takes.
        expert: to begin with.

    Attributes:
        expert: that the camera begins its frames with.
        other: that its last frames showed.
        seen: so many of them in a row, since they differed.
    """

    def __init__(self, run: int, expert: int = 0) -> None:
        self._run = run
        self.expert = expert
        self.other, self.seen = expert, 0

    def take(self, shown: int | None) -> bool:
        """Count a frame that showed a sub-class, or none; returns whether the camera changes over with it."""
        if shown is None or shown == self.expert:
            self.seen = 0
            return False
        self.seen = self.seen + 1 if shown == self.other else 1
        self.other = shown
        if self.seen < self._run:
            return False
        self.set(shown)
        return True

    def set(self, expert: int, other: int | None = None, seen: int = 0) -> None:
        """Change over at once, or go on from where a run had got to."""
        self.expert, self.other, self.seen = expert, expert if other is None else other, seen
