"""Whatever comes in whatever order: every part has one verdict, in order, and none is OK that was not seen whole."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from edge.frames import Decision
from tests.edge.station_bench import MS, Bench, plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.inspection.parts import Part
    from edge.inspection.plan import StationPlan

CAMERAS = ("a", "b", "c")
CAPACITY = 3
DEADLINE_MS = 100
KINDS = {
    "each frame": {"cameras": ("a",)},
    "no deadline": {"cameras": ("a",), "deadline_ms": None},
    "files": {"cameras": CAMERAS, "live": False},
    "one line": {"cameras": CAMERAS},
    "outside": {"cameras": CAMERAS, "trigger": "mqtt"},
    "fired": {"cameras": CAMERAS, "trigger": "modbus", "fired": frozenset({"a", "b"})},
}


class StationMachine(RuleBasedStateMachine):
    """Frames, views, triggers and time in any order, with a timer that may sleep."""

    @initialize(kind=st.sampled_from(sorted(KINDS)), nok_views=st.integers(1, 3))
    def begin(self, kind: str, nok_views: int) -> None:
        what = {"deadline_ms": DEADLINE_MS, **KINDS[kind]}
        cameras = what["cameras"]
        assert isinstance(cameras, tuple)
        self.plan: StationPlan = plan(
            capacity=CAPACITY,
            nok_views=min(nok_views, len(cameras)),
            **what,  # type: ignore[arg-type]
        )
        self.outside = "trigger" in what
        self.bench = Bench(self.plan, fire=lambda _: None)
        self.waiting: list[tuple[str, int, Part]] = []
        self.told: dict[Part, dict[str, tuple[str, int]]] = defaultdict(dict)
        self.opened = 0

    @rule(ms=st.sampled_from([0, 1, 5, 11, 40, 99, 100, 150]), tick=st.booleans())
    def time_passes(self, ms: int, tick: bool) -> None:  # noqa: FBT001 (hypothesis gives it by name)
        self.bench.at(self.bench.now / MS + ms, tick=tick)

    @rule()
    def trigger(self) -> None:
        if self.outside:
            self.bench.station.trigger(None)

    @rule(camera=st.sampled_from(CAMERAS), delay_ms=st.integers(0, 5))
    def frame(self, camera: str, delay_ms: int) -> None:
        if camera in self.plan.cameras:
            seq = self.bench.frame(camera, at_ns=max(0, self.bench.now - delay_ms * MS))
            if seq is not None:
                self.waiting.append((camera, seq, self.bench.part(camera, seq)))

    @rule(data=st.data(), decision=st.sampled_from(["OK", "OK", "OK", "NOK", "NOT_JUDGED"]))
    def view(self, data: st.DataObject, decision: str) -> None:
        if self.waiting:
            camera, seq, part = self.waiting.pop(data.draw(st.integers(0, len(self.waiting) - 1)))
            counts = self.bench.tell(camera, seq, decision)
            in_time = part.deadline_ns is None or self.bench.now < part.deadline_ns
            assert in_time or not counts
            if counts:
                assert camera not in self.told[part], "a camera has one view per part"
                self.told[part][camera] = (decision, self.bench.now)

    @rule(camera=st.sampled_from(CAMERAS), again=st.booleans())
    def camera_ends(self, camera: str, again: bool) -> None:  # noqa: FBT001 (hypothesis gives it by name)
        if camera in self.plan.cameras:
            self.bench.posts[camera].end("ended")
            self.waiting = [one for one in self.waiting if one[0] != camera]
            if again:
                self.bench.posts[camera] = self.bench.station.attach(camera, fire=lambda: None)

    @invariant()
    def verdicts_are_single_and_in_order(self) -> None:
        if hasattr(self, "bench"):
            numbers = [verdict.part.number for verdict in self.bench.verdicts]
            assert numbers == list(range(len(numbers)))

    @invariant()
    def nothing_is_ok_that_was_not_seen_whole_and_in_time(self) -> None:
        if not hasattr(self, "bench"):
            return
        for verdict in self.bench.verdicts:
            said = self.told[verdict.part]
            noks = sum(decision == "NOK" for decision, _ in said.values())
            if verdict.decision is Decision.OK:
                assert set(said) == set(self.plan.cameras)
                assert {decision for decision, _ in said.values()} <= {"OK", "NOK"}
                assert noks < self.plan.nok_views
                assert all(at <= verdict.decided_ns for _, at in said.values())
            if verdict.decision is Decision.NOK:
                assert noks >= self.plan.nok_views
            if verdict.decision is Decision.NOT_JUDGED:
                assert verdict.reason
                assert verdict.code

    @invariant()
    def room_is_bounded_and_the_timer_knows(self) -> None:
        if hasattr(self, "bench"):
            assert self.bench.station.status()["open"] <= CAPACITY
            if self.bench.station.status()["open"] and self.plan.deadline_ns is not None:
                assert self.bench.station in self.bench.timer.due

    def teardown(self) -> None:
        if hasattr(self, "bench"):
            if self.plan.deadline_ns is not None:
                # No later than the last deadline, and nobody did anything for it.
                self.bench.at(self.bench.now / MS + DEADLINE_MS)
                assert self.bench.station.status()["open"] == 0
            self.bench.station.close("the test is over")
            assert self.bench.station.status()["open"] == 0
            self.verdicts_are_single_and_in_order()
            self.nothing_is_ok_that_was_not_seen_whole_and_in_time()


TestStation = StationMachine.TestCase
TestStation.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def deliver(bench: Bench, frames: Sequence[tuple[int, str, int]], *, think_ns: int) -> dict[Part, dict[str, int]]:
    """Let frames (time, camera, physical part) come; each is judged OK a while later. Who saw which physical part."""
    seen: dict[Part, dict[str, int]] = defaultdict(dict)
    views: list[tuple[int, str, int]] = []
    for at_ns, camera, shown in sorted(frames):
        while views and views[0][0] <= at_ns:
            told_ns, who, seq = views.pop(0)
            bench.now = told_ns
            bench.tell(who, seq)
        bench.now = at_ns
        bench.station.tick()
        seq = bench.frame(camera)
        if seq is not None:
            seen[bench.part(camera, seq)][camera] = shown
            views.append((at_ns + think_ns, camera, seq))
    for told_ns, who, seq in views:
        bench.now = max(bench.now, told_ns)
        bench.tell(who, seq)
    bench.at(bench.now / MS + 1000)
    return seen


@settings(max_examples=500, deadline=None)
@given(
    cameras=st.sampled_from([CAMERAS[:2], CAMERAS]),
    gaps=st.lists(st.one_of(st.integers(0, 12), st.integers(13, 45)), min_size=2, max_size=6),
    delays=st.lists(st.tuples(*[st.integers(0, 10)] * 3), min_size=6, max_size=6),
    lost=st.sets(st.integers(0, 5), min_size=1, max_size=3),
    think_ms=st.sampled_from([0, 3, 30]),
)
def test_cameras_of_one_line_never_mix_parts_into_ok_however_close_they_come(
    cameras: tuple[str, ...], gaps: list[int], delays: list[tuple[int, int, int]], lost: set[int], think_ms: int
) -> None:
    """One camera loses frames without a trace; delays differ by up to the window of 10 ms."""
    bench = Bench(plan(cameras, capacity=64))
    frames, trigger_ms = [], 0
    latest = dict.fromkeys(cameras, 0)
    for part, gap in enumerate(gaps):
        trigger_ms += gap
        for camera, delay in zip(cameras, delays[part], strict=False):
            # A camera gives its frames in order.
            at = latest[camera] = max(latest[camera], trigger_ms + delay)
            if not (camera == "b" and part in lost) and at <= trigger_ms + 10:
                frames.append((at * MS, camera, part))

    seen = deliver(bench, frames, think_ns=think_ms * MS)

    for verdict in bench.verdicts:
        if verdict.decision is Decision.OK:
            assert len(set(seen[verdict.part].values())) == 1


@settings(max_examples=100, deadline=None)
@given(
    lost=st.lists(st.sets(st.sampled_from(CAMERAS), max_size=2), min_size=1, max_size=12),
    delays=st.lists(st.tuples(*[st.integers(0, 10)] * 3), min_size=12, max_size=12),
)
def test_cameras_of_one_line_give_each_part_one_verdict_and_are_in_step_after_a_loss(
    lost: list[set[str]], delays: list[tuple[int, int, int]]
) -> None:
    """Parts come more than two windows and a delay apart, as the manual asks."""
    bench = Bench(plan(CAMERAS, capacity=64))
    frames = [
        (MS * (part * 31 + delay), camera, part)
        for part, gone in enumerate(lost)
        for camera, delay in zip(CAMERAS, delays[part], strict=True)
        if camera not in gone
    ]

    deliver(bench, frames, think_ns=15 * MS)

    assert bench.decisions == ["NOT_JUDGED" if gone else "OK" for gone in lost]


@settings(max_examples=300, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 250), min_size=1, max_size=12),
    delays=st.lists(st.one_of(st.none(), st.integers(0, 199)), min_size=12, max_size=12),
)
def test_shots_of_a_fired_camera_are_never_taken_for_another_parts(gaps: list[int], delays: list[int | None]) -> None:
    """A shot takes up to twice the deadline, or is lost."""
    shots: list[int] = []
    bench = Bench(plan(trigger="modbus", fired=frozenset({"a"}), capacity=64), fire=lambda _: shots.append(bench.now))
    coming: list[tuple[int, int]] = []  # time, the time of the shot

    def until(ns: int) -> None:
        while coming and min(coming)[0] <= ns:
            at, fired_ns = min(coming)
            coming.remove((at, fired_ns))
            bench.now = at
            seq = bench.frame("a")
            if seq is not None:
                assert bench.part("a", seq).triggered_ns == fired_ns
                bench.tell("a", seq)
        bench.now = ns
        bench.station.tick()

    for gap in gaps:
        until(bench.now + gap * MS)
        before = len(shots)
        bench.station.trigger(None)
        if len(shots) > before and (delay := delays[len(shots) - 1]) is not None:
            coming.append((bench.now + delay * MS, bench.now))
    until(bench.now + 1000 * MS)

    assert len(bench.verdicts) == len(gaps)
