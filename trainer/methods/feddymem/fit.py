"""Fitting the fleet memory: take the generator that products share, reduce the product's rows to its own bank.

Sources: FedDyMem for the memory and its reduction by weighted averages, PatchCore (Roth et al., 2022) for the coreset.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, model_validator

from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.feddymem.generator import Recipe
from trainer.methods.feddymem.model import LEVELS, FedDyMemHead
from trainer.methods.feddymem.sources import (
    channels_of,
    generator_from,
    generator_of,
    generic_generator,
    own_generator,
)
from trainer.methods.memory.reduce import greedy_coreset, weighted_average_reduce

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.methods.feddymem.model import Generator

_BATCH = 16


class FedDyMemConfig(MethodConfig):
    """Settings of the fleet memory; the README says what each was measured to do."""

    rows: int = Field(512, ge=2, le=4096, description="Rows of the box's own bank.")
    fleet_rows: int = Field(512, ge=2, le=4096, description="Room for rows of the fleet's bank.")
    candidates: int = Field(20_000, ge=1, description="Patches, drawn at random, that anchors are chosen from.")
    background: float = Field(0.3, ge=0, le=1, description="Share of its own mean that is taken off a map.")
    smoothing: int = Field(0, ge=0, le=4, description="3x3 means of the distances.")
    generator: str = Field("generic", description="generic, own, or the run folder whose generator is taken.")
    width: int = Field(96, ge=2, le=152, description="Channels of a row; of a run's generator, its own.")
    metric_steps: int = Field(0, ge=0, description="Steps of the metric loss; 0 leaves the statistics as they are.")
    pull: float = Field(0.0, ge=0, description="Weight of the pull to one memory of all products, in the metric loss.")

    @model_validator(mode="after")
    def _pull_has_a_loss(self) -> FedDyMemConfig:
        if self.pull and not self.metric_steps:
            raise ValueError("pull is a term of the metric loss; set metric_steps, such as 400, with it")
        return self


class FedDyMemMethod(Method):
    """A local and a fleet memory on rows of a generator that products share."""

    name: ClassVar[str] = "feddymem"
    tap_names: ClassVar[tuple[str, ...]] = LEVELS

    @classmethod
    def config(cls, preset: str) -> FedDyMemConfig:
        """Return the preset.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return FedDyMemConfig()
        if preset == "full":
            return FedDyMemConfig(rows=1024, fleet_rows=1024, candidates=60_000)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> FedDyMemHead:
        """Reduce the product's rows to a bank.

        Raises:
            DataError: features that are not finite, or a generator that cannot be read or made.
        """
        own = _own(config)
        features = context.features
        grid = features.taps[LEVELS[1]].shape[2:]
        head = _empty(_generator(context, own), own, (int(grid[0]), int(grid[1])))
        head.set_banks(_bank(context, own, head))
        return head.eval().requires_grad_(requires_grad=False)

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> FedDyMemHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not a fleet memory's.
        """
        own = _own(config)
        try:
            inner = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("generator.")}
            channels = tuple(int(count) for count in tensors["channels"])
            height, width = (int(side) for side in tensors["grid"])
            head = _empty(generator_from(inner, channels, "the head"), own, (height, width))
            head.load_state_dict(tensors)
        except (DataError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"these tensors are no fleet memory ({error}); train again") from error
        return head.eval().requires_grad_(requires_grad=False)


def _own(config: MethodConfig) -> FedDyMemConfig:
    if not isinstance(config, FedDyMemConfig):
        raise UsageError(f"feddymem cannot use a {type(config).__name__}; take FedDyMemMethod.config(preset)")
    return config


def _empty(generator: Generator, config: FedDyMemConfig, grid: tuple[int, int]) -> FedDyMemHead:
    return FedDyMemHead(
        generator,
        rows=config.rows,
        fleet_rows=config.fleet_rows,
        grid=grid,
        smoothing=config.smoothing,
        background=config.background,
    )


def recipe_of(config: FedDyMemConfig) -> Recipe:
    """Return how a generator with these settings is made."""
    return Recipe(width=config.width, steps=config.metric_steps, pull=config.pull)


def _generator(context: FitContext, config: FedDyMemConfig) -> Generator:
    if config.generator == "generic":
        return generic_generator(
            context.extract, recipe_of(config), trunk_id=context.trunk_id, progress=context.progress
        ).generator
    if config.generator == "own":
        return own_generator(context, recipe_of(config)).generator
    return generator_of(Path(config.generator), channels_of(context.features))


def _bank(context: FitContext, config: FedDyMemConfig, head: FedDyMemHead) -> torch.Tensor:
    """Return the product's own rows float32 [R, D], R at most ``config.rows``, reduced from all of its patches."""
    random = context.generator()
    head = head.to(context.device)
    sites = int(head.grid.prod())
    share = min(1.0, config.candidates / (len(context.features) * sites))
    drawn = []
    for rows in _rows(context, head):
        kept = torch.randperm(len(rows), generator=random)[: max(1, round(share * len(rows)))]
        drawn.append(rows[kept.to(rows.device)])
    pool = torch.cat(drawn)
    if not torch.isfinite(pool).all():
        raise DataError("rows of the training images are not finite; check the images")
    size, report = min(config.rows, len(pool)), context.progress
    chosen = greedy_coreset(pool, size, random, lambda done: report("bank", done, size))
    bank = weighted_average_reduce(_rows(context, head), pool[chosen.to(pool.device)])[0].cpu()
    head.to("cpu")
    return bank


def _rows(context: FitContext, head: FedDyMemHead) -> Iterator[torch.Tensor]:
    with torch.inference_mode():
        for taps in context.features.batches(LEVELS, _BATCH, device=context.device):
            yield head.embed(*taps).flatten(0, 1)
