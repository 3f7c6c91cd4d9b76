"""Windows of a signal: every sample is in a window or counted, whatever is lost, repeated or begun anew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.capture.signal_windows import Window, Windows


def samples(first: int, count: int) -> np.ndarray:
    """Samples whose values are their numbers, in two channels."""
    numbers = np.arange(first, first + count, dtype=np.float32)
    return np.stack([numbers, -numbers], axis=1)


def test_windows_overlap_by_their_hop_and_hold_their_samples_in_order() -> None:
    windows = Windows(channels=2, window=4, hop=2, max_lost=0.3)
    found = [one for first in range(0, 9, 3) for one in windows.push(first, samples(first, 3))]
    assert [one.first for one in found] == [0, 2, 4]
    for one in found:
        np.testing.assert_array_equal(one.values, samples(one.first, 4).T)
    assert windows.pending == 1


def test_gap_becomes_nan_in_its_windows() -> None:
    windows = Windows(channels=2, window=6, hop=6, max_lost=0.3)
    windows.push(10, samples(10, 2))
    (window,) = windows.push(14, samples(14, 2))
    np.testing.assert_array_equal(np.isnan(window.values[0]), [False, False, True, True, False, False])
    assert windows.counts.lost == 2


def test_gap_longer_than_a_window_completes_what_was_begun_and_begins_a_new_grid() -> None:
    windows = Windows(channels=2, window=4, hop=2, max_lost=0.3)
    windows.push(0, samples(0, 3))
    found = windows.push(1_000_000_000, samples(1_000_000_000, 4))
    assert found[-1].first == 1_000_000_000
    assert len(found) < 6
    assert 0 in {one.first for one in found}
    assert windows.counts.lost == 1_000_000_000 - 3


@pytest.mark.parametrize("gap", [450, 1_000_000])
def test_windows_that_one_gap_spoils_are_one_entry(gap: int) -> None:
    windows = Windows(channels=2, window=500, hop=1, max_lost=0.1)
    windows.push(0, samples(0, 500))
    found = windows.push(500 + gap, samples(500 + gap, 1))
    judged, spoilt = found[:50], found[50]
    assert [np.isnan(one.values[0]).sum() for one in judged] == list(range(1, 51))
    assert (spoilt.first, spoilt.more) == (51, min(gap, 500) - 51)
    # The sample behind a short gap completes one more.
    assert len(found) == 51 + (gap < 500)
    counts = windows.counts
    assert counts.received + counts.lost == counts.windowed + counts.skipped + windows.pending == 501 + gap


def test_chunk_that_came_again_in_part_is_not_taken_for_a_sender_begun_anew() -> None:
    windows = Windows(channels=2, window=4, hop=2, max_lost=0.3)
    windows.push(0, samples(0, 12))
    assert not windows.push(0, samples(0, 2), chunk_end=12)
    assert (windows.counts.repeated, windows.counts.restarts) == (2, 0)


def test_sender_that_begins_anew_behind_a_new_connection_is_not_taken_for_repeats() -> None:
    windows = Windows(channels=2, window=8, hop=8, max_lost=0.3)
    windows.push(0, samples(0, 5))
    windows.reconnected()
    windows.push(0, samples(0, 3))
    assert (windows.counts.restarts, windows.counts.repeated, windows.counts.unwindowed) == (1, 0, 5)


def test_end_of_a_stream_is_judged_in_a_window_that_overlaps_more() -> None:
    windows = Windows(channels=2, window=4, hop=4, max_lost=0.3)
    windows.push(0, samples(0, 7))
    (last,) = windows.finish()
    assert last.first == 3
    np.testing.assert_array_equal(last.values, samples(3, 4).T)
    assert windows.counts.unwindowed == 0


CHUNKS = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(-40, 40), st.integers(-500, 100_000)),  # how far off the next number
        st.integers(1, 30),
        st.booleans(),  # behind a new connection
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(chunks=CHUNKS, window=st.integers(2, 16), data=st.data())
def test_every_sample_is_in_a_window_or_counted(
    chunks: list[tuple[int, int, bool]], window: int, data: st.DataObject
) -> None:
    hop = data.draw(st.integers(1, window))
    windows = Windows(channels=2, window=window, hop=hop, max_lost=data.draw(st.sampled_from([0.0, 0.3, 0.99])))
    found: list[Window] = []
    arrived, expected = 0, 0
    for off, count, anew in chunks:
        if anew:
            windows.reconnected()
        first = max(0, expected + off)
        found += windows.push(first, samples(first, count))
        arrived += count
        expected = first + count
        counts = windows.counts
        assert counts.received + counts.repeated == arrived
        assert counts.received + counts.lost == (counts.windowed + counts.unwindowed + counts.skipped + windows.pending)
        assert 0 <= windows.pending < window + hop
    found += windows.finish()
    counts = windows.counts
    assert windows.pending == 0
    assert counts.received + counts.lost == counts.windowed + counts.unwindowed + counts.skipped
    for one in found:
        values = one.values[0]
        assert not one.more or np.isnan(values).any()
        there = ~np.isnan(values)
        np.testing.assert_array_equal(values[there], (one.first + np.arange(window, dtype=np.float32))[there])
        np.testing.assert_array_equal(np.isnan(one.values[0]), np.isnan(one.values[1]))
    if not counts.restarts:
        # Without a sender begun anew, what came and is in no window is less than one window at the very end.
        covered = {int(value) for one in found for value in one.values[0] if not np.isnan(value)}
        assert len(covered) >= counts.received - counts.unwindowed
        assert counts.unwindowed < window


@pytest.mark.parametrize("count", [1, 7, 64])
def test_memory_does_not_grow_with_the_stream(count: int) -> None:
    windows = Windows(channels=2, window=32, hop=8, max_lost=0.3)
    for first in range(0, 50 * count, count):
        windows.push(first, samples(first, count))
    assert windows._ring.shape == (2, 32)
