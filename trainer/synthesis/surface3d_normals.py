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

_ASKED = 7  # nearest ones that say whether normals agree, the point itself first
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
        viewpoint: float64 [3], where the sensor stood: normals point towards it. None: nobody says; outwards from the
            centroid, as of a closed part, or to the origin where that opposes fewer neighbours, as in a view of a side.
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
    if viewpoint is not None:
        return Surface(_towards(normals, viewpoint - points), residual)
    outwards, seen = (_towards(normals, wanted) for wanted in (points - points.mean(axis=0), -points))
    # A closed part around the origin is as consistent inside out.
    one_view = _opposed(seen, near) < 0.5 * _opposed(outwards, near)
    return Surface(seen if one_view else outwards, residual)


def _towards(normals: Values, wanted: Values) -> Values:
    return np.where((normals * wanted).sum(axis=1) < 0, -1.0, 1.0)[:, None] * normals


def _opposed(normals: Values, near: npt.NDArray[np.intp]) -> float:
    """Return the share of nearest neighbours whose normals point the other way."""
    return float(np.mean([(normals * normals[near[:, at]]).sum(axis=1) < 0 for at in range(1, _ASKED)]))
