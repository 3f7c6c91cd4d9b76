"""Memory-reduce: averages of enough frames, the same whatever the order of the input."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DataError
from edge.memory.bank import MemoryBank
from edge.memory.reduce import coreset, reduce_anchor, reduce_positional
from edge.memory.search import nearest


def bank_of(rows, frames=1.0, support=None) -> MemoryBank:
    frames = np.broadcast_to(np.float32(frames), len(rows)).copy()
    support = frames if support is None else np.broadcast_to(np.float32(support), len(rows)).copy()
    return MemoryBank(rows=rows.astype(np.float32), support=support, frames=frames)


def drawn(seed: int, n: int, width: int = 5) -> MemoryBank:
    rng = np.random.default_rng(seed)
    frames = rng.uniform(0, 20, n).astype(np.float32)
    return bank_of(rng.standard_normal((n, width)), frames, frames * rng.uniform(1, 4, n).astype(np.float32))


def content(bank: MemoryBank) -> bytes:
    return bank.rows.tobytes() + bank.support.tobytes() + bank.frames.tobytes()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), size=st.integers(1, 70), width=st.sampled_from([1, 5, 40]))
def test_order_of_the_input_leaves_no_trace(seed, n, size, width) -> None:
    bank = drawn(seed, n, width)
    order = np.random.default_rng(seed + 1).permutation(n)
    shuffled = MemoryBank(rows=bank.rows[order], support=bank.support[order], frames=bank.frames[order])
    if bank.frames.max() < 1:
        return
    assert content(reduce_anchor(bank, size, min_frames=1)) == content(reduce_anchor(shuffled, size, min_frames=1))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), size=st.integers(1, 30), least=st.floats(1, 15))
def test_what_leaves_stands_on_enough_frames_and_support_adds_up(seed, n, size, least) -> None:
    bank = drawn(seed, n)
    leaving = bank.frames >= np.float32(least)
    if not leaving.any():
        with pytest.raises(DataError, match="feed at least"):
            reduce_anchor(bank, size, min_frames=least)
        return
    found = reduce_anchor(bank, size, min_frames=least)
    assert len(found) == min(size, leaving.sum())
    assert content(reduce_anchor(found, len(found), min_frames=least)) == content(found)
    assert (found.frames >= np.float32(least)).all()
    assert found.frames.max() == bank.frames.max()
    assert (found.frames <= found.support).all()
    np.testing.assert_allclose(found.support.sum(), bank.support[leaving].sum(), rtol=1e-5)
    low, high = bank.rows[leaving].min(0) - 1e-5, bank.rows[leaving].max(0) + 1e-5
    assert ((found.rows >= low) & (found.rows <= high)).all()


def test_a_row_of_too_few_frames_moves_no_row_that_leaves() -> None:
    rng = np.random.default_rng(0)
    rows, frames = rng.standard_normal((40, 6)), np.full(40, 9.0)
    frames[:20] = 7.9
    other = rows.copy()
    other[:20] += 100
    first = reduce_anchor(bank_of(rows, frames), 8, min_frames=8)
    assert content(first) == content(reduce_anchor(bank_of(other, frames), 8, min_frames=8))
    assert content(first) != content(reduce_anchor(bank_of(rows, 9.0), 8, min_frames=8))


def test_averages_are_drawn_to_rows_with_more_behind_them() -> None:
    rows = np.array([[0.0, 0], [0.2, 0], [10, 0], [10.2, 0]])
    even = reduce_anchor(bank_of(rows, 1.0), 2, min_frames=1)
    uneven = reduce_anchor(bank_of(rows, 1.0, np.array([1, 1, 1, 50])), 2, min_frames=1)
    assert len(even) == len(uneven) == 2
    assert uneven.rows[:, 0].max() > even.rows[:, 0].max()
    assert sorted(uneven.support) == [2, 51]


def test_anchors_reach_a_rare_group_that_random_rows_miss() -> None:
    rng = np.random.default_rng(1)
    rows = np.concatenate([rng.standard_normal((2000, 40)) * 0.1, rng.standard_normal((3, 40)) * 0.1 + 4])
    found = reduce_anchor(bank_of(rows), 10, min_frames=1)
    assert np.sqrt(nearest(rows[-3:].astype(np.float32), found.rows)[0]).max() < 2


def test_copies_are_one_row_and_fewer_rows_than_asked_are_all_returned() -> None:
    rows = np.repeat(np.eye(3), 5, axis=0)
    found = reduce_anchor(bank_of(rows), 10, min_frames=1)
    assert len(found) == 3
    assert found.support.tolist() == [5, 5, 5]
    assert len(coreset(rows.astype(np.float32), 10, seed=0)) == 3
    few = bank_of(np.eye(3), np.array([1, 2, 3]))
    assert sorted(map(bytes, reduce_anchor(few, 3, min_frames=1).rows)) == sorted(map(bytes, few.rows))


def test_the_seed_only_turns_the_projection() -> None:
    rng = np.random.default_rng(2)
    wide = bank_of(rng.standard_normal((200, 50)))
    assert content(reduce_anchor(wide, 20, min_frames=1, seed=0)) == content(
        reduce_anchor(wide, 20, min_frames=1, seed=0)
    )
    assert content(reduce_anchor(wide, 20, min_frames=1, seed=0)) != content(
        reduce_anchor(wide, 20, min_frames=1, seed=1)
    )


def test_the_coreset_is_spread_out() -> None:
    rows = np.linspace(0, 1, 101, dtype=np.float32)[:, None]
    chosen = coreset(rows, 5, seed=0)
    np.testing.assert_allclose(rows[chosen, 0], [0, 0.25, 0.5, 0.75, 1], atol=0.02)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), frames=st.integers(1, 12), sites=st.integers(1, 70), width=st.integers(1, 6))
def test_positions_keep_their_place_and_their_range(seed, frames, sites, width) -> None:
    rng = np.random.default_rng(seed)
    embeddings = rng.standard_normal((frames, sites, width)).astype(np.float32) + np.arange(sites)[None, :, None]
    embeddings = embeddings.astype(np.float32)
    found = reduce_positional(embeddings, min_frames=1)
    assert found.rows.shape == (sites, width)
    assert (found.frames == frames).all()
    assert (found.rows >= embeddings.min(0) - 1e-4).all()
    assert (found.rows <= embeddings.max(0) + 1e-4).all()
    assert content(found) == content(reduce_positional(embeddings[rng.permutation(frames)], min_frames=1))


def test_a_stray_frame_moves_a_position_less_than_the_plain_mean() -> None:
    rng = np.random.default_rng(3)
    embeddings = (3 + 0.1 * rng.standard_normal((20, 4, 8))).astype(np.float32)
    embeddings[7, 2] -= 4
    found = reduce_positional(embeddings, min_frames=1).rows
    assert np.abs(found[2] - 3).max() < 0.5 * np.abs(embeddings.mean(0)[2] - 3).max()


def test_sums_that_cancel_are_the_same_in_any_order() -> None:
    embeddings = np.array([2.0**60, 1, -(2.0**60), 3], np.float32)[:, None, None]
    found = {content(reduce_positional(embeddings[list(order)], min_frames=1)) for order in permutations(range(4))}
    assert len(found) == 1


def test_a_part_that_does_not_vary_gives_its_rows() -> None:
    embeddings = np.repeat(np.random.default_rng(4).standard_normal((1, 5, 3)), 6, axis=0).astype(np.float32)
    np.testing.assert_allclose(reduce_positional(embeddings, min_frames=6).rows, embeddings[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("embeddings", "told"),
    [
        (np.zeros((3, 4, 5), np.float32), "feed 5 more"),
        (np.zeros((9, 4, 5)), "expected float32"),
        (np.zeros((9, 4), np.float32), "expected float32"),
        (np.zeros((0, 4, 5), np.float32), "expected float32"),
        (np.full((9, 4, 5), np.nan, np.float32), "drop the frame"),
    ],
)
def test_embeddings_that_cannot_leave_are_refused(embeddings, told) -> None:
    with pytest.raises(DataError, match=told):
        reduce_positional(embeddings, min_frames=8)


@pytest.mark.parametrize(("size", "least"), [(0, 1.0), (1, 0.0), (1, float("nan"))])
def test_a_rule_that_lets_everything_out_is_no_rule(size, least) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        reduce_anchor(bank_of(np.eye(3)), size, min_frames=least)
