"""The compression benchmark: every bank in its table, bytes as a bundle stores them, a curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks import compression
from edge.memory.rows import RowsPrecision
from trainer.methods.memory.fit import MemoryConfig
from trainer.methods.memory.model import MemoryHead
from trainer.methods.memory.reduce import Reduction

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow  # a whole benchmark, if a small one: half a minute to a minute
def test_compression_gives_every_bank_and_a_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--size", "64", "--train", "16", "--test", "8", "--rows", "20", "40"]
    points = compression.main([*settings, "--image", str(tmp_path / "curve.png"), "--json", str(tmp_path / "all.json")])
    assert len(points) == 3 * len(Reduction) * len(RowsPrecision) * 2
    for point in points:
        assert 0 <= point.image_auroc <= 1
        assert 0 <= point.aupro <= 1
        assert point.fit_s > 0
        # Levels of 24, 40 and 112 channels, the finest with half the rows.
        values, rows = point.rows * (12 + 40 + 112), point.rows * 2.5
        assert point.bytes == (values * 4 if point.stored == "float32" else values + 4 * rows)
    assert (tmp_path / "curve.png").stat().st_size > 1000
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| coreset", "| kmeans"))]
    assert len(lines) == 8


def test_rounded_keeps_all_but_the_rounding() -> None:
    head = MemoryHead(rows=(4, 5, 6), channels=(24, 40, 112), background=0.3, sites=None, site_weight=0.0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in head.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    found = compression.rounded(head, MemoryConfig())
    assert found.int8_state == found.state_names
    for name, tensor in head.state_dict().items():
        moved = float((found.state_dict()[name] - tensor).abs().max())
        assert (0 < moved < 0.02) if name in head.state_names else moved == 0


def test_mean_leaves_folders_without_masks_out() -> None:
    point = compression.Point("a", "coreset", "float32", 10, 100, 0.5, 0.25, 1.0)
    bare = compression.Point("b", "coreset", "float32", 10, 100, 0.7, float("nan"), 3.0)
    assert compression.mean_of([point, bare], "aupro") == 0.25
    assert compression.mean_of([point, bare], "image_auroc") == pytest.approx(0.6)
    assert np.isnan(compression.mean_of([bare], "aupro"))
