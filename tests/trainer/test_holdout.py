"""Setting good images aside: whole groups, never an empty part, the same for a seed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.errors import DataError
from trainer.data.folder import Sample
from trainer.data.splits import split_holdout


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
