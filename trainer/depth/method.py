"""The memory detector on local geometry: banks of what good surfaces look like, holes left out.

The head is that of the memory method; only what it learns from, and where its map counts, differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch.nn import functional

from edge.errors import DataError
from trainer.depth.geometry import CHANNELS, LEVELS, VALID
from trainer.methods.base import MethodConfig
from trainer.methods.memory.model import STRIDES, MemoryHead, level_patches
from trainer.methods.memory.reduce import greedy_coreset, nearest, weighted_average_reduce, whitening

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.methods.base import Features

NAME = "depth_memory"

_BATCH = 8
_LEAST_ROWS = 8
_MOSTLY = 0.5
"""Share of a cell's points that must be valid for it to be learned from and judged."""


class DepthConfig(MethodConfig):
    """Settings of the depth detector; the README says what each was measured to do."""

    rows: int = Field(1000, ge=2, le=2000, description="Rows of each level's bank.")
    candidates: int = Field(20_000, ge=1, description="Cells, drawn at random, that anchors are chosen from.")
    whitening: float = Field(0.3, gt=0, description="Added to every eigenvalue, as a share of their mean.")
    fine_weight: float = Field(1.0, ge=0, description="Weight of the finest level in the map.")
    middle_weight: float = Field(1.0, ge=0, description="Weight of the middle level.")
    coarse_weight: float = Field(1.0, ge=0, description="Weight of the coarsest level.")


class DepthMemoryHead(MemoryHead):
    """A memory head that says 0 where nothing was measured.

    Taps are ``s4``, ``s8``, ``s16`` and ``valid`` of :class:`trainer.depth.geometry.GeometryTrunk`; there is no
    background and there are no sites, so that no other cell lies below 0.
    """

    tap_names = (*LEVELS, VALID)

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(rows=rows, channels=(CHANNELS,) * len(LEVELS), background=0.0, sites=None, site_weight=0.0)

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the map float32 [N, H / 4, W / 4], >= 0, and the rows float32 [N, H / 8 * W / 8, 33]."""
        *levels, valid = taps
        anomaly_map, embedding = super().forward(*levels)
        return anomaly_map * (valid[:, 0] >= _MOSTLY).float(), embedding


def fit_depth(features: Features, config: DepthConfig, generator: torch.Generator) -> DepthMemoryHead:
    """Learn the banks from good scans.

    Args:
        features: taps of at least two good scans.
        config: settings.
        generator: of candidates and anchors.

    Raises:
        DataError: fewer than two scans, or too little of them was measured.
    """
    if len(features) < 2:  # noqa: PLR2004
        raise DataError("the depth detector needs at least 2 good scans; add some to train/good")
    transforms, banks, scales = [], [], []
    for name in LEVELS:
        mean, matrix = whitening(_rows(features, name, torch.arange(len(features))), config.whitening)
        if not (torch.isfinite(mean).all() and torch.isfinite(matrix).all()):
            raise DataError(f"geometry at {name} is not finite or nowhere known; check the scans' units and holes")
        scans = [(rows - mean) @ matrix for rows in _by_scan(features, name)]
        transforms.append((mean, matrix))
        banks.append(_bank(torch.cat(scans), config, config.rows, generator))
        scales.append(_mean_distance(scans, config, generator))
    head = DepthMemoryHead(tuple(len(bank) for bank in banks))
    weights = (config.fine_weight, config.middle_weight, config.coarse_weight)
    for index, name in enumerate(LEVELS):
        mean, matrix = transforms[index]
        layer = head.get_submodule(f"whiten_{name}")
        with torch.no_grad():
            layer.weight.copy_(matrix.T[:, :, None, None])
            layer.bias.copy_(-(mean @ matrix))
        head.get_buffer(f"bank_{name}").copy_(banks[index])
        head.get_buffer("scales")[index] = weights[index] / scales[index]
    return head.eval().requires_grad_(requires_grad=False)


def build_head(tensors: dict[str, torch.Tensor]) -> DepthMemoryHead:
    """Rebuild a fitted head.

    Raises:
        DataError: the tensors are not a depth head's.
    """
    try:
        head = DepthMemoryHead(tuple(len(tensors[f"bank_{name}"]) for name in LEVELS))
        head.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"these tensors are no depth head ({error}); train again") from error
    return head.eval().requires_grad_(requires_grad=False)


def _rows(features: Features, name: str, scans: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield rows float32 [n, C] of the cells that were measured."""
    factor = STRIDES[LEVELS.index(name)] // STRIDES[0]
    cpu = torch.device("cpu")
    for tap, valid in features.batches((name, VALID), _BATCH, device=cpu, order=scans):
        kept = functional.avg_pool2d(valid, factor).flatten() >= _MOSTLY
        yield level_patches(name, tap).permute(0, 2, 3, 1).flatten(0, 2)[kept]


def _by_scan(features: Features, name: str) -> list[torch.Tensor]:
    return [torch.cat(list(_rows(features, name, torch.tensor([scan])))) for scan in range(len(features))]


def _bank(rows: torch.Tensor, config: DepthConfig, size: int, generator: torch.Generator) -> torch.Tensor:
    if len(rows) < _LEAST_ROWS:
        raise DataError(f"{len(rows)} cells of all good scans were measured, too few to learn from; scan more of them")
    pool = rows[torch.randperm(len(rows), generator=generator)[: config.candidates]]
    anchors = pool[greedy_coreset(pool, min(size, len(pool)), generator)]
    return weighted_average_reduce(rows.split(16_384), anchors)[0]


def _mean_distance(scans: list[torch.Tensor], config: DepthConfig, generator: torch.Generator) -> float:
    """Return the mean distance of good cells to a bank that has not seen their scan (two folds)."""
    order = torch.randperm(len(scans), generator=generator).tolist()
    half = len(order) // 2
    total = count = 0.0
    for seen, unseen in ((order[:half], order[half:]), (order[half:], order[:half])):
        bank = _bank(torch.cat([scans[i] for i in seen]), config, max(2, config.rows // 4), generator)
        for rows in torch.cat([scans[i] for i in unseen]).split(16_384):
            squared, _ = nearest(rows, bank)
            total, count = total + float(squared.sqrt().sum()), count + len(squared)
    return max(total / max(count, 1.0), 1e-6)
