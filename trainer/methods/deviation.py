"""How far features lie from the normal mean of their place, and on which scale: what reconstructing methods share.

Tensors and modules only; it must not know what is reconstructed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from trainer.methods.patches import patch_mean

if TYPE_CHECKING:
    from collections.abc import Sequence


class Deviation(nn.Module):
    """Whitened deviation of a tap from its normal mean: ``W (x - mean)``, the mean a map of the tile.

    In this space the normal mean is zero, good parts vary about alike in all directions, and attenuation draws a
    feature towards the normal. Zero weights until ``set`` is called.

    Args:
        shape: [C, h, w] of the tap.
        local_mean: take the 3x3 mean first.
    """

    centre: torch.Tensor

    def __init__(self, shape: Sequence[int], *, local_mean: bool) -> None:
        super().__init__()
        self.local_mean = local_mean
        # skip_init: the global generator is not ours to advance.
        self.whiten = skip_init(nn.Conv2d, shape[0], shape[0], 1, bias=False)
        nn.init.zeros_(self.whiten.weight)
        self.register_buffer("centre", torch.zeros(*shape))

    def local(self, tap: torch.Tensor) -> torch.Tensor:
        """Return what is whitened: float32 [N, C, h, w]."""
        return patch_mean(tap) if self.local_mean else tap

    @torch.no_grad()
    def set(self, mean: torch.Tensor, matrix: torch.Tensor) -> None:
        """Take over statistics of good parts.

        Args:
            mean: float32 [C, h, w].
            matrix: float32 [C, C]; rows of features are multiplied by it from the right.
        """
        self.whiten.weight.copy_(matrix.T[:, :, None, None])
        self.centre.copy_(torch.einsum("chw,cd->dhw", mean, matrix))

    def forward(self, tap: torch.Tensor) -> torch.Tensor:
        """Return the whitened deviation of a tap float32 [N, C, h, w]."""
        deviation: torch.Tensor = self.whiten(self.local(tap)) - self.centre
        return deviation


def feature_rows(maps: torch.Tensor) -> torch.Tensor:
    """Return the sites of float32 [N, C, h, w] as rows [N * h * w, C]."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def smooth_places(grid: torch.Tensor) -> torch.Tensor:
    """Average float32 [C, h, w] over 3x3 cells, edges repeated."""
    padded = functional.pad(grid[None], (1, 1, 1, 1), mode="replicate")
    return functional.avg_pool2d(padded, 3, stride=1)[0]


def mean_of_places(total: torch.Tensor, images: int, prior: float) -> torch.Tensor:
    """Return what good parts miss at each place, smoothed twice and drawn towards the mean over all places.

    A few images know little of one place; the mean over all places counts as ``prior`` more of them.

    Args:
        total: [1, h, w], sums over images of a level's map.
        images: how many.
        prior: >= 0.
    """
    place = smooth_places(smooth_places((total / images).float()))
    trust = images / (images + prior)
    return trust * place + (1 - trust) * place.mean()
