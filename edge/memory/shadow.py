"""ShadowTrial: a new memory beside the one in force, on the same frames, until it may or must not take over.

Pure counting; it must not know how frames are scored. The old memory decides all the while.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from enum import Enum

# One good candidate in a hundred is refused by chance at each camera; it costs a wait for the next one.
CONFIDENCE = 0.99
# Thresholds are made by the mirror of the head in numpy. Where it and the engine differ by more than this share of a
# score, they would be another memory's: float32 engines agree to 1e-3.
MIRROR_TOLERANCE = 0.02


@functools.lru_cache(maxsize=1024)
def most_alarms(frames: int, alpha: float, confidence: float = CONFIDENCE) -> int:
    """Return the largest number of alarms among good frames that a budget explains.

    Args:
        frames: n >= 0.
        alpha: false-alarm probability per frame, in (0, 1).
        confidence: probability that no more come where the budget is kept.

    Returns:
        The smallest k with P(Binomial(n, alpha) <= k) >= confidence.
    """
    total, k = 0.0, -1
    while total < confidence and k < frames:
        k += 1
        choose = math.lgamma(frames + 1) - math.lgamma(k + 1) - math.lgamma(frames - k + 1)
        total += math.exp(choose + k * math.log(alpha) + (frames - k) * math.log1p(-alpha))
    return max(k, 0)


class Outcome(str, Enum):
    """What became of a trial: it goes on, may end in a switch, or has failed."""

    WAITING = "waiting"
    READY = "ready"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Finding:
    """An outcome and what people should know of it."""

    outcome: Outcome
    reason: str = ""


@dataclass(slots=True)
class _Count:
    alpha: float
    good: int = 0
    alarms: int = 0
    released: int = 0
    mirror_error: float = 0.0
    frames: int = 0
    old_scores: float = 0.0
    new_scores: float = 0.0


class ShadowTrial:
    """Counts what a candidate would have said.

    Args:
        frames: that must be scored by both memories.
        seconds: that the trial must last.
        started_s: monotonic seconds.
    """

    def __init__(self, *, frames: int, seconds: float, started_s: float) -> None:
        self._wanted_frames, self._wanted_seconds = frames, seconds
        self._started_s = started_s
        self._cameras: dict[str, _Count] = {}
        self.frames = 0

    def take(
        self,
        camera: str,
        *,
        alpha: float,
        threshold: float,
        engine_score: float,
        mirror_score: float,
        new_score: float,
        old_ok: bool,
        new_ok: bool | None,
    ) -> None:
        """Count one frame that both have judged.

        Args:
            camera: its name.
            alpha: false-alarm probability per frame of that camera's budget.
            threshold: of the memory in force, the scale of what matters.
            engine_score: of the memory in force, as the engine gave it.
            mirror_score: the same as numpy gives it.
            new_score: of the candidate, as numpy gives it.
            old_ok: the memory in force found nothing, and no anomaly event lasts.
            new_ok: the candidate finds nothing; None where it has no thresholds.
        """
        count = self._cameras.setdefault(camera, _Count(alpha))
        self.frames += 1
        count.frames += 1
        count.old_scores += mirror_score
        count.new_scores += new_score
        if new_ok is not None and old_ok:
            count.good += 1
            count.alarms += not new_ok
        elif new_ok is not None:
            count.released += new_ok
        scale = max(abs(threshold), abs(mirror_score), 1e-12)
        count.mirror_error = max(count.mirror_error, abs(engine_score - mirror_score) / scale)

    def find(self, now_s: float) -> Finding:
        """Say where the trial stands at a time in monotonic seconds."""
        for name, count in list(self._cameras.items()):
            if count.mirror_error > MIRROR_TOLERANCE:
                return Finding(
                    Outcome.REFUSED,
                    f"camera {name}: the engine's scores are {count.mirror_error:.1%} from those that thresholds would "
                    "be made of; run this bundle in float32",
                )
            # Early, and once the frames are there exactly: what comes later cannot take alarms back.
            planned = max(count.good, self._wanted_frames)
            if count.alarms > most_alarms(planned, count.alpha):
                return Finding(Outcome.REFUSED, self._too_many(name, count, planned))
        left_s = self._wanted_seconds - (now_s - self._started_s)
        if self.frames < self._wanted_frames or left_s > 0:
            return Finding(
                Outcome.WAITING,
                f"in shadow: {self.frames} of {self._wanted_frames} frames, {max(0.0, left_s):.0f} s are left",
            )
        for name, count in list(self._cameras.items()):
            if count.alarms > most_alarms(count.good, count.alpha):
                return Finding(Outcome.REFUSED, self._too_many(name, count, count.good))
        if not any(count.good for count in list(self._cameras.values())):
            return Finding(Outcome.WAITING, "in shadow: no frame was found good yet that it could be compared on")
        return Finding(Outcome.READY)

    def figures(self) -> dict[str, dict[str, float]]:
        """Return the counts by camera, as JSON values.

        ``good``: frames that the old memory calls OK; ``alarms``: of them, those that the candidate would not;
        ``released``: frames of alerts that it would call OK.
        """
        return {
            name: {
                "frames": count.frames,
                "mean_score": round(count.old_scores / count.frames, 6),
                "mean_score_of_candidate": round(count.new_scores / count.frames, 6),
                "good": count.good,
                "alarms": count.alarms,
                "released": count.released,
                "mirror_error": round(count.mirror_error, 6),
            }
            for name, count in list(self._cameras.items())
        }

    @staticmethod
    def _too_many(name: str, count: _Count, frames: int) -> str:
        return (
            f"camera {name}: {count.alarms} alarms on {count.good} frames that the memory in force finds good; the "
            f"budget explains {most_alarms(frames, count.alpha)} in {frames}"
        )
