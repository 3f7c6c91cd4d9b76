"""Generated webs and what a camera makes of them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.camera import Light, Pose, illuminate, look, look_at_mask, sensor_noise
from trainer.data.textures import TEXTURES, TextureWeb


@pytest.mark.parametrize("kind", TEXTURES)
@settings(max_examples=15, deadline=None)
@given(start=st.integers(0, 2**25), shift=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_web_is_continuous_and_the_same_at_every_visit(kind: str, start: int, shift: int, seed: int) -> None:
    web = TextureWeb(kind, seed, 70)
    first = web.view(start, 60)
    np.testing.assert_array_equal(web.view(start + shift, 60)[: 60 - shift], first[shift:])
    np.testing.assert_array_equal(TextureWeb(kind, seed, 70).view(start, 60), first)


@pytest.mark.parametrize("kind", TEXTURES)
def test_web_places_and_seeds_differ_but_look_alike(kind: str) -> None:
    views = [TextureWeb(kind, seed, 128).view(at, 128) for seed, at in ((0, 0), (0, 5000), (1, 0))]
    assert (views[0] != views[1]).mean() > 0.3
    assert (views[0] != views[2]).mean() > 0.3
    levels = [float(view.mean()) for view in views[:2]]
    assert abs(levels[0] - levels[1]) < 20
    assert all(view.std() > 8 for view in views)
    assert all(((view == 0) | (view == 255)).mean() < 0.01 for view in views)


@pytest.mark.parametrize("kind", TEXTURES)
def test_web_view_is_drawn_in_15_ms(kind: str) -> None:
    web = TextureWeb(kind, 0, 256)
    best = np.inf
    for place in range(30):  # the best of many: other processes share the machine
        started = time.perf_counter()
        web.view(place * 256, 256)
        best = min(best, time.perf_counter() - started)
    assert best < 0.015


def test_web_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown texture"):
        TextureWeb("wood", 0, 64)
    with pytest.raises(ValueError, match="width"):
        TextureWeb("cloth", 0, 8)
    with pytest.raises(ValueError, match="position"):
        TextureWeb("cloth", 0, 64).view(-1, 5)


def test_pose_never_shows_what_lies_beyond_a_view() -> None:
    inner = np.zeros((160, 160), np.uint8)
    inner[1:-1, 1:-1] = 255
    rng = np.random.default_rng(0)
    for _ in range(300):
        assert look(inner, Pose.draw(rng), 140).min() > 250


def test_look_moves_by_fractions_of_a_pixel() -> None:
    ramp = np.tile(np.arange(160, dtype=np.uint8), (160, 1))
    still, moved = look(ramp, Pose(), 140), look(ramp, Pose(dx=2.5 / 160), 140)
    assert still[70, 70] == round(79.5 + (70 - 69.5))
    assert np.mean(moved[20:-20, 20:-20].astype(float) - still[20:-20, 20:-20]) == pytest.approx(2.5, abs=0.51)


def test_mask_moves_with_its_picture() -> None:
    view = np.zeros((160, 160), np.uint8)
    view[60:90, 40:100] = 255
    pose = Pose(dx=0.01, dy=-0.012, degrees=1.7)
    seen = look(view, pose, 280)
    mask = look_at_mask(view > 0, pose, 280)
    assert mask[seen > 64].all()
    assert not mask[seen < 60].any()


def test_light_scales_and_slopes() -> None:
    grey = np.full((40, 60, 3), 100, np.uint8)
    assert (illuminate(grey, Light()) == 100).all()
    assert (illuminate(grey, Light(gain=1.1)) == 110).all()
    lit = illuminate(grey, Light(slope_x=0.2))
    assert lit[0, 0, 0] == 90
    assert lit[0, -1, 0] == 110


def test_sensor_noise_is_seeded_grey_and_stronger_in_the_light() -> None:
    dark, light = (np.full((100, 100, 3), level, np.uint8) for level in (20, 200))
    noisy = sensor_noise(light, np.random.default_rng(0))
    np.testing.assert_array_equal(noisy, sensor_noise(light, np.random.default_rng(0)))
    np.testing.assert_array_equal(noisy[..., 0], noisy[..., 2])
    assert noisy.std() == pytest.approx(np.sqrt(1.2**2 + 0.18**2 * 200), rel=0.05)
    assert sensor_noise(dark, np.random.default_rng(0)).std() < noisy.std()
