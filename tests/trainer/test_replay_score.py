from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.replay import Span, runs, score_replay

spans = st.tuples(st.integers(0, 200), st.integers(0, 20)).map(lambda pair: Span(pair[0], pair[0] + pair[1]))


def test_event_inside_a_defect_finds_it() -> None:
    score = score_replay([Span(10, 20)], [Span(12, 18)])

    assert (len(score.found), score.missed, score.false_alarms) == (1, (), ())


def test_event_on_good_frames_is_a_false_alarm() -> None:
    score = score_replay([Span(10, 20)], [Span(30, 31)])

    assert score.missed == (Span(10, 20),)
    assert score.false_alarms == (Span(30, 31),)


def test_late_event_belongs_within_the_delay() -> None:
    assert score_replay([Span(10, 20)], [Span(22, 25)], delay=2).missed == ()
    assert score_replay([Span(10, 20)], [Span(23, 25)], delay=2).missed == (Span(10, 20),)


def test_event_that_was_on_before_the_defect_came_is_a_false_alarm_and_finds_nothing() -> None:
    score = score_replay([Span(10, 20)], [Span(9, 21)])

    assert (score.missed, score.false_alarms) == ((Span(10, 20),), (Span(9, 21),))


def test_event_that_begins_with_two_defects_in_view_finds_both() -> None:
    assert len(score_replay([Span(0, 4), Span(3, 6)], [Span(4, 9)]).found) == 2


def test_equal_defects_are_counted_apart() -> None:
    assert len(score_replay([Span(0, 2), Span(0, 2)], []).missed) == 2


def test_negative_delay_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        score_replay([], [], delay=-1)


def test_span_backwards_is_refused() -> None:
    with pytest.raises(ValueError, match="no span"):
        Span(3, 2)


def test_runs_join_neighbours_with_one_label() -> None:
    assert runs(["", "a", "a", "b", "", "b"]) == (Span(1, 2, "a"), Span(3, 3, "b"), Span(5, 5, "b"))


@given(st.lists(spans, max_size=8), st.lists(spans, max_size=8), st.integers(0, 5))
def test_every_defect_is_either_found_or_missed(defects: list[Span], events: list[Span], delay: int) -> None:
    score = score_replay(defects, events, delay=delay)

    assert len(score.found) + len(score.missed) == len(defects)
    assert len(score.false_alarms) <= len(events)
    if not defects:
        assert len(score.false_alarms) == len(events)
    if not events:
        assert score.found == ()
