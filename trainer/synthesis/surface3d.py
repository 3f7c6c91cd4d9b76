"""Put synthetic surface defects on scans of good parts, with the points that they moved.

It decides which points move how far; files, pictures and what learns from them are others' business.
Source: 3D-PNAS (Cheng and Du, arXiv 2504.12856): points laid flat, a Perlin field, displacement along normals.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from trainer.synthesis.surface3d_chart import Chart, GridPlaces, lay_out, valid_points
from trainer.synthesis.surface3d_normals import NoiseFloor, Surface, estimate_surface
from trainer.synthesis.surface3d_perlin import fractal_sum
from trainer.synthesis.surface3d_presets import Edge, Sign, StrengthUnit, SurfaceNoise, Units

if TYPE_CHECKING:
    import numpy.typing as npt

    Values = npt.NDArray[np.float64]

CLEARLY_VISIBLE = 4.0
"""Multiples of the noise floor; a weaker defect is no example of one."""

_MOST_OF_THEM = 0.95
_ROUNDING = 1e-9
_LEAST_REGION = 24  # points; a smaller region is not chosen while there are larger ones
_TURNS = 2.0 * np.pi


@dataclass(frozen=True, slots=True)
class Part:
    """A scan of a good part with what is needed to put defects on it, computed once.

    Attributes:
        xyz: [H, W, 3] or [N, 3] floats, metres, as given.
        valid: bool [H, W] or [N].
        points: float64 [M, 3], the valid points.
        surface: their normals and scatter.
        chart: the points laid flat.
    """

    xyz: npt.NDArray[np.floating]
    valid: npt.NDArray[np.bool_]
    points: Values
    surface: Surface
    chart: Chart

    @classmethod
    def of(cls, xyz: npt.NDArray[np.floating], *, viewpoint: Values | None = None, closed: bool = False) -> Part:
        """Look at a scan.

        Args:
            xyz: [H, W, 3], an organised scan, or [N, 3]; metres; NaN, infinite or all-zero points are invalid.
            viewpoint: float [3], where the sensor stood; None is the origin, where depth cameras put themselves.
            closed: nobody says where a sensor stood; see :func:`estimate_surface` for where normals point then.

        Raises:
            DataError: no scan, or too few valid points.
        """
        valid = valid_points(xyz)
        points = np.asarray(xyz[valid], np.float64)
        origin = np.zeros(3) if viewpoint is None else np.asarray(viewpoint, np.float64)
        return cls.with_surface(xyz, estimate_surface(points, viewpoint=None if closed else origin), valid=valid)

    @classmethod
    def with_surface(
        cls, xyz: npt.NDArray[np.floating], surface: Surface, *, valid: npt.NDArray[np.bool_] | None = None
    ) -> Part:
        """Look at a scan whose normals are known: ``surface`` holds those of its valid points, in order.

        Raises:
            DataError: no scan, or too few valid points.
        """
        valid = valid_points(xyz) if valid is None else valid
        points = np.asarray(xyz[valid], np.float64)
        return cls(xyz, valid, points, surface, lay_out(points))

    @property
    def noise(self) -> NoiseFloor:
        """The scan's noise floor."""
        return self.surface.noise

    @property
    def diagonal(self) -> float:
        """Diagonal of the box along the principal directions, metres: the same however the part is turned."""
        thickness = np.ptp(self.points @ np.cross(*self.chart.axes))
        return float(np.hypot(np.linalg.norm(self.chart.extent), thickness))


@dataclass(frozen=True, slots=True)
class SurfaceDefect:
    """A scan with a synthetic defect.

    Attributes:
        xyz: as the part's, same shape and type; points outside ``mask`` and invalid ones bit for bit.
        mask: bool [H, W] or [N], the points that the field moved.
        label: bool, those of them that moved further than the noise floor: what can be seen, and learned from.
        displacement: float64 [H, W] or [N], metres along the normal, positive towards the sensor; 0 outside ``mask``.
        field: float64 [H, W] or [N] in [0, 1], NaN at invalid points.
        grid: float64 [resolution, resolution] in [0, 1], the field before it was sampled.
        settings: parameters.
        seed: of every choice.
        strength: largest displacement that the parameters allow here, metres.
        noise: the part's noise floor.
    """

    xyz: npt.NDArray[np.floating]
    mask: npt.NDArray[np.bool_]
    label: npt.NDArray[np.bool_]
    displacement: Values
    field: Values
    grid: Values
    settings: SurfaceNoise
    seed: int
    strength: float
    noise: NoiseFloor

    @property
    def reached(self) -> float:
        """How far the points that the field moved went, 95th percentile in metres; 0 where it moved none."""
        return _reached(np.abs(self.displacement[self.mask]))

    @property
    def below_noise(self) -> bool:
        """Whether nothing moved, or :attr:`reached` is under four times the noise floor: no example of a defect."""
        return not self.reached or self.reached < CLEARLY_VISIBLE * self.noise.p95 * (1 - _ROUNDING)

    def record(self) -> dict[str, Any]:
        """Return what made this sample, and what came of it, for JSON."""
        return {
            "schema": "lineward.surface_defect/1",
            "settings": self.settings.model_dump(mode="json"),
            "seed": self.seed,
            "strength_m": self.strength,
            "noise_median_m": self.noise.median,
            "noise_p95_m": self.noise.p95,
            "below_noise": self.below_noise,
            "reached_m": self.reached,
            "largest_displacement_m": float(np.abs(self.displacement).max()),
            "points_moved": int(np.count_nonzero(self.mask)),
            "points_labelled": int(np.count_nonzero(self.label)),
            "points_valid": int(np.count_nonzero(np.isfinite(self.field))),
        }


def perturb(part: Part, settings: SurfaceNoise, *, seed: int) -> SurfaceDefect:
    """Put a defect on a part: ``p' = p + sign * strength * w(v) * n`` for the field's value v at each point.

    ``w`` is 0 up to the threshold and from there, with a soft edge, ``(v - threshold) / (1 - threshold)``. One plane
    serves the whole cloud: the front and the back of a closed part get the same field, and steep sides a stretched one.

    Args:
        part: a good part.
        settings: parameters.
        seed: of every choice, >= 0; the same part, parameters and seed give the same bytes.
    """
    rng = np.random.default_rng(seed)
    grid = noise_grid(part.chart, settings, rng)
    places = GridPlaces.of(part.chart, settings.resolution)
    value = places.sample(grid)
    regions = _regions(grid, settings.threshold)
    at = places.strongest(grid, regions)
    moved = value > settings.threshold
    weight = _weight(value, moved, settings)
    drawn = _draw_region(at[moved], rng)
    if settings.single_region and drawn:
        weight *= at == drawn
        moved &= at == drawn
        weight /= max(float(weight.max(initial=0.0)), np.finfo(np.float64).tiny)
    strength = _strength(part, settings, _reached(weight[moved]))
    offset = strength * weight * _signs(settings.sign, at, int(regions.max(initial=0)), rng)
    xyz = part.xyz.copy()
    displaced = part.points[moved] + offset[moved, None] * part.surface.normals[moved]
    whole = np.flatnonzero(part.valid)
    xyz.reshape(-1, 3)[whole[moved]] = displaced.astype(xyz.dtype)
    noise = part.noise
    return SurfaceDefect(
        xyz=xyz,
        mask=_spread(part, moved, fill=False),
        label=_spread(part, moved & (np.abs(offset) >= noise.p95), fill=False),
        displacement=_spread(part, np.where(moved, offset, 0.0), fill=0.0),
        field=_spread(part, value, fill=np.nan),
        grid=grid,
        settings=settings,
        seed=seed,
        strength=strength,
        noise=noise,
    )


def noise_grid(chart: Chart, settings: SurfaceNoise, rng: np.random.Generator) -> Values:
    """Return the field over the box of a chart, float64 [resolution, resolution] in [0, 1]; columns follow axis one.

    Shapes longer than wide lie in a direction that is drawn.
    """
    longest = max(float(chart.extent.max()), np.finfo(np.float64).tiny)
    side = np.linspace(0.0, 1.0, settings.resolution)
    x, y = (side * extent for extent in chart.extent)
    if settings.units is Units.BOX:
        x, y = x / longest, y / longest
    else:
        x, y = x + chart.low[0], y + chart.low[1]
    # Always drawn, so that what follows is the same at every aspect.
    turn = rng.uniform(0.0, _TURNS)
    along, across = x[None, :], y[:, None]
    if settings.aspect > 1.0:
        along, across = (
            np.cos(turn) * along + np.sin(turn) * across,
            np.cos(turn) * across - np.sin(turn) * along,
        )
    field = fractal_sum(
        along * settings.scale,
        across * settings.scale * settings.aspect,
        octaves=settings.octaves,
        persistence=settings.persistence,
        lacunarity=settings.lacunarity,
        rng=rng,
    )
    field = field - field.min()
    return np.asarray(field / max(float(field.max()), np.finfo(np.float64).tiny))


def _regions(grid: Values, threshold: float) -> npt.NDArray[np.int32]:
    """Number the regions above the threshold from 1; 0 is none of them."""
    _, labels = cv2.connectedComponents((grid > threshold).astype(np.uint8), connectivity=8, ltype=cv2.CV_32S)
    return np.asarray(labels, np.int32)


def _weight(value: Values, moved: npt.NDArray[np.bool_], settings: SurfaceNoise) -> Values:
    if settings.edge is Edge.HARD:
        return np.where(moved, value, 0.0)
    return np.where(moved, (value - settings.threshold) / (1.0 - settings.threshold), 0.0)


def _draw_region(at: npt.NDArray[np.int32], rng: np.random.Generator) -> int:
    """Draw one of the regions that points lie in; 0 where there is none."""
    numbers, counts = np.unique(at[at > 0], return_counts=True)
    draw = rng.random()  # always drawn
    if not len(numbers):
        return 0
    # A region is drawn as often as it is large: rims of the field that a corner of the part just cuts stay rare.
    shares = np.where(counts >= min(_LEAST_REGION, int(counts.max())), counts, 0).cumsum()
    return int(numbers[np.searchsorted(shares, draw * shares[-1], side="right")])


def _signs(sign: Sign, at: npt.NDArray[np.int32], regions: int, rng: np.random.Generator) -> Values:
    drawn = np.where(rng.random(regions + 1) < 0.5, -1.0, 1.0)  # noqa: PLR2004 (a fair coin)
    if sign is Sign.MIXED:
        return np.asarray(drawn[at])
    fixed = {Sign.BULGE: 1.0, Sign.DENT: -1.0}.get(sign, float(drawn[0]))
    return np.full(len(at), fixed)


def _reached(distances: Values) -> float:
    return float(np.quantile(distances, _MOST_OF_THEM)) if len(distances) else 0.0


def _strength(part: Part, settings: SurfaceNoise, reached: float) -> float:
    if settings.strength_unit is StrengthUnit.METRES:
        return settings.strength
    if settings.strength_unit is StrengthUnit.NOISE:
        return settings.strength * part.noise.p95
    # A field of many octaves reaches half of its strength, so that a raised strength alone would not be seen.
    raised = settings.least_noise * part.noise.p95 / reached if reached else 0.0
    return max(settings.strength * part.diagonal, raised)


def _spread(part: Part, values: npt.NDArray[Any], *, fill: float) -> npt.NDArray[Any]:
    """Return values of valid points at their places in the scan."""
    whole = np.full(part.valid.shape, fill, values.dtype)
    whole[part.valid] = values
    return whole
