"""The benchmark of a product switch runs: a few switches on a tiny bundle, each over a real broker and real sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks import product_switch
from tests.edge.tiny_bundle import make_tiny_bundle
from tests.edge.unified_bundle import make_unified_bundle

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.broker


def test_each_way_gives_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_unified_bundle(tmp_path / "bundle")
    goals = product_switch.main(["--bundle", str(bundle.path), "--rounds", "3"])
    assert [goal.limit for goal in goals if np.isfinite(goal.limit)] == [50, 50]
    assert len(goals) == 10
    assert all(goal.value > 0 for goal in goals)
    assert "3 switches each" in capsys.readouterr().out


def test_a_bundle_of_one_product_has_nothing_to_switch(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    with pytest.raises(SystemExit, match="for one product"):
        product_switch.main(["--bundle", str(bundle.path)])
