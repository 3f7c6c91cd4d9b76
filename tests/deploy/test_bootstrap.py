"""The bootstrap's metrics against repeated data, and what its draws and intervals promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.bootstrap import PairedCategory, bootstrap_difference, draw_groups, weighted_aupro, weighted_auroc
from deploy.metrics import aupro, image_auroc


@settings(max_examples=60)
@given(st.integers(2, 30), st.integers(0, 10_000))
def test_weighted_auroc_equals_the_auroc_of_repeated_images(n, seed):
    rng = np.random.default_rng(seed)
    labels, scores = rng.random(n) < 0.5, rng.integers(0, 8, n).astype(np.float32)
    weights = rng.integers(0, 4, (5, n))
    found = weighted_auroc(labels, scores)(weights)
    for row, value in zip(weights, found, strict=True):
        expected = image_auroc(np.repeat(labels, row), np.repeat(scores, row))
        assert np.isnan(value) if expected is None else value == pytest.approx(expected, abs=1e-12)


def pixel_set(seed, count=12):
    rng = np.random.default_rng(seed)
    masks = [np.zeros((40, 50), np.bool_) for _ in range(count)]
    for mask in masks[::2]:
        y, x = rng.integers(0, 30, 2)
        mask[y : y + 6, x : x + 7] = mask[0, 49] = True
    return masks, [rng.normal(size=mask.shape).astype(np.float32) + 1.5 * mask for mask in masks]


def test_weighted_aupro_is_near_the_exact_figure_of_repeated_images():
    masks, maps = pixel_set(0)
    metric = weighted_aupro(masks, lambda: maps)
    weights = np.random.default_rng(1).integers(0, 3, (6, len(masks)))
    weights[0] = 1
    for row, value in zip(weights, metric(weights), strict=True):
        repeated = [i for i, times in enumerate(row) for _ in range(times)]
        assert value == pytest.approx(aupro([masks[i] for i in repeated], [maps[i] for i in repeated]), abs=1e-3)


def test_weighted_aupro_is_exact_where_every_score_is_a_threshold():
    masks, maps = pixel_set(2)
    maps = [np.round(anomaly_map * 2) for anomaly_map in maps]
    value = weighted_aupro(masks, lambda: maps, levels=4001)(np.ones((1, len(masks)), np.int64))[0]
    assert value == pytest.approx(aupro(masks, maps), abs=1e-12)


def test_weighted_aupro_of_perfect_maps_is_one():
    masks, _ = pixel_set(3)
    value = weighted_aupro(masks, lambda: [mask.astype(np.float32) for mask in masks])(np.ones((1, 12), np.int64))[0]
    assert value == pytest.approx(1.0)


def test_weighted_aupro_is_nan_where_no_region_is_drawn():
    masks, maps = pixel_set(4)
    only_good = np.array([[int(not mask.any()) for mask in masks]])
    assert np.isnan(weighted_aupro(masks, lambda: maps)(only_good)[0])


def test_images_of_a_group_are_drawn_together_and_classes_keep_their_groups():
    labels = np.array([False] * 6 + [True] * 4)
    groups = np.array(["a", "a", "b", "c", "d", "d", "p", "p", "q", "a"])
    weights = draw_groups(labels, groups, 200, np.random.default_rng(0))
    assert (weights[:, [0]] == weights[:, [1, 9]]).all()  # group a holds both classes, a stratum of its own
    assert (weights[:, 0] == 1).all()
    assert (weights[:, [2, 3, 4]].sum(axis=1) == 3).all()
    assert (weights[:, [6, 8]].sum(axis=1) == 2).all()
    assert weights[:, 2].min() == 0
    assert weights[:, 2].max() >= 2


def category(seed, *, shift_first=1.5, shift_second=1.0, images=80, group_size=1, spread=0.0):
    """Two detectors that share their noise, and half of the images defective."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(images // group_size) % 2 == 1, group_size)
    groups = np.repeat([f"g{i}" for i in range(images // group_size)], group_size)
    own = np.repeat(rng.normal(0, spread, images // group_size), group_size) if spread else 0.0
    noise = rng.normal(size=images) + own
    first = noise + shift_first * labels
    second = noise + 0.3 * rng.normal(size=images) + shift_second * labels
    return PairedCategory(labels, groups, weighted_auroc(labels, first), weighted_auroc(labels, second))


def test_a_detector_against_itself_differs_by_exactly_nothing():
    one = category(0)
    same = PairedCategory(one.labels, one.groups, one.first, one.first)
    found = bootstrap_difference([same], resamples=50)
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_interval_and_another_seed_another():
    found = [bootstrap_difference([category(0), category(1)], resamples=100, seed=seed) for seed in (5, 5, 6)]
    assert (found[0].low, found[0].high) == (found[1].low, found[1].high)
    assert (found[0].low, found[0].high) != (found[2].low, found[2].high)


def test_difference_is_the_difference_of_means_over_categories():
    categories = [category(seed) for seed in range(3)]
    once = np.ones((1, 80), np.int64)
    found = bootstrap_difference(categories, resamples=20)
    assert found.first == pytest.approx(np.mean([one.first(once)[0] for one in categories]))
    assert found.difference == pytest.approx(found.first - found.second)
    assert found.low < found.difference < found.high


def test_pairs_are_kept():
    found = bootstrap_difference([category(0)], resamples=400)
    independent = np.hypot(found.first_resampled.std(), found.second_resampled.std())
    assert (found.first_resampled - found.second_resampled).std() < 0.7 * independent


def test_interval_covers_the_true_difference_about_as_often_as_it_says():
    covered = 0
    for seed in range(150):
        found = bootstrap_difference([category(seed, shift_first=1.0, shift_second=1.0 * np.sqrt(1.09))], resamples=200)
        covered += found.low <= 0 <= found.high  # equal AUROC: the second has more noise and as much more shift
    assert 0.88 <= covered / 150 <= 1.0


def test_dependent_images_widen_the_interval_when_their_groups_are_known():
    one = category(0, images=240, group_size=8, spread=2.0)
    alone = np.array([str(i) for i in range(240)])
    grouped = bootstrap_difference([one], resamples=300)
    ungrouped = bootstrap_difference([PairedCategory(one.labels, alone, one.first, one.second)], resamples=300)
    assert grouped.first_resampled.std() > 1.5 * ungrouped.first_resampled.std()


def test_undefined_metric_is_refused():
    labels, groups = np.zeros(4, np.bool_), np.array(list("abcd"))
    metric = weighted_auroc(labels, np.arange(4.0))
    with pytest.raises(ValueError, match="undefined"):
        bootstrap_difference([PairedCategory(labels, groups, metric, metric)])


@pytest.mark.parametrize("options", [{"resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_difference([category(0)], **options)
    with pytest.raises(ValueError, match="category"):
        bootstrap_difference([])


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match="one length"):
        draw_groups(np.zeros(3, np.bool_), np.array(["a", "b"]), 5, np.random.default_rng(0))


def test_nan_and_bad_limits_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        weighted_auroc(np.array([True, False]), np.array([np.nan, 0.0]))
    masks, maps = pixel_set(0, 2)
    with pytest.raises(ValueError, match="limit"):
        weighted_aupro(masks, lambda: maps, limit=1.5)
    with pytest.raises(ValueError, match="no good pixel"):
        weighted_aupro([np.ones((2, 2))], lambda: [np.zeros((2, 2))])
