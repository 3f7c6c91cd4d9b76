"""From the verdicts of a stream of frames to anomaly events: new, update, end.

A pure state machine: time comes in with the verdicts. It knows nothing of maps, brokers or clocks.
"""

from __future__ import annotations

import math
import uuid
from collections import deque
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, model_validator

from edge.frames import AnomalyEvent, Decision, EventPhase, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

NS_PER_S = 1_000_000_000


class EventSettings(BaseModel):
    """When frames become an event and when it is over."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    enter_hits: int = Field(
        3, ge=1, title="Hits to enter (N)", description="Frames at or above the enter level that begin an event ..."
    )
    enter_window: int = Field(5, ge=1, title="Window to enter (M)", description="... among this many judged frames.")
    leave_calm: int = Field(
        10, ge=1, title="Calm frames to leave (K)", description="Frames in a row below the leave level that end it."
    )
    enter_quantile: float | None = Field(
        None,
        gt=0,
        lt=1,
        title="Enter quantile",
        description="A frame is a hit from this quantile of the good calibration scores, at least the threshold; the "
        "threshold itself where absent.",
    )
    leave_quantile: float = Field(
        0.95,
        gt=0,
        lt=1,
        title="Leave quantile",
        description="The leave level is this quantile of the good calibration scores, at most the threshold.",
    )
    update_every_s: float = Field(
        5.0, gt=0, title="Update interval", description="Seconds between updates, at least, while an event lasts."
    )
    cool_down_s: float = Field(
        0.0, ge=0, title="Cool-down", description="Seconds after an event's end in which no new one is begun."
    )

    @model_validator(mode="after")
    def _window_holds_hits(self) -> EventSettings:
        if self.enter_hits > self.enter_window:
            raise ValueError("enter_hits must not exceed enter_window")
        return self


def _new_id() -> str:
    return uuid.uuid4().hex


class EventTracker:
    """The event life cycle of one camera.

    A frame is a hit at or above the enter level, calm below the leave level, and neither in between: leave level <=
    threshold <= enter level. A frame between threshold and enter level is NOK, but begins no event. Frames that were
    not judged count for nothing: they neither begin an event nor help to end one. Time is that of the frames' capture
    on the monotonic clock, so no setting of the wall clock matters.
    """

    def __init__(self, settings: EventSettings, *, new_id: Callable[[], str] = _new_id) -> None:
        self._settings = settings
        self._new_id = new_id
        self._window: deque[bool] = deque(maxlen=settings.enter_window)
        self._event_id = ""
        self._last: Verdict | None = None
        self._peak = 0.0
        self._frames = 0
        self._calm = 0
        self._updated_ns = 0
        self._cool_until_ns: int | None = None

    @property
    def active(self) -> bool:
        """Whether an event lasts."""
        return bool(self._event_id)

    @property
    def event_id(self) -> str | None:
        """Of the event that lasts; None where none does."""
        return self._event_id or None

    def step(self, verdict: Verdict, *, leave_level: float, enter_level: float = -math.inf) -> list[AnomalyEvent]:
        """Take one verdict, in order of capture.

        Args:
            verdict: of one frame.
            leave_level: raw score below which the frame is calm; at most the verdict's threshold.
            enter_level: raw score from which a frame that is NOK is a hit.

        Returns:
            The phases that this frame brings, none or one.
        """
        if verdict.decision is Decision.NOT_JUDGED:
            return []
        if self.active:
            return self._go_on(verdict, leave_level)
        if self._cool_until_ns is not None and verdict.captured_ns < self._cool_until_ns:
            return []
        self._window.append(verdict.decision is Decision.NOK and verdict.score >= enter_level)
        if sum(self._window) < self._settings.enter_hits:
            return []
        self._event_id = self._new_id()
        self._peak = verdict.score
        self._frames = 1
        self._calm = 0
        self._updated_ns = verdict.captured_ns
        return [self._phase(EventPhase.NEW, verdict)]

    def finish(self) -> list[AnomalyEvent]:
        """End a lasting event because its source ended, was lost or is being stopped.

        Returns:
            As :meth:`change_product`.
        """
        self._window.clear()
        return self.change_product()

    def change_product(self) -> list[AnomalyEvent]:
        """End a lasting event because the frame to come shows another product, whose scores are others.

        Hits so far count on where none lasts: each was one by the levels of its own product, and on a line where
        products take turns no product alone would ever have enough of them.

        Returns:
            The end, with the data of the last frame judged; nothing where no event lasts.
        """
        if not self.active or self._last is None:
            return []
        return [self._end(self._last)]

    def _go_on(self, verdict: Verdict, leave_level: float) -> list[AnomalyEvent]:
        self._frames += 1
        self._peak = max(self._peak, verdict.score)
        self._calm = self._calm + 1 if verdict.score < leave_level else 0
        if self._calm >= self._settings.leave_calm:
            return [self._end(verdict)]
        if verdict.captured_ns - self._updated_ns >= self._settings.update_every_s * NS_PER_S:
            self._updated_ns = verdict.captured_ns
            return [self._phase(EventPhase.UPDATE, verdict)]
        self._last = verdict
        return []

    def _end(self, verdict: Verdict) -> AnomalyEvent:
        event = self._phase(EventPhase.END, verdict)
        self._event_id = ""
        self._window.clear()
        self._cool_until_ns = verdict.captured_ns + round(self._settings.cool_down_s * NS_PER_S)
        return event

    def _phase(self, phase: EventPhase, verdict: Verdict) -> AnomalyEvent:
        self._last = verdict
        return AnomalyEvent(
            event_id=self._event_id,
            phase=phase,
            camera=verdict.camera,
            camera_seq=verdict.camera_seq,
            captured_ns=verdict.captured_ns,
            captured_at=verdict.captured_at,
            score=verdict.score,
            peak_score=self._peak,
            threshold=verdict.threshold,
            p_value=verdict.p_value,
            frames=self._frames,
            regions=verdict.regions,
            latency_ms=verdict.latency_ms,
            memory_version=verdict.memory_version,
            moments_version=verdict.moments_version,
            threshold_version=verdict.threshold_version,
            subclass=verdict.subclass,
        )
