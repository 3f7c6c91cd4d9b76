"""From all patch rows of good images to a small bank: anchors as they are, weighted averages or k-means.

Pure functions on rows; float32 on one device, deterministic under a generator.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Reduction(str, Enum):
    """How a bank comes from its anchors, the greedy coreset.

    ``coreset``: the anchors themselves, real patches that reach the rim of what is good. ``weighted``: each anchor
    becomes the weighted average of its cell, which takes outliers back. ``kmeans``: Lloyd's iterations from the
    anchors, the least mean squared distance and the weakest hold on rare patches.
    """

    CORESET = "coreset"
    WEIGHTED = "weighted"
    KMEANS = "kmeans"


_PROJECTION = 32
_CHUNK = 4096
_FARTHEST = 80.0  # widths; exp(-80) still is a normal float32, so no row of a cell loses all its weight


def nearest(rows: torch.Tensor, bank: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return squared distance [n] and index [n] of the bank row nearest to each row.

    Args:
        rows: float32 [n, D].
        bank: float32 [R, D].
    """
    norms = (bank * bank).sum(1)
    values, indices = [], []
    for chunk in rows.split(_CHUNK):
        value, index = (norms - 2.0 * (chunk @ bank.T)).min(1)
        values.append((value + (chunk * chunk).sum(1)).clamp_min(0.0))
        indices.append(index)
    return torch.cat(values), torch.cat(indices)


def greedy_coreset(
    rows: torch.Tensor, size: int, generator: torch.Generator, report: Callable[[int], None] = lambda _: None
) -> torch.Tensor:
    """Select rows by greedy max-min distance on a random projection to 32 dimensions (PatchCore, section 3.2).

    Args:
        rows: float32 [n, D].
        size: rows to select; all of them if n is smaller.
        generator: a CPU generator, for the projection and the first row.
        report: called with the number of rows selected so far.

    Returns:
        int64 [min(size, n)], in order of selection, each row once.
    """
    size = min(size, len(rows))
    projection = torch.randn(rows.shape[1], _PROJECTION, generator=generator) / _PROJECTION**0.5
    points = rows @ projection.to(rows.device)
    norms = (points * points).sum(1)
    distance = torch.full((len(points),), torch.inf, device=rows.device)
    current = int(torch.randint(len(points), (1,), generator=generator))
    selected = torch.empty(size, dtype=torch.int64)
    for index in range(size):
        selected[index] = current
        torch.minimum(distance, norms - 2.0 * (points @ points[current]) + norms[current], out=distance)
        # Rounding leaves a row a little away from itself, and copies of one row are no distance apart: never twice.
        distance[current] = -torch.inf
        current = int(distance.argmax())
        if index % 50 == 0 or index == size - 1:
            report(index + 1)
    return selected


def weighted_average_reduce(
    batches: Iterable[torch.Tensor], anchors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace each anchor by the weighted average of the rows nearest to it.

    ``m_r = sum u_i z_i / sum u_i`` over the anchor's cell, ``u_i = exp(-||z_i - a_r||^2 / tau)``; tau is the median
    squared distance of the first batch. An anchor whose cell is empty stays as it is.

    Args:
        batches: rows float32 [n, D] each.
        anchors: float32 [R, D].

    Returns:
        Bank float32 [R, D] and support counts int64 [R].
    """
    tau = 0.0

    def weigh(squared: torch.Tensor) -> torch.Tensor:
        nonlocal tau
        if tau == 0.0:
            tau = max(float(squared.median()), 1e-12)
        return torch.exp(-(squared / tau).clamp_max(_FARTHEST)).double()

    return _cell_averages(batches, anchors, weigh)


def cell_means(batches: Iterable[torch.Tensor], centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace each centre by the mean of the rows nearest to it: one of Lloyd's iterations.

    Args:
        batches: rows float32 [n, D] each.
        centres: float32 [R, D].

    Returns:
        Bank float32 [R, D] and support counts int64 [R]; a centre whose cell is empty stays as it is.
    """
    return _cell_averages(batches, centres, lambda squared: torch.ones_like(squared, dtype=torch.float64))


def kmeans(rows: torch.Tensor, centres: torch.Tensor, rounds: int) -> torch.Tensor:
    """Move centres to the means of their cells until they rest (Lloyd, IEEE Trans. Inf. Theory 28, 1982).

    Args:
        rows: float32 [n, D].
        centres: float32 [R, D], where to begin.
        rounds: most iterations, >= 0.

    Returns:
        float32 [R, D].
    """
    for _ in range(rounds):
        moved, _ = cell_means([rows], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _cell_averages(
    batches: Iterable[torch.Tensor], anchors: torch.Tensor, weigh: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average the rows nearest to each anchor, weighted by a function of their squared distance."""
    total = torch.zeros(anchors.shape, dtype=torch.float64, device=anchors.device)
    weight = torch.zeros(len(anchors), dtype=torch.float64, device=anchors.device)
    support = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    for rows in batches:
        squared, index = nearest(rows, anchors)
        u = weigh(squared)
        total.index_add_(0, index, rows.double() * u[:, None])
        weight.index_add_(0, index, u)
        support.index_add_(0, index, torch.ones_like(index))
    bank = torch.where(weight[:, None] > 0, total / weight.clamp_min(1e-300)[:, None], anchors.double())
    return bank.float(), support


def whitening(batches: Iterable[torch.Tensor], share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure the mean of rows and the matrix that gives every principal direction about the same deviation.

    Args:
        batches: rows float32 [n, D] each.
        share: added to every eigenvalue of the covariance, as a share of their mean; bounds how far a direction
            in which good parts hardly vary is stretched.

    Returns:
        Mean float32 [D] and matrix float32 [D, D] on the CPU; whitened rows are ``(rows - mean) @ matrix``.
    """
    mean, covariance = moments(batches)
    if not torch.isfinite(covariance).all():
        return mean.float(), torch.full_like(covariance, torch.nan).float()
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(0.0)
    floor = (share * values.mean()).clamp_min(1e-12)
    return mean.float(), (oriented(vectors) / (values + floor).sqrt()).float()


def moments(batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean [D] and covariance [D, D], float64 on the CPU, of batches of rows [n, D]; at least one batch."""
    count, first, second = 0, None, None
    for rows in batches:
        wide = rows.double()
        count += len(wide)
        first = wide.sum(0) if first is None else first + wide.sum(0)
        second = wide.T @ wide if second is None else second + wide.T @ wide
    assert first is not None
    assert second is not None
    mean = (first / count).cpu()
    return mean, (second / count).cpu() - torch.outer(mean, mean)


def oriented(vectors: torch.Tensor) -> torch.Tensor:
    """Return eigenvectors (columns) with their largest entry positive: equal data give equal rows everywhere."""
    return vectors * torch.sign(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)))
