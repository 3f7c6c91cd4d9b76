"""How sure a difference between two detectors is: a paired bootstrap that draws groups, not images.

It must not know what the detectors are. Resamples are weights per image, so a metric is computed for all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deploy.metrics import AUPRO_LIMIT, checked_pixels, regions_of

WeightedMetric = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float64]]
"""From weights int64 [B, n] (how often each image was drawn) to the metric of each resample, float64 [B]."""

RESAMPLES = 1000
CONFIDENCE = 0.95
_LEVELS = 1001


@dataclass(frozen=True)
class PairedCategory:
    """Two detectors' metrics on the same images.

    Attributes:
        labels: bool [n], True is anomalous.
        groups: unicode [n]; images of one group are drawn together.
        first: metric of the first detector, see :func:`weighted_auroc` and :func:`weighted_aupro`.
        second: metric of the second.
    """

    labels: npt.NDArray[np.bool_]
    groups: npt.NDArray[np.str_]
    first: WeightedMetric
    second: WeightedMetric


@dataclass(frozen=True)
class Difference:
    """Means over the categories, and how far the difference could be chance.

    Attributes:
        first: mean of the first detector on the images as they are.
        second: mean of the second.
        difference: first - second.
        low: lower end of the percentile interval of the difference.
        high: upper end.
        first_resampled: float64 [B], mean of the first detector in each resample.
        second_resampled: float64 [B], of the second, in the same resamples: an interval of a ratio comes from these.
    """

    first: float
    second: float
    difference: float
    low: float
    high: float
    first_resampled: npt.NDArray[np.float64]
    second_resampled: npt.NDArray[np.float64]


def bootstrap_difference(
    categories: Sequence[PairedCategory],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Compare two detectors over categories by a paired bootstrap of groups.

    In every category groups are drawn with replacement within three strata (only good images, only anomalous, both),
    so that no resample lacks a class; both detectors get the same draw. The interval is the percentile interval
    (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). It holds for other images of the
    same categories, not for other categories.

    Args:
        categories: at least one.
        resamples: how many, >= 1.
        seed: of the draws.
        confidence: of the interval, in (0, 1).

    Raises:
        ValueError: no category, labels and groups of different lengths, a metric that is undefined on the images as
            they are, or an argument out of range.
    """
    if not categories or resamples < 1 or not 0.0 < confidence < 1.0:
        raise ValueError("need a category, a resample and a confidence in (0, 1)")
    rng = np.random.default_rng(seed)
    observed, drawn = np.empty((2, len(categories))), np.empty((2, len(categories), resamples))
    for index, category in enumerate(categories):
        weights = draw_groups(category.labels, category.groups, resamples, rng)
        once = np.ones((1, category.labels.size), np.int64)
        for row, metric in enumerate((category.first, category.second)):
            observed[row, index] = metric(once)[0]
            drawn[row, index] = metric(weights)
    if np.isnan(observed).any() or np.isnan(drawn).any():
        raise ValueError("a metric is undefined on a category; leave out categories without both classes or masks")
    first, second = observed.mean(axis=1)
    first_resampled, second_resampled = drawn.mean(axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(first_resampled - second_resampled, (tail, 1.0 - tail))
    return Difference(
        float(first), float(second), float(first - second), float(low), float(high), first_resampled, second_resampled
    )


def draw_groups(
    labels: npt.NDArray[np.bool_], groups: npt.NDArray[np.str_], resamples: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Draw groups with replacement within strata; see :func:`bootstrap_difference`.

    Returns:
        int64 [resamples, n], how often each image was drawn.

    Raises:
        ValueError: labels and groups differ in length, or there is no image.
    """
    if labels.ndim != 1 or labels.size == 0 or labels.shape != groups.shape:
        raise ValueError(f"labels are {labels.shape} and groups {groups.shape}; both must be [n] of one length >= 1")
    _, group = np.unique(groups, return_inverse=True)
    images, anomalous = np.bincount(group), np.bincount(group, weights=labels)
    stratum = np.where(anomalous == 0, 0, np.where(anomalous == images, 1, 2))
    counts = np.zeros((resamples, images.size), np.int64)
    for kind in range(3):
        members = np.flatnonzero(stratum == kind)
        if members.size:
            counts[:, members] = rng.multinomial(members.size, np.full(members.size, 1 / members.size), resamples)
    return np.asarray(counts[:, group])


def weighted_auroc(labels: npt.NDArray[np.bool_], scores: npt.NDArray[np.floating[Any]]) -> WeightedMetric:
    """Return the exact image AUROC, ties at half, as a function of weights; NaN where a class has no weight.

    Args:
        labels: bool [n].
        scores: float [n].

    Raises:
        ValueError: lengths differ, or a score is NaN.
    """
    if labels.shape != scores.shape or labels.ndim != 1 or np.isnan(scores).any():
        raise ValueError("labels and scores must be [n] of one length, without NaN")
    order = np.argsort(scores, kind="stable")
    ascending, anomalous = scores[order], labels[order]
    ties = np.flatnonzero(np.concatenate(([True], ascending[1:] != ascending[:-1])))

    def metric(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        ranked = weights[:, order]
        good = np.add.reduceat(np.where(anomalous, 0, ranked), ties, axis=1)
        bad = np.add.reduceat(np.where(anomalous, ranked, 0), ties, axis=1)
        doubled = np.sum(bad * (2 * np.cumsum(good, axis=1) - good), axis=1)
        pairs = 2.0 * good.sum(axis=1) * bad.sum(axis=1)
        figure = np.full(pairs.shape, np.nan)
        np.divide(doubled, pairs, out=figure, where=pairs > 0)
        return figure

    return metric


def weighted_aupro(
    masks: Sequence[npt.ArrayLike],
    maps: Callable[[], Iterable[npt.ArrayLike]],
    *,
    limit: float = AUPRO_LIMIT,
    levels: int = _LEVELS,
) -> WeightedMetric:
    """Return the AUPRO as a function of weights, on a grid of thresholds: not the exact figure of deploy/metrics.py.

    The thresholds are quantiles of the good pixels' scores, densest at low false-positive rates; with 1,001 the
    figure is within 0.001 of the exact one on maps without heavy ties.

    Args:
        masks: bool [H, W] each; empty for a good image.
        maps: gives the float [H, W] maps afresh each time it is called (twice), so that they need not be held.
        limit: highest false-positive rate, in (0, 1].
        levels: thresholds, >= 2.

    Raises:
        ValueError: sizes differ, a map holds a NaN, an argument is out of range, or there is no good pixel.
    """
    if not 0.0 < limit <= 1.0 or levels < 2:  # noqa: PLR2004
        raise ValueError("limit must be in (0, 1] and levels at least 2")
    pairs = (checked_pixels(mask, anomaly_map) for mask, anomaly_map in zip(masks, maps(), strict=True))
    thresholds = _threshold_grid([scores[~truth] for truth, scores in pairs], levels)
    above = np.zeros((len(masks), thresholds.size))
    overlap = np.zeros((len(masks), thresholds.size))
    good, regions = np.zeros(len(masks)), np.zeros(len(masks))
    for index, (mask, anomaly_map) in enumerate(zip(masks, maps(), strict=True)):
        truth, scores = checked_pixels(mask, anomaly_map)
        above[index] = _at_or_above(scores[~truth], thresholds)
        good[index] = np.count_nonzero(~truth)
        count, labels = regions_of(truth)
        regions[index] = count
        for region in range(1, count + 1):
            inside = scores[labels == region]
            overlap[index] += _at_or_above(inside, thresholds) / inside.size

    def metric(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        counts = weights.astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):  # no region or no good pixel drawn: NaN, as promised
            rate = (counts @ above) / (counts @ good)[:, np.newaxis]
            mean_overlap = (counts @ overlap) / (counts @ regions)[:, np.newaxis]
        return _area_up_to(rate, mean_overlap, limit) / limit

    return metric


def _threshold_grid(good: list[npt.NDArray[np.floating[Any]]], levels: int) -> npt.NDArray[np.float64]:
    """Descending thresholds: one above all good pixels, then at false-positive rates (i / (levels - 1))**2."""
    ascending = np.sort(np.concatenate(good)) if good else np.zeros(0)
    if ascending.size == 0:
        raise ValueError("there is no good pixel")
    rates = np.linspace(0.0, 1.0, levels) ** 2
    picked = ascending[::-1][np.minimum((rates * ascending.size).astype(np.int64), ascending.size - 1)]
    descending = np.unique(picked.astype(np.float64))[::-1]
    return np.concatenate(([np.nextafter(descending[0], np.inf)], descending))


def _at_or_above(scores: npt.NDArray[np.floating[Any]], thresholds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return scores.size - np.searchsorted(np.sort(scores).astype(np.float64), thresholds, side="left").astype(np.float64)


def _area_up_to(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], limit: float) -> npt.NDArray[np.float64]:
    """Area under the lines through (0, 0) and the points [B, K], from 0 to ``limit``; x ascends along a row."""
    start = np.zeros((x.shape[0], 1))
    x, y = np.concatenate((start, x), axis=1), np.concatenate((start, y), axis=1)
    width = np.diff(x, axis=1)
    inside = np.clip(limit - x[:, :-1], 0.0, width)
    slope = np.divide(np.diff(y, axis=1), width, out=np.zeros_like(width), where=width > 0)
    return np.asarray(np.sum(inside * (y[:, :-1] + slope * inside / 2.0), axis=1))
