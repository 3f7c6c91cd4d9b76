"""Running: the moments of one expert as a camera shows them now, learned frame by frame.

It must not know why a frame counts. Means and deviations of all channels lie in one row each, which
costs few calls per frame.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from edge.adaptation.moments import IMAGE, Moments
from edge.adaptation.shift import Shift

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.adaptation.settings import AdaptationSettings

    Row = npt.NDArray[np.float64]

LEAST_STD = 1e-3
"""Below it a channel is still; its deviation is no unit to measure with."""
_HALVINGS = 12
# What is in force is float32: rounding must not carry it over the bound.
_INSIDE = 1 - 1e-5
# The bound counts as reached from the first share of it, and as left below the second.
_AT, _OFF = 0.98, 0.9
# So many frames in a row beyond the bound are no stray ones.
_RUN_OUTSIDE = 10


class Taken(str, Enum):
    """What became of a frame's moments."""

    ACCEPTED = "accepted"
    OUTSIDE = "outside"
    BROKEN = "broken"


class Layout:
    """Where each name's channels lie in a row, taken from the reference."""

    def __init__(self, reference: Moments) -> None:
        self._slices: dict[str, slice] = {}
        start = 0
        for name in sorted(reference.mean):
            self._slices[name] = slice(start, start + len(reference.mean[name]))
            start += len(reference.mean[name])
        self.length = start

    def __getitem__(self, name: str) -> slice:
        return self._slices[name]

    def fits(self, moments: Moments) -> bool:
        """Whether moments have at least the names of the reference, with its channels; others are not followed."""
        for part in (moments.mean, moments.std):
            if not part.keys() >= self._slices.keys():
                return False
            if any(part[name].shape != (place.stop - place.start,) for name, place in self._slices.items()):
                return False
        return True

    def rows(self, moments: Moments) -> tuple[Row, Row]:
        """Return the means and the deviations float64 [length]; they must fit."""
        mean, std = np.empty(self.length), np.empty(self.length)
        for name, place in self._slices.items():
            mean[place], std[place] = moments.mean[name], moments.std[name]
        return mean, std

    def moments(self, mean: Row, std: Row) -> Moments:
        """Return rows as moments, float32."""
        small = mean.astype(np.float32), std.astype(np.float32)
        return Moments(*({name: row[place] for name, place in self._slices.items()} for row in small))


class Running:
    """Exponential averages of moments, around the reference and never far from it.

    A frame moves them by 1 - 2^(-1 / half_life) of the way to its own, no farther than ``clip`` deviations of a channel
    count. After :meth:`begin` they are the plain mean of the frames since, until the exponential one weighs less.

    Args:
        reference: to begin with and to stay near.
        usual: unit of shifts, > 0.
        settings: half-life, clip, scale limit and bound.

    Attributes:
        mean: float64 [C] of all channels.
        std: the same, >= 0.
        count: frames in the plain mean, since :meth:`begin`.
        size: of the shift from the reference, in units of what is usual; never above the bound.
        at_bound: whether the bound keeps it from following; told with hysteresis.
        outside: frames in a row beyond it.
    """

    def __init__(self, reference: Moments, usual: float, settings: AdaptationSettings) -> None:
        self.layout = Layout(reference)
        self._shift, self._usual, self._settings = Shift(reference), usual, settings
        self._ref_mean, self._ref_std = self.layout.rows(reference)
        self._unit = np.maximum(self._ref_std, LEAST_STD)
        self._least_gain = 1 - 0.5 ** (1 / settings.half_life)
        self.mean, self.std = self._ref_mean.copy(), self._ref_std.copy()
        # The reference weighs like frames enough for the exponential average to be in its course.
        self.count = int(np.ceil(1 / self._least_gain))
        self.size, self.at_bound, self.outside = 0.0, False, 0

    def begin(self) -> None:
        """Go back to the reference, which then weighs nothing."""
        self.mean, self.std = self._ref_mean.copy(), self._ref_std.copy()
        self.count, self.size, self.at_bound, self.outside = 0, 0.0, False, 0

    def restore(self, mean: Row, std: Row, count: int, *, outside: int = 0, at_bound: bool = False) -> None:
        """Go on from what was kept; whatever the rows hold, the bound holds."""
        self.count, self.outside, self.at_bound = count, outside, at_bound
        if not np.array_equal(mean, self._ref_mean) or not np.array_equal(std, self._ref_std):
            self._set(mean, std)
            self.at_bound = at_bound or self.at_bound

    def carry(self, other: Running) -> None:
        """Begin under the light that another expert of the same camera is seen in: a gain and an offset per colour."""
        mine, its = self.layout[IMAGE], other.layout[IMAGE]
        mean, std = self._ref_mean.copy(), self._ref_std.copy()
        gain = np.maximum(other.std[its], LEAST_STD) / other._unit[its]
        mean[mine] = (self._ref_mean[mine] - other._ref_mean[its]) * gain + other.mean[its]
        std[mine] = self._ref_std[mine] * gain
        self._set(mean, std)

    @property
    def moments(self) -> Moments:
        """As they are now, float32."""
        return self.layout.moments(self.mean, self.std)

    @property
    def frames(self) -> float:
        """How many frames they are a mean of: of an exponential one, those that give a plain one as certain."""
        lasting: float = 2 / self._least_gain - 1
        return max(1.0, min(self.count, lasting))

    def size_of(self, moments: Moments) -> float:
        """Return the size of the shift from the reference to moments, in units of what is usual."""
        return self._size(*self.layout.rows(moments))

    def take(self, moments: Moments) -> Taken:
        """Follow one frame's moments; those that fit nowhere, are no numbers or lie beyond the bound change nothing."""
        if not self.layout.fits(moments):
            return Taken.BROKEN
        mean, std = self.layout.rows(moments)
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
            return Taken.BROKEN
        size = self._size(mean, std)
        # A NaN is not within.
        if not size <= self._settings.bound:
            self.outside += 1
            self.at_bound = self.at_bound or self.outside >= _RUN_OUTSIDE
            return Taken.OUTSIDE
        self.outside = 0
        gain = max(self._least_gain, 1 / (self.count + 1))
        if self.count:
            step = self._settings.clip * self._unit
            mean = np.clip(mean, self.mean - step, self.mean + step)
            std = np.clip(std, self.std / self._settings.scale, np.maximum(self.std, LEAST_STD) * self._settings.scale)
        self.count += 1
        self._set(self.mean + gain * (mean - self.mean), self.std + gain * (std - self.std))
        return Taken.ACCEPTED

    def _set(self, mean: Row, std: Row) -> None:
        scale, bound = self._settings.scale, self._settings.bound * _INSIDE
        std = np.clip(std, self._ref_std / scale, self._ref_std * scale)
        size = self._size(mean, std)
        if not size <= bound:
            low, high = 0.0, 1.0
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                inside = self._size(*self._between(mean, std, middle)) <= bound
                low, high = (middle, high) if inside else (low, middle)
            mean, std = self._between(mean, std, low)
            size = self._size(mean, std)
        self.mean, self.std, self.size = mean, std, size
        self.at_bound = size >= (_OFF if self.at_bound else _AT) * bound

    def _between(self, mean: Row, std: Row, share: float) -> tuple[Row, Row]:
        return self._ref_mean + share * (mean - self._ref_mean), self._ref_std + share * (std - self._ref_std)

    def _size(self, mean: Row, std: Row) -> float:
        return self._shift.of_rows(mean, std) / self._usual
