"""Thresholds: what a budget asks, what a calibration set can promise, and what it cannot."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge.errors import DataError
from edge.judgement.threshold import Budget, ExternalThreshold, fit_threshold, leave_level, p_value

SCORES = st.lists(st.floats(-100, 100, width=32), min_size=6, max_size=60).map(np.array)
ALPHAS = st.floats(1e-5, 0.5)


def groups_for(size: int, groups: int) -> np.ndarray:
    return np.array([f"part{index % groups}" for index in range(size)])


def test_empirical_threshold_is_the_conformal_order_statistic() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 100.0))

    threshold = fit_threshold(scores, None, 0.1)

    assert threshold.method == "empirical"
    assert threshold.budget_supported
    # ceil((99 + 1) * 0.9) = 90: the 90th score is still good, anything above is not.
    assert 90 < threshold.value < 90.001
    assert threshold.smallest_supported_alpha == pytest.approx(0.01)


def test_budget_at_the_limit_of_support_is_supported() -> None:
    assert fit_threshold(np.arange(9.0), None, 0.1).budget_supported
    assert not fit_threshold(np.arange(9.0), None, 0.0999).budget_supported


def test_empirical_threshold_covers_new_scores() -> None:
    rng = np.random.default_rng(1)
    rates = [
        (rng.standard_normal(400) >= fit_threshold(rng.standard_normal(59), None, 0.05).value).mean()
        for _ in range(300)
    ]

    assert 0.035 < np.mean(rates) <= 0.055


def test_grouped_threshold_covers_scores_of_new_groups() -> None:
    rng = np.random.default_rng(2)
    rates = []
    for _ in range(200):
        groups = np.repeat(np.arange(19).astype(str), 10)
        scores = np.repeat(rng.standard_normal(19), 10) + 0.1 * rng.standard_normal(190)
        new = rng.standard_normal(300) + 0.1 * rng.standard_normal(300)
        rates.append((new >= fit_threshold(scores, groups, 0.1).value).mean())

    assert np.mean(rates) <= 0.11


def test_images_of_one_part_do_not_support_a_budget() -> None:
    scores = np.arange(200.0)

    alone = fit_threshold(scores, groups_for(200, 200), 0.01)
    grouped = fit_threshold(scores, groups_for(200, 10), 0.01)

    assert alone.budget_supported
    assert not grouped.budget_supported
    assert grouped.method == "tail_fit"
    assert grouped.n_groups == 10
    assert grouped.smallest_supported_alpha == pytest.approx(1 / 11)


@pytest.mark.parametrize("draw", ["standard_normal", "standard_exponential"])
@pytest.mark.parametrize("n", [6, 12, 40, 150])
def test_tail_fit_keeps_the_budget_within_its_documented_factor(draw: str, n: int) -> None:
    rng = np.random.default_rng(n)
    tail = {
        "standard_normal": lambda t: math.erfc(t / math.sqrt(2)) / 2,
        "standard_exponential": lambda t: math.exp(-t),
    }[draw]

    rates = [tail(fit_threshold(getattr(rng, draw)(n), None, 1e-3).value) for _ in range(300)]

    assert np.mean(rates) < 3e-3


@given(scores=SCORES, alpha=ALPHAS)
def test_tail_fit_is_never_below_the_highest_good_score(scores: np.ndarray, alpha: float) -> None:
    threshold = fit_threshold(scores, None, alpha)

    if threshold.method == "tail_fit":
        assert threshold.value > scores.max()


def test_outlier_among_good_scores_is_still_good() -> None:
    scores = np.append(np.linspace(0, 1, 59), 100.0)

    threshold = fit_threshold(scores, None, 0.016)

    assert threshold.method == "tail_fit"
    assert 100 < threshold.value < 100.001


def test_part_with_many_images_weighs_as_one() -> None:
    # Nineteen parts: 0, 1, ... 18; the lowest has a thousand images, which must not outvote the others.
    scores = np.append(np.arange(1.0, 19.0), np.zeros(1000))
    groups = np.append(np.arange(1, 19), np.zeros(1000, int)).astype(str)

    threshold = fit_threshold(scores, groups, 0.1)

    assert threshold.n_groups == 19
    assert 17 < threshold.value < 17.001


@given(scores=SCORES, alphas=st.tuples(ALPHAS, ALPHAS), groups=st.integers(1, 60))
def test_smaller_alpha_never_lowers_the_threshold(scores: np.ndarray, alphas: tuple[float, float], groups: int) -> None:
    low, high = sorted(alphas)
    names = groups_for(scores.size, groups)

    strict, lax = (fit_threshold(scores, names, alpha).value for alpha in (low, high))

    assert strict >= lax - 1e-9 * max(1.0, abs(lax))


@given(scores=SCORES, alpha=ALPHAS, scale=st.floats(0.125, 8), offset=st.floats(-50, 50), groups=st.integers(1, 60))
def test_threshold_follows_a_positive_affine_map(
    scores: np.ndarray, alpha: float, scale: float, offset: float, groups: int
) -> None:
    names = groups_for(scores.size, groups)
    # Rounding must not make or break ties.
    scores = np.round(scores, 3)

    mapped = fit_threshold(scale * scores + offset, names, alpha).value
    expected = scale * fit_threshold(scores, names, alpha).value + offset

    assert mapped == pytest.approx(expected, rel=1e-6, abs=1e-6 * max(1.0, abs(expected)))


@pytest.mark.parametrize("alpha", [0.5, 0.1, 1e-4])
@pytest.mark.parametrize("groups", [None, 2])
def test_constant_scores_are_good_and_anything_above_is_not(alpha: float, groups: int | None) -> None:
    scores = np.full(12, -3.5)

    threshold = fit_threshold(scores, None if groups is None else groups_for(12, groups), alpha)

    assert -3.5 < threshold.value < -3.4999


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_few_scores_give_what_they_support_and_no_more(n: int) -> None:
    scores = np.arange(float(n))

    assert fit_threshold(scores, None, 1 / (n + 1)).value > n - 1
    with pytest.raises(DataError, match="at least 6"):
        fit_threshold(scores, None, 0.001)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(DataError, match="1 of 8 calibration scores"):
        fit_threshold(np.array([1.0] * 7 + [bad]), None, 0.1)


def test_no_scores_are_refused() -> None:
    with pytest.raises(DataError, match="no calibration scores"):
        fit_threshold(np.empty(0), None, 0.1)


def test_groups_of_another_length_are_refused() -> None:
    with pytest.raises(DataError, match="7 groups for 8"):
        fit_threshold(np.arange(8.0), groups_for(7, 7), 0.1)


@given(scores=SCORES, score=st.floats(-120, 120))
def test_p_value_counts_good_scores_as_high(scores: np.ndarray, score: float) -> None:
    value = p_value(score, scores)

    assert value == (1 + sum(s >= score for s in scores)) / (len(scores) + 1)
    assert 1 / (len(scores) + 1) <= value <= 1


@given(scores=SCORES, alpha=st.floats(0.15, 0.5))
def test_threshold_and_p_value_agree(scores: np.ndarray, alpha: float) -> None:
    threshold = fit_threshold(scores, None, alpha).value

    assert p_value(threshold, scores) <= alpha + 1e-12
    assert p_value(float(np.nextafter(threshold, -np.inf)), scores) > alpha - 1e-9


def test_p_value_of_nan_is_nan() -> None:
    assert math.isnan(p_value(math.nan, np.arange(3.0)))


@given(scores=SCORES, alpha=ALPHAS, quantile=st.floats(0.01, 0.99))
def test_leave_level_is_never_above_the_threshold(scores: np.ndarray, alpha: float, quantile: float) -> None:
    threshold = fit_threshold(scores, None, alpha).value

    assert leave_level(scores, None, quantile, threshold) <= threshold


def test_leave_level_of_negative_scores_is_a_quantile() -> None:
    assert leave_level(-np.arange(100.0), None, 0.9, 5.0) == pytest.approx(-10, abs=1.01)


def test_stream_budget_counts_the_frames_that_an_event_uses_up() -> None:
    assert Budget(false_events_per_hour=1).stream_alpha(frame_rate=25, enter_hits=3) == pytest.approx(3 / 90_000)


def test_triggered_budget_is_per_thousand_parts() -> None:
    assert Budget(false_nok_per_1000=2).triggered_alpha() == pytest.approx(0.002)


@pytest.mark.parametrize("frame_rate", [0.0, -1.0, math.nan, math.inf])
def test_frame_rate_must_be_positive(frame_rate: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Budget().stream_alpha(frame_rate=frame_rate, enter_hits=1)


def test_budget_refuses_unknown_keys_and_zero() -> None:
    with pytest.raises(ValidationError):
        Budget(false_events_per_day=1)  # type: ignore[call-arg]  # the point
    with pytest.raises(ValidationError):
        Budget(false_nok_per_1000=0)


def test_external_threshold_names_why_it_does_not_apply() -> None:
    external = ExternalThreshold(value=1.5, bundle_id="a" * 64, memory_version=3)

    assert external.mismatch(bundle_id="a" * 64, memory_version=3) == ""
    assert "bundle aaaaaaaaaaaa" in external.mismatch(bundle_id="b" * 64, memory_version=3)
    assert "memory version 3, not 4" in external.mismatch(bundle_id="a" * 64, memory_version=4)
