"""What each expert was trained on: whose images, their moments, and what shift is usual."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.moments import ReferenceImages, reference_images, reference_of, usual_shift
from edge.adaptation.measure import measure_canvas
from edge.adaptation.moments import IMAGE, Moments
from edge.adaptation.shift import shift_of
from edge.errors import DataError

Canvases = npt.NDArray[np.uint8]
NONE = np.empty((0, 0, 0, 3), np.uint8)


def grey(levels: list[int]) -> Canvases:
    """Return images that are nearly of one grey each."""
    rng = np.random.default_rng(0)
    return np.stack([np.clip(rng.normal(level, 4, (32, 32, 3)), 0, 255).astype(np.uint8) for level in levels])


def moments_of(canvas: Canvases) -> Moments:
    return measure_canvas(canvas[np.newaxis])


def images(names: tuple[str, ...], training: tuple, holdout: tuple) -> ReferenceImages:
    found = reference_images(names, training, holdout)
    assert found is not None
    return found


def test_one_expert_takes_all_images_whatever_they_are_called() -> None:
    found = images(("",), (grey([60, 70]), ("a", "b")), (grey([80]), ()))
    assert (found.source, len(found.seen), len(found.others)) == ("training", 2, 1)
    assert reference_of(found, moments_of).moments[0].mean[IMAGE] == pytest.approx(65, abs=1)


def test_held_out_images_serve_where_no_others_are_left() -> None:
    found = images(("",), (NONE, ()), (grey([80, 90]), ("a", "b")))
    assert found.source == "holdout"
    assert reference_of(found, moments_of).moments[0].mean[IMAGE] == pytest.approx(85, abs=1)


def test_each_expert_has_the_moments_of_its_own_images() -> None:
    training = (grey([50, 150, 60, 160]), ("day", "night", "day", "night"))
    holdout = (grey([52, 158]), ("day", "night"))
    reference = reference_of(images(("day", "night"), training, holdout), moments_of)
    assert reference.subclasses == ("day", "night")
    assert [float(one.mean[IMAGE].mean()) for one in reference.moments] == pytest.approx([55, 155], abs=1)
    # Deviations within an image, not between images.
    assert all(one.std[IMAGE].max() < 6 for one in reference.moments)
    assert all(usual < 4 for usual in reference.usual)


def test_images_without_labels_are_of_no_expert_in_particular() -> None:
    for training, labels in ((NONE, ()), (grey([60]), ())):
        assert reference_images(("day", "night"), (training, labels), (grey([60, 70]), ())) is None


@pytest.mark.parametrize(
    ("training", "holdout", "message"),
    [
        (("day", "night"), ("day",), "1 sub-class labels for 2 images"),
        (("day", "dusk"), ("day", "night"), "'dusk', which no expert is for"),
        (("day", "day"), ("day", "night"), "no good image of sub-class 'night'"),
    ],
)
def test_labels_that_fit_no_expert_are_refused(
    training: tuple[str, ...], holdout: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        reference_images(("day", "night"), (grey([60, 70]), training), (grey([60, 70]), holdout))


def test_what_is_usual_is_what_single_good_images_stay_below() -> None:
    levels = np.random.default_rng(3).normal(100, 5, 200).round().astype(int).tolist()
    found = images(("",), (grey(levels), ()), (grey(levels), ()))
    reference = reference_of(found, moments_of)
    shifts = [shift_of(moments_of(one), reference.moments[0]) for one in found.others]
    assert 0.97 <= np.mean(np.array(shifts) <= reference.usual[0]) <= 1


@given(shifts=st.lists(st.floats(0, 100), min_size=1, max_size=300))
def test_the_usual_shift_is_above_nearly_all_and_above_zero(shifts: list[float]) -> None:
    usual = usual_shift(shifts)
    assert usual > 0
    assert np.isfinite(usual)
    assert np.mean(np.array(shifts) > usual) <= 0.01


def test_few_images_claim_no_more_than_they_show() -> None:
    assert usual_shift([1.0, 2.0, 3.0]) > 3.5
    assert usual_shift([1.0] * 50) == pytest.approx(1.0)
