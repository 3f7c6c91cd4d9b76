"""Training of prototypes: each step carries a batch of patches to them by optimal transport, and they follow slowly.

No gradient anywhere. Knows features, never images; the trunk is frozen and belongs to all methods.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, field_validator, model_validator

from edge.errors import DataError, UsageError
from edge.memory.rows import RowsPrecision
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.memory.reduce import greedy_coreset, whitening
from trainer.methods.prototypes.model import (
    FARTHEST,
    STATE,
    STRIDES,
    Metric,
    PrototypeHead,
    PrototypeSet,
    feature_costs,
    unit_rows,
)
from trainer.methods.prototypes.sinkhorn import barycentres, sinkhorn

if TYPE_CHECKING:
    from collections.abc import Iterator

_BATCH = 16
_TINY = 1e-6
_CANDIDATES, _CANDIDATES_CELL = 20_000, 16  # of all prototypes, and of each of a cell
_LEAST_SHARE = 0.01
_WITH_PRODUCTS = 3  # dimensions of prototypes, [P, K, C]


class SetConfig(MethodConfig):
    """One set of prototypes."""

    tap: str = Field(description="s4, s8 or s16.")
    alpha: float = Field(0.0, ge=0, lt=1, description="Share of the place in the cost; 0 knows no places.")
    cells: int = Field(14, ge=1, le=64, description="Rows and columns of the prototype grid at most.")
    copies: int = Field(2, ge=1, le=64, description="Prototypes of each cell.")
    weight: float = Field(1.0, gt=0, description="In the map.")

    @model_validator(mode="after")
    def _known(self) -> SetConfig:
        if self.tap not in STRIDES:
            raise ValueError(f"tap {self.tap}: unknown; choose one of {', '.join(STRIDES)}")
        return self


class PrototypesConfig(MethodConfig):
    """Settings of prototypes; the README says which values are the paper's, which inferred and which measured."""

    sets: tuple[SetConfig, ...] = Field(
        (
            SetConfig(tap="s8", alpha=0.0, copies=2),
            SetConfig(tap="s16", alpha=0.3, copies=2),
        ),
        min_length=1,
        description="Sets of prototypes, whose maps are added; on a command line as JSON.",
    )
    metric: Metric = Field(Metric.EUCLID, description="How patches are compared with prototypes.")
    pooled: bool = Field(True, description="Patches of s8 and s16 are 3x3 means.")
    whitening: float = Field(
        0.3, ge=0, description="Added to every eigenvalue, as a share of their mean; 0 compares raw features."
    )
    background: float = Field(0.3, ge=0, le=1, description="Share of its own mean that is taken off a map.")
    scaled: bool = Field(True, description="Bring the sets to one scale, the mean cost of good patches, before adding.")
    spread: bool = Field(True, description="Begin with patches that lie far apart; else with any.")
    balanced: bool = Field(
        False, description="All prototypes carry the same mass; else each the share of patches nearest to it."
    )
    epsilon: float = Field(0.001, gt=0, description="Weight of the entropy in the transport.")
    iterations: int = Field(30, ge=1, description="Of Sinkhorn's algorithm in a step, at most.")
    tolerance: float = Field(1e-3, ge=0, description="Relative error of the columns' masses at which they end early.")
    follow: float = Field(0.05, gt=0, le=1, description="Share of the way to the barycentre in a step.")
    steps: int = Field(60, ge=1, description="Steps of each set.")
    batch_tiles: int = Field(8, ge=1, description="Tiles of a step.")
    batch_rows: int = Field(1024, ge=1, description="Patches of a step at most, drawn from its tiles.")
    rows_precision: RowsPrecision = Field(RowsPrecision.FLOAT32, description="Numbers that prototypes are stored in.")

    @field_validator("sets", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value


class PrototypesMethod(Method):
    """Prototypes of patches, with and without places, made by optimal transport."""

    name: ClassVar[str] = "prototypes"
    tap_names: ClassVar[tuple[str, ...]] = tuple(STRIDES)

    @classmethod
    def config(cls, preset: str) -> PrototypesConfig:
        """Return the preset.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return PrototypesConfig()
        if preset == "full":
            return PrototypesConfig(steps=200, iterations=100, batch_rows=3136)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> PrototypeHead:
        """Learn the prototypes, of each product from its own images.

        Raises:
            DataError: there are no features, of a product none, or they are not finite.
        """
        own, features = _own(config), context.features
        if len(features) == 0:
            raise DataError("prototypes got no training features; add good parts to train/good")
        grids = {tap: (int(t.shape[2]), int(t.shape[3])) for tap, t in features.taps.items() if tap in _taps(own)}
        channels = {tap: int(features.taps[tap].shape[1]) for tap in grids}
        head = _empty(own, channels, grids, len(context.products) or None).to(context.device)
        if own.whitening:
            _whiten(head, context, own.whitening)
        generator, total = context.generator(), len(head.sets) * max(1, len(context.products))
        for product, tiles in enumerate(_tiles(context)):
            for index in range(len(head.sets)):
                done = product * len(head.sets) + index
                made = _Training(context, own, head, index, tiles, generator=generator).run(done, total)
                for what in STATE:
                    buffer = head.get_buffer(f"{what}_{index}")
                    (buffer[product] if head.takes_product else buffer).copy_(getattr(made, what))
        return head.cpu().eval().requires_grad_(requires_grad=False)

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> PrototypeHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not a prototype head's.
        """
        own = _own(config)
        try:
            first = tensors["prototypes_0"]
            channels = {one.tap: int(tensors[f"prototypes_{i}"].shape[-1]) for i, one in enumerate(own.sets)}
            grids = {}
            for tap in channels:
                height, width = tensors[f"grid_{tap}"].tolist()
                grids[tap] = (int(height), int(width))
            head = _empty(own, channels, grids, int(first.shape[0]) if first.ndim == _WITH_PRODUCTS else None)
            head.load_state_dict(tensors)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"these tensors are no prototype head ({error}); train again") from error
        return head.eval().requires_grad_(requires_grad=False)


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


class _Training:
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
        head: PrototypeHead,
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
            least = least.clamp_min(0.0).sqrt() if metric is Metric.EUCLID else least
            mass += torch.bincount(index.flatten(), minlength=len(mass)).float()
            total, count = total + float(least.sum()), count + least.numel()
        typical = torch.tensor([max(total / count, _TINY) if self.config.scaled else 1.0])
        return Prototypes(prototypes.cpu(), mass.cpu(), farthest.cpu(), typical)


def _tiles(context: FitContext) -> list[torch.Tensor]:
    """Return the tiles of each product, or all."""
    features = context.features
    if not context.products:
        return [torch.arange(len(features))]
    if features.products is None:
        raise DataError("features of several products do not say which product each tile shows; extract them again")
    found = [torch.nonzero(features.products == product)[:, 0] for product in range(len(context.products))]
    for name, tiles in zip(context.products, found, strict=True):
        if not len(tiles):
            raise DataError(f"product {name} has no training features; add good parts to its train/good")
    return found


def _whiten(head: PrototypeHead, context: FitContext, share: float) -> None:
    """Set the convolutions that whiten: of all products together, so that their prototypes live in one space."""
    for name in head.tap_names:
        layer = head.get_submodule(f"whiten_{name}")
        mean, matrix = whitening(_patches(head, context, name), share)
        if not (torch.isfinite(mean).all() and torch.isfinite(matrix).all()):
            raise DataError("features of the training images are not finite; check the images")
        with torch.no_grad():
            layer.weight.copy_(matrix.T[:, :, None, None])
            layer.bias.copy_(-(mean @ matrix))


def _patches(head: PrototypeHead, context: FitContext, name: str) -> Iterator[torch.Tensor]:
    for (tap,) in context.features.batches((name,), _BATCH, device=context.device):
        yield head.patches(name, tap).permute(0, 2, 3, 1).flatten(0, 2)


def _taps(config: PrototypesConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.tap for one in config.sets))


def _empty(
    config: PrototypesConfig, channels: dict[str, int], grids: dict[str, tuple[int, int]], products: int | None
) -> PrototypeHead:
    sets = [
        PrototypeSet(
            tap=one.tap,
            alpha=one.alpha,
            cells=(min(one.cells, grids[one.tap][0]), min(one.cells, grids[one.tap][1])),
            copies=one.copies,
            weight=one.weight,
        )
        for one in config.sets
    ]
    return PrototypeHead(
        sets,
        channels=channels,
        grids=grids,
        metric=config.metric,
        pooled=config.pooled,
        whitened=config.whitening > 0,
        background=config.background,
        float16=config.rows_precision is RowsPrecision.FLOAT16,
        products=products,
    )


def _own(config: MethodConfig) -> PrototypesConfig:
    if not isinstance(config, PrototypesConfig):
        raise UsageError(f"prototypes cannot use a {type(config).__name__}; take PrototypesMethod.config(preset)")
    return config
