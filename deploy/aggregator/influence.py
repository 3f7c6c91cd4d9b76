"""What an update would do to a memory's view of canaries. It measures; it must not know limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.memory.search import nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from deploy.aggregator.canaries import Canaries
    from edge.federation.update import MemoryUpdate

    Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Influence:
    """Of an update on canaries; distances are divided by the alarm threshold.

    Attributes:
        canaries: canary defects that alarm without the update; only these are looked at.
        canary_pull: how much nearer the memory comes to them, mean >= 0.
        clean_pull: how much nearer it comes to good patches, mean >= 0.
        silenced: share of these defects that no longer alarm with the update, at a threshold that as many good patches
            pass as before.
        kin: share of the update's rows that are new and nearer to a defect than to anything good; 0 where nothing is
            known but other boxes.
    """

    canaries: int
    canary_pull: float = 0.0
    clean_pull: float = 0.0
    silenced: float = 0.0
    kin: float = 0.0


class Trial:
    """Canaries, and how far they are from a trusted bank or, without one, from the rows of all other boxes."""

    def __init__(
        self, canaries: Canaries, *, reference: Rows | None, updates: Sequence[MemoryUpdate], fewest: int
    ) -> None:
        """Measure distances once for a whole pool: linear in its updates.

        Args:
            canaries: what updates are tried on.
            reference: float32 [R, D], a trusted bank; None is all other boxes' rows.
            updates: of the pool; finite. Not used where there is a reference.
            fewest: canary defects that must alarm; with fewer nothing else is measured.
        """
        self._canaries = canaries
        self._reference = reference
        self._fewest = fewest
        rows = [("", reference)] if reference is not None else [(update.box, update.rows) for update in updates]
        self._defect, self._good = _TwoNearest(canaries.defect, rows), _TwoNearest(canaries.good, rows)

    def influence(self, update: MemoryUpdate, *, reach: float) -> Influence:
        """Measure an update.

        Args:
            update: finite.
            reach: a row is kin to a defect where it is nearer to one than to anything good, and within this many
                thresholds.
        """
        threshold = self._canaries.threshold
        before, good_before = self._defect.without(update.box), self._good.without(update.box)
        alarming = (before > threshold) & np.isfinite(before)
        count = int(alarming.sum())
        if count < self._fewest:
            return Influence(count)
        before, defects = before[alarming], self._canaries.defect[alarming]
        after = np.minimum(before, _distance(defects, update.rows))
        good_after = np.minimum(good_before, _distance(self._canaries.good, update.rows))
        return Influence(
            canaries=count,
            canary_pull=float((before - after).mean()) / threshold,
            clean_pull=float((good_before - good_after).mean()) / threshold,
            silenced=float((after <= _recalibrated(threshold, good_before, good_after)).mean()),
            kin=self._kin(update.rows, defects, reach),
        )

    def _kin(self, rows: Rows, defects: Rows, reach: float) -> float:
        if self._reference is None:  # all other boxes' rows for each box would take quadratic time
            return 0.0
        to_reference, to_defect = _distance(rows, self._reference), _distance(rows, defects)
        to_good = np.minimum(to_reference, _distance(rows, self._canaries.good))
        new = to_reference > self._canaries.threshold
        near = to_defect < reach * self._canaries.threshold
        return float((new & near & (to_defect < to_good)).mean())


class _TwoNearest:
    """Distances of patches to the nearest source, and to the nearest of the other sources."""

    def __init__(self, patches: Rows, sources: Sequence[tuple[str, Rows]]) -> None:
        self._numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _ in sources))}
        self._first = np.full(len(patches), np.inf, np.float32)
        self._second = self._first.copy()
        self._owner = np.full(len(patches), -1, np.int64)
        for name, rows in sources:
            self._enter(_distance(patches, rows), self._numbers[name])

    def without(self, name: str) -> Rows:
        """Return the distances with one source left out; infinite where there is no other."""
        return np.where(self._owner == self._numbers.get(name, -2), self._second, self._first)

    def _enter(self, distance: Rows, number: int) -> None:
        own = self._owner == number
        closer = ~own & (distance < self._first)
        self._second = np.where(closer, self._first, np.where(own, self._second, np.minimum(self._second, distance)))
        self._first = np.minimum(self._first, distance)
        self._owner[closer] = number


def _recalibrated(threshold: float, before: Rows, after: Rows) -> float:
    """Return the threshold that as many good patches pass after as passed before.

    Any good rows bring a memory nearer to everything, and a box sets its thresholds anew with every memory: with the
    former threshold, honest boxes would seem to silence canaries.
    """
    return min(threshold, float(np.quantile(after, (before <= threshold).mean(), method="higher")))


def _distance(rows: Rows, bank: Rows) -> Rows:
    return np.sqrt(nearest(rows, bank)[0])
