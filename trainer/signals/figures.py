"""Figures over windows and over points of signals, with intervals that know that windows overlap.

It must not know detectors or files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploy.metrics import image_auroc

if TYPE_CHECKING:
    import numpy.typing as npt

_DRAWS = 1000
_CONFIDENCE = 0.95
# Windows of neighbouring groups overlap too. Drawn alone, groups gave intervals 0.81 to 0.86 times as wide as the
# figure's own spread over repeated noise; in runs of five, 0.92 to 0.95.
_RUN = 5
_LEAST_RUNS = 10


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95 % bootstrap interval; None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


def window_auroc(
    labels: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating], groups: npt.NDArray[np.str_], *, seed: int = 0
) -> Interval:
    """Return the AUROC over windows; its interval is of runs of neighbouring groups drawn again.

    This is the circular block bootstrap (Politis and Romano 1992): windows overlap within a group and across its ends.
    With few groups the runs are shorter, so that there are ten of them.

    Args:
        labels: bool [n], True is anomalous.
        scores: float [n].
        groups: unicode [n], in the order of time.
        seed: of the draws.
    """
    value = image_auroc(labels, scores)
    if value is None:
        return Interval(None, None, None)
    first, names = np.unique(groups, return_index=True, return_inverse=True)[1:]
    of, count = first.argsort().argsort()[names], len(first)
    run = np.arange(min(_RUN, max(1, count // _LEAST_RUNS)))
    generator, found = np.random.default_rng(seed), []
    ranks = np.unique(scores, return_inverse=True)[1]
    for _ in range(_DRAWS):
        begins = generator.integers(0, count, -(-count // len(run)))
        weights = np.bincount((begins[:, np.newaxis] + run).ravel() % count, minlength=count)[of]
        one = _weighted_auroc(labels, ranks, weights)
        if one is not None:
            found.append(one)
    low, high = np.quantile(found, ((1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2))
    return Interval(value, float(low), float(high))


def _weighted_auroc(
    labels: npt.NDArray[np.bool_], ranks: npt.NDArray[np.intp], weights: npt.NDArray[np.intp]
) -> float | None:
    good = np.bincount(ranks, weights * ~labels).astype(np.float64)
    bad = np.bincount(ranks, weights * labels, minlength=len(good)).astype(np.float64)
    if not good.sum() or not bad.sum():
        return None
    below = np.concatenate([[0.0], good.cumsum()[:-1]])
    return float((bad * (below + good / 2)).sum() / (good.sum() * bad.sum()))


def point_auroc(points: npt.NDArray[np.bool_], maps: npt.NDArray[np.floating]) -> float | None:
    """Return the AUROC over the cells of anomalous windows; a cell counts as labelled where half of it is.

    Args:
        points: bool [n, Q], labelled samples; windows without any are left out.
        maps: float [n, K, Q / cell]; channels are averaged, as labels do not tell them apart.
    """
    chosen = points.any(1)
    if not chosen.any():
        return None
    cells = points[chosen].reshape(int(chosen.sum()), maps.shape[2], -1).mean(2) >= 0.5  # noqa: PLR2004 (half)
    return image_auroc(cells.ravel(), maps[chosen].mean(1).ravel())
