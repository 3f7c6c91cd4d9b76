"""Merging updates: the same bits in any order and on any threads, equal mass, caps, coverage, typed refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from deploy.aggregator.aggregate import Aggregated, AggregateSettings, aggregate, update_mass
from deploy.aggregator.lloyd import assign, single_threaded_blas
from edge.errors import DataError, UsageError
from tests.deploy.fleet_values import fleet, update

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.federation.update import MemoryUpdate

SMALL = AggregateSettings(rows=16, sample_factor=4)


def same(one: Aggregated, other: Aggregated) -> bool:
    return all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes() and len(one.rows) == len(other.rows)
        for name in ("rows", "mass", "boxes")
    )


def inertia(updates: Sequence[MemoryUpdate], rows: np.ndarray, chosen: AggregateSettings = SMALL) -> float:
    points = np.concatenate([one.rows for one in updates]).astype(np.float64)
    mass = np.concatenate(update_mass(updates, chosen))
    apart = ((points[:, None] - rows[None].astype(np.float64)) ** 2).sum(2).min(1)
    return float(mass @ apart / mass.sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 50), st.permutations(range(7)), st.sampled_from([1, 2, 4]))
def test_aggregate_is_the_same_in_any_order_and_on_any_threads(seed: int, order: list[int], threads: int) -> None:
    updates = fleet(7, seed=seed, products=3)
    expected = aggregate(updates, settings=SMALL, seed=seed)
    assert same(expected, aggregate([updates[i] for i in order], settings=SMALL, seed=seed, threads=threads))


def test_aggregate_is_the_same_on_any_threads_over_many_blocks() -> None:
    updates = fleet(12, rows=3000, seed=3)
    chosen = AggregateSettings(rows=40, sample_factor=8, passes=2)
    one, two, four = (
        aggregate(updates[::step], settings=chosen, seed=1, threads=t) for step, t in ((1, 1), (-1, 2), (1, 4))
    )
    assert same(one, two)
    assert same(one, four)


def test_aggregate_of_rows_that_many_boxes_share_is_the_same_in_any_order() -> None:
    rng = np.random.default_rng(0)
    shared = rng.integers(-2, 3, (30, 4))
    updates = [
        update(
            shared[rng.permutation(30)[:20]] * [1, 1, 1, -0.0],
            box=f"s/{n}",
            support=rng.uniform(1, 9, 20).astype(np.float32),
        )
        for n in range(9)
    ]
    first = aggregate(updates, settings=SMALL, seed=0)
    for _ in range(5):
        assert same(first, aggregate([updates[i] for i in rng.permutation(9)], settings=SMALL, seed=0))


def test_a_repeated_delivery_changes_nothing() -> None:
    updates = fleet(5)
    assert same(aggregate(updates, settings=SMALL, seed=0), aggregate([*updates, updates[2]], settings=SMALL, seed=0))


def test_the_seed_matters_and_hardly_to_the_error() -> None:
    updates = fleet(8, seed=1)
    banks = [aggregate(updates, settings=SMALL, seed=seed) for seed in range(6)]
    assert len({bank.rows.tobytes() for bank in banks}) > 1
    errors = [inertia(updates, bank.rows) for bank in banks]
    assert max(errors) < 2 * min(errors)


def test_result_is_canonical() -> None:
    bank = aggregate(fleet(6), settings=SMALL, seed=0)
    half = bank.rows.astype(np.float16)
    assert (half.astype(np.float32) == bank.rows).all()
    keys = [row.tobytes() for row in half]
    assert keys == sorted(set(keys))
    assert bank.mass.dtype == np.float32
    assert bank.mass.sum() == pytest.approx(1, abs=1e-6)
    assert bank.boxes.dtype == np.uint16
    assert len(bank.rows) == len(bank.mass) == len(bank.boxes) == SMALL.rows
    assert 1 <= bank.boxes.min() <= bank.boxes.max() <= 6


def test_fewer_distinct_rows_than_asked_for_are_all_kept_with_their_boxes() -> None:
    one, two = update([[0, 1], [2, 3], [2, 3]], box="s/a"), update([[2, 3], [4, 5]], box="s/b")
    bank = aggregate([one, two], settings=SMALL, seed=0)
    found = {
        tuple(row): (mass, boxes) for row, mass, boxes in zip(bank.rows.tolist(), bank.mass, bank.boxes, strict=True)
    }
    assert found.keys() == {(0, 1), (2, 3), (4, 5)}
    assert found[2, 3] == (pytest.approx(1 / 3 + 1 / 4), 2)
    assert found[0, 1] == (pytest.approx(1 / 6), 1)


def test_zero_and_minus_zero_are_one_row() -> None:
    bank = aggregate([update([[0.0, 1]], box="s/a"), update([[-0.0, 1]], box="s/b")], settings=SMALL, seed=0)
    assert bank.rows.tolist() == [[0, 1]]
    assert bank.boxes.tolist() == [2]
    assert not np.signbit(bank.rows).any()


def test_mass_and_boxes_are_those_of_the_nearest_rows() -> None:
    updates = fleet(6, seed=2)
    bank = aggregate(updates, settings=SMALL, seed=0)
    mass, behind = np.zeros(len(bank.rows)), [set() for _ in bank.rows]
    for one, share in zip(updates, update_mass(updates, SMALL), strict=True):
        nearest = ((one.rows[:, None] - bank.rows[None]) ** 2).sum(2).argmin(1)
        np.add.at(mass, nearest, share)
        for row in nearest:
            behind[row].add(one.box)
    np.testing.assert_allclose(bank.mass, mass, rtol=1e-5)
    assert bank.boxes.tolist() == [len(boxes) for boxes in behind]


def test_inflated_counts_change_nothing() -> None:
    updates = fleet(5)
    inflated = replace(updates[0], support=updates[0].support * 2**14)
    assert same(aggregate(updates, settings=SMALL, seed=0), aggregate([inflated, *updates[1:]], settings=SMALL, seed=0))


def test_no_row_claims_more_than_its_cap() -> None:
    support = np.array([10] * 9 + [1e6], np.float32)
    (mass,) = update_mass([update(np.arange(20).reshape(10, 2), support=support)], SMALL)
    assert mass[-1] == pytest.approx(4 * mass[0])
    assert mass.sum() == pytest.approx(1)


def test_boxes_weigh_the_same_and_share_their_mass_among_their_updates() -> None:
    rows = np.arange(8).reshape(4, 2)
    updates = [update(rows[:n], box=box) for n, box in ((1, "s/a"), (4, "s/b"), (2, "s/b"), (3, "s/c"))]
    assert [mass.sum() for mass in update_mass(updates, SMALL)] == pytest.approx([1 / 3, 1 / 6, 1 / 6, 1 / 3])


def test_groups_are_capped_against_the_smallest() -> None:
    many = [update([[n, 0]], box=f"s/{n}", product="a") for n in range(100)]
    lone = [update([[0, 1]], box="s/lone", product="b"), update([[0, 2]], box="s/other", product="a", subclass="dark")]
    mass = [part.sum() for part in update_mass([*many, *lone], SMALL)]
    assert sum(mass[:100]) == pytest.approx(4 / 6)
    assert mass[100:] == pytest.approx([1 / 6, 1 / 6])


def test_a_lone_product_is_covered_as_well_as_the_many() -> None:
    rng = np.random.default_rng(0)
    modes = 5 * rng.standard_normal((2, 8, 6))

    def box(number: int, product: int) -> MemoryUpdate:
        rows = np.repeat(modes[product], 10, axis=0) + 0.05 * rng.standard_normal((80, 6))
        return update(rows, box=f"s/{number}", product=str(product))

    updates = [*(box(n, 0) for n in range(40)), box(40, 1)]
    bank = aggregate(updates, settings=AggregateSettings(rows=16, sample_factor=8), seed=0)
    apart = np.sqrt(((modes.reshape(-1, 6)[:, None] - bank.rows[None]) ** 2).sum(2).min(1))
    assert apart.max() < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_error_is_near_that_of_full_clustering(seed: int) -> None:
    updates = fleet(30, rows=100, width=8, seed=seed, products=3)
    chosen = AggregateSettings(rows=64, sample_factor=8)
    ours = inertia(updates, aggregate(updates, settings=chosen, seed=seed).rows, chosen)
    points = np.concatenate([one.rows for one in updates])
    theirs = KMeans(64, n_init=1, random_state=seed).fit(
        points, sample_weight=np.concatenate(update_mass(updates, chosen))
    )
    assert ours < 1.1 * inertia(updates, theirs.cluster_centers_, chosen)


def test_rows_far_from_all_others_are_covered() -> None:
    updates = fleet(10, seed=4)
    lone = np.full((1, 6), 60.0)
    far = replace(updates[0], rows=np.concatenate([updates[0].rows[:-1], lone]).astype(np.float32))
    bank = aggregate([far, *updates[1:]], settings=SMALL, seed=0)
    assert np.abs(bank.rows - lone).max(1).min() == 0


def test_rows_too_close_for_their_distances_are_still_told_apart() -> None:
    rows = np.full((200, 3), 1000.0) + np.arange(200)[:, None] * [0.5, 0, 0]
    bank = aggregate([update(rows)], settings=SMALL, seed=0)
    assert len(bank.rows) == SMALL.rows
    assert inertia([update(rows)], bank.rows) < 2 * (100 / 16) ** 2 / 12


def test_assign_finds_the_nearest_of_near_ties() -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((50, 5)) * 1e-3 + 7
    rows = (rng.standard_normal((3000, 5)) * 1e-2 + 7).astype(np.float16)
    with single_threaded_blas(2) as workers:
        found = assign(rows, np.ones(3000), centres, workers=workers)
    squared = ((rows.astype(np.float64)[:, None] - centres[None]) ** 2).sum(2)
    assert (found.labels == squared.argmin(1)).all()
    np.testing.assert_allclose(found.squared, squared.min(1), rtol=1e-3)
    np.testing.assert_array_equal(found.mass, np.bincount(found.labels, minlength=50))


@pytest.mark.parametrize(
    ("updates", "words"),
    [
        ([], "no update"),
        ([update([[1]], box="s/a"), update([[1]], box="s/b", embedding_id="cd" * 32)], "s/b"),
        ([update([[1]], box="s/a"), update([[1, 2]], box="s/b")], "s/b of 2"),
        ([update([[1]], box="s/a", rows=np.array([[1e5]], np.float32))], "s/a: rows are not finite"),
        ([update([[1]], box="s/a", rows=np.array([[np.nan]], np.float32))], "s/a: rows are not finite"),
        ([update([[1]], box="s/a", rows=np.zeros((0, 1), np.float32))], "s/a: rows are"),
        ([update([[1]], box="s/a", support=np.zeros(1, np.float32))], "s/a: support"),
        ([update([[1]], box="s/a", support=np.ones(2, np.float32))], "s/a: support"),
        ([update([[1]], box="s/a", support=np.array([np.inf], np.float32))], "s/a: support"),
    ],
)
def test_aggregate_refuses(updates: list[MemoryUpdate], words: str) -> None:
    with pytest.raises(DataError, match=words):
        aggregate(updates, settings=SMALL, seed=0)


@pytest.mark.parametrize(("seed", "threads"), [(-1, 1), (0, 0)])
def test_aggregate_refuses_arguments(seed: int, threads: int) -> None:
    with pytest.raises(UsageError, match="threads is"):
        aggregate(fleet(1), settings=SMALL, seed=seed, threads=threads)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"row_cap": 0.5}, {"group_cap": 0}, {"unknown": 1}, {"tolerance": 1}])
def test_settings_refuse(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AggregateSettings.model_validate(wrong)
