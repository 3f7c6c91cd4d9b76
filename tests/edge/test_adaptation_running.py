"""The estimate of a camera's moments, the alarm window and the decisions on a router's figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from edge.adaptation.freeze import AlarmWindow
from edge.adaptation.moments import IMAGE, Moments
from edge.adaptation.routing import Switch, nearest
from edge.adaptation.running import Running, Taken
from edge.adaptation.settings import AdaptationSettings
from edge.adaptation.shift import shift_of
from tests.edge.adaptation_values import TAP, moments

USUAL = 0.25
REFERENCE_ROW = [
    float(value) for part in (moments().mean, moments().std) for name in (IMAGE, TAP) for value in part[name]
]
FAR = AdaptationSettings(bound=1e6, clip=1e3, scale=100.0)


def running(of: AdaptationSettings = FAR) -> Running:
    return Running(moments(), USUAL, of)


def rows_of(values: list[float]) -> Moments:
    """Moments of any eight means and eight deviations."""
    means, stds = np.float32(values[:8]), np.abs(np.float32(values[8:]))
    return Moments({IMAGE: means[:3], TAP: means[3:]}, {IMAGE: stds[:3], TAP: stds[3:]})


def eights(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(values, min_size=16, max_size=16)


# Mostly such that are taken, some near the reference, some that no camera gives.
any_moments = st.one_of(
    eights(st.floats(-500, 500)),
    eights(st.floats(-2, 2)).map(lambda add: [r + a for r, a in zip(REFERENCE_ROW, add, strict=True)]),
    eights(st.one_of(st.floats(-500, 500), st.floats(width=32), st.just(math.nan))),
).map(rows_of)


@pytest.mark.parametrize("half_life", [1.0, 7.0, 50.0])
def test_half_of_a_step_is_followed_after_the_half_life(half_life: float) -> None:
    estimate = running(FAR.model_copy(update={"half_life": half_life}))
    for _ in range(int(half_life)):
        assert estimate.take(moments(light=8, gain=1.2)) is Taken.ACCEPTED
    now = estimate.moments
    assert now.mean[IMAGE] - moments().mean[IMAGE] == pytest.approx(4, rel=1e-3)
    assert now.std[IMAGE] / moments().std[IMAGE] == pytest.approx(1.1, rel=1e-3)


def test_after_a_beginning_the_estimate_is_the_mean_from_the_first_frame_on() -> None:
    estimate = running()
    estimate.begin()
    for count, light in enumerate((6.0, 12.0, 3.0), start=1):
        estimate.take(moments(light=light))
        assert estimate.moments.mean[IMAGE][0] == pytest.approx(90 + sum((6.0, 12.0, 3.0)[:count]) / count, rel=1e-5)


def test_a_settled_mean_goes_over_into_the_exponential_one_without_a_jump() -> None:
    estimate = running(FAR.model_copy(update={"half_life": 20.0}))
    estimate.begin()
    for _ in range(400):
        estimate.take(moments())
    for _ in range(20):
        estimate.take(moments(light=8))
    assert estimate.moments.mean[IMAGE][0] == pytest.approx(94, abs=0.1)


@settings(max_examples=60, deadline=None)
@given(st.lists(any_moments, max_size=30), st.floats(0.5, 8), st.integers(-1, 30))
def test_whatever_comes_the_shift_stays_within_the_bound(stream: list[Moments], bound: float, begins_at: int) -> None:
    estimate = running(AdaptationSettings(bound=bound, half_life=1, clip=1e6, scale=50))
    for index, seen in enumerate(stream):
        if index == begins_at:
            estimate.begin()
        estimate.take(seen)
        assert shift_of(estimate.moments, moments()) / USUAL <= bound
        assert estimate.size <= bound


def test_a_stream_that_walks_away_inside_the_bound_is_stopped_at_it() -> None:
    estimate = running(AdaptationSettings(bound=4, half_life=5))
    reached = 0.0
    for step in range(2000):
        estimate.take(moments(light=step * 0.02))
        reached = max(reached, estimate.size)
    assert 3.5 < reached <= 4


def test_the_bound_is_said_to_act_until_the_stream_is_well_inside_again() -> None:
    estimate = running(AdaptationSettings(bound=4, half_life=5))
    for _ in range(9):
        assert estimate.take(moments(light=200)) is Taken.OUTSIDE
    assert not estimate.at_bound
    estimate.take(moments(light=200))
    assert estimate.at_bound
    estimate.take(moments())
    assert not estimate.at_bound


def test_an_estimate_near_the_bound_does_not_go_on_and_off() -> None:
    estimate = running(AdaptationSettings(bound=4, half_life=2))
    edge = 30 * 3.96 / estimate.size_of(moments(light=30))
    said = []
    for light, times in ((0.95, 20), (1, 40), (0.95, 20), (0.85, 20)):
        for _ in range(times):
            estimate.take(moments(light=light * edge))
        said.append(estimate.at_bound)
    assert said == [False, True, True, False]


@settings(max_examples=60, deadline=None)
@given(any_moments, st.floats(0.1, 3))
def test_one_frame_moves_a_channel_by_no_more_than_its_clipped_share(seen: Moments, clip: float) -> None:
    limits = AdaptationSettings(bound=1e6, clip=clip, scale=2, half_life=10)
    estimate = running(limits)
    estimate.take(seen)
    now, before, gain = estimate.moments, moments(), 1 - 0.5**0.1
    for name in (IMAGE, TAP):
        moved = np.abs(now.mean[name] - before.mean[name])
        assert (moved <= clip * before.std[name] * gain * (1 + 1e-4) + 1e-5).all()
        assert (now.std[name] <= before.std[name] * (1 + gain) * (1 + 1e-5)).all()
        assert (now.std[name] >= before.std[name] * (1 - gain / 2) * (1 - 1e-5)).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(any_moments, max_size=20))
def test_the_ratio_of_deviations_stays_within_the_scale_limit(stream: list[Moments]) -> None:
    estimate = running(AdaptationSettings(bound=1e6, clip=1e6, scale=1.5, half_life=1))
    for seen in stream:
        estimate.take(seen)
    for name in (IMAGE, TAP):
        ratio = estimate.moments.std[name] / moments().std[name]
        assert (ratio <= 1.5 + 1e-4).all()
        assert (ratio >= 1 / 1.5 - 1e-4).all()


@pytest.mark.parametrize(
    "broken",
    [
        Moments({IMAGE: np.zeros(3, np.float32)}, {IMAGE: np.zeros(3, np.float32)}),
        Moments({IMAGE: np.zeros(3), TAP: np.zeros(4)}, {IMAGE: np.zeros(3), TAP: np.zeros(5)}),
        rows_of([math.inf] + [0.0] * 15),
        rows_of([0.0] * 15 + [math.nan]),
    ],
)
def test_moments_that_do_not_fit_or_are_no_numbers_change_nothing(broken: Moments) -> None:
    estimate = running()
    assert estimate.take(broken) is Taken.BROKEN
    assert estimate.mean == pytest.approx(running().mean)


def test_another_expert_begins_under_the_same_light() -> None:
    estimate, other = running(), Running(moments(light=10), USUAL, FAR)
    for _ in range(2000):
        estimate.take(moments(light=-20, gain=0.8))
    other.carry(estimate)
    # The other's mean lies 10 grey levels above, seen through a gain of 0.8.
    assert other.moments.mean[IMAGE] == pytest.approx(moments().mean[IMAGE] - 20 + 8, rel=1e-3)
    assert other.moments.std[IMAGE] == pytest.approx(0.8 * moments().std[IMAGE], rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=120), st.integers(2, 20))
def test_the_window_freezes_and_thaws_with_hysteresis(alarms: list[bool], size: int) -> None:
    window = AlarmWindow(size, 0.5, 0.2)
    frozen = False
    for index, alarmed in enumerate(alarms):
        window.take(alarmed=alarmed)
        rate = sum(alarms[max(0, index + 1 - size) : index + 1]) / size
        assert window.rate == pytest.approx(rate)
        frozen = rate > 0.2 if frozen else rate >= 0.5
        assert window.frozen is frozen
    again = AlarmWindow(size, 0.5, 0.2, window.alarms, frozen=window.frozen)
    assert (again.rate, again.frozen, again.alarms) == (window.rate, window.frozen, window.alarms)
    window.clear()
    assert (window.rate, window.frozen) == (0, False)


def test_a_frame_is_nearest_to_the_largest_figure_or_to_none() -> None:
    assert nearest(np.float32([-1, 0.2, 0.1])) == 1
    assert nearest(np.float32([0.0])) == 0
    assert nearest(np.float32([-1, -0.2])) is None
    assert nearest(np.float32([1, math.nan])) is None
    assert nearest(np.float32([])) is None


def test_a_camera_changes_over_after_a_run_and_not_by_stray_frames() -> None:
    switch = Switch(3)
    assert [switch.take(shown) for shown in (1, 1, 0, 1, 1, None, 1, 2, 1, 1)] == [False] * 10
    assert switch.expert == 0
    assert switch.take(1)
    assert switch.expert == 1


def test_thawing_must_lie_below_freezing() -> None:
    with pytest.raises(ValidationError, match=r"thaw_rate 0\.3 must be below freeze_rate 0\.3"):
        AdaptationSettings(freeze_rate=0.3, thaw_rate=0.3)
