"""The benchmark of faults: every part has goals and a control, and one that breaks does not hide the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import faults
from benchmarks._setting import Goal

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def parts() -> Iterator[dict[str, object]]:
    before = dict(faults.PARTS)
    yield faults.PARTS  # type: ignore[misc]
    faults.PARTS.clear()
    faults.PARTS.update(before)


def test_part_gives_its_goals_and_a_control(capsys: pytest.CaptureFixture[str]) -> None:
    goals = faults.main(["--tiny", "--part", "damage"])
    assert [goal.met for goal in goals] == [True, True, True]
    assert sum(goal.name.startswith("control: ") for goal in goals) == 1
    assert "damage: Files that a box left when it died." in capsys.readouterr().out


def test_part_that_breaks_is_missed_and_the_next_one_runs(parts: dict[str, object]) -> None:
    def broken(_setting: faults.Setting) -> list[Goal]:
        raise AssertionError("the box\ndid not start")

    def whole(_setting: faults.Setting) -> list[Goal]:
        return [Goal("whole", 0.0, 0.0, False, "")]

    parts.clear()
    parts.update({"first": broken, "second": whole})
    first, second = faults.main(["--tiny"])
    assert (first.name, first.met, first.spread) == ("first did not end", False, "the box did not start")
    assert second.met
