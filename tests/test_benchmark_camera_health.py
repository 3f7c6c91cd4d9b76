"""The benchmark of camera health gives every figure, and would show an alarm and a miss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import cv2

from benchmarks import camera_health
from edge.health.settings import CameraFault

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_it_gives_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(camera_health, "PATIENCE_S", 16.0)
    monkeypatch.setattr(camera_health, "FAULT_S", 38.0)
    scene = camera_health.Scene(1, camera_health.Conditions())
    rng = camera_health.np.random.default_rng(0)
    for index in range(3):
        cv2.imwrite(str(tmp_path / f"{index}.png"), scene.frame(index, rng=rng))

    goals = camera_health.main(["--tiny", "--data", str(tmp_path)])

    figures = {goal.name: goal.value for goal in goals}
    assert figures["false alarms per hour of video"] == 0
    assert {name: value for name, value in figures.items() if name.startswith("found")} == {
        "found: dark": 1.0, "found: blurred": 1.0, "found: moved": 1.0
    }  # fmt: skip
    assert all(math.isfinite(goal.value) for goal in goals)
    assert "| . | 3 | nothing |" in capsys.readouterr().out


def test_alarm_and_miss_would_show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = camera_health.Played([(1.0, CameraFault.DARK, True), (2.0, CameraFault.DARK, False)], 36.0, [])
    monkeypatch.setattr(camera_health, "play", lambda *_, **__: told)
    monkeypatch.setattr(camera_health, "through_encoder", lambda *_: (0, 0.0))

    assert camera_health.false_alarms([0], 36.0, ["running"]) == (1, 0.01)
    found = camera_health.detections([0], [(CameraFault.MOVED, "8 px", {})])

    assert found == {(CameraFault.MOVED, "8 px"): [math.inf]}
    assert "| moved | 8 px | 0 of 1 | - | dark |" in capsys.readouterr().out
