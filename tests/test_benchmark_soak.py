"""The soak's arithmetic is right; and, among the slow tests, two minutes of its faults leave a box as it was."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import soak
from benchmarks._soak_parts import Sample, Soak
from benchmarks.soak import theil_sen
from tests.edge.tiny_bundle import make_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

MINUTE = 60.0


def test_a_slope_is_robust_and_has_an_interval() -> None:
    rng = np.random.default_rng(0)
    hours = np.arange(20) / 60
    megabytes = 150 + 3 * hours + rng.normal(0, 0.02, 20)
    megabytes[7] += 50
    slope, low, high = theil_sen(hours.tolist(), megabytes.tolist())

    assert low < 3 < high
    assert slope == pytest.approx(3, abs=0.3)
    assert high - low < 1


def test_a_flat_box_has_no_slope() -> None:
    assert theil_sen([0.0, 1.0, 2.0, 3.0], [5.0] * 4) == (0.0, 0.0, 0.0)


def test_what_each_fault_leaves_for_a_while_is_no_slope() -> None:
    minutes = list(range(24))
    left = [0.0, 4.0, 1.0, 0.0, 6.0, 2.0, 3.0, 1.0] * 3
    seasons = [minute % soak.FAULTS for minute in minutes]
    assert theil_sen(minutes, left, seasons) == (0.0, 0.0, 0.0)
    slope, low, high = theil_sen(
        minutes, [one + 0.5 * minute for one, minute in zip(left, minutes, strict=True)], seasons
    )
    assert (slope, low, high) == pytest.approx((0.5, 0.5, 0.5))
    assert theil_sen(minutes, left)[2] > 0.05


def test_two_points_are_no_slope() -> None:
    assert np.isnan(theil_sen([0.0, 1.0], [1.0, 2.0])).all()


def seen(**changes: list[float]) -> Soak:
    """Four minutes of a box, ten samples each; ``changes`` are the values at the calm end of each minute."""
    values = {"rss": [100.0] * 4, "descriptors": [20.0] * 4, "threads": [9.0] * 4} | changes
    found = Soak(recovered={f"{minute + 1} fault": True for minute in range(4)})
    for minute in range(4):
        for tenth in range(10):
            calm = tenth >= 8
            # In the midst of a fault nothing is promised.
            rss, descriptors, threads = (
                values[name][minute] if calm else 999.0 for name in ("rss", "descriptors", "threads")
            )
            at_s = MINUTE * minute + 6 * tenth
            found.samples.append(Sample(at_s, rss, int(descriptors), int(threads), calm))
    return found


END = {
    "code": 0, "empty": 100_000, "size": 150_000, "log": 0, "kept": 100_000, "stored": 50, "missing": 0,
    "duplicates": 3, "evidence_mb": 1.0,
}  # fmt: skip


def missed(found: Soak, **end: float) -> list[str]:
    return [goal.name for goal in soak.goals_of(found, END | end, MINUTE, warm=0) if not goal.met]


def test_a_box_that_stays_as_it_was_meets_every_goal() -> None:
    assert missed(seen()) == []


@pytest.mark.parametrize(
    ("changes", "end", "goal"),
    [
        ({"rss": [100.0, 100.1, 100.2, 100.3]}, {}, "slope of resident memory"),
        ({"descriptors": [20.0, 20.0, 20.0, 23.0]}, {}, "descriptors"),
        ({"threads": [9.0, 9.0, 10.0, 9.0]}, {}, "threads"),
        ({}, {"missing": 1}, "messages lost"),
        ({}, {"size": 2_600_000}, "outbox on disk"),
        ({}, {"code": 1}, "exit code"),
    ],
)
def test_each_goal_can_be_missed(changes: dict[str, list[float]], end: dict[str, float], goal: str) -> None:
    (found,) = missed(seen(**changes), **end)
    assert found.startswith(goal)


def test_a_camera_that_does_not_come_back_is_missed() -> None:
    found = seen()
    found.recovered["3 fault"] = False
    assert missed(found) == ["periods after which a camera was not judged"]


@pytest.mark.slow
@pytest.mark.broker
@pytest.mark.skipif(shutil.which("gst-launch-1.0") is None, reason="needs the Debian package gstreamer1.0-tools")
def test_two_minutes_of_faults_leave_a_box_as_it_was(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "tiny")
    place = ["--bundle", str(bundle.path), "--image", str(tmp_path / "soak.png")]
    goals = soak.main([*place, "--period", "14", "--periods", "8", "--warm", "1"])

    # Two minutes say nothing of a slope per hour.
    assert [goal.name for goal in goals if not goal.met and not goal.name.startswith("slope")] == []
    assert (tmp_path / "soak.png").stat().st_size > 1000
