"""Merging sets of prototypes: matched within their cells, averaged by mass, the same in any order."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scipy.optimize import linear_sum_assignment

from deploy.prototypes import PrototypeSet, assignment, merge
from edge.errors import DataError


def drawn(seed: int, *, cells: int = 3, copies: int = 4, unit: bool = False) -> PrototypeSet:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((cells * copies, 5)).astype(np.float32)
    if unit:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    mass = (rng.integers(1, 50, len(rows)) * (rng.random(len(rows)) > 0.2)).astype(np.float32)
    return PrototypeSet(rows, mass, float(rng.uniform(0.5, 2)), float(rng.uniform(0.1, 0.5)))


def shuffled(one: PrototypeSet, seed: int, *, cells: int = 3) -> PrototypeSet:
    """The same prototypes, the copies of each cell in another order."""
    rng = np.random.default_rng(seed)
    copies = len(one.mass) // cells
    order = np.stack([rng.permutation(copies) * cells + cell for cell in range(cells)], 1).ravel()
    return replace(one, prototypes=one.prototypes[order], mass=one.mass[order])


def as_pairs(one: PrototypeSet, cells: int) -> list[list[tuple[float, ...]]]:
    """Prototypes with their masses, the copies of each cell sorted."""
    joined = np.column_stack([one.prototypes, one.mass]).round(4)
    return [sorted(map(tuple, joined[cell::cells].tolist())) for cell in range(cells)]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 12), seed=st.integers(0, 999))
def test_assignment_costs_the_least(size: int, seed: int) -> None:
    cost = np.random.default_rng(seed).random((size, size))
    found = assignment(cost)
    assert sorted(found) == list(range(size))
    rows, columns = linear_sum_assignment(cost)
    assert cost[np.arange(size), found].sum() == pytest.approx(cost[rows, columns].sum(), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(2, 5), unit=st.booleans())
def test_order_of_the_sets_changes_no_bit(seed: int, count: int, unit: bool) -> None:  # noqa: FBT001 (drawn)
    sets = [drawn(seed * 10 + index, unit=unit) for index in range(count)]
    first = merge(sets, cells=3, unit=unit)
    again = merge([sets[i] for i in np.random.default_rng(seed).permutation(count)], cells=3, unit=unit)
    assert first.prototypes.tobytes() == again.prototypes.tobytes()
    assert first.mass.tobytes() == again.mass.tobytes()
    assert (first.farthest, first.typical) == (again.farthest, again.typical)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 5))
def test_mass_of_each_cell_is_conserved(seed: int, count: int) -> None:
    sets = [drawn(seed * 10 + index) for index in range(count)]
    found = merge(sets, cells=3, unit=False)
    for cell in range(3):
        assert found.mass[cell::3].sum() == sum(one.mass[cell::3].sum() for one in sets)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(1, 5), unit=st.booleans())
def test_equal_sets_merge_to_themselves_whatever_the_order_of_copies(
    seed: int,
    count: int,
    unit: bool,  # noqa: FBT001 (drawn)
) -> None:
    one = drawn(seed, unit=unit)
    found = merge([shuffled(one, index) for index in range(count)], cells=3, unit=unit)
    wanted = as_pairs(replace(one, mass=one.mass * count), 3)
    for got, expected in zip(as_pairs(found, 3), wanted, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-4)
    assert (found.farthest, found.typical) == (one.farthest, pytest.approx(one.typical))


def test_partners_are_averaged_by_mass() -> None:
    near = np.array([[0, 0], [10, 0]], np.float32)
    first = PrototypeSet(near, np.array([3, 1], np.float32), 1.0, 0.2)
    # The same two prototypes in the other order, each a little away.
    second = PrototypeSet(near[::-1] + np.float32(1), np.array([1, 1], np.float32), 2.0, 0.8)
    found = merge([first, second], cells=1, unit=False)
    assert as_pairs(found, 1) == [[(0.25, 0.25, 4.0), (10.5, 0.5, 2.0)]]
    assert found.farthest == 2.0
    assert found.typical == pytest.approx((4 * 0.2 + 2 * 0.8) / 6)


def test_prototype_without_mass_moves_nothing() -> None:
    first = drawn(5)
    first = replace(first, mass=np.ones_like(first.mass))
    empty = replace(drawn(6), mass=np.zeros(12, np.float32))
    found = merge([first, empty], cells=3, unit=False)
    for got, expected in zip(as_pairs(found, 3), as_pairs(first, 3), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-4)


def test_prototypes_of_unit_length_stay_so() -> None:
    found = merge([drawn(index, unit=True) for index in range(3)], cells=3, unit=True)
    np.testing.assert_allclose(np.linalg.norm(found.prototypes, axis=1), 1, atol=1e-6)


def test_cells_are_never_mixed() -> None:
    """Prototypes of each cell lie far from those of others: so do the merged ones."""
    offsets = np.tile(np.arange(3) * 100.0, 4).astype(np.float32)[:, None]
    sets = [replace(drawn(index), prototypes=drawn(index).prototypes + offsets) for index in range(3)]
    assert np.abs(merge(sets, cells=3, unit=False).prototypes - offsets).max() < 10


@pytest.mark.parametrize(
    ("sets", "cells", "words"),
    [
        ([], 1, "there is no set"),
        ([drawn(1)], 5, r"\[12, 5\] do not lie in 5 cells"),
        ([drawn(1), drawn(1, copies=2)], 3, "set 1: prototypes"),
        ([replace(drawn(1), mass=-drawn(1).mass - 1)], 3, "set 0: values"),
        ([replace(drawn(1), farthest=0.0)], 3, "set 0: values"),
        ([replace(drawn(1), prototypes=np.full((12, 5), np.nan, np.float32))], 3, "set 0: values"),
    ],
)
def test_sets_that_do_not_fit_are_refused(sets: list[PrototypeSet], cells: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        merge(sets, cells=cells, unit=False)
