"""Fitting the memory detector: reduce the patch rows of good images, measure where good parts vary.

Sources: PatchCore (Roth et al., 2022) for the coreset, FedDyMem's memory-reduce by weighted averages for the bank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.memory.model import MemoryHead, patch_embedding
from trainer.methods.memory.reduce import greedy_coreset, nearest, weighted_average_reduce

if TYPE_CHECKING:
    from collections.abc import Iterator

_BATCH = 16
_FOLDS = 2
_SMALL_SET = 24
_SMALL_FOLDS = 4
_BORROWED_IMAGES = 4.0


class MemoryConfig(MethodConfig):
    """Settings of the memory detector."""

    rows: int = Field(1000, ge=1, le=2000, description="Rows of the bank.")
    candidates: int = Field(30_000, ge=1, description="Patches, drawn at random, that anchors are chosen from.")
    position: bool = Field(default=True, description="Scale and offset per map cell, from cross-fitted distances.")
    position_images: int = Field(120, ge=2, description="Images, at most, that scale and offset are measured on.")
    position_sigma: float = Field(1.0, ge=0, description="Gaussian smoothing of scale and offset, in cells.")


class MemoryMethod(Method):
    """A compressed memory bank on the shared trunk."""

    name: ClassVar[str] = "memory"
    tap_names: ClassVar[tuple[str, ...]] = ("s4", "s8", "s16")

    @classmethod
    def config(cls, preset: str) -> MemoryConfig:
        """Return the preset.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return MemoryConfig()
        if preset == "full":
            return MemoryConfig(rows=2000, candidates=100_000, position_images=400)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> MemoryHead:
        """Learn the bank.

        Raises:
            DataError: fewer than two images.
        """
        if not isinstance(config, MemoryConfig):
            raise UsageError("the memory method takes a MemoryConfig")
        return _Fit(context, config).head()

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> MemoryHead:
        """Rebuild a fitted head."""
        del config
        try:
            bank, mean = tensors["bank"], tensors["position_mean"]
            grid = (int(mean.shape[0]), int(mean.shape[1]))
            head = MemoryHead(tap_names=cls.tap_names, rows=len(bank), dimensions=bank.shape[1], grid=grid)
            head.load_state_dict(tensors)
        except (KeyError, IndexError, RuntimeError) as error:
            raise DataError(f"these tensors are no memory head ({error}); train again") from error
        return head.eval()


class _Fit:
    def __init__(self, context: FitContext, config: MemoryConfig) -> None:
        self.context, self.config = context, config
        self.features = context.features
        self.generator = context.generator()
        self.images = len(self.features) // self.features.tiles_per_image
        if self.images < 2:  # noqa: PLR2004
            raise DataError("the memory method needs at least 2 training images; add good parts to train/good")
        self.scales = torch.tensor([1.0 / self._rms(name) for name in MemoryMethod.tap_names])

    def _rms(self, name: str) -> float:
        # A constant of the training set: a scale per batch would hide a drift of the exposure.
        tap = self.features.taps[name]
        total = sum(float(part.float().pow(2).sum()) for part in tap.split(_BATCH))
        return max((total / tap.numel()) ** 0.5, 1e-6)

    def _tiles_of(self, images: torch.Tensor) -> torch.Tensor:
        tiles = self.features.tiles_per_image
        return (images[:, None] * tiles + torch.arange(tiles)).flatten()

    def _embeddings(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        names, device = MemoryMethod.tap_names, self.context.device
        scales = self.scales.to(device)
        for taps in self.features.batches(names, _BATCH, device=device, order=self._tiles_of(images)):
            yield patch_embedding(taps, names, scales)

    def _rows(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        for embedding in self._embeddings(images):
            yield embedding.permute(0, 2, 3, 1).flatten(0, 2)

    def _bank(self, images: torch.Tensor, rows: int, candidates: int, what: str) -> torch.Tensor:
        tiles = self._tiles_of(images)
        h, w = self.features.taps["s8"].shape[2:]
        share = min(1.0, candidates / (len(tiles) * h * w))
        drawn = []
        for batch in self._rows(images):
            keep = torch.randperm(len(batch), generator=self.generator)[: max(1, round(share * len(batch)))]
            drawn.append(batch[keep.to(batch.device)])
        pool = torch.cat(drawn)
        report = self.context.progress
        chosen = greedy_coreset(pool, rows, self.generator, lambda done: report(what, done, min(rows, len(pool))))
        return weighted_average_reduce(self._rows(images), pool[chosen.to(pool.device)])[0]

    def _distance_maps(self, images: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
        maps = []
        for embedding in self._embeddings(images):
            n, _, h, w = embedding.shape
            squared, _ = nearest(embedding.permute(0, 2, 3, 1).flatten(0, 2), bank)
            maps.append(squared.sqrt().view(n, h, w))
        return torch.cat(maps)

    def _position(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation per cell of the distances of images that the bank has not seen."""
        images = images[torch.randperm(len(images), generator=self.generator)[: self.config.position_images]]
        folds = min(len(images), _SMALL_FOLDS if len(images) < _SMALL_SET else _FOLDS)
        parts = images.tensor_split(folds)
        maps = []
        for index, part in enumerate(parts):
            others = torch.cat([other for j, other in enumerate(parts) if j != index])
            bank = self._bank(others, self.config.rows // 2 or 1, self.config.candidates // 2 or 1,
                              f"position, fold {index + 1}")  # fmt: skip
            maps.append(self._distance_maps(part, bank))
        return position_statistics(torch.cat(maps), self.config.position_sigma)

    def head(self) -> MemoryHead:
        images = torch.arange(self.images)
        bank = self._bank(images, self.config.rows, self.config.candidates, "memory bank")
        h, w = self.features.taps["s8"].shape[2:]
        head = MemoryHead(tap_names=MemoryMethod.tap_names, rows=len(bank), dimensions=bank.shape[1], grid=(h, w))
        head.tap_scales.copy_(self.scales)
        head.bank.copy_(bank.cpu())
        if self.config.position:
            mean, deviation = self._position(images)
            head.position_mean.copy_(mean.cpu())
            head.position_scale.copy_((1.0 / deviation).cpu())
        return head.eval().requires_grad_(False)


def position_statistics(maps: torch.Tensor, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation per cell, smoothed, and drawn towards those of all cells where images are few.

    Args:
        maps: float32 [n, h, w], distances of good images.
        sigma: Gaussian smoothing in cells; 0 is none.

    Returns:
        Mean and deviation (> 0), float32 [h, w] each.
    """
    n = len(maps)
    share = n / (n + _BORROWED_IMAGES)
    mean = share * maps.mean(0) + (1 - share) * maps.mean()
    variance = share * maps.var(0, unbiased=False) + (1 - share) * maps.var(unbiased=False)
    mean, variance = smooth(mean, sigma), smooth(variance, sigma)
    # A tenth of the mean deviation bounds what a cell that never varied may be amplified by.
    deviation = variance.sqrt()
    return mean, deviation + 0.1 * deviation.mean().clamp_min(1e-6)


def smooth(grid: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian smoothing of float32 [h, w] with repeated edges."""
    if sigma <= 0:
        return grid
    radius = max(1, round(3 * sigma))
    x = torch.arange(-radius, radius + 1, dtype=grid.dtype, device=grid.device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = functional.pad(grid[None, None], (radius,) * 4, mode="replicate")
    padded = functional.conv2d(padded, kernel.view(1, 1, 1, -1))
    return functional.conv2d(padded, kernel.view(1, 1, -1, 1))[0, 0]
