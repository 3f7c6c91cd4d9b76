"""Collector: notices events in the cameras' threads and queues what is to be kept of them for one writer.

Never waits: what does not fit is left out and counted. It must not know how pictures are compressed or stored.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from edge.evidence.case import Case, Picture
from edge.evidence.names import event_reference, part_reference
from edge.frames import Decision, EventPhase
from edge.settings import Mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.bundle import Bundle
    from edge.evidence.settings import EvidenceSettings
    from edge.frames import JudgedFrame

# A part that comes a minute later says nothing of this one, and a camera may never give another frame.
AFTER_LIMIT_S = 10.0
# Each holds a few compressed frames; so many events at once are one event of the whole plant.
MAX_CASES = 64
_LOOK_S = 1.0


@dataclass(frozen=True, slots=True)
class Begin:
    """Encode the event's own pictures; ``raw_bytes`` wait for it."""

    case: Case
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class After:
    """Encode the frame ``place`` frames after the event."""

    case: Case
    picture: Picture
    place: int
    raw_bytes: int


@dataclass(frozen=True, slots=True)
class Close:
    """Nothing more will come: write it."""

    case: Case


Work: TypeAlias = Begin | After | Close


@dataclass(slots=True)
class _Lane:
    recent: deque[Picture]
    gathering: list[Case] = field(default_factory=list)


class Collector:
    """What cameras hand in and one writer takes out.

    Args:
        settings: what is kept.
        clock: monotonic seconds.
    """

    def __init__(self, settings: EvidenceSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._limit = settings.waiting_mb * 2**20
        self._changed = threading.Condition()
        self._lanes: dict[str, _Lane] = {}
        self._work: deque[Work] = deque()
        self._ending = False
        self.waiting_bytes = 0
        self.cases = 0
        self.dropped = 0
        self.frames_left_out = 0

    def take(self, judged: JudgedFrame, bundle: Bundle, mode: Mode, *, refusing: bool = False) -> str | None:
        """Look at a judged frame; called in the thread of its camera.

        Args:
            judged: the frame.
            bundle: that judged it.
            mode: stream: an event's beginning is kept; triggered: a part that is not good.
            refusing: nothing can be written now, so that what would be kept is dropped and counted.

        Returns:
            The reference of the evidence that begins with it; None where none does or it is dropped.
        """
        if judged.frame.image.size == 0:
            return None
        picture = Picture(judged.frame)
        with self._changed:
            lane = self._lanes.get(picture.camera)
            if lane is None:
                lane = self._lanes[picture.camera] = _Lane(deque(maxlen=self._settings.before))
            for case in tuple(lane.gathering):
                self._follow(lane, case, picture, judged)
            reference = self._reference(judged, mode)
            if reference is not None and (refusing or not self._begin(lane, picture, judged, bundle, reference)):
                self.dropped += 1
                reference = None
            lane.recent.append(picture)
            if self._work:
                self._changed.notify()
        return reference

    def next(self) -> Work | None:
        """Wait for the next piece of work; None when everything is done after :meth:`end`."""
        with self._changed:
            while not self._work:
                self._close_due()
                if self._work:
                    break
                if self._ending:
                    return None
                self._changed.wait(_LOOK_S)
            return self._work.popleft()

    def done(self, work: Work) -> None:
        """The writer has let go of the pixels of a piece of work, or has finished a case."""
        with self._changed:
            if isinstance(work, Close):
                self.cases -= 1
            else:
                self.waiting_bytes -= work.raw_bytes

    def drop(self) -> None:
        """Count evidence that was promised and could not be written."""
        with self._changed:
            self.dropped += 1

    def close_all(self) -> None:
        """Wait for no more frames of any event."""
        with self._changed:
            for lane in self._lanes.values():
                self._close(lane, lane.gathering)
            self._changed.notify()

    def end(self) -> None:
        """Let :meth:`next` come to its end."""
        self.close_all()
        with self._changed:
            self._ending = True
            self._changed.notify()

    def _reference(self, judged: JudgedFrame, mode: Mode) -> str | None:
        if mode is Mode.TRIGGERED:
            wanted = {Decision.NOK, Decision.NOT_JUDGED} if self._settings.not_judged else {Decision.NOK}
            return part_reference(judged.verdict) if judged.verdict.decision in wanted else None
        return next((event_reference(event) for event in judged.events if event.phase is EventPhase.NEW), None)

    def _begin(self, lane: _Lane, picture: Picture, judged: JudgedFrame, bundle: Bundle, reference: str) -> bool:
        if self.cases >= MAX_CASES or not self._fits(picture.raw_bytes):
            return False
        raw, before = picture.raw_bytes, list[Picture]()
        for earlier in reversed(lane.recent):
            # The nearest first: they tell the most.
            if self.waiting_bytes + raw + earlier.raw_bytes > self._limit:
                break
            raw += earlier.raw_bytes
            before.insert(0, earlier)
        prediction = judged.prediction
        if prediction is not None:
            # An engine may write its next map into the same memory.
            prediction = dataclasses.replace(prediction, anomaly_map=prediction.anomaly_map.copy())
        case = Case(
            reference=reference,
            judged=dataclasses.replace(judged, prediction=prediction),
            bundle=bundle,
            event_id=judged.events[0].event_id if judged.events else None,
            picture=picture,
            before=tuple(before),
            after=self._settings.after,
            due=self._clock() + AFTER_LIMIT_S,
            skipped=len(lane.recent) - len(before),
        )
        self.frames_left_out += case.skipped
        self.cases += 1
        self._put(Begin(case, raw))
        lane.gathering.append(case)
        if case.after == 0:
            self._close(lane, [case])
        return True

    def _follow(self, lane: _Lane, case: Case, picture: Picture, judged: JudgedFrame) -> None:
        case.taken += 1
        raw = picture.raw_bytes
        if self._fits(raw):
            self._put(After(case, picture, case.taken, raw))
        else:
            case.skipped += 1
            self.frames_left_out += 1
        over = any(event.phase is EventPhase.END and event.event_id == case.event_id for event in judged.events)
        if over or case.taken >= case.after:
            self._close(lane, [case])

    def _fits(self, raw: int) -> bool:
        # One frame is always taken, however large.
        return self.waiting_bytes == 0 or self.waiting_bytes + raw <= self._limit

    def _put(self, work: Begin | After) -> None:
        self.waiting_bytes += work.raw_bytes
        self._work.append(work)

    def _close(self, lane: _Lane, cases: list[Case]) -> None:
        self._work.extend(Close(case) for case in cases)
        lane.gathering = [case for case in lane.gathering if case not in cases]

    def _close_due(self) -> None:
        now = self._clock()
        for lane in self._lanes.values():
            self._close(lane, [case for case in lane.gathering if now >= case.due])
