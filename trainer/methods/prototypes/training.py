"""Training of one set of prototypes, and what is measured on good patches before and after it.

It knows features and a head that compares them; it must not know methods' settings beyond its own, nor images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from edge.errors import DataError
from trainer.methods.memory.reduce import greedy_coreset, whitening
from trainer.methods.prototypes.model import FARTHEST, Metric, feature_costs, unit_rows
from trainer.methods.prototypes.sinkhorn import barycentres, sinkhorn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.methods.base import FitContext
    from trainer.methods.prototypes.fit import PrototypesConfig
    from trainer.methods.prototypes.model import PrototypeHead, PrototypeSet

_BATCH = 16
_TINY = 1e-6
_CANDIDATES, _CANDIDATES_CELL = 20_000, 16  # of all prototypes, and of each of a cell
_LEAST_SHARE = 0.01


class Comparing(Protocol):
    """What training asks of a head."""

    sets: tuple[PrototypeSet, ...]
    metric: Metric
    float16_state: tuple[str, ...]

    def rows(self, name: str, tap: torch.Tensor) -> torch.Tensor:
        """Return patches float32 [N, L, C] of a tap."""

    def spatial(self, index: int) -> torch.Tensor:
        """Return the distances of a set's cells from the sites of its tap, float32 [L, cells]."""


@dataclass(frozen=True)
class Prototypes:
    """One set of one product.

    Attributes:
        prototypes: float32 [K, C].
        mass: float32 [K], good patches behind each.
        farthest: float32 [1], largest distance between a good patch and a prototype.
        typical: float32 [1], mean cost of good patches.
    """

    prototypes: torch.Tensor
    mass: torch.Tensor
    farthest: torch.Tensor
    typical: torch.Tensor


class Training:
    """Training of one set on some tiles.

    Args:
        context: what may be used.
        config: settings.
        head: whose patches are compared.
        index: of the set.
        tiles: int64 [n], rows of the features.
        generator: of the batches.
    """

    def __init__(
        self,
        context: FitContext,
        config: PrototypesConfig,
        head: Comparing,
        index: int,
        tiles: torch.Tensor,
        *,
        generator: torch.Generator,
    ) -> None:
        self.context, self.config, self.head, self.tiles, self.generator = context, config, head, tiles, generator
        self.set, self.index = head.sets[index], index
        self.spatial = head.spatial(index).repeat(1, self.set.copies)

    @torch.no_grad()
    def run(self, done: int, total: int) -> Prototypes:
        """Make the set; ``done`` of ``total`` sets were made before."""
        config = self.config
        prototypes, batches = self._begin(), self._batches()
        share = torch.full((len(prototypes),), 1.0 / len(prototypes), device=self._device)
        for step in range(config.steps):
            rows, sites = next(batches)
            feature = feature_costs(rows, self._compared(prototypes), self.head.metric)
            farthest = feature.amax().clamp_min(_TINY)
            alpha = self.set.alpha
            cost = feature * ((1.0 - alpha) / farthest) + self.spatial[sites] * (alpha / FARTHEST)
            if not config.balanced:
                nearest = torch.bincount(cost.argmin(1), minlength=len(share)) / len(cost)
                # Everything is behind the first step's count; what nothing is nearest to still keeps a little.
                share = nearest if step == 0 else share + config.follow * (nearest - share)
            plan = sinkhorn(
                cost,
                epsilon=config.epsilon,
                iterations=config.iterations,
                tolerance=config.tolerance / len(prototypes),
                masses=share.clamp_min(_LEAST_SHARE / len(share)),
            )
            prototypes = prototypes + config.follow * (barycentres(plan, rows) - prototypes)
            self.context.progress("prototypes", done * config.steps + step + 1, total * config.steps)
        return self._measured(self._stored(self._compared(prototypes)))

    def _compared(self, prototypes: torch.Tensor) -> torch.Tensor:
        return unit_rows(prototypes) if self.head.metric is Metric.COSINE else prototypes

    def _stored(self, prototypes: torch.Tensor) -> torch.Tensor:
        return prototypes.half().float() if self.head.float16_state else prototypes

    def _rows(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return patches float32 [n, L, C] of tiles."""
        (tap,) = next(self.context.features.batches((self.set.tap,), len(tiles), device=self._device, order=tiles))
        rows = self.head.rows(self.set.tap, tap)
        if not torch.isfinite(rows).all():
            raise DataError("features of the training images are not finite; check the images")
        return rows

    @property
    def _device(self) -> torch.device:
        return self.context.device

    def _begin(self) -> torch.Tensor:
        """Return a training patch of its own for each prototype: equal copies would stay equal.

        Of local prototypes from the cell, of global ones from anywhere; far apart from each other, or any.
        """
        cells = self.set.cells[0] * self.set.cells[1]
        count = len(self.spatial.T)
        if not self.set.alpha:
            return self._chosen(None, _CANDIDATES, count)
        owner = self.spatial[:, :cells].argmin(1)
        # A cell that no site is nearest to takes the nearest site.
        sites = [torch.nonzero(owner == cell)[:, 0] for cell in range(cells)]
        sites = [own if len(own) else self.spatial[:, cell].argmin()[None] for cell, own in enumerate(sites)]
        chosen = [self._chosen(own.cpu(), _CANDIDATES_CELL * self.set.copies, self.set.copies) for own in sites]
        return torch.stack(chosen, 1).flatten(0, 1)

    def _chosen(self, sites: torch.Tensor | None, most: int, count: int) -> torch.Tensor:
        """Return ``count`` patches of some sites, or of all, chosen from ``most`` that are drawn."""
        everything = self._everything
        some = torch.arange(everything.shape[1]) if sites is None else sites
        drawn = torch.randperm(len(everything) * len(some), generator=self.generator)[: max(most, count)]
        # Fewer patches than prototypes: some stand twice.
        drawn = drawn[torch.arange(max(len(drawn), count)) % len(drawn)]
        rows = everything[drawn // len(some), some[drawn % len(some)]].to(self._device, torch.float32)
        if not self.config.spread:
            return rows[:count]
        return rows[greedy_coreset(rows, count, self.generator).to(rows.device)]

    @cached_property
    def _everything(self) -> torch.Tensor:
        """All patches of the tiles, float16 [n, L, C] on the CPU."""
        return torch.cat([self._rows(tiles).half().cpu() for tiles in self.tiles.split(_BATCH)])

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield patches [n, C] and their sites [n] without end, every tile in turn."""
        size = self.config.batch_tiles
        while True:
            order = self.tiles[torch.randperm(len(self.tiles), generator=self.generator)]
            for tiles in order.split(size):
                rows = self._rows(tiles)
                sites = torch.arange(rows.shape[1]).repeat(len(tiles))
                kept = torch.randperm(len(sites), generator=self.generator)[: self.config.batch_rows]
                yield rows.flatten(0, 1)[kept.to(rows.device)], sites[kept].to(rows.device)

    def _measured(self, prototypes: torch.Tensor) -> Prototypes:
        """Count what stands behind each prototype, and freeze the normalisers."""
        metric, alpha = self.head.metric, self.set.alpha
        farthest = torch.zeros(1, device=self._device)
        for tiles in self.tiles.split(_BATCH):
            feature = feature_costs(self._rows(tiles), prototypes, metric)
            farthest = torch.maximum(farthest, feature.amax().reshape(1))
        farthest = farthest.clamp_min(_TINY)
        mass, total, count = torch.zeros(len(prototypes), device=self._device), 0.0, 0
        for tiles in self.tiles.split(_BATCH):
            cost = feature_costs(self._rows(tiles), prototypes, metric) * ((1.0 - alpha) / farthest)
            least, index = (cost + self.spatial * (alpha / FARTHEST)).min(2)
            least = least if metric is Metric.COSINE else least.clamp_min(0.0).sqrt()
            mass += torch.bincount(index.flatten(), minlength=len(mass)).float()
            total, count = total + float(least.sum()), count + least.numel()
        typical = torch.tensor([max(total / count, _TINY) if self.config.scaled else 1.0])
        return Prototypes(prototypes.cpu(), mass.cpu(), farthest.cpu(), typical)


def whiten(head: PrototypeHead, context: FitContext, share: float) -> None:
    """Set the convolutions that whiten: of all products together, so that their prototypes live in one space."""
    for name in head.tap_names:
        layer = head.get_submodule(f"whiten_{name}")
        mean, matrix = whitening(_patches(head, context, name), share)
        if not (torch.isfinite(mean).all() and torch.isfinite(matrix).all()):
            raise DataError("features of the training images are not finite; check the images")
        with torch.no_grad():
            layer.weight.copy_(matrix.T[:, :, None, None])
            layer.bias.copy_(-(mean @ matrix))


def measure_lengths(head: PrototypeHead, context: FitContext, share: float) -> None:
    """Set the floors of lengths: the root mean square over all patches, times a share."""
    for name in head.tap_names:
        total, count = 0.0, 0
        for (tap,) in context.features.batches((name,), _BATCH, device=context.device):
            with torch.no_grad():
                patches = head.compared(name, tap)
            total, count = total + float(patches.square().sum()), count + patches[:, 0].numel()
        head.get_buffer(f"floor_{name}").fill_(max(share * (total / count) ** 0.5, _TINY))


@torch.no_grad()
def farthest_patch(head: PrototypeHead, context: FitContext) -> torch.Tensor:
    """Return the largest squared distance of a patch of the head's first tap from the mean of all, float32 [1]."""
    name = head.tap_names[0]

    def batches() -> Iterator[torch.Tensor]:
        for (tap,) in context.features.batches((name,), _BATCH, device=context.device):
            yield head.rows(name, tap).flatten(0, 1)

    total, count = torch.zeros((), device=context.device), 0
    for rows in batches():
        total, count = total + rows.sum(0), count + len(rows)
    largest = torch.stack([(rows - total / count).square().sum(1).amax() for rows in batches()]).amax()
    if not torch.isfinite(largest):
        raise DataError("features of the training images are not finite; check the images")
    return largest.clamp_min(_TINY).reshape(1)


def _patches(head: PrototypeHead, context: FitContext, name: str) -> Iterator[torch.Tensor]:
    for (tap,) in context.features.batches((name,), _BATCH, device=context.device):
        yield head.patches(name, tap).permute(0, 2, 3, 1).flatten(0, 2)
