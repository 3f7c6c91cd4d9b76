"""Reduction of patch rows to a bank, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from trainer.methods.memory import reduce
from trainer.methods.memory.reduce import (
    cell_means,
    greedy_coreset,
    kmeans,
    nearest,
    weighted_average_reduce,
    whitening,
)

QUICK = settings(max_examples=40, deadline=None)


def rows_of(seed: int, count: int, width: int, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + offset


@QUICK
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 40),
    bank=st.integers(1, 30),
    width=st.integers(1, 20),
    offset=st.sampled_from([0.0, 3.0, 50.0]),
)
def test_nearest_equals_brute_force(seed: int, count: int, bank: int, width: int, offset: float) -> None:
    rows, anchors = rows_of(seed, count, width, offset), rows_of(seed + 1, bank, width, offset)
    squared, index = nearest(rows, anchors)
    expected = cdist(rows.double().numpy(), anchors.double().numpy(), "sqeuclidean")
    # Norms and product nearly cancel: what is left is as exact as the norms are.
    allowed = 4e-6 * float(max((rows * rows).sum(1).max(), (anchors * anchors).sum(1).max())) + 1e-6
    np.testing.assert_allclose(squared, expected.min(1), atol=allowed, rtol=0)
    np.testing.assert_allclose(expected[np.arange(count), index], expected.min(1), atol=2 * allowed, rtol=0)


def test_nearest_is_the_same_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, bank = rows_of(0, 50, 6), rows_of(1, 9, 6)
    whole = nearest(rows, bank)
    monkeypatch.setattr(reduce, "_CHUNK", 7)
    chunked = nearest(rows, bank)
    torch.testing.assert_close(chunked[0], whole[0])
    assert torch.equal(chunked[1], whole[1])


def test_nearest_a_row_of_the_bank_is_never_below_zero_away() -> None:
    rows = rows_of(0, 200, 40, offset=30.0)
    squared, _ = nearest(rows, rows)
    assert squared.min() >= 0


@QUICK
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), size=st.integers(1, 70), copies=st.booleans())
def test_greedy_coreset_rows_are_distinct(seed: int, count: int, size: int, *, copies: bool) -> None:
    rows = rows_of(seed, count, 5)
    if copies:
        rows = rows[torch.randint(0, count, (count,), generator=torch.Generator().manual_seed(seed))]
    chosen = greedy_coreset(rows, size, torch.Generator().manual_seed(seed))
    assert len(chosen) == min(size, count) == len(set(chosen.tolist()))


@QUICK
@given(seed=st.integers(0, 10**6), count=st.integers(2, 40), size=st.integers(1, 20))
def test_greedy_coreset_takes_the_row_farthest_from_those_taken(seed: int, count: int, size: int) -> None:
    rows = rows_of(seed, count, 6)
    generator = torch.Generator().manual_seed(seed)
    chosen = greedy_coreset(rows, size, generator).tolist()
    again = torch.Generator().manual_seed(seed)
    points = rows @ (torch.randn(6, reduce._PROJECTION, generator=again) / reduce._PROJECTION**0.5)
    distances = cdist(points.double(), points.double())
    assert chosen[0] == int(torch.randint(count, (1,), generator=again))
    for position in range(1, len(chosen)):
        away = distances[chosen[:position]].min(0)
        assert away[chosen[position]] >= away.max() - 1e-3


def test_greedy_coreset_covers_within_twice_the_optimum() -> None:
    """Gonzalez (1985): farthest-first leaves no row more than twice as far as the best choice of anchors would."""
    from itertools import combinations

    rows = rows_of(4, 11, 3)
    chosen = greedy_coreset(rows, 3, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    points = rows @ (torch.randn(3, reduce._PROJECTION, generator=generator) / reduce._PROJECTION**0.5)
    distances = cdist(points.double(), points.double())
    best = min(distances[list(some)].min(0).max() for some in combinations(range(11), 3))
    assert distances[chosen].min(0).max() <= 2 * best + 1e-6


def test_greedy_coreset_same_generator_same_rows() -> None:
    rows = rows_of(0, 200, 8)
    first, again, other = (greedy_coreset(rows, 20, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_greedy_coreset_reports_to_the_end() -> None:
    calls: list[int] = []
    greedy_coreset(rows_of(0, 130, 4), 120, torch.Generator().manual_seed(0), calls.append)
    assert calls[-1] == 120
    assert calls == sorted(set(calls))


def reduced_slowly(rows: np.ndarray, anchors: np.ndarray, tau: float) -> np.ndarray:
    squared = cdist(rows, anchors, "sqeuclidean")
    cell, bank = squared.argmin(1), anchors.copy()
    for r in range(len(anchors)):
        inside = cell == r
        if inside.any():
            u = np.exp(-squared[inside, r] / tau)
            bank[r] = (u[:, None] * rows[inside]).sum(0) / u.sum()
    return bank


@QUICK
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), anchors=st.integers(1, 12), width=st.integers(1, 6))
def test_weighted_average_reduce_equals_the_formula_and_loses_no_row(
    seed: int, count: int, anchors: int, width: int
) -> None:
    rows, seeds = rows_of(seed, count, width), rows_of(seed + 1, anchors, width)
    bank, support = weighted_average_reduce([rows], seeds)
    assert int(support.sum()) == count
    tau = float(nearest(rows, seeds)[0].median())
    expected = reduced_slowly(rows.double().numpy(), seeds.double().numpy(), max(tau, 1e-12))
    np.testing.assert_allclose(bank, expected, atol=1e-3)


@QUICK
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), anchors=st.integers(1, 12))
@example(seed=120, count=2, anchors=4)  # a row hundreds of widths away from its anchor
def test_weighted_average_reduce_stays_inside_the_cells_hull(seed: int, count: int, anchors: int) -> None:
    """On a line the hull of a cell is an interval."""
    rows, seeds = rows_of(seed, count, 1), rows_of(seed + 1, anchors, 1)
    bank, support = weighted_average_reduce([rows], seeds)
    _, cell = nearest(rows, seeds)
    for r in range(anchors):
        inside = rows[cell == r]
        assert int(support[r]) == len(inside)
        if len(inside):
            assert inside.min() - 1e-5 <= float(bank[r, 0]) <= inside.max() + 1e-5
        else:
            assert torch.equal(bank[r], seeds[r])


def test_weighted_average_reduce_an_empty_cell_keeps_its_anchor() -> None:
    rows = torch.zeros(5, 3)
    anchors = torch.tensor([[0.0, 0.0, 0.0], [9.0, 9.0, 9.0]])
    bank, support = weighted_average_reduce([rows], anchors)
    assert support.tolist() == [5, 0]
    assert torch.equal(bank[1], anchors[1])


def test_weighted_average_reduce_does_not_care_how_rows_are_batched() -> None:
    rows, anchors = rows_of(0, 90, 4), rows_of(1, 7, 4)
    # The width of the weights comes from the first batch, so that one is the same.
    two, many = ([*rows.split(45)], [rows[:45], *rows[45:].split(4)])
    first, second = (weighted_average_reduce(batches, anchors) for batches in (two, many))
    torch.testing.assert_close(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_weighted_average_reduce_a_far_row_weighs_little() -> None:
    rows = torch.cat([torch.full((20, 1), 0.1), torch.full((1, 1), 50.0)])
    bank, _ = weighted_average_reduce([rows], torch.zeros(1, 1))
    assert float(bank) == pytest.approx(0.1, abs=1e-3)  # the plain mean is 2.5


@QUICK
@given(seed=st.integers(0, 10**6), count=st.integers(1, 60), centres=st.integers(1, 12), split=st.integers(1, 30))
def test_cell_means_are_the_means_of_the_cells(seed: int, count: int, centres: int, split: int) -> None:
    rows, start = rows_of(seed, count, 4), rows_of(seed + 1, centres, 4)
    found, support = cell_means(rows.split(split), start)
    _, cell = nearest(rows, start)
    for r in range(centres):
        inside = rows[cell == r].double()
        assert int(support[r]) == len(inside)
        torch.testing.assert_close(found[r], inside.mean(0).float() if len(inside) else start[r])


@QUICK
@given(seed=st.integers(0, 10**6), count=st.integers(2, 80), centres=st.integers(1, 12))
def test_kmeans_never_raises_the_mean_squared_distance(seed: int, count: int, centres: int) -> None:
    rows, start = rows_of(seed, count, 3), rows_of(seed + 1, centres, 3)
    lost = [float(nearest(rows, kmeans(rows, start, rounds))[0].double().mean()) for rounds in range(6)]
    assert all(after <= before * (1 + 1e-5) + 1e-7 for before, after in itertools.pairwise(lost))


def test_kmeans_finds_clusters_and_then_rests() -> None:
    middles = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    rows = (middles[:, None] + 0.1 * rows_of(0, 90, 2).reshape(3, 30, 2)).flatten(0, 1)
    start = rows[greedy_coreset(rows, 3, torch.Generator().manual_seed(0))]
    few, many = kmeans(rows, start, 4), kmeans(rows, start, 400)
    assert torch.equal(few, many)
    found = few[nearest(middles, few)[1]]
    torch.testing.assert_close(found, rows.reshape(3, 30, 2).mean(1), atol=1e-5, rtol=0)


@QUICK
@given(seed=st.integers(0, 10**6), width=st.integers(1, 12))
def test_whitening_a_small_share_gives_the_identity(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) + 2 * torch.eye(width)
    rows = torch.randn(400, width, generator=generator) @ mix + 5
    share = 1e-6
    mean, matrix = whitening(rows.split(64), share)
    white = ((rows - mean) @ matrix).double()
    found = white.T @ white / len(white)
    values = torch.linalg.eigvalsh(torch.cov(rows.double().T, correction=0).reshape(width, width)).clamp_min(0)
    if float(values.min()) > 1e3 * share * float(values.mean()):
        np.testing.assert_allclose(found, np.eye(width), atol=5e-3)
    np.testing.assert_allclose(mean, rows.mean(0), atol=1e-4)


def test_whitening_share_bounds_how_far_a_quiet_direction_is_stretched() -> None:
    rows = rows_of(0, 500, 2) * torch.tensor([10.0, 1e-4])
    _, matrix = whitening([rows], 0.3)
    assert float(matrix.norm(dim=0).max()) <= 1 / (0.3 * float(rows.var(0).mean()) * 0.99) ** 0.5


def test_whitening_signs_are_the_same_for_any_batching() -> None:
    rows = rows_of(0, 300, 9) * torch.arange(1.0, 10.0)
    first, second = whitening([rows], 0.3)[1], whitening(rows.flip(0).split(17), 0.3)[1]
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    strongest = first.abs().argmax(0)
    assert (first[strongest, torch.arange(9)] > 0).all()


@pytest.mark.parametrize("constant", [0, slice(None)])
def test_whitening_constant_channels_stay_finite(constant: int | slice) -> None:
    rows = rows_of(0, 100, 4)
    rows[:, constant] = 7.25
    mean, matrix = whitening([rows], 0.3)
    assert torch.isfinite((rows - mean) @ matrix).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_whitening_shows_rows_that_are_not_finite(value: float) -> None:
    rows = rows_of(0, 20, 3)
    rows[4, 1] = value
    assert not torch.isfinite(whitening([rows], 0.3)[1]).all()
