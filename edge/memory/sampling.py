"""Sampler: which judged frames the memory looks at. It must not know what is done with them."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.adaptation.look import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.adaptation.look import Look
    from edge.frames import Frame, Verdict
    from edge.health.metrics import Metrics

# Each holds a camera frame; whoever falls this far behind shall lose frames, not memory.
QUEUE_FRAMES = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """A frame for the memory.

    Attributes:
        frame: as captured.
        verdict: on it.
        alarmed: NOK, or part of an anomaly event.
        embedded: to be learned and tried; else it is only kept in case somebody declares it good.
        look: how it was seen when it was judged.
    """

    frame: Frame
    verdict: Verdict
    alarmed: bool
    embedded: bool
    look: Look = PLAIN


class Sampler:
    """Takes at most one frame per camera and interval; of frames that are part of an alert likewise one.

    Args:
        every_s: the interval.
        remember: names of cameras whose every frame is kept.
        metrics: counts ``memory_dropped``.
        clock: monotonic seconds.
    """

    def __init__(
        self, *, every_s: float, remember: frozenset[str], metrics: Metrics, clock: Callable[[], float]
    ) -> None:
        self._every_s, self._remember, self._metrics, self._clock = every_s, remember, metrics, clock
        self._samples: queue.Queue[Sample] = queue.Queue(QUEUE_FRAMES)
        self._due: dict[tuple[str, bool], float] = {}

    def offer(self, frame: Frame, verdict: Verdict, alarmed: bool, look: Look = PLAIN) -> None:  # noqa: FBT001 (a fact)
        """Take a frame or leave it; never waits. Called in the thread of its camera."""
        # Alarmed frames have an interval of their own: they are what an operator may want to declare good.
        now, lane = self._clock(), (frame.camera, alarmed)
        embedded = now >= self._due.get(lane, 0.0)
        if not embedded and frame.camera not in self._remember:
            return
        try:
            self._samples.put_nowait(Sample(frame, verdict, alarmed, embedded, look))
        except queue.Full:
            self._metrics.count("memory_dropped")
            return
        if embedded:
            self._due[lane] = now + self._every_s

    def take(self, wait_s: float) -> Sample | None:
        """Return the next sample; None where none came within ``wait_s`` seconds."""
        try:
            return self._samples.get(timeout=wait_s) if wait_s > 0 else self._samples.get_nowait()
        except queue.Empty:
            return None
