"""What a fleet's memory is worth to boxes that each see one condition, or one product: beside their own and pooled.

Clients are the conditions of a folder's meta.csv, and folders; the generator was trained on data of none of them, and
beside them always stands a generated fleet. Nothing is chosen on the test images. Run:
``python benchmarks/fleet.py --data FOLDER [FOLDER ...] --keep DIR --json FILE --pictures DIR``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from benchmarks._fleet import FleetSplit, Runs, across, by_condition, open_folder, scale_gate
from benchmarks._setting import heading, quiet
from deploy.aggregator.aggregate import AggregateSettings, aggregate
from deploy.aggregator.lloyd import single_threaded_blas
from deploy.bootstrap import draw_groups, weighted_auroc
from trainer.evaluation.fleet import FleetSettings, Simulation
from trainer.evaluation.fleet_box import BoxSettings
from trainer.evaluation.fleet_curves import (
    bytes_curve,
    computed_points,
    coreset_point,
    pooled_bank,
)
from trainer.evaluation.fleet_embed import generic_embedder
from trainer.evaluation.fleet_generated import ImageCounts, generated_boxes
from trainer.evaluation.fleet_judge import Exam, squared_distances
from trainer.evaluation.fleet_report import save
from trainer.evaluation.fleet_scene import make_sites

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from trainer.evaluation.fleet_box import BoxData
    from trainer.evaluation.fleet_curves import Point
    from trainer.evaluation.fleet_embed import Embedder

    Scores = npt.NDArray[np.float64]

GAP, CLOSED, OWN_DROP, SEED_CHANGE = 0.03, 0.8, 0.01, 0.01
A2_GAIN, A2_SHORT = 0.15, 0.02
JUDGED = (1, 2, 5, 10)
RESAMPLES = 1000
MOST_TEST = 80
"""Test images of one client, half of them good."""

LOCAL, FLEET = 512, 1024
"""Rows of a box's own memory and of the fleet's."""

UNLIMITED = 4096
"""Rows of a pooled bank that no box holds, nearly three times as many as a box has; made for the first seed alone."""


@dataclass(frozen=True)
class SplitRun:
    """One fleet with one seed.

    Attributes:
        exam: labels and owners of all test images.
        rounds: rounds that were judged.
        local: float64 [J, K, M], scores with a box's own memory alone, by judged round.
        fleet: float64 [J, K, M], with the fleet's beside it.
        alarms: float64 [J, K], false-alarm rates on own good images, at thresholds for 5 %.
        pooled: float64 [M], with a bank of all boxes' frames of as many rows as a box holds.
        unlimited: float64 [M], of many more rows; NaN but for seed 0.
        other_seed: float64 [K, M], as the last ``fleet`` with the clustering's seed changed.
        update_bytes: mean bytes of an update in the last round.
        refused: updates that the gate kept out, over all rounds.
    """

    exam: Exam
    rounds: npt.NDArray[np.int64]
    local: Scores
    fleet: Scores
    alarms: Scores
    pooled: Scores
    unlimited: Scores
    other_seed: Scores
    update_bytes: float
    refused: int


def settings_of(rounds: int) -> FleetSettings:
    """Return what every fleet does: the same for all, so that none has settings of its own."""
    return FleetSettings(
        rounds=rounds,
        box=BoxSettings(local_rows=LOCAL, update_rows=LOCAL),
        aggregate=AggregateSettings(rows=FLEET),
        judged_rounds=tuple(number for number in JUDGED if number <= rounds),
    )


def run(
    split: FleetSplit, embedder: Embedder, *, seed: int, settings: FleetSettings, kept: Runs, test_note: str
) -> SplitRun:
    """Simulate one fleet, or read what was kept."""
    data = split.boxes(seed)
    exam = Exam.of(data)

    def make() -> dict[str, npt.NDArray[np.generic]]:
        return simulated(data, embedder, seed=seed, settings=settings)

    recipe = (embedder.embedding_id, settings.model_dump_json(), str(embedder.judge), str(seed), test_note)
    found = kept.arrays(split.name, recipe, make)
    print(f"  {split.name} seed {seed}", file=sys.stderr, flush=True)
    return SplitRun(exam, *(found[name] for name in ("rounds", "local", "fleet", "alarms", "pooled", "unlimited",
                                                      "other_seed")), float(found["update_bytes"]),
                    int(found["refused"]))  # fmt: skip


def simulated(
    data: Sequence[BoxData], embedder: Embedder, *, seed: int, settings: FleetSettings
) -> dict[str, npt.NDArray[np.generic]]:
    """Run the rounds, then judge with pooled banks and with another seed of the clustering."""
    with single_threaded_blas(1):
        fleet = Simulation(
            data, settings, embedder.judge, embedding_id=embedder.embedding_id, seed=seed, gate=scale_gate
        )
        figures = fleet.run()
        judged = [one for one in figures if one.judged is not None]
        judgement = fleet.judgement()
        updates = [box.update(1, base_version=0, seed=seed) for box in fleet.boxes]
        other = aggregate(updates, settings=settings.aggregate, seed=seed + 1000).rows
        pools = {"unlimited": np.full(len(fleet.exam.labels), np.nan)}
        sizes = {"pooled": settings.box.local_rows + settings.aggregate.rows} | (
            {} if seed else {"unlimited": UNLIMITED}
        )
        for name, rows in sizes.items():
            bank = pooled_bank(data, rows, seed=seed)
            pools[name] = embedder.judge.scores(squared_distances(fleet.exam.images, bank))
        return {
            "rounds": np.array([one.number for one in judged]),
            "local": np.array([one.judged.local for one in judged]),
            "fleet": np.array([one.judged.fleet for one in judged]),
            "alarms": np.array([one.judged.false_alarms for one in judged]),
            **pools,
            "other_seed": judgement.beside(other),
            "update_bytes": np.float64(figures[-1].bytes_up / max(1, figures[-1].counted)),
            "refused": np.int64(sum(len(one.refused) for one in figures)),
        }


def mean_auroc(exam: Exam, scores: Scores, *, own: bool = False) -> float:
    """Return the mean over boxes of the I-AUROC of scores [K, M]."""
    return float(np.nanmean(exam.own(scores) if own else exam.mixed(scores)))


def intervals(runs: Sequence[SplitRun]) -> dict[str, tuple[float, float]]:
    """Bootstrap groups of test images, the same draw for all seeds, boxes and detectors.

    Returns:
        95 % percentile intervals of the gap (pooled - own), the gain (fleet - own) and the share of the gap closed.
    """
    exam = runs[0].exam
    weights = draw_groups(exam.labels, exam.groups, RESAMPLES, np.random.default_rng(0))

    def resampled(rows: Sequence[Scores]) -> Scores:
        return np.mean([weighted_auroc(exam.labels, row)(weights) for row in rows], axis=0)

    local = resampled([row for one in runs for row in one.local[-1]])
    fleet = resampled([row for one in runs for row in one.fleet[-1]])
    pooled = resampled([one.pooled for one in runs])
    return {
        name: (float(np.nanquantile(values, 0.025)), float(np.nanquantile(values, 0.975)))
        for name, values in (
            ("gap", pooled - local), ("gain", fleet - local), ("closed", (fleet - local) / (pooled - local))
        )
    }  # fmt: skip


@dataclass(frozen=True)
class OwnDrops:
    """What boxes lose on their own images by the fleet's memory, means over seeds.

    Attributes:
        each: float64 [K], by box; NaN where a class is absent.
        low: float64 [K], lower end of its 95 % interval.
        high: float64 [K], upper end.
        mean_interval: of the mean over boxes.
    """

    each: Scores
    low: Scores
    high: Scores
    mean_interval: tuple[float, float]


def own_drops(runs: Sequence[SplitRun]) -> OwnDrops:
    """Bootstrap every box's own test images, the same draw for both memories and all seeds."""
    exam = runs[0].exam
    each = np.mean([one.exam.own(one.local[-1]) - one.exam.own(one.fleet[-1]) for one in runs], axis=0)
    found = np.full((len(each), RESAMPLES), np.nan)
    for box in np.flatnonzero(~np.isnan(each)):
        mine = exam.box == box
        # A client is a condition, often one group: its images are drawn one by one.
        weights = draw_groups(
            exam.labels[mine], np.arange(int(mine.sum())).astype(np.str_), RESAMPLES, np.random.default_rng(box)
        )
        pairs = [(one.local[-1][box][mine], one.fleet[-1][box][mine]) for one in runs]
        metrics = [[weighted_auroc(exam.labels[mine], part)(weights) for part in pair] for pair in pairs]
        found[box] = np.mean([local - fleet for local, fleet in metrics], axis=0)
    low, high = np.nanquantile(found, (0.025, 0.975), axis=1)
    ends = np.nanquantile(np.nanmean(found, axis=0), (0.025, 0.975))
    return OwnDrops(each, low, high, (float(ends[0]), float(ends[1])))


def summarise(split: FleetSplit, runs: Sequence[SplitRun]) -> dict[str, object]:
    """Take the means over seeds and boxes of one fleet."""
    local = float(np.mean([mean_auroc(one.exam, one.local[-1]) for one in runs]))
    fleet = float(np.mean([mean_auroc(one.exam, one.fleet[-1]) for one in runs]))
    pooled = float(np.mean([one.exam.auroc(one.pooled) for one in runs]))
    drops = own_drops(runs)
    worst = int(np.nanargmax(drops.each))
    changes = [mean_auroc(one.exam, one.other_seed) - mean_auroc(one.exam, one.fleet[-1]) for one in runs]
    return {
        "clients": len(split.clients),
        "dropped": list(split.dropped),
        "test images": len(runs[0].exam.labels),
        "local": local,
        "fleet": fleet,
        "pooled": pooled,
        "unlimited": _first([one.exam.auroc(one.unlimited) for one in runs if not np.isnan(one.unlimited).any()]),
        "gap": pooled - local,
        "closed": (fleet - local) / (pooled - local),
        "intervals": intervals(runs),
        "local own": float(np.mean([mean_auroc(one.exam, one.local[-1], own=True) for one in runs])),
        "fleet own": float(np.mean([mean_auroc(one.exam, one.fleet[-1], own=True) for one in runs])),
        "worst own drop": float(drops.each[worst]),
        "worst own drop interval": (float(drops.low[worst]), float(drops.high[worst])),
        "mean own drop interval": drops.mean_interval,
        "own drops": drops.each.tolist(),
        "boxes that lose more than 0.01": int(np.sum(drops.each > OWN_DROP)),
        "surely": int(np.sum(drops.low > OWN_DROP)),
        "other seed": float(np.max(np.abs(changes))),
        "false alarms": float(np.nanmean([one.alarms[-1] for one in runs])),
        "update bytes": float(np.mean([one.update_bytes for one in runs])),
        "refused": int(np.sum([one.refused for one in runs])),
        "seeds": len(runs),
        "rounds": {
            int(number): {
                "local": float(np.mean([mean_auroc(one.exam, one.local[index]) for one in runs])),
                "fleet": float(np.mean([mean_auroc(one.exam, one.fleet[index]) for one in runs])),
            }
            for index, number in enumerate(runs[0].rounds)
        },
        "per seed": [
            {
                "local": mean_auroc(one.exam, one.local[-1]),
                "fleet": mean_auroc(one.exam, one.fleet[-1]),
                "pooled": one.exam.auroc(one.pooled),
            }
            for one in runs
        ],
    }


def _first(values: Sequence[float]) -> float:
    return values[0] if values else float("nan")


def curve(split: FleetSplit, embedder: Embedder, *, seed: int) -> list[Point]:
    """Share memories of 1,024 rows in updates of several sizes, once all frames were seen; beside other ways."""
    data = split.boxes(seed)
    settings = FleetSettings(
        rounds=1,
        box=BoxSettings(local_rows=1024, update_rows=1024, first_share=1.0),
        aggregate=AggregateSettings(rows=FLEET),
    )
    with single_threaded_blas(1):
        fleet = Simulation(data, settings, embedder.judge, embedding_id=embedder.embedding_id, seed=seed)
        judgement = fleet.judgement()
        points = bytes_curve(fleet.boxes, judgement, settings.aggregate, seed=seed)
        return [*points, coreset_point(data, judgement, share=0.01, seed=seed), *computed_points(
            data, embedder.parameters)]  # fmt: skip


def print_splits(found: dict[str, dict[str, object]]) -> None:
    """Print what every fleet gave, whatever it gave."""
    print("| fleet | clients | own memory | with fleet memory | pooled, same rows | pooled, 4,096 rows | gap (95 %) "
          "| closed (95 %) | own product: own | with fleet | worst box's drop (95 %) | other seed | false alarms |"
          )  # fmt: skip
    print("|" + "---|" * 13)
    for name, one in found.items():
        low, high = one["intervals"]["gap"]
        shut = one["intervals"]["closed"]
        drop = one["worst own drop interval"]
        print(
            f"| {name} | {one['clients']} | {one['local']:.4f} | {one['fleet']:.4f} | {one['pooled']:.4f} "
            f"| {one['unlimited']:.4f} | {one['gap']:+.4f} ({low:+.3f} to {high:+.3f}) | {one['closed']:.2f} "
            f"({shut[0]:.2f} to {shut[1]:.2f}) | {one['local own']:.4f} | {one['fleet own']:.4f} "
            f"| {one['worst own drop']:+.4f} ({drop[0]:+.3f} to {drop[1]:+.3f}) | {one['other seed']:.4f} "
            f"| {one['false alarms']:.3f} |"
        )


def print_rounds(found: dict[str, dict[str, object]]) -> None:
    """Print I-AUROC by round."""
    numbers = next(iter(found.values()))["rounds"].keys()
    print("\n| fleet, all images | " + " | ".join(f"round {number}" for number in numbers) + " |")
    print("|" + "---|" * (len(numbers) + 1))
    for name, one in found.items():
        cells = " | ".join(f"{value['fleet']:.4f}" for value in one["rounds"].values())
        print(f"| {name} | {cells} |")


def print_verdicts(found: dict[str, dict[str, object]]) -> None:
    """Print which goals were met, fleet by fleet."""
    print("\n| fleet | gap >= 0.03 | closed >= 0.8 | no box loses > 0.01 | mean drop (95 %) | other seed < 0.01 |")
    print("|" + "---|" * 6)
    for name, one in found.items():
        losers, surely = one["boxes that lose more than 0.01"], one["surely"]
        low, high = one["mean own drop interval"]
        gap = one["gap"] >= GAP
        cells = [
            "yes" if gap else "no",
            ("met" if one["closed"] >= CLOSED else "missed") if gap else "-",
            "met" if not losers else f"missed by {losers} of {one['clients']}, {surely} beyond chance",
            f"{one['local own'] - one['fleet own']:+.4f} ({low:+.3f} to {high:+.3f})",
            "met" if one["other seed"] < SEED_CHANGE else "missed",
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def print_curves(curves: dict[str, list[list[Point]]]) -> None:
    """Print I-AUROC against bytes, means over seeds."""
    for name, runs in curves.items():
        print(f"\n| {name}: sent | rows | kB per update | mixed I-AUROC | own product | worst drop |\n{'|---' * 6}|")
        for points in zip(*runs, strict=True):
            size, mixed, own, drop = (np.mean([getattr(one, what) for one in points])
                                      for what in ("bytes", "mixed", "own", "worst_own"))  # fmt: skip
            print(f"| {points[0].name} | {points[0].rows or '-'} | {size / 1000:.1f} | "
                  + " | ".join("-" if np.isnan(v) else f"{v:.4f}" for v in (mixed, own, drop)) + " |")  # fmt: skip


def draw_bytes(curves: dict[str, list[list[Point]]], found: dict[str, dict[str, object]], path: Path) -> None:
    """Draw I-AUROC against the bytes of an update, one panel per fleet."""
    figure = Figure(figsize=(5.6 * len(curves), 4.2), dpi=110, layout="constrained")
    for axes, (name, runs) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for points in zip(*runs, strict=True):
            mixed = [one.mixed for one in points]
            lines.setdefault(points[0].name, []).append(
                (float(np.mean([one.bytes for one in points])), float(np.mean(mixed)), float(np.ptp(mixed) / 2))
            )
        for label, places in lines.items():
            size, value, spread = (np.array(part) for part in zip(*places, strict=True))
            if np.isnan(value).any():
                axes.axvline(size[0], color="#8a9097", linestyle=":", linewidth=1)
                axes.annotate(label, (size[0], 0.03), xycoords=("data", "axes fraction"), rotation=90, ha="right",
                              fontsize=7, color="#8a9097")  # fmt: skip
            else:
                axes.errorbar(size, value, yerr=spread, marker="o", capsize=2, label=label, linewidth=1)
        if name in found:
            axes.axhline(found[name]["local"], color="#d55e00", linewidth=1, label="own memory alone")
            axes.axhline(
                found[name]["pooled"], color="#222222", linewidth=1, linestyle="--", label="frames in one place"
            )
        axes.set(xscale="log", xlabel="bytes of one box's update", ylabel="I-AUROC, all boxes' images", title=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    save(figure, path)


def draw_rounds(found: dict[str, dict[str, object]], path: Path) -> None:
    """Draw I-AUROC against rounds, one panel per fleet."""
    columns = min(4, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(3.8 * columns, 3.2 * lines), dpi=110, layout="constrained")
    panels = np.atleast_1d(figure.subplots(lines, columns)).ravel()
    for axes, (name, one) in zip(panels, found.items(), strict=False):
        numbers = list(one["rounds"])
        for what, colour in (("local", "#d55e00"), ("fleet", "#0072b2")):
            label = {"local": "own memory alone", "fleet": "with fleet memory"}[what]
            axes.plot(numbers, [value[what] for value in one["rounds"].values()], "o-", color=colour, label=label)
        axes.axhline(one["pooled"], color="#222222", linewidth=1, linestyle="--", label="frames in one place")
        axes.set(xlabel="round", ylabel="I-AUROC, all boxes' images", title=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    save(figure, path)


def generated(embedder: Embedder, boxes: int) -> FleetSplit:
    """Return the generated fleet; its images are drawn once for each seed."""

    def draw(seed: int) -> list[BoxData]:
        return generated_boxes(make_sites(boxes, seed=seed), embedder, ImageCounts(taught=1), progress=quiet)

    return FleetSplit("generated", tuple(f"box {number}" for number in range(boxes)), draw)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders in MVTec layout, with meta.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="fleets whose name begins with one of these")
    parser.add_argument("--curves", nargs="*", default=[], help="fleets whose curve of bytes is drawn")
    parser.add_argument("--keep", type=Path, help="folder of embeddings and results that are not made twice")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pictures", type=Path, help="folder for fleet_rounds.png and fleet_bytes.png")
    options = parser.parse_args()
    heading("fleet")
    embedder = generic_embedder()
    print(f"embedding {embedder.embedding_id}, {embedder.judge}\n", flush=True)
    splits = [one for one in all_splits(options, embedder) if _asked(one, options.only)]
    kept = Runs(options.keep)
    found, curves = {}, {}
    settings = settings_of(options.rounds)
    for split in splits:
        runs = [
            run(split, embedder, seed=seed, settings=settings, kept=kept, test_note=f"{MOST_TEST} {split.clients}")
            for seed in options.seeds
        ]
        found[split.name] = summarise(split, runs)
        if split.name in options.curves:
            curves[split.name] = [curve(split, embedder, seed=seed) for seed in options.seeds]
    print_splits(found)
    print_rounds(found)
    print_verdicts(found)
    print_curves(curves)
    if options.json:
        content = {"fleets": found, "curves": {k: [[vars_of(p) for p in r] for r in v] for k, v in curves.items()}}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        draw_rounds(found, options.pictures / "fleet_rounds.png")
        if curves:
            draw_bytes(curves, found, options.pictures / "fleet_bytes.png")


def vars_of(point: Point) -> dict[str, object]:
    """Return a point's fields."""
    return {name: getattr(point, name) for name in point.__slots__}


def all_splits(options: argparse.Namespace, embedder: Embedder) -> list[FleetSplit]:
    """Return every fleet that the folders make, and the generated one."""
    folders = []
    for path in options.data:
        if path.is_dir():
            folders.append(open_folder(path, embedder, options.keep))
        else:
            print(f"SKIPPED: {path} is no folder", flush=True)
    if not folders:
        print("SKIPPED: no real images (--data); the generated fleet only\n", flush=True)
    splits = [one for folder in folders if (one := by_condition(folder, MOST_TEST)) is not None]
    for split in splits:
        print(f"{split.name}: clients {', '.join(split.clients)}"
              + (f"; too small: {', '.join(split.dropped)}" if split.dropped else ""))  # fmt: skip
    if len(folders) > 1:
        splits.append(across(folders, 80, MOST_TEST))
        print(f"{splits[-1].name}: {', '.join(splits[-1].clients)}")
    print(flush=True)
    return [*splits, generated(embedder, 12)]


def _asked(split: FleetSplit, only: Sequence[str] | None) -> bool:
    return only is None or any(split.name.startswith(name) for name in only)


if __name__ == "__main__":
    main()
