"""Training of prototypes: each step carries a batch of patches to them by optimal transport, and they follow slowly.

No gradient anywhere. Knows features, never images; the trunk is frozen and belongs to all methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, model_validator

from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.prototypes.model import STRIDES, PrototypeHead, costs, places, unit_rows
from trainer.methods.prototypes.sinkhorn import barycentres, sinkhorn

if TYPE_CHECKING:
    from collections.abc import Iterator

_BATCH = 16
_TINY = 1e-6


class PrototypesConfig(MethodConfig):
    """Settings of prototypes; the README says which values are the paper's, which inferred and which measured."""

    taps: tuple[str, ...] = Field(("s8", "s16"), description="Taps that prototypes are made of: s8, s16 or both.")
    alphas: tuple[float, ...] = Field(
        (0.0, 0.3), description="Shares of the place in the cost, a set of prototypes for each: 0 knows no places."
    )
    copies: int = Field(2, ge=1, le=64, description="Prototypes of each cell of the prototype grid.")
    cells: int = Field(14, ge=1, le=64, description="Rows and columns of the prototype grid at most.")
    epsilon: float = Field(0.01, gt=0, description="Weight of the entropy in the transport.")
    iterations: int = Field(100, ge=1, description="Of Sinkhorn's algorithm in a step, at most.")
    tolerance: float = Field(1e-6, ge=0, description="Error of the columns' masses at which they end early.")
    follow: float = Field(0.05, gt=0, le=1, description="Share of the way to the barycentre in a step.")
    steps: int = Field(60, ge=1, description="Steps of each set.")
    batch_tiles: int = Field(4, ge=1, description="Tiles of a step.")

    @model_validator(mode="after")
    def _known(self) -> PrototypesConfig:
        if not self.taps or not set(self.taps) <= STRIDES.keys() or len(set(self.taps)) < len(self.taps):
            raise ValueError(f"taps {', '.join(self.taps) or 'none'}: give s8, s16 or both")
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ValueError(f"alphas {self.alphas}: each must lie in 0..1, and there must be one")
        return self


class PrototypesMethod(Method):
    """Prototypes of patches, with and without places, made by optimal transport."""

    name: ClassVar[str] = "prototypes"
    tap_names: ClassVar[tuple[str, ...]] = ("s8", "s16")

    @classmethod
    def config(cls, preset: str) -> PrototypesConfig:
        """Return the preset.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return PrototypesConfig()
        if preset == "full":
            return PrototypesConfig(copies=4, steps=400, batch_tiles=8)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> PrototypeHead:
        """Learn the prototypes.

        Raises:
            DataError: there are no features, or they are not finite.
        """
        own, features = _own(config), context.features
        if len(features) == 0:
            raise DataError("prototypes got no training features; add good parts to train/good")
        grids = {tap: (int(features.taps[tap].shape[2]), int(features.taps[tap].shape[3])) for tap in own.taps}
        channels = {tap: int(features.taps[tap].shape[1]) for tap in own.taps}
        head = _empty(own, channels, grids)
        generator = context.generator()
        for index, (tap, alpha, _) in enumerate(head.sets):
            made = _Training(context, own, tap, alpha, generator).run(index, len(head.sets))
            for what in ("prototypes", "where", "mass", "farthest"):
                head.get_buffer(f"{what}_{index}").copy_(getattr(made, what))
        return head.eval().requires_grad_(requires_grad=False)

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> PrototypeHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not a prototype head's.
        """
        own = _own(config)
        try:
            channels, grids = {}, {}
            for index, (tap, _) in enumerate(_sets(own)):
                channels[tap] = int(tensors[f"prototypes_{index}"].shape[1])
                height, width = tensors[f"grid_{tap}"].tolist()
                grids[tap] = (int(height), int(width))
            head = _empty(own, channels, grids)
            head.load_state_dict(tensors)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"these tensors are no prototype head ({error}); train again") from error
        return head.eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class Prototypes:
    """One set.

    Attributes:
        prototypes: float32 [K, C] of unit length.
        where: float32 [K, 2], (y, x) in the unit square.
        mass: float32 [K], training patches behind each.
        farthest: float32 [1], largest 1 - cos between a training patch and a prototype.
    """

    prototypes: torch.Tensor
    where: torch.Tensor
    mass: torch.Tensor
    farthest: torch.Tensor


class _Training:
    def __init__(
        self, context: FitContext, config: PrototypesConfig, tap: str, alpha: float, generator: torch.Generator
    ) -> None:
        self.context, self.config, self.tap, self.alpha, self.generator = context, config, tap, alpha, generator
        self.grid = tuple(int(side) for side in context.features.taps[tap].shape[2:])

    def run(self, index: int, count: int) -> Prototypes:
        config, device = self.config, self.context.device
        cells = (min(config.cells, self.grid[0]), min(config.cells, self.grid[1]))
        where = places(cells).repeat(config.copies, 1).to(device)
        sites = places((self.grid[0], self.grid[1])).to(device)
        spatial = (sites[:, None] - where).square().sum(2).sqrt()
        prototypes = self._begin(spatial)
        for step, rows in zip(range(config.steps), self._batches()):  # noqa: B905 (endless)
            farthest = _farthest(rows, prototypes)
            cost = costs(rows, _unit(prototypes), spatial, alpha=self.alpha, farthest=farthest).flatten(0, 1)
            plan = sinkhorn(
                cost, epsilon=config.epsilon, iterations=config.iterations, tolerance=config.tolerance / len(where)
            )
            prototypes = prototypes + config.follow * (barycentres(plan, rows.flatten(0, 1)) - prototypes)
            self.context.progress("prototypes", index * config.steps + step + 1, count * config.steps)
        return self._measured(_unit(prototypes), where, spatial)

    def _begin(self, spatial: torch.Tensor) -> torch.Tensor:
        """Return a training patch near each prototype's place, drawn anew for each: equal copies would stay equal."""
        near = spatial.argmin(0).cpu()
        tiles = torch.randint(len(self.context.features), (len(near),), generator=self.generator)
        tap = self.context.features.taps[self.tap]
        rows = tap.flatten(2)[tiles, :, near].to(self.context.device, torch.float32)
        if not torch.isfinite(rows).all():
            raise DataError("features of the training images are not finite; check the images")
        return _unit(rows)

    def _batches(self) -> Iterator[torch.Tensor]:
        features = self.context.features
        while True:
            order = torch.randperm(len(features), generator=self.generator)
            batches = features.batches((self.tap,), self.config.batch_tiles, device=self.context.device, order=order)
            for (tap,) in batches:
                rows = unit_rows(tap)
                if not torch.isfinite(rows).all():
                    raise DataError("features of the training images are not finite; check the images")
                yield rows

    def _measured(self, prototypes: torch.Tensor, where: torch.Tensor, spatial: torch.Tensor) -> Prototypes:
        mass = torch.zeros(len(prototypes), device=prototypes.device)
        farthest = torch.zeros(1, device=prototypes.device)
        for (tap,) in self.context.features.batches((self.tap,), _BATCH, device=self.context.device):
            farthest = torch.maximum(farthest, _farthest(unit_rows(tap), prototypes))
        for (tap,) in self.context.features.batches((self.tap,), _BATCH, device=self.context.device):
            rows = unit_rows(tap)
            nearest = costs(rows, prototypes, spatial, alpha=self.alpha, farthest=float(farthest)).argmin(2)
            mass += torch.bincount(nearest.flatten(), minlength=len(mass)).float()
        return Prototypes(prototypes.cpu(), where.cpu(), mass.cpu(), farthest.cpu())


def _farthest(rows: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
    return (1.0 - rows.flatten(0, 1) @ _unit(prototypes).T).amax().clamp_min(_TINY).reshape(1)


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(_TINY)


def _sets(config: PrototypesConfig) -> list[tuple[str, float]]:
    return [(tap, alpha) for tap in config.taps for alpha in config.alphas]


def _empty(config: PrototypesConfig, channels: dict[str, int], grids: dict[str, tuple[int, int]]) -> PrototypeHead:
    sets = []
    for tap, alpha in _sets(config):
        cells = min(config.cells, grids[tap][0]) * min(config.cells, grids[tap][1])
        sets.append((tap, alpha, config.copies * cells))
    return PrototypeHead(sets, channels=channels, grids=grids, weights=[1.0 / len(sets)] * len(sets))


def _own(config: MethodConfig) -> PrototypesConfig:
    if not isinstance(config, PrototypesConfig):
        raise UsageError(f"prototypes cannot use a {type(config).__name__}; take PrototypesMethod.config(preset)")
    return config
