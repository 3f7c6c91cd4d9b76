"""The queue between a camera and its judge: every frame is counted exactly once, whatever the policy."""

from __future__ import annotations

import threading
from datetime import datetime, timezone

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edge.capture.capture import Capture, LostFrame
from edge.capture.frame_queue import FrameQueue
from edge.capture.settings import DropPolicy, SourceSettings
from edge.capture.sources import CorruptFrameError, Grab
from edge.frames import Frame

WAIT_SECONDS = 20
PIXEL = np.zeros((1, 1, 3), np.uint8)


def frame(number: int) -> Frame:
    return Frame(image=PIXEL, camera="a", camera_seq=number, captured_ns=0, captured_at=datetime.now(timezone.utc))


class QueueRules(RuleBasedStateMachine):
    """Any order of putting, taking and clearing, against a plain list."""

    @initialize(policy=st.sampled_from(DropPolicy), capacity=st.integers(1, 5))
    def make(self, policy: DropPolicy, capacity: int) -> None:
        self.changed = threading.Condition()
        self.queue = FrameQueue(policy=policy, capacity=capacity, changed=self.changed)
        self.policy, self.capacity = policy, capacity
        self.expected: list[int] = []
        self.put_count = 0
        self.delivered: list[int] = []
        self.lost: list[int] = []

    @rule(count=st.integers(1, 8), ending=st.booleans())
    def put(self, *, count: int, ending: bool) -> None:
        for _ in range(count):
            full = len(self.expected) == self.capacity
            if full and self.policy is DropPolicy.WAIT and not ending:
                return  # it would wait, see below
            self._put_one(full=full, ending=ending)

    def _put_one(self, *, full: bool, ending: bool) -> None:
        number = self.put_count
        self.put_count += 1
        with self.changed:
            lost = self.queue.put(frame(number), ends=lambda: ending)
        assert (lost is not None) is full
        if not full:
            self.expected.append(number)
        elif self.policy is DropPolicy.DROP_OLDEST:
            self.expected.append(number)
            assert lost.camera_seq == self.expected.pop(0)
        else:
            assert lost.camera_seq == number
        self.lost += [] if lost is None else [lost.camera_seq]

    @rule()
    def refuse(self) -> None:
        with self.changed:
            self.lost.append(self.queue.refuse(frame(self.put_count)).camera_seq)
        self.put_count += 1

    @rule()
    def take(self) -> None:
        with self.changed:
            taken = self.queue.take()
        if self.expected:
            assert taken.camera_seq == self.expected.pop(0)
            self.delivered.append(taken.camera_seq)
        else:
            assert taken is None

    @precondition(lambda self: len(self.expected) > 1)
    @rule()
    def clear(self) -> None:
        with self.changed:
            left = [one.camera_seq for one in self.queue.clear()]
        assert left == self.expected
        self.lost += left
        self.expected = []

    @invariant()
    def every_frame_is_counted_once(self) -> None:
        if not hasattr(self, "queue"):
            return
        queue = self.queue
        assert len(queue) == len(self.expected) <= self.capacity
        assert queue.captured == self.put_count == queue.delivered + queue.dropped + len(queue)
        assert (queue.delivered, queue.dropped) == (len(self.delivered), len(self.lost))
        assert sorted(self.delivered + self.lost + self.expected) == list(range(self.put_count))


QueueRules.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
test_queue_rules = QueueRules.TestCase


def test_wait_policy_waits_for_room_and_counts_the_frame_then() -> None:
    changed = threading.Condition()
    queue = FrameQueue(policy=DropPolicy.WAIT, capacity=1, changed=changed)
    with changed:
        queue.put(frame(0), ends=lambda: False)
    waits, done = threading.Event(), threading.Event()

    def put() -> None:
        with changed:
            queue.put(frame(1), ends=lambda: waits.set() or False)
        done.set()

    threading.Thread(target=put, daemon=True).start()
    assert waits.wait(WAIT_SECONDS)
    with changed:
        assert (queue.captured, len(queue)) == (1, 1)
        assert queue.take().camera_seq == 0
    assert done.wait(WAIT_SECONDS)
    with changed:
        assert queue.take().camera_seq == 1
        assert (queue.captured, queue.delivered, queue.dropped) == (2, 2, 0)


class Burst:
    """A camera that gives some frames, good and corrupt ones, and is then silent until it is let go."""

    def __init__(self, good: list[bool], hold: threading.Event, empty: threading.Event) -> None:
        self.good, self.hold, self.empty = list(good), hold, empty

    def open(self) -> None:
        pass

    def read(self) -> Grab | None:
        if not self.good:
            self.empty.set()
            self.hold.wait(WAIT_SECONDS)
            return None
        if self.good.pop(0):
            return Grab(PIXEL, "")
        raise CorruptFrameError("bad", name="")

    def close(self) -> None:
        pass


@settings(max_examples=40, deadline=None)
@given(
    good=st.lists(st.booleans(), max_size=25),
    policy=st.sampled_from([DropPolicy.DROP_OLDEST, DropPolicy.DROP_NEWEST]),
    capacity=st.integers(1, 6),
    takes=st.integers(0, 30),
    unwanted=st.sets(st.integers(0, 24)),
)
def test_every_frame_of_a_capture_is_delivered_lost_or_not_wanted(
    good: list[bool], policy: DropPolicy, capacity: int, takes: int, unwanted: set[int]
) -> None:
    hold, empty = threading.Event(), threading.Event()
    lost: list[LostFrame] = []
    capture = Capture(
        name="a",
        settings=SourceSettings(kind="camera", device=0),
        policy=policy,
        capacity=capacity,
        make_source=lambda: Burst(good, hold, empty),
        on_lost=lost.append,
        wanted=lambda one: one.camera_seq not in unwanted,
    )
    capture.start()
    taken = [one for _ in range(takes // 2) if (one := capture.get(0)) is not None]
    assert empty.wait(WAIT_SECONDS)
    taken += [one for _ in range(takes) if (one := capture.get(0)) is not None]
    hold.set()
    capture.stop()
    numbers = [one.camera_seq for one in taken]
    assert numbers == sorted(numbers)
    missed = {item.camera_seq: item.reason for item in lost}
    assert len(missed) == len(lost)
    skipped = {number for number in unwanted if number < len(good) and good[number]}
    assert sorted([*numbers, *missed, *skipped]) == list(range(len(good)))
    assert sorted(n for n, reason in missed.items() if reason == "corrupt") == [
        n for n, ok in enumerate(good) if not ok
    ]
    counters = capture.counters
    assert counters.captured == sum(good)
    assert counters.captured == counters.delivered + counters.dropped + counters.skipped + capture.queued
    assert (counters.delivered, counters.corrupt, capture.queued) == (len(taken), good.count(False), 0)


@pytest.mark.parametrize("policy", DropPolicy)
def test_counts_hold_at_every_moment_while_threads_run(policy: DropPolicy) -> None:
    hold, empty = threading.Event(), threading.Event()
    capture = Capture(
        name="a",
        settings=SourceSettings(kind="camera", device=0),
        policy=policy,
        capacity=2,
        make_source=lambda: Burst([True] * 400, hold, empty),
    )
    capture.start()
    while not (empty.is_set() and capture.queued == 0):
        capture.get(0.001)
        with capture._changed:
            counters, queued = capture.counters, capture.queued
        assert counters.captured == counters.delivered + counters.dropped + queued
    assert capture.counters.captured == 400
    hold.set()
    capture.stop()
