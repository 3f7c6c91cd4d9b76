"""The two baselines that the methods are compared with, on the same trunk, the same images and as many rows.

Written for comparison only: no box runs them. Both score a patch grid; the image score is the maximum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from trainer.methods.memory.reduce import greedy_coreset, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.methods.base import Features

    Judge = Callable[[Features], torch.Tensor]

_BATCH = 16
_CPU = torch.device("cpu")
_PADIM_CHANNELS = 64
_PADIM_RIDGE = 0.01


def _grids(features: Features, names: tuple[str, ...], *, local_mean: bool) -> Iterator[torch.Tensor]:
    """Yield float32 [n, D, h, w]: every tap on the grid of the first, bilinear, after a 3x3 mean where asked."""
    for taps in features.batches(names, _BATCH, device=_CPU):
        size = taps[0].shape[2:]
        smoothed = [functional.avg_pool2d(tap, 3, 1, 1) if local_mean else tap for tap in taps]
        parts = [functional.interpolate(tap, size=size, mode="bilinear", align_corners=False) for tap in smoothed[1:]]
        yield torch.cat([smoothed[0], *parts], 1)


def patchcore(features: Features, names: tuple[str, ...], *, rows: int, candidates: int, seed: int) -> Judge:
    """PatchCore-style (Roth et al., 2022): 3x3 means, greedy coreset, distance to the nearest row."""
    generator = torch.Generator().manual_seed(seed)
    sites = features.taps[names[0]].shape[2] * features.taps[names[0]].shape[3]
    share = min(1.0, candidates / (len(features) * sites))
    drawn = []
    for grid in _grids(features, names, local_mean=True):
        patches = grid.permute(0, 2, 3, 1).flatten(0, 2)
        drawn.append(patches[torch.randperm(len(patches), generator=generator)[: round(share * len(patches))]])
    pool = torch.cat(drawn)
    bank = pool[greedy_coreset(pool, rows, generator)]

    def judge(images: Features) -> torch.Tensor:
        maps = []
        for grid in _grids(images, names, local_mean=True):
            n, _, h, w = grid.shape
            maps.append(nearest(grid.permute(0, 2, 3, 1).flatten(0, 2), bank)[0].sqrt().view(n, h, w))
        return torch.cat(maps)

    return judge


def padim(features: Features, names: tuple[str, ...], *, seed: int) -> Judge:
    """PaDiM-style (Defard et al., 2021): a Gaussian per site over 64 random channels, Mahalanobis distance."""
    generator = torch.Generator().manual_seed(seed)
    width = sum(features.taps[name].shape[1] for name in names)
    kept = torch.randperm(width, generator=generator)[:_PADIM_CHANNELS]
    zero = torch.zeros((), dtype=torch.float64)
    count, first, second = 0, zero, zero
    for grid in _grids(features, names, local_mean=False):
        sites = grid[:, kept].flatten(2).permute(2, 0, 1).double()
        count, first = count + sites.shape[1], first + sites.sum(1)
        second = second + sites.transpose(1, 2) @ sites
    mean = first / count
    covariance = (second - count * mean[:, :, None] * mean[:, None, :]) / max(count - 1, 1)
    lower = torch.linalg.cholesky(covariance + _PADIM_RIDGE * torch.eye(_PADIM_CHANNELS, dtype=torch.float64))
    identity = torch.eye(_PADIM_CHANNELS, dtype=torch.float64).expand_as(lower)
    whiten = torch.linalg.solve_triangular(lower, identity, upper=False).transpose(1, 2).float()
    mean = mean.float()

    def judge(images: Features) -> torch.Tensor:
        maps = []
        for grid in _grids(images, names, local_mean=False):
            n, _, h, w = grid.shape
            offset = grid[:, kept].flatten(2).permute(2, 0, 1) - mean[:, None]
            maps.append((offset @ whiten).norm(dim=2).T.reshape(n, h, w))
        return torch.cat(maps)

    return judge
