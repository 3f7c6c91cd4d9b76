"""The memory head: at each level, the distance of every patch to the nearest row of that level's bank, and its place.

A pure module; it does not know how the banks were reduced nor how the levels were whitened.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from edge.errors import DataError
from edge.memory.rows import round_rows
from trainer.methods.base import Head
from trainer.methods.memory.reduce import greedy_coreset
from trainer.methods.patches import enlarge, patch_mean

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.methods.base import Features
    from trainer.methods.memory.sites import SiteModel

LEVELS = ("s4", "s8", "s16")
"""The taps searched, finest first; the map has the grid of the first."""
STRIDES = (4, 8, 16)
MAP_STRIDE = STRIDES[0]
EMBEDDING_STRIDE = 8

_ADAPTED_SHARE = 4  # a bank grows by at most a quarter, and its search with it
_CANDIDATES = 1000  # patches of each image that a coreset is chosen from: one in three of the finest grid


class MemoryHead(Head):
    """Distance to the nearest row of a memory bank, level by level.

    ``d_l = ||W_l (p - mu_l) - m||`` for the nearest row m of level l, on the level's own grid; the map is
    ``sum_l d_l * scale_l`` on the finest grid, plus ``site_weight`` times the distance of every site to what good
    parts show there, less ``background`` times the map's own mean. State: ``bank_s4`` float32
    [R, 24], ``bank_s8`` [R, 40] and ``bank_s16`` [R, 112], rows in whitened space. A row of one level belongs to no
    row of another. The embedding is float32 [N, L, 176] on the stride-8 grid, the columns of the levels side by side:
    2x2 means of the finest, the coarsest enlarged.

    Source: PatchCore (Roth et al., 2022) for the search, PaDiM (Defard et al., 2021) for the sites; levels apart,
    whitening and background are our own.
    """

    tap_names = LEVELS
    map_stride = MAP_STRIDE
    state_names = tuple(f"bank_{name}" for name in LEVELS)
    # Small directions of the whitened space would drown in the rounding of larger ones; these products cost nothing.
    float_ops = (*(f"whiten_{name}" for name in LEVELS), "sites")

    def __init__(
        self,
        *,
        rows: tuple[int, ...],
        channels: tuple[int, ...],
        background: float,
        sites: SiteModel | None,
        site_weight: float,
        int8_rows: bool = False,
    ) -> None:
        super().__init__()
        self.background = background
        self.sites, self.site_weight = sites, site_weight
        self.int8_state = self.state_names if int8_rows else ()
        for name, count, width in zip(LEVELS, rows, channels, strict=True):
            # skip_init: the global generator is not ours to advance.
            self.register_module(f"whiten_{name}", skip_init(nn.Conv2d, width, width, 1))
            self.register_buffer(f"bank_{name}", torch.zeros(count, width))
        self.register_buffer("scales", torch.ones(len(LEVELS)))

    def adapted(self, good: Features, generator: torch.Generator) -> MemoryHead:
        """Return a head whose banks know some good images of another kind, and whose sites are centred on them.

        Each level's bank grows by a coreset of the images' patches, at most a quarter of its rows. Distances can only
        fall, so a frozen threshold gives no more false alarms than before on what was good already.

        Args:
            good: taps s4, s8 and s16 of at least one good image.
            generator: of the candidates and the coreset.

        Raises:
            DataError: features that are not finite.
        """
        head = copy.deepcopy(self)
        for name in LEVELS:
            rows = torch.cat([self._candidates(name, tap, generator) for (tap,) in _one_by_one(name, good)])
            if not torch.isfinite(rows).all():
                raise DataError("features of the images to adapt to are not finite; check the images")
            bank = head.get_buffer(f"bank_{name}")
            room = max(1, len(bank) // _ADAPTED_SHARE)
            new = rows[greedy_coreset(rows, room, generator)]
            if self.int8_state:
                new = torch.from_numpy(round_rows(new.numpy()))
            head.register_buffer(f"bank_{name}", torch.cat([bank, new]))
        if head.sites is not None:
            head.sites.recentre(good)
        return head.eval().requires_grad_(requires_grad=False)

    @torch.no_grad()
    def _candidates(self, name: str, tap: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        rows = self.whitened(name, tap).permute(0, 2, 3, 1).flatten(0, 2)
        return rows[torch.randperm(len(rows), generator=generator)[:_CANDIDATES]]

    def whitened(self, name: str, tap: torch.Tensor) -> torch.Tensor:
        """Return one level's patches float32 [N, C, h, w]."""
        patches: torch.Tensor = self.get_submodule(f"whiten_{name}")(level_patches(name, tap))
        return patches

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the map float32 [N, H / 4, W / 4] and the patch rows float32 [N, H / 8 * W / 8, 176]."""
        total, columns = None, []
        for index, (name, tap, stride) in enumerate(zip(LEVELS, taps, STRIDES, strict=True)):
            patches, bank = self.whitened(name, tap), self.get_buffer(f"bank_{name}")
            rows = patches.flatten(2).transpose(1, 2)
            # ||q - m||^2 = ||q||^2 + (||m||^2 - 2 q.m): one matrix product, then a minimum over the bank.
            nearest = ((bank * bank).sum(1) - 2.0 * (rows @ bank.t())).amin(2)
            distance = (nearest + (rows * rows).sum(2)).clamp_min(0.0).sqrt().unflatten(1, patches.shape[2:])
            level = enlarge(distance[:, None] * self.scales[index], stride // MAP_STRIDE)
            total = level if total is None else total + level
            columns.append(_on_embedding_grid(patches, stride))
        assert total is not None
        if self.sites is not None:
            total = total + self.site_weight * self.sites(*taps)[:, None]
        anomaly_map = total[:, 0] - self.background * total.mean((1, 2, 3), keepdim=True)[:, 0]
        return anomaly_map, torch.cat(columns, 1).flatten(2).transpose(1, 2)


def _one_by_one(name: str, features: Features) -> Iterator[tuple[torch.Tensor, ...]]:
    return features.batches((name,), 1, device=torch.device("cpu"))


def level_patches(name: str, tap: torch.Tensor) -> torch.Tensor:
    """Return what a level searches with, float32 [N, C, h, w]: 3x3 means, but the finest tap as it is.

    There a mean would blur small defects; on the coarser grids it takes noise off (measured: see the README).
    """
    return tap if name == LEVELS[0] else patch_mean(tap)


def _on_embedding_grid(patches: torch.Tensor, stride: int) -> torch.Tensor:
    if stride < EMBEDDING_STRIDE:
        return functional.avg_pool2d(patches, EMBEDDING_STRIDE // stride)
    return enlarge(patches, stride // EMBEDDING_STRIDE)
