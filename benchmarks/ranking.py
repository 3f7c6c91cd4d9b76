"""How well do synthetic defects rank detectors? Rank correlation of synthetic validation with the real test images.

Every registered method, the memory with a few settings and the baselines are fitted on each folder and judged twice:
on held-out good images with synthetic defects, by contrast, by family, on images and on features, and on the test
images. Run: ``python benchmarks/ranking.py --data FOLDER [FOLDER ...]``; generated webs where none are given, whose
test defects are synthetic too. ``--records FILE ...`` ranks results that were saved before, also those of accuracy.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from benchmarks._images import CPU, at_size, fit_context, generated_folders, open_category, split
from benchmarks._setting import heading
from benchmarks.accuracy import TAPS, baselines
from deploy.metrics import image_auroc, pixel_metrics
from edge.bundle import Pooling
from edge.errors import DataError
from edge.judgement.score import pool_score
from trainer.fit import choose_pooling, head_maps
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.memory.reduce import Reduction
from trainer.methods.registry import methods
from trainer.synthesis.features import FEATURE_FAMILIES, corrupt_features
from trainer.synthesis.foreground import foreground
from trainer.synthesis.image2d import BY_NAME, make_defects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from benchmarks._images import Category, Split
    from trainer.methods.base import Features, FitContext, Method, MethodConfig

    Maps = npt.NDArray[np.float32]
    Judge = Callable[[Features], Maps]

USUAL = "as training"
"""The setting that training validates with."""

CONTRASTS = (0.1, 0.25, 0.5, 0.75, 1.0)
_PLAIN = 0.5  # families are compared at contrasts from here up
_FEATURE_CONTRASTS = (0.25, 0.5, 1.0)
_VARIANTS: dict[str, dict[str, object]] = {
    "memory, 60 rows": {"rows": 60},
    "memory, coreset": {"reduction": Reduction.CORESET},
    "memory, no background": {"background": 0.0},
    "memory, hardly whitened": {"whitening": 30.0},
}
_RESAMPLES = 2000
_FEWEST = 3  # detectors; a rank correlation of two says nothing


@dataclass(frozen=True)
class Record:
    """One detector, fitted once, on one folder, under one kind of synthetic validation.

    Attributes:
        folder: its name.
        detector: its name.
        seed: of the fit.
        setting: how the validation defects were made.
        level: ``image`` (I-AUROC) or ``pixel`` (AUPRO).
        synthetic: the figure on synthetic validation.
        real: the figure on the test images.
    """

    folder: str
    detector: str
    seed: int
    setting: str
    level: str
    synthetic: float
    real: float


@dataclass(frozen=True)
class Ranking:
    """How well one setting ranks detectors.

    Attributes:
        spearman: mean over folders of the rank correlation over detectors.
        low: of its 95 % interval, folders drawn anew.
        high: of that interval.
        kendall: the same mean of Kendall's tau-b.
        means: Spearman's correlation over detectors of their means over folders.
        regret: mean loss of the real figure by taking the detector that validation calls best.
        chance: the same loss by taking any detector.
        folders: how many have enough detectors.
    """

    spearman: float
    low: float
    high: float
    kendall: float
    means: float
    regret: float
    chance: float
    folders: int


def rank(records: Sequence[Record], *, seed: int = 0) -> Ranking | None:
    """Judge one setting and level by the detectors' records; seeds are averaged first.

    Args:
        records: of one setting and one level.
        seed: of the bootstrap.

    Returns:
        None where no folder has three detectors.
    """
    tables = [table for table in by_folder(records).values() if len(table) >= _FEWEST]
    if not tables:
        return None
    pairs = [np.array(list(table.values())).T for table in tables]
    spearman = np.array([correlation(one, other, "spearman") for one, other in pairs])
    draws = np.random.default_rng(seed).integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    low, high = np.quantile(spearman[draws].mean(1), (0.025, 0.975))
    shared = set.intersection(*(set(table) for table in tables))
    means = [np.mean([table[name] for table in tables], axis=0) for name in sorted(shared)]
    return Ranking(
        spearman=float(spearman.mean()),
        low=float(low),
        high=float(high),
        kendall=float(np.mean([correlation(one, other, "kendall") for one, other in pairs])),
        means=correlation(*np.array(means).T, "spearman") if len(means) >= _FEWEST else float("nan"),
        regret=float(np.mean([real.max() - real[np.argmax(synthetic)] for synthetic, real in pairs])),
        chance=float(np.mean([real.max() - real.mean() for _, real in pairs])),
        folders=len(pairs),
    )


def by_folder(records: Sequence[Record]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return (synthetic, real) of every detector on every folder, means over seeds; what is not finite is left out."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if np.isfinite([record.synthetic, record.real]).all():
            found[record.folder][record.detector].append((record.synthetic, record.real))
    return {
        folder: {name: tuple(np.mean(values, axis=0).tolist()) for name, values in table.items()}
        for folder, table in found.items()
    }


def correlation(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], kind: str) -> float:
    """Return Spearman's rho or Kendall's tau-b; 0 where one side cannot tell the detectors apart."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return 0.0
    found = stats.spearmanr(first, second) if kind == "spearman" else stats.kendalltau(first, second)
    return float(found.statistic)


def read_records(path: Path) -> list[Record]:
    """Read records that this benchmark or accuracy.py saved.

    Raises:
        DataError: the file is neither.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            return [Record(**entry) for entry in content]
        return [
            Record(*key.split(" ", 1), 0, USUAL, "image", figures["synthetic"], figures["I-AUROC"])
            for key, figures in content["categories"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no records of ranking.py or accuracy.py ({error}); save them with --json") from error


@dataclass(frozen=True)
class Defects:
    """Images with synthetic defects as a detector sees them.

    Attributes:
        setting: how they were made.
        features: their taps.
        masks: bool [n, H, W], on any grid.
        families: of each image, empty where they were drawn.
    """

    setting: str
    features: Features
    masks: npt.NDArray[np.bool_]
    families: npt.NDArray[np.str_]


def validations(category: Category, parts: Split, context: FitContext, *, seed: int, count: int) -> Iterator[Defects]:
    """Make the synthetic validation sets of a folder, ``count`` images each."""
    usual = context.validation
    taps = tuple(usual.good.taps)
    yield Defects(USUAL, usual.defective, usual.masks, np.array([], np.str_))

    def on_images(setting: str, names: Sequence[str] | None, **options: object) -> Defects:
        repeats = -(-count // len(parts.holdout))
        images, masks = make_defects(parts.holdout, seed=seed, repeats=repeats, families=names, **options)
        images, masks = images[:count], masks[:count]
        groups = np.arange(len(images)).astype(np.str_)
        told = np.resize(np.array(names or [""], np.str_), len(images))
        return Defects(setting, category.features(images, groups, taps), masks, told)

    for contrast in CONTRASTS:
        yield on_images(f"images, contrast {contrast:g}", tuple(BY_NAME), contrast=contrast)
    where = foreground(parts.images)
    if where is not None:
        yield on_images("images, on the part", None, where=where)
    names = tuple(FEATURE_FAMILIES)
    for contrast in _FEATURE_CONTRASTS:
        repeats = -(-count // len(usual.good))
        made, masks = corrupt_features(usual.good, seed=seed, contrast=contrast, repeats=repeats, families=names)
        told = np.resize(np.array(names, np.str_), len(made))
        yield Defects(f"features, contrast {contrast:g}", made, masks[TAPS[0]], told)


def detectors(
    category: Category, context: FitContext, *, preset: str, only: Sequence[str]
) -> Iterator[tuple[str, Judge, Pooling]]:
    """Fit every detector; yield its name, what gives its maps, and how they are pooled."""
    chosen = methods()
    plans: dict[str, tuple[type[Method], MethodConfig]] = {
        name: (method, method.config(preset)) for name, method in chosen.items()
    }
    usual = MemoryMethod.config(preset)
    plans |= {name: (MemoryMethod, usual.model_copy(update=change)) for name, change in _VARIANTS.items()}
    for name, (method, config) in plans.items():
        if only and name not in only:
            continue
        head = method.fit(context, config)
        judge = partial(_head_judge, head, category)
        good, defective = (judge(part) for part in (context.validation.good, context.validation.defective))
        yield name, judge, choose_pooling(good, defective)[0]
    for name, fit in baselines(context.features, rows=usual.rows, seed=context.seed).items():
        if not only or name in only:
            found = fit()
            yield name, lambda features, found=found: found(features).numpy(), Pooling(cells=1)


def _head_judge(head: object, category: Category, features: Features) -> Maps:
    return head_maps(head, features, category.preprocessing, CPU)


def measure(category: Category, *, seed: int, preset: str, count: int, only: Sequence[str] = ()) -> list[Record]:
    """Fit and judge every detector on one folder."""
    taps = tuple(dict.fromkeys((*TAPS, *(tap for method in methods().values() for tap in method.tap_names))))
    parts = split(category, seed)
    context = fit_context(category, parts, seed=seed, taps=taps)
    sets = list(validations(category, parts, context, seed=seed, count=count))
    records = []
    for name, judge, pooling in detectors(category, context, preset=preset, only=only):
        tested = judge(category.test)
        real = {
            "image": image_figure(tested[~category.labels], tested[category.labels], pooling),
            "pixel": float("nan") if category.masks is None else pixel_figure(tested, category.masks),
        }
        good = judge(context.validation.good)
        judged = {one.setting: judge(one.features) for one in sets}
        for setting, synthetic in figures_of(sets, good, judged, pooling).items():
            for level, figure in synthetic.items():
                if np.isfinite([figure, real[level]]).all():
                    records.append(Record(category.name, name, seed, setting, level, figure, real[level]))
        print(f"  {category.name} seed {seed}: {name}", file=sys.stderr, flush=True)
    return records


def figures_of(
    sets: Sequence[Defects], good: Maps, judged: dict[str, Maps], pooling: Pooling
) -> dict[str, dict[str, float]]:
    """Return the figures of one detector under every setting: each set, and each family over the plain sets."""
    found: dict[str, dict[str, float]] = {}
    families: dict[str, list[tuple[Maps, npt.NDArray[np.bool_]]]] = defaultdict(list)
    for one in sets:
        maps = judged[one.setting]
        found[one.setting] = figures(good, maps, one.masks, pooling)
        where, _, contrast = one.setting.partition(", contrast ")
        if contrast and float(contrast) >= _PLAIN:
            for family in np.unique(one.families):
                some = one.families == family
                families[f"{where}, {family}"].append((maps[some], one.masks[some]))
    for setting, pieces in families.items():
        maps, masks = (np.concatenate(part) for part in zip(*pieces, strict=True))
        found[setting] = figures(good, maps, masks, pooling)
    return found


def figures(good: Maps, maps: Maps, masks: npt.NDArray[np.bool_], pooling: Pooling) -> dict[str, float]:
    """Return I-AUROC and AUPRO of good images against those with defects."""
    clean = np.zeros((len(good), *masks.shape[1:]), np.bool_)
    return {
        "image": image_figure(good, maps, pooling),
        "pixel": pixel_figure(np.concatenate([good, maps]), np.concatenate([clean, masks])),
    }


def image_figure(good: Maps, defective: Maps, pooling: Pooling) -> float:
    """Return the I-AUROC of pooled maps; NaN where a class is absent."""
    labels = np.r_[np.zeros(len(good), bool), np.ones(len(defective), bool)]
    area = image_auroc(labels, [pool_score(one, pooling) for one in (*good, *defective)])
    return float("nan") if area is None else area


def pixel_figure(maps: Maps, masks: npt.NDArray[np.bool_]) -> float:
    """Return the AUPRO, on every second pixel of large masks; NaN without defects."""
    step = max(1, masks.shape[1] // 112)
    area = pixel_metrics(masks[:, ::step, ::step], at_size(maps, masks[0, ::step, ::step].shape[0])).aupro
    return float("nan") if area is None else area


def print_rankings(records: Sequence[Record]) -> dict[str, dict[str, Ranking]]:
    """Print one table for each level; return the rankings by level and setting."""
    found: dict[str, dict[str, Ranking]] = {}
    for level, figure in (("image", "I-AUROC"), ("pixel", "AUPRO")):
        settings = dict.fromkeys(record.setting for record in records if record.level == level)
        ranked = {name: rank([r for r in records if (r.level, r.setting) == (level, name)]) for name in settings}
        found[level] = {name: one for name, one in ranked.items() if one is not None}
        if not found[level]:
            continue
        print(f"\n{figure}, synthetic against real:\n")
        print(
            "| validation | Spearman | 95 % | Kendall | of the means | loss by its choice | by any choice | folders |"
        )
        print("|---" * 8 + "|")
        for name, one in found[level].items():
            print(
                f"| {name} | {one.spearman:+.2f} | {one.low:+.2f} to {one.high:+.2f} | {one.kendall:+.2f} "
                f"| {one.means:+.2f} | {one.regret:.4f} | {one.chance:.4f} | {one.folders} |"
            )
    return found


def print_detectors(records: Sequence[Record]) -> None:
    """Print what the usual validation says of each detector beside the truth."""
    usual = [record for record in records if record.setting == USUAL and record.level == "image"]
    print(f"\nI-AUROC, validation {USUAL} / test images:\n")
    tables = by_folder(usual)
    names = list(dict.fromkeys(record.detector for record in usual))
    print(f"| detector | {' | '.join(tables)} |\n{'|---' * (len(tables) + 1)}|")
    for name in names:
        cells = [f"{table[name][0]:.3f} / {table[name][1]:.3f}" if name in table else "-" for table in tables.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Ranking]]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="folders in MVTec layout")
    parser.add_argument("--records", type=Path, nargs="+", default=[], help="saved results to rank as well")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--size", type=int, help="224, or 128 on generated webs")
    parser.add_argument("--train", type=int, default=60, help="most training images of a folder")
    parser.add_argument("--test", type=int, default=120, help="most test images of a folder, half of them good")
    parser.add_argument("--defects", type=int, default=66, help="synthetic images of each setting")
    parser.add_argument("--only", nargs="+", default=[], help="detectors, by name; all if absent")
    parser.add_argument("--json", type=Path, help="file for every record")
    options = parser.parse_args(argv)
    heading("ranking")
    records = [record for path in options.records for record in read_records(path)]
    taps = tuple(dict.fromkeys((*TAPS, *(tap for method in methods().values() for tap in method.tap_names))))

    def run(folders: Sequence[Path], size: int) -> None:
        for folder in folders:
            category = open_category(folder, taps=taps, size=size, train=options.train, test=options.test)
            for seed in options.seeds:
                records.extend(
                    measure(category, seed=seed, preset=options.preset, count=options.defects, only=options.only)
                )
            if options.json:  # after each folder: what is done stays if a later one fails
                options.json.write_text(json.dumps([asdict(record) for record in records]))

    if options.data:
        run(options.data, options.size or 224)
    elif not options.records:
        with generated_folders(train=options.train, test=options.test) as folders:
            run(folders, options.size or 128)
    print_detectors(records)
    return print_rankings(records)


if __name__ == "__main__":
    main()
