"""The bounded queue between a capture and its consumer, with an explicit drop policy. Knows no source."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from edge.capture.settings import DropPolicy

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from edge.frames import Frame


class FrameQueue:
    """Frames that wait to be judged; at any time captured = delivered + dropped + those waiting.

    Every method is called with the condition's lock held.

    Args:
        policy: what happens when it is full.
        capacity: frames, >= 1.
        changed: notified whenever a frame comes or goes.
    """

    def __init__(self, *, policy: DropPolicy, capacity: int, changed: threading.Condition) -> None:
        self._policy = policy
        self._capacity = capacity
        self._changed = changed
        self._frames: deque[Frame] = deque()
        self.captured = self.delivered = self.dropped = 0

    def __len__(self) -> int:
        return len(self._frames)

    def put(self, frame: Frame, *, ends: Callable[[], bool]) -> Frame | None:
        """Take a frame in.

        Args:
            frame: the newest.
            ends: whether waiting for room has become pointless; looked at whenever the condition is notified.

        Returns:
            The frame that the policy drops for it, perhaps itself; None when there was room.
        """
        lost: Frame | None = None
        if self._policy is DropPolicy.WAIT:
            self._changed.wait_for(lambda: len(self._frames) < self._capacity or ends())
        self.captured += 1
        if len(self._frames) < self._capacity:
            self._frames.append(frame)
        elif self._policy is DropPolicy.DROP_OLDEST:
            lost = self._frames.popleft()
            self._frames.append(frame)
        else:
            lost = frame
        self.dropped += lost is not None
        self._changed.notify_all()
        return lost

    def refuse(self, frame: Frame) -> Frame:
        """Count a frame as captured and dropped, and return it."""
        self.captured += 1
        self.dropped += 1
        return frame

    def take(self) -> Frame | None:
        """Hand the oldest frame over; None when there is none."""
        if not self._frames:
            return None
        self.delivered += 1
        self._changed.notify_all()
        return self._frames.popleft()

    def clear(self) -> list[Frame]:
        """Drop all frames that wait, and return them."""
        left = list(self._frames)
        self._frames.clear()
        self.dropped += len(left)
        self._changed.notify_all()
        return left
