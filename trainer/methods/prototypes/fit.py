"""Training of prototypes: each step carries a batch of patches to them by optimal transport, and they follow slowly.

No gradient anywhere. Knows features, never images; the trunk is frozen and belongs to all methods.
"""

from __future__ import annotations

import json
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator

from edge.errors import DataError, UsageError
from edge.memory.rows import RowsPrecision
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.prototypes.model import STATE, STRIDES, Metric, PrototypeHead, PrototypeSet
from trainer.methods.prototypes.training import Training, farthest_patch, measure_lengths, whiten
from trainer.methods.prototypes.travel import PLACE, PlacedRows, TravellingHead

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
            SetConfig(tap="s4", alpha=0.0, copies=4),
            SetConfig(tap="s8", alpha=0.0, copies=2),
            SetConfig(tap="s16", alpha=0.0, copies=1),
            SetConfig(tap="s16", alpha=0.3, copies=1),
        ),
        min_length=1,
        description="Sets of prototypes, whose maps are added; on a command line as JSON.",
    )
    metric: Metric = Field(Metric.SOFT, description="How patches are compared with prototypes.")
    floor: float = Field(1.0, gt=0, description="Of the metric `soft`, as a share of patches' typical length.")
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
    iterations: int = Field(20, ge=1, description="Of Sinkhorn's algorithm in a step, at most.")
    tolerance: float = Field(1e-3, ge=0, description="Relative error of the columns' masses at which they end early.")
    follow: float = Field(0.1, gt=0, le=1, description="Share of the way to the barycentre in a step.")
    steps: int = Field(20, ge=1, description="Steps of each set.")
    batch_tiles: int = Field(8, ge=1, description="Tiles of a step.")
    batch_rows: int = Field(784, ge=1, description="Patches of a step at most, drawn from its tiles.")
    rows_precision: Literal[RowsPrecision.FLOAT32, RowsPrecision.FLOAT16] = Field(
        RowsPrecision.FLOAT16, description="Numbers that prototypes are stored in."
    )
    travels: bool = Field(
        False, description="One set as rows with their places, which boxes update, send and merge as a memory."
    )

    @field_validator("sets", mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        return json.loads(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_travels(self) -> PrototypesConfig:
        if self.travels and len(self.sets) > 1:
            raise ValueError(f"{len(self.sets)} sets cannot travel: a memory has rows of one kind; give one set")
        return self


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
            return PrototypesConfig(steps=200, iterations=100, follow=0.05, batch_rows=3136)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> PrototypeHead | TravellingHead:
        """Learn the prototypes, of each product from its own images.

        Raises:
            DataError: there are no features, of a product none, or they are not finite.
            UsageError: prototypes of several products are to travel.
        """
        own, features = _own(config), context.features
        if len(features) == 0:
            raise DataError("prototypes got no training features; add good parts to train/good")
        grids = {tap: (int(t.shape[2]), int(t.shape[3])) for tap, t in features.taps.items() if tap in _taps(own)}
        channels = {tap: int(features.taps[tap].shape[1]) for tap in grids}
        if own.travels:
            if context.products:
                raise UsageError("--set travels: prototypes of several products do not travel; train each by itself")
            return _travelling(own, context, _placed(own, channels, grids).to(context.device))
        head = _empty(own, channels, grids, len(context.products) or None).to(context.device)
        if own.whitening:
            whiten(head, context, own.whitening)
        if own.metric is Metric.SOFT:
            measure_lengths(head, context, own.floor)
        generator, total = context.generator(), len(head.sets) * max(1, len(context.products))
        for product, tiles in enumerate(_tiles(context)):
            for index in range(len(head.sets)):
                done = product * len(head.sets) + index
                made = Training(context, own, head, index, tiles, generator=generator).run(done, total)
                for what in STATE:
                    buffer = head.get_buffer(f"{what}_{index}")
                    (buffer[product] if head.takes_product else buffer).copy_(getattr(made, what))
        return head.cpu().eval().requires_grad_(requires_grad=False)

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> PrototypeHead | TravellingHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not a prototype head's.
        """
        own = _own(config)
        try:
            if own.travels:
                return _built(own, tensors)
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


def _travelling(config: PrototypesConfig, context: FitContext, head: TravellingHead) -> TravellingHead:
    if config.whitening:
        whiten(head.features, context, config.whitening)
    if config.metric is Metric.SOFT:
        measure_lengths(head.features, context, config.floor)
    head.farthest.copy_(farthest_patch(head.features, context))
    training = Training(
        context, config, PlacedRows(head), 0, torch.arange(len(context.features)), generator=context.generator()
    )
    head.set_banks(training.run(0, 1).prototypes.to(context.device))
    return head.cpu().eval().requires_grad_(requires_grad=False)


def _placed(config: PrototypesConfig, channels: dict[str, int], grids: dict[str, tuple[int, int]]) -> TravellingHead:
    one = _set(config.sets[0], grids)
    return TravellingHead(
        one,
        channels=channels[one.tap],
        grid=grids[one.tap],
        metric=config.metric,
        pooled=config.pooled,
        whitened=config.whitening > 0,
        background=config.background,
    )


def _built(config: PrototypesConfig, tensors: dict[str, torch.Tensor]) -> TravellingHead:
    tap = config.sets[0].tap
    height, width = tensors[f"features.grid_{tap}"].tolist()
    channels = int(tensors["bank_local"].shape[1]) - PLACE
    head = _placed(config, {tap: channels}, {tap: (int(height), int(width))})
    head.load_state_dict(tensors)
    return head.eval().requires_grad_(requires_grad=False)


def _set(one: SetConfig, grids: dict[str, tuple[int, int]]) -> PrototypeSet:
    cells = (min(one.cells, grids[one.tap][0]), min(one.cells, grids[one.tap][1]))
    return PrototypeSet(tap=one.tap, alpha=one.alpha, cells=cells, copies=one.copies, weight=one.weight)


def _taps(config: PrototypesConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.tap for one in config.sets))


def _empty(
    config: PrototypesConfig, channels: dict[str, int], grids: dict[str, tuple[int, int]], products: int | None
) -> PrototypeHead:
    return PrototypeHead(
        [_set(one, grids) for one in config.sets],
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
