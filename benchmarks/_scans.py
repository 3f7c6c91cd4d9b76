"""Scans for benchmarks: real ones of a folder, generated ones, and what simple measures see in them.

It must not know detectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

from edge.capture.scan_files import read_scan
from trainer.data.scans import KINDS, make_scan
from trainer.synthesis.surface3d import Part

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    Values = npt.NDArray[np.float64]

CLOUDS = {
    "box": "obj_box_a",
    "box2": "obj_box_c",
    "cylinder": "obj_cyl_a",
    "milk": "milk_carton",
    "rocker": "rocker_arm",
    "bunny": "stanford_bunny",
}
"""Clouds of the folder, by the name in tables."""

NEIGHBOURS = (12, 40, 150)


def clouds(root: Path | None, most: int) -> dict[str, npt.NDArray[np.float32]]:
    """Return clouds [N, 3] of a folder, or generated ones, thinned to at most some points."""
    if root is None:
        found = {
            f"{kind} {seed}": make_scan(kind, seed=seed, part_seed=seed).alone for kind in KINDS for seed in (1, 2)
        }
        clouds = {name: xyz[np.isfinite(xyz).all(-1)] for name, xyz in found.items()}
    else:
        clouds = {name: read_scan(root / f"{file}.npz").xyz.reshape(-1, 3) for name, file in CLOUDS.items()}
    rng = np.random.default_rng(0)
    return {
        name: xyz if len(xyz) <= most else xyz[np.sort(rng.choice(len(xyz), most, replace=False))]
        for name, xyz in clouds.items()
    }


def local_geometry(points: Values, noise: float) -> Values:
    """Describe each point's neighbourhoods of 12, 40 and 150: float64 [N, 15], lengths in noise floors.

    Of each size the distance to the plane (of the point, largest and mean of all), the variation of the surface, and
    the turn of the normal from the next larger size.
    """
    tree = cKDTree(points)
    _, near = tree.query(points, k=min(NEIGHBOURS[-1], len(points)))
    columns: list[Values] = []
    normals: list[Values] = []
    for count in NEIGHBOURS:
        measured, normal = _measured(points, near[:, :count], noise)
        columns += measured
        normals.append(normal)
    pairs = ((0, 1), (1, 2), (0, 2))
    columns += [1.0 - np.abs((normals[a] * normals[b]).sum(1)) for a, b in pairs]
    described = np.stack(columns, axis=1)
    # Heavy tails at creases would be all that a linear model sees.
    return np.asarray(np.log1p(np.maximum(described, 0.0) * 10.0))


def _measured(points: Values, near: npt.NDArray[np.intp], noise: float) -> tuple[list[Values], Values]:
    count = len(points)
    own, mean, most, variation = (np.empty(count) for _ in range(4))
    normal = np.empty((count, 3))
    for start in range(0, count, 4096):
        rows = slice(start, start + 4096)
        around = points[near[rows]]
        middle = around.mean(1)
        around = around - middle[:, None]
        values, vectors = np.linalg.eigh(around.transpose(0, 2, 1) @ around)
        normal[rows] = vectors[:, :, 0]
        off = np.abs((around @ vectors[:, :, :1])[..., 0])
        own[rows] = np.abs(((points[rows] - middle) * vectors[:, :, 0]).sum(1)) / noise
        mean[rows], most[rows] = off.mean(1) / noise, off.max(1) / noise
        variation[rows] = values[:, 0] / np.maximum(values.sum(1), 1e-30)
    return [own, mean, most, variation], normal


def roughness(points: Values) -> Values:
    """Return each point's distance to the plane of its 30 nearest, float64 [N]: the simplest score of a surface."""
    return Part.of(points, closed=True).surface.residual
