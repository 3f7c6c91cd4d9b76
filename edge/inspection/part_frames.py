"""PartFrames: one camera's frames as parts, between its worker and its station; in a stream no frame is a part.

Knows which thread says what to the station; judging is the worker's, deciding the station's.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from edge.inspection.parts import NS_PER_MS, Reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.capture.capture import LostFrame
    from edge.frames import Frame, Verdict
    from edge.health.metrics import Metrics
    from edge.inspection.station import Post, Station
    from edge.judgement.verdicts import Judge
    from edge.reporter import Reporter

_MAX_REASON = 200


class PartFrames:
    """What a worker asks and tells of parts. Every frame is known by its number in the worker's count.

    Args:
        camera: its name.
        station: that it belongs to; None in stream mode.
        reporter: shows the states of camera and station.
        metrics: counts ``frames_late``.
        judge: the camera's, of the moment.
    """

    def __init__(
        self,
        camera: str,
        station: Station | None,
        *,
        reporter: Reporter,
        metrics: Metrics,
        judge: Callable[[], Judge],
    ) -> None:
        self._camera = camera
        self._station = station
        self._reporter = reporter
        self._metrics = metrics
        self._judge = judge
        self._post: Post | None = None

    @property
    def expected(self) -> bool:
        """Whether frames are parts: triggered mode."""
        return self._station is not None

    def begin(self, fire: Callable[[], None]) -> None:
        """Take the camera's place at its station; whoever had it before has no say any more.

        Args:
            fire: asks the camera for a frame; raises CaptureError.
        """
        if self._station is not None:
            self._post = self._station.attach(self._camera, fire=fire, judge=self._judge)

    def wanted(self, seq: int, frame: Frame | LostFrame) -> bool:
        """In the capture's thread: whether a part waits for this frame; in a stream every frame is wanted."""
        return self._post is None or self._post.frame(
            seq, at_ns=frame.captured_ns, at=frame.captured_at, name=frame.name
        )

    def lost(self, seq: int, lost: LostFrame) -> Verdict | None:
        """In the thread that lost a frame: the verdict on it, told to the station at once; None where it is no part."""
        # An unreadable frame was never asked about, and is a part all the same.
        if self._post is None or (lost.reason == "corrupt" and not self.wanted(seq, lost)):
            return None
        if self._post.part(seq) is None:
            return None
        verdict = self._judge().missing(
            camera=self._camera,
            camera_seq=seq,
            captured_ns=lost.captured_ns,
            captured_at=lost.captured_at,
            part_id=self.part_id(seq),
            reason=f"frame {lost.reason}",
        )
        self.tell(verdict, Reason.FRAME_LOST)
        return verdict

    def part_id(self, seq: int) -> str | None:
        """Of the part that a frame shows; None in a stream."""
        part = None if self._post is None else self._post.part(seq)
        return None if part is None else part.part_id

    def in_time(self, seq: int) -> bool:
        """Whether a view of this frame would count for its part; always so in a stream."""
        return self._post is None or self._post.in_time(seq)

    def too_late(self, frame: Frame) -> Verdict:
        """The verdict on a frame that is not in time."""
        self._metrics.count("frames_late")
        late_ms = (time.monotonic_ns() - frame.captured_ns) / NS_PER_MS
        return self._judge().not_judged(frame, f"too late for its part, {late_ms:.0f} ms after capture")

    def tell(self, verdict: Verdict, code: Reason) -> None:
        """Give the station the view of a frame; each wanted frame needs one, whatever became of it."""
        if self._post is not None:
            self._post.tell(verdict.camera_seq, verdict, code, self._judge().calibration_count)

    def show(self, verdict: Verdict) -> None:
        """Show what the camera says, where its station shows something else."""
        if self._station is not None and not self._station.plan.own:
            state = verdict.decision.value.lower()
            self._reporter.state(self._camera, state, reason=verdict.reason, part_id=verdict.part_id, verdict=verdict)

    def show_not_judged(self, reason: str) -> None:
        """Show that the camera judges nothing; a station that misses a view cannot vouch for a part either."""
        self._reporter.state(self._camera, "not_judged", reason=reason[:_MAX_REASON])
        if self._station is not None and not self._station.plan.own:
            self._reporter.state(
                self._station.plan.name, "not_judged", reason=f"{self._camera}: {reason}"[:_MAX_REASON]
            )

    def end(self, reason: str, *, stopped: bool = False) -> None:
        """Say that no frame will come any more, and wait a moment until all verdicts are on their way."""
        if self._post is not None:
            self._post.end(reason[:_MAX_REASON], Reason.STOPPED if stopped else Reason.SOURCE_ENDED)
            self._post.station.flush()
