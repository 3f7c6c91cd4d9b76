"""Organised scans as a depth camera gives them, generated: spheres, cylinders, boxes and wavy plates before a table.

It knows shapes, rays and a sensor's faults; it must not know detectors or defects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Values = npt.NDArray[np.float64]

KINDS = ("sphere", "cylinder", "box", "wavy")

_FAR = np.inf
_STEPS = 24  # of the search for a wavy plate, whose slope is under a half: each halves the error at least
_GRAZING = 0.17  # cosine below which a sensor sees nothing: about 80 degrees


@dataclass(frozen=True, slots=True)
class Sensor:
    """A depth camera at the origin: x to the right, y down, z away from it.

    Attributes:
        height: rows.
        width: columns.
        focal: focal length in pixels.
        noise_m: deviation of a point along its ray at one metre; it grows with the square of the distance.
        holes: share of the points that get lost in patches.
    """

    height: int = 160
    width: int = 160
    focal: float = 520.0
    noise_m: float = 0.0004
    holes: float = 0.01

    def rays(self) -> Values:
        """Return directions float64 [H, W, 3] with z = 1."""
        v, u = np.mgrid[: self.height, : self.width]
        x, y = (u - (self.width - 1) / 2) / self.focal, (v - (self.height - 1) / 2) / self.focal
        return np.stack([x, y, np.ones_like(x)], axis=-1)


@dataclass(frozen=True, slots=True)
class Scan:
    """A generated scan.

    Attributes:
        xyz: float32 [H, W, 3], metres, NaN where nothing was measured.
        part: bool [H, W], valid points of the part; the others are of the table or of what stands in front.
        kind: of the part.
    """

    xyz: npt.NDArray[np.float32]
    part: npt.NDArray[np.bool_]
    kind: str

    @property
    def alone(self) -> npt.NDArray[np.float32]:
        """The scan with the part only, all else NaN: float32 [H, W, 3]."""
        return np.where(self.part[..., None], self.xyz, np.float32(np.nan))


def make_scan(
    kind: str,
    *,
    seed: int,
    sensor: Sensor | None = None,
    table: bool = True,
    occluded: bool = False,
    part_seed: int = 0,
) -> Scan:
    """Scan a part that stands about as it stood before.

    Args:
        kind: one of ``KINDS``.
        seed: of where the part stands, of noise and holes.
        sensor: the camera.
        table: whether there is something behind the part.
        occluded: whether a bar stands in front of it.
        part_seed: of the part's own size: the same for all scans of one product.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    sensor, own, rng = sensor or Sensor(), np.random.default_rng((part_seed, 1)), np.random.default_rng((seed, 2))
    rays = sensor.rays()
    distance = rng.uniform(0.78, 0.82)
    middle = np.array([*rng.uniform(-0.008, 0.008, 2), distance])
    turn = _turn(rng.uniform(-0.12, 0.12, 3) + np.array([0.3, 0.25, 0.0]))
    hit, normal = _SHAPES[kind](rays, middle, turn, own)
    depth = hit
    part = np.isfinite(hit)
    if table:
        behind = np.full(hit.shape, distance + 0.09)
        part &= hit < behind
        depth = np.minimum(depth, behind)
    facing = np.abs((normal * rays).sum(-1)) / np.linalg.norm(rays, axis=-1)
    lost = part & (facing < _GRAZING)
    if occluded:
        start, wide = rng.integers(sensor.width // 4, sensor.width // 2), sensor.width // 10
        bar = np.zeros_like(part)
        bar[:, start : start + wide] = True
        part &= ~bar
        depth = np.where(bar, distance - 0.15, depth)
        lost[:, start + wide : start + wide + 3] = True  # the sensor's own shadow
    lost |= _patches(depth.shape, sensor.holes, rng)
    noisy = depth * (1.0 + sensor.noise_m * depth * rng.standard_normal(depth.shape))
    lost |= ~np.isfinite(noisy)
    xyz = rays * np.where(lost, np.nan, noisy)[..., None]
    return Scan(xyz.astype(np.float32), part & ~lost, kind)


def make_scans(kind: str, count: int, *, seed: int, sensor: Sensor | None = None, table: bool = False) -> list[Scan]:
    """Return scans of parts of one product, each standing a little differently."""
    return [make_scan(kind, seed=seed + index, sensor=sensor, table=table, part_seed=seed) for index in range(count)]


def _sphere(rays: Values, middle: Values, _turned: Values, own: np.random.Generator) -> tuple[Values, Values]:
    radius = own.uniform(0.07, 0.09)
    a, b = (rays * rays).sum(-1), rays @ middle
    inside = b * b - a * (middle @ middle - radius**2)
    with np.errstate(invalid="ignore"):
        depth = np.where(inside > 0, (b - np.sqrt(np.abs(inside))) / a, _FAR)
    return depth, _outward(rays, depth, middle, radius)


def _cylinder(rays: Values, middle: Values, turn: Values, own: np.random.Generator) -> tuple[Values, Values]:
    radius, half = own.uniform(0.05, 0.07), own.uniform(0.07, 0.09)
    local, start = rays @ turn, -middle @ turn
    flat, begin = local[..., [0, 2]], start[[0, 2]]
    a, b, c = (flat * flat).sum(-1), flat @ begin, begin @ begin - radius**2
    inside = b * b - a * c
    with np.errstate(invalid="ignore"):
        depth = np.where(inside > 0, (-b - np.sqrt(np.abs(inside))) / a, _FAR)
        along = start[1] + depth * local[..., 1]
        depth = np.where(np.abs(along) <= half, depth, _FAR)
        at = start + np.where(np.isfinite(depth), depth, 0.0)[..., None] * local
    normal = (at * np.array([1.0, 0.0, 1.0]) / radius) @ turn.T
    return depth, normal


def _box(rays: Values, middle: Values, turn: Values, own: np.random.Generator) -> tuple[Values, Values]:
    half = own.uniform(0.045, 0.07, 3)
    local, start = rays @ turn, -middle @ turn
    with np.errstate(divide="ignore"):
        near, far = (-half * np.sign(local) - start) / local, (half * np.sign(local) - start) / local
    enter, leave = near.max(-1), far.min(-1)
    depth = np.where(enter < leave, enter, _FAR)
    side = np.eye(3)[near.argmax(-1)]
    return depth, side @ turn.T


def _wavy(rays: Values, middle: Values, turn: Values, own: np.random.Generator) -> tuple[Values, Values]:
    """Return a plate whose height is two sine waves, found by going to the height and to the ray in turns."""
    half, swing = own.uniform(0.07, 0.09), own.uniform(0.002, 0.004, 2)
    waves, phase = own.uniform(40.0, 90.0, 2), own.uniform(0.0, 6.28, 2)
    local, start = rays @ turn, -middle @ turn

    def height(x: Values, y: Values) -> Values:
        return np.asarray(swing[0] * np.sin(waves[0] * x + phase[0]) + swing[1] * np.sin(waves[1] * y + phase[1]))

    depth = -start[2] / local[..., 2]
    for _ in range(_STEPS):
        at = start + depth[..., None] * local
        depth = (height(at[..., 0], at[..., 1]) - start[2]) / local[..., 2]
    at = start + depth[..., None] * local
    inside = (np.abs(at[..., :2]) <= half).all(-1)
    slope = swing * waves * np.cos(waves * at[..., :2] + phase)
    normal = np.concatenate([slope, -np.ones((*slope.shape[:-1], 1))], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    return np.where(inside, depth, _FAR), normal @ turn.T


def _outward(rays: Values, depth: Values, middle: Values, radius: float) -> Values:
    at = rays * np.where(np.isfinite(depth), depth, 0.0)[..., None]
    return np.asarray((at - middle) / radius)


def _turn(angles: Values) -> Values:
    """Return the rotation matrix of three angles in radians, about x, then y, then z."""
    (a, b, c), (i, j, k) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, a, -i], [0, i, a]])
    about_y = np.array([[b, 0, j], [0, 1, 0], [-j, 0, b]])
    about_z = np.array([[c, -k, 0], [k, c, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x)


def _patches(shape: tuple[int, ...], share: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return where discs of two to five pixels are missing, about ``share`` of all."""
    lost = np.zeros(shape, np.bool_)
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    for _ in range(round(share * lost.size / 40)):
        y, x, radius = rng.uniform(0, shape[0]), rng.uniform(0, shape[1]), rng.uniform(2, 5)
        lost |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    return lost


_SHAPES: dict[str, Callable[[Values, Values, Values, np.random.Generator], tuple[Values, Values]]] = {
    "sphere": _sphere,
    "cylinder": _cylinder,
    "box": _box,
    "wavy": _wavy,
}
