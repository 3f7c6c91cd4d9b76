"""The depth trunk: XYZ in metres -> taps of local geometry at three scales, as one graph without a learned weight.

It must not know parts, banks or thresholds. Planes are fitted by weighted sums, so that holes count for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

LEVELS = ("s4", "s8", "s16")
VALID = "valid"
NORMALS = "normals"
CHANNELS = 11
POOLED = 4
"""Cells of a level's own grid along each side of a tap's cell."""

_SMALL, _LARGE = 2, 5  # half widths in cells of the two planes that are compared
_LEAST_SHARE = 0.4  # of a window's points: a plane through fewer leans on one side
_RIDGE = 0.05  # squared cells: keeps a plane through one row of points finite
_SOFT_LIMIT = 24.0  # multiples of the unit: a crease may be far out, and must not be all that a bank knows
_LEAST_AREA = 1e-16  # square metres of a cell: below it there is no direction
_LEAST_CELLS = 0.5 / POOLED**2  # of a pooled cell, in which something must be known
_CURVATURE = 10.0  # brings radians per cell to the size of the other channels


class Planes(NamedTuple):
    """Planes fitted to windows around every cell.

    Attributes:
        centre: float32 [N, 3, h, w], each plane at its window's middle, metres.
        across: float32 [N, 3, h, w], metres per cell to the right.
        down: float32 [N, 3, h, w], metres per cell downwards.
        normal: float32 [N, 3, h, w], unit length, towards the sensor.
        share: float32 [N, 1, h, w] in [0, 1], valid points of the window.
    """

    centre: torch.Tensor
    across: torch.Tensor
    down: torch.Tensor
    normal: torch.Tensor
    share: torch.Tensor


class PlaneFit(nn.Module):
    """Least-squares planes over the rows and columns of a grid, of valid points only.

    Each coordinate is regressed on column and row, which needs no squares of metres: those cancel in float32.

    Args:
        half: half width of the window in cells.
    """

    def __init__(self, half: int) -> None:
        super().__init__()
        self.half = half
        ramp = torch.arange(-half, half + 1, dtype=torch.float32)
        kernels = torch.stack([torch.ones_like(ramp), ramp, ramp * ramp])
        # Along a row: 1 and then the ramp for each coordinate; for the weight its square, too.
        self.register_buffer("row", kernels[[0, 0, 0, 1, 1, 1, 0, 1, 2]][:, None, None, :])
        # Down the columns, of what was summed along the row: see forward.
        of_points, of_weight = [0, 0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 2, 0, 1, 0]
        self.register_buffer("column", kernels[of_points + of_weight][:, None, :, None])

    def forward(self, points: torch.Tensor, weight: torch.Tensor) -> Planes:
        """Fit planes.

        Args:
            points: float32 [N, 3, h, w], metres about a common middle, 0 where ``weight`` is.
            weight: float32 [N, 1, h, w], 1 at valid points, else 0.
        """
        half = self.half
        stacked = torch.cat([points, points, weight, weight, weight], 1)
        row = functional.conv2d(stacked, self.row, padding=(0, half), groups=9)
        flat, ramp, w0, w1, w2 = row.split([3, 3, 1, 1, 1], 1)
        stacked = torch.cat([flat, flat, ramp, w0, w0, w0, w1, w1, w2], 1)
        summed = functional.conv2d(stacked, self.column, padding=(half, 0), groups=15)
        total, by_row, by_column, count, moments = summed.split([3, 3, 3, 1, 5], 1)
        inverse = 1.0 / count.clamp_min(1.0)
        v, vv, u, uv, uu = (moments * inverse).split(1, 1)
        mean = total * inverse
        cuu, cvv, cuv = uu - u * u + _RIDGE, vv - v * v + _RIDGE, uv - u * v
        du, dv = by_column * inverse - u * mean, by_row * inverse - v * mean
        determinant = 1.0 / (cuu * cvv - cuv * cuv)
        across = (cvv * du - cuv * dv) * determinant
        down = (cuu * dv - cuv * du) * determinant
        normal = _unit(_cross(down, across))
        width = 2 * half + 1
        return Planes(mean - u * across - v * down, across, down, normal, count * (1.0 / (width * width)))


class LevelGeometry(nn.Module):
    """Local geometry of one grid, pooled by 4.

    Channels: means of the height of a small plane's middle over a large one, of sum and difference of the principal
    curvatures, of the angle between the planes' normals, and of the cosine towards the sensor; root mean squares of
    the height, of the points' distances to the small and the large plane, and of the sum of curvatures; largest
    magnitude of the height and of the angle. Lengths are in units and, with the curvatures, soft-limited.
    """

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = PlaneFit(_SMALL), PlaneFit(_LARGE)
        # Differences along a row of each coordinate, then down a column.
        step = torch.zeros(6, 3, 2 * _SMALL + 1, 2 * _SMALL + 1)
        for axis in range(3):
            step[axis, axis, _SMALL, 0], step[axis, axis, _SMALL, -1] = -1.0, 1.0
            step[3 + axis, axis, 0, _SMALL], step[3 + axis, axis, -1, _SMALL] = -1.0, 1.0
        self.register_buffer("step", step * (_CURVATURE / (2 * _SMALL)))
        # Of the four entries of the curvature tensor: their trace, the difference of the main ones, the mixed ones. The
        # grid's second direction is the mirrored one: its own entry and one mixed entry change sign.
        signs = torch.tensor([[1.0, 0.0, 0.0, -1.0], [1.0, 0.0, 0.0, 1.0], [0.0, -1.0, 1.0, 0.0]])
        self.register_buffer("tensor", signs.repeat_interleave(3, 1)[:, :, None, None])

    def forward(
        self, points: torch.Tensor, weight: torch.Tensor, smooth: torch.Tensor, unit: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Describe a grid.

        Args:
            points: float32 [N, 3, h, w], metres about a common middle, 0 where invalid.
            weight: float32 [N, 1, h, w], 1 where valid.
            smooth: float32 [N, 1, h, w], 1 where no jump in depth is near.
            unit: float32, metres of one unit of length.

        Returns:
            float32 [N, 11, h / 4, w / 4], and the normals float32 [N, 3, h / 4, w / 4] of the large planes, both 0
            where nothing is known.
        """
        small, large = self.small(points, weight), self.large(points, weight)
        known = weight * smooth * _above(large.share, _LEAST_SHARE) * _above(small.share, _LEAST_SHARE)
        lengths = torch.cat(
            [
                _dot(small.centre - large.centre, large.normal),
                _dot(points - small.centre, small.normal),
                _dot(points - large.centre, large.normal),
            ],
            1,
        )
        angle = _CURVATURE * _length(small.normal - large.normal)
        # Heights, scatter about the small and the large plane, sum and difference of curvatures, angle.
        local = torch.cat([_soft(torch.cat([lengths / unit, *self._curvature(small)], 1)), angle], 1) * known
        share = functional.avg_pool2d(known, POOLED)
        over = _above(share, _LEAST_CELLS) / share.clamp_min(_LEAST_CELLS)
        mean = functional.avg_pool2d(torch.cat([local, large.normal * known], 1), POOLED) * over
        spread = (functional.avg_pool2d(local * local, POOLED) * over).sqrt()
        most = functional.max_pool2d(local.abs(), POOLED)
        height, _, _, bend, twist, tilt, normal = mean.split([1, 1, 1, 1, 1, 1, 3], 1)
        pooled = [height, bend, twist, tilt, -normal[:, 2:], spread[:, :4], most[:, :1], most[:, 5:]]
        return torch.cat(pooled, 1), normal

    def _curvature(self, planes: Planes) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sum and difference of the principal curvatures, radians per ten cells, [N, 1, h, w] each."""
        change = functional.conv2d(planes.normal, self.step, padding=_SMALL)
        along, downwards = change.split(3, 1)
        first = _unit(planes.across)
        second = _cross(planes.normal, first)
        products = torch.cat([along * first, along * second, downwards * first, downwards * second], 1)
        # A plane through one row of points turns about it at the mercy of rounding, which engines do differently.
        firm = -functional.max_pool2d(-_above(planes.share, _LEAST_SHARE), 2 * _SMALL + 1, 1, _SMALL)
        bend, half, mixed = (functional.conv2d(products, self.tensor) * firm).split(1, 1)
        return bend, (half * half + mixed * mixed).sqrt()


class GeometryTrunk(nn.Module):
    """Depth maps -> local geometry at strides 4, 8 and 16, normals, and which cells were measured.

    A pyramid of three grids, each half as fine, the mean of its valid points; on each the same planes are fitted, so a
    tap of stride s sees defects of about s/2 to 3 s points. Points beside a jump in depth (a silhouette, not a crease)
    belong to no surface, and what a window with one would say is left out.

    Attributes:
        tap_names: ``s4``, ``s8``, ``s16``, ``normals`` (stride 4) and ``valid`` (stride 4, share of valid points).
        tap_channels: channels of each.
        tap_strides: input cells per cell of each.
        input_dtype: of the image.
    """

    unit: torch.Tensor
    jump: torch.Tensor

    tap_names = (*LEVELS, NORMALS, VALID)
    tap_channels = {**dict.fromkeys(LEVELS, CHANNELS), NORMALS: 3, VALID: 1}  # noqa: RUF012 (as of every trunk)
    tap_strides = {"s4": 4, "s8": 8, "s16": 16, NORMALS: 4, VALID: 4}  # noqa: RUF012
    input_dtype = torch.float32

    def __init__(self, *, unit_m: float = 1e-3, jump_m: float = 0.015) -> None:
        super().__init__()
        self.register_buffer("unit", torch.tensor(unit_m))
        self.register_buffer("jump", torch.tensor(jump_m))
        self.levels = nn.ModuleList(LevelGeometry() for _ in LEVELS)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the taps.

        Args:
            image: float32 [N, H, W, 3], XYZ in metres, NaN where invalid; H and W multiples of 32.

        Returns:
            float32 [N, C, H / s, W / s] each, in the order of ``tap_names``; 0 where nothing was measured.
        """
        planes = image.permute(0, 3, 1, 2)
        bad = torch.isnan(planes)
        weight = 1.0 - bad.float().amax(1, keepdim=True)
        points = torch.where(bad, 0.0, planes) * weight
        smooth = self._smooth(points[:, 2:], weight)
        # About the middle of what was measured: a metre costs float32 a tenth of a micrometre.
        count = weight.sum((2, 3), keepdim=True).clamp_min(1.0)
        points = (points - points.sum((2, 3), keepdim=True) / count) * weight
        taps: list[torch.Tensor] = []
        normals: list[torch.Tensor] = []
        valid = functional.avg_pool2d(weight, POOLED)
        for index, level in enumerate(self.levels):
            if index:
                points, weight = _halved(points, weight)
                smooth = -functional.max_pool2d(-smooth, 2)
            # On the coarser grids the large window would leave nothing but the middle of a part.
            reach = _SMALL if index else _LARGE
            free = -functional.max_pool2d(-smooth, 2 * reach + 1, 1, reach)
            tap, normal = level(points, weight, free, self.unit)
            taps.append(tap)
            normals.append(normal)
        return (*taps, normals[0], valid)

    def _smooth(self, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return 1 where the depths of the 3x3 valid neighbours span less than a jump, else 0."""
        far = 1e3 * (1.0 - weight)
        highest = functional.max_pool2d(z * weight - far, 3, 1, 1)
        lowest = -functional.max_pool2d(-(z * weight + far), 3, 1, 1)
        return 1.0 - _above(highest - lowest, self.jump) * weight


def _halved(points: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    share = functional.avg_pool2d(weight, 2)
    kept = _above(share, 0.5)
    return functional.avg_pool2d(points, 2) / share.clamp_min(0.25) * kept, kept


def _above(values: torch.Tensor, limit: float | torch.Tensor) -> torch.Tensor:
    return (values >= limit).float()


def _soft(values: torch.Tensor, limit: float = _SOFT_LIMIT) -> torch.Tensor:
    """Bend values towards +-limit; a quarter of it is moved by 3 %."""
    return values / (1.0 + (values * (1.0 / limit)) ** 2).sqrt()


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(1, keepdim=True)


def _length(a: torch.Tensor) -> torch.Tensor:
    return (a * a).sum(1, keepdim=True).sqrt()


def _unit(a: torch.Tensor) -> torch.Tensor:
    # Squares of metres per cell are 1e-6 and their products 1e-12; and an exporter takes a sum with so little for none.
    scaled = a / a.abs().amax(1, keepdim=True).clamp_min(_LEAST_AREA)
    return scaled / _length(scaled).clamp_min(0.5)


def _cross(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    ax, ay, az = a.split(1, 1)
    bx, by, bz = b.split(1, 1)
    return torch.cat([ay, az, ax], 1) * torch.cat([bz, bx, by], 1) - torch.cat([az, ax, ay], 1) * torch.cat(
        [by, bz, bx], 1
    )
