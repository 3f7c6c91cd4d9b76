"""Each benchmark runs: a short turn of everything on a tiny bundle; and its own arithmetic is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import box, resolution, roofline, throughput
from benchmarks._setting import Goal, frames_1080p, print_goals
from edge.bundle import Precision
from tests.edge.tiny_bundle import make_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle

TINY = "--tiny"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def test_throughput_gives_every_figure(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    goals = throughput.main([TINY, "--bundle", str(bundle.path)])
    assert [goal.limit for goal in goals if np.isfinite(goal.limit)] == [0.9, 0.8, 0.9, 0.8]
    assert len(goals) == 10
    assert all(np.isfinite(goal.value) and goal.value > 0 for goal in goals)
    assert "| resize |" in capsys.readouterr().out


def test_take_turns_gives_neighbours_equal_indices() -> None:
    order: list[str] = []
    candidates = {name: lambda _seconds, name=name: order.append(name) or 3 for name in ("a", "b")}
    found = throughput.take_turns(candidates, rounds=2, seconds=0.001)
    # Warm-up a b, then a b, then b a.
    assert "".join(order) == "ababba"
    assert {name: len(turns) for name, turns in found.items()} == {"a": 2, "b": 2}


def test_roofline_counts_what_is_computed(bundle: Bundle) -> None:
    made = roofline.graphs(bundle, Precision.FLOAT32, 1)
    # 4x4 and 2x2 convolutions of 3 -> 8 -> 12 channels; 64 patches of 20 channels against 32 rows.
    assert made["trunk"].giga_operations * 1e9 == pytest.approx(2 * (16 * 16 * 8 * 3 * 16 + 8 * 8 * 12 * 8 * 4))
    assert made["head"].giga_operations * 1e9 == pytest.approx(2 * 64 * 20 * 32)


def test_roofline_gives_a_share_of_a_rate_in_the_precision_it_names(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    goals = roofline.measure(bundle, Precision.INT8, 1, rounds=2, seconds=0.001)
    assert goals[0].limit == roofline.GOALS[Precision.INT8]
    assert all(np.isfinite(goal.value) and goal.value > 0 for goal in goals)
    assert "| OpenVINO matmul |" in capsys.readouterr().out


@pytest.mark.broker
def test_box_gives_every_figure(bundle: Bundle) -> None:
    goals = box.main([TINY, "--bundle", str(bundle.path)])
    assert [goal.unit for goal in goals] == ["MB", "s", "s", "s", "ms"]
    assert all(np.isfinite(goal.value) and goal.value > 0 for goal in goals)


def test_box_refuses_a_bundle_that_sees_nothing(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(box, "pool_score", lambda *_: 1.0)
    with pytest.raises(SystemExit, match="no alerts"):
        box.write_frames(bundle, tmp_path / "frames")


@pytest.mark.slow  # a whole benchmark, if a small one: half a minute to a minute
def test_resolution_gives_a_table_and_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = resolution.main([TINY, "--image", str(tmp_path / "curves.png")])
    (tilings,) = found.values()
    assert [one.canvas for one in tilings] == [(224, 224), (448, 896)]
    assert all(0 <= value <= 1 for one in tilings for value in (one.false_alarms, *one.recall.values()))
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "192 px" in capsys.readouterr().out


@pytest.mark.parametrize("size", [6, 48, 192])
def test_with_defect_has_the_size_asked_for(size: int) -> None:
    frame = frames_1080p(1)[0]
    changed = np.argwhere((resolution.with_defect(frame, size, (0, size)) != frame).any(2))
    longer = (changed.max(0) - changed.min(0) + 1).max()
    assert 0.4 * size <= longer <= size


def test_cameras_show_no_surface_twice() -> None:
    shoot = resolution.camera_of("metal", 0)
    assert shoot(0).shape == (1080, 1920, 3)
    assert np.array_equal(shoot(1), shoot(1))
    assert not np.array_equal(shoot(0), shoot(1))


def test_goals_say_what_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    print_goals(
        [
            Goal("share", 0.79, 0.8, True, "-"),
            Goal("memory", 299.0, 300.0, False, "-", "MB"),
            Goal("nothing", float("nan"), 1.0, False, "-"),
        ]
    )
    verdicts = [line.split("|")[4].strip() for line in capsys.readouterr().out.splitlines()[2:5]]
    assert verdicts == ["missed", "met", "missed"]
