"""From scores to figures: false positives, misses and I-AUROC under shifts, what a correction recovers.

It must not know images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks._shift_scores import NONE
from benchmarks._shifts import CLEAN
from deploy.bootstrap import draw_groups, weighted_auroc

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from benchmarks._shift_scores import Scores

    Draws = npt.NDArray[np.float64]

RESAMPLES = 1000
LEAST_RISE = 0.02
"""A smaller rise of false positives is none: a share of it says nothing."""
FALSE_POSITIVES, MISSES, AUROC = "false positives", "misses", "I-AUROC"


@dataclass(frozen=True)
class Estimate:
    """A figure and its percentile bootstrap.

    Attributes:
        value: on the images as they are; NaN where it is undefined.
        draws: float64 [B], the same in each resample.
    """

    value: float
    draws: Draws

    @property
    def interval(self) -> tuple[float, float]:
        """Ends of the 95 % interval; NaN where undefined."""
        if not np.isfinite(self.draws).any():
            return (float("nan"), float("nan"))
        low, high = np.nanquantile(self.draws, (0.025, 0.975))
        return float(low), float(high)

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "-"
        low, high = self.interval
        return f"{self.value:.2f} ({low:.2f} to {high:.2f})"


class Figures:
    """Figures of detectors, means over folders; all share the same draws of image groups, so differences are paired.

    The intervals hold for other images of the same folders, trainings and thresholds, not for other folders.

    Args:
        folders: scores of at least one, all of the same detectors, corrections and conditions.
        resamples: draws.
        seed: of the draws.
        matched: None takes the thresholds that were calibrated on held-out images; else those that this share of the
            judged good images reaches when clean and uncorrected, so that every folder starts from the same rate.
    """

    def __init__(
        self, folders: Sequence[Scores], *, resamples: int = RESAMPLES, seed: int = 0, matched: float | None = None
    ) -> None:
        self.folders, self._matched = tuple(folders), matched
        self._thresholds = [
            one.thresholds
            if matched is None
            else {name: reached_by(found[NONE][CLEAN][0], matched) for name, found in one.scores.items()}
            for one in folders
        ]
        self._weights = []
        rng = np.random.default_rng(seed)
        for one in folders:
            labels = np.r_[np.zeros(len(one.groups[0]), bool), np.ones(len(one.groups[1]), bool)]
            groups = np.array([*one.groups[0], *one.groups[1]], np.str_)
            drawn = draw_groups(labels, groups, resamples, rng)
            # The first row is the images as they are.
            self._weights.append(np.concatenate([np.ones((1, len(labels)), np.int64), drawn]))
        self._known: dict[tuple[str, ...], Draws] = {}

    def alone(self, one: Scores) -> Figures:
        """Return one folder's figures by the same thresholds, without intervals."""
        return Figures([one], resamples=1, matched=self._matched)

    @property
    def detectors(self) -> tuple[str, ...]:
        """Names."""
        return tuple(self.folders[0].scores)

    def rate(self, what: str, names: Sequence[str], correction: str, conditions: Sequence[str]) -> Estimate:
        """Return a figure, mean over detectors, conditions and folders.

        Args:
            what: :data:`FALSE_POSITIVES`, :data:`MISSES` or :data:`AUROC`.
            names: of detectors, at least one.
            correction: one of :data:`benchmarks._shift_scores.CORRECTIONS`.
            conditions: at least one.
        """
        return _estimate(self._mean(what, names, correction, conditions))

    def recovery(self, names: Sequence[str], correction: str, conditions: Sequence[str]) -> Estimate:
        """Return the share of the rise in false positives that a correction takes back.

        The rise is from clean images to shifted ones, both uncorrected. 1 is all; below 0 it does harm. NaN where the
        rise is below :data:`LEAST_RISE`.
        """
        clean = self._mean(FALSE_POSITIVES, names, NONE, [CLEAN] * len(conditions), conditions)
        shifted, corrected = (self._mean(FALSE_POSITIVES, names, how, conditions) for how in (NONE, correction))
        rise = shifted - clean
        found = np.full(rise.shape, np.nan)
        np.divide(shifted - corrected, rise, out=found, where=rise >= LEAST_RISE)
        return _estimate(found)

    def cost(self, names: Sequence[str], correction: str) -> Estimate:
        """Return the I-AUROC that a correction loses on clean images; below 0 it gains."""
        before, after = (self._mean(AUROC, names, how, [CLEAN]) for how in (NONE, correction))
        return _estimate(before - after)

    def _mean(
        self, what: str, names: Sequence[str], correction: str, conditions: Sequence[str], on: Sequence[str] = ()
    ) -> Draws:
        """Mean of figures; ``on`` names conditions whose images count, where that are fewer."""
        cells = [
            self._folder(index, what, name, correction, (condition, images))
            for index in range(len(self.folders))
            for name in names
            for condition, images in zip(conditions, on or conditions, strict=True)
        ]
        return np.asarray(np.mean(cells, axis=0))

    def _folder(self, index: int, what: str, name: str, correction: str, on: tuple[str, str]) -> Draws:
        key = (str(index), what, name, correction, *on)
        condition, images = on
        if key not in self._known:
            one = self.folders[index]
            places = [
                (judged, set(wanted)) for judged, wanted in zip(one.rows[condition], one.rows[images], strict=True)
            ]
            kept = [np.array([i in wanted for i in judged], bool) for judged, wanted in places]
            good, bad = (
                np.array(part, np.float64)[keep]
                for part, keep in zip(one.scores[name][correction][condition], kept, strict=True)
            )
            first = len(one.groups[0])
            columns = [np.array(judged)[keep] for (judged, _), keep in zip(places, kept, strict=True)]
            weights, threshold = (
                self._weights[index][:, np.r_[columns[0], first + columns[1]]],
                self._thresholds[index][name],
            )
            if what == AUROC:
                labels = np.r_[np.zeros(len(good), bool), np.ones(len(bad), bool)]
                self._known[key] = weighted_auroc(labels, np.r_[good, bad])(weights)
            elif what == MISSES:
                self._known[key] = _share(bad < threshold, weights[:, len(good) :])
            else:
                self._known[key] = _share(good >= threshold, weights[:, : len(good)])
        return self._known[key]


def reached_by(scores: Sequence[float], share: float) -> float:
    """Return the threshold that at most this share of scores reaches, as near to it as their number allows."""
    ranked = np.sort(np.array(scores, np.float64))
    return float(np.nextafter(ranked[len(ranked) - 1 - int(share * len(ranked) + 1e-9)], np.inf))


def _share(hits: npt.NDArray[np.bool_], weights: npt.NDArray[np.int64]) -> Draws:
    drawn = weights.sum(axis=1)
    found = np.full(drawn.shape, np.nan)
    np.divide((weights * hits).sum(axis=1), drawn, out=found, where=drawn > 0)
    return found


def _estimate(row: Draws) -> Estimate:
    return Estimate(float(row[0]), row[1:])
