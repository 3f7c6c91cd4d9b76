"""Parts: the parts of one station from trigger to verdict, as a state machine that is fed with time.

Pure: no clock, no thread, no queue of frames. It must not know how a frame finds its part.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

from edge.frames import Decision

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from edge.frames import Verdict

NS_PER_MS = 1_000_000
# Parts that are decided, but wait for the verdict of an earlier one. A refused part costs some 300 bytes here.
BACKLOG = 1024


class Reason(IntEnum):
    """Why a part or a view of it was not judged, as a PLC reads it; the numbers never change."""

    NONE = 0
    DEADLINE = 1
    NO_FRAME = 2
    FRAME_LOST = 3
    FAILED = 4
    TOO_MANY = 5
    NOT_FIRED = 6
    TOO_CLOSE = 7
    SOURCE_ENDED = 8
    STOPPED = 9
    CAMERA_UNWELL = 10
    UNKNOWN_PRODUCT = 11


@dataclass(frozen=True, slots=True)
class View:
    """What one camera has to say of one part.

    Attributes:
        camera: its name.
        decision: OK, NOK or NOT_JUDGED.
        code: why it was not judged.
        reason: the same for people; empty when judged.
        verdict: of the camera's judge; None where no frame came.
        calibration_count: scores behind the camera's p-value.
    """

    camera: str
    decision: Decision
    code: Reason = Reason.NONE
    reason: str = ""
    verdict: Verdict | None = None
    calibration_count: int = 0


@dataclass(slots=True, eq=False)
class Part:
    """One part between its trigger and the release of its verdict.

    Attributes:
        number: counts the station's parts, from 0.
        part_id: from the trigger.
        mark: a number of whoever triggered it (a PLC's part number and counter), handed back with the verdict.
        triggered_ns: monotonic time of the trigger.
        triggered_at: the same in UTC.
        deadline_ns: monotonic; None for no limit.
        until_ns: frames captured from here on belong to a later part; None while there is none.
        hold_ns: no OK until after this time, since a frame may still show that frames were mixed up.
        frames: camera -> monotonic time of the frame that is this part's.
        views: camera -> its view.
        flaw: code and text of what forbids an OK whatever the views say.
        verdict: once it is decided.
    """

    number: int
    part_id: str | None
    mark: tuple[int, int] | None
    triggered_ns: int
    triggered_at: datetime
    deadline_ns: int | None
    until_ns: int | None = None
    hold_ns: int = -1
    frames: dict[str, int] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)
    flaw: tuple[Reason, str] | None = None
    verdict: PartVerdict | None = None


@dataclass(frozen=True, slots=True)
class PartVerdict:
    """The one verdict on one part.

    Attributes:
        part: that it is of.
        decision: OK only if every view was judged in time and the rule says so.
        code: why it was not judged.
        reason: the same for people.
        views: one per camera, in the station's order.
        decided_ns: monotonic time of the decision.
    """

    part: Part
    decision: Decision
    code: Reason
    reason: str
    views: tuple[View, ...]
    decided_ns: int

    @property
    def latency_ms(self) -> float:
        """From the trigger to the decision."""
        return max(0, self.decided_ns - self.part.triggered_ns) / NS_PER_MS


class Parts:
    """The open parts of one station, and those whose verdict waits for that of an earlier part.

    A part is decided when all its views are there, at its deadline, or at once where there is no room for it. Verdicts
    are released in the order of the triggers. Time must not run backwards between calls.

    Args:
        cameras: of the station, in order.
        nok_views: so many NOK views make a part NOK.
        deadline_ns: from trigger to verdict; None for no limit.
        capacity: parts that may be undecided; a further one is NOT_JUDGED.
        backlog: decided parts that may wait for an earlier one; beyond, the earliest is NOT_JUDGED at once.
    """

    def __init__(
        self,
        *,
        cameras: Sequence[str],
        nok_views: int,
        deadline_ns: int | None,
        capacity: int,
        backlog: int = BACKLOG,
    ) -> None:
        self.cameras = tuple(cameras)
        self._nok_views = nok_views
        self._deadline_ns = deadline_ns
        self._capacity = capacity
        self._backlog = backlog
        self._queue: deque[Part] = deque()
        self._open: dict[int, Part] = {}
        self._ended: dict[str, View] = {}
        self.next_number = 0

    def __len__(self) -> int:
        """Parts without a verdict."""
        return len(self._open)

    def __iter__(self) -> Iterator[Part]:
        """Parts without a verdict, in the order of their triggers."""
        return iter(tuple(self._open.values()))

    def get(self, number: int) -> Part | None:
        """The part of that number, as long as it has no verdict."""
        return self._open.get(number)

    def open(
        self,
        part_id: str | None,
        *,
        at_ns: int,
        at: datetime,
        now_ns: int,
        mark: tuple[int, int] | None = None,
    ) -> Part:
        """Take a part in; it has its verdict already where there are too many.

        Args:
            part_id: from the trigger; its number as text where None.
            at_ns: monotonic time of the trigger.
            at: the same in UTC.
            now_ns: monotonic.
            mark: kept for the verdict.
        """
        self.advance(now_ns)
        part = Part(
            number=self.next_number,
            part_id=str(self.next_number) if part_id is None else part_id,
            mark=mark,
            triggered_ns=at_ns,
            triggered_at=at,
            deadline_ns=None if self._deadline_ns is None else at_ns + self._deadline_ns,
        )
        self.next_number += 1
        self._queue.append(part)
        self._open[part.number] = part
        if len(self._open) > self._capacity:
            self._refuse(part, now_ns)
        for missing in self._ended.values():
            self._fill(part, missing)
        if len(self._queue) > self._capacity + self._backlog and self._queue[0].verdict is None:
            self._refuse(self._queue[0], now_ns)
        self.advance(now_ns)
        return part

    def view(self, part: Part, view: View, now_ns: int) -> bool:
        """Take what a camera says of a part.

        Returns:
            Whether it counts: not once the part has its verdict, its deadline is reached, or the view is there.
        """
        self.advance(now_ns)
        if part.verdict is not None or view.camera in part.views:
            return False
        self._fill(part, view)
        self.advance(now_ns)
        return True

    def end(self, missing: View, now_ns: int) -> None:
        """No frame of this view's camera will come for any part that has none, nor for later ones."""
        self._ended[missing.camera] = missing
        for part in self:
            if missing.camera not in part.frames:
                self._fill(part, missing)
        self.advance(now_ns)

    def resume(self, camera: str) -> None:
        """Frames of this camera are to be expected again."""
        self._ended.pop(camera, None)

    def close(self, reason: str, now_ns: int) -> None:
        """Decide every part that is open: the box stops."""
        self.advance(now_ns)
        for part in self:
            for camera in self.cameras:
                self._fill(part, View(camera, Decision.NOT_JUDGED, Reason.STOPPED, reason))
            self._decide(part, now_ns)

    def advance(self, now_ns: int) -> None:
        """Decide what is due: parts at their deadline, and complete ones that need not be held any longer."""
        for part in self:
            expired = part.deadline_ns is not None and now_ns >= part.deadline_ns
            if expired:
                self._expire(part, now_ns)
            if expired or (len(part.views) == len(self.cameras) and now_ns > part.hold_ns):
                self._decide(part, now_ns)

    def due_ns(self) -> int | None:
        """When :meth:`advance` has something to do next; None for never without another event."""
        times = []
        for part in self._open.values():
            if part.deadline_ns is not None:
                times.append(part.deadline_ns)
            if len(part.views) == len(self.cameras):
                times.append(part.hold_ns + 1)
        return min(times, default=None)

    def released(self) -> list[PartVerdict]:
        """Verdicts whose turn has come, each once."""
        found = []
        while self._queue and (verdict := self._queue[0].verdict) is not None:
            found.append(verdict)
            self._queue.popleft()
        return found

    def _fill(self, part: Part, view: View) -> None:
        if part.verdict is None:
            part.views.setdefault(view.camera, view)

    def _refuse(self, part: Part, now_ns: int) -> None:
        part.flaw = (Reason.TOO_MANY, f"too many parts: {self._capacity} are not judged yet")
        for camera in self.cameras:
            self._fill(part, View(camera, Decision.NOT_JUDGED, Reason.TOO_MANY, "too many parts"))
        self._decide(part, now_ns)

    def _expire(self, part: Part, now_ns: int) -> None:
        assert part.deadline_ns is not None
        limit = f"{(part.deadline_ns - part.triggered_ns) / NS_PER_MS:g} ms"
        if now_ns <= part.hold_ns:
            part.flaw = part.flaw or (Reason.DEADLINE, f"its frames could not be told from others within {limit}")
        for camera in self.cameras:
            if camera in part.frames:
                missing = View(camera, Decision.NOT_JUDGED, Reason.DEADLINE, f"not judged within {limit}")
            else:
                missing = View(camera, Decision.NOT_JUDGED, Reason.NO_FRAME, f"no frame within {limit}")
            self._fill(part, missing)

    def _decide(self, part: Part, now_ns: int) -> None:
        views = tuple(part.views[camera] for camera in self.cameras)
        decision = combine([view.decision for view in views], nok_views=self._nok_views)
        code, reason = Reason.NONE, ""
        if part.flaw is not None and decision is not Decision.NOK:
            decision = Decision.NOT_JUDGED
            code, reason = part.flaw
        elif decision is Decision.NOT_JUDGED:
            first = next(view for view in views if view.decision is Decision.NOT_JUDGED)
            code, reason = first.code, first.reason if len(views) == 1 else f"{first.camera}: {first.reason}"
        part.verdict = PartVerdict(part, decision, code, reason, views, now_ns)
        del self._open[part.number]


def combine(decisions: Sequence[Decision], *, nok_views: int) -> Decision:
    """The decision on a part from those of its views.

    NOK if at least ``nok_views`` are NOK, whatever the others say; else OK if every view was judged; else NOT_JUDGED.
    So a view that was not judged never makes OK.
    """
    if sum(decision is Decision.NOK for decision in decisions) >= nok_views:
        return Decision.NOK
    if all(decision is not Decision.NOT_JUDGED for decision in decisions):
        return Decision.OK
    return Decision.NOT_JUDGED
