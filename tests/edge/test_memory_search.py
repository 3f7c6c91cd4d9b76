"""Searching a bank: exact distances in bounded blocks, and the map that the exported head would make."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.bundle import MemoryLayout, Preprocessing, Tiles
from edge.errors import DataError
from edge.memory import search
from edge.memory.search import anomaly_map, nearest, pad_bank
from trainer.methods.patches import patch_mean


def some(seed: int, *shape: int, offset: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) + offset).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 40),
    size=st.integers(1, 40),
    width=st.integers(1, 20),
    offset=st.sampled_from([0.0, 30.0]),
)
def test_nearest_gives_what_all_distances_in_double_give(seed, n, size, width, offset) -> None:
    rows, bank = some(seed, n, width, offset=offset), some(seed + 1, size, width, offset=offset)
    squared, index = nearest(rows, bank)
    truth = np.square(rows[:, None].astype(np.float64) - bank[None]).sum(2)
    assert squared.dtype == np.float32
    assert index.dtype == np.int64
    np.testing.assert_allclose(squared, truth.min(1) if n else [], rtol=1e-4)
    np.testing.assert_allclose(squared, truth[np.arange(n), index], rtol=1e-4)


def test_blocks_do_not_change_the_result(monkeypatch) -> None:
    rows, bank = some(0, 50, 8), some(1, 70, 8)
    whole = nearest(rows, bank)
    monkeypatch.setattr(search, "_BLOCK_ROWS", 7)
    monkeypatch.setattr(search, "_BLOCK_BANK", 11)
    parts = nearest(rows, bank)
    np.testing.assert_array_equal(whole[1], parts[1])
    np.testing.assert_array_equal(whole[0], parts[0])


def test_a_row_of_the_bank_is_no_distance_away_even_far_from_the_origin() -> None:
    bank = some(2, 30, 16, offset=500.0)
    squared, index = nearest(bank, bank)
    assert not squared.any()
    np.testing.assert_array_equal(index, np.arange(30))


@pytest.mark.parametrize(
    ("rows", "bank"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)),
        (np.zeros((2, 3), np.float32), np.zeros((0, 3), np.float32)),
        (np.zeros(3, np.float32), np.zeros((2, 3), np.float32)),
        (np.full((2, 3), np.nan, np.float32), np.zeros((2, 3), np.float32)),
        (np.zeros((2, 3), np.float32), np.full((2, 3), np.inf, np.float32)),
        (np.full((2, 3), 1e30, np.float32), np.zeros((2, 3), np.float32)),
    ],
)
def test_what_cannot_be_searched_is_refused(rows, bank) -> None:
    with pytest.raises(DataError, match=r"cannot be searched|not finite|overflow"):
        nearest(rows, bank)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 20), more=st.integers(0, 40))
def test_padding_fills_the_bank_and_changes_no_distance(seed, rows, more) -> None:
    bank, queries = some(seed, rows, 6), some(seed + 1, 15, 6)
    padded = pad_bank(bank, rows + more)
    assert padded.shape == (rows + more, 6)
    np.testing.assert_array_equal(padded[:rows], bank)
    np.testing.assert_array_equal(nearest(queries, padded)[0], nearest(queries, bank)[0])


def test_padding_refuses_rows_that_do_not_fit_or_are_none() -> None:
    with pytest.raises(DataError, match="reduce them first"):
        pad_bank(some(0, 5, 2), 4)
    with pytest.raises(DataError, match="empty bank"):
        pad_bank(some(0, 0, 2), 4)


def head(embedding: np.ndarray, banks: list[np.ndarray], layout: MemoryLayout) -> np.ndarray:
    """Return what the exported head computes, in torch and double precision."""
    rows = torch.from_numpy(embedding).double()
    bank = torch.from_numpy(np.concatenate(banks)).double()
    distance = torch.cdist(rows, bank).amin(2).unflatten(1, layout.grid)[:, None]
    for _ in range(layout.smoothing):
        distance = patch_mean(distance)
    return (distance - layout.background * distance.mean((1, 2, 3), keepdim=True))[:, 0].numpy()


@pytest.mark.parametrize(("smoothing", "background"), [(0, 0.0), (1, 0.0), (2, 0.3), (0, 1.0)])
def test_the_map_is_the_heads(smoothing, background) -> None:
    layout = MemoryLayout(grid=(4, 8), smoothing=smoothing, background=background)
    preprocessing = Preprocessing(height=32, width=64)
    embedding, banks = some(3, 1, 32, 12, offset=2.0), [some(4, 9, 12, offset=2.0), some(5, 20, 12, offset=2.0)]
    found = anomaly_map(embedding, banks, layout, preprocessing, 8)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, head(embedding, banks, layout)[0], rtol=1e-4, atol=1e-5)


def test_tiles_are_judged_apart_and_joined() -> None:
    layout = MemoryLayout(grid=(8, 8), smoothing=1, background=0.5)
    preprocessing = Preprocessing(height=64, width=64, tiles=Tiles(rows=1, cols=2, overlap=32))
    embedding, bank = some(6, 2, 64, 5), some(7, 10, 5)
    found = anomaly_map(embedding, [bank], layout, preprocessing, 8)
    left, right = head(embedding, [bank], layout)
    assert found.shape == (8, 12)
    np.testing.assert_allclose(found[:, :4], left[:, :4], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 4:8], (left[:, 4:] + right[:, :4]) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[:, 8:], right[:, 4:], rtol=1e-4, atol=1e-5)


def test_a_second_bank_only_lowers_the_map() -> None:
    layout, preprocessing = MemoryLayout(grid=(4, 4)), Preprocessing(height=32, width=32)
    embedding, local, fleet = some(8, 1, 16, 6), some(9, 10, 6), some(10, 10, 6)
    alone = anomaly_map(embedding, [local], layout, preprocessing, 8)
    both = anomaly_map(embedding, [local, fleet], layout, preprocessing, 8)
    assert (both <= alone).all()
    assert (both < alone).any()


@pytest.mark.parametrize(
    ("shape", "stride", "banks", "told"),
    [
        ((1, 15, 6), 8, 1, "embedding is"),
        ((2, 16, 6), 8, 1, "embedding is"),
        ((16, 6), 8, 1, "embedding is"),
        ((1, 16, 6), 16, 1, "memory grid"),
        ((1, 16, 6), 8, 0, "no bank"),
        ((1, 16, 5), 8, 1, "cannot be searched"),
    ],
)
def test_a_frame_of_another_bundle_is_refused(shape, stride, banks, told) -> None:
    layout, preprocessing = MemoryLayout(grid=(4, 4)), Preprocessing(height=32, width=32)
    with pytest.raises(DataError, match=told):
        anomaly_map(some(0, *shape), [some(1, 10, 6)] * banks, layout, preprocessing, stride)
