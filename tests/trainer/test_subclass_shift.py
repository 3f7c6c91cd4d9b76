"""Splits by sub-class: what is kept apart, in whatever order a folder is listed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DataError
from trainer.data.subclass_shift import SHOTS, SubclassShiftSplit, subclass_shift_splits
from trainer.data.subclasses import Material, Subclass, SubclassImage, natural_key

if TYPE_CHECKING:
    import numpy as np


def image(subclass: str, split: str, label: str, index: int, group: str | None = None) -> SubclassImage:
    def never() -> np.ndarray:
        raise AssertionError("a split must not open an image")

    name = f"{subclass}/{split}/{label}/{index}.png"
    return SubclassImage(name, subclass, split, label, label != "good", group or name, never, None)


def subclass(name: str, train: int = 10, test: int = 4) -> Subclass:
    return Subclass(
        name,
        tuple(image(name, "train", "good", i) for i in range(train)),
        tuple(image(name, "test", label, i) for label in ("good", "hole") for i in range(test)),
    )


def material(count: int, train: int = 10, test: int = 4) -> Material:
    return Material("cloth", tuple(subclass(str(number), train, test) for number in range(1, count + 1)))


def own_pixels(of: Material) -> dict[str, str]:
    return {one.name: one.name for one in of.images}


def names(split: SubclassShiftSplit) -> list[list[str]]:
    parts = [split.fit, split.calibration]
    for part in (split.seen_test, split.unseen_test, split.shots):
        parts += [images for _, images in sorted(part.items())]
    return [[one.name for one in part] for part in parts]


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Material, dict[str, str]]:
    """Sub-classes with groups that span them, copies of images, and some that are only tested on."""
    subclasses = []
    for number in range(draw(st.integers(2, 8))):
        name = str(number)
        count = draw(st.sampled_from([0, 7, 12])) if number > 1 else 12
        spread = draw(st.sampled_from([1, 3, 100]))
        shared = draw(st.booleans())
        train = [image(name, "train", "good", i, f"{'all' if shared else name}/g{i % spread}") for i in range(count)]
        own = draw(st.sampled_from([f"{name}/t", f"{name}/t", "all/g", f"{name}/g"]))  # the last two, training has
        goods = [image(name, "test", "good", i, f"{own}{i % 4 + 1}") for i in range(draw(st.integers(0, 8)))]
        holes = [image(name, "test", "hole", i) for i in range(draw(st.integers(0, 3)))]
        subclasses.append(Subclass(name, tuple(train), (*goods, *holes)))
    made = Material("drawn", tuple(subclasses))
    kinds = draw(st.integers(10, 400))
    pixels = {one.name: str(draw(st.integers(0, kinds))) if kinds < 200 else one.name for one in made.images}
    return made, pixels


@settings(max_examples=150, deadline=None)
@given(given_=drawn(), seed=st.integers(0, 2**32), rotations=st.integers(1, 6), order=st.randoms())
def test_nothing_that_is_tested_on_is_learned_from(
    given_: tuple[Material, dict[str, str]], seed: int, rotations: int, order: object
) -> None:
    made, pixels = given_
    try:
        found = subclass_shift_splits(made, pixels, seed=seed, rotations=rotations)
    except DataError as error:
        if "are needed" not in str(error):
            raise
        return
    for split in found:
        assert set(split.trained).isdisjoint(split.unseen)
        assert set(split.trained) | set(split.unseen) == {one.name for one in made.subclasses}
        learned = (*split.fit, *split.calibration)
        tested = [one for part in (split.seen_test, split.unseen_test) for images in part.values() for one in images]
        unseen = [one for images in split.unseen_test.values() for one in images]
        shots = [one for images in split.shots.values() for one in images]
        assert {one.subclass for one in learned} <= set(split.trained)
        assert all(one.split == "train" and not one.anomalous for one in learned)
        assert len({pixels[one.name] for one in learned}) == len(learned)
        assert {pixels[one.name] for one in learned}.isdisjoint(pixels[one.name] for one in tested)
        assert {one.group for one in learned}.isdisjoint(one.group for one in unseen)
        assert {one.name for one in shots}.isdisjoint(one.name for one in tested)
        for name, given_shots in split.shots.items():
            of_test = {pixels[one.name] for one in split.unseen_test.get(name, ())}
            assert of_test.isdisjoint(pixels[one.name] for one in given_shots)
            assert all(one.subclass == name and not one.anomalous for one in given_shots)
            assert len(given_shots) <= max(SHOTS)
            assert not made.subclass(name).train or all(one.split == "train" for one in given_shots)
        if not any("one group each" in note for note in split.notes):
            assert {one.group for one in split.fit}.isdisjoint(one.group for one in split.calibration)
    shuffled = list(made.subclasses)
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    turned = tuple(replace(one, train=one.train[::-1], test=one.test[::-1]) for one in shuffled)
    again = subclass_shift_splits(replace(made, subclasses=turned), pixels, seed=seed, rotations=rotations)
    for one, other in zip(found, again, strict=True):
        assert [sorted(part) for part in names(one)] == [sorted(part) for part in names(other)]
        assert names(one)[:2] == names(other)[:2]
        assert {name: [i.name for i in images] for name, images in one.shots.items()} == {
            name: [i.name for i in images] for name, images in other.shots.items()
        }


@pytest.mark.parametrize(("count", "left_out"), [(15, 5), (14, 4), (10, 3), (6, 2), (5, 1), (3, 1), (2, 1)])
def test_five_rotations_leave_every_subclass_out(count: int, left_out: int) -> None:
    made = material(count, train=20)
    for seed in range(5):
        found = subclass_shift_splits(made, own_pixels(made), seed=seed)
        assert len(found) == 5
        assert {name for split in found for name in split.unseen} == {one.name for one in made.subclasses}
        assert all(len(split.unseen) == left_out for split in found)


def test_seed_changes_what_is_left_out_and_nothing_else_does() -> None:
    made = material(9)
    first, again, other = (subclass_shift_splits(made, own_pixels(made), seed=seed) for seed in (1, 1, 2))
    assert [names(split) for split in first] == [names(split) for split in again]
    assert [split.unseen for split in first] != [split.unseen for split in other]


def test_calibration_takes_a_fifth_of_every_trained_subclass_and_is_the_same_in_every_rotation() -> None:
    made = material(6, train=20)
    found = subclass_shift_splits(made, own_pixels(made))
    held = {}
    for split in found:
        for name in split.trained:
            chosen = {one.name for one in split.calibration if one.subclass == name}
            assert len(chosen) == 4
            assert held.setdefault(name, chosen) == chosen


def test_groups_that_span_subclasses_stay_whole() -> None:
    tiles = [
        Subclass(
            f"light{light}",
            tuple(image(f"light{light}", "train", "good", i, f"tile{i}") for i in range(20)),
            tuple(image(f"light{light}", "test", "good", i, f"other{i}") for i in range(5)),
        )
        for light in range(4)
    ]
    made = Material("tiles", tuple(tiles))
    for split in subclass_shift_splits(made, own_pixels(made), rotations=4):
        held = {one.group for one in split.calibration}
        assert len(held) == 4
        assert held.isdisjoint(one.group for one in split.fit)
        assert len(split.calibration) == 4 * len(split.trained)


def test_training_images_that_a_test_knows_are_left_out_and_counted() -> None:
    made = material(4)
    pixels = own_pixels(made)
    pixels["1/train/good/3.png"] = pixels["2/test/good/0.png"]  # the same picture under another name
    pixels["3/train/good/1.png"] = pixels["3/train/good/0.png"]
    for split in subclass_shift_splits(made, pixels):
        learned = {one.name for one in (*split.fit, *split.calibration)}
        assert "1/train/good/3.png" not in learned
        assert "3/train/good/1.png" not in learned
        assert any("1 training images left out: the same pixels" in note for note in split.notes) == (
            "1" in split.trained
        )
        assert any("1 training images left out: copies" in note for note in split.notes) == ("3" in split.trained)


def test_subclass_without_training_images_is_unseen_in_every_rotation() -> None:
    made = material(5)
    lone = replace(subclass("6", test=8), train=())
    made = replace(made, subclasses=(*made.subclasses, lone))
    found = subclass_shift_splits(made, own_pixels(made))
    assert all("6" in split.unseen for split in found)
    for split in found:
        assert len(split.shots["6"]) == 4  # half of its good test images
        assert len(split.unseen_test["6"]) == 12
    (alone,) = subclass_shift_splits(made, own_pixels(made), rotations=1)
    assert alone.unseen == ("6",)


def test_time_is_never_turned_back() -> None:
    made = replace(material(6, train=20), ordered=True)
    found = subclass_shift_splits(made, own_pixels(made), seed=3)
    assert [len(split.trained) for split in found] == [1, 2, 3, 4, 5]
    for split in found:
        assert max(map(natural_key, split.trained)) < min(map(natural_key, split.unseen))
    assert [len(split.trained) for split in subclass_shift_splits(made, own_pixels(made), rotations=2)] == [1, 5]


def test_time_tests_on_stretches_without_training_images_only_when_they_are_later() -> None:
    made = material(5, train=20)
    gaps = tuple(replace(one, train=()) if one.name in {"3", "5"} else one for one in made.subclasses)
    made = replace(made, subclasses=gaps, ordered=True)
    found = subclass_shift_splits(made, own_pixels(made))
    assert [(split.trained, split.unseen) for split in found] == [
        (("1",), ("2", "3", "4", "5")),
        (("1", "2"), ("3", "4", "5")),
        (("1", "2", "4"), ("5",)),
    ]


def test_groups_of_unseen_tests_are_left_out_of_training_and_counted() -> None:
    tiles = tuple(
        Subclass(
            f"light{light}",
            tuple(image(f"light{light}", "train", "good", i, f"tile{i}") for i in range(20)),
            tuple(image(f"light{light}", "test", "good", i, f"tile{i}") for i in range(18, 23)),
        )
        for light in range(4)
    )
    made = Material("tiles", tiles)
    for split in subclass_shift_splits(made, own_pixels(made), rotations=4):
        assert {"tile18", "tile19"}.isdisjoint(one.group for one in (*split.fit, *split.calibration))
        assert any("6 training images left out: their groups" in note for note in split.notes)


def test_too_little_is_refused() -> None:
    made = material(1)
    with pytest.raises(DataError, match="1 sub-class with train/good; at least 2"):
        subclass_shift_splits(made, own_pixels(made))
    made = material(3, train=4)
    with pytest.raises(DataError, match="4 to calibrate with"):
        subclass_shift_splits(made, own_pixels(made))
    made = material(6)
    for wrong in ({"n_test": 1}, {"n_test": 6}, {"rotations": 0}, {"calibration": 1.0}):
        with pytest.raises(ValueError, match=r"n_test|rotations"):
            subclass_shift_splits(made, own_pixels(made), **wrong)
