"""The event life cycle, as a pure state machine."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
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


def test_enter_level_above_the_threshold_keeps_weak_hits_from_beginning_an_event() -> None:
    tracker = EventTracker(EventSettings(enter_hits=2, enter_window=3, leave_calm=1))
    found = [
        event.camera_seq
        for seq, score in enumerate([2, 2, 2, 5, 2, 5])
        for event in tracker.step(verdict(seq, score), leave_level=LEAVE, enter_level=4)
    ]

    assert found == [5]
    # Once it lasts, the leave level alone ends it.
    assert tracker.step(verdict(6, 2), leave_level=LEAVE, enter_level=4) == []
    assert tracker.active


def shifted(one: Verdict, *, monotonic_ns: int, wall: timedelta) -> Verdict:
    return dataclasses.replace(one, captured_ns=one.captured_ns + monotonic_ns, captured_at=one.captured_at + wall)


@given(
    scores=SCORES,
    settings=SETTINGS,
    boot_ns=st.integers(0, 10**18),
    steps=st.lists(st.integers(-40_000, 40_000), min_size=80, max_size=80),
)
def test_no_setting_of_a_clock_changes_the_events(
    scores: list[float], settings: EventSettings, boot_ns: int, steps: list[int]
) -> None:
    """Neither the wall clock, stepped at every frame by up to a century, nor how long the box has been up."""

    def played(monotonic_ns: int, days: list[int]) -> list[tuple[str, int, float, int]]:
        tracker, events = EventTracker(settings), []
        for seq, (score, day) in enumerate(zip(scores, days, strict=False)):
            one = shifted(verdict(seq, score), monotonic_ns=monotonic_ns, wall=timedelta(days=day, seconds=day))
            events += tracker.step(one, leave_level=LEAVE)
        return [(e.phase.value, e.camera_seq, e.peak_score, e.frames) for e in events + tracker.finish()]

    assert played(boot_ns, steps) == played(0, [0] * 80)


@given(before=SCORES, after=SCORES, settings=SETTINGS, stall_s=st.sampled_from([0.1, 2.0, 3600.0]))
def test_event_across_a_stall_is_one_event_and_cool_down_goes_on(
    before: list[float], after: list[float], settings: EventSettings, stall_s: float
) -> None:
    """A source that stalls and goes on: nothing is doubled, and a stall longer than the cool-down ends that."""
    tracker, ends, news = EventTracker(settings), [], []
    times = [float(index) for index in range(len(before))]
    times += [len(before) + stall_s + index for index in range(len(after))]
    lasting: str | None = None
    for seq, (score, at) in enumerate(zip([*before, *after], times, strict=True)):
        for event in tracker.step(verdict(seq, score, seconds=at), leave_level=LEAVE):
            if event.phase is EventPhase.NEW:
                assert lasting is None
                assert not ends or at >= ends[-1] + settings.cool_down_s
                lasting = event.event_id
                news.append(at)
            assert event.event_id == lasting
            if event.phase is EventPhase.END:
                lasting = None
                ends.append(at)
    assert len(news) - len(ends) == tracker.active


@given(scores=SCORES, settings=SETTINGS, switch_at=st.integers(0, 80), offset=st.sampled_from([-10.0, 10.0]))
def test_memory_switch_with_other_levels_changes_no_event(
    scores: list[float], settings: EventSettings, switch_at: int, offset: float
) -> None:
    """Scores of another memory lie elsewhere, and so do its levels: what counts is on which side of them a frame is."""

    def played(offset: float) -> list[tuple[str, int, int]]:
        tracker, events = EventTracker(settings), []
        for seq, score in enumerate(scores):
            moved = offset if seq >= switch_at else 0.0
            one = verdict(seq, score)
            one = dataclasses.replace(
                one, score=score + moved, threshold=THRESHOLD + moved, memory_version=int(seq >= switch_at)
            )
            events += tracker.step(one, leave_level=LEAVE + moved, enter_level=THRESHOLD + moved)
        return [(e.phase.value, e.camera_seq, e.frames) for e in events + tracker.finish()]

    assert played(offset) == played(0.0)


def test_ten_thousand_frames_keep_phases_counts_and_cool_down() -> None:
    """A long stream of bursts, calm, frames that were not judged, stalls and lost sources, against plain counting."""
    rng = random.Random(7)
    settings = EventSettings(enter_hits=3, enter_window=5, leave_calm=10, update_every_s=2, cool_down_s=1.5)
    tracker = EventTracker(settings)
    level, now, lives, quiet_since = -2.0, 0.0, 0, -math.inf
    window: list[bool] = []
    for seq in range(10_000):
        if rng.random() < 0.02:
            level = rng.choice([-2.0, 0.0, 2.0, 5.0])
        now += 0.04 if rng.random() > 0.001 else rng.uniform(1, 30)
        score = math.nan if rng.random() < 0.01 else level + rng.choice([0.0, 0.5, -2.0])
        lost = rng.random() < 0.0005
        was_active = tracker.active
        events = tracker.step(verdict(seq, score, seconds=now), leave_level=LEAVE)
        if not was_active and not math.isnan(score) and now >= quiet_since:
            window = [*window, score >= THRESHOLD][-settings.enter_window :]
        if any(event.phase is EventPhase.NEW for event in events):
            assert sum(window) >= settings.enter_hits
            lives, window = lives + 1, []
        elif not was_active:
            assert sum(window) < settings.enter_hits
        ended = [event for event in (*events, *(tracker.finish() if lost else ())) if event.phase is EventPhase.END]
        if lost:
            window = []
        if ended:
            window = []
            quiet_since = ended[0].captured_ns / NS_PER_S + settings.cool_down_s
    assert lives > 20
