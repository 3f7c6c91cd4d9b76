"""Moments of one image's patches, and rows brought from them to an expert's: what adaptation computes in the graph.

Pure modules without state; they know no expert and no image.
"""

from __future__ import annotations

import torch
from torch import nn

LENGTH_FLOOR = 1e-12
"""Added to a squared length; a row of zeros stays one."""

DEVIATION_FLOOR = 1e-6
"""Added to every deviation: a flat image has none, and nothing may be divided by it."""

LARGEST_RATIO = 2.0
"""A deviation is stretched or squeezed at most by this factor: beyond it the image, not its light, is another."""

TRIM = 0.05
"""Share of an image's patches, those that lie farthest from its mean, that its moments leave out."""

_VARIANCE_FLOOR = 1e-8


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [..., D] at unit length."""
    return rows / ((rows * rows).sum(-1, keepdim=True) + LENGTH_FLOOR).sqrt()


class Moments(nn.Module):
    """Mean and deviation of each image's patches, without those that deviate most.

    A defect of less than ``trim`` of the image cannot move them far. Of equal deviations all are kept, so a constant
    image keeps its patches.

    Args:
        trim: share of the patches to leave out, in [0, 0.5].
    """

    def __init__(self, trim: float = TRIM) -> None:
        super().__init__()
        self.trim = trim

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation (biased, over patches) float32 [N, D] each of rows [N, L, D]."""
        squares = (rows - rows.mean(1, keepdim=True)).square()
        away = (squares / (squares.mean(1, keepdim=True) + _VARIANCE_FLOOR)).sum(2)
        left_out = int(self.trim * rows.shape[1])
        limit = away.topk(left_out + 1, dim=1).values[:, -1:]
        weight = (away <= limit).to(rows.dtype)[:, :, None]
        count = weight.sum(1)
        mean = (weight * rows).sum(1) / count
        variance = (weight * (rows - mean[:, None]).square()).sum(1) / count
        return mean, variance.sqrt() + DEVIATION_FLOOR


class Adapt(nn.Module):
    """Bring rows from the moments of what the camera shows now to those of what an expert was trained on.

    ``g = (f - m) r + mu`` at unit length, ``r = clip(sigma / s, 1/2, 2)``, drawn towards 1 by how much of the scale is
    to be corrected. With m = mu and s = sigma, rows stay as they are.

    Source: Adapted-MoE's test-time adaptation; floor and limits of the ratio are ours.
    """

    def forward(
        self,
        rows: torch.Tensor,
        *,
        now: tuple[torch.Tensor, torch.Tensor],
        trained: tuple[torch.Tensor, torch.Tensor],
        scale_share: torch.Tensor,
    ) -> torch.Tensor:
        """Return rows [N, L, D].

        Args:
            rows: [N, L, D], of unit length.
            now: mean and deviation [N, D] each, of the present.
            trained: mean and deviation [N, D] each, of the expert.
            scale_share: [1], 0 corrects the mean alone, 1 the deviation too.
        """
        ratio = (trained[1] / now[1].clamp_min(DEVIATION_FLOOR)).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
        ratio = 1.0 + scale_share * (ratio - 1.0)
        return unit((rows - now[0][:, None]) * ratio[:, None] + trained[0][:, None])
