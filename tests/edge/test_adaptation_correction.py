"""Measuring moments, the size of a shift, and corrections: what is given back, and what is left as it is."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge.adaptation.correction import SCALE_LIMIT, MomentCorrection
from edge.adaptation.follower import Follower, Phase
from edge.adaptation.measure import joined, measure_canvas, measure_taps
from edge.adaptation.moments import DETAIL, IMAGE, Moments, Reference
from edge.adaptation.settings import AdaptationSettings
from edge.adaptation.shift import shift_of
from tests.edge.adaptation_values import judged

QUICK = settings(max_examples=25, deadline=None)


def texture(seed: int, *, tiles: int = 1, size: int = 64) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.normal(0, 25, (tiles, size // 4, size // 4, 3)).repeat(4, 1).repeat(4, 2)
    image = 110 + coarse + rng.normal(0, 4, coarse.shape) + [10, 0, -15]
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def relit(tiles: np.ndarray, gain: float, offset: float) -> np.ndarray:
    return np.clip(np.rint(tiles * gain + offset), 0, 255).astype(np.uint8)


def some_taps(seed: int, *, tiles: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"s4": (tiles, 6, 32, 32), "s8": (tiles, 9, 16, 16)}
    return {name: rng.normal(1, 2, shape).astype(np.float32) for name, shape in shapes.items()}


def seen(tiles: np.ndarray, taps: dict[str, np.ndarray]) -> Moments:
    return joined([measure_canvas(tiles), measure_taps(taps)])


def test_moments_are_those_of_what_is_there() -> None:
    tiles, taps = texture(1, tiles=2, size=224), some_taps(1, tiles=2)
    moments = seen(tiles, taps)
    assert np.allclose(moments.mean[IMAGE], tiles.mean((0, 1, 2)), atol=1.5)
    assert np.allclose(moments.std[IMAGE], tiles.astype(float).std((0, 1, 2)), rtol=0.06)
    for name, tap in taps.items():
        assert moments.mean[name].shape == (tap.shape[1],)
        assert np.allclose(moments.mean[name], tap.mean((0, 2, 3)), atol=0.2)
        assert np.allclose(moments.std[name], tap.std((0, 2, 3)), rtol=0.1)


def test_a_small_defect_has_next_to_no_say() -> None:
    taps, tiles = some_taps(2), texture(2, size=224)
    clean = seen(tiles, taps)
    for tap in taps.values():
        tap[:, :, 4:6, 4:6] += 60
    tiles[:, 64:96, 64:96] = 255
    with_defect = seen(tiles, taps)
    assert shift_of(with_defect, clean) < 0.05


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_image_has_finite_moments_and_is_not_blown_up(value: int) -> None:
    tiles, taps = np.full((1, 64, 64, 3), value, np.uint8), {"s4": np.full((1, 6, 8, 8), 3, np.float32)}
    flat, usual = seen(tiles, taps), seen(texture(3), {"s4": some_taps(3)["s4"]})
    assert math.isfinite(shift_of(flat, usual))
    correction = MomentCorrection(flat, usual)
    correction.canvas(tiles)
    found = correction.taps(taps)["s4"]
    assert np.allclose(tiles.mean((0, 1, 2)), np.clip(usual.mean[IMAGE], 0, 255), atol=1)
    assert np.allclose(found.mean((0, 2, 3)), usual.mean["s4"], atol=1e-4)


@QUICK
@given(st.floats(0.6, 1.6), st.floats(-30, 40), st.integers(0, 5))
def test_gain_and_offset_are_taken_back(gain: float, offset: float, seed: int) -> None:
    good = texture(seed)
    now = relit(good, gain, offset)
    inside = ((good * gain + offset > 0) & (good * gain + offset < 255)).all()
    correction = MomentCorrection(measure_canvas(now), measure_canvas(good))
    back = now.copy()
    correction.canvas(back)
    if inside:
        assert np.abs(back.astype(int) - good).max() <= 2
    assert (
        shift_of(measure_canvas(back), measure_canvas(good))
        <= shift_of(measure_canvas(now), measure_canvas(good)) + 0.02
    )


@QUICK
@given(st.floats(0.7, 1.3), st.floats(-20, 20), st.integers(0, 5))
def test_light_does_not_change_how_sharp_an_image_is(gain: float, offset: float, seed: int) -> None:
    good = texture(seed)
    now = relit(good, gain, offset)
    inside = ((good * gain + offset > 0) & (good * gain + offset < 255)).all()
    if inside:
        assert measure_canvas(now).std[DETAIL][0] == pytest.approx(measure_canvas(good).std[DETAIL][0], rel=0.05)


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0])
def test_sharpness_is_given_back(sigma: float) -> None:
    good = texture(3, tiles=2, size=96)
    soft = np.stack([cv2.GaussianBlur(tile, (0, 0), sigma) for tile in good])
    reference, now = measure_canvas(good), measure_canvas(soft)
    assert now.std[DETAIL][0] < reference.std[DETAIL][0]
    for own in (0.0, 1.0):
        back = soft.copy()
        MomentCorrection(now, reference, own).canvas(back)
        assert now.std[DETAIL][0] * 1.1 < measure_canvas(back).std[DETAIL][0] < reference.std[DETAIL][0] * 1.5


def test_scratches_have_next_to_no_say_in_how_sharp_an_image_is() -> None:
    tiles = texture(2, size=224)
    clean = measure_canvas(tiles).std[DETAIL][0]
    tiles[:, 70:100:2, 70:100] = 255
    assert measure_canvas(tiles).std[DETAIL][0] == pytest.approx(clean, rel=0.05)


@QUICK
@given(st.floats(0.6, 1.6), st.floats(-3, 3), st.integers(0, 5))
def test_taps_are_given_the_moments_wanted(gain: float, offset: float, seed: int) -> None:
    good = some_taps(seed)
    now = {name: np.float32(gain) * tap + np.float32(offset) for name, tap in good.items()}
    kept = {name: tap.copy() for name, tap in now.items()}
    for own in (0.0, 0.5, 1.0):
        found = MomentCorrection(measure_taps(now), measure_taps(good), own).taps(now)
        for name, tap in good.items():
            assert np.allclose(found[name], tap, atol=1e-3)
            assert np.array_equal(now[name], kept[name])


@QUICK
@given(hnp.arrays(np.uint8, (1, 32, 32, 3)), st.integers(0, 3))
def test_equal_moments_change_no_bit(tiles: np.ndarray, seed: int) -> None:
    taps = some_taps(seed)
    moments = seen(tiles, taps)
    correction = MomentCorrection(moments, moments)
    kept = tiles.copy()
    correction.canvas(tiles)
    found = correction.taps(taps, in_place=True)
    assert np.array_equal(tiles, kept)
    assert all(found[name] is tap for name, tap in taps.items())


@QUICK
@given(hnp.arrays(np.uint8, (2, 32, 32, 3)), hnp.arrays(np.uint8, (1, 32, 32, 3)), st.sampled_from([0.0, 0.3, 1.0]))
def test_whatever_is_seen_gives_finite_values_of_bounded_gain(tiles: np.ndarray, other: np.ndarray, own: float) -> None:
    taps = {"s4": tiles.astype(np.float32).transpose(0, 3, 1, 2).copy()}
    wanted = {"s4": other.astype(np.float32).transpose(0, 3, 1, 2).copy()}
    correction = MomentCorrection(seen(tiles, taps), seen(other, wanted), own)
    found = correction.taps(taps)["s4"]
    assert np.isfinite(found).all()
    spread, before = np.ptp(found, axis=(0, 2, 3)), np.ptp(taps["s4"], axis=(0, 2, 3))
    assert (spread <= before * SCALE_LIMIT * 1.001 + 1e-3).all()


def test_in_place_writes_to_what_was_given() -> None:
    good, now = some_taps(1), some_taps(7)
    correction = MomentCorrection(measure_taps(now), measure_taps(good))
    apart = correction.taps(now)
    found = correction.taps(now, in_place=True)
    for name, tap in now.items():
        assert found[name] is tap
        assert np.array_equal(apart[name], tap)
        assert apart[name] is not tap


def test_names_of_one_side_only_are_left_as_they_are() -> None:
    tiles, taps = texture(4), some_taps(4)
    of_image = measure_canvas(relit(tiles, 0.8, 20))
    found = MomentCorrection(of_image, seen(tiles, taps), 1.0).taps(taps)
    assert all(found[name] is tap for name, tap in taps.items())
    kept = tiles.copy()
    MomentCorrection(measure_taps(taps), measure_taps(some_taps(5)), 1.0).canvas(tiles)
    assert np.array_equal(tiles, kept)


def test_a_reference_of_the_image_alone_is_followed_on_frames_that_have_taps() -> None:
    good = texture(5)
    dark = relit(good, 0.8, 10)
    reference = Reference((measure_canvas(good),), (0.1,), ("",))
    follower = Follower(reference, AdaptationSettings(settle_frames=4, bound=30.0))
    follower.reset()
    for _ in range(6):
        look = follower.look()
        tiles = dark.copy()
        assert look.correction is not None
        look.correction.canvas(tiles)
        taps = some_taps(5)
        assert all(found is taps[name] for name, found in look.correction.taps(taps, in_place=True).items())
        follower.take(judged(seen(dark, taps), version=look.version))
    assert follower.phase is Phase.FOLLOWING
    assert shift_of(measure_canvas(tiles), measure_canvas(good)) < 0.05


def test_own_share_follows_the_frame_itself() -> None:
    good = texture(6)
    dark = relit(good, 0.7, 10)
    reference = measure_canvas(good)
    left = []
    for own in (0.0, 0.5, 1.0):
        tiles = dark.copy()
        MomentCorrection(reference, reference, own).canvas(tiles)
        left.append(shift_of(measure_canvas(tiles), reference))
    assert left[0] == pytest.approx(shift_of(measure_canvas(dark), reference))
    assert left[2] < 0.05 < left[1] < left[0]


@QUICK
@given(st.floats(0.25, 4), st.floats(-3, 3))
def test_shift_is_told_in_deviations(gain: float, offset: float) -> None:
    mean, std = np.array([1, 2, 3], np.float32), np.array([1, 2, 4], np.float32)
    reference = Moments({"s4": mean}, {"s4": std})
    assert shift_of(reference, reference) == 0
    moved = Moments({"s4": mean + np.float32(offset) * std}, {"s4": std * np.float32(gain)})
    assert shift_of(moved, reference) == pytest.approx(math.hypot(offset, math.log(gain)), rel=1e-4, abs=1e-5)


def test_shift_with_what_is_no_number_is_no_number() -> None:
    one = Moments({"s4": np.ones(2, np.float32)}, {"s4": np.ones(2, np.float32)})
    for broken in (float("nan"), float("inf")):
        bad = Moments({"s4": np.array([1, broken], np.float32)}, {"s4": np.ones(2, np.float32)})
        assert not shift_of(bad, one) <= 1e9
