"""What so many frames can tell of a shift: chance is left alone, a real one is corrected nearly whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.adaptation.certain import certain
from edge.adaptation.follower import Follower
from edge.adaptation.moments import IMAGE, Moments
from edge.adaptation.settings import AdaptationSettings
from tests.edge.adaptation_values import moments, reference, show

CHANNELS = 400


def of(mean: np.ndarray, std: np.ndarray) -> Moments:
    return Moments({IMAGE: np.float32(mean)}, {IMAGE: np.float32(std)})


def drawn(seed: int, frames: int, shift: float = 0.0) -> Moments:
    """Means over frames that scatter by 1 about ``shift``, and deviations that scatter by 1 about 10 more."""
    rng = np.random.default_rng(seed)
    return of(*(rng.normal(at + shift, 1, (frames, CHANNELS)).mean(0) for at in (0, 10)))


CENTRE, SPREAD = of(np.zeros(CHANNELS), np.full(CHANNELS, 10)), of(np.ones(CHANNELS), np.ones(CHANNELS))


@pytest.mark.parametrize("frames", [5, 30, 143])
def test_chance_is_left_alone_and_a_shift_of_many_errors_is_not(frames: int) -> None:
    seen = drawn(frames, frames)
    still = certain(seen, CENTRE, SPREAD, frames=frames, images=10**6)
    for name in ("mean", "std"):
        left, was = (getattr(one, name)[IMAGE] - getattr(CENTRE, name)[IMAGE] for one in (still, seen))
        assert np.mean(left == 0) > 0.91
        assert np.square(left).mean() < 0.2 * np.square(was).mean()
    moved = certain(drawn(frames, frames, shift=20.0), CENTRE, SPREAD, frames=frames, images=10**6)
    assert np.abs(moved.mean[IMAGE] - 20).mean() < 1
    assert np.abs(moved.std[IMAGE] - 30).mean() < 1


@given(difference=st.floats(-50, 50), spread=st.floats(0, 10), frames=st.floats(1, 1000), images=st.integers(1, 1000))
@settings(max_examples=80, deadline=None)
def test_what_is_left_lies_between_both_and_grows_with_frames(
    difference: float, spread: float, frames: float, images: int
) -> None:
    now, centre, width = (of(np.array([v]), np.array([abs(v)])) for v in (difference, 0.0, spread))
    left = [float(certain(now, centre, width, frames=n, images=images).mean[IMAGE][0]) for n in (frames, 2 * frames)]
    assert 0 <= left[0] * np.sign(difference) <= left[1] * np.sign(difference) + 1e-6
    assert left[1] * np.sign(difference) <= abs(difference) * (1 + 1e-6)


def test_without_spread_all_is_kept() -> None:
    one = certain(drawn(1, 5), CENTRE, of(np.zeros(CHANNELS), np.zeros(CHANNELS)), frames=5, images=5)
    assert np.array_equal(one.mean[IMAGE], drawn(1, 5).mean[IMAGE])


def test_a_camera_that_settles_on_what_it_was_trained_on_corrects_nothing() -> None:
    bundle = reference()
    (centre,) = bundle.moments
    spread = Moments(
        *({name: np.full_like(row, 3.0) for name, row in part.items()} for part in (centre.mean, centre.std))
    )
    told = replace(bundle, spread=(spread,), images=(64,))
    for known, light, kept in ((told, 0.5, 0.0), (bundle, 0.5, 0.5), (told, 16.0, 15.9)):
        one = Follower(known, AdaptationSettings(settle_frames=30))
        one.reset()
        show(one, moments(light=light), 30)
        found = one.snapshot().moments.mean[IMAGE] - centre.mean[IMAGE]
        assert found == pytest.approx(kept, abs=0.2)
