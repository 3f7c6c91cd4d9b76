"""The rule of a trial: frames of a new bundle in, "passed" or a reason to go back out. Pure; time comes in."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from edge.frames import Decision

if TYPE_CHECKING:
    from edge.frames import JudgedFrame
    from edge.slots.settings import TrialSettings

FAILED_OF = 20
# Medians over fewer frames would take one busy moment for a slow bundle.
TIMED_FRAMES = 50
NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class TrialFrame:
    """What a trial wants to know of a frame: whether the detector could judge it, and how long that took."""

    failed: bool
    processing_ms: float

    @classmethod
    def of(cls, judged: JudgedFrame) -> TrialFrame | None:
        """Return it; None for a frame that says nothing of the detector, because it never came there."""
        if judged.frame.image.size == 0:
            return None
        prediction = judged.prediction
        if prediction is None:
            return cls(failed=True, processing_ms=0.0)
        failed = (
            judged.verdict.decision is Decision.NOT_JUDGED and not np.isfinite(prediction.anomaly_map).all()
        )  # late or ill for another reason is not the detector's fault
        return cls(failed=failed, processing_ms=(prediction.preprocess_ns + prediction.inference_ns) / NS_PER_MS)


class Pace:
    """Median time per frame of the last :data:`TIMED_FRAMES` frames."""

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=TIMED_FRAMES)

    def feed(self, frame: TrialFrame) -> None:
        """Take a frame that was judged."""
        if not frame.failed:
            self._times.append(frame.processing_ms)

    @property
    def median_ms(self) -> float | None:
        """None before there are enough frames."""
        return median(self._times) if len(self._times) == TIMED_FRAMES else None


class TrialRule:
    """Decides on one trial.

    Args:
        settings: of the trial.
        begun_s: monotonic seconds at its begin.
        before_ms: median time per frame of the bundle before; None where nobody measured it.
    """

    def __init__(self, settings: TrialSettings, *, begun_s: float, before_ms: float | None) -> None:
        self._settings = settings
        self._begun_s = begun_s
        self._before_ms = before_ms
        self._last: deque[bool] = deque(maxlen=FAILED_OF)
        self._pace = Pace()
        self._judged = 0

    @property
    def judged(self) -> int:
        """Frames judged so far."""
        return self._judged

    def feed(self, frame: TrialFrame) -> str:
        """Take a frame; returns why the bundle must go back, or an empty text."""
        self._last.append(frame.failed)
        self._judged += not frame.failed
        self._pace.feed(frame)
        failed = sum(self._last)
        if failed >= self._settings.max_failed:
            return f"{failed} of {len(self._last)} frames could not be judged"
        now_ms = self._pace.median_ms
        if (
            now_ms is not None
            and self._before_ms is not None
            and now_ms > self._settings.max_slowdown * self._before_ms
        ):
            return f"a frame takes {now_ms:.1f} ms, and took {self._before_ms:.1f} ms with the bundle before"
        return ""

    def passed(self, now_s: float) -> bool:
        """Whether it lasted long enough and judged enough frames."""
        return now_s - self._begun_s >= self._settings.seconds and self._judged >= self._settings.frames
