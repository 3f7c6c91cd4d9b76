"""What every base with a single deterministic mask has in common: normalised taps, the mask, the hint behind it.

It knows neither gates nor training; the two bases that ship are in ``bases``.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from trainer.methods.deviation import Deviation

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MASK_STRIDE = 16
"""Input pixels per cell of the mask: the grid of the deepest tap."""


class Hint(str, Enum):
    """What the decoder sees of a masked cell."""

    MOSAIC = "mosaic"
    """The mean over a large block (EAR): the gross content stays, the detail of a defect does not."""
    BLANK = "blank"
    """Nothing: zero, which is the normal mean. The ablation."""


class Reading(NamedTuple):
    """What a base reads from the taps of N tiles.

    Attributes:
        features: skip features before anything is hidden, finest first; the last one is the deepest tap.
        targets: what is to be reconstructed.
    """

    features: tuple[torch.Tensor, ...]
    targets: tuple[torch.Tensor, ...]


def enlarge_nearest(grid: torch.Tensor, factor: int) -> torch.Tensor:
    """Repeat every cell of float32 [N, C, h, w] ``factor`` times along both axes."""
    return grid if factor == 1 else functional.interpolate(grid, scale_factor=float(factor), mode="nearest")


def mosaic(feature: torch.Tensor, block: int) -> torch.Tensor:
    """Replace every ``block`` x ``block`` cells of float32 [N, C, h, w] by their mean; block divides h and w."""
    return feature if block == 1 else enlarge_nearest(functional.avg_pool2d(feature, block), block)


class MaskedBase(nn.Module):
    """A model that reconstructs under one mask, which depends on the image alone.

    One forward pass: ``read`` the taps, compute the ``mask`` from the deepest of them, hide in the ``skips`` what it
    covers, ``decode`` once, measure the ``levels``. A gate may change the skips between hiding and decoding; a base
    does not know of gates.

    Attributes:
        tap_names: taps that ``read`` takes.
        skip_names: taps that become skip features, finest first.
        local_means: whether each of them is averaged over 3x3 cells first.
        level_strides: input pixels per cell of each map that ``levels`` returns.
        level_weights: weight of each of them in the anomaly map.
        float_ops: submodules that stay in float32 under int8.
        threshold: float32 scalar; cells whose squared saliency exceeds it are masked.
    """

    tap_names: tuple[str, ...]
    skip_names: tuple[str, ...]
    local_means: tuple[bool, ...]
    level_strides: tuple[int, ...]
    level_weights: tuple[float, ...]
    float_ops: tuple[str, ...] = ("deviations",)
    threshold: torch.Tensor

    def __init__(self, shapes: Mapping[str, Sequence[int]], *, hint: Hint, block: int) -> None:
        """Make an empty base.

        Args:
            shapes: [C, h, w] of each tap.
            hint: what is shown of masked cells.
            block: side of a mosaic block in input pixels, 16 or 32.
        """
        super().__init__()
        self.hint, self.block = hint, block
        self.strides = tuple(int(name[1:]) for name in self.skip_names)
        self.deviations = nn.ModuleDict(
            {
                name: Deviation(shapes[name], local_mean=local_mean)
                for name, local_mean in zip(self.skip_names, self.local_means, strict=True)
            }
        )
        self.register_buffer("threshold", torch.tensor(torch.inf))

    @property
    def skip_channels(self) -> tuple[int, ...]:
        """Channels of each skip feature."""
        return tuple(int(self.deviation(name).centre.shape[0]) for name in self.skip_names)

    def deviation(self, name: str) -> Deviation:
        """Return the normaliser of one tap."""
        found = self.deviations[name]
        assert isinstance(found, Deviation)
        return found

    def saliency(self, reading: Reading) -> torch.Tensor:
        """Return float32 [N, 1, H/16, W/16]: squared distance of the deepest tap's cells from the normal mean."""
        return reading.features[-1].square().sum(1, keepdim=True)

    def mask(self, reading: Reading) -> torch.Tensor:
        """Return float32 [N, 1, H/16, W/16], 1 where the saliency exceeds the fixed threshold."""
        return (self.saliency(reading) > self.threshold).to(torch.float32)

    def skips(self, reading: Reading, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the skip features with the hint in place of what the mask covers, finest first."""
        hidden = []
        for feature, stride in zip(reading.features, self.strides, strict=True):
            cover = enlarge_nearest(mask, MASK_STRIDE // stride)
            shown = feature * (1.0 - cover)
            if self.hint is Hint.MOSAIC:
                shown = shown + mosaic(feature, self.block // stride) * cover
            hidden.append(shown)
        return tuple(hidden)

    def read(self, taps: Sequence[torch.Tensor]) -> Reading:
        """Normalise taps float32 [N, C, h, w] in the order of ``tap_names``."""
        raise NotImplementedError

    def decode(self, skips: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Reconstruct the targets from the skip features."""
        raise NotImplementedError

    def loss(self, reconstruction: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the reconstruction loss, a scalar."""
        raise NotImplementedError

    def levels(self, reconstruction: Sequence[torch.Tensor], reading: Reading) -> tuple[torch.Tensor, ...]:
        """Return how far the reconstruction misses: maps float32 [N, 1, h, w] >= 0, one per level."""
        raise NotImplementedError

    def settle(self, pairs: Iterable[tuple[tuple[torch.Tensor, ...], Reading]], share: float) -> None:
        """Take over statistics of what good parts miss; a base without any has nothing to do.

        Args:
            pairs: reconstruction and reading of batches of good tiles.
            share: added to every eigenvalue of the residuals' covariance, as a share of their mean.
        """
