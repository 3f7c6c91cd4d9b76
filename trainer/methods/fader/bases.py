"""The two bases: reconstruction of the features themselves, and of the image.

Both are small U-Net decoders on the frozen trunk's taps. Neither knows of gates.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from trainer.methods.deviation import feature_rows
from trainer.methods.fader.base import Hint, MaskedBase, Reading
from trainer.methods.fader.similarity import GradientSimilarity, structural_dissimilarity
from trainer.methods.memory.reduce import whitening
from trainer.methods.patches import enlarge, patch_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_ERROR_WINDOW = 5
_ROW_STEP, _ALL_ROWS = 11, 4096  # of a batch: neighbouring rows say the same; 11 walks over all columns of a grid


class BaseKind(str, Enum):
    """What is reconstructed."""

    FEATURES = "features"
    """Whitened taps at strides 4, 8 and 16."""
    IMAGE = "image"
    """The image at half its size."""


def _conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    # skip_init: the global generator is not ours to advance.
    return skip_init(nn.Conv2d, inputs, outputs, kernel, padding=kernel // 2)


class Stage(nn.Module):
    """One stage of a decoder: narrow the skip to a few channels, join it with what came from below, two 3x3 layers.

    The narrow skip is the bottleneck without which a decoder copies its input.

    Args:
        skip: channels of the skip feature.
        narrow: channels it is narrowed to.
        below: channels of the stage below; 0 is the deepest stage.
        width: channels of the result.
    """

    def __init__(self, skip: int, narrow: int, below: int, width: int) -> None:
        super().__init__()
        self.narrow = _conv(skip, narrow, 1)
        self.first, self.second = _conv(narrow + below, width), _conv(width, width)

    def forward(self, skip: torch.Tensor, below: torch.Tensor | None) -> torch.Tensor:
        """Return float32 [N, width, h, w] for a skip on the same grid and a lower stage on half of it."""
        x = self.narrow(skip)
        if below is not None:
            x = torch.cat([enlarge(below, 2), x], dim=1)
        return functional.relu(self.second(functional.relu(self.first(x))))


class _Decoder(nn.Module):
    """Stages from the deepest skip up; returns the state of every stage, finest first."""

    def __init__(self, channels: Sequence[int], bottleneck: float, widths: Sequence[int]) -> None:
        super().__init__()
        narrow = tuple(max(1, round(bottleneck * width)) for width in channels)
        below = (*widths[1:], 0)
        self.stages = nn.ModuleList(Stage(*sizes) for sizes in zip(channels, narrow, below, widths, strict=True))

    def forward(self, skips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        states: list[torch.Tensor] = []
        for stage, skip in zip(reversed(self.stages), reversed(skips), strict=True):
            states.insert(0, stage(skip, states[0] if states else None))
        return states


class FeatureBase(MaskedBase):
    """Reconstruct the whitened taps themselves; a level's map is the Mahalanobis length of its residual.

    Args:
        shapes: [C, h, w] of each tap.
        hint: what is shown of masked cells.
        block: side of a mosaic block in input pixels.
        width: channels of the decoder at strides 16 and 8; half of it at stride 4.
        bottleneck: share of its channels that a skip is narrowed to.
    """

    tap_names = ("s4", "s8", "s16")
    skip_names = tap_names
    # A 3x3 mean over the finest tap would blur small defects away; on the coarser ones it takes noise off.
    local_means = (False, True, True)
    level_strides = (4, 8, 16)
    level_weights = (1.0, 1.0, 1.0)
    float_ops = ("deviations", "rewhiten")

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], *, hint: Hint, block: int, width: int, bottleneck: float
    ) -> None:
        super().__init__(shapes, hint=hint, block=block)
        widths = (width // 2, width, width)
        self.decoder = _Decoder(self.skip_channels, bottleneck, widths)
        self.predict = nn.ModuleList(_conv(w, c, 1) for w, c in zip(widths, self.skip_channels, strict=True))
        self.rewhiten = nn.ModuleList(_conv(c, c, 1) for c in self.skip_channels)

    def read(self, taps: Sequence[torch.Tensor]) -> Reading:
        """Targets are the features themselves."""
        features = tuple(self.deviation(name)(tap) for name, tap in zip(self.tap_names, taps, strict=True))
        return Reading(features, features)

    def decode(self, skips: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the predicted features, one per tap, float32 [N, C, h, w]."""
        states = self.decoder(skips)
        return tuple(predict(state) for predict, state in zip(self.predict, states, strict=True))

    def loss(self, reconstruction: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the mean squared residual, summed over the taps."""
        errors = [functional.mse_loss(found, wanted) for found, wanted in zip(reconstruction, targets, strict=True)]
        return torch.stack(errors).sum()

    def levels(self, reconstruction: Sequence[torch.Tensor], reading: Reading) -> tuple[torch.Tensor, ...]:
        """Return the length of the whitened residual of each tap."""
        maps = []
        for whiten, found, wanted in zip(self.rewhiten, reconstruction, reading.targets, strict=True):
            maps.append((whiten(wanted - found).square().sum(1, keepdim=True) + 1e-6).sqrt())
        return tuple(maps)

    @torch.no_grad()
    def settle(self, pairs: Iterable[tuple[tuple[torch.Tensor, ...], Reading]], share: float) -> None:
        """Whiten the residuals of each tap by their covariance on good parts."""
        rows: list[list[torch.Tensor]] = [[] for _ in self.skip_names]
        for reconstruction, reading in pairs:
            for kept, found, wanted in zip(rows, reconstruction, reading.targets, strict=True):
                residual = feature_rows(wanted - found)
                kept.append(residual[:: _ROW_STEP if len(residual) > _ALL_ROWS else 1])
        for whiten, kept in zip(self.rewhiten, rows, strict=True):
            assert isinstance(whiten, nn.Conv2d)
            assert whiten.bias is not None
            mean, matrix = whitening(kept, share)
            whiten.weight.copy_(matrix.T[:, :, None, None])
            whiten.bias.copy_(-(mean @ matrix))


class ImageBase(MaskedBase):
    """Reconstruct the image at half its size; levels are the absolute error and the loss of gradient similarity.

    Args:
        shapes: [C, h, w] of each tap.
        hint: what is shown of masked cells.
        block: side of a mosaic block in input pixels.
        width: channels of the decoder at strides 16 and 8; half of it at stride 4, a third at stride 2.
        bottleneck: share of its channels that a skip is narrowed to.
    """

    tap_names = ("s1", "s2", "s4", "s8", "s16")
    skip_names = ("s2", "s4", "s8", "s16")
    local_means = (False, False, False, True)
    level_strides = (4, 4)
    level_weights = (1.0, 1.0)
    float_ops = ("deviations", "similarity")

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], *, hint: Hint, block: int, width: int, bottleneck: float
    ) -> None:
        super().__init__(shapes, hint=hint, block=block)
        widths = (max(8, width // 3), width // 2, width, width)
        self.decoder = _Decoder(self.skip_channels, bottleneck, widths)
        self.predict = _conv(widths[0], int(shapes["s1"][0]), 1)
        self.similarity = GradientSimilarity()

    def read(self, taps: Sequence[torch.Tensor]) -> Reading:
        """The target is the normalised image at half its size."""
        features = tuple(self.deviation(name)(tap) for name, tap in zip(self.skip_names, taps[1:], strict=True))
        return Reading(features, (functional.avg_pool2d(taps[0], 2),))

    def decode(self, skips: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the image float32 [N, 3, H/2, W/2], about -1..1."""
        return (self.predict(self.decoder(skips)[0]),)

    def loss(self, reconstruction: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return squared error + (1 - SSIM) + (1 - MSGMS), all with weight 1 as in RIAD."""
        (found,), (wanted,) = reconstruction, targets
        squared = functional.mse_loss(found, wanted)
        return squared + structural_dissimilarity(found, wanted) + self.similarity(found, wanted).mean()

    def levels(self, reconstruction: Sequence[torch.Tensor], reading: Reading) -> tuple[torch.Tensor, ...]:
        """Return the 5x5 mean of the absolute error and the gradient dissimilarity, both at stride 4."""
        (found,), (wanted,) = reconstruction, reading.targets
        error = (wanted - found).abs().mean(1, keepdim=True)
        error = functional.avg_pool2d(error, _ERROR_WINDOW, stride=1, padding=_ERROR_WINDOW // 2)
        return functional.avg_pool2d(error, 2), functional.avg_pool2d(patch_mean(self.similarity(found, wanted)), 2)
