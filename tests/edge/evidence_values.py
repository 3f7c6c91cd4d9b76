"""Judged frames as a camera hands them to whoever keeps evidence."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from edge.frames import AnomalyEvent, Decision, EventPhase, Frame, JudgedFrame, Prediction, Region, Verdict

if TYPE_CHECKING:
    from edge.bundle import Bundle

BEGAN = datetime(2030, 1, 2, 3, 4, 5, 678900, tzinfo=timezone.utc)
EVENT_ID = "0123456789abcdef0123456789abcdef"
SIDE = 64


def bundle(bundle_id: str = "ab" * 32) -> Bundle:
    """As much of a bundle as evidence names."""
    manifest = SimpleNamespace(method="tiny", product="bolt", preprocessing=SimpleNamespace(crop=None))
    return cast("Bundle", SimpleNamespace(id=bundle_id, manifest=manifest))


def anomaly_map(seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(5, 2, (8, 8)).astype(np.float32)


def judged(
    seq: int,
    *,
    camera: str = "cam",
    decision: Decision = Decision.OK,
    phase: EventPhase | None = None,
    event_id: str = EVENT_ID,
    part_id: str | None = None,
    side: int = SIDE,
) -> JudgedFrame:
    """Frame ``seq`` of a camera; its pixels are all ``seq``, its map is drawn from it."""
    image = np.full((side, side, 3), seq % 256, np.uint8)
    moment = BEGAN + timedelta(milliseconds=40 * seq)
    frame = Frame(image, camera, seq, 1_000_000 * seq, moment, part_id)
    regions = (Region(8, 16, 16, 24, 300, 9.5),) if decision is Decision.NOK else ()
    verdict = Verdict(
        decision, 9.5, 4.0, 0.01, camera, seq, frame.captured_ns, moment, part_id, regions, latency_ms={"total": 3.0}
    )
    events: tuple[AnomalyEvent, ...] = ()
    if phase is not None:
        events = (
            AnomalyEvent(event_id, phase, camera, seq, frame.captured_ns, moment, 9.5, 9.5, 4.0, 0.01, 1, regions),
        )
    return JudgedFrame(frame, Prediction(anomaly_map(seq), frame, 1, 1), verdict, events, alarmed=bool(regions))
