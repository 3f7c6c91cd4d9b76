"""Points of a surface laid out flat: which of them are valid, where each lies in a plane, what a grid says there.

It must not know noise fields or defects. Source: 3D-PNAS (Cheng and Du, arXiv 2504.12856), its first two steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    Values = npt.NDArray[np.float64]

LEAST_POINTS = 32
"""Fewer valid points have neither neighbourhoods nor a plane."""

_AXES, _SCAN = 3, 3


def valid_points(xyz: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Return which points of a scan were measured.

    Args:
        xyz: [H, W, 3] or [N, 3]; NaN, infinite or all-zero points are invalid, as depth sensors write them.

    Returns:
        bool [H, W] or [N].

    Raises:
        DataError: another shape, no floating-point numbers, or fewer than 32 valid points.
    """
    if xyz.ndim not in {2, _SCAN} or xyz.shape[-1] != _AXES or not np.issubdtype(xyz.dtype, np.floating):
        raise DataError(f"a scan is {xyz.dtype} {list(xyz.shape)}, expected floats [H, W, 3] or [N, 3]")
    valid = np.isfinite(xyz).all(axis=-1) & (xyz != 0).any(axis=-1)
    if (count := int(np.count_nonzero(valid))) < LEAST_POINTS:
        raise DataError(f"a scan has {count} valid points, expected at least {LEAST_POINTS}; scan more of the part")
    return np.asarray(valid)


@dataclass(frozen=True, slots=True)
class Chart:
    """The plane that a cloud is laid out in.

    Attributes:
        flat: float64 [M, 2], each point along the two main directions, metres, from the mean.
        low: float64 [2], smallest of each.
        extent: float64 [2], largest less smallest of each, metres.
        axes: float64 [2, 3], the two directions, unit length.
    """

    flat: Values
    low: Values
    extent: Values
    axes: Values


def lay_out(points: Values) -> Chart:
    """Project points onto their two principal directions.

    Each direction points to where the third moment is positive; without that rule its sign would be the eigen solver's
    choice, and a rotated cloud would get another field. A cloud whose two main variances are equal, or that is
    symmetric about its middle, has no such direction: there a rotation may change the layout.

    Args:
        points: float64 [M, 3], valid ones.
    """
    centred = points - points.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    axes = vectors[:, :0:-1].T  # eigenvalues ascend
    flat = centred @ axes.T
    signs = np.where((flat**3).sum(axis=0) < 0, -1.0, 1.0)
    flat, axes = flat * signs, axes * signs[:, None]
    low = flat.min(axis=0)
    return Chart(flat=flat, low=low, extent=flat.max(axis=0) - low, axes=axes)


@dataclass(frozen=True, slots=True)
class GridPlaces:
    """Where points lie between the nodes of a square grid that spans them.

    Attributes:
        row: int64 [M], the node below, 0 <= row < nodes - 1.
        column: int64 [M].
        down: float64 [M] in [0, 1], the share of the way to the next row.
        right: float64 [M] in [0, 1].
    """

    row: npt.NDArray[np.int64]
    column: npt.NDArray[np.int64]
    down: Values
    right: Values

    @classmethod
    def of(cls, chart: Chart, nodes: int) -> GridPlaces:
        """Place the points of a chart in a grid of ``nodes`` x ``nodes`` whose columns follow the first direction."""
        share = (chart.flat - chart.low) / np.maximum(chart.extent, np.finfo(np.float64).tiny)
        places = np.clip(share, 0.0, 1.0) * (nodes - 1)
        whole = np.minimum(places.astype(np.int64), nodes - 2)
        part = places - whole
        return cls(row=whole[:, 1], column=whole[:, 0], down=part[:, 1], right=part[:, 0])

    def sample(self, grid: Values) -> Values:
        """Return a grid's value at each point, bilinear, float64 [M]."""
        upper = grid[self.row, self.column] * (1.0 - self.right) + grid[self.row, self.column + 1] * self.right
        lower = grid[self.row + 1, self.column] * (1.0 - self.right) + grid[self.row + 1, self.column + 1] * self.right
        return np.asarray(upper * (1.0 - self.down) + lower * self.down)

    def strongest(self, grid: Values, what: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return, per point, what another grid holds at the node of the cell around it where ``grid`` is largest."""
        rows = np.stack([self.row, self.row, self.row + 1, self.row + 1])
        columns = np.stack([self.column, self.column + 1, self.column, self.column + 1])
        best = grid[rows, columns].argmax(axis=0)[None]
        row, column = np.take_along_axis(rows, best, axis=0)[0], np.take_along_axis(columns, best, axis=0)[0]
        return np.asarray(what[row, column])
