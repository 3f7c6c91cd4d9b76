"""Setting good images aside: whole groups, never an empty part, the same for a seed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import DataError
from trainer.data.folder import Sample
from trainer.data.splits import split_holdout, split_subclasses


def samples(groups: list[int]) -> list[Sample]:
    return [
        Sample(Path(f"{i:04d}.png"), "train", "good", anomalous=False, mask=None, condition="", group=f"g{group}")
        for i, group in enumerate(groups)
    ]


@given(
    groups=st.lists(st.integers(0, 12), min_size=2, max_size=80),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
    minimum=st.integers(1, 40),
)
def test_holdout_parts_are_disjoint_whole_and_never_empty(
    groups: list[int], fraction: float, seed: int, minimum: int
) -> None:
    given_samples = samples(groups)
    fit, holdout, by_group = split_holdout(given_samples, fraction, seed, minimum)
    assert fit
    assert holdout
    assert sorted([*fit, *holdout], key=lambda s: s.name) == given_samples
    assert by_group == (len(set(groups)) > 1)
    if by_group:
        assert not {s.group for s in fit} & {s.group for s in holdout}
    else:
        assert len(holdout) >= min(minimum, len(groups) // 2)
    assert split_holdout(given_samples, fraction, seed, minimum) == (fit, holdout, by_group)


@given(seed=st.integers(0, 2**32), minimum=st.integers(1, 20))
def test_holdout_keeps_the_minimum_where_groups_are_single_images(seed: int, minimum: int) -> None:
    fit, holdout, _ = split_holdout(samples(list(range(50))), 0.1, seed, minimum)
    assert len(holdout) == max(5, minimum)
    assert len(fit) + len(holdout) == 50


def test_holdout_prefers_small_groups_to_a_giant_one() -> None:
    for seed in range(20):
        _, holdout, _ = split_holdout(samples([0] * 70 + [1] * 10 + [2] * 10 + [3] * 10), 0.2, seed, 5)
        assert 10 <= len(holdout) <= 30


def test_holdout_reaches_a_minimum_above_the_fraction_with_small_groups() -> None:
    groups = [0] * 45 + [1 + i // 5 for i in range(50)]
    for seed in range(80):
        assert len(split_holdout(samples(groups), 0.01, seed, 8).holdout) == 10


def test_holdout_seeds_differ() -> None:
    everything = samples(list(range(50)))
    assert split_holdout(everything, 0.2, 1, 5) != split_holdout(everything, 0.2, 2, 5)


def test_holdout_of_one_image_is_refused() -> None:
    with pytest.raises(DataError, match="at least 2"):
        split_holdout(samples([0]), 0.2, 0, 1)


def test_holdout_settings_out_of_range_are_refused() -> None:
    for fraction, minimum in ((0.0, 1), (1.0, 1), (0.2, 0)):
        with pytest.raises(ValueError, match="must be in"):
            split_holdout(samples([0, 1]), fraction, 0, minimum)


def of_subclasses(labels: list[tuple[str, int]]) -> list[Sample]:
    return [
        Sample(Path(f"{i:04d}.png"), "train", "good", anomalous=False, mask=None, condition=name, group=f"g{group}")
        for i, (name, group) in enumerate(labels)
    ]


@given(
    labels=st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 12)), min_size=2, max_size=80),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
    minimum=st.integers(1, 40),
)
def test_every_subclass_is_learned_from_and_held_out(
    labels: list[tuple[str, int]], fraction: float, seed: int, minimum: int
) -> None:
    given_samples = of_subclasses(labels)
    fit, holdout, by_group = split_subclasses(given_samples, fraction, seed, minimum)
    assert fit
    assert holdout
    assert sorted([*fit, *holdout], key=lambda s: s.name) == given_samples
    if by_group:
        assert not {s.group for s in fit} & {s.group for s in holdout}
    sizes = Counter(name for name, _ in labels)
    if len(sizes) > 1 and max(sizes.values()) > 2:
        for name, size in sizes.items():
            left = sum(s.condition == name for s in fit)
            assert left >= min(size, 2)
            assert size < 3 or left < size
    assert split_subclasses(given_samples, fraction, seed, minimum) == (fit, holdout, by_group)


@given(seed=st.integers(0, 2**32), fraction=st.floats(0.05, 0.5))
def test_every_subclass_gives_its_share(seed: int, fraction: float) -> None:
    labels = [(name, i) for i, name in enumerate("a" * 60 + "b" * 30 + "c" * 10)]
    fit, holdout, by_group = split_subclasses(of_subclasses(labels), fraction, seed, 3)
    assert by_group
    assert len(fit) + len(holdout) == 100
    held = Counter(s.condition for s in holdout)
    for name, size in (("a", 60), ("b", 30), ("c", 10)):
        assert held[name] == max(1, round(fraction * size))


def test_a_group_across_subclasses_stays_whole() -> None:
    labels = [(name, i // 4) for i, name in enumerate("ab" * 40)]
    for seed in range(20):
        fit, holdout, by_group = split_subclasses(of_subclasses(labels), 0.2, seed, 8)
        assert by_group
        assert not {s.group for s in fit} & {s.group for s in holdout}
        assert 12 <= len(holdout) <= 24


def test_a_subclass_of_one_group_is_split_by_image() -> None:
    fit, holdout, by_group = split_subclasses(
        of_subclasses([("a", i) for i in range(20)] + [("b", 99)] * 20), 0.2, 0, 8
    )
    assert not by_group
    assert Counter(s.condition for s in holdout) == {"a": 4, "b": 4}
    assert Counter(s.condition for s in fit) == {"a": 16, "b": 16}


def test_one_subclass_is_split_as_ever() -> None:
    everything = samples([i // 3 for i in range(60)])
    assert split_subclasses(everything, 0.2, 5, 8) == split_holdout(everything, 0.2, 5, 8)


def test_holding_out_of_subclasses_refuses_what_is_out_of_range() -> None:
    for fraction, minimum in ((0.0, 1), (1.0, 1), (0.5, 0)):
        with pytest.raises(ValueError, match="must be in"):
            split_subclasses(of_subclasses([("a", 0)] * 4 + [("b", 1)] * 4), fraction, 0, minimum)
