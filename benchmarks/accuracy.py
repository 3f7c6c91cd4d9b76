"""Which method finds most defects, beside PaDiM- and PatchCore-style baselines on the same trunk and images?

Real images in MVTec layout, several seeds; intervals by a paired bootstrap of groups. Nothing is chosen on the test
images: a method's pooling rule, and the method that is called best, come from synthetic defects on held-out good
images. Run: ``python benchmarks/accuracy.py --data FOLDER [FOLDER ...] --json FILE``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from _setting import heading, quiet
from baselines import padim, patchcore

from deploy.bootstrap import PairedCategory, WeightedMetric, bootstrap_difference, weighted_aupro, weighted_auroc
from deploy.metrics import image_auroc, pixel_metrics
from edge.bundle import Pooling
from edge.judgement.score import pool_score
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.data.folder import load_mask, read_folder
from trainer.data.images import load_image
from trainer.data.splits import split_holdout
from trainer.features import extract, load_canvases
from trainer.fit import HOLDOUT_FRACTION, HOLDOUT_MINIMUM, choose_pooling, head_maps, make_defects, preprocessing_for
from trainer.methods.base import Features, FitContext, Validation
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.registry import methods

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    from baselines import Judge

    from edge.bundle import Preprocessing
    from trainer.data.folder import Sample

TAPS = ("s4", "s8", "s16")
CANDIDATES = 30_000
CPU = torch.device("cpu")
PEER = {"I-AUROC": 0.881, "AUPRO": 0.644}
"""The nearest peer product's best means on the same seven categories (anomalib 2.7.0, Lite0 weights, 224 pixels)."""


@dataclass
class Result:
    """One detector on one category with one seed: maps and scores of all test images, seconds to fit."""

    maps: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float64]
    validation: float
    seconds: float


@dataclass
class Category:
    """Test images of one folder: what every detector is measured on."""

    name: str
    labels: npt.NDArray[np.bool_]
    groups: npt.NDArray[np.str_]
    masks: list[npt.NDArray[np.bool_]] | None


def read_masks(samples: tuple[Sample, ...], size: tuple[int, int]) -> list[npt.NDArray[np.bool_]] | None:
    """Return masks at the network's input size, or None where the folder has none."""
    if not any(sample.mask for sample in samples):
        return None
    masks = []
    for sample in samples:
        if not sample.anomalous:
            masks.append(np.zeros(size, np.bool_))
            continue
        mask = load_mask(sample, load_image(sample.path).shape[:2]).astype(np.uint8)
        masks.append(cv2.resize(mask, size[::-1], interpolation=cv2.INTER_NEAREST).astype(np.bool_))
    return masks


def subset(features: Features, rows: list[int]) -> Features:
    """Return the features of some images (one tile each)."""
    index = torch.tensor(rows)
    return Features({name: tap[index] for name, tap in features.taps.items()}, 1, features.groups[rows])


def upsampled(maps: npt.NDArray[np.float32], size: tuple[int, int]) -> Callable[[], list[npt.NDArray[np.float32]]]:
    """Return a function that gives the maps at the masks' size."""
    return lambda: [cv2.resize(one, size[::-1], interpolation=cv2.INTER_LINEAR) for one in maps]


def run_category(
    folder: Path, seeds: list[int], preset: str, preprocessing: Preprocessing
) -> tuple[Category, dict[str, list[Result]]]:
    """Fit and judge every method and baseline on one folder."""
    images = read_folder(folder)
    trunk = lite0_trunk()

    def features(canvases: npt.NDArray[np.uint8], samples: tuple[Sample, ...] | list[Sample]) -> Features:
        groups = np.array([sample.group for sample in samples], np.str_)
        return extract(
            trunk, canvases, preprocessing, tap_names=TAPS, groups=groups, device=CPU, progress=quiet, what=""
        )

    canvases = load_canvases(images.train, preprocessing, progress=quiet, what="")
    train = features(canvases, images.train)
    test = features(load_canvases(images.test, preprocessing, progress=quiet, what=""), images.test)
    size = (preprocessing.height, preprocessing.width)
    category = Category(
        name=f"{folder.parent.name}/{folder.name}",
        labels=np.array([sample.anomalous for sample in images.test]),
        groups=np.array([sample.group for sample in images.test], np.str_),
        masks=read_masks(images.test, size),
    )
    rows = MemoryMethod.config(preset).rows
    place = {sample.path: index for index, sample in enumerate(images.train)}
    results: dict[str, list[Result]] = defaultdict(list)
    for seed in seeds:
        split = split_holdout(images.train, HOLDOUT_FRACTION, seed, HOLDOUT_MINIMUM)
        fit_rows, held = ([place[s.path] for s in part] for part in (split.fit, split.holdout))
        repeats = max(1, round(120 / len(held)))
        defective, masks = make_defects(canvases[held], seed=seed, repeats=repeats)
        context = FitContext(
            features=subset(train, fit_rows),
            validation=Validation(subset(train, held), features(defective, list(split.holdout) * repeats), masks),
            seed=seed,
            device=CPU,
            progress=quiet,
        )
        for name, method in methods().items():
            started = time.monotonic()
            head = method.fit(context, method.config(preset))
            good, bad = (
                head_maps(head, part, preprocessing, CPU)
                for part in (context.validation.good, context.validation.defective)
            )
            pooling, candidates = choose_pooling(good, bad)
            seconds = time.monotonic() - started
            maps = head_maps(head, test, preprocessing, CPU)
            results[name].append(as_result(maps, pooling, max(candidates.values()), seconds))
        for name, fit in baselines(context.features, rows=rows, seed=seed).items():
            started = time.monotonic()
            judge = fit()
            seconds = time.monotonic() - started
            results[name].append(as_result(judge(test).numpy(), Pooling(cells=1), float("nan"), seconds))
        print(f"  {category.name} seed {seed}", file=sys.stderr, flush=True)
    return category, results


def baselines(features: Features, *, rows: int, seed: int) -> dict[str, Callable[[], Judge]]:
    """Return how to fit each baseline, by name."""

    def bank(names: tuple[str, ...]) -> Judge:
        return patchcore(features, names, rows=rows, candidates=CANDIDATES, seed=seed)

    return {
        "padim-style s4+s8+s16": lambda: padim(features, TAPS, seed=seed),
        "patchcore-style s8+s16": lambda: bank(("s8", "s16")),
        "patchcore-style s4+s8+s16": lambda: bank(TAPS),
    }


def as_result(maps: npt.NDArray[np.float32], pooling: Pooling, validation: float, seconds: float) -> Result:
    """Pool the maps."""
    return Result(maps, np.array([pool_score(one, pooling) for one in maps]), validation, seconds)


def figures(category: Category, result: Result, size: tuple[int, int]) -> dict[str, float]:
    """Return the exact figures of one result."""
    found = {"I-AUROC": float(image_auroc(category.labels, result.scores) or np.nan), "fit s": result.seconds}
    if category.masks is not None:
        pixels = pixel_metrics(category.masks, upsampled(result.maps, size)())
        found |= {"P-AUROC": float(pixels.auroc or np.nan), "AUPRO": float(pixels.aupro or np.nan)}
    return found


def seed_metric(category: Category, result: Result, what: str, size: tuple[int, int]) -> WeightedMetric:
    """Return the figure of one seed as a function of weights."""
    if what == "I-AUROC":
        return weighted_auroc(category.labels, result.scores)
    assert category.masks is not None
    return weighted_aupro(category.masks, upsampled(result.maps, size))


def averaged(metrics: list[WeightedMetric]) -> WeightedMetric:
    """Return the mean of several figures on the same weights."""
    return lambda weights: np.mean([metric(weights) for metric in metrics], axis=0)


def compare(
    done: list[tuple[Category, dict[str, list[Result]]]], ours: str, other: str, size: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Bootstrap the share of the baseline's error that a method saves, over categories.

    The seeds of a category are judged on the same draws and averaged: they are no further images.
    """
    said = {}
    for what in ("I-AUROC", "AUPRO"):
        pairs = []
        for category, results in done:
            if what == "AUPRO" and category.masks is None:
                continue
            first, second = (
                [seed_metric(category, result, what, size) for result in results[name]] for name in (ours, other)
            )
            pairs.append(PairedCategory(category.labels, category.groups, averaged(first), averaged(second)))
        if not pairs:
            continue
        found = bootstrap_difference(pairs)
        saved = 1 - (1 - found.first_resampled) / (1 - found.second_resampled)
        low, high = np.quantile(saved, (0.025, 0.975))
        said[what] = {
            "ours": found.first,
            "baseline": found.second,
            "saved": 1 - (1 - found.first) / (1 - found.second),
            "low": float(low),
            "high": float(high),
        }
    return said


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="folders in MVTec layout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    heading("accuracy")
    size = (options.size, options.size)
    preprocessing = preprocessing_for(size=size, tiles=(1, 1), overlap=0, crop=None)
    done = [run_category(folder, options.seeds, options.preset, preprocessing) for folder in options.data]
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    per_category = {}
    print("| category | detector | I-AUROC | P-AUROC | AUPRO | synthetic I-AUROC | fit s |")
    print("|---|---|---|---|---|---|---|")
    for category, results in done:
        for name, runs in results.items():
            all_runs = [figures(category, run, size) for run in runs]
            mean = {key: float(np.mean([run[key] for run in all_runs])) for key in all_runs[0]}
            spread = float(np.ptp([run["I-AUROC"] for run in all_runs]))
            validation = float(np.mean([run.validation for run in runs]))
            per_category[f"{category.name} {name}"] = mean | {"synthetic": validation, "spread": spread}
            for key, value in mean.items():
                table[name][key].append(value)
            table[name]["synthetic"].append(validation)
            cells = [f"{mean[k]:.3f}" if k in mean else "-" for k in ("I-AUROC", "P-AUROC", "AUPRO")]
            cells[0] += f" ({spread:.3f})"
            print(f"| {category.name} | {name} | {' | '.join(cells)} | {validation:.3f} | {mean['fit s']:.1f} |")
    print("\nSpread over seeds in parentheses.\n\n| mean | I-AUROC | P-AUROC | AUPRO | synthetic |")
    print("|---|---|---|---|---|")
    means = {name: {key: float(np.mean(values)) for key, values in rows.items()} for name, rows in table.items()}
    for name, mean in means.items():
        cells = [f"{mean[k]:.4f}" if k in mean else "-" for k in ("I-AUROC", "P-AUROC", "AUPRO", "synthetic")]
        print(f"| {name} | {' | '.join(cells)} |")
    ours = max(methods(), key=lambda name: means[name]["synthetic"])
    print(f"\nbest method on synthetic validation: {ours}")
    comparisons = {
        f"{name} against {other}": compare(done, name, other, size)
        for name in methods()
        for other in means
        if other not in methods()
    }
    print("\n| share of the error saved | on | ours | baseline | saved | 95 % interval |\n|---|---|---|---|---|---|")
    for name, said in comparisons.items():
        for what, found in said.items():
            interval = f"{found['low']:+.3f} to {found['high']:+.3f}"
            figures_said = f"{found['ours']:.4f} | {found['baseline']:.4f} | {found['saved']:+.3f}"
            print(f"| {name} | {what} | {figures_said} | {interval} |")
    print(f"\nnearest peer product on the same seven folders: {PEER}")
    if options.json:
        options.json.write_text(json.dumps({"means": means, "categories": per_category, "comparisons": comparisons}))


if __name__ == "__main__":
    main()
