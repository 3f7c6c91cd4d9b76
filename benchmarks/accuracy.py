"""Which method finds most defects, beside PaDiM- and PatchCore-style baselines on the same trunk and images?

Real images in MVTec layout, several seeds; intervals by a paired bootstrap of groups. Nothing is chosen on the test
images: a method's pooling rule, and the method that is called best, come from synthetic defects on held-out good
images. Run: ``python benchmarks/accuracy.py --data FOLDER [FOLDER ...] --json FILE``; with ``--keep DIR`` results of
detectors whose code and settings are unchanged are read from there, so that the work may be done in parts.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import spearmanr

import trainer.methods.patches
import trainer.synthesis.image2d
from benchmarks import baselines as baseline_code
from benchmarks._cost import Cost, measure_cost
from benchmarks._images import CPU, Category, at_size, fit_context, open_category, split
from benchmarks._setting import heading
from benchmarks.baselines import padim, patchcore
from deploy.bootstrap import PairedCategory, WeightedMetric, bootstrap_difference, weighted_aupro, weighted_auroc
from deploy.metrics import image_auroc, pixel_metrics
from edge.bundle import Pooling
from edge.judgement.score import pool_score
from trainer.fit import choose_pooling, head_maps
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.registry import methods
from trainer.synthesis import families, noise

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from benchmarks.baselines import Judge
    from trainer.methods.base import Features, FitContext, Method, MethodConfig

TAPS = ("s4", "s8", "s16")
CANDIDATES = 30_000
PEER = {"I-AUROC": 0.881, "AUPRO": 0.644}
"""The nearest peer product's best means on the same seven categories (anomalib 2.7.0, Lite0 weights, 224 pixels)."""


@dataclass
class Result:
    """One detector on one category with one seed.

    Attributes:
        maps: float32 [n, h, w] of all test images.
        scores: their image scores.
        validation: I-AUROC on synthetic defects of held-out images.
        seconds: to fit.
    """

    maps: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float64]
    validation: float
    seconds: float


class Shelf:
    """Results on disk, each under the code, settings and images that it came from.

    Args:
        folder: None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def result(self, what: str, recipe: tuple[str, ...], make: Callable[[], Result]) -> Result:
        """Return the kept result, or make and keep it."""
        if self.folder is None:
            return make()
        key = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:16]
        path = self.folder / f"{what}-{key}.npz"
        if path.exists():
            with np.load(path) as kept:
                return Result(kept["maps"], kept["scores"], float(kept["validation"]), float(kept["seconds"]))
        found = make()
        self.folder.mkdir(parents=True, exist_ok=True)
        work = path.with_suffix(".part")
        with work.open("wb") as file:
            np.savez(file, **vars(found))
        work.replace(path)
        return found


def source_of(module: object) -> str:
    """Return the text of the package or module that an object is defined in."""
    path = Path(inspect.getsourcefile(module) or "")
    files = sorted(path.parent.glob("*.py")) if path.name in {"__init__.py", "fit.py"} else [path]
    return "".join(file.read_text(encoding="utf-8") for file in files)


def upsampled(maps: npt.NDArray[np.float32], size: int) -> Callable[[], list[npt.NDArray[np.float32]]]:
    """Return a function that gives the maps at the masks' size."""
    return lambda: list(at_size(maps, size))


def run_category(
    folder: Path, chosen: dict[str, type[Method]], *, seeds: list[int], preset: str, size: int, shelf: Shelf
) -> tuple[Category, dict[str, list[Result]]]:
    """Fit and judge the chosen methods and every baseline on one folder."""
    taps = tuple(dict.fromkeys(tap for method in chosen.values() for tap in (*TAPS, *method.tap_names)))
    category = open_category(folder, taps=taps, size=size)
    results: dict[str, list[Result]] = defaultdict(list)
    # The training images stand for the folder; beside a detector's own code, what all share decides the figures.
    seen = "".join(
        (
            hashlib.sha256(np.ascontiguousarray(category.canvases).tobytes()).hexdigest(),
            str(size),
            *(source_of(module) for module in (trainer.methods.patches, trainer.synthesis.image2d, families, noise)),
        )
    )
    where = category.name.replace("/", "-")
    for seed in seeds:
        context = fit_context(category, split(category, seed), seed=seed, taps=taps)
        for name, method in chosen.items():
            config = method.config(preset)
            recipe = (seen, str(seed), config.model_dump_json(), source_of(sys.modules[method.__module__]))
            fit = partial(fit_and_judge, method, config, context, category)
            results[name].append(shelf.result(f"{where}-{seed}-{name}", recipe, fit))
        for name, fit in baselines(context.features, rows=MemoryMethod.config(preset).rows, seed=seed).items():
            recipe = (seen, str(seed), preset, name, source_of(baseline_code))
            judge = partial(judged_baseline, fit, context, category)
            results[name].append(shelf.result(f"{where}-{seed}-{name}", recipe, judge))
        print(f"  {category.name} seed {seed}", file=sys.stderr, flush=True)
    return category, results


def costs(folder: Path, chosen: dict[str, type[Method]], preset: str, size: int) -> dict[str, Cost]:
    """Return what each method costs; weights do not matter for it, so that few images are enough."""
    taps = tuple(dict.fromkeys(tap for method in chosen.values() for tap in method.tap_names))
    category = open_category(folder, taps=taps, size=size, train=40, test=2)
    context = fit_context(category, split(category, 0), seed=0, taps=taps)
    return {
        name: measure_cost(category.trunk, method.fit(context, method.config(preset)), category.canvases[:8])
        for name, method in chosen.items()
    }


def fit_and_judge(method: type[Method], config: MethodConfig, context: FitContext, category: Category) -> Result:
    """Fit a method, choose its pooling on the validation set and judge the test images."""
    started = time.monotonic()
    head = method.fit(context, config)
    good, bad = (
        head_maps(head, part, category.preprocessing, CPU)
        for part in (context.validation.good, context.validation.defective)
    )
    pooling, candidates = choose_pooling(good, bad)
    seconds = time.monotonic() - started
    maps = head_maps(head, category.test, category.preprocessing, CPU)
    return Result(maps, pooled(maps, pooling), max(candidates.values()), seconds)


def judged_baseline(fit: Callable[[], Judge], context: FitContext, category: Category) -> Result:
    """Judge the test images by the highest cell, as the baselines' papers do."""
    started = time.monotonic()
    judge = fit()
    seconds = time.monotonic() - started
    one = Pooling(cells=1)
    good, bad = (pooled(judge(part).numpy(), one) for part in (context.validation.good, context.validation.defective))
    labels = np.r_[np.zeros(len(good), bool), np.ones(len(bad), bool)]
    maps = judge(category.test).numpy()
    return Result(maps, pooled(maps, one), float(image_auroc(labels, np.r_[good, bad]) or np.nan), seconds)


def baselines(features: Features, *, rows: int, seed: int) -> dict[str, Callable[[], Judge]]:
    """Return how to fit each baseline, by name."""

    def bank(names: tuple[str, ...]) -> Judge:
        return patchcore(features, names, rows=rows, candidates=CANDIDATES, seed=seed)

    return {
        "padim-style s4+s8+s16": lambda: padim(features, TAPS, seed=seed),
        "patchcore-style s8+s16": lambda: bank(("s8", "s16")),
        "patchcore-style s4+s8+s16": lambda: bank(TAPS),
    }


def pooled(maps: npt.NDArray[np.float32], pooling: Pooling) -> npt.NDArray[np.float64]:
    """Return the image scores of maps."""
    return np.array([pool_score(one, pooling) for one in maps])


def figures(category: Category, result: Result, size: int) -> dict[str, float]:
    """Return the exact figures of one result."""
    found = {"I-AUROC": float(image_auroc(category.labels, result.scores) or np.nan), "fit s": result.seconds}
    if category.masks is not None:
        pixels = pixel_metrics(category.masks, upsampled(result.maps, size)())
        found |= {"P-AUROC": float(pixels.auroc or np.nan), "AUPRO": float(pixels.aupro or np.nan)}
    return found


def seed_metric(category: Category, result: Result, what: str, size: int) -> WeightedMetric:
    """Return the figure of one seed as a function of weights."""
    if what == "I-AUROC":
        return weighted_auroc(category.labels, result.scores)
    assert category.masks is not None
    return weighted_aupro(category.masks, upsampled(result.maps, size))


def averaged(metrics: list[WeightedMetric]) -> WeightedMetric:
    """Return the mean of several figures on the same weights."""
    return lambda weights: np.mean([metric(weights) for metric in metrics], axis=0)


def compare(
    done: list[tuple[Category, dict[str, list[Result]]]], ours: str, other: str, size: int
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
    parser.add_argument("--methods", nargs="+", choices=sorted(methods()), default=list(methods()))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--keep", type=Path, help="folder of results that are not made twice")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    heading("accuracy")
    size = options.size
    shelf = Shelf(options.keep)
    chosen = {name: methods()[name] for name in options.methods}
    done = [
        run_category(folder, chosen, seeds=options.seeds, preset=options.preset, size=size, shelf=shelf)
        for folder in options.data
    ]
    means, per_category = print_categories(done, size)
    cost = costs(options.data[0], chosen, options.preset, size)
    print_means(means, cost)
    print_ranking(done, per_category)
    comparisons = {
        f"{name} against {other}": compare(done, name, other, size)
        for name in chosen
        for other in means
        if other not in chosen
    }
    print("\n| share of the error saved | on | ours | baseline | saved | 95 % interval |\n|---|---|---|---|---|---|")
    for name, said in comparisons.items():
        for what, found in said.items():
            interval = f"{found['low']:+.3f} to {found['high']:+.3f}"
            figures_said = f"{found['ours']:.4f} | {found['baseline']:.4f} | {found['saved']:+.3f}"
            print(f"| {name} | {what} | {figures_said} | {interval} |")
    print(f"\nnearest peer product on the same seven folders: {PEER}")
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "means": means,
                    "categories": per_category,
                    "comparisons": comparisons,
                    "cost": {name: vars(one) for name, one in cost.items()},
                }
            )
        )


def print_categories(
    done: list[tuple[Category, dict[str, list[Result]]]], size: int
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Print one line per folder and detector; return means over folders, and every line's figures."""
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    per_category = {}
    print("| category | detector | I-AUROC | P-AUROC | AUPRO | synthetic I-AUROC | fit s |")
    print("|---|---|---|---|---|---|---|")
    for category, results in done:
        for name, runs in results.items():
            all_runs = [figures(category, run, size) for run in runs]
            mean = {key: float(np.mean([run[key] for run in all_runs])) for key in all_runs[0]}
            spread = float(np.ptp([run["I-AUROC"] for run in all_runs]))
            mean["synthetic"] = float(np.mean([run.validation for run in runs]))
            per_category[f"{category.name} {name}"] = mean | {"spread": spread}
            for key, value in mean.items():
                table[name][key].append(value)
            cells = [f"{mean[k]:.3f}" if k in mean else "-" for k in ("I-AUROC", "P-AUROC", "AUPRO")]
            cells[0] += f" ({spread:.3f})"
            print(f"| {category.name} | {name} | {' | '.join(cells)} | {mean['synthetic']:.3f} | {mean['fit s']:.1f} |")
    print("\nSpread over seeds in parentheses.")
    return {name: {key: float(np.mean(v)) for key, v in rows.items()} for name, rows in table.items()}, per_category


def print_means(means: dict[str, dict[str, float]], cost: dict[str, Cost]) -> None:
    """Print the table of all detectors."""
    keys = ("I-AUROC", "P-AUROC", "AUPRO", "synthetic")
    print("\n| mean | I-AUROC | P-AUROC | AUPRO | synthetic I-AUROC | ms int8 | ms float32 | head kB int8 | float32 |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, mean in means.items():
        cells = [f"{mean[k]:.4f}" if k in mean else "-" for k in keys]
        if name in cost:
            one = cost[name]
            cells += [f"{one.ms:.2f}", f"{one.float32_ms:.2f}"]
            cells += [f"{one.bytes / 1000:.0f}", f"{one.float32_bytes / 1000:.0f}"]
        print(f"| {name} | {' | '.join(cells + ['-'] * (8 - len(cells)))} |")
    print("\nms: trunk and head, OpenVINO, one thread, one image, fastest turn. Baselines have no exported form.")


def print_ranking(done: list[tuple[Category, dict[str, list[Result]]]], lines: dict[str, dict[str, float]]) -> None:
    """Print which method synthetic validation calls best, and how well it ranks all detectors."""
    print("\n| folder | rank correlation (Spearman) of synthetic and real I-AUROC over detectors |\n|---|---|")
    found = []
    for category, results in done:
        pairs = [(lines[f"{category.name} {name}"]["synthetic"], lines[f"{category.name} {name}"]["I-AUROC"])
                 for name in results]  # fmt: skip
        found.append(float(spearmanr(*zip(*pairs, strict=True)).statistic))
        print(f"| {category.name} | {found[-1]:+.2f} |")
    print(f"| mean | {np.mean(found):+.2f} |")
    synthetic = {
        name: np.mean([lines[f"{category.name} {name}"]["synthetic"] for category, _ in done])
        for name in methods()
        if name in done[0][1]
    }
    print(f"\nbest method on synthetic validation: {max(synthetic, key=lambda name: synthetic[name])}")


if __name__ == "__main__":
    main()
