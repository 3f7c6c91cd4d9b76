"""Station: the parts of one place under a lock and a clock, with one view per camera and one verdict per part.

Knows when something is due and whom to tell; how parts are decided and frames matched is in parts.py and matching.py.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from datetime import datetime, timezone
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from edge.errors import CaptureError
from edge.frames import Decision
from edge.inspection.matching import AfterTrigger, ByOrder, ByTime, EachFrame, Matcher
from edge.inspection.parts import NS_PER_MS, Part, Parts, PartVerdict, Reason, View
from edge.inspection.settings import TriggerSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.frames import Verdict
    from edge.inspection.plan import StationPlan
    from edge.judgement.verdicts import Judge

    Sink = Callable[["Station", PartVerdict], None]

_LOG = logging.getLogger(__name__)
_NS = 1_000_000_000
# A timer that has nothing to wait for still shows that it lives.
TIMER_ROUND_S = 0.2


class Deadlines:
    """One thread that tells stations when something of theirs is due.

    Args:
        clock: monotonic nanoseconds.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._due: dict[Station, int] = {}
        self._stopping = False
        self._round_ns = 0
        self._thread = threading.Thread(target=self._run, name="inspection-deadlines", daemon=True)

    @property
    def silent_ns(self) -> int:
        """How long ago the thread was seen alive; 0 before its start."""
        return 0 if self._thread.ident is None else self._clock() - self._round_ns

    def start(self) -> None:
        """Begin, or go on."""
        if self._thread.ident is None:
            self._round_ns = self._clock()
            self._thread.start()

    def stop(self, timeout: float) -> bool:
        """End; returns whether the thread ended in time. May be called without a start, and twice."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def set(self, station: Station, due_ns: int | None) -> None:
        """Have :meth:`Station.tick` called at this time, and no longer at the one set before."""
        with self._changed:
            if due_ns is None:
                self._due.pop(station, None)
                return
            self._due[station] = due_ns
            if due_ns <= min(self._due.values()):
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._stopping:
                    return
                now = self._round_ns = self._clock()
                due = [station for station, at in self._due.items() if at <= now]
                for station in due:
                    del self._due[station]
                if not due:
                    soonest = min(self._due.values(), default=now + _NS)
                    self._changed.wait(min(TIMER_ROUND_S, (soonest - now) / _NS))
            for station in due:
                station.tick()


class Station:
    """One station. Safe to call from any thread; nothing in it waits.

    Args:
        plan: what it is.
        deadlines: calls :meth:`tick`.
        sink: called with every verdict, in the order of the triggers, under the station's lock; must return at once.
        count: adds one to a counter of the box.
        flush: waits, not for long, until the sink's verdicts are on their way.
        new_shots: makes the thread in which a camera is fired.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        plan: StationPlan,
        *,
        deadlines: Deadlines,
        sink: Sink,
        count: Callable[[str], None],
        flush: Callable[[], object] = lambda: None,
        new_shots: Callable[[str], Shots] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.plan = plan
        self.flush = flush
        self._new_shots = Shots if new_shots is None else new_shots
        self._deadlines = deadlines
        self._sink = sink
        self._count = count
        self._clock = clock
        self._lock = threading.Lock()
        self._parts = Parts(
            cameras=plan.cameras, nok_views=plan.nok_views, deadline_ns=plan.deadline_ns, capacity=plan.capacity
        )
        self._matcher = _matcher(plan, self._parts)
        self._posts: dict[str, Post] = {}
        self._closed = False
        self._late_run = 0
        self._counts = dict.fromkeys(("parts", "ok", "nok", "not_judged", "late_views", "frames_between"), 0)
        for camera in sorted(plan.disabled):
            missing = View(camera, Decision.NOT_JUDGED, Reason.SOURCE_ENDED, "the camera is disabled")
            self._parts.end(missing, clock())

    def attach(
        self,
        camera: str,
        *,
        fire: Callable[[], None],
        judge: Callable[[], Judge] | None = None,
    ) -> Post:
        """Take the place of a camera; whoever had it before has no say any more.

        Args:
            camera: one of the plan's.
            fire: asks for a frame, from any thread; raises CaptureError.
            judge: whose threshold is shown where no frame came.
        """
        assert camera in self.plan.cameras
        post = Post(self, camera, fire=fire, judge=judge, shots=self._new_shots(camera))
        with self._lock:
            before = self._posts.get(camera)
            self._posts[camera] = post
            self._parts.resume(camera)
            if before is not None:
                self._matcher.resume(camera)
        if before is not None:
            before.shots.stop()
        return post

    def judge_of(self, camera: str) -> Judge | None:
        """The judge of a camera at present; None where it has none."""
        post = self._posts.get(camera)
        return None if post is None or post.judge is None else post.judge()

    def trigger(self, part_id: str | None, mark: tuple[int, int] | None = None) -> str:
        """A part is there, says somebody outside.

        Args:
            part_id: what it is called; its number where None.
            mark: comes back with the verdict.

        Returns:
            Empty where it is accepted; else why not. One that was refused for lack of room has its NOT_JUDGED verdict.
        """
        assert self.plan.trigger is not TriggerSource.FRAME
        with self._lock:
            if self._closed:
                return "the box stops"
            now = self._clock()
            part = self._parts.open(part_id, at_ns=now, at=datetime.now(timezone.utc), now_ns=now, mark=mark)
            refused = "" if part.verdict is None else part.verdict.reason
            shots = [(camera, self._posts.get(camera)) for camera in self._matcher.triggered(part, now)]
            self._settle()
        for camera, post in shots:
            if post is None:
                self._not_fired(camera, part, "the camera is not there")
            else:
                post.shots.put(partial(self._fire, post, part))
        return refused

    def tick(self) -> None:
        """Decide what is due by now."""
        with self._lock:
            self._parts.advance(self._clock())
            self._settle()

    def close(self, reason: str) -> None:
        """Give every open part its verdict and take no more."""
        with self._lock:
            self._closed = True
            self._parts.close(reason, self._clock())
            self._settle()
            posts = list(self._posts.values())
        for post in posts:
            post.shots.stop()

    def status(self) -> dict[str, Any]:
        """What the box's status says of it."""
        with self._lock:
            return {
                "cameras": list(self.plan.cameras),
                "trigger": self.plan.trigger.value,
                "deadline_ms": None if self.plan.deadline_ns is None else self.plan.deadline_ns / NS_PER_MS,
                "open": len(self._parts),
                "counters": dict(self._counts),
            }

    def frame(self, post: Post, at_ns: int, at: datetime, name: str) -> Part | None:
        """A camera has captured a frame; see :meth:`Post.frame`."""
        part_id = PurePath(name).stem if name and post.camera in self.plan.named_by_file else None
        with self._lock:
            if self._closed or self._posts.get(post.camera) is not post:
                return None
            part = self._matcher.frame(post.camera, at_ns, at, part_id, self._clock())
            self._settle()
            if part is None:
                self._counts["frames_between"] += 1
        if part is None:
            self._count("frames_between_parts")
        return None if part is None or part.verdict is not None else part

    def view(self, part: Part, view: View) -> bool:
        """A camera's word on a part; False where it came too late and does not count."""
        with self._lock:
            counts = self._parts.view(part, view, self._clock())
            self._counts["late_views"] += not counts
            late, self._late_run = self._late_run, 0 if counts else self._late_run + 1
            self._settle()
        if not counts:
            self._count("views_late")
            if not late:
                _LOG.warning("station %s: part %s: the view of %s came too late to count", self.plan.name,
                             part.part_id, view.camera)  # fmt: skip
        elif late:
            _LOG.info("station %s: views come in time again; %d came too late", self.plan.name, late)
        return counts

    def in_time(self, part: Part) -> bool:
        """Whether a view of that part would count now."""
        return part.verdict is None and (part.deadline_ns is None or self._clock() < part.deadline_ns)

    def end(self, post: Post, missing: View) -> None:
        """No more frames come from a camera."""
        with self._lock:
            if self._posts.get(post.camera) is post:
                self._parts.end(missing, self._clock())
                self._settle()

    def _fire(self, post: Post, part: Part) -> None:
        """In the camera's own thread: neither frames nor whoever triggers wait for the camera's answer."""
        if part.verdict is not None:
            self._not_fired(post.camera, part, "it did not answer in time")
            return
        try:
            post.fire()
        except CaptureError as error:
            self._not_fired(post.camera, part, str(error))

    def _not_fired(self, camera: str, part: Part, reason: str) -> None:
        self._count("triggers_failed")
        view = View(camera, Decision.NOT_JUDGED, Reason.NOT_FIRED, f"not triggered: {reason}"[:200])
        with self._lock:
            self._matcher.not_fired(camera, part)
            self._parts.view(part, view, self._clock())
            self._settle()

    def _settle(self) -> None:
        """Under the lock, after every event: hand out verdicts, and say when to look again."""
        for verdict in self._parts.released():
            self._counts["parts"] += 1
            self._counts[verdict.decision.value.lower()] += 1
            self._sink(self, verdict)
        self._deadlines.set(self, self._parts.due_ns())


class Shots:
    """Fires one camera, one shot after the other, in a thread that begins with the first of them.

    Args:
        camera: its name.
    """

    def __init__(self, camera: str) -> None:
        self._waiting: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"fire-{camera}", daemon=True)

    def put(self, shot: Callable[[], None]) -> None:
        """Have a shot made; returns at once."""
        self._waiting.put(shot)
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """End behind the shots that wait; a driver that hangs is left behind."""
        self._waiting.put(None)

    def _run(self) -> None:
        while (shot := self._waiting.get()) is not None:
            shot()


class Post:
    """One camera's place at its station, from which it learns which frames are parts and tells what it sees of them.

    Args:
        station: it belongs to.
        camera: whose place it is.
        fire: asks the camera for a frame.
        judge: of the camera.
        shots: fires the camera.
    """

    def __init__(
        self,
        station: Station,
        camera: str,
        *,
        fire: Callable[[], None],
        judge: Callable[[], Judge] | None,
        shots: Shots,
    ) -> None:
        self.station = station
        self.camera = camera
        self.fire = fire
        self.judge = judge
        self.shots = shots
        # Of frames that wait to be judged: no more than the capture's queue holds.
        self._parts: dict[int, Part] = {}

    def frame(self, seq: int, *, at_ns: int, at: datetime, name: str) -> bool:
        """Say, in the capture's thread, that a frame is there.

        Args:
            seq: its number, unlike any other of this camera.
            at_ns: monotonic time of its capture.
            at: the same in UTC.
            name: a file's; may be empty.

        Returns:
            Whether a part waits for it; else nobody needs it.
        """
        part = self.station.frame(self, at_ns, at, name)
        if part is None:
            return False
        self._parts[seq] = part
        return True

    def part(self, seq: int) -> Part | None:
        """The part of a frame that is wanted; None for any other frame."""
        return self._parts.get(seq)

    def in_time(self, seq: int) -> bool:
        """Whether a view of this frame would count now."""
        part = self._parts.get(seq)
        return part is not None and self.station.in_time(part)

    def tell(self, seq: int, verdict: Verdict, code: Reason, calibration_count: int) -> bool:
        """Give the view of a frame; each frame needs one call, whatever became of it.

        Args:
            seq: as given to :meth:`frame`.
            verdict: of the camera's judge.
            code: why it is NOT_JUDGED.
            calibration_count: scores behind its p-value.

        Returns:
            Whether it counts.
        """
        part = self._parts.pop(seq, None)
        if part is None:
            return False
        view = View(self.camera, verdict.decision, code, verdict.reason, verdict, calibration_count)
        return self.station.view(part, view)

    def end(self, reason: str, code: Reason = Reason.SOURCE_ENDED) -> None:
        """Say that no frame will come any more, and none of those that were wanted will be judged."""
        missing = View(self.camera, Decision.NOT_JUDGED, code, reason)
        while self._parts:
            _, part = self._parts.popitem()
            self.station.view(part, missing)
        self.station.end(self, missing)
        self.shots.stop()


def _matcher(plan: StationPlan, parts: Parts) -> Matcher:
    if plan.trigger is not TriggerSource.FRAME:
        assert plan.deadline_ns is not None
        return AfterTrigger(parts, fired=plan.fired, deadline_ns=plan.deadline_ns, delay_ns=plan.delay_ns)
    if len(plan.cameras) == 1:
        return EachFrame(parts)
    return ByTime(parts, plan.match_ns) if plan.live else ByOrder(parts)
