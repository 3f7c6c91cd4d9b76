"""How many alarms a budget explains, and when a trial of a new memory ends."""

from __future__ import annotations

from math import comb
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.memory.shadow import Outcome, ShadowTrial, most_alarms


@given(
    frames=st.integers(0, 400),
    alpha=st.floats(1e-4, 0.5),
    confidence=st.sampled_from([0.9, 0.99, 0.999]),
)
def test_most_alarms_is_the_quantile_of_the_binomial(frames: int, alpha: float, confidence: float) -> None:
    def below(k: int) -> float:
        return sum(comb(frames, i) * alpha**i * (1 - alpha) ** (frames - i) for i in range(k + 1))

    found = most_alarms(frames, alpha, confidence)

    assert 0 <= found <= frames
    assert found == frames or below(found) >= confidence - 1e-9
    assert found == 0 or below(found - 1) < confidence + 1e-9


def trial(frames: int = 10, seconds: float = 60) -> ShadowTrial:
    return ShadowTrial(frames=frames, seconds=seconds, started_s=100)


def take(one: ShadowTrial, count: int, **changes: Any) -> None:
    values = {
        "alpha": 0.01, "threshold": 1.0, "engine_score": 0.5, "mirror_score": 0.5, "new_score": 0.4, "old_ok": True,
        "new_ok": True,
    }  # fmt: skip
    for _ in range(count):
        one.take("cam", **(values | changes))  # type: ignore[arg-type]


def test_trial_waits_for_frames_and_time() -> None:
    one = trial()
    take(one, 9)
    assert one.find(1000).outcome is Outcome.WAITING
    take(one, 1)
    assert one.find(159).outcome is Outcome.WAITING
    assert one.find(160).outcome is Outcome.READY


def test_alarms_within_the_budget_are_tolerated_and_others_refuse_at_once() -> None:
    one = trial(frames=200)
    take(one, 20)
    allowed = most_alarms(200, 0.01)
    take(one, allowed, new_ok=False)
    assert one.find(100).outcome is Outcome.WAITING
    take(one, 1, new_ok=False)
    finding = one.find(100)
    assert finding.outcome is Outcome.REFUSED
    assert f"{allowed + 1} alarms on {21 + allowed} frames" in finding.reason


def test_at_its_end_only_the_frames_that_were_good_count() -> None:
    one = trial(frames=200, seconds=0)
    take(one, 190, old_ok=False, new_ok=False)
    take(one, 10 - 2)
    take(one, 2, new_ok=False)
    assert one.find(100).outcome is Outcome.REFUSED


def test_alerts_are_no_reason_to_refuse_but_are_counted() -> None:
    one = trial(seconds=0)
    take(one, 5)
    take(one, 10, old_ok=False, new_ok=False)
    take(one, 3, old_ok=False, new_ok=True)
    assert one.find(100).outcome is Outcome.READY
    assert one.figures()["cam"]["released"] == 3


def test_trial_on_alerts_alone_does_not_end() -> None:
    one = trial(seconds=0)
    take(one, 20, old_ok=False, new_ok=False)
    assert one.find(100).outcome is Outcome.WAITING


def test_engine_that_scores_otherwise_than_its_mirror_is_no_base_for_thresholds() -> None:
    one = trial(seconds=0)
    take(one, 20)
    take(one, 1, engine_score=0.53)
    finding = one.find(100)
    assert finding.outcome is Outcome.REFUSED
    assert "3.0% from those" in finding.reason


@pytest.mark.parametrize("name", ["a", "b"])
def test_every_camera_keeps_its_own_budget(name: str) -> None:
    one = trial(frames=20, seconds=0)
    for camera in ("a", "b"):
        for index in range(10):
            one.take(
                camera, alpha=0.01, threshold=1, engine_score=0.5, mirror_score=0.5, new_score=0.5, old_ok=True,
                new_ok=camera != name or index > 1,
            )  # fmt: skip
    assert one.find(100).reason.startswith(f"camera {name}: 2 alarms")
