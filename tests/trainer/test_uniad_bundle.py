"""UniAD through the parity gate at its own limits: what int8 costs on faint defects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import trainer.export as exporting
from deploy.progress import no_progress
from edge.bundle import Precision, Preprocessing
from edge.inference.engines import available_engines
from trainer.data.conveyor import write_default
from trainer.export import export_run
from trainer.fit import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

if TYPE_CHECKING:
    from pathlib import Path

SIDE = 96


def test_int8_passes_the_gate_and_loses_at_most_half_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_default(tmp_path / "data", seed=4, kind="metal", train=60, test_good=1, test_defective=1, side=SIDE)
    run = train(
        method="uniad",
        data=data,
        out=tmp_path / "run",
        preprocessing=Preprocessing(height=SIDE, width=SIDE),
        settings={"steps": 300},
        progress=no_progress,
    )
    monkeypatch.setattr(exporting, "_GATE_IMAGES", 60)
    bundle = export_run(run.path, tmp_path / "bundle", precision="int8", progress=no_progress)
    parity = bundle.manifest.parity
    assert parity["passed"]
    assert parity["int8_head"]
    paths = {path["engine"]: path for path in parity["paths"] if path["precision"] == Precision.INT8.value}
    assert set(paths) == {engine.value for engine in available_engines()}
    for path in paths.values():
        assert path["auroc_drop"] <= 0.005
        assert path["refusals"] == []
