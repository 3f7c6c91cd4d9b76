"""How far a memory moved from the trainer's, and how far it may move in a week.

Pure numpy; it must not know clocks (times are given) nor where the history is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edge.errors import DataError
from edge.memory.search import nearest

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]

WEEK = 7 * 24 * 3600
_FAR_SHARE = 0.05  # of rows; a mean over all would hide the few rows that a defect needs


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a bank is from the reference, in mean distances of good patches to the reference.

    Attributes:
        learned: distance to the reference of the candidate's farthest twentieth of rows: looks that the trainer's
            memory does not have.
        forgotten: distance to the candidate of the reference's farthest twentieth: looks that got lost.
    """

    learned: float
    forgotten: float

    @property
    def value(self) -> float:
        """The larger of both."""
        return max(self.learned, self.forgotten)


def good_distance(embeddings: Rows, reference: Rows) -> float:
    """Return the mean distance of good patches to the reference, the unit of :class:`Drift`.

    Args:
        embeddings: float32 [..., D], patch rows of the commissioning set.
        reference: float32 [R, D], the trainer's bank.

    Raises:
        DataError: no patch, widths differ, values that are not finite, or every patch is a row of the reference.
    """
    if not embeddings.size:
        raise DataError("the commissioning set holds no patches; export the bundle again with images declared good")
    squared, _ = nearest(embeddings.reshape(-1, embeddings.shape[-1]), reference)
    unit = float(np.sqrt(squared).mean(dtype=np.float64))
    if unit == 0:
        raise DataError("the commissioning patches are rows of the reference bank itself; give images it has not seen")
    return unit


def measure_drift(candidate: Rows, reference: Rows, unit: float) -> Drift:
    """Measure a candidate bank against the trainer's; repeated rows of either count once.

    Args:
        candidate: float32 [R, D].
        reference: float32 [R', D].
        unit: from :func:`good_distance`, > 0, so that the figures mean the same for every embedding and product.

    Raises:
        DataError: widths differ or values are not finite.
        ValueError: the unit is not positive and finite.
    """
    if not (math.isfinite(unit) and unit > 0):
        raise ValueError(f"unit {unit} must be positive")
    candidate, reference = np.unique(candidate, axis=0), np.unique(reference, axis=0)
    return Drift(learned=_far(candidate, reference) / unit, forgotten=_far(reference, candidate) / unit)


class DriftSettings(BaseModel):
    """How far a memory may move."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Fed nothing but good frames, the memories of three generated webs came to rest at 1.2 to 1.5.
    per_week: float = Field(
        2.0,
        gt=0,
        title="Drift per week",
        description="How much farther from the trainer's memory the bank in force may get within any 7 days, in mean "
        "distances of good patches. Reaching it refuses the new memory and raises an alert.",
    )


@dataclass(frozen=True, slots=True)
class DriftVerdict:
    """Whether a candidate may go live.

    Attributes:
        allowed: whether it stays inside the bound.
        growth: its drift less the baseline; NaN where the clock forbids to judge.
        baseline: the least drift of the memories in force within the last week; NaN likewise.
        reason: why it is refused, with the figures; empty where it is allowed.
    """

    allowed: bool
    growth: float
    baseline: float
    reason: str


class DriftBudget:
    """Bounds the drift of the memories that go live, over a history that outlives restarts.

    The baseline is the least drift of any memory that was in force within the last 7 days: of the newest entry that is
    a week old or more, and of all later ones; before the first entry the trainer's memory was in force, at 0. A clock
    behind the newest entry judges nothing. A clock that jumps ahead is not seen; it grants one week's bound early.
    """

    def __init__(self, settings: DriftSettings | None = None, history: Iterable[tuple[int, float]] = ()) -> None:
        """Go on from a kept history.

        Args:
            settings: the bound; the default if None.
            history: (UTC seconds, drift) of each memory that went live, in order.

        Raises:
            DataError: the history is not in order, or an entry is not finite and >= 0.
        """
        self.settings = settings or DriftSettings()
        self._history = [(int(when), float(drift)) for when, drift in history]
        times = [when for when, _ in self._history]
        if times != sorted(times) or not all(math.isfinite(drift) and drift >= 0 for _, drift in self._history):
            raise DataError("the drift history is damaged; remove the kept memory, it begins again from the bundle")

    @property
    def history(self) -> tuple[tuple[int, float], ...]:
        """What to keep: entries of the last week, and the one before them."""
        return tuple(self._history)

    def judge(self, drift: float, now: int) -> DriftVerdict:
        """Judge a candidate before it goes live.

        Args:
            drift: its :attr:`Drift.value`.
            now: UTC seconds.
        """
        if self._history and now < self._history[-1][0]:
            behind = self._history[-1][0] - now
            return DriftVerdict(
                allowed=False,
                growth=math.nan,
                baseline=math.nan,
                reason=f"the clock is {behind} s behind the last change of memory; set the clock",
            )
        baseline = min(self._in_force(now))
        growth = drift - baseline
        if growth < self.settings.per_week:
            return DriftVerdict(allowed=True, growth=growth, baseline=baseline, reason="")
        return DriftVerdict(
            allowed=False,
            growth=growth,
            baseline=baseline,
            reason=(
                f"drift {drift:.3f} is {growth:.3f} above {baseline:.3f} of the last week, the bound is "
                f"{self.settings.per_week:g}; look at what was learned, then begin again from the bundle or raise the "
                "bound"
            ),
        )

    def record(self, drift: float, now: int) -> None:
        """Remember that a memory went live, whoever allowed it; a clock that went back counts as standing still."""
        when = max(now, self._history[-1][0]) if self._history else now
        self._history.append((when, drift))
        recent = next(i for i, (then, _) in enumerate(self._history) if then > when - WEEK)
        self._history = self._history[max(0, recent - 1) :]

    def _in_force(self, now: int) -> list[float]:
        """Return the drifts of all memories in force at some time of the last week."""
        old = [drift for when, drift in self._history if when <= now - WEEK]
        return [*(old[-1:] or [0.0]), *(drift for when, drift in self._history if when > now - WEEK)]


def _far(rows: Rows, bank: Rows) -> float:
    distance = np.sqrt(nearest(rows, bank)[0])
    count = max(1, round(_FAR_SHARE * len(distance)))
    return float(np.partition(distance, len(distance) - count)[-count:].mean(dtype=np.float64))
