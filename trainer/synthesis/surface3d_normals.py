"""Normals of a surface from its points, and how far its points scatter about it: the noise floor.

It must not know defects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    import numpy.typing as npt

    Values = npt.NDArray[np.float64]

NEIGHBOURS = 30
"""Neighbours whose plane is a point's; the noise floor is defined with as many."""

_CHUNK = 16_384  # points whose neighbourhoods are in memory at once: 12 MB


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """How far valid points lie from the plane of their 30 nearest neighbours, metres.

    Attributes:
        median: the middle one.
        p95: the 95th percentile; what a defect must exceed to be seen.
    """

    median: float
    p95: float


@dataclass(frozen=True, slots=True)
class Surface:
    """What the neighbourhoods of points say.

    Attributes:
        normals: float64 [M, 3], unit length, oriented.
        residual: float64 [M], distance of each point to its neighbours' plane, metres, >= 0.
    """

    normals: Values
    residual: Values

    @property
    def noise(self) -> NoiseFloor:
        """The noise floor."""
        return noise_of(self.residual)


def noise_of(residual: Values) -> NoiseFloor:
    """Return the noise floor of residuals [M], metres."""
    median, p95 = np.quantile(residual, (0.5, 0.95))
    return NoiseFloor(median=float(median), p95=float(p95))


def estimate_surface(points: Values, *, viewpoint: Values | None = None, neighbours: int = NEIGHBOURS) -> Surface:
    """Fit a plane to the nearest neighbours of every point.

    Args:
        points: float64 [M, 3], valid ones, M > ``neighbours``.
        viewpoint: float64 [3], where the sensor stood: normals point towards it. None: outwards from the centroid, for
            closed parts.
        neighbours: points of a neighbourhood, the point itself among them.
    """
    _, near = cKDTree(points).query(points, k=min(neighbours, len(points)))
    normals, residual = np.empty_like(points), np.empty(len(points))
    for start in range(0, len(points), _CHUNK):
        rows = slice(start, start + _CHUNK)
        around = points[near[rows]]
        middle = around.mean(axis=1)
        around -= middle[:, None]
        _, vectors = np.linalg.eigh(around.transpose(0, 2, 1) @ around)
        normals[rows] = vectors[:, :, 0]
        residual[rows] = np.abs(((points[rows] - middle) * vectors[:, :, 0]).sum(axis=1))
    normals *= _towards(points, normals, viewpoint)[:, None]
    return Surface(normals, residual)


def _towards(points: Values, normals: Values, viewpoint: Values | None) -> Values:
    wanted = points - points.mean(axis=0) if viewpoint is None else viewpoint - points
    return np.where((normals * wanted).sum(axis=1) < 0, -1.0, 1.0)
