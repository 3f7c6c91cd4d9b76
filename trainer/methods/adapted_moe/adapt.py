"""Moments of one image's taps, and taps brought from them to an expert's: what adaptation computes in the graph.

Pure modules without state; they know no expert and no image.
"""

from __future__ import annotations

import torch
from torch import nn

LENGTH_FLOOR = 1e-12
"""Added to a squared length; a row of zeros stays one."""

SHIFT_FLOOR = 1e-12
"""Added to a squared shift; an image that shows exactly what was expected shifts by nothing."""

DEVIATION_FLOOR = 1e-6
"""Added to every deviation: a flat image has none, and nothing may be divided by it."""

LARGEST_RATIO = 2.0
"""A deviation is stretched or squeezed at most by this factor: beyond it the image, not its light, is another."""

TRIM = 0.05
"""Share of an image's sites, those that lie farthest from its mean, that its moments leave out."""

_VARIANCE_FLOOR = 1e-8


def unit(rows: torch.Tensor) -> torch.Tensor:
    """Return rows [..., D] at unit length."""
    return rows / ((rows * rows).sum(-1, keepdim=True) + LENGTH_FLOOR).sqrt()


class Moments(nn.Module):
    """Mean and deviation of each image's sites, channel by channel, without those that deviate most.

    A defect of less than ``trim`` of the image cannot move them far. Of equal deviations all are kept, so a constant
    image keeps its sites.

    Args:
        trim: share of the sites to leave out, in [0, 0.5].
    """

    def __init__(self, trim: float = TRIM) -> None:
        super().__init__()
        self.trim = trim

    def forward(self, tap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation (biased, over sites) float32 [N, C] each of a tap [N, C, h, w]."""
        sites = tap.flatten(2)
        squares = (sites - sites.mean(2, keepdim=True)).square()
        away = (squares / (squares.mean(2, keepdim=True) + _VARIANCE_FLOOR)).sum(1)
        left_out = int(self.trim * sites.shape[2])
        limit = away.topk(left_out + 1, dim=1).values[:, -1:]
        weight = (away <= limit).to(sites.dtype)[:, None]
        count = weight.sum(2)
        mean = (weight * sites).sum(2) / count
        variance = (weight * (sites - mean[:, :, None]).square()).sum(2) / count
        return mean, variance.sqrt() + DEVIATION_FLOOR


class Trust(nn.Module):
    """How far to believe one image's own mean: not at all within what images of training show, nearly all far outside.

    ``1 - usual^2 / shift^2``, not below 0, where the shift is in units of each channel's deviation within an image:
    ``shift^2 = mean_c ((m_c - expected_c) / sigma_c)^2``. A few hundred sites measure a mean with an error, and a
    defect is part of that error: where the light is that of training, the best estimate of the shift is none. A
    ``usual`` of 0 believes every image.

    Source: the positive part of C. Stein's estimator (W. James and C. Stein, 1961), with the spread of training images
    in place of a known variance.
    """

    def forward(
        self, mean: torch.Tensor, expected: torch.Tensor, deviation: torch.Tensor, usual: torch.Tensor
    ) -> torch.Tensor:
        """Return shares [N, 1] in [0, 1] of means, expected means and deviations [N, C], and usual shifts [N]."""
        return (1.0 - usual.square() / squared_shift(mean, expected, deviation)).clamp_min(0.0)[:, None]


def squared_shift(mean: torch.Tensor, expected: torch.Tensor, deviation: torch.Tensor) -> torch.Tensor:
    """Return how far means [N, C] lie from expected ones, [N], in units of deviations [N, C], squared; above 0."""
    return ((mean - expected) / deviation.clamp_min(DEVIATION_FLOOR)).square().mean(1) + SHIFT_FLOOR


class Adapt(nn.Module):
    """Bring a tap from the moments of what the camera shows now to those of what an expert was trained on.

    ``g = (f - m) r + mu``, ``r = clip(sigma / s, 1/2, 2)``, drawn towards 1 by how much of the scale is to be
    corrected. With m = mu and s = sigma, a tap stays as it is.

    Source: Adapted-MoE's test-time adaptation; floor and limits of the ratio are ours.
    """

    def forward(
        self,
        tap: torch.Tensor,
        *,
        now: tuple[torch.Tensor, torch.Tensor],
        trained: tuple[torch.Tensor, torch.Tensor],
        scale_share: torch.Tensor,
    ) -> torch.Tensor:
        """Return the tap [N, C, h, w].

        Args:
            tap: [N, C, h, w].
            now: mean and deviation [N, C] each, of the present.
            trained: mean and deviation [N, C] each, of the expert.
            scale_share: [N, 1], 0 corrects the mean alone, 1 the deviation too.
        """
        ratio = (trained[1] / now[1].clamp_min(DEVIATION_FLOOR)).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
        ratio = 1.0 + scale_share * (ratio - 1.0)
        moved = trained[0] - now[0] * ratio
        return tap * ratio[:, :, None, None] + moved[:, :, None, None]
