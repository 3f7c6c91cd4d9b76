"""Drift: free of scale, in both directions, and bounded over a week that no clock can shorten."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DataError
from edge.memory.drift import WEEK, DriftBudget, DriftSettings, good_distance, measure_drift

DAY = 24 * 3600
NOW = 1_800_000_000


def some(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.01, 1.0, 100.0]), repeats=st.integers(1, 3))
def test_drift_is_free_of_scale_and_of_repeated_rows(seed, scale, repeats) -> None:
    reference, candidate, good = some(seed, 40, 6), some(seed + 1, 30, 6), some(seed + 2, 4, 9, 6)
    first = measure_drift(candidate, reference, good_distance(good, reference))
    scale = np.float32(scale)
    again = measure_drift(
        np.tile(candidate * scale, (repeats, 1)), reference * scale, good_distance(good * scale, reference * scale)
    )
    assert again.learned == pytest.approx(first.learned, rel=1e-3)
    assert again.forgotten == pytest.approx(first.forgotten, rel=1e-3)


def test_what_is_learned_and_what_is_forgotten_are_told_apart() -> None:
    reference, good = some(0, 100, 6), some(1, 5, 20, 6)
    unit = good_distance(good, reference)
    assert measure_drift(reference, reference, unit).value == 0
    more = measure_drift(np.concatenate([reference, some(2, 5, 6) + 20]), reference, unit)
    assert more.learned > 5
    assert more.forgotten == 0
    less = measure_drift(reference[:20], reference, unit)
    assert less.learned == 0
    assert less.forgotten > 0.5
    assert less.value == less.forgotten


def test_a_few_far_rows_are_not_lost_in_the_mean() -> None:
    reference, good = some(0, 500, 6), some(1, 5, 20, 6)
    moved = reference.copy()
    moved[:5] += 30
    assert measure_drift(moved, reference, good_distance(good, reference)).learned > 5


def test_what_gives_no_unit_is_refused() -> None:
    reference = some(0, 10, 3)
    with pytest.raises(DataError, match="no patches"):
        good_distance(np.zeros((0, 4, 3), np.float32), reference)
    with pytest.raises(DataError, match="has not seen"):
        good_distance(reference[None], reference)
    for unit in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive"):
            measure_drift(reference, reference, unit)


def test_small_steps_within_a_week_add_up_to_the_bound() -> None:
    budget = DriftBudget(DriftSettings(per_week=1.0))
    for day, drift in enumerate((0.3, 0.6, 0.9)):
        assert budget.judge(drift, NOW + day * DAY).allowed
        budget.record(drift, NOW + day * DAY)
    refused = budget.judge(1.0, NOW + 3 * DAY)
    assert not refused.allowed
    assert refused.growth == pytest.approx(1.0)
    assert "1.000 above 0.000" in refused.reason


def test_the_baseline_is_the_least_of_the_last_week() -> None:
    budget = DriftBudget(DriftSettings(per_week=1.0), [(NOW, 0.9), (NOW + DAY, 1.5)])
    # Until a week has passed the trainer's memory, at 0, counts; then 0.9 does, in force until NOW + DAY.
    assert not budget.judge(1.4, NOW + WEEK - 1).allowed
    week_later = budget.judge(1.8, NOW + WEEK)
    assert week_later.allowed
    assert week_later.baseline == 0.9
    assert budget.judge(2.4, NOW + WEEK + DAY).allowed
    # Back to the start and up again within days: the way up counts, not where the week began.
    budget.record(0.1, NOW + WEEK + DAY)
    assert not budget.judge(1.2, NOW + WEEK + 2 * DAY).allowed


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 5 * DAY), st.floats(0, 5)), max_size=30),
    per_week=st.floats(0.1, 2),
)
def test_no_week_ever_sees_more_than_the_bound(steps, per_week) -> None:
    budget, live, now = DriftBudget(DriftSettings(per_week=per_week)), [(NOW - WEEK, 0.0)], NOW
    for wait, drift in steps:
        now += wait
        if budget.judge(drift, now).allowed:
            budget.record(drift, now)
            live.append((now, drift))
        budget = DriftBudget(budget.settings, budget.history)  # a restart
    for index, (when, drift) in enumerate(live):
        for place, (_, value) in enumerate(live[:index]):
            ended = live[place + 1][0]
            if ended > when - WEEK:
                assert drift - value < per_week


def test_a_clock_behind_the_last_change_judges_nothing() -> None:
    budget = DriftBudget(DriftSettings(per_week=1.0), [(NOW, 0.5)])
    behind = budget.judge(0.0, NOW - 60)
    assert not behind.allowed
    assert "60 s behind" in behind.reason
    assert math.isnan(behind.growth)
    assert budget.judge(0.0, NOW).allowed


def test_a_forced_change_is_remembered_and_time_stands_still_for_a_clock_that_went_back() -> None:
    budget = DriftBudget(DriftSettings(per_week=1.0), [(NOW, 0.5)])
    budget.record(9.0, NOW - 100)
    assert budget.history == ((NOW, 0.5), (NOW, 9.0))


def test_the_history_stays_short_and_judges_as_the_whole_one() -> None:
    whole, budget = [], DriftBudget(DriftSettings(per_week=5.0))
    for day in range(40):
        budget.record(0.01 * day, NOW + day * DAY)
        whole.append((NOW + day * DAY, 0.01 * day))
    assert len(budget.history) == 8
    now = NOW + 40 * DAY
    assert budget.judge(3.0, now) == DriftBudget(budget.settings, whole).judge(3.0, now)


@pytest.mark.parametrize("history", [[(2, 0.1), (1, 0.1)], [(1, math.nan)], [(1, -0.1)]])
def test_a_damaged_history_is_refused(history) -> None:
    with pytest.raises(DataError, match="drift history"):
        DriftBudget(history=history)
