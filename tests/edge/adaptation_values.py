"""Moments, references and judged frames for tests of what follows a line."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np

from edge.adaptation.moments import IMAGE, Moments, Reference
from edge.frames import Decision, Frame, JudgedFrame, Prediction, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.adaptation.follower import Follower

TAP, CHANNELS = "s4", 5
AT = datetime(2026, 1, 1, tzinfo=timezone.utc)


def moments(light: float = 0.0, gain: float = 1.0, tap: float = 0.0) -> Moments:
    """Moments ``light`` grey levels brighter, ``gain`` times as contrasty, a tap ``tap`` higher than the reference."""
    image, values = np.array([90.0, 100.0, 110.0]), np.linspace(-1, 1, CHANNELS)
    stds = np.array([20.0, 22.0, 24.0]), np.linspace(0.5, 1.5, CHANNELS)
    return Moments(
        {IMAGE: np.float32(image + light), TAP: np.float32(values + tap)},
        {IMAGE: np.float32(stds[0] * gain), TAP: np.float32(stds[1])},
    )


def reference(experts: int = 1) -> Reference:
    """Experts that differ by 10 grey levels each."""
    names = tuple(f"product_{i}" for i in range(experts)) if experts > 1 else ("",)
    return Reference(tuple(moments(light=10.0 * i) for i in range(experts)), (0.25,) * experts, names)


def judged(
    seen: Moments | None,
    *,
    decision: Decision = Decision.OK,
    alarmed: bool | None = None,
    version: int = 0,
    route: Sequence[float] | None = None,
) -> JudgedFrame:
    """Return a frame at the end of its way."""
    frame = Frame(np.zeros((2, 2, 3), np.uint8), "cam", 0, time.monotonic_ns(), AT)
    router = None if route is None else np.array(route, np.float32)
    prediction = Prediction(
        np.zeros((1, 1), np.float32), frame, 0, 0, moments_version=version, moments=seen, route=router
    )
    verdict = Verdict(decision, 0.0, 1.0, 0.5, "cam", 0, 0, AT)
    return JudgedFrame(frame, prediction, verdict, alarmed=decision is Decision.NOK if alarmed is None else alarmed)


def show(follower: Follower, seen: Moments, times: int = 1, *, nok: bool = False) -> None:
    """Let it take frames of a single product, each seen as it asks."""
    for _ in range(times):
        decision = Decision.NOK if nok else Decision.OK
        follower.take(judged(seen, decision=decision, version=follower.look().version))
