"""Local multivariate Gaussian noise (LMGN): feature cells replaced by draws from the Gaussian of their own place.

For training only; it knows feature maps and a generator, neither methods nor images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

VARIANCE_FLOOR = 1e-8
_SITES_AT_ONCE = 512  # eigenvectors of so many sites are found together


class LocalGaussian:
    """A Gaussian for every site of a feature map: mean, and covariance ``F F^T + diag(d^2)`` of low rank.

    The diagonal makes the variance of every channel exact, whatever the rank; at full rank the covariance is exact.

    Source: HetNet's LMGN for the noise; N(mu_ij, Sigma_ij) per site as PaDiM (Defard et al., 2021) has it. Low rank
    plus diagonal is our own: a full covariance for every site of a fine map is hundreds of megabytes.

    Attributes:
        mean: float32 [sites, C], sites row by row.
        factor: F, float32 [sites, C, rank].
        deviation: d, float32 [sites, C].
        grid: (h, w) with h * w sites.
    """

    def __init__(
        self, mean: torch.Tensor, factor: torch.Tensor, deviation: torch.Tensor, grid: tuple[int, int]
    ) -> None:
        self.mean, self.factor, self.deviation, self.grid = mean, factor, deviation, grid

    @classmethod
    def fit(cls, batches: Iterable[torch.Tensor], *, radius: int = 1, rank: int = 16) -> LocalGaussian:
        """Measure the Gaussians over images and over the window around each site.

        Args:
            batches: float32 [n, C, h, w] each, finite; N images in all.
            radius: r; a site learns from the (2r + 1)^2 sites around it that exist, so from up to N (2r + 1)^2 rows.
            rank: of F, >= 1; at most C.

        Raises:
            DataError: there is no map, or one holds a value that is not finite.
        """
        count, first, second, grid = 0, None, None, (0, 0)
        for batch in batches:
            grid = (int(batch.shape[2]), int(batch.shape[3]))
            sites = batch.flatten(2).permute(2, 0, 1).double()
            count += sites.shape[1]
            total, products = sites.sum(1), sites.transpose(1, 2) @ sites
            first, second = (total, products) if first is None else (first + total, second + products)
        if first is None or second is None:
            raise DataError("no feature map was given to measure the noise from; give at least one good image")
        weight = _window(
            torch.full((first.shape[0], 1), float(count), dtype=torch.float64, device=first.device), grid, radius
        )
        mean = _window(first, grid, radius) / weight
        covariance = _window(second.flatten(1), grid, radius).unflatten(1, second.shape[1:]) / weight[..., None]
        covariance -= mean[:, :, None] * mean[:, None, :]
        if not torch.isfinite(covariance).all():
            raise DataError("features are not finite; the trunk's weights are damaged or overflow float16")
        factor, deviation = _low_rank(covariance, min(rank, covariance.shape[1]))
        return cls(mean.float(), factor.float(), deviation.float(), grid)

    def covariance(self, site: int) -> torch.Tensor:
        """Return the covariance float32 [C, C] that is drawn from at one site."""
        return self.factor[site] @ self.factor[site].T + torch.diag(self.deviation[site].square())

    def sample(self, sites: torch.Tensor, generator: torch.Generator, *, spread: float = 1.0) -> torch.Tensor:
        """Draw one vector for each index in ``sites``.

        Args:
            sites: int64 [n], indices into the grid, row by row.
            generator: a CPU generator.
            spread: factor of the deviation; 1 draws what good parts would have there.

        Returns:
            float32 [n, C] on the device of the Gaussians.
        """
        device = self.mean.device
        inner = torch.randn(len(sites), self.factor.shape[2], generator=generator).to(device)
        outer = torch.randn(len(sites), self.mean.shape[1], generator=generator).to(device)
        sites = sites.to(device)
        drawn = (self.factor[sites] @ inner[:, :, None]).squeeze(2) + self.deviation[sites] * outer
        return self.mean[sites] + spread * drawn

    def replace(
        self, maps: torch.Tensor, cells: torch.Tensor, generator: torch.Generator, *, spread: float = 1.0
    ) -> torch.Tensor:
        """Sample and replace: draw anew what lies inside the boxes, and leave every other cell bit for bit.

        Args:
            maps: float32 [N, C, h, w]; not changed.
            cells: bool [N, h, w], what is replaced.
            generator: a CPU generator.
            spread: see :meth:`sample`.

        Returns:
            float32 [N, C, h, w].

        Raises:
            DataError: the maps are not of the grid that was measured.
        """
        if tuple(maps.shape[2:]) != self.grid or maps.shape[1] != self.mean.shape[1]:
            raise DataError(
                f"maps are {tuple(maps.shape[1:])}, the noise was measured on {(self.mean.shape[1], *self.grid)}; "
                "measure it on the same taps at the same input size"
            )
        image, y, x = torch.nonzero(cells.cpu(), as_tuple=True)
        drawn = self.sample(y * self.grid[1] + x, generator, spread=spread)
        rows = maps.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
        rows[image.to(maps.device), y.to(maps.device), x.to(maps.device)] = drawn.to(maps.device)
        return rows.permute(0, 3, 1, 2)


def draw_boxes(
    count: int,
    grid: tuple[int, int],
    generator: torch.Generator,
    *,
    share: float,
    sides: tuple[int, int] = (1, 2),
) -> torch.Tensor:
    """Draw square boxes of cells, several on every map.

    Args:
        count: maps.
        grid: (h, w) in cells.
        generator: a CPU generator.
        share: of all cells that the boxes would cover without overlap, in (0, 1]; at least one box is drawn.
        sides: smallest and largest side in cells, 1 <= smallest <= largest; a side never exceeds the grid.

    Returns:
        bool [count, h, w].
    """
    height, width = grid
    low, high = (min(side, height, width) for side in sides)
    area = sum(side * side for side in range(low, high + 1)) / (high - low + 1)
    boxes = max(1, round(share * height * width / area))
    side = torch.randint(low, high + 1, (count, boxes), generator=generator)
    top, left = (
        (torch.rand(count, boxes, generator=generator) * (length - side + 1)).long() for length in (height, width)
    )
    y, x = torch.arange(height), torch.arange(width)
    rows = (y >= top[..., None]) & (y < (top + side)[..., None])
    columns = (x >= left[..., None]) & (x < (left + side)[..., None])
    return (rows[:, :, :, None] & columns[:, :, None, :]).any(1)


def extrude(cells: torch.Tensor, factor: int) -> torch.Tensor:
    """Enlarge boxes bool [N, h, w] to a grid finer by a whole factor, so that they are aligned through the levels."""
    return cells.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def _window(sums: torch.Tensor, grid: tuple[int, int], radius: int) -> torch.Tensor:
    """Sum [sites, K] over the window around every site; what lies outside the grid adds nothing."""
    side = 2 * radius + 1
    maps = sums.T.unflatten(1, grid)
    pooled = functional.avg_pool2d(maps[None], side, 1, radius)[0] * side * side
    return pooled.flatten(1).T


def _low_rank(covariance: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    factors, deviations = [], []
    for part in covariance.split(_SITES_AT_ONCE):
        values, vectors = torch.linalg.eigh(part)
        factor = vectors[:, :, -rank:] * values[:, None, -rank:].clamp_min(0).sqrt()
        rest = part.diagonal(dim1=1, dim2=2) - factor.square().sum(2)
        factors.append(factor)
        deviations.append(rest.clamp_min(VARIANCE_FLOOR).sqrt())
    return torch.cat(factors), torch.cat(deviations)
