"""The geometry of PBAS: the grid of centres, each patch's centre, and anomalies synthesised outside of it.

Pure functions on rows of projected patches; they know neither networks nor images.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch.nn import functional

CENTRE_MOMENTUM = 0.9
TINY = 1e-8  # guards the direction of a patch that lies on its centre


class Direction(str, Enum):
    """Where an anomaly is put, seen from the good patch that it is made of."""

    OUTWARD = "outward"
    """Away from the patch's centre: the paper's way."""
    RANDOM = "random"
    """Anywhere, the same distance away: the ablation that shows why outward matters."""


class Synthesis(NamedTuple):
    """Anomalies and what they were made of, R rows of D values.

    Attributes:
        anomalies: float32 [R, D], one for each good patch.
        centre_loss: scalar, mean distance of the good patches from their centres; carries gradient.
    """

    anomalies: torch.Tensor
    centre_loss: torch.Tensor


def nearest_centre(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return the index of the centre with the greatest cosine similarity.

    Args:
        rows: [R, D].
        centres: [M, D].

    Returns:
        int64 [R]. Every centre is a candidate wherever it lies on the grid, so that a shifted part finds its own.
    """
    # The length of a row does not change its arg max; only the centres need normalising.
    return (rows @ functional.normalize(centres, dim=1).T).argmax(dim=1)


def align_centres(centres: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Move centres towards one batch's position-wise means, each mean to the centre that it resembles most.

    Equals the paper's sequential update ``c[i] <- 0.9 c[i] + 0.1 m[j]`` over j, where i is the centre nearest to m[j]
    before the batch; several means that meet on one centre are applied in order.

    Args:
        centres: [M, D].
        means: [M, D], one per grid site.

    Returns:
        [M, D], new centres.
    """
    owner = nearest_centre(means, centres)
    hits = torch.bincount(owner, minlength=len(centres))
    order = torch.sort(owner, stable=True).indices
    first = torch.cumsum(hits, 0) - hits
    rank = torch.empty_like(owner)
    rank[order] = torch.arange(len(owner), device=owner.device) - first[owner[order]]
    weight = (1 - CENTRE_MOMENTUM) * CENTRE_MOMENTUM ** (hits[owner] - 1 - rank).to(means.dtype)
    moved = centres * (CENTRE_MOMENTUM ** hits.to(centres.dtype))[:, None]
    return moved.index_add_(0, owner, means * weight[:, None])


def synthesise(
    rows: torch.Tensor,
    centres: torch.Tensor,
    *,
    k: float,
    direction: Direction = Direction.OUTWARD,
    generator: torch.Generator | None = None,
) -> Synthesis:
    """Put one anomaly outside the boundary for every good patch.

    With u a patch, c its centre and r the batch's mean of ``|u - c|``: z = u + stopgrad(k r (u - c) / |u - c|).
    So every anomaly lies exactly k r farther from the centre than its patch, on the same ray, and the gradient of z
    with respect to u through the displacement is zero.

    Args:
        rows: u, [R, D], carries gradient.
        centres: [M, D], constant.
        k: displacement in units of the mean radius, > 0.
        direction: see :class:`Direction`.
        generator: CPU generator of the random direction; needed for it alone.
    """
    with torch.no_grad():
        own = centres[nearest_centre(rows, centres)]
    offset = rows - own
    radius = offset.norm(dim=1)
    centre_loss = radius.mean()
    with torch.no_grad():
        ray = offset
        if direction is Direction.RANDOM:
            ray = torch.randn(offset.shape, generator=generator, dtype=offset.dtype).to(offset.device)
        ray = ray / ray.norm(dim=1, keepdim=True).clamp_min(TINY)
        displacement = k * centre_loss * ray
    return Synthesis(rows + displacement, centre_loss)
