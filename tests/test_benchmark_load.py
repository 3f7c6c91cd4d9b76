"""The benchmarks of load run, and their own arithmetic is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import alert_latency, cameras
from benchmarks._load_box import Report
from edge.capture.settings import DropPolicy
from tests.edge.tiny_bundle import make_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle

TINY = "--tiny"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def report(*, judged: int = 90, dropped: int = 10, rss_mb: float = 100.0) -> Report:
    totals = {"captured": 100, "judged": judged, "not_judged": 0, "dropped": dropped, "corrupt": 0}
    return Report(1.0, 100, judged, dropped, {"p50": 1.0, "p99": 2.0}, rss_mb, 9, 0.5, totals)


@pytest.mark.broker
def test_cameras_gives_a_curve_for_each_strategy(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    goals = cameras.main([TINY, "--bundle", str(bundle.path), "--image", str(tmp_path / "load.png")])

    memory, unaccounted, share = goals
    assert (memory.limit, memory.unit) == (cameras.CAMERA_GOAL_MB, "MB")
    assert (unaccounted.value, unaccounted.met) == (0, True)
    assert 0 < share.value <= 1
    assert (tmp_path / "load.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert all(f"| 2 | {policy.value} |" in out for policy in DropPolicy)


@pytest.mark.broker
def test_alert_latency_gives_every_figure(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    goals = alert_latency.main([TINY, "--bundle", str(bundle.path)])

    assert goals[0].limit == alert_latency.LATENCY_GOAL_MS
    assert all(np.isfinite(goal.value) and goal.value > 0 for goal in goals[:2])
    assert (goals[2].value, goals[2].met) == (0, True)
    assert "fsync" in capsys.readouterr().out


def test_memory_per_camera_is_a_slope() -> None:
    reports = {count: report(rss_mb=150 + 3 * count) for count in (1, 2, 8)}
    assert cameras.memory_per_camera(reports) == pytest.approx(3)


def test_a_frame_that_is_lost_track_of_is_missed() -> None:
    curve = {policy: {1: report(), 2: report()} for policy in DropPolicy}
    assert cameras.goals_of(curve)[1].met
    curve[DropPolicy.WAIT][2] = report(judged=89)
    goal = cameras.goals_of(curve)[1]
    assert (goal.value, goal.met) == (1, False)


def test_the_cycle_of_alerts_has_one_event() -> None:
    defective = [index % 2 == 1 for index in alert_latency.CYCLE]
    assert len(defective) == alert_latency.FPS
    assert sum(defective) > alert_latency.EVENTS["enter_hits"]
    assert defective.count(False) > alert_latency.EVENTS["leave_calm"]
