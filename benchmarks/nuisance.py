"""How far do the scores of good parts move when the light, the pose or the camera's resolution changes?

Test images of folders in MVTec layout, changed before the box's own preprocessing; every registered method, and the
HetNet-style method without its global teacher. Run: ``python -m benchmarks.nuisance --data FOLDER [FOLDER ...]``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from benchmarks._images import CPU, fit_context, generated_folders, open_category, split
from benchmarks._setting import Goal, heading, print_goals
from deploy.metrics import image_auroc
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from trainer.data.folder import read_folder
from trainer.data.images import load_image
from trainer.fit import choose_pooling, head_maps
from trainer.methods.hetnet.fit import GlobalTeacher
from trainer.methods.registry import get, methods

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from benchmarks._images import Category
    from edge.bundle import Pooling
    from trainer.methods.base import FitContext, Head, Method, MethodConfig

    Image = npt.NDArray[np.uint8]

CNN_ONLY = "hetnet-cnn"
"""The HetNet-style method without a global teacher."""
SHRINK_GOAL = 0.3
CLEAN = "clean"


def light(image: Image, factor: float) -> Image:
    """Scale the brightness of uint8 [H, W, 3]; what exceeds white is white."""
    return np.clip(np.rint(image * np.float32(factor)), 0, 255).astype(np.uint8)


def pose(image: Image, *, angle: float = 0.0, scale: float = 1.0) -> Image:
    """Turn (degrees) and enlarge the part in the picture; beyond the picture's edge it is mirrored."""
    height, width = image.shape[:2]
    move = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, scale)
    return np.asarray(
        cv2.warpAffine(image, move, (width, height), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101),
        dtype=np.uint8,
    )


def resolution(image: Image, factor: float) -> Image:
    """Give the picture as many pixels as a camera of another resolution would: the view stays, the detail changes."""
    size = (max(16, round(image.shape[1] * factor)), max(16, round(image.shape[0] * factor)))
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, size, interpolation=how), dtype=np.uint8)


NUISANCES: dict[str, Callable[[Image], Image]] = {
    "light x0.6": lambda image: light(image, 0.6),
    "light x1.4": lambda image: light(image, 1.4),
    "turned -10": lambda image: pose(image, angle=-10),
    "turned +10": lambda image: pose(image, angle=10),
    "resolution x0.5": lambda image: resolution(image, 0.5),
    "resolution x2": lambda image: resolution(image, 2.0),
    "part x0.5": lambda image: pose(image, scale=0.5),
    "part x2": lambda image: pose(image, scale=2.0),
}
RESCALED_PART = ("part x0.5", "part x2")
"""The harsher reading of rescaling: the part itself, twice or half as large in the picture."""


@dataclass(frozen=True)
class Scores:
    """Raw image scores of one detector on one folder.

    Attributes:
        good: of the good test images, float64 [n] by condition, the same images in the same order.
        defective: of the defective ones, likewise.
    """

    good: dict[str, npt.NDArray[np.float64]]
    defective: dict[str, npt.NDArray[np.float64]]

    def changes(self, conditions: Sequence[str]) -> npt.NDArray[np.float64]:
        """Return |change of score| of every good image, in standard deviations of the clean good scores."""
        clean = self.good[CLEAN]
        return np.concatenate([np.abs(self.good[name] - clean) for name in conditions]) / max(clean.std(), 1e-12)

    def drift(self, conditions: Sequence[str]) -> float:
        """Return the 95 % quantile of :meth:`changes`."""
        return float(np.quantile(self.changes(conditions), 0.95))

    def auroc(self, conditions: Sequence[str]) -> float:
        """Return the I-AUROC of all conditions thrown together: one threshold has to serve them all."""
        good, defective = (np.concatenate([part[name] for name in conditions]) for part in (self.good, self.defective))
        labels = np.r_[np.zeros(len(good), bool), np.ones(len(defective), bool)]
        return float(image_auroc(labels, np.r_[good, defective]) or np.nan)


def detector(name: str, preset: str) -> tuple[type[Method], MethodConfig]:
    """Return the method and settings that a detector's name stands for."""
    if name != CNN_ONLY:
        return get(name), get(name).config(preset)
    method = get("hetnet")
    return method, method.config(preset).model_copy(update={"teacher": GlobalTeacher.NONE})


def fit(name: str, preset: str, context: FitContext, category: Category) -> tuple[Head, Pooling]:
    """Fit a detector and choose its pooling on synthetic defects, as training does."""
    method, config = detector(name, preset)
    head = method.fit(context, config)
    maps = (
        head_maps(head, part, category.preprocessing, CPU)
        for part in (context.validation.good, context.validation.defective)
    )
    return head, choose_pooling(*maps)[0]


def measure(folder: Path, names: Sequence[str], options: argparse.Namespace) -> dict[str, Scores]:
    """Fit the detectors on one folder and score its test images under every condition."""
    taps = tuple(dict.fromkeys(tap for name in names for tap in detector(name, options.preset)[0].tap_names))
    category = open_category(folder, taps=taps, size=options.size, train=options.train, test=2)
    context = fit_context(category, split(category, options.seed), seed=options.seed, taps=taps)
    fitted = {}
    for name in names:
        started = time.monotonic()
        fitted[name] = fit(name, options.preset, context, category)
        print(f"  {name} on {category.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    test = read_folder(folder).test
    found: dict[str, Scores] = {name: Scores({}, {}) for name in names}
    for anomalous in (False, True):
        chosen = [sample for sample in test if sample.anomalous == anomalous]
        rows = np.unique(np.linspace(0, len(chosen) - 1, options.test // 2).round().astype(int))
        images = [load_image(chosen[row].path) for row in rows]
        for condition, change in {CLEAN: np.asarray, **NUISANCES}.items():
            canvases = np.stack([to_canvas(change(image), category.preprocessing) for image in images])
            features = category.features(canvases, np.arange(len(images)).astype(np.str_), taps)
            for name, (head, pooling) in fitted.items():
                maps = head_maps(head, features, category.preprocessing, CPU)
                part = found[name].defective if anomalous else found[name].good
                part[condition] = np.array([pool_score(one, pooling) for one in maps], np.float64)
    return found


def report(done: dict[str, dict[str, Scores]], names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Print the tables and return the means over folders by detector."""
    mild = [name for name in NUISANCES if name not in RESCALED_PART]
    print("Drift: 95 % quantile of |score change| of good test images, in standard deviations of their clean scores.\n")
    print(f"| folder | detector | {' | '.join(NUISANCES)} | all but part | all |\n|{'---|' * (len(NUISANCES) + 4)}")
    means: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for folder, found in done.items():
        for name in names:
            scores = found[name]
            cells = {condition: scores.drift([condition]) for condition in NUISANCES}
            cells |= {"all but part": scores.drift(mild), "all": scores.drift(list(NUISANCES))}
            print(f"| {folder} | {name} | {' | '.join(f'{value:.2f}' for value in cells.values())} |")
            for key, value in cells.items():
                means[name][key].append(value)
            for key, conditions in (
                ("I-AUROC clean", [CLEAN]),
                ("I-AUROC all but part", [CLEAN, *mild]),
                ("I-AUROC all", [CLEAN, *NUISANCES]),
            ):
                means[name][key].append(scores.auroc(conditions))
    averaged = {name: {key: float(np.mean(values)) for key, values in found.items()} for name, found in means.items()}
    for name in names:
        print(f"| mean | {name} | {' | '.join(f'{averaged[name][key]:.2f}' for key in cells)} |")
    aurocs = [key for key in averaged[names[0]] if key.startswith("I-AUROC")]
    print(f"\nI-AUROC with one threshold for all conditions.\n\n| folder | detector | {' | '.join(aurocs)} |")
    print(f"|{'---|' * (len(aurocs) + 2)}")
    for index, folder in enumerate(done):
        for name in names:
            print(f"| {folder} | {name} | {' | '.join(f'{means[name][key][index]:.3f}' for key in aurocs)} |")
    for name in names:
        print(f"| mean | {name} | {' | '.join(f'{averaged[name][key]:.3f}' for key in aurocs)} |")
    return averaged


def goals(averaged: dict[str, dict[str, float]], done: dict[str, dict[str, Scores]]) -> list[Goal]:
    """Return how much smaller the drift is with the global teacher; empty where one of the two was not measured."""
    if not {"hetnet", CNN_ONLY} <= averaged.keys():
        return []
    said = []
    for key, conditions in (
        ("all but part", [name for name in NUISANCES if name not in RESCALED_PART]),
        ("all", list(NUISANCES)),
    ):
        each = [1 - found["hetnet"].drift(conditions) / found[CNN_ONLY].drift(conditions) for found in done.values()]
        shrink = 1 - averaged["hetnet"][key] / averaged[CNN_ONLY][key]
        spread = f"by folder {', '.join(f'{one:+.2f}' for one in each)}"
        said.append(Goal(f"drift shrinks by ({key})", shrink, SHRINK_GOAL, True, spread))
    return said


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure and print; return the means by detector."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", help="folders in MVTec layout; generated webs if absent")
    parser.add_argument("--detectors", nargs="+", default=["hetnet", CNN_ONLY], help="methods, or hetnet-cnn")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--train", type=int, default=150, help="most training images of a folder")
    parser.add_argument("--test", type=int, default=80, help="most test images of a folder, half of them good")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.detectors) - set(methods()) - {CNN_ONLY})
    if unknown:
        parser.error(f"unknown detector {', '.join(unknown)}; known are {', '.join([*methods(), CNN_ONLY])}")
    heading("nuisance")
    done = {}
    webs = generated_folders(train=options.train, test=options.test)
    with nullcontext(options.data) if options.data else webs as folders:
        for folder in folders:
            done[f"{folder.resolve().parent.name}/{folder.resolve().name}"] = measure(
                folder, options.detectors, options
            )
    averaged = report(done, options.detectors)
    print()
    if found := goals(averaged, done):
        print_goals(found)
    if options.json:
        raw = {
            folder: {name: {"good": _plain(s.good), "defective": _plain(s.defective)} for name, s in found.items()}
            for folder, found in done.items()
        }
        options.json.write_text(json.dumps({"means": averaged, "scores": raw}), encoding="utf-8")
    return averaged


def _plain(scores: dict[str, npt.NDArray[np.float64]]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in scores.items()}


if __name__ == "__main__":
    main()
