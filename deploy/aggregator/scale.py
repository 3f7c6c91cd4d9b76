"""Scale of an update's rows and counts, beside those of other boxes. It measures; it must not know limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from deploy.aggregator.aggregate import LARGEST

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.federation.update import MemoryUpdate

    Rows = npt.NDArray[np.float32]

_FEWEST_PEERS = 4  # boxes; below it a median says nothing about what is usual
_GRAIN_ROWS = (64, 512)  # fewer tell nothing about how close rows lie, more cost time and tell no more
_MAD_TO_DEVIATION = 1.4826  # of a normal distribution


@dataclass(frozen=True, slots=True)
class Scale:
    """Of a set of rows.

    Attributes:
        finite: whether all values are, and within float16; where they are not, the rest is 0.
        spread: median distance of the rows to their mean.
        grain: median distance to the nearest other row as a share of the spread; 0 where there are too few rows.
        per_frame: patches claimed for each frame; 0 for a bank.
    """

    finite: bool
    spread: float
    grain: float
    per_frame: float


class Usual(NamedTuple):
    """What other boxes send: the median of logarithms, and the MAD as a normal distribution's deviation."""

    middle: float
    deviation: float


def scale_of(rows: Rows, per_frame: float = 0.0) -> Scale:
    """Measure rows float32 [R, D], R >= 1."""
    if not (np.abs(rows) <= LARGEST).all():  # NaN compares False
        return Scale(finite=False, spread=0.0, grain=0.0, per_frame=0.0)
    spread = median_distance(rows, rows.mean(0, dtype=np.float64))
    return Scale(finite=True, spread=spread, grain=_grain(rows, spread), per_frame=per_frame)


def scale_of_update(update: MemoryUpdate) -> Scale:
    """Measure an update."""
    return scale_of(update.rows, float(update.support.sum(dtype=np.float64)) / max(update.n_frames, 1))


def median_distance(rows: Rows, centre: npt.NDArray[np.float64]) -> float:
    """Return the median distance of rows float32 [R, D] to a place float64 [D]."""
    return float(np.sqrt(np.median(((rows - centre) ** 2).sum(1))))


class Peers:
    """Scales of a pool's updates, for asking what is usual without one of the boxes."""

    def __init__(self, updates: Sequence[MemoryUpdate], scales: Sequence[Scale]) -> None:
        self._boxes = np.array([update.box for update in updates])
        self._finite = np.array([scale.finite for scale in scales])
        self._values = {
            name: np.array([getattr(scale, name) for scale in scales], np.float64) for name in ("spread", "per_frame")
        }

    def usual(self, name: str, box: str) -> Usual | None:
        """Return what boxes other than ``box`` send, or None where they are fewer than four.

        Args:
            name: ``spread`` or ``per_frame``.
            box: whose updates are left out.
        """
        others = self._finite & (self._values[name] > 0) & (self._boxes != box)
        if len(np.unique(self._boxes[others])) < _FEWEST_PEERS:
            return None
        logs = np.log(self._values[name][others])
        middle = float(np.median(logs))
        return Usual(middle, _MAD_TO_DEVIATION * float(np.median(np.abs(logs - middle))))


def _grain(rows: Rows, spread: float) -> float:
    fewest, most = _GRAIN_ROWS
    if len(rows) < fewest or not spread > 0:
        return 0.0
    some = rows[:: -(-len(rows) // most)].astype(np.float64)
    some -= some.mean(0)
    norm = (some * some).sum(1)
    squared = norm[:, None] + norm - 2 * some @ some.T
    np.fill_diagonal(squared, np.inf)
    return float(np.sqrt(np.median(np.maximum(squared.min(1), 0)))) / spread
