"""Matching: which part a frame belongs to, by the way the station's parts are triggered.

Pure, as the parts are. What cannot be matched beyond doubt must never become an OK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from edge.frames import Decision
from edge.inspection.parts import NS_PER_MS, Part, Parts, Reason, View

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime


class Matcher(Protocol):
    """How frames find their parts."""

    def frame(self, camera: str, at_ns: int, at: datetime, part_id: str | None, now_ns: int) -> Part | None:
        """The part of a frame that was just captured, opened where it is a new one.

        Args:
            camera: that gave it.
            at_ns: monotonic time of its capture.
            at: the same in UTC.
            part_id: that its name gives; None where it gives none.
            now_ns: monotonic.

        Returns:
            None where it belongs to no part that is still open.
        """

    def triggered(self, part: Part, now_ns: int) -> Sequence[str]:
        """Learn of a part that was triggered from outside; returns the cameras to fire."""

    def not_fired(self, camera: str, part: Part) -> None:
        """A camera that should have been fired was not: no frame of it will come for this part."""

    def resume(self, camera: str) -> None:
        """A camera begins anew."""


class _FrameTriggered:
    """Frames are the triggers; nothing comes from outside."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def triggered(self, part: Part, now_ns: int) -> Sequence[str]:  # noqa: ARG002 (the protocol's)
        raise AssertionError("a station whose frames are its triggers has no other")

    def not_fired(self, camera: str, part: Part) -> None:
        """Nothing is fired here."""

    def resume(self, camera: str) -> None:
        """Nothing is kept of a camera."""


class EachFrame(_FrameTriggered):
    """A station of one camera: each of its frames is a part."""

    def frame(self, camera: str, at_ns: int, at: datetime, part_id: str | None, now_ns: int) -> Part | None:
        """Open a part; see :class:`Matcher`."""
        part = self._parts.open(part_id, at_ns=at_ns, at=at, now_ns=now_ns)
        part.frames[camera] = at_ns
        return part


class ByOrder(_FrameTriggered):
    """Several folders or videos: the k-th frame of each shows part k.

    Nothing that reads files loses one unseen: unreadable and dropped ones keep their place. Where one of the cameras
    begins its files anew, no part is OK until all others have done so too.
    """

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._given = dict.fromkeys(parts.cameras, 0)
        self._anew: set[str] = set()
        self._begin = 0

    def frame(self, camera: str, at_ns: int, at: datetime, part_id: str | None, now_ns: int) -> Part | None:
        """See :class:`Matcher`."""
        number = self._given[camera]
        self._given[camera] += 1
        if number == self._parts.next_number:
            part: Part | None = self._parts.open(part_id, at_ns=at_ns, at=at, now_ns=now_ns)
        else:
            part = self._parts.get(number)
        if part is not None:
            part.frames[camera] = at_ns
            if self._anew:
                part.flaw = (Reason.TOO_CLOSE, "one camera has begun its files anew, others have not")
        return part

    def resume(self, camera: str) -> None:
        """All cameras that begin anew begin with the same part."""
        if not self._anew:
            self._begin = self._parts.next_number
        self._given[camera] = self._begin
        self._anew.add(camera)
        if len(self._anew) == len(self._given):
            self._anew.clear()


class ByTime(_FrameTriggered):
    """Several cameras on one trigger line: frames captured within a window show one part.

    A camera, its link or its driver may lose a frame without a trace, so counting would pair each later frame with
    another part. Frames of one part are captured within ``window_ns`` of each other, and parts come at least twice
    that apart; then no frame can fit two parts, and after a loss the next part is matched again. Where frames show
    that parts come closer, those parts are never OK; so a part is held for ``window_ns`` after its last frame.

    Args:
        parts: of the station.
        window_ns: longest time between frames of one part.
    """

    def __init__(self, parts: Parts, window_ns: int) -> None:
        super().__init__(parts)
        self._window_ns = window_ns
        self._last: dict[str, tuple[int, Part]] = {}
        self._newest: Part | None = None

    def frame(self, camera: str, at_ns: int, at: datetime, part_id: str | None, now_ns: int) -> Part | None:
        """See :class:`Matcher`."""
        window = self._window_ns
        fitting = [
            part
            for part in self._parts
            if camera not in part.frames and camera not in part.views and abs(at_ns - part.triggered_ns) <= window
        ]
        suspects = fitting if len(fitting) > 1 else []
        if fitting:
            part = fitting[0]
        else:
            part = self._parts.open(part_id, at_ns=at_ns, at=at, now_ns=now_ns)
            if self._newest is not None and at_ns - self._newest.triggered_ns <= 2 * window:
                suspects += [self._newest, part]
            self._newest = part
        before = self._last.get(camera)
        if before is not None and at_ns - before[0] <= 2 * window:
            suspects += [before[1], part]
        apart = f"{2 * window / NS_PER_MS:g} ms"
        for suspect in suspects:
            suspect.flaw = suspect.flaw or (
                Reason.TOO_CLOSE,
                f"frames may be mixed up: parts came no more than {apart} apart, or a frame came late",
            )
        self._last[camera] = (at_ns, part)
        part.frames[camera] = at_ns
        part.hold_ns = max(part.hold_ns, at_ns + window)
        return part

    def resume(self, camera: str) -> None:
        """Times of frames before do not matter."""
        self._last.pop(camera, None)


class AfterTrigger:
    """A trigger from outside: a camera is fired, or gives the first frame captured at or after the trigger.

    A frame of a camera that runs freely shows the part triggered last: once the next part is triggered, an earlier one
    that has no frame yet gets none. A camera that is fired has one shot under way at most: while it is, and for one
    deadline after a shot that brought no frame, it is not fired, since a late frame could be taken for the next part's.

    Args:
        parts: of the station.
        fired: cameras with a software trigger.
        deadline_ns: of the station.
        delay_ns: added to the trigger for cameras that run freely: their latency, or the way of the part.
    """

    def __init__(self, parts: Parts, *, fired: frozenset[str], deadline_ns: int, delay_ns: int) -> None:
        self._parts = parts
        self._fired = fired
        self._deadline_ns = deadline_ns
        self._delay_ns = delay_ns
        self._under_way: dict[str, Part] = {}
        self._newest: Part | None = None

    def frame(self, camera: str, at_ns: int, at: datetime, part_id: str | None, now_ns: int) -> Part | None:  # noqa: ARG002
        """See :class:`Matcher`."""
        if camera in self._fired:
            part = self._under_way.get(camera)
            if part is None or at_ns < part.triggered_ns:
                return None
            # One shot, one frame: the camera is in step again, even where the frame is too late for its part.
            del self._under_way[camera]
            return self._claimed(part, camera, at_ns)
        for part in self._parts:
            start = part.triggered_ns + self._delay_ns
            if start <= at_ns and (part.until_ns is None or at_ns < part.until_ns) and camera not in part.frames:
                return self._claimed(part, camera, at_ns)
        return None

    def triggered(self, part: Part, now_ns: int) -> Sequence[str]:
        """See :class:`Matcher`."""
        if self._newest is not None:
            self._newest.until_ns = part.triggered_ns + self._delay_ns
        self._newest = part
        to_fire = []
        for camera in self._parts.cameras:
            if camera not in self._fired or camera in part.views or part.verdict is not None:
                continue
            before = self._under_way.get(camera)
            if before is None or self._settled(before, now_ns):
                self._under_way[camera] = part
                to_fire.append(camera)
            else:
                late = "it gave no frame for the part before" if before.verdict else "it is busy with the part before"
                view = View(camera, Decision.NOT_JUDGED, Reason.NOT_FIRED, f"not triggered: {late}")
                self._parts.view(part, view, now_ns)
        return to_fire

    def not_fired(self, camera: str, part: Part) -> None:
        """See :class:`Matcher`."""
        if self._under_way.get(camera) is part:
            del self._under_way[camera]

    def resume(self, camera: str) -> None:
        """What was under way in a camera that begins anew is lost."""
        self._under_way.pop(camera, None)

    def _settled(self, part: Part, now_ns: int) -> bool:
        return part.verdict is not None and now_ns >= part.triggered_ns + 2 * self._deadline_ns

    def _claimed(self, part: Part, camera: str, at_ns: int) -> Part | None:
        if part.verdict is not None or camera in part.views:
            return None
        part.frames[camera] = at_ns
        return part
