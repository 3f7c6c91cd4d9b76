"""How far moments lie from others, as one figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edge.adaptation.moments import IMAGE

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from edge.adaptation.moments import Moments

# A channel that hardly varies has no unit of its own: a grey level, or a part of what the tap's channels usually vary.
_LEAST_GREY, _LEAST_SHARE = 1.0, 0.1
_TINY = 1e-6


def shift_of(moments: Moments, reference: Moments) -> float:
    """Return the size of the shift from reference moments to others.

    The root of the mean, over names and channels, of what the mean moved in deviations of the reference, squared, and
    of the natural logarithm of the ratio of deviations, squared. Every name weighs the same, however many channels it
    has.

    Args:
        moments: with at least the names of the reference.
        reference: what it is compared with.

    Returns:
        In deviations, >= 0; NaN where a value is no number.
    """
    return Shift(reference).of(moments)


class Shift:
    """Measures shifts from one reference: :func:`shift_of` with what depends on the reference alone worked out once.

    Args:
        reference: what is compared with.
    """

    def __init__(self, reference: Moments) -> None:
        self._names = sorted(reference.mean)
        self._mean = self._row(reference.mean)
        units, leasts, weights = [np.empty(0)], [np.empty(0)], [np.empty(0)]
        for name in self._names:
            std = np.asarray(reference.std[name], np.float64)
            least = max(_LEAST_GREY if name == IMAGE else _LEAST_SHARE * float(np.median(std)), _TINY)
            units.append(np.maximum(std, least))
            leasts.append(np.full(std.size, least))
            weights.append(np.full(std.size, 1 / (std.size * len(self._names))))
        self._unit, self._least, self._weight = (np.concatenate(of) for of in (units, leasts, weights))

    def of(self, moments: Moments) -> float:
        """Return the size of the shift to moments that have at least the names of the reference."""
        return self.of_rows(self._row(moments.mean), self._row(moments.std))

    def of_rows(self, mean: npt.NDArray[np.float64], std: npt.NDArray[np.float64]) -> float:
        """Return the size of the shift to moments in rows float64 [C], names in alphabetical order."""
        moved = (mean - self._mean) / self._unit
        scaled = np.log(np.maximum(std, self._least) / self._unit)
        # einsum: no threads of BLAS for a microsecond's work.
        return math.sqrt(float(np.einsum("c,c->", self._weight, moved * moved + scaled * scaled)))

    def _row(self, part: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
        return np.concatenate([np.empty(0), *(part[name] for name in self._names)])
