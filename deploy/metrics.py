"""Figures of merit of image scores and anomaly maps: numpy, exact, no binning, ties at half.

It must not know of detectors, files or thresholds' origins. A figure that is undefined is None: every figure of two
classes where one class is absent, a rate where its class is absent. A NaN among the scores is a ValueError.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterable

AUPRO_LIMIT = 0.3

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True)
class RocCurve:
    """Points of a ROC curve, from the strictest threshold to the laxest.

    Attributes:
        fpr: float64 [k], share of good samples at or above the threshold, 0 first, 1 last.
        tpr: float64 [k], share of anomalous samples at or above the threshold, 0 first, 1 last.
        thresholds: float64 [k], +inf first, then every distinct score, descending.
    """

    fpr: npt.NDArray[np.float64]
    tpr: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PrCurve:
    """Points of a precision-recall curve, one per distinct score, descending.

    Attributes:
        precision: float64 [k].
        recall: float64 [k], ascending, 1 last.
        thresholds: float64 [k].
    """

    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class F1Max:
    """The best F1 of all thresholds.

    Attributes:
        f1: in (0, 1].
        threshold: the highest threshold that reaches it; at or above it is anomalous.
    """

    f1: float
    threshold: float


@dataclass(frozen=True, slots=True)
class PixelMetrics:
    """Figures over all pixels of a test set.

    Attributes:
        auroc: area under the pixels' ROC curve; None without good or without anomalous pixels.
        aupro: area under the per-region-overlap curve; None in the same cases.
        regions: connected anomalous regions, over all masks.
        good_pixels: pixels outside all masks.
        anomalous_pixels: pixels inside a mask.
        ap: precision of the pixels averaged over their recall, at every distinct score; None in the same cases.
    """

    auroc: float | None
    aupro: float | None
    regions: int
    good_pixels: int
    anomalous_pixels: int
    ap: float | None = None


def image_auroc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float | None:
    """Area under the ROC curve: the chance that an anomalous image scores above a good one, ties at half.

    Args:
        labels: bool (or 0 and 1) [n], True is anomalous.
        scores: float [n], higher is more anomalous; infinities rank as such.

    Returns:
        In [0, 1]; 0.5 where all scores are equal; None where a class is absent.

    Raises:
        ValueError: shapes differ, labels are not binary, or a score is NaN.
    """
    false, true, _ = _counts(labels, scores)
    if false.size == 0 or false[-1] == 0 or true[-1] == 0:
        return None
    # Whole numbers until the division: 2 * area * positives * negatives stays far below 2**63.
    doubled = np.sum(np.diff(false, prepend=0) * (true + np.concatenate(([0], true[:-1]))))
    return int(doubled) / (2 * int(false[-1]) * int(true[-1]))


def image_ap(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float | None:
    """Average precision: precision averaged over the steps of recall, without interpolation.

    Args:
        labels: as in :func:`image_auroc`.
        scores: as in :func:`image_auroc`.

    Returns:
        In (0, 1]; the share of anomalous images where all scores are equal; None where a class is absent.

    Raises:
        ValueError: as in :func:`image_auroc`.
    """
    false, true, _ = _counts(labels, scores)
    if false.size == 0 or false[-1] == 0 or true[-1] == 0:
        return None
    precision = true / (true + false)
    return float(np.sum(np.diff(true, prepend=0) * precision) / true[-1])


def image_f1(labels: npt.ArrayLike, scores: npt.ArrayLike) -> F1Max | None:
    """F1 at the best threshold (F1-max), which sees the test labels: a figure to compare, not one to run with.

    Args:
        labels: as in :func:`image_auroc`.
        scores: as in :func:`image_auroc`.

    Returns:
        The figure and the highest threshold that reaches it; None where a class is absent.

    Raises:
        ValueError: as in :func:`image_auroc`.
    """
    false, true, thresholds = _counts(labels, scores)
    if false.size == 0 or false[-1] == 0 or true[-1] == 0:
        return None
    f1 = 2 * true / (true + false + true[-1])
    best = int(np.argmax(f1))
    return F1Max(f1=float(f1[best]), threshold=float(thresholds[best]))


def roc_curve(labels: npt.ArrayLike, scores: npt.ArrayLike) -> RocCurve | None:
    """Every point of the ROC curve, collinear ones included.

    Args:
        labels: as in :func:`image_auroc`.
        scores: as in :func:`image_auroc`.

    Returns:
        The curve; None where a class is absent.

    Raises:
        ValueError: as in :func:`image_auroc`.
    """
    false, true, thresholds = _counts(labels, scores)
    if false.size == 0 or false[-1] == 0 or true[-1] == 0:
        return None
    start = np.zeros(1)
    return RocCurve(
        fpr=np.concatenate((start, false / false[-1])),
        tpr=np.concatenate((start, true / true[-1])),
        thresholds=np.concatenate(([np.inf], thresholds)),
    )


def pr_curve(labels: npt.ArrayLike, scores: npt.ArrayLike) -> PrCurve | None:
    """Every point of the precision-recall curve.

    Args:
        labels: as in :func:`image_auroc`.
        scores: as in :func:`image_auroc`.

    Returns:
        The curve; None where a class is absent.

    Raises:
        ValueError: as in :func:`image_auroc`.
    """
    false, true, thresholds = _counts(labels, scores)
    if false.size == 0 or false[-1] == 0 or true[-1] == 0:
        return None
    return PrCurve(precision=true / (true + false), recall=true / true[-1], thresholds=thresholds)


def fpr_at_threshold(labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float) -> float | None:
    """Share of good images at or above a frozen threshold.

    Args:
        labels: as in :func:`image_auroc`.
        scores: as in :func:`image_auroc`.
        threshold: raw score; an image at it counts as anomalous, as on the box.

    Returns:
        In [0, 1]; None where there is no good image.

    Raises:
        ValueError: as in :func:`image_auroc`, or the threshold is NaN.
    """
    return _share_above(*_checked(labels, scores), threshold, anomalous=False)


def recall_at_threshold(labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float) -> float | None:
    """Share of anomalous images at or above a frozen threshold.

    Args:
        labels: as in :func:`image_auroc`.
        scores: as in :func:`image_auroc`.
        threshold: as in :func:`fpr_at_threshold`.

    Returns:
        In [0, 1]; None where there is no anomalous image.

    Raises:
        ValueError: as in :func:`fpr_at_threshold`.
    """
    return _share_above(*_checked(labels, scores), threshold, anomalous=True)


def pixel_metrics(
    masks: Iterable[npt.ArrayLike], maps: Iterable[npt.ArrayLike], *, limit: float = AUPRO_LIMIT
) -> PixelMetrics:
    """P-AUROC, pixel AP and AUPRO in one pass over the pixels and one sort of the good ones.

    The curve of the mean per-region overlap (the share of a region at or above the threshold, averaged over all
    8-connected regions of all masks) against the false-positive rate over good pixels has a point per distinct score,
    joined by straight lines. Its integral from 0 to ``limit`` is divided by ``limit``. (Bergmann et al., "The MVTec
    Anomaly Detection Dataset", IJCV 2021, section 4.) A region pixel adds to that curve a ramp between the rates just
    above its score and at it, so its share of the integral has a closed form and no curve is stored.

    Args:
        masks: bool (or 0 and non-zero) [H, W] each; empty for a good image. Sizes may differ between images.
        maps: float [H, W] each, of the mask's size. May be generators: memory is that of the good pixels' scores.
        limit: highest false-positive rate of the AUPRO, in (0, 1].

    Returns:
        The figures. Maps that are constant over the set give an AUROC of 0.5 and an AUPRO of limit / 2.

    Raises:
        ValueError: counts or sizes differ, a map holds a NaN, or the limit is out of range.
    """
    if not 0.0 < limit <= 1.0:
        raise ValueError(f"limit is {limit}, expected a rate in (0, 1]")
    good, defects = _split_pixels(masks, maps)
    good_count, anomalous_count = good.size, sum(scores.size for scores, _, _ in defects)
    regions = sum(count for _, _, count in defects)
    if good_count == 0 or anomalous_count == 0:
        return PixelMetrics(None, None, regions, good_count, anomalous_count)
    reach = limit * good_count
    doubled, overlap = 0, 0.0
    for scores, region, count in defects:
        order = np.argsort(scores)  # sorted queries keep the binary search inside the cache
        queries = scores[order].astype(good.dtype, copy=False)
        above = good_count - np.searchsorted(good, queries, side="right")
        reached = good_count - np.searchsorted(good, queries, side="left")
        doubled += int(np.sum(2 * good_count - above - reached))
        ramp = np.square(np.maximum(reach - above, 0.0)) / (2.0 * np.maximum(reached - above, 1))
        area = np.where(reached <= reach, reach - (above + reached) / 2.0, ramp)
        in_order = region[order]
        sums = np.bincount(in_order, weights=area, minlength=count)
        overlap += float(np.sum(sums / np.bincount(in_order, minlength=count)))
    return PixelMetrics(
        auroc=doubled / (2 * good_count * anomalous_count),
        aupro=overlap / (regions * reach),
        regions=regions,
        good_pixels=good_count,
        anomalous_pixels=anomalous_count,
        ap=_pixel_ap(good, np.concatenate([scores for scores, _, _ in defects])),
    )


def _pixel_ap(good: Floats, anomalous: Floats) -> float:
    """Return the sum over distinct scores of the recall gained times the precision there; ``good`` is sorted."""
    scores, counts = np.unique(anomalous.astype(good.dtype, copy=False), return_counts=True)
    found = counts[::-1].cumsum()[::-1]
    false = good.size - np.searchsorted(good, scores, side="left")
    return float(np.sum(counts / anomalous.size * (found / (found + false))))


def pixel_auroc(masks: Iterable[npt.ArrayLike], maps: Iterable[npt.ArrayLike]) -> float | None:
    """Area under the pixels' ROC curve; see :func:`pixel_metrics`, which gives both figures at the cost of one."""
    return pixel_metrics(masks, maps).auroc


def aupro(masks: Iterable[npt.ArrayLike], maps: Iterable[npt.ArrayLike], *, limit: float = AUPRO_LIMIT) -> float | None:
    """Area under the region-overlap curve; see :func:`pixel_metrics`, which gives both figures at the cost of one."""
    return pixel_metrics(masks, maps, limit=limit).aupro


def regions_of(mask: npt.NDArray[np.bool_]) -> tuple[int, npt.NDArray[np.int32]]:
    """Label the 8-connected regions of a mask.

    Returns:
        The number of regions, and int32 [H, W] with 0 outside and 1..n inside.
    """
    count, labels = cv2.connectedComponents(np.ascontiguousarray(mask, dtype=np.uint8), connectivity=8)
    return count - 1, np.asarray(labels, dtype=np.int32)


def checked_pixels(mask: npt.ArrayLike, anomaly_map: npt.ArrayLike) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Validate a mask and its map.

    Raises:
        ValueError: not two-dimensional, of different sizes, or a NaN in the map.
    """
    truth, scores = np.asarray(mask), np.asarray(anomaly_map)
    if truth.ndim != 2 or truth.shape != scores.shape:  # noqa: PLR2004
        raise ValueError(f"mask is {truth.shape} and its map {scores.shape}; both must be [H, W] of one size")
    return truth != 0, _floating(scores)


def _floating(scores: npt.NDArray[Any]) -> Floats:
    # Catches labels and scores given in the wrong order, which would otherwise pass silently.
    if scores.dtype == np.bool_ or not np.issubdtype(scores.dtype, np.number) or np.iscomplexobj(scores):
        raise ValueError(f"scores are {scores.dtype}, expected real numbers")
    scores = scores if np.issubdtype(scores.dtype, np.floating) else scores.astype(np.float64)
    # The minimum propagates a NaN and needs no temporary array.
    if scores.size and np.isnan(np.min(scores)):
        raise ValueError("a score is NaN; a detector that gives NaN has to be repaired, not ranked")
    return scores


def _checked(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[npt.NDArray[np.bool_], Floats]:
    truth, values = np.asarray(labels), np.asarray(scores)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise ValueError(f"labels are {truth.shape} and scores {values.shape}; both must be [n] of one length")
    if truth.size == 0:
        return np.zeros(0, np.bool_), np.zeros(0)
    if truth.dtype != np.bool_:
        if not np.issubdtype(truth.dtype, np.integer) or not np.isin(truth, (0, 1)).all():
            raise ValueError("labels must be bool, or whole numbers 0 (good) and 1 (anomalous)")
        truth = truth.astype(np.bool_)
    return truth, _floating(values)


def _counts(
    labels: npt.ArrayLike, scores: npt.ArrayLike
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Cumulative false and true positives at every distinct score, descending, and those scores."""
    truth, values = _checked(labels, scores)
    order = np.argsort(values)[::-1]
    descending = values[order]
    # Comparison, not difference: inf - inf is NaN.
    last_of_tie = np.append(np.flatnonzero(descending[1:] != descending[:-1]), values.size - 1)
    if values.size == 0:
        last_of_tie = last_of_tie[:0]
    true = np.cumsum(truth[order], dtype=np.int64)[last_of_tie]
    return last_of_tie + 1 - true, true, descending[last_of_tie].astype(np.float64)


def _share_above(truth: npt.NDArray[np.bool_], scores: Floats, threshold: float, *, anomalous: bool) -> float | None:
    if np.isnan(threshold):
        raise ValueError("the threshold is NaN")
    # In double, as the box compares: numpy would round a Python threshold to float32 beside float32 scores.
    chosen = scores[truth == anomalous].astype(np.float64)
    return float(np.mean(chosen >= threshold)) if chosen.size else None


def _split_pixels(
    masks: Iterable[npt.ArrayLike], maps: Iterable[npt.ArrayLike]
) -> tuple[Floats, list[tuple[Floats, npt.NDArray[np.int32], int]]]:
    """Good pixels' scores, ascending; per image with defects its pixels' scores, regions (from 0) and their count."""
    good: list[Floats] = []
    defects: list[tuple[Floats, npt.NDArray[np.int32], int]] = []
    for mask, anomaly_map in zip(masks, maps, strict=True):
        truth, scores = checked_pixels(mask, anomaly_map)
        if truth.any():
            count, labels = regions_of(truth)
            defects.append((scores[truth], labels[truth] - 1, count))
            good.append(scores[~truth])
        else:
            good.append(scores.ravel())
    kind = np.result_type(np.float32, *{chunk.dtype for chunk in good}, *{scores.dtype for scores, _, _ in defects})
    ascending = np.empty(sum(chunk.size for chunk in good), kind)
    filled = ascending.size
    while good:  # chunks are let go as they are copied, so that the scores are held about once
        chunk = good.pop()
        ascending[filled - chunk.size : filled] = chunk
        filled -= chunk.size
    ascending.sort()
    return ascending, defects
