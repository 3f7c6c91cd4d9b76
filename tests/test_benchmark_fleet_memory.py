"""The benchmarks of the aggregator: what they count, and a short turn of the one that needs no images."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import aggregate, poison
from benchmarks._updates import make_update

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(0, 20, 0.0, 0.1611), (17, 20, 0.6396, 0.9476), (20, 20, 0.8389, 1.0)]
)
def test_wilson_is_the_published_interval(hits: int, count: int, low: float, high: float) -> None:
    assert poison.wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_reports_count_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    line = {"scene": "s", "boxes": 6, "seed": 0, "known": True}
    lines = [line | {"share": 1.0, "flagged": flagged} for flagged in (True, True, False, True)]
    lines += [line | {"share": 0.0, "flagged": False, "known": known} for known in (True, False)]
    goals = {goal.name: goal.value for goal in poison.report_detection(lines)}
    assert goals == {
        "flagged: 100%": 0.75,
        "flagged: honest, condition known": 0,
        "flagged: honest, condition unseen": 0,
    }
    cost = {"kind": "noise", "boxes": 6, "alone": 0.9, "open": 0.8, "gated": 0.89, "caught": 1, "liars": 1}
    goals = {goal.name: goal.value for goal in poison.report_cost([cost, cost | {"gated": 0.87}])}
    assert goals["I-AUROC lost to 1 of 6 with noise"] == pytest.approx(0.02)
    assert goals["I-AUROC lost to 1 of 6 with noise, no gate"] == pytest.approx(0.1)
    assert "2 of 2" in capsys.readouterr().out


def test_updates_are_what_travels() -> None:
    one = make_update(np.full((3, 2), 0.1, np.float32), np.full(3, 7, np.float32), number=3, product="p", n_frames=5)
    assert (one.rows.astype(np.float16).astype(np.float32) == one.rows).all()
    assert one.box == "bench/3"
    assert one.frames.max() == 5


@pytest.mark.slow
def test_aggregate_benchmark_measures_each_line_in_its_own_process(tmp_path: Path) -> None:
    found = aggregate.main(["--boxes", "2", "3", "--compare", "3", "--json", str(tmp_path / "a.json")])
    assert [line["how"] for line in found[-2:]] == [aggregate.FULL, aggregate.PEER]
    assert len({line["sha256"] for line in found if line["boxes"] == 3 and line["sha256"]}) == 1
    assert json.loads((tmp_path / "a.json").read_text()) == found
    errors = [line["error"] for line in found if line["boxes"] == 3]
    assert max(errors) < 1.2 * min(errors)
