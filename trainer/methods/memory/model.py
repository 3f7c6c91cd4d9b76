"""The memory head: patch embedding, nearest row of a bank, one scale and offset per map cell.

A pure module; it does not know how the bank was reduced nor where the offsets came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from trainer.methods.base import Head

if TYPE_CHECKING:
    from collections.abc import Sequence

GRID_STRIDE = 8
"""Input pixels per patch; the map has one cell per patch."""
_TAP_STRIDES = {"s4": 4, "s8": 8, "s16": 16}


def patch_embedding(taps: Sequence[torch.Tensor], names: Sequence[str], scales: torch.Tensor) -> torch.Tensor:
    """Turn taps into one vector per patch of the stride-8 grid.

    Each tap is scaled by its constant and averaged over 3x3 sites of its own grid; a stride-4 tap is pooled to the
    grid before, a stride-16 tap resized to it after. At the border the average counts the padding as zeros, as in
    PatchCore's code: patches that see the padding lie apart from all others, and this draws them together.

    Args:
        taps: float32 [N, C, h, w] each.
        names: their names, in the same order.
        scales: float32 [number of taps], what each tap is multiplied with.

    Returns:
        float32 [N, D, H / 8, W / 8], D the sum of the taps' channels.
    """
    parts = []
    for index, (tap, name) in enumerate(zip(taps, names, strict=True)):
        x = tap * scales[index]
        if _TAP_STRIDES[name] < GRID_STRIDE:
            x = functional.avg_pool2d(x, GRID_STRIDE // _TAP_STRIDES[name])
        x = functional.avg_pool2d(x, 3, 1, 1)
        if _TAP_STRIDES[name] > GRID_STRIDE:
            factor = _TAP_STRIDES[name] // GRID_STRIDE
            x = functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        parts.append(x)
    return torch.cat(parts, 1)


class MemoryHead(Head):
    """Distance to the nearest row of a memory bank (PatchCore, Roth et al. 2022; reduced bank: feddymem digest).

    State: ``bank`` float32 [R, D]; ``position_mean`` and ``position_scale`` float32 [h, w]: the map is
    ``(distance - position_mean) * position_scale``, so that a cell where good parts vary (an edge, the image's
    border) needs a larger distance to look the same.
    """

    map_stride = GRID_STRIDE
    state_names = ("bank", "position_mean", "position_scale")

    def __init__(self, *, tap_names: tuple[str, ...], rows: int, dimensions: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tap_names = tap_names
        self.register_buffer("tap_scales", torch.ones(len(tap_names)))
        self.bank = nn.Buffer(torch.zeros(rows, dimensions))
        self.position_mean = nn.Buffer(torch.zeros(grid))
        self.position_scale = nn.Buffer(torch.ones(grid))

    def embed(self, taps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the patch embedding float32 [N, D, h, w]."""
        return patch_embedding(taps, self.tap_names, self.tap_scales)

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the map float32 [N, h, w] and the patch rows float32 [N, h * w, D]."""
        embedding = self.embed(taps)
        h, w = self.position_mean.shape
        rows = embedding.flatten(2).transpose(1, 2)
        # ||q - m||^2 = ||q||^2 + (||m||^2 - 2 q.m): one matrix product, then a minimum over the bank.
        nearest = ((self.bank * self.bank).sum(1) - 2.0 * (rows @ self.bank.t())).amin(2)
        distance = (nearest + (rows * rows).sum(2)).clamp_min(0.0).sqrt().unflatten(1, (h, w))
        return (distance - self.position_mean) * self.position_scale, rows
