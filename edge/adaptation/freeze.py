"""AlarmWindow: whether so many of the last frames alarmed that nothing may be learned. It knows no frames, no time."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class AlarmWindow:
    """The share of alarms among the last frames, with hysteresis.

    The share is always of the whole window, frames that never came counting as calm: so that few frames can freeze only
    by as many alarms as it takes later.

    Args:
        size: frames in the window.
        freeze_rate: share from which it is frozen, in (0, 1].
        thaw_rate: share down to which it stays frozen, below ``freeze_rate``.
        alarms: of the last frames, oldest first, to go on from.
        frozen: whether it was.
    """

    def __init__(
        self, size: int, freeze_rate: float, thaw_rate: float, alarms: Iterable[bool] = (), *, frozen: bool = False
    ) -> None:
        self._size, self._freeze, self._thaw = size, freeze_rate, thaw_rate
        self._alarms: deque[bool] = deque((bool(one) for one in alarms), maxlen=size)
        self._count = sum(self._alarms)
        self.frozen = frozen

    @property
    def rate(self) -> float:
        """Share of alarms in the window, 0 to 1."""
        return self._count / self._size

    @property
    def alarms(self) -> tuple[bool, ...]:
        """Of the last frames, oldest first."""
        return tuple(self._alarms)

    def take(self, *, alarmed: bool) -> None:
        """Count one judged frame."""
        if len(self._alarms) == self._size:
            self._count -= self._alarms[0]
        self._alarms.append(alarmed)
        self._count += alarmed
        self.frozen = self.rate > self._thaw if self.frozen else self.rate >= self._freeze

    def clear(self) -> None:
        """Forget all frames."""
        self._alarms.clear()
        self._count, self.frozen = 0, False
