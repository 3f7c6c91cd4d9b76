"""The event life cycle, as a pure state machine."""

from __future__ import annotations

import itertools
import math
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge.frames import AnomalyEvent, Decision, EventPhase, Verdict
from edge.judgement.events import NS_PER_S, EventSettings, EventTracker

THRESHOLD = 1.0
LEAVE = -1.0
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def verdict(seq: int, score: float, *, seconds: float | None = None) -> Verdict:
    at = float(seq) if seconds is None else seconds
    decision = Decision.NOT_JUDGED if math.isnan(score) else Decision.NOK if score >= THRESHOLD else Decision.OK
    return Verdict(
        decision=decision,
        score=score,
        threshold=THRESHOLD,
        p_value=0.5,
        camera="cam",
        camera_seq=seq,
        captured_ns=round(at * NS_PER_S),
        captured_at=START + timedelta(seconds=at),
    )


def play(settings: EventSettings, scores: list[float], *, step_s: float = 1.0) -> list[AnomalyEvent]:
    tracker = EventTracker(settings)
    events = []
    for seq, score in enumerate(scores):
        events += tracker.step(verdict(seq, score, seconds=seq * step_s), leave_level=LEAVE)
    return events + tracker.finish()


def phases(events: list[AnomalyEvent]) -> list[str]:
    return [event.phase.value for event in events]


def test_event_begins_with_n_of_m_and_ends_after_calm_frames() -> None:
    settings = EventSettings(enter_hits=2, enter_window=3, leave_calm=2, update_every_s=100)

    events = play(settings, [-2, 2, -2, 3, 5, -2, -2, -2])

    assert phases(events) == ["new", "end"]
    assert [event.camera_seq for event in events] == [3, 6]
    assert events[0].event_id == events[1].event_id
    assert events[1].peak_score == 5
    assert events[1].frames == 4


def test_hits_too_far_apart_begin_no_event() -> None:
    assert play(EventSettings(enter_hits=2, enter_window=3), [2, -2, -2, 2, -2, -2, 2]) == []


def test_scores_between_the_levels_keep_an_event_going() -> None:
    settings = EventSettings(enter_hits=1, enter_window=1, leave_calm=2, update_every_s=100)

    events = play(settings, [2, 0, 0, 0, 0, -2, 0, -2, 0, -2, -2, -2])

    assert phases(events) == ["new", "end"]
    assert events[1].camera_seq == 10


def test_updates_are_spaced() -> None:
    settings = EventSettings(enter_hits=1, enter_window=1, leave_calm=100, update_every_s=2)

    events = play(settings, [2] * 11, step_s=0.5)

    assert [(e.phase.value, e.camera_seq) for e in events] == [
        ("new", 0), ("update", 4), ("update", 8), ("end", 10)
    ]  # fmt: skip


def test_frames_not_judged_neither_begin_nor_end_an_event() -> None:
    settings = EventSettings(enter_hits=2, enter_window=2, leave_calm=2, update_every_s=100)

    events = play(settings, [2, math.nan, 2, -2, math.nan, math.nan, -2])

    assert [(e.phase.value, e.camera_seq) for e in events] == [("new", 2), ("end", 6)]


def test_cool_down_delays_the_next_event() -> None:
    settings = EventSettings(enter_hits=1, enter_window=1, leave_calm=1, update_every_s=100, cool_down_s=3)

    events = play(settings, [2, -2, 2, 2, 2, 2, 2])

    assert [(e.phase.value, e.camera_seq) for e in events] == [("new", 0), ("end", 1), ("new", 4), ("end", 6)]


def test_hits_before_the_end_do_not_count_for_the_next_event() -> None:
    settings = EventSettings(enter_hits=2, enter_window=5, leave_calm=1, update_every_s=100)

    assert phases(play(settings, [2, 2, -2, 2])) == ["new", "end"]


def test_finish_without_event_says_nothing_and_forgets_hits() -> None:
    tracker = EventTracker(EventSettings(enter_hits=2, enter_window=2))
    tracker.step(verdict(0, 2), leave_level=LEAVE)

    assert tracker.finish() == []
    assert tracker.step(verdict(1, 2), leave_level=LEAVE) == []


def test_settings_refuse_more_hits_than_the_window_holds() -> None:
    with pytest.raises(ValidationError, match="enter_hits must not exceed"):
        EventSettings(enter_hits=4, enter_window=3)


SCORES = st.lists(st.sampled_from([2.0, 3.0, 0.0, -2.0, math.nan]), max_size=80)
SETTINGS = st.builds(
    lambda hits, extra, calm, update, cool: EventSettings(
        enter_hits=hits, enter_window=hits + extra, leave_calm=calm, update_every_s=update, cool_down_s=cool
    ),
    st.integers(1, 4), st.integers(0, 3), st.integers(1, 4), st.sampled_from([0.5, 3.0]), st.sampled_from([0.0, 2.5]),
)  # fmt: skip


@given(scores=SCORES, settings=SETTINGS)
def test_phases_are_always_new_updates_end(scores: list[float], settings: EventSettings) -> None:
    events = play(settings, scores)

    lives: dict[str, list[EventPhase]] = {}
    for event in events:
        lives.setdefault(event.event_id, []).append(event.phase)
    order = list(dict.fromkeys(event.event_id for event in events))
    assert [event.event_id for event in events] == [key for key in order for _ in lives[key]]
    for life in lives.values():
        assert life[0] is EventPhase.NEW
        assert life[-1] is EventPhase.END
        assert set(life[1:-1]) <= {EventPhase.UPDATE}
        assert len(life) >= 2


@given(scores=SCORES, settings=SETTINGS)
def test_no_event_without_its_own_n_of_m(scores: list[float], settings: EventSettings) -> None:
    judged = [(seq, score) for seq, score in enumerate(scores) if not math.isnan(score)]
    free_from = 0
    for event in play(settings, scores):
        if event.phase is EventPhase.NEW:
            before = [item for item in judged if free_from <= item[0] <= event.camera_seq][-settings.enter_window :]
            assert sum(score >= THRESHOLD for _, score in before) >= settings.enter_hits
            assert event.score >= THRESHOLD
        elif event.phase is EventPhase.END:
            free_from = event.camera_seq + 1


@given(scores=SCORES, settings=SETTINGS)
def test_peak_and_frames_grow_within_an_event(scores: list[float], settings: EventSettings) -> None:
    events = play(settings, scores)

    for earlier, later in itertools.pairwise(events):
        if earlier.event_id == later.event_id:
            assert later.peak_score >= max(earlier.peak_score, later.score)
            assert later.frames >= earlier.frames
            assert later.captured_ns >= earlier.captured_ns
