"""Replay: a folder or video through the whole box, as fast as it is judged, and what came of it.

Builds settings and counts; judging and sending are the box's.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edge.box import Box
from edge.bundle import Bundle
from edge.capture.settings import DropPolicy, SourceKind, SourceSettings
from edge.errors import CaptureError, UsageError
from edge.frames import Decision
from edge.products.book import RECIPES_FILE, RecipeBook

if TYPE_CHECKING:
    from pathlib import Path

    from edge.frames import Verdict
    from edge.settings import BoxSettings


@dataclass(frozen=True, slots=True)
class FrameResult:
    """One judged frame.

    Attributes:
        name: file name or position in the video.
        camera_seq: number of the frame.
        decision: OK, NOK or NOT_JUDGED.
        score: raw; None when not judged.
    """

    name: str
    camera_seq: int
    decision: str
    score: float | None


@dataclass(frozen=True, slots=True)
class ReplaySummary:
    """What came of a replay.

    Attributes:
        frames: frames that were read, unreadable ones included.
        judged: of them, judged OK or NOK.
        ok: judged OK.
        nok: judged NOK.
        not_judged: neither.
        events: anomaly events begun (stream mode).
        published: alerts and verdicts that the broker has acknowledged.
        unsent: alerts and verdicts that it has not.
        lost: alerts and verdicts that could not even be stored.
        seconds: from the capture of the first frame to the last verdict.
        frames_per_second: frames / seconds; None for no more than one frame.
        latency_ms: stage -> percentile -> milliseconds; ``processing`` is preprocess, inference and judgement,
            ``total`` adds the wait in the queue.
        engine: that judged.
        precision: that it judged with.
        fallback_reason: empty, or why it was not the engine or precision asked for.
        threshold: value, alpha, n, n_groups, budget_supported, smallest_supported_alpha and method.
        warnings: what an operator should know.
        results: every frame, in order, where asked for.
    """

    frames: int
    judged: int
    ok: int
    nok: int
    not_judged: int
    events: int
    published: int
    unsent: int
    lost: int
    seconds: float
    frames_per_second: float | None
    latency_ms: dict[str, dict[str, float]]
    engine: str
    precision: str
    fallback_reason: str
    threshold: dict[str, Any]
    warnings: tuple[str, ...]
    results: tuple[FrameResult, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return dataclasses.asdict(self)


@dataclass(slots=True)
class _Tally:
    keep: bool
    first_ns: int | None = None
    last_ns: int = 0
    frames: int = 0
    results: list[FrameResult] = field(default_factory=list)

    def take(self, name: str, verdict: Verdict) -> None:
        self.frames += 1
        self.last_ns = time.monotonic_ns()
        if self.first_ns is None:
            self.first_ns = verdict.captured_ns
        if self.keep:
            score = None if verdict.decision is Decision.NOT_JUDGED else verdict.score
            self.results.append(FrameResult(name, verdict.camera_seq, verdict.decision.value, score))


def replay_source(path: Path, *, fps: float | None = None, loop: bool = False) -> SourceSettings:
    """Return the settings of a folder or video that loses no frame.

    Raises:
        CaptureError: there is no such folder or file.
    """
    if not path.exists():
        raise CaptureError(f"{path}: no such folder or video; give a folder of images or a video file")
    kind = SourceKind.FOLDER if path.is_dir() else SourceKind.VIDEO
    return SourceSettings(kind=kind, path=str(path), fps=fps, loop=loop, policy=DropPolicy.WAIT)


def replay(
    settings: BoxSettings,
    *,
    seconds: float | None = None,
    drain_s: float = 30.0,
    keep_results: bool = False,
    recipe: str | None = None,
) -> ReplaySummary:
    """Run a box until its source ends, and wait until the broker has acknowledged every message.

    Args:
        settings: of a box with one camera.
        seconds: stop after this long; None runs to the end of the source.
        drain_s: longest wait for the broker at the end.
        keep_results: list every frame in the summary.
        recipe: product that all frames show, of a bundle for several; None for what was said before, or its router.

    Raises:
        UsageError: the bundle has no such product.
        LinewardError: as :meth:`edge.box.Box.start`.
    """
    if recipe is not None:
        _begin_with(settings, recipe)
    tally = _Tally(keep_results)
    box = Box(settings, on_verdict=tally.take)
    timer = None if seconds is None else threading.Timer(seconds, box.end_sources)
    if timer is not None:
        timer.daemon = True
        timer.start()
    try:
        box.run(drain_s=drain_s)
    finally:
        if timer is not None:
            timer.cancel()
    return _summary(box, tally)


def _begin_with(settings: BoxSettings, recipe: str) -> None:
    products = Bundle.open(settings.bundle).manifest.products
    if recipe not in products:
        known = f"it has {', '.join(products)}" if products else "it is for a single one; leave the recipe out"
        raise UsageError(f"replay: {settings.bundle} has no product {recipe!r}; {known}")
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    RecipeBook(settings.state_dir / RECIPES_FILE).put([camera.name for camera in settings.cameras], recipe)


def _summary(box: Box, tally: _Tally) -> ReplaySummary:
    status = box.status()
    camera = next(iter(status["cameras"].values()))
    counters = camera["counters"]
    seconds = 0.0 if tally.first_ns is None else (tally.last_ns - tally.first_ns) / 1e9
    unsent = 0 if box.outbox is None else box.outbox.depth
    stored = box.metrics.value("alerts") + box.metrics.value("verdicts")
    return ReplaySummary(
        frames=counters["captured"] + counters["corrupt"],
        judged=counters["judged"],
        ok=counters["ok"],
        nok=counters["nok"],
        not_judged=counters["not_judged"],
        events=counters["events"],
        published=max(0, stored - unsent),
        unsent=unsent,
        lost=box.metrics.value("messages_lost"),
        seconds=round(seconds, 3),
        frames_per_second=round(tally.frames / seconds, 2) if tally.frames > 1 and seconds > 0 else None,
        latency_ms=status["latency_ms"],
        engine=status["engine"],
        precision=status["precision"],
        fallback_reason=box.fallback_reason,
        threshold=camera["threshold"],
        warnings=status["warnings"],
        results=tuple(tally.results),
    )
