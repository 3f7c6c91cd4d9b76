"""What a camera's worker says of itself: its status, and what an operator should know. It changes nothing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from edge.bundle import Bundle
    from edge.capture.capture import Capture
    from edge.health.camera_watch import CameraWatch
    from edge.judgement.judges import Judges
    from edge.judgement.verdicts import Judge
    from edge.settings import CameraSettings


def camera_status(
    settings: CameraSettings,
    *,
    bundle: Bundle,
    capture: Capture,
    counts: Mapping[str, int],
    judges: Judges,
    failure: str,
    health: CameraWatch | None,
    samples: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return what the box's status says of one camera, as JSON values.

    Args:
        settings: of the camera.
        bundle: that judges it.
        capture: of the moment.
        counts: of its frames.
        judges: threshold and levels are those that the last frame met; of several products all are told beside them.
        failure: why the last frame could not be judged; empty when it was.
        health: its watch, where there is one.
        samples: what became of a signal's samples; left out where there are none.
    """
    judge, counters = judges.met, capture.counters
    found = {
        "state": capture.state.value,
        "error": capture.error,
        "mode": settings.mode.value,
        "product": bundle.manifest.product,
        "bundle": {"id": bundle.id, "method": bundle.manifest.method},
        "memory_version": judge.memory_version,
        "source": settings.source.label,
        "queued": counters.captured - counters.delivered - counters.dropped - counters.skipped,
        "counters": dict(counts),
        **_of(judge),
        "failure": failure or None,
        "health": None if health is None else health.status(),
    }
    if samples:
        found["samples"] = dict(samples)
    if judge.product:
        found["judged_as"] = judge.product
        found["products"] = {one.product: _of(one) for one in judges.all}
    return found


def camera_warnings(
    settings: CameraSettings, *, capture: Capture, judges: Judges, failure: str, health: CameraWatch | None
) -> list[str]:
    """Return what an operator should know of one camera, each with its name."""
    found: list[str] = []
    for judge in judges.all:
        of = f"{judge.product}: " if judge.product else ""
        found += [of + text for text in _of_threshold(settings, judge)]
    found += capture.remarks
    found += _all(() if health is None else health.warnings(), failure)
    return [f"{settings.name}: {text}" for text in found]


def _of(judge: Judge) -> dict[str, Any]:
    return {
        "threshold": dataclasses.asdict(judge.threshold),
        "threshold_version": judge.threshold_version,
        "levels": {name: getattr(judge, name) for name in ("enter_level", "leave_level", "threshold_source")},
    }


def _of_threshold(settings: CameraSettings, judge: Judge) -> list[str]:
    found, threshold = list(judge.warnings), judge.threshold
    if threshold.method == "tail_fit":
        found.append(
            f"the budget of {settings.budget_text(threshold.alpha)} is not supported: {threshold.n} "
            f"calibration scores in {threshold.n_groups} groups promise "
            f"{settings.budget_text(threshold.smallest_supported_alpha)} at best; the threshold is "
            "extrapolated from them"
        )
    return found


def _all(texts: Iterable[str], failure: str) -> list[str]:
    return [*texts, *([failure] if failure else [])]
