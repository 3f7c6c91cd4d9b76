"""Versions of thresholds: they count every change, of whatever cause, and survive restarts, damage and a full disk."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edge.bundle import CalibrationScores, Pooling
from edge.judgement.min_area import MinArea
from edge.judgement.threshold import RunTimeThreshold
from edge.judgement.threshold_versions import ThresholdVersions
from edge.judgement.verdicts import Judge

if TYPE_CHECKING:
    from pathlib import Path


def calibration(highest: float = 1.0) -> CalibrationScores:
    scores = np.linspace(0, highest, 40, dtype=np.float32)
    maps = np.repeat(scores, 16).reshape(40, 4, 4).astype(np.float16)
    return CalibrationScores(scores=scores, maps=maps, groups=np.array([f"g{i}" for i in range(40)]))


def a_judge(**changes: Any) -> Judge:
    values = {"calibration": calibration(), "pooling": Pooling(cells=1), "crop": None, "alpha": 0.1}
    return Judge(**(values | {"bundle_id": "ab" * 32} | changes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "versions.json"


def test_first_threshold_is_version_0_and_the_same_one_stays(path: Path) -> None:
    versions = ThresholdVersions(path)
    assert [versions.number("cam", a_judge()) for _ in range(3)] == [0, 0, 0]
    assert versions.number("other", a_judge()) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"bundle_id": "cd" * 32},
        {"memory_version": 1},
        {"calibration": calibration(2.0)},
        {"min_area": MinArea(pixels=4)},
        {"leave_quantile": 0.5},
        {"run_time": RunTimeThreshold(bundle_id="ab" * 32, memory_version=0, value=0.9, scope=a_judge().scope)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_cause_of_another_threshold_counts_once(path: Path, change: dict[str, Any]) -> None:
    versions = ThresholdVersions(path)
    versions.number("cam", a_judge())
    changed = a_judge(**change)
    assert [versions.number("cam", changed) for _ in range(2)] == [1, 1]
    assert versions.number("other", a_judge()) == 0
    # Going back is a change, too: a version names one stretch of time.
    assert versions.number("cam", a_judge()) == 2


def test_count_survives_a_restart_and_notices_what_changed_meanwhile(path: Path) -> None:
    first = ThresholdVersions(path)
    first.number("cam", a_judge())
    first.number("cam", a_judge(memory_version=1))
    again = ThresholdVersions(path)
    assert again.of("cam") == 1
    assert again.number("cam", a_judge(memory_version=1)) == 1
    assert ThresholdVersions(path).number("cam", a_judge(memory_version=2)) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"schema": "lineward.threshold_versions/1"}', b"\xff" * 9])
def test_damage_is_put_aside_and_no_number_is_given_twice(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    versions = ThresholdVersions(path)
    assert "begin at another number" in versions.damage
    assert versions.number("cam", a_judge()) > 1_000_000_000
    assert [one for one in path.parent.iterdir() if "damaged" in one.name]
    assert not ThresholdVersions(path).damage


def test_disk_that_refuses_stops_nothing_and_is_asked_again(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    versions = ThresholdVersions(folder / "versions.json")
    versions.number("cam", a_judge())
    assert versions.number("cam", a_judge(memory_version=1)) == 1
    assert "cannot be kept" in versions.trouble
    folder.mkdir()
    versions.save()
    assert not versions.trouble
    assert json.loads((folder / "versions.json").read_text())["cameras"]["cam"]["version"] == 1
    shutil.rmtree(folder)
    versions.save()
    assert not versions.trouble, "what is kept is not written again"
