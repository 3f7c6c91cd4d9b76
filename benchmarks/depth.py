"""The depth detector on objects that it never saw, beside two simple scores.

    python benchmarks/depth.py [--root FOLDER] [--copies 12] [--strength 8]

Each object is held out in turn: banks are learned from good scans of all others, and the held-out one is judged, good
and with synthetic defects. With a folder the objects are cut out of its real scenes by their labels; without, they are
generated. Every setting was chosen on generated scans. About 6 minutes on real scans.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks._setting import Goal, heading, print_goals, quiet, spread
from deploy.metrics import image_auroc
from edge.bundle import load_arrays
from edge.inference.depth import depth_canvas
from edge.judgement.score import pool_score
from trainer.data.scans import KINDS, make_scan
from trainer.depth.defects import Defects, measured_again, moved
from trainer.depth.fit import depth_maps, depth_preprocessing, fit_canvases
from trainer.depth.method import DepthConfig

SIZE = (192, 192)
LEAST_POINTS = 4000
FIRST_OBJECT, NEXT_OBJECT = 20, 10
"""Labels of mOSD: 20 to 29 are of the first object, 30 to 39 of the second, and so on."""
_SHIFT = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of real scenes; generated objects if absent")
    parser.add_argument("--copies", type=int, default=12, help="good and defective canvases of each object")
    parser.add_argument("--strength", type=float, default=8.0, help="multiples of the noise floor")
    parser.add_argument("--objects", type=int, help="take no more than so many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    heading("depth detector, object left out")
    objects = generated_objects() if arguments.root is None else real_objects(arguments.root)
    names = list(objects)[: arguments.objects]
    print("| object left out | points | depth_memory | plane fit | roughness |\n|---|---|---|---|---|")
    rows = []
    for number, name in enumerate(names):
        others = np.concatenate(
            [good_copies(objects[other], arguments.copies, (arguments.seed, index))
             for index, other in enumerate(names) if other != name]
        )  # fmt: skip
        row = judge_object(objects[name], others, arguments.copies, arguments.strength, arguments.seed + number)
        rows.append(row)
        points = int(np.isfinite(objects[name][..., 2]).sum())
        print(f"| {name} | {points} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)
    table = np.array(rows)
    print("| mean | | " + " | ".join(f"{value:.3f}" for value in table.mean(0)) + " |\n")
    mean, plane, rough = table.mean(0)
    print_goals(
        [
            Goal(
                "I-AUROC of depth_memory, mean",
                float(mean),
                0.80,
                at_least=True,
                spread=spread(table[:, 0].tolist(), "{:.3f}"),
            ),
            Goal("lead over the plane fit", float(mean - plane), 0.0, at_least=True, spread=f"plane fit {plane:.3f}"),
            Goal("lead over roughness", float(mean - rough), 0.0, at_least=True, spread=f"roughness {rough:.3f}"),
        ]
    )


def judge_object(held: np.ndarray, others: np.ndarray, copies: int, strength: float, seed: int) -> list[float]:
    """Return I-AUROC of the detector, of the plane fit and of roughness on one object."""
    preprocessing = depth_preprocessing(SIZE, None)
    order = np.random.default_rng(seed).permutation(len(others))
    kept = max(2, len(others) // 4)
    fitted = fit_canvases(
        others[order[kept:]], others[order[:kept]], preprocessing, DepthConfig(), seed=seed, progress=quiet
    )
    good = good_copies(held, copies, (seed, 1))
    # Of copies of their own: no defective canvas has the noise of a good one.
    bad = Defects(good_copies(held, copies, (seed, 2))).make(seed=seed, repeats=2, strength=strength)[0]
    both = np.concatenate([good, bad])
    labels = np.arange(len(both)) >= len(good)
    maps = depth_maps(fitted.trunk, fitted.head, both, preprocessing, progress=quiet, what="")
    scores = {
        "depth_memory": [pool_score(one, fitted.pooling) for one in maps],
        "plane": [plane_score(one) for one in both],
        "roughness": [roughness_score(one) for one in both],
    }
    return [float(image_auroc(labels, np.array(values)) or 0.0) for values in scores.values()]


def plane_score(canvas: np.ndarray) -> float:
    """Return the 99th percentile of the points' distances to their common plane, metres."""
    points = canvas[np.isfinite(canvas).all(-1)].astype(np.float64)
    points = points - points.mean(0)
    normal = np.linalg.eigh(points.T @ points)[1][:, 0]
    return float(np.quantile(np.abs(points @ normal), 0.99))


def roughness_score(canvas: np.ndarray) -> float:
    """Return the 99th percentile of the points' distances to the planes of their 30 nearest, metres."""
    return float(np.quantile(Defects(canvas[None]).parts[0].surface.residual, 0.99))


def good_copies(xyz: np.ndarray, count: int, seed: tuple[int, int]) -> np.ndarray:
    """Return canvases of one scan, mirrored, moved and measured again."""
    copies = []
    for index in range(count):
        rng = np.random.default_rng((*seed, index))
        copy = xyz
        for axis, coordinate in ((0, 1), (1, 0)):
            if rng.random() < 0.5:
                # The scene mirrored: its rows turn about, and so does their coordinate.
                copy = np.flip(copy, axis) * np.where(np.arange(3) == coordinate, -1, 1).astype(np.float32)
        copies.append(measured_again(moved(np.array(copy), *rng.integers(-_SHIFT, _SHIFT + 1, 2)), rng))
    return np.stack(copies)


def real_objects(root: Path) -> dict[str, np.ndarray]:
    """Cut every object of at least 4000 points out of the scenes, each on a canvas of its own."""
    found = {}
    for path in sorted(root.glob("mosd_*.npz")):
        arrays = load_arrays(path)
        xyz, label = arrays["xyz"], arrays["label"]
        for first in range(FIRST_OBJECT, int(label.max()) + 1, NEXT_OBJECT):
            own = (label >= first) & (label < first + NEXT_OBJECT) & np.isfinite(xyz).all(-1)
            if own.sum() >= LEAST_POINTS:
                found[f"{path.stem.removeprefix('mosd_')} {first}"] = cut_out(xyz, own)
    if not found:
        raise SystemExit(f"{root}: no mosd_*.npz with labelled objects in it")
    return found


def cut_out(xyz: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return the box around an object on a canvas, float32 [192, 192, 3], one point a cell where it fits."""
    rows, columns = np.flatnonzero(own.any(1)), np.flatnonzero(own.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    part = np.where(own[box][..., None], xyz[box], np.float32(np.nan))
    side = max(SIZE[0], max(part.shape[:2]) + 2 * _SHIFT)
    canvas = np.full((side, side, 3), np.nan, np.float32)
    top, left = (side - part.shape[0]) // 2, (side - part.shape[1]) // 2
    canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
    return depth_canvas(canvas, depth_preprocessing(SIZE, None))


def generated_objects() -> dict[str, np.ndarray]:
    """Return two parts of every kind that is generated."""
    preprocessing = depth_preprocessing(SIZE, None)
    return {
        f"{kind} {seed}": depth_canvas(make_scan(kind, seed=seed, part_seed=seed).alone, preprocessing)
        for kind in KINDS
        for seed in (1, 2)
    }


if __name__ == "__main__":
    main()
