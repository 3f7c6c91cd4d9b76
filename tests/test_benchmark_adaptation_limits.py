"""The benchmark of what adaptation hides: its defects cover what they say, its guards guard, its figures are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

import edge.adaptation.measure as measuring
from benchmarks._limits import DEFECTS, GUARDED, GUARDS, Course, covering, trimming
from benchmarks.adaptation_limits import (
    HEADS,
    KINDS,
    NO_GUARD,
    NONE,
    SHARES,
    SLOW,
    SUDDEN,
    WAYS,
    Still,
    Turn,
    draw,
    goals,
)
from edge.adaptation.settings import AdaptationSettings

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = np.random.default_rng(0).integers(40, 200, (64, 64, 3)).astype(np.uint8)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_of_no_strength_changes_nothing_and_a_stronger_one_more(defect: str) -> None:
    smooth = cv2.GaussianBlur(IMAGE, (0, 0), 2)
    away = [np.abs(DEFECTS[defect](smooth, strength).astype(float) - smooth).mean() for strength in (0.0, 0.5, 1.0)]
    assert away[0] == 0
    assert away[2] > away[1] > 0.5


@pytest.mark.parametrize("share", SHARES)
def test_a_defect_covers_its_share_and_leaves_the_rest(share: float) -> None:
    for seed in range(5):
        found = covering(IMAGE, "yellowed", share, np.random.default_rng(seed))
        assert (found != IMAGE).any(2).mean() == pytest.approx(share, abs=0.02)


def test_guards_are_the_boxs_own_but_for_what_is_off() -> None:
    usual = AdaptationSettings()
    assert GUARDS[GUARDED].settings() == GUARDS["not trimmed"].settings() == usual
    assert GUARDS["no bound"].settings().bound > 1000 * usual.bound
    assert GUARDS["no bound"].settings().freeze_rate == usual.freeze_rate
    assert GUARDS["alarms teach"].settings().freeze_rate == 1
    assert GUARDS["alarms teach"].settings().bound == usual.bound
    faster = GUARDS[GUARDED].settings(5)
    assert (faster.half_life, faster.every_frames) == (usual.half_life / 5, usual.every_frames / 5)


def test_trimming_is_off_for_as_long_as_asked() -> None:
    usual = measuring.TRIM
    with trimming(on=False):
        off = measuring.TRIM
    with trimming(on=True):
        on = measuring.TRIM
    assert (off, on, measuring.TRIM) == (0, usual, usual)


def test_a_line_is_noticed_where_half_a_window_alarms() -> None:
    alarms = np.arange(100) >= 50
    strengths = np.linspace(0, 1, 100)
    course = Course(alarms, np.zeros(100), "following")
    # Ten frames after the first alarm, half of twenty have alarmed.
    assert course.noticed(strengths, 20) == strengths[59]
    assert np.isnan(Course(np.zeros(100, bool), np.zeros(100), "").noticed(strengths, 20))
    assert len(course.rates(20)) == 81


def figures(*, running: float, guarded: float) -> tuple[list[Still], list[Turn]]:
    """Figures of a detector that finds all uncorrected, and as much as is said otherwise."""
    cases = [("", 0.0), *((name, share) for name in DEFECTS for share in SHARES)]
    kinds = [(kind, head) for kind in KINDS for head in HEADS]
    new = [
        Still(kind, head, way, name, share, running if name and way == "running" else float(bool(name)))
        for kind, head in kinds
        for way in WAYS
        for name, share in cases
    ]
    ends = {NONE: 1.0, GUARDED: guarded, NO_GUARD: 0.0}
    turned = [
        Turn(kind, head, guard, name, how, 1.0 if end else None, end, 2.0, "frozen", (0.0,) * 60 + (end,) * 41)
        for kind, head in kinds
        for guard, end in ends.items()
        for name in DEFECTS
        for how in (SLOW, SUDDEN)
    ]
    return new, turned


@pytest.mark.parametrize(("running", "guarded", "met"), [(1.0, 1.0, [True, True]), (0.97, 0.9, [False, False])])
def test_goals_are_of_what_is_lost_and_left(running: float, guarded: float, met: list[bool]) -> None:
    found = {goal.name: goal for goal in goals(*figures(running=running, guarded=guarded))}
    limited = [goal for goal in found.values() if np.isfinite(goal.limit)]
    assert [goal.met for goal in limited] == met
    assert found["small defects lost, running"].value == pytest.approx(1 - running)
    assert found["alarms left, sudden defect, guarded"].value == pytest.approx(guarded)
    assert found["alarms left, slow defect, no guard"].value == 0


def test_a_line_that_never_alarmed_tells_nothing_of_guards() -> None:
    new, turned = figures(running=1, guarded=1)
    silent = [Turn(**{**vars_of(one), "end": 0.0}) if one.guard == NONE else one for one in turned]
    found = {goal.name: goal for goal in goals(new, silent)}
    assert np.isnan(found["alarms left, sudden defect, guarded"].value)
    assert not found["alarms left, sudden defect, guarded"].met


def vars_of(turn: Turn) -> dict[str, object]:
    return {name: getattr(turn, name) for name in turn.__dataclass_fields__}


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    draw(*figures(running=0.9, guarded=0.8), tmp_path / "deep" / "limits.png")
    picture = cv2.imread(str(tmp_path / "deep" / "limits.png"))
    assert picture.shape[1] == 1300
    assert picture.std() > 10
