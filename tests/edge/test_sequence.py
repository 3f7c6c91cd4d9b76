"""Duplicates and holes, against models that are too simple to be wrong."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge.alerts.sequence import Deduplicator, SequenceSet

SEQS = st.lists(st.integers(1, 60), max_size=80)


@given(SEQS)
def test_sequence_set_equals_a_set(seqs: list[int]) -> None:
    ours, model = SequenceSet(limit=1000), set()
    for seq in seqs:
        assert ours.add(seq) is (seq not in model)
        model.add(seq)
    assert [seq in ours for seq in range(70)] == [seq in model for seq in range(70)]
    missing = {seq for first, last in ours.holes() for seq in range(first, last + 1)}
    assert missing == (set(range(min(model), max(model))) - model if model else set())


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12)), max_size=30))
def test_sequence_set_adds_ranges_as_a_set_does(ranges: list[tuple[int, int]]) -> None:
    ours, model = SequenceSet(limit=1000), set()
    for first, length in ranges:
        ours.add_range(first, first + length)
        model.update(range(first, first + length + 1))
    assert [seq in ours for seq in range(80)] == [seq in model for seq in range(80)]
    assert all(first <= last for first, last in ours.holes())


@given(SEQS, st.integers(1, 5))
def test_sequence_set_stays_bounded_and_counts_what_it_forgets(seqs: list[int], limit: int) -> None:
    ours = SequenceSet(limit)
    passed = [seq for seq in seqs if ours.add(seq)]
    assert len(ours.holes()) < limit
    assert len(passed) == len(set(passed)), "a duplicate never passes, however small the memory"
    missing = sum(last - first + 1 for first, last in ours.holes())
    if passed:
        assert missing + ours.forgotten >= max(passed) - min(passed) + 1 - len(passed)


def test_sequence_set_takes_a_huge_range_at_once() -> None:
    ours = SequenceSet(limit=10)
    ours.add_range(1, 2**63 - 1)
    assert 2**62 in ours


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(1, 9)), max_size=60))
def test_deduplicator_tells_boxes_and_epochs_apart(messages: list[tuple[str, str, int]]) -> None:
    ours, model = Deduplicator(), set()
    for box, epoch, seq in messages:
        assert ours.is_new("s", box, epoch, seq) is ((box, epoch, seq) not in model)
        model.add((box, epoch, seq))


def test_deduplicator_reports_what_no_gap_explains() -> None:
    ours = Deduplicator()
    for seq in (1, 2, 6, 10):
        ours.is_new("s", "b", "e", seq)
    assert ours.missing() == {("s", "b", "e"): [(3, 5), (7, 9)]}
    ours.explain("s", "b", "e", 4, 8)
    assert ours.missing() == {("s", "b", "e"): [(3, 3), (9, 9)]}
    ours.explain("s", "b", "e", 1, 9)
    assert ours.missing() == {}


def test_deduplicator_forgets_the_stream_unheard_of_for_longest() -> None:
    ours = Deduplicator(streams=2)
    ours.is_new("s", "a", "e", 1)
    ours.is_new("s", "b", "e", 1)
    ours.is_new("s", "a", "e", 2)
    ours.is_new("s", "c", "e", 1)
    assert not ours.is_new("s", "a", "e", 1)
    assert ours.is_new("s", "b", "e", 1)
