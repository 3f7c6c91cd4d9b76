"""Synthetic surface defects: their cost, what of them can be seen at which strength, and what is learned across parts.

    python benchmarks/surface3d.py [--root FOLDER] [--points 8000] [--seeds 3]

Without a folder of real scans the parts are generated, and the goals for real ones have no meaning. About 3 minutes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks._scans import clouds, local_geometry, roughness
from benchmarks._setting import Goal, heading, print_goals, spread
from trainer.data.scans import Sensor, make_scan
from trainer.synthesis.surface3d import Part, perturb
from trainer.synthesis.surface3d_presets import PRESETS, Sign, StrengthUnit, SurfaceNoise

STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
_NOISE = StrengthUnit.NOISE
_SHUFFLES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="folder of real scans; generated ones if absent")
    parser.add_argument("--points", type=int, default=8000, help="points of a part that are kept at most")
    parser.add_argument("--seeds", type=int, default=3, help="defective samples of each part")
    parser.add_argument("--repeats", type=int, default=7, help="timings")
    arguments = parser.parse_args()
    heading("synthetic surface defects")
    goals = cost(arguments.repeats)
    parts = clouds(arguments.root, arguments.points)
    real = arguments.root is not None
    # Thinning a cloud widens its neighbourhoods and with them the floor: that one is of whole clouds.
    goals += noise_floor(clouds(arguments.root, 40_000), arguments.seeds, real=real)
    goals += across_parts(parts, arguments.seeds, real=real)
    if arguments.root is not None:
        goals += foreign_objects(arguments.root)
    print_goals(goals)


def cost(repeats: int) -> list[Goal]:
    """Time a scan of 36,000 points."""
    xyz = make_scan("wavy", seed=1, sensor=Sensor(height=276, width=276, focal=900.0, holes=0.0)).xyz
    flat = xyz.reshape(-1, 3)
    flat = flat[np.isfinite(flat).all(1)][:36_000]
    part = Part.of(flat)
    without, whole = [], []
    for seed in range(repeats):
        started = time.perf_counter()
        perturb(Part.with_surface(flat, part.surface), PRESETS["corrosion"], seed=seed)
        without.append(time.perf_counter() - started)
        started = time.perf_counter()
        perturb(Part.of(flat), PRESETS["corrosion"], seed=seed)
        whole.append(time.perf_counter() - started)
    name = f"{len(flat)} points, six octaves"
    return [
        Goal(
            f"{name}, without normals", float(np.median(without)), 0.3, at_least=False, spread=spread(without), unit="s"
        ),
        Goal(f"{name}, with normals", float(np.median(whole)), 1.2, at_least=False, spread=spread(whole), unit="s"),
    ]


def noise_floor(parts: dict[str, np.ndarray], seeds: int, *, real: bool) -> list[Goal]:
    """See which strengths the simplest score finds; a defect under the floor must stay hidden."""
    print("| part | " + " | ".join(f"{s:g}x" for s in STRENGTHS) + " |\n|---|" + "---|" * len(STRENGTHS))
    table = []
    for name, xyz in parts.items():
        part, row = Part.of(xyz, closed=True), []
        for strength in STRENGTHS:
            settings = SurfaceNoise(scale=8, octaves=4, threshold=0.65, strength=strength, strength_unit=_NOISE)
            found = []
            for seed in range(seeds):
                defect = perturb(part, settings, seed=seed)
                found.append(roc_auc_score(defect.mask, roughness(np.asarray(defect.xyz, np.float64))))
            row.append(float(np.mean(found)))
        table.append(row)
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)
    print()
    values = np.array(table)
    rising = float((np.diff(values, axis=1) > -0.005).all(axis=1).mean())
    limit = (lambda value: value) if real else (lambda _value: float("nan"))
    shown = f"{values[:, -1].min():.3f} to {values[:, -1].max():.3f}"
    return [
        Goal(
            "roughness at 0.5x, furthest from 0.5",
            float(np.abs(values[:, 0] - 0.5).max()),
            limit(0.05),
            at_least=False,
            spread="AUROC of points",
        ),
        Goal("roughness at 8x, lowest", float(values[:, -1].min()), limit(0.60), at_least=True, spread=shown),
        Goal(
            "parts on which it rises with the strength",
            rising,
            limit(1.0),
            at_least=True,
            spread=f"{len(values)} parts",
        ),
    ]


def across_parts(parts: dict[str, np.ndarray], seeds: int, *, real: bool) -> list[Goal]:
    """Learn from defects of all parts but one and find those of that one."""
    settings = SurfaceNoise(scale=8, octaves=4, threshold=0.65, strength=6.0, strength_unit=_NOISE, sign=Sign.RANDOM)
    described: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, xyz in parts.items():
        part, rows, labels = Part.of(xyz, closed=True), [], []
        for seed in range(seeds):
            defect = perturb(part, settings, seed=100 + seed)
            rows.append(local_geometry(np.asarray(defect.xyz, np.float64), part.noise.p95))
            labels.append(defect.mask)
        described[name] = np.concatenate(rows), np.concatenate(labels)
    names = list(described)
    found, shuffled = {}, {}
    rng = np.random.default_rng(0)
    for held in names:
        rows = np.concatenate([described[name][0] for name in names if name != held])
        labels = np.concatenate([described[name][1] for name in names if name != held])
        found[held] = _transfer(rows, labels, described[held])
        # A model of nothing points anywhere: one shuffle says little.
        by_chance = [_transfer(rows, rng.permutation(labels), described[held]) for _ in range(_SHUFFLES)]
        shuffled[held] = float(np.mean(by_chance))
    print("| learned from | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for name in names:
        row = [_transfer(*described[name], described[other]) if other != name else float("nan") for other in names]
        print(f"| {name} alone | " + " | ".join("" if np.isnan(v) else f"{v:.3f}" for v in row) + " |")
    print("| all others | " + " | ".join(f"{found[name]:.3f}" for name in names) + " |")
    print(
        "| all others, masks shuffled | " + " | ".join(f"{shuffled[name]:.3f}" for name in names) + " |\n", flush=True
    )
    limit = (lambda value: value) if real else (lambda _value: float("nan"))
    values = list(found.values())
    return [
        Goal("part left out, lowest AUROC", min(values), limit(0.68), at_least=True, spread=spread(values, "{:.3f}")),
        Goal("part left out, mean AUROC", float(np.mean(values)), limit(0.74), at_least=True, spread=""),
        Goal(
            "masks shuffled, mean AUROC less 0.5",
            abs(float(np.mean(list(shuffled.values()))) - 0.5),
            limit(0.05),
            at_least=False,
            spread=spread(list(shuffled.values()), "{:.3f}"),
        ),
    ]


def foreign_objects(root: Path) -> list[Goal]:
    """Find real objects on a table by their distance to its plane: of the units and the loader, not of a method."""
    from edge.bundle import load_arrays

    found = []
    for path in sorted(root.glob("mosd_*.npz")):
        arrays = load_arrays(path)
        xyz, label = arrays["xyz"], arrays["label"]
        known = np.isfinite(xyz).all(-1) & (label > 0)
        points, foreign = xyz[known].astype(np.float64), label[known] >= 20
        table = points[~foreign]
        middle = table.mean(0)
        normal = np.linalg.eigh((table - middle).T @ (table - middle))[1][:, 0]
        found.append(float(roc_auc_score(foreign, np.abs((points - middle) @ normal))))
    return [
        Goal(
            "real objects on a table, distance to its plane",
            min(found),
            0.99,
            at_least=True,
            spread=spread(found, "{:.4f}"),
        )
    ]


def _transfer(rows: np.ndarray, labels: np.ndarray, held: tuple[np.ndarray, np.ndarray]) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, class_weight="balanced"))
    model.fit(rows, labels)
    return float(roc_auc_score(held[1], model.decision_function(held[0])))


if __name__ == "__main__":
    main()
