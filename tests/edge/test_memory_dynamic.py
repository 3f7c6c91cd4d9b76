"""The dynamic memory follows what it is fed, keeps what is rare, forgets what is gone, and survives a restart."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from edge.errors import DataError
from edge.memory.bank import MemoryBank
from edge.memory.dynamic import DynamicMemory, DynamicSettings
from edge.memory.reduce import reduce_anchor
from edge.memory.search import nearest

STILL = DynamicSettings(beta=0.9, half_life=1e9, reseeds=0)


def some(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_bundles_rows_do_not_leave_until_frames_stand_behind_them() -> None:
    rows = 10 * np.eye(3, 4, dtype=np.float32)
    memory = DynamicMemory.begin(rows)
    assert not memory.bank.support.any()
    with pytest.raises(DataError, match="feed at least 8"):
        reduce_anchor(memory.bank, 2, min_frames=8)
    for _ in range(20):
        memory.feed(rows[:2] + 0.1)
    assert len(reduce_anchor(memory.bank, 3, min_frames=8)) == 2


def test_a_touched_row_moves_by_the_weighted_average_and_another_stays() -> None:
    memory = DynamicMemory.begin(np.array([[0.0], [10.0], [20.0]], np.float32), STILL)
    patches = np.array([[0.0], [1.0], [3.0], [12.0]], np.float32)
    memory.feed(patches)
    tau = np.median([0, 1, 9, 4])
    weight = np.exp(-np.array([0, 1, 9]) / tau)
    expected = 0.1 * (weight * [0, 1, 3]).sum() / weight.sum()
    np.testing.assert_allclose(memory.bank.rows[:, 0], [expected, 9 + 1.2, 20], rtol=1e-6)
    np.testing.assert_allclose(memory.bank.support, [3, 1, 0], rtol=1e-6)
    np.testing.assert_allclose(memory.bank.frames, [1, 1, 0], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 12), feeds=st.integers(0, 25), width=st.integers(1, 6))
def test_counts_are_what_they_claim(seed, rows, feeds, width) -> None:
    rng = np.random.default_rng(seed)
    memory = DynamicMemory.begin(some(seed, rows, width), DynamicSettings(patience=3, half_life=20))
    frames = [rng.standard_normal((int(rng.integers(1, 9)), width)).astype(np.float32) for _ in range(feeds)]
    for frame in frames:
        memory.feed(frame)
    bank = memory.bank
    assert len(bank) == rows
    assert (bank.frames <= bank.support).all()
    assert bank.frames.max() <= min(feeds, 20) + 1e-5
    assert bank.support.sum() <= sum(map(len, frames)) + rows * feeds
    assert (memory.feeds, memory.patches) == (feeds, sum(map(len, frames)))
    if frames:
        together = np.concatenate(frames).astype(np.float64)
        np.testing.assert_allclose(memory.mean, together.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(memory.std, together.std(0), rtol=1e-4, atol=1e-5)


def test_the_memory_follows_a_slow_change() -> None:
    rows = some(0, 20, 8)
    memory = DynamicMemory.begin(rows, DynamicSettings(beta=0.9))
    for step in range(60):
        memory.feed(rows + np.float32(0.02 * step) + 0.01 * some(step, 20, 8))
    moved = rows + np.float32(0.02 * 59)
    assert nearest(moved, memory.bank.rows)[0].mean() < 0.1 * nearest(moved, rows)[0].mean()


def test_a_rare_look_is_kept_between_its_visits() -> None:
    common, rare = some(1, 10, 6), some(2, 4, 6) + 30
    memory = DynamicMemory.begin(np.concatenate([common, rare]).astype(np.float32))
    for step in range(2000):
        frame = common + 0.3 * some(step, 10, 6)
        memory.feed(np.concatenate([frame, rare]).astype(np.float32) if step % 200 == 0 else frame)
    assert np.sqrt(nearest(rare.astype(np.float32), memory.bank.rows)[0]).max() < 0.5
    assert (memory.bank.support[10:] > 1).all()


def test_a_look_that_went_out_of_use_makes_room_for_a_new_one() -> None:
    settings_ = DynamicSettings(half_life=20, patience=30, reseeds=4)
    kept, gone, new = some(3, 10, 6), some(4, 4, 6) * 0.1, some(5, 3, 6) + 40
    memory = DynamicMemory.begin(np.concatenate([kept, gone]).astype(np.float32), settings_)
    for _ in range(20):
        memory.feed(np.concatenate([kept, gone]).astype(np.float32))
    for _ in range(200):
        memory.feed(np.concatenate([kept, new]).astype(np.float32))
    assert np.sqrt(nearest(new.astype(np.float32), memory.bank.rows)[0]).max() < 0.5


def test_no_more_rows_than_allowed_are_given_away_and_only_for_what_covers_more() -> None:
    rows = np.array([[100.0], [0.0], [1.0], [1.1], [1.2]], np.float32)
    frame = np.array([[0.0], [10.0], [20.0], [30.0]], np.float32)
    for allowed in (0, 1, 2, 4):
        memory = DynamicMemory.begin(rows, DynamicSettings(patience=1, reseeds=allowed, beta=0.999))
        memory.feed(frame)
        found = memory.bank
        taken = [value for value in (10.0, 20.0, 30.0) if np.isclose(found.rows[:, 0], value).any()]
        # Three rows are idle: two lie close together, the lonely one at 100 is worth more than any patch.
        assert len(taken) == min(allowed, 2)
        assert np.isclose(found.rows[:, 0], 100).any()
        assert np.isclose(found.rows[:, 0], 0).any()
        if taken:
            assert 30.0 in taken


def test_a_row_given_to_a_new_look_starts_from_one_frame() -> None:
    rows = np.array([[0.0], [1.0], [1.1], [1.2]], np.float32)
    memory = DynamicMemory.begin(rows, DynamicSettings(patience=1, reseeds=1))
    memory.feed(np.array([[0.0], [50.0]], np.float32))
    row = int(np.argmin(np.abs(memory.bank.rows[:, 0] - 50)))
    assert memory.bank.support[row] == memory.bank.frames[row] == 1


def test_a_new_look_has_its_row_for_as_long_as_any_other() -> None:
    rows = np.array([[0.0], [1.0], [1.1], [1.2]], np.float32)
    memory = DynamicMemory.begin(rows, DynamicSettings(patience=3, reseeds=1, beta=0.999))
    while not np.isclose(memory.bank.rows, 50).any():
        memory.feed(np.array([[0.0], [1.1], [1.2], [50.0]], np.float32))
    assert memory.feeds == 3
    for _ in range(2):
        memory.feed(np.array([[0.0], [1.1], [1.2], [-500.0]], np.float32))
        assert np.isclose(memory.bank.rows, 50).any()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), before=st.integers(0, 12), after=st.integers(1, 5))
def test_a_restart_changes_nothing(seed, before, after) -> None:
    options = DynamicSettings(patience=2, half_life=10)
    memory = DynamicMemory.begin(some(seed, 9, 4), options)
    for step in range(before):
        memory.feed(some(seed + step, 6, 4))
    file = io.BytesIO()
    np.savez(file, **memory.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as archive:
        again = DynamicMemory.restore(dict(archive), options)
    for step in range(after):
        memory.feed(some(seed - step - 1 + 20_000, 6, 4))
        again.feed(some(seed - step - 1 + 20_000, 6, 4))
    for name, value in memory.state().items():
        np.testing.assert_array_equal(value, again.state()[name], err_msg=name)


def changed(name: str, value: object) -> dict[str, np.ndarray]:
    memory = DynamicMemory.begin(some(0, 3, 2))
    memory.feed(some(1, 5, 2))
    state = memory.state()
    if value is None:
        del state[name]
    else:
        state[name] = value(state[name])
    return state


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in DynamicMemory.begin(np.zeros((1, 1), np.float32)).state()),
        ("version", lambda x: x + 1),
        ("version", lambda x: x.astype(np.float64)),
        ("rows", lambda x: x.astype(np.float32)),
        ("rows", lambda x: x * np.nan),
        ("rows", lambda x: x[:, :0]),
        ("rows", lambda x: x[:2]),
        ("support", lambda x: -x - 1),
        ("support", lambda x: x[:2]),
        ("frames", lambda x: x + 100),
        ("idle", lambda x: x - 5),
        ("idle", lambda x: x.astype(np.float64)),
        ("counts", lambda x: x[:1]),
        ("counts", lambda x: -x),
        ("mean", lambda x: x[:1]),
        ("squares", lambda x: x * np.inf),
        ("squares", lambda x: -x),
    ],
)
def test_a_damaged_state_is_refused_by_name(name, value) -> None:
    with pytest.raises(DataError, match=r"kept memory|bank rows"):
        DynamicMemory.restore(changed(name, value))


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 3), np.float32),
        np.zeros((0, 2), np.float32),
        np.zeros(2, np.float32),
        np.array([[0.0, np.nan]], np.float32),
        np.array([[np.inf, 0.0]], np.float32),
    ],
)
def test_a_frame_that_does_not_fit_teaches_nothing(frame) -> None:
    memory = DynamicMemory.begin(some(0, 3, 2))
    memory.feed(some(1, 5, 2))
    before = memory.state()
    with pytest.raises(DataError, match=r"embedding is|not finite"):
        memory.feed(frame)
    for name, value in memory.state().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_bank_handed_out_does_not_change_with_the_memory() -> None:
    rows = some(0, 3, 2)
    memory = DynamicMemory(MemoryBank(rows=rows, support=np.ones(3, np.float32), frames=np.ones(3, np.float32)))
    bank, kept = memory.bank, rows.copy()
    memory.feed(some(1, 30, 2))
    np.testing.assert_array_equal(bank.rows, kept)
    np.testing.assert_array_equal(rows, kept)


@pytest.mark.parametrize("bad", [{"beta": 1.0}, {"half_life": 0}, {"patience": 0}, {"reseeds": -1}, {"speed": 1}])
def test_settings_refuse_what_makes_no_sense(bad) -> None:
    with pytest.raises(ValidationError):
        DynamicSettings(**bad)
