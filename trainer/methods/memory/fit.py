"""Fitting the memory detector: whiten each level, reduce its patch rows to a bank, bring the levels to one scale.

Sources: PatchCore (Roth et al., 2022) for the coreset, FedDyMem's memory-reduce by weighted averages for the bank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from edge.errors import DataError, UsageError
from edge.memory.rows import RowsPrecision, round_rows
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.memory.model import LEVELS, MemoryHead, level_patches
from trainer.methods.memory.reduce import (
    Reduction,
    cell_means,
    greedy_coreset,
    kmeans,
    nearest,
    weighted_average_reduce,
    whitening,
)
from trainer.methods.memory.sites import SiteModel, fit_sites

if TYPE_CHECKING:
    from collections.abc import Iterator

_BATCH = 16
_SCALE_IMAGES = 60


class MemoryConfig(MethodConfig):
    """Settings of the memory detector; the README says what each was measured to do."""

    rows: int = Field(1000, ge=2, le=2000, description="Rows of each level's bank; the finest level has half.")
    fine_weight: float = Field(1.0, gt=0, description="Weight of the finest level in the map; the others have 1.")
    candidates: int = Field(30_000, ge=1, description="Patches, drawn at random, that anchors are chosen from.")
    whitening: float = Field(0.3, gt=0, description="Added to every eigenvalue, as a share of their mean.")
    background: float = Field(0.3, ge=0, le=1, description="Share of its own mean that is taken off a map.")
    site_weight: float = Field(1.0, ge=0, description="Weight of the distance to each site's own mean; 0 is none.")
    site_components: int = Field(96, ge=1, description="Principal directions that the sites are compared in.")
    reduction: Reduction = Field(Reduction.WEIGHTED, description="How the anchors become the bank.")
    rounds: int = Field(10, ge=1, description="Most iterations over the candidates where reduction is kmeans.")
    rows_precision: Literal[RowsPrecision.FLOAT32, RowsPrecision.INT8] = Field(
        RowsPrecision.FLOAT32, description="Numbers that rows are stored and shipped in; the search stays as it is."
    )


class MemoryMethod(Method):
    """Compressed memory banks on the shared trunk."""

    name: ClassVar[str] = "memory"
    tap_names: ClassVar[tuple[str, ...]] = LEVELS

    @classmethod
    def config(cls, preset: str) -> MemoryConfig:
        """Return the preset.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return MemoryConfig()
        if preset == "full":
            return MemoryConfig(rows=2000, candidates=100_000)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> MemoryHead:
        """Learn the banks.

        Raises:
            DataError: fewer than two images, or features that are not finite.
        """
        return _Fit(context, _own(config)).head()

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> MemoryHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not a memory head's.
        """
        try:
            banks = [tensors[f"bank_{name}"] for name in LEVELS]
            head = _empty(banks, _own(config), _empty_sites(tensors))
            head.load_state_dict(tensors)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"these tensors are no memory head ({error}); train again") from error
        return head.eval().requires_grad_(False)


def _own(config: MethodConfig) -> MemoryConfig:
    if not isinstance(config, MemoryConfig):
        raise UsageError(f"the memory method cannot use a {type(config).__name__}; take MemoryMethod.config(preset)")
    return config


def _empty(banks: list[torch.Tensor], config: MemoryConfig, sites: SiteModel | None) -> MemoryHead:
    return MemoryHead(
        rows=tuple(len(bank) for bank in banks),
        channels=tuple(int(bank.shape[1]) for bank in banks),
        background=config.background,
        sites=sites,
        site_weight=config.site_weight,
        int8_rows=config.rows_precision is RowsPrecision.INT8,
    )


def _empty_sites(tensors: dict[str, torch.Tensor]) -> SiteModel | None:
    if "sites.means" not in tensors:
        return None
    _, components, height, width = tensors["sites.means"].shape
    channels = tuple(int(tensors[f"sites.project_{name}.weight"].shape[1]) for name in LEVELS)
    return SiteModel(channels=channels, components=components, grid=(height, width))


class _Fit:
    def __init__(self, context: FitContext, config: MemoryConfig) -> None:
        self.context, self.config = context, config
        self.features = context.features
        self.generator = context.generator()
        self.images = len(self.features) // self.features.tiles_per_image
        if self.images < 2:  # noqa: PLR2004
            raise DataError("the memory method needs at least 2 training images; add good parts to train/good")

    def head(self) -> MemoryHead:
        everything = torch.arange(self.images)
        transforms = {name: self._whitening(name) for name in LEVELS}
        banks = {name: self._bank(name, transforms[name], everything, self._size(name)) for name in LEVELS}
        head = _empty([banks[name] for name in LEVELS], self.config, self._sites())
        for index, name in enumerate(LEVELS):
            mean, matrix = transforms[name]
            layer = head.get_submodule(f"whiten_{name}")
            with torch.no_grad():
                layer.weight.copy_(matrix.T[:, :, None, None])
                layer.bias.copy_(-(mean @ matrix))
            bank = banks[name]
            if head.int8_state:
                bank = torch.from_numpy(round_rows(bank.numpy()))
            head.get_buffer(f"bank_{name}").copy_(bank)
            weight = self.config.fine_weight if index == 0 else 1.0
            head.get_buffer("scales")[index] = weight / self._mean_distance(name, transforms[name])
        return head.eval().requires_grad_(False)

    def _sites(self) -> SiteModel | None:
        if self.config.site_weight == 0:
            return None
        return fit_sites(
            self.features,
            components=self.config.site_components,
            share=self.config.whitening,
            generator=self.generator,
            device=self.context.device,
        )

    def _size(self, name: str) -> int:
        # The finest grid has four times the queries of the next; half the rows keep its search as cheap.
        return max(1, self.config.rows // 2) if name == LEVELS[0] else self.config.rows

    def _patches(self, name: str, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield rows float32 [n, C], a tile's sites consecutive."""
        tiles = self.features.tiles_per_image
        order = (images[:, None] * tiles + torch.arange(tiles)).flatten()
        for (tap,) in self.features.batches((name,), _BATCH, device=self.context.device, order=order):
            yield level_patches(name, tap).permute(0, 2, 3, 1).flatten(0, 2)

    def _whitening(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        mean, matrix = whitening(self._patches(name, torch.arange(self.images)), self.config.whitening)
        if not (torch.isfinite(mean).all() and torch.isfinite(matrix).all()):
            raise DataError(f"features of tap {name} are not finite; check the training images")
        return mean, matrix

    def _rows(
        self, name: str, transform: tuple[torch.Tensor, torch.Tensor], images: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        mean, matrix = (part.to(self.context.device) for part in transform)
        for rows in self._patches(name, images):
            yield (rows - mean) @ matrix

    def _bank(
        self, name: str, transform: tuple[torch.Tensor, torch.Tensor], images: torch.Tensor, size: int
    ) -> torch.Tensor:
        sites = self.features.taps[name].shape[2] * self.features.taps[name].shape[3] * self.features.tiles_per_image
        share = min(1.0, self.config.candidates / (len(images) * sites))
        drawn = []
        for batch in self._rows(name, transform, images):
            keep = torch.randperm(len(batch), generator=self.generator)[: max(1, round(share * len(batch)))]
            drawn.append(batch[keep.to(batch.device)])
        pool = torch.cat(drawn)
        size, report = min(size, len(pool)), self.context.progress
        chosen = greedy_coreset(pool, size, self.generator, lambda done: report(f"bank {name}", done, size))
        return self._reduced(pool, pool[chosen.to(pool.device)], self._rows(name, transform, images)).cpu()

    def _reduced(self, pool: torch.Tensor, anchors: torch.Tensor, rows: Iterator[torch.Tensor]) -> torch.Tensor:
        if self.config.reduction is Reduction.CORESET:
            return anchors
        if self.config.reduction is Reduction.WEIGHTED:
            return weighted_average_reduce(rows, anchors)[0]
        # The candidates find the cells; the last iteration is over every patch.
        return cell_means(rows, kmeans(pool, anchors, self.config.rounds))[0]

    def _mean_distance(self, name: str, transform: tuple[torch.Tensor, torch.Tensor]) -> float:
        """Return the mean distance of good patches to a bank that has not seen their image (two folds)."""
        drawn = torch.randperm(self.images, generator=self.generator)[:_SCALE_IMAGES]
        half = len(drawn) // 2
        total = count = 0.0
        for seen, unseen in ((drawn[:half], drawn[half:]), (drawn[half:], drawn[:half])):
            bank = self._bank(name, transform, seen, max(1, self._size(name) // 4)).to(self.context.device)
            for rows in self._rows(name, transform, unseen):
                squared, _ = nearest(rows, bank)
                total, count = total + float(squared.sqrt().sum()), count + len(squared)
        return max(total / count, 1e-6)
