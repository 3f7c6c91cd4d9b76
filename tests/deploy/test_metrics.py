"""Metrics against scikit-learn, against slow references, and in every degenerate case."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics as reference

from deploy.metrics import (
    aupro,
    fpr_at_threshold,
    image_ap,
    image_auroc,
    image_f1,
    pixel_auroc,
    pixel_metrics,
    pr_curve,
    recall_at_threshold,
    regions_of,
    roc_curve,
)

TOLERANCE = 1e-12


@st.composite
def two_classes(draw, max_size=60):
    """Labels of both classes, and scores with many ties or none."""
    n = draw(st.integers(2, max_size))
    labels = draw(hnp.arrays(np.bool_, n))
    labels[draw(st.integers(0, n - 1))] = True
    good = draw(st.integers(0, n - 1).filter(lambda i: labels.sum() > 1 or not labels[i]))
    labels[good] = False
    elements = draw(
        st.sampled_from(
            [st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, width=32), st.sampled_from([0.0, -0.0, 1e-30, 1.0])]
        )
    )
    return labels, draw(hnp.arrays(draw(st.sampled_from([np.float32, np.float64])), n, elements=elements))


@settings(max_examples=50)
@given(two_classes())
def test_image_auroc_equals_sklearn(case):
    labels, scores = case
    assert image_auroc(labels, scores) == pytest.approx(reference.roc_auc_score(labels, scores), abs=TOLERANCE)


@settings(max_examples=50)
@given(two_classes())
def test_image_ap_equals_sklearn(case):
    labels, scores = case
    expected = reference.average_precision_score(labels, scores)
    assert image_ap(labels, scores) == pytest.approx(expected, abs=TOLERANCE)


@settings(max_examples=50)
@given(two_classes())
def test_roc_curve_equals_sklearn(case):
    labels, scores = case
    fpr, tpr, thresholds = reference.roc_curve(labels, scores, drop_intermediate=False)
    curve = roc_curve(labels, scores)
    np.testing.assert_allclose(curve.fpr, fpr, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(curve.tpr, tpr, atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(curve.thresholds, thresholds.astype(np.float64))


@settings(max_examples=50)
@given(two_classes())
def test_pr_curve_equals_sklearn(case):
    labels, scores = case
    precision, recall, thresholds = reference.precision_recall_curve(labels, scores)
    curve = pr_curve(labels, scores)
    # scikit-learn goes from the laxest threshold up and appends the point (1, 0).
    np.testing.assert_allclose(curve.precision, precision[:-1][::-1], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(curve.recall, recall[:-1][::-1], atol=TOLERANCE, rtol=0)
    np.testing.assert_array_equal(curve.thresholds, thresholds[::-1].astype(np.float64))


@settings(max_examples=50)
@given(two_classes())
def test_image_f1_is_the_best_of_all_thresholds(case):
    labels, scores = case
    best = image_f1(labels, scores)
    at = {t: reference.f1_score(labels, scores >= t) for t in np.unique(scores)}
    assert best.f1 == pytest.approx(max(at.values()), abs=TOLERANCE)
    assert best.threshold == max(t for t, f1 in at.items() if f1 == pytest.approx(max(at.values()), abs=TOLERANCE))


def test_image_f1_takes_the_highest_of_equally_good_thresholds():
    best = image_f1([True, False, False, True], [4.0, 3.0, 2.0, 1.0])
    assert best.f1 == pytest.approx(2 / 3)
    assert best.threshold == 4.0


@settings(max_examples=50)
@given(two_classes(), st.integers(-3, 3).map(float))
def test_rates_at_threshold_equal_the_confusion_matrix(case, threshold):
    labels, scores = case
    (tn, fp), (fn, tp) = reference.confusion_matrix(labels, scores >= threshold, labels=[False, True])
    assert fpr_at_threshold(labels, scores, threshold) == pytest.approx(fp / (fp + tn), abs=TOLERANCE)
    assert recall_at_threshold(labels, scores, threshold) == pytest.approx(tp / (tp + fn), abs=TOLERANCE)


def test_rates_at_threshold_compare_in_double():
    scores = np.array([0.1], np.float32)  # 0.100000001490116...
    assert recall_at_threshold([True], scores, 0.1000000001) == 1.0
    assert recall_at_threshold([True], scores, 0.1000000016) == 0.0


@pytest.mark.parametrize("labels", [[True, True], [False, False], []])
def test_figures_of_two_classes_are_none_where_a_class_is_absent(labels):
    scores = [0.5] * len(labels)
    assert image_auroc(labels, scores) is None
    assert image_ap(labels, scores) is None
    assert image_f1(labels, scores) is None
    assert roc_curve(labels, scores) is None
    assert pr_curve(labels, scores) is None


def test_rates_are_none_only_where_their_own_class_is_absent():
    assert fpr_at_threshold([True], [1.0], 0.5) is None
    assert recall_at_threshold([True], [1.0], 0.5) == 1.0
    assert fpr_at_threshold([False], [1.0], 1.0) == 1.0
    assert recall_at_threshold([False], [1.0], 0.5) is None


def test_equal_scores_are_chance():
    labels = [True, False, False, False]
    assert image_auroc(labels, [7.0] * 4) == 0.5
    assert image_ap(labels, [7.0] * 4) == 0.25
    assert image_f1(labels, [7.0] * 4).f1 == pytest.approx(0.4)


def test_infinite_scores_rank_as_extremes_and_tie_with_each_other():
    assert image_auroc([False, True], [-np.inf, np.inf]) == 1.0
    assert image_auroc([False, True], [-np.inf, -np.inf]) == 0.5


@pytest.mark.parametrize("figure", [image_auroc, image_ap, image_f1, roc_curve, pr_curve])
def test_nan_score_is_refused(figure):
    with pytest.raises(ValueError, match="NaN"):
        figure([True, False], [np.nan, 0.0])


def test_labels_and_scores_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="labels must be"):
        image_auroc([0.2, 0.7], [True, False])
    with pytest.raises(ValueError, match="scores are bool"):
        image_auroc([0, 1], [True, False])


def test_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        image_auroc([True, False], [0.5])


def pixel_reference(masks, maps, limit):
    """P-AUROC by scikit-learn and AUPRO with one point per distinct score, each found by looking at every pixel."""
    truth, scores = np.concatenate([m.ravel() for m in masks]), np.concatenate([m.ravel() for m in maps])
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(scores)[::-1]:
        fpr.append(np.mean(scores[~truth] >= threshold))
        overlaps = []
        for mask, anomaly_map in zip(masks, maps, strict=True):
            count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
            overlaps += [np.mean(anomaly_map[labels == i] >= threshold) for i in range(1, count)]
        pro.append(np.mean(overlaps))
    area = 0.0
    for f0, f1, p0, p1 in zip(fpr, fpr[1:], pro, pro[1:], strict=False):
        end = min(f1, limit)
        if end > f0:
            area += (end - f0) * (p0 + (p0 + (p1 - p0) * (end - f0) / (f1 - f0))) / 2
    return reference.roc_auc_score(truth, scores), area / limit


@st.composite
def pixel_case(draw):
    masks, maps = [], []
    elements = draw(st.sampled_from([st.integers(0, 4).map(float), st.floats(-100, 100, width=32)]))
    for _ in range(draw(st.integers(1, 3))):
        shape = (draw(st.integers(1, 6)), draw(st.integers(2, 7)))
        masks.append(draw(hnp.arrays(np.bool_, shape)))
        maps.append(draw(hnp.arrays(np.float32, shape, elements=elements)))
    masks[0][0, 0], masks[0][0, 1] = True, False
    return masks, maps


@settings(max_examples=60)
@given(pixel_case(), st.sampled_from([0.01, 0.3, 0.5, 1.0]))
def test_pixel_metrics_equal_the_slow_reference(case, limit):
    masks, maps = case
    found = pixel_metrics(masks, maps, limit=limit)
    auroc, overlap = pixel_reference(masks, maps, limit)
    assert found.auroc == pytest.approx(auroc, abs=TOLERANCE)
    assert found.aupro == pytest.approx(overlap, abs=TOLERANCE)
    labels, scores = (np.concatenate([np.ravel(one) for one in many]) for many in (masks, maps))
    if found.auroc is not None:
        assert found.ap == pytest.approx(reference.average_precision_score(labels != 0, scores), abs=TOLERANCE)


def test_pixel_metrics_of_larger_maps_equal_the_slow_reference():
    rng = np.random.default_rng(3)
    masks = [np.zeros((24, 31), np.bool_) for _ in range(4)]
    masks[0][2:5, 3:9] = masks[0][10, 10] = masks[1][5:8, 5:6] = masks[3][20:, 20:] = True
    maps = [rng.integers(0, 200, mask.shape).astype(np.float32) + 60 * mask for mask in masks]
    auroc, overlap = pixel_reference(masks, maps, 0.3)
    assert pixel_auroc(masks, maps) == pytest.approx(auroc, abs=TOLERANCE)
    assert aupro(masks, maps) == pytest.approx(overlap, abs=TOLERANCE)


def test_aupro_weighs_a_region_of_one_pixel_like_a_large_one():
    mask = np.zeros((40, 40), np.bool_)
    mask[5:25, 5:25] = mask[35, 35] = True
    only_large, only_small = np.zeros((2, 40, 40), np.float32)
    only_large[5:25, 5:25] = only_small[35, 35] = 1.0
    # The missed region lies on the diagonal from (0, 0) to (1, 1): 0.15 of the limited area.
    assert aupro([mask], [only_large]) == pytest.approx((1 + 0.15) / 2)
    assert aupro([mask], [only_small]) == pytest.approx((1 + 0.15) / 2)


def test_regions_join_over_corners():
    count, labels = regions_of(np.eye(4, dtype=np.bool_))
    assert count == 1
    assert labels.max() == 1


def test_perfect_maps_reach_one_and_constant_maps_are_chance():
    mask = np.zeros((8, 8), np.bool_)
    mask[1:3, 1:3] = True
    perfect = pixel_metrics([mask], [mask.astype(np.float32)])
    assert (perfect.auroc, perfect.aupro) == (1.0, 1.0)
    constant = pixel_metrics([mask], [np.full((8, 8), 3.5, np.float32)])
    assert constant.auroc == 0.5
    assert constant.aupro == pytest.approx(0.15)


def test_minus_infinity_outside_a_crop_counts_as_lowest():
    mask = np.zeros((4, 4), np.bool_)
    mask[0, 0] = mask[2, 2] = True
    anomaly_map = np.full((4, 4), -np.inf, np.float32)
    anomaly_map[1:, 1:] = 0.0
    anomaly_map[2, 2] = 1.0
    lowest = np.where(np.isinf(anomaly_map), np.float32(-99), anomaly_map)
    assert pixel_metrics([mask], [anomaly_map]) == pixel_metrics([mask], [lowest])


@pytest.mark.parametrize("fill", [False, True])
def test_pixel_metrics_are_none_where_a_class_is_absent(fill):
    found = pixel_metrics([np.full((3, 3), fill)], [np.ones((3, 3), np.float32)])
    assert found.auroc is None
    assert found.aupro is None


def test_pixel_metrics_of_nothing_are_none():
    assert pixel_metrics([], []).aupro is None


def test_masks_of_0_and_255_are_read_like_bool():
    mask = np.zeros((5, 5), np.uint8)
    mask[2, 2] = 255
    maps = [np.arange(25, dtype=np.float32).reshape(5, 5)]
    assert pixel_metrics([mask], maps) == pixel_metrics([mask > 0], maps)


def test_generators_of_mixed_sizes_and_precisions_are_taken():
    masks = [np.eye(4, dtype=np.bool_), np.zeros((2, 9), np.bool_)]
    maps = [np.arange(16.0).reshape(4, 4).astype(np.float16), np.arange(18.0).reshape(2, 9)]
    as_double = [m.astype(np.float64) for m in maps]
    assert pixel_metrics(iter(masks), iter(maps)) == pixel_metrics(masks, as_double)


@pytest.mark.parametrize(
    ("masks", "maps", "limit", "words"),
    [
        ([np.zeros((3, 3))], [np.zeros((3, 4), np.float32)], 0.3, "one size"),
        ([np.zeros((3, 3))], [np.full((3, 3), np.nan)], 0.3, "NaN"),
        ([np.zeros((3, 3))], [], 0.3, "shorter"),
        ([np.zeros((3, 3))], [np.zeros((3, 3))], 0.0, "limit"),
        ([np.zeros((3, 3))], [np.zeros((3, 3), np.bool_)], 0.3, "bool"),
    ],
)
def test_pixel_metrics_refuse_bad_input(masks, maps, limit, words):
    with pytest.raises(ValueError, match=words):
        pixel_metrics(masks, maps, limit=limit)
