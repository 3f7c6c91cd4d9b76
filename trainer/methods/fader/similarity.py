"""Structural and gradient-magnitude similarity of two pictures, as losses and as a map.

Pure functions of tensors; they know neither taps nor anomalies.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from trainer.methods.patches import enlarge

_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
# (0.01 L)^2 and (0.03 L)^2 of Wang et al. (2004) for pictures in -1..1, whose range L is 2.
_C1, _C2 = 4e-4, 3.6e-3
_GRADIENT_CONSTANT = 0.0026
"""c of Xue et al. (2014) for gradients of pictures in 0..1; ours span twice that, and are halved first."""
_TINY = 1e-6  # under the root; smaller ones vanish in half precision
SCALES = 3


def _window(channels: int, like: torch.Tensor) -> torch.Tensor:
    x = torch.arange(_SSIM_WINDOW, dtype=torch.float64) - _SSIM_WINDOW // 2
    line = torch.exp(-0.5 * (x / _SSIM_SIGMA) ** 2)
    return (line / line.sum()).to(like).expand(channels, 1, 1, _SSIM_WINDOW)


def structural_dissimilarity(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return 1 - mean SSIM (Wang et al., 2004; Gaussian window of 11, sigma 1.5), a scalar in 0..2.

    Args:
        first: float32 [N, C, h, w] in about -1..1, h and w at least 11.
        second: as ``first``.
    """
    window = _window(first.shape[1], first)

    def mean(x: torch.Tensor) -> torch.Tensor:
        x = functional.conv2d(x, window, groups=x.shape[1])
        return functional.conv2d(x, window.transpose(2, 3), groups=x.shape[1])

    mean_1, mean_2 = mean(first), mean(second)
    variance_1, variance_2 = mean(first * first) - mean_1 * mean_1, mean(second * second) - mean_2 * mean_2
    covariance = mean(first * second) - mean_1 * mean_2
    similarity = (2 * mean_1 * mean_2 + _C1) * (2 * covariance + _C2)
    similarity = similarity / ((mean_1 * mean_1 + mean_2 * mean_2 + _C1) * (variance_1 + variance_2 + _C2))
    return 1 - similarity.mean()


class GradientSimilarity(nn.Module):
    """Multi-scale gradient-magnitude dissimilarity (MSGMS of RIAD): Prewitt gradients at three scales."""

    prewitt: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[1.0, 0.0, -1.0]] * 3) / 3
        self.register_buffer("prewitt", torch.stack([across, across.T])[:, None], persistent=False)

    def magnitude(self, picture: torch.Tensor) -> torch.Tensor:
        """Return the gradient magnitude float32 [N, 1, h, w] of the mean over channels, edges repeated."""
        grey = functional.pad(picture.mean(1, keepdim=True) * 0.5, (1, 1, 1, 1), mode="replicate")
        return (functional.conv2d(grey, self.prewitt).square().sum(1, keepdim=True) + _TINY).sqrt()

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return 1 - similarity, float32 [N, 1, h, w] in 0..1, the mean over scales 1, 1/2 and 1/4.

        Args:
            first: float32 [N, C, h, w] in about -1..1, h and w multiples of 4.
            second: as ``first``.
        """
        total: torch.Tensor | None = None
        for scale in range(SCALES):
            a, b = self.magnitude(first), self.magnitude(second)
            missed = 1 - (2 * a * b + _GRADIENT_CONSTANT) / (a * a + b * b + _GRADIENT_CONSTANT)
            missed = enlarge(missed, 2**scale)
            total = missed if total is None else total + missed
            if scale < SCALES - 1:
                first, second = functional.avg_pool2d(first, 2), functional.avg_pool2d(second, 2)
        assert total is not None
        return total / SCALES
