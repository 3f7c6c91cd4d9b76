"""What good parts show at each place: the distance of a site's features to their mean at that site.

The bank knows what occurs somewhere on a good part, this knows where. It must not know banks or pooling.
Source: PaDiM (Defard et al., 2021); one covariance for all sites, and a deviation of their own, are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from trainer.methods.memory.reduce import whitening
from trainer.methods.patches import enlarge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.methods.base import Features

TAP_NAMES = ("s4", "s8", "s16")
_BATCH = 16
_LEAST_SCALE = 0.1  # of the mean deviation: a site that never varied must not turn noise into an alarm


class SiteModel(nn.Module):
    """Whitened features of every site, less their mean there, over the deviation there.

    The taps are taken as they are: a 3x3 mean would blur what this is for. Projections run on each tap's own grid
    before it is enlarged, which is the same by linearity and needs a fraction of the products.

    Args:
        channels: of the taps s4, s8 and s16.
        components: principal directions that are kept, those in which good sites vary most.
        grid: height and width of the stride-8 grid.
    """

    means: torch.Tensor
    scale: torch.Tensor

    def __init__(self, *, channels: tuple[int, ...], components: int, grid: tuple[int, int]) -> None:
        super().__init__()
        for name, width in zip(TAP_NAMES, channels, strict=True):
            # skip_init: the global generator is not ours to advance.
            conv = skip_init(nn.Conv2d, width, components, 1, bias=name == TAP_NAMES[0])
            self.register_module(f"project_{name}", conv)
        self.register_buffer("means", torch.zeros(1, components, *grid))
        self.register_buffer("scale", torch.ones(2 * grid[0], 2 * grid[1]))

    def residual(self, s4: torch.Tensor, s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
        """Return whitened features less the site means, float32 [N, components, H / 4, W / 4]."""
        coarse = self.get_submodule("project_s8")(s8) + enlarge(self.get_submodule("project_s16")(s16), 2) - self.means
        fine: torch.Tensor = self.get_submodule("project_s4")(s4) + enlarge(coarse, 2)
        return fine

    @torch.no_grad()
    def recentre(self, good: Features) -> None:
        """Move to a kind of part whose features are shifted as a whole, as by another light.

        One shift per direction, the same at all sites, and one factor for all deviations: a single image has hundreds
        of sites, which measure these well, but no more than one value of each site. Good images have a mean distance
        of 1 again, as those of fitting had.

        Args:
            good: taps s4, s8 and s16 of at least one good image.
        """
        shift = torch.zeros_like(self.means)
        for taps in good.batches(TAP_NAMES, _BATCH, device=self.means.device):
            shift += self.residual(*taps).mean((2, 3), keepdim=True).sum(0, keepdim=True)
        self.means += shift / len(good)
        total = 0.0
        for taps in good.batches(TAP_NAMES, _BATCH, device=self.means.device):
            total += float(self(*taps).mean((1, 2)).sum())
        self.scale *= max(total / len(good), 1e-6)

    def forward(self, s4: torch.Tensor, s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
        """Return distances float32 [N, H / 4, W / 4]; good sites of unseen images have a mean of 1."""
        residual = self.residual(s4, s8, s16)
        return (residual * residual).sum(1).sqrt() / self.scale


def fit_sites(
    features: Features, *, components: int, share: float, generator: torch.Generator, device: torch.device
) -> SiteModel:
    """Learn means and deviations from good images.

    Deviations are measured on images that the means have not seen (two folds), so that few images do not look
    more alike than they are.

    Args:
        features: taps s4, s8 and s16 of at least two images.
        components: see :class:`SiteModel`; at most the sum of the taps' channels.
        share: of the mean eigenvalue, added to every eigenvalue of the covariance.
        generator: splits the images into folds.
        device: where to compute.

    Returns:
        The model, in eval mode on the CPU; not finite where the features are not.
    """
    taps = [features.taps[name] for name in TAP_NAMES]
    channels = tuple(int(tap.shape[1]) for tap in taps)
    mean, matrix = whitening(_joint_rows(features, device), share)
    directions = matrix[:, -min(components, sum(channels)) :]  # eigenvalues ascend
    model = SiteModel(channels=channels, components=directions.shape[1], grid=tuple(taps[1].shape[2:])).to(device)
    start = 0
    with torch.no_grad():
        for name, width in zip(TAP_NAMES, channels, strict=True):
            conv = model.get_submodule(f"project_{name}")
            conv.weight.copy_(directions[start : start + width].T[:, :, None, None])
            start += width
        model.get_submodule("project_s4").bias.copy_(-(mean @ directions))
        _fit_places(model, features, generator, device)
    return model.eval().requires_grad_(False).cpu()


def _joint_rows(features: Features, device: torch.device) -> Iterator[torch.Tensor]:
    for s4, s8, s16 in features.batches(TAP_NAMES, _BATCH, device=device):
        joint = torch.cat([s4, enlarge(torch.cat([s8, enlarge(s16, 2)], 1), 2)], 1)
        yield joint.permute(0, 2, 3, 1).flatten(0, 2)


def _fit_places(model: SiteModel, features: Features, generator: torch.Generator, device: torch.device) -> None:
    tiles = features.tiles_per_image
    images = torch.randperm(len(features) // tiles, generator=generator)
    folds = [
        (part[:, None] * tiles + torch.arange(tiles)).flatten()
        for part in (images[: len(images) // 2], images[len(images) // 2 :])
    ]
    means = []
    for fold in folds:
        total = torch.zeros_like(model.means)
        for taps in features.batches(TAP_NAMES, _BATCH, device=device, order=fold):
            total += functional.avg_pool2d(model.residual(*taps), 2).sum(0, keepdim=True)
        means.append(total / len(fold))
    squares, norms = torch.zeros_like(model.scale), torch.zeros_like(model.scale)
    for fold, unseen in zip(folds, reversed(means), strict=True):
        model.means.copy_(unseen)
        for taps in features.batches(TAP_NAMES, _BATCH, device=device, order=fold):
            distances = model(*taps)
            squares += distances.square().sum(0)
            norms += distances.sum(0)
    deviation = (squares / len(features)).sqrt()
    # A site's own deviation comes from as many values as there are images: neighbours steady it.
    smooth = functional.avg_pool2d(deviation[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    scale = smooth + _LEAST_SCALE * smooth.mean()
    mean_distance = (norms / len(features) / scale).mean().clamp_min(1e-6)
    model.means.copy_((means[0] * len(folds[0]) + means[1] * len(folds[1])) / len(features))
    model.scale.copy_(scale * mean_distance)
