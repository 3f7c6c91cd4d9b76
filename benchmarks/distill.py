"""Does a teacher help a small student, and does that student beat the memory detector at the same cost?

Three detectors per folder and seed, all of which take about the same milliseconds in int8: the distilled student, the
same student without a teacher (same shape, pictures, schedule and choices; its branch learns from synthetic masks
only), and the best memory detector that is no slower. Nothing is chosen on test
images. A folder may be measured alone (``--json PART``), parts are joined with ``--join PART ...``.
Run: ``python benchmarks/distill.py --data FOLDER [FOLDER ...] --json FILE``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch

from benchmarks._images import at_size
from benchmarks._setting import heading, quiet
from deploy.bootstrap import PairedCategory, bootstrap_difference, weighted_auroc
from deploy.metrics import image_auroc, pixel_metrics
from edge.judgement.score import pool_score
from trainer.backbones.registry import TrunkSpec, build_trunk
from trainer.data.folder import load_mask, read_folder
from trainer.data.generic import generic_canvases
from trainer.data.images import load_image
from trainer.data.splits import split_holdout
from trainer.distill.fit import Lesson, fit_memory, fit_student
from trainer.distill.gallery import Gallery
from trainer.distill.latency import engine, export_int8, measure
from trainer.distill.search import Shape, export_shapes, shapes
from trainer.distill.student import Student
from trainer.distill.teachers import Taught, standardised
from trainer.features import extract, load_canvases
from trainer.fit import HOLDOUT_FRACTION, HOLDOUT_MINIMUM, choose_pooling, head_maps, preprocessing_for
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.memory.model import LEVELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from deploy.bootstrap import WeightedMetric
    from edge.bundle import Pooling, Preprocessing
    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.data.folder import Sample
    from trainer.distill.gallery import Views
    from trainer.distill.latency import Exported, Timing
    from trainer.distill.student import StudentConfig
    from trainer.methods.base import Features, Head

    Canvases = npt.NDArray[np.uint8]

CPU = torch.device("cpu")
STUDENT, CONTROL, MEMORY = "student", "without teacher", "memory at equal ms"
MEMORY_SIZES, MEMORY_ROWS = (224, 192, 160, 128, 96), (100, 1000)
_LEAST_ERROR = 0.001  # of the I-AUROC
_LEAST_ROWS = 50  # below it a bank is no bank
_NOISE = 16  # pictures of noise, enough for 1,000 rows of the coarsest level at 128 pixels
TEACHER_ROWS = 600
PIXELS = 224  # side at which AUPRO is computed, whatever the input
_CANDIDATES = 10_000


@dataclass(frozen=True)
class Setting:
    """What is compared: the student's shape, the memory detectors that are no slower, the teachers."""

    shape: Shape
    memories: tuple[tuple[int, int], ...]
    config: StudentConfig
    teacher_size: int
    ensemble: bool


def square(size: int) -> Preprocessing:
    return preprocessing_for(size=(size, size), tiles=(1, 1), overlap=0, crop=None)


def taps_of(trunk: Trunk, canvases: Canvases, size: int) -> Features:
    groups = np.arange(len(canvases)).astype(np.str_)
    return extract(trunk, canvases, square(size), tap_names=LEVELS, groups=groups, device=CPU, progress=quiet, what="")


def thinned(samples: Sequence[Sample], most: int | None) -> tuple[Sample, ...]:
    """Return at most so many samples, evenly drawn, in their order."""
    if most is None or len(samples) <= most:
        return tuple(samples)
    return tuple(samples[index] for index in np.linspace(0, len(samples) - 1, most).round().astype(int))


def memory(features: Features, pictures: int, rows: int, seed: int) -> Head:
    config = MemoryMethod.config("quick").model_copy(update={"rows": rows, "candidates": _CANDIDATES})
    return fit_memory(features, pictures, config, seed=seed, device=CPU, progress=quiet)


def validated(head: Head, held: Features, spoiled: Features, size: int) -> tuple[Pooling, float]:
    pooling, found = choose_pooling(*(head_maps(head, part, square(size), CPU) for part in (held, spoiled)))
    return pooling, max(found.values())


class Folder:
    """One folder: its samples, and taps of its test images by trunk and size, made once for all seeds."""

    def __init__(self, path: Path, train: int | None = None, test: int | None = None) -> None:
        found = read_folder(path)
        self.name = f"{path.parent.name}/{path.name}"
        self.train = thinned(found.train, train)
        self.judging = (
            *thinned([sample for sample in found.test if not sample.anomalous], test and test // 2),
            *thinned([sample for sample in found.test if sample.anomalous], test and test // 2),
        )
        self.labels = np.array([sample.anomalous for sample in self.judging])
        self.groups = np.array([sample.group for sample in self.judging], np.str_)
        self._test: dict[tuple[str, int], Features] = {}
        self._masks: list[npt.NDArray[np.bool_]] | None = None

    def test(self, spec: TrunkSpec, size: int) -> Features:
        """Return the taps of the test images."""
        key = (spec.model_dump_json(), size)
        if key not in self._test:
            canvases = load_canvases(self.judging, square(size), progress=quiet, what="")
            self._test[key] = taps_of(build_trunk(spec), canvases, size)
        return self._test[key]

    def judged(self, head: Head, pooling: Pooling, spec: TrunkSpec, size: int) -> dict[str, Any]:
        """Scores of the test images, and the AUPRO at 224 pixels where the folder has masks."""
        maps = head_maps(head, self.test(spec, size), square(size), CPU)
        masks = self._read_masks()
        aupro = None if masks is None else pixel_metrics(masks, list(at_size(maps, PIXELS))).aupro
        return {"scores": [float(pool_score(one, pooling)) for one in maps], "aupro": aupro}

    def _read_masks(self) -> list[npt.NDArray[np.bool_]] | None:
        if self._masks is None and any(sample.mask for sample in self.judging):
            self._masks = []
            for sample in self.judging:
                mask = np.zeros((PIXELS, PIXELS), np.uint8)
                if sample.anomalous:
                    whole = load_mask(sample, load_image(sample.path).shape[:2]).astype(np.uint8)
                    mask = np.asarray(cv2.resize(whole, (PIXELS, PIXELS), interpolation=cv2.INTER_NEAREST), np.uint8)
                self._masks.append(mask.astype(np.bool_))
        return self._masks


def teach_by_memory(
    gallery: Gallery,
    shared: dict[tuple[str, int], tuple[Features, Features, Features, Views]],
    setting: Setting,
    seed: int,
) -> tuple[Taught, dict[str, float]]:
    """Let memory on Lite2 at the larger input teach, with memory on Lite0 where that is better on synthetic defects."""
    maps, said, kept = [], {}, []
    wanted = [("lite2", setting.teacher_size)] + ([("lite0", 224)] if setting.ensemble else [])
    for name, size in wanted:
        lesson, held, spoiled, views = shared_taps(shared, gallery, TrunkSpec(name=name), size)
        head = memory(lesson, len(views.good), TEACHER_ROWS, seed)
        good = head_maps(head, held, square(size), CPU)
        mean, deviation = good.mean(), good.std()
        kept.append([(good - mean) / deviation, (head_maps(head, spoiled, square(size), CPU) - mean) / deviation])
        maps.append(standardised(head, lesson, held, square(size), CPU))
        said[name] = max(choose_pooling(*kept[-1])[1].values())
    if len(kept) > 1:
        grid = kept[0][0].shape[1:]
        joined = [sum(Taught((one[part],)).target(grid).numpy() for one in kept) for part in (0, 1)]
        said["both"] = max(choose_pooling(*joined)[1].values())
        best = max(said, key=lambda name: said[name])
        maps = maps if best == "both" else [maps[list(said).index(best)]]
    return Taught(tuple(maps)), said


def shared_taps(
    shared: dict[tuple[str, int], tuple[Features, Features, Features, Views]],
    gallery: Gallery,
    spec: TrunkSpec,
    size: int,
) -> tuple[Features, Features, Features, Views]:
    """Taps of the lesson, the hold-out and its defects, made once for teacher, students and memory."""
    key = (spec.model_dump_json(), size)
    if key not in shared:
        trunk, views = build_trunk(spec), gallery.at(square(size))
        shared[key] = (
            taps_of(trunk, views.lesson(), size),
            taps_of(trunk, views.holdout, size),
            taps_of(trunk, views.spoiled, size),
            views,
        )
    return shared[key]


def run_seed(folder: Folder, seed: int, setting: Setting) -> dict[str, Any]:
    """Train and judge all three detectors."""
    config, size = setting.config, setting.shape.preprocessing.height
    split = split_holdout(folder.train, HOLDOUT_FRACTION, seed, HOLDOUT_MINIMUM)
    order = np.random.default_rng(seed).permutation(len(split.fit))[: config.images]
    fit = [split.fit[index] for index in sorted(order)]
    gallery = Gallery(
        fit, split.holdout, square(max(setting.teacher_size, size)), seed=seed, relit=config.relit,
        defects=config.defects, progress=quiet,
    )  # fmt: skip
    shared: dict[tuple[str, int], tuple[Features, Features, Features, Views]] = {}
    found: dict[str, Any] = {}
    started = time.monotonic()
    taught, found["teachers"] = teach_by_memory(gallery, shared, setting, seed)
    found["teach s"] = time.monotonic() - started
    spec = setting.shape.trunk
    lesson, held, spoiled, views = shared_taps(shared, gallery, spec, size)
    grid = (size // 4, size // 4)
    for name, teacher in ((STUDENT, taught), (CONTROL, None)):
        started = time.monotonic()
        head, shares = fit_student(
            Lesson(
                features=lesson,
                good=len(views.good),
                masks=gallery.lesson_masks(grid),
                target=None if teacher is None else teacher.target(grid),
                holdout=held,
                spoiled=spoiled,
            ),
            config.model_copy(update={"rows": setting.shape.rows}),
            seed=seed,
            device=CPU,
            progress=quiet,
        )
        pooling, validation = validated(head, held, spoiled, size)
        seconds = time.monotonic() - started
        found[name] = folder.judged(head, pooling, spec, size) | {
            "validation": validation, "seconds": seconds, "soft": shares.teacher, "hard": shares.masks,
        }  # fmt: skip
    found[MEMORY] = {}
    for memory_size, rows in setting.memories:
        whole = TrunkSpec()
        lesson, held, spoiled, views = shared_taps(shared, gallery, whole, memory_size)
        head = memory(lesson, len(views.good), rows, seed)
        pooling, validation = validated(head, held, spoiled, memory_size)
        found[MEMORY][f"{memory_size} {rows}"] = folder.judged(head, pooling, whole, memory_size) | {
            "validation": validation
        }
    return found


def time_memory(pairs: Sequence[tuple[int, int]], extra: Sequence[Exported], folder: Path) -> list[Timing]:
    """Time memory detectors of (size, rows), in turns with what else is given; those come first."""
    trunk, exported = build_trunk("lite0"), []
    for size, rows in pairs:
        # Fitted on noise: what a head costs does not depend on what it has learned.
        noise = np.random.default_rng(0).integers(0, 256, (_NOISE, size, size, 3), dtype=np.uint8)
        head = memory(taps_of(trunk, noise, size), len(noise), rows, 0)
        where = folder / f"{size}-{rows}"
        generic = generic_canvases()
        exported.append(export_int8(trunk, head, square(size), canvases=noise[:4], generic=generic, folder=where))
    return measure([*extra, *exported])


def equal_memories(ours: Exported, slack: float, count: int, folder: Path) -> tuple[tuple[int, int], ...]:
    """Return, for the largest inputs that fit, the most rows whose detector takes about what ours does.

    The time is linear in the rows: two of them, timed in turns with ours, say how many fit.
    """
    few, many = MEMORY_ROWS
    found: list[tuple[int, int]] = []
    for size in MEMORY_SIZES:
        limit, low, high = (one.median for one in time_memory([(size, few), (size, many)], [ours], folder))
        rows = few + (limit * (1 + slack) - low) * (many - few) / max(high - low, 1e-6)
        if rows >= _LEAST_ROWS:
            found.append((size, int(min(rows, many))))
        if len(found) == count:
            break
    return tuple(found)


def setting_of(options: argparse.Namespace, memories: tuple[tuple[int, int], ...]) -> Setting:
    """Turn options into a setting."""
    blocks, size, rows = (int(part) for part in options.shape.split(","))
    config = Student.config("quick").model_copy(update=json.loads(options.config))
    shape = shapes(square(size), trunk="lite0", blocks=[blocks], sizes=[size], rows=[rows])[0]
    return Setting(shape, memories, config, options.teacher_size, not options.single)


def plan(options: argparse.Namespace) -> tuple[Setting, dict[str, Any]]:
    """Time the shapes on this machine and say what will be compared."""
    if options.plan and options.plan.exists():
        known = json.loads(options.plan.read_text())
        options.shape, memories = known["shape"], tuple((int(s), int(r)) for s, r in known["memories"])
        return setting_of(options, memories), known["said"]
    wanted, generic = setting_of(options, ()), generic_canvases()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported = export_shapes([wanted.shape], wanted.config, generic, folder, progress=quiet)
        memories = equal_memories(exported[0], options.slack, options.memories, folder)
        if not memories:
            raise SystemExit("no memory detector is as fast on this machine; take a larger --shape")
        ours, *theirs = time_memory(memories, exported, folder)
    said = {
        "engine": f"{engine().value} int8, one thread, processor time",
        STUDENT: {"shape": str(wanted.shape), "ms": [ours.median, ours.low, ours.high]},
        MEMORY: {f"{s} {r}": [t.median, t.low, t.high] for (s, r), t in zip(memories, theirs, strict=True)},
    }
    if options.plan:
        options.plan.write_text(json.dumps({"shape": options.shape, "memories": memories, "said": said}))
    return setting_of(options, memories), said


def best_memory(seeds: Sequence[dict[str, Any]]) -> str:
    """Return which memory detector of a category is best on synthetic validation, over its seeds."""
    return max(seeds[0][MEMORY], key=lambda name: float(np.mean([seed[MEMORY][name]["validation"] for seed in seeds])))


def averaged(category: dict[str, Any], name: str) -> WeightedMetric:
    """Return the I-AUROC of a detector on a category, the mean of its seeds on the same weights."""
    labels = np.array(category["labels"])
    metrics = [weighted_auroc(labels, np.array(entry(seed, name, category)["scores"])) for seed in category["seeds"]]
    return lambda weights: np.mean([metric(weights) for metric in metrics], axis=0)


def compare(categories: dict[str, Any], ours: str, other: str) -> dict[str, float]:
    """Bootstrap the share of the other's I-AUROC error that ours saves, over categories, groups drawn whole.

    An error below ``_LEAST_ERROR`` counts as that: a resample in which a detector is right throughout would divide
    by nothing.
    """
    pairs = []
    for category in categories.values():
        labels, groups = np.array(category["labels"]), np.array(category["groups"], np.str_)

        first, second = (averaged(category, name) for name in (ours, other))
        pairs.append(PairedCategory(labels, groups, first, second))
    found = bootstrap_difference(pairs)

    observed = np.array([[found.first], [found.second]])
    errors = 1 - np.concatenate([observed, np.stack([found.first_resampled, found.second_resampled])], axis=1)
    ours_left, other_left = np.maximum(errors, _LEAST_ERROR)
    saved = 1 - ours_left / other_left
    low, high = np.quantile(saved[1:], (0.025, 0.975))
    return {
        "ours": found.first, "other": found.second, "saved": float(saved[0]),
        "low": float(low), "high": float(high),
    }  # fmt: skip


def entry(seed: dict[str, Any], name: str, category: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = seed[name][best_memory(category["seeds"])] if name == MEMORY else seed[name]
    return found


def show(categories: dict[str, Any]) -> None:
    """Print the table and the comparisons."""
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    print("| category | detector | I-AUROC | AUPRO | synthetic I-AUROC | chosen |\n|---|---|---|---|---|---|")
    for title, category in categories.items():
        labels = np.array(category["labels"])
        for name in (STUDENT, CONTROL, MEMORY):
            entries = [entry(seed, name, category) for seed in category["seeds"]]
            aurocs = [float(image_auroc(labels, np.array(one["scores"])) or np.nan) for one in entries]
            aupros = [one["aupro"] for one in entries if one["aupro"] is not None]
            chosen = (
                best_memory(category["seeds"])
                if name == MEMORY
                else "; ".join(f"{one['soft']:g}/{one['hard']:g}" for one in entries)
            )
            table[name]["auroc"].append(float(np.mean(aurocs)))
            if aupros:
                table[name]["aupro"].append(float(np.mean(aupros)))
            shown = f"{np.mean(aupros):.3f}" if aupros else "-"
            synthetic = float(np.mean([one["validation"] for one in entries]))
            figure = f"{np.mean(aurocs):.3f} ({np.ptp(aurocs):.3f})"
            print(f"| {title} | {name} | {figure} | {shown} | {synthetic:.3f} | {chosen} |")
    print("\n| mean | I-AUROC | AUPRO |\n|---|---|---|")
    for name, columns in table.items():
        aupro = f"{np.mean(columns['aupro']):.4f}" if columns["aupro"] else "-"
        print(f"| {name} | {np.mean(columns['auroc']):.4f} | {aupro} |")
    print("\n| share of the error saved | student | other | saved | 95 % interval |\n|---|---|---|---|---|")
    for other in (CONTROL, MEMORY):
        found = compare(categories, STUDENT, other)
        interval = f"{found['low']:+.3f} to {found['high']:+.3f}"
        print(f"| against {other} | {found['ours']:.4f} | {found['other']:.4f} | {found['saved']:+.3f} | {interval} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders in MVTec layout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shape", default="11,160,256", help="BLOCKS,SIZE,ROWS of the student")
    parser.add_argument("--train", type=int, help="most training images, evenly drawn; all unless given")
    parser.add_argument("--test", type=int, help="most test images, half of them good, evenly drawn; all unless given")
    parser.add_argument("--teacher-size", type=int, default=288, help="input of the Lite2 teacher in pixels")
    parser.add_argument("--single", action="store_true", help="one teacher: no ensemble with memory on Lite0")
    parser.add_argument("--slack", type=float, default=0.02, help="share by which the memory detector may be slower")
    parser.add_argument("--memories", type=int, default=2, help="memory detectors to try, largest inputs first")
    parser.add_argument("--plan", type=Path, help="where shape and equal memory detectors are kept between parts")
    parser.add_argument("--config", default="{}", help="settings of the student that differ from quick, as JSON")
    parser.add_argument("--json", type=Path, help="write scores and choices here")
    parser.add_argument("--join", type=Path, nargs="+", default=[], help="parts that --json wrote, shown together")
    options = parser.parse_args()
    heading("distill")
    categories: dict[str, Any] = {}
    for part in options.join:
        known = json.loads(part.read_text())
        print(f"{part}: {json.dumps(known['setting'])}")
        categories |= known["categories"]
    if options.data:
        setting, said = plan(options)
        print(json.dumps(said), flush=True)
        fresh = {}
        for path in options.data:
            folder, seeds = Folder(path, options.train, options.test), []
            for seed in options.seeds:
                started = time.monotonic()
                seeds.append(run_seed(folder, seed, setting))
                print(f"  {folder.name} seed {seed}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
            fresh[folder.name] = {"labels": folder.labels.tolist(), "groups": folder.groups.tolist(), "seeds": seeds}
            if options.json:
                options.json.write_text(json.dumps({"setting": said, "categories": fresh}))
        categories |= fresh
    if not categories:
        raise SystemExit("nothing to show: give --data or --join")
    show(categories)


if __name__ == "__main__":
    main()
