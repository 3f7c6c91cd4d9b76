"""The fleet memory's head: a generator of patch rows, and the distance to the nearest row of two banks.

A pure module; it does not know how the generator was trained nor what the banks were reduced from.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from edge.bundle import MemoryLayout
from edge.errors import DataError
from trainer.methods.base import Head
from trainer.methods.memory.reduce import greedy_coreset
from trainer.methods.patches import enlarge, patch_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.methods.base import Features

LEVELS = ("s4", "s8", "s16")
"""The taps that rows are made of, finest first."""
STRIDES = (4, 8, 16)
MAP_STRIDE = 8
BANKS = ("bank_local", "bank_fleet")


class Generator(nn.Module):
    """From taps to rows of one embedding space: each level's patch at unit length, joined, one 1x1 convolution.

    ``z = P concat_l(u_l) + b`` with ``u_l = (p_l - c_l) / sqrt(|p_l - c_l|^2 + f_l^2)``; p_l is what
    :func:`level_patches` gives, c_l and f_l are constants of the generator. Nothing in it belongs to a product.

    Source: CFA's descriptor (Lee et al., 2022) for the convolution; extremes and unit length are our own (measured:
    see the README).

    Args:
        channels: of each level's patches, see :func:`level_channels`.
        width: D, the channels of a row.
    """

    centre: torch.Tensor
    floors: torch.Tensor

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.channels, self.width = tuple(channels), width
        self.register_buffer("centre", torch.zeros(sum(channels)))
        self.register_buffer("floors", torch.ones(len(self.channels)))
        # skip_init: the global generator is not ours to advance.
        self.project = skip_init(nn.Conv2d, sum(channels), width, 1)

    def joined(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return what the convolution reads, float32 [N, sum(channels), h, w] on the stride-8 grid."""
        levels, first = [], 0
        for index, patches in enumerate(level_patches(*taps)):
            last = first + self.channels[index]
            away = patches - self.centre[first:last, None, None]
            levels.append(away / ((away * away).sum(1, keepdim=True) + self.floors[index].square()).sqrt())
            first = last
        return torch.cat(levels, 1)

    def forward(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return rows float32 [N, D, h, w] of taps float32 [N, C, h', w'] in the order of ``LEVELS``."""
        rows: torch.Tensor = self.project(self.joined(*taps))
        return rows


def level_patches(fine: torch.Tensor, middle: torch.Tensor, coarse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what rows are made of, level by level on the stride-8 grid, float32 [N, C, h, w] each.

    The finest tap gives the largest and the smallest value of each channel in a cell (twice its channels): a mean
    would hide what is smaller than the cell. The middle one is taken as it is, the coarsest is a 3x3 mean, enlarged.

    Args:
        fine: float32 [N, C, 2 h, 2 w].
        middle: float32 [N, C, h, w].
        coarse: float32 [N, C, h / 2, w / 2].
    """
    factor = MAP_STRIDE // STRIDES[0]
    largest, smallest = functional.max_pool2d(fine, factor), -functional.max_pool2d(-fine, factor)
    return torch.cat((largest, smallest), 1), middle, enlarge(patch_mean(coarse), STRIDES[2] // MAP_STRIDE)


def level_channels(taps: Sequence[int]) -> tuple[int, ...]:
    """Return the channels of each level's patches for taps of these channels, finest first."""
    return (2 * taps[0], *taps[1:])


class NearestRow(nn.Module):
    """Squared distance of every query to the nearest row of a bank, less the query's own squared length."""

    def forward(self, rows: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, L] of rows [N, L, D] and a bank [R, D]: one matrix product, then a minimum."""
        return ((bank * bank).sum(1) - 2.0 * (rows @ bank.t())).amin(2)


class FedDyMemHead(Head):
    """Distance to the nearest row of the box's own bank and of its fleet's, on the stride-8 grid.

    What is computed is what :class:`edge.bundle.MemoryLayout` says; ``memory_layout`` is this head's. State:
    ``bank_local`` float32 [R, D] and ``bank_fleet`` [R', D]; either may repeat rows, which changes no distance. The
    embedding is float32 [N, h * w, D], row-major, and depends on the generator alone.

    Source: FedDyMem (memory banks shared instead of weights), PatchCore (Roth et al., 2022) for the search.
    """

    tap_names = LEVELS
    map_stride = MAP_STRIDE
    state_names = BANKS
    # A new state would meet ranges that another was measured with; and rows are rounded nowhere before they leave.
    float_ops = ("generator", "search")

    bank_local: torch.Tensor
    bank_fleet: torch.Tensor
    grid: torch.Tensor
    channels: torch.Tensor

    def __init__(
        self,
        generator: Generator,
        *,
        rows: int,
        fleet_rows: int,
        grid: tuple[int, int],
        smoothing: int,
        background: float,
    ) -> None:
        super().__init__()
        self.generator, self.search = generator, NearestRow()
        self.smoothing, self.background = smoothing, background
        self.register_buffer("bank_local", torch.zeros(rows, generator.width))
        self.register_buffer("bank_fleet", torch.zeros(fleet_rows, generator.width))
        # What rebuilding needs; the graph has no use for them.
        self.register_buffer("grid", torch.tensor(grid))
        self.register_buffer("channels", torch.tensor(generator.channels))

    @property
    def memory_layout(self) -> MemoryLayout:
        """What a box must know to compute this head's map from an embedding and two banks."""
        return MemoryLayout(
            local=BANKS[0],
            fleet=BANKS[1],
            grid=(int(self.grid[0]), int(self.grid[1])),
            smoothing=self.smoothing,
            background=self.background,
        )

    @torch.no_grad()
    def set_banks(self, local: torch.Tensor, fleet: torch.Tensor | None = None) -> None:
        """Take over banks float32 [n, D], n at most the room for them; None repeats the local rows for the fleet."""
        self.bank_local.copy_(repeated(local, len(self.bank_local)))
        # The local rows are in the other bank already: any of them fills this one without changing a distance.
        other = local[: len(self.bank_fleet)] if fleet is None else fleet
        self.bank_fleet.copy_(repeated(other, len(self.bank_fleet)))

    def adapted(self, good: Features, generator: torch.Generator) -> FedDyMemHead:
        """Return a head that knows some good images of another kind, in the room for the fleet's rows.

        What the fleet gave stays, but for what is over three quarters of that room; the box's own bank stays as it is.
        A box can do the same: neither the graph nor its sizes change.

        Args:
            good: taps of at least one good image.
            generator: of the coreset.

        Raises:
            DataError: features that are not finite.
        """
        head = copy.deepcopy(self)
        with torch.no_grad():
            taps = good.batches(LEVELS, 1, device=self.bank_fleet.device)
            new = torch.cat([self.embed(*one).flatten(0, 1) for one in taps])
        if not torch.isfinite(new).all():
            raise DataError("features of the images to adapt to are not finite; check the images")
        # Rows that repeat the box's own change no distance: they are room. A quarter of it is always for the new ones.
        own = (torch.cdist(self.bank_fleet, self.bank_local, p=torch.inf) == 0).any(1)
        fleet, room = torch.unique(self.bank_fleet[~own], dim=0), len(self.bank_fleet)
        most = room - max(1, room // 4)
        if len(fleet) > most:
            fleet = fleet[greedy_coreset(fleet, most, generator)]
        kept = torch.cat([fleet, new[greedy_coreset(new, room - len(fleet), generator)]])
        head.bank_fleet.copy_(repeated(kept, len(self.bank_fleet)))
        return head.eval().requires_grad_(requires_grad=False)

    def embed(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return the embedding float32 [N, h * w, D] of taps."""
        rows: torch.Tensor = self.generator(*taps)
        return rows.flatten(2).transpose(1, 2)

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the map float32 [N, H / 8, W / 8] and the embedding float32 [N, H / 8 * W / 8, D]."""
        rows = self.embed(*taps)
        nearest = torch.minimum(self.search(rows, self.bank_local), self.search(rows, self.bank_fleet))
        distance = (nearest + (rows * rows).sum(2)).clamp_min(0.0).sqrt().unflatten(1, taps[1].shape[2:])[:, None]
        for _ in range(self.smoothing):
            distance = patch_mean(distance)
        anomaly_map = distance - self.background * distance.mean((1, 2, 3), keepdim=True)
        return anomaly_map[:, 0], rows


def repeated(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return rows [size, D]: those given, again and again.

    Raises:
        ValueError: there are more rows than fit, or none.
    """
    if not 1 <= len(rows) <= size:
        raise ValueError(f"{len(rows)} rows do not fit a bank of {size}")
    return rows[torch.arange(size, device=rows.device) % len(rows)]
