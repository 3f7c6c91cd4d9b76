"""How many good parts are called defective when light, optics, sensor, pose or transport differ from the lab?

Each kind of change in five strengths, every method, uncorrected and with the box's correction by each image's own
moments and by running ones, at thresholds frozen on clean images. Run ``python -m benchmarks.shift --data FOLDER
[FOLDER ...]`` (folders in MVTec layout; generated webs without); ``--estimate`` says how long that will take.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks._images import generated_folders
from benchmarks._setting import Goal, heading, print_goals
from benchmarks._shift_figures import AUROC, FALSE_POSITIVES, LEAST_RISE, MISSES, Figures
from benchmarks._shift_heads import METHODS, Counts, Fitting, detectors, open_source, trunk_of
from benchmarks._shift_picture import draw
from benchmarks._shift_scores import CORRECTIONS, NONE, OWN, RUNNING, Scores, judge
from benchmarks._shifts import CLEAN, REQUIRED, SERIES, conditions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks._shifts import Condition, Series

RECOVERED, CLEAN_COST = 0.6, 0.005
ALPHA = 0.05
"""False-alarm probability of the frozen thresholds: what hold-outs of 30 images support."""
MATCHED = 0.05
"""The same where a threshold is set by the judged images themselves: calibrated ones differ in how often they alarm,
and one that no image comes near shows no shift."""
_NAMES = (*METHODS, "adapted_moe")
_TRUNK_MS, _HEADS_MS = 7.5, 14.0  # per image; measured on one core of the machine in RESULTS.md


def measure(folder: Path, options: argparse.Namespace, series: Sequence[Series], keep: Path) -> Scores:
    """Fit or read the detectors of a folder and judge its test images."""
    counts = Counts(options.train, options.moments, options.good, options.bad)
    source = open_source(folder, counts, size=options.size, seed=options.seed)
    fitting = Fitting(keep, options.preset, options.seed, options.size, options.train)
    fitted = detectors(source, options.detectors, fitting)
    started = time.monotonic()

    def report(done: str) -> None:
        print(f"  {time.monotonic() - started:5.0f} s  {done}", file=sys.stderr, flush=True)

    return judge(
        source,
        fitted,
        _chosen(options, series),
        trunk_of(options.size),
        alpha=options.alpha,
        share=options.share,
        report=report,
    )


def estimate(folders: int, options: argparse.Namespace, series: Sequence[Series]) -> float:
    """Return the minutes of one core that judging takes; fitting not counted."""
    chosen = _chosen(options, series)
    whole = sum(name in {CLEAN, *REQUIRED} for name in chosen)
    sets = whole + options.share * (len(chosen) - whole)
    judged = sets * len(CORRECTIONS) * (options.good + options.bad)
    frames = judged * (_TRUNK_MS + _HEADS_MS) + (len(chosen) * options.moments + options.train) * _TRUNK_MS
    return folders * frames / 60_000


def _chosen(options: argparse.Namespace, series: Sequence[Series]) -> dict[str, Condition]:
    """Return the conditions that are asked for."""
    found = conditions(series)
    if options.required:
        return {name: conditions()[name] for name in (CLEAN, *REQUIRED)}
    if options.rest:
        return {name: one for name, one in found.items() if name not in {CLEAN, *REQUIRED}}
    return found


def print_strengths(figures: Figures, names: Sequence[str]) -> None:
    """Print every condition: means over methods and folders."""
    print(f"Means over {', '.join(names)} and {len(figures.folders)} folders; 95 % intervals by a paired bootstrap.\n")
    said = [f"{what}: {how}" for what in (FALSE_POSITIVES, MISSES) for how in CORRECTIONS]
    print(f"| shift | {' | '.join(said)} | I-AUROC: {' | '.join(CORRECTIONS)} | shift size | frames followed |")
    print("|---" * (len(said) + 6) + "|")
    for condition in done_conditions(figures):
        cells = [str(figures.rate(FALSE_POSITIVES, names, how, [condition])) for how in CORRECTIONS]
        cells += [f"{figures.rate(MISSES, names, how, [condition]).value:.2f}" for how in CORRECTIONS]
        cells += [f"{figures.rate(AUROC, names, how, [condition]).value:.3f}" for how in CORRECTIONS]
        followed = [one.followed[condition] for one in figures.folders]
        cells += [f"{np.mean([one[key] for one in followed]):.2f}" for key in ("shift", "accepted")]
        print(f"| {condition} | {' | '.join(cells)} |")


def print_recoveries(figures: Figures, series: Sequence[Series]) -> None:
    """Print what each method recovers of each kind of change, running: middle strengths, and the required ones."""
    print(f"\nShare of the rise in false positives that is recovered; - where the rise is below {LEAST_RISE:g}.\n")
    shown = [CLEAN, *_required(figures), *_middle(series)]
    print(f"| method | correction | I-AUROC clean | {' | '.join(shown[1:])} |\n{'|---' * (len(shown) + 2)}|")
    for name in figures.detectors:
        for how in (OWN, RUNNING):
            cells = [f"{figures.rate(AUROC, [name], how, [CLEAN]).value:.3f}"]
            cells += [str(figures.recovery([name], how, [condition])) for condition in shown[1:]]
            print(f"| {name} | {how} | {' | '.join(cells)} |")
    print("\nFalse positives of each method, uncorrected -> running.\n")
    print(f"| method | {' | '.join(shown)} |\n{'|---' * (len(shown) + 1)}|")
    for name in figures.detectors:
        pairs = ([figures.rate(FALSE_POSITIVES, [name], how, [one]).value for how in (NONE, RUNNING)] for one in shown)
        print(f"| {name} | {' | '.join(f'{before:.2f} -> {after:.2f}' for before, after in pairs)} |")


def print_folders(figures: Figures, names: Sequence[str]) -> None:
    """Print each folder alone under the required shifts."""
    print("\nFalse positives of each folder, mean over methods, uncorrected -> running (recovered).\n")
    shown = _required(figures)
    print(f"| folder | clean | {' | '.join(shown)} |\n{'|---' * (len(shown) + 2)}|")
    for one in figures.folders:
        alone = figures.alone(one)
        cells = []
        for condition in (CLEAN, *shown):
            before, after = (alone.rate(FALSE_POSITIVES, names, how, [condition]).value for how in (NONE, RUNNING))
            share = alone.recovery(names, RUNNING, [condition]).value
            cells.append(f"{before:.2f} -> {after:.2f}" + ("" if np.isnan(share) else f" ({share:.2f})"))
        print(f"| {one.folder} | {' | '.join(cells)} |")


def goals(figures: Figures, names: Sequence[str]) -> list[Goal]:
    """Return what running correction recovers under the required shifts and costs on clean images, with its goals."""
    said = []
    for condition in _required(figures):
        found = figures.recovery(names, RUNNING, [condition])
        low, high = found.interval
        each = {name: figures.recovery([name], RUNNING, [condition]).value for name in names}
        rates = [figures.rate(FALSE_POSITIVES, names, how, [condition]).value for how in (NONE, RUNNING)]
        spread = f"{low:.2f} to {high:.2f}; false positives {rates[0]:.2f} -> {rates[1]:.2f}"
        said.append(Goal(f"recovered, {condition}, mean of methods", found.value, RECOVERED, True, spread))
        known = {name: value for name, value in each.items() if not np.isnan(value)}
        if known:
            worst = min(known, key=lambda name: known[name])
            said.append(Goal(f"recovered, {condition}, worst method", known[worst], RECOVERED, True, worst))
    for how in (RUNNING, OWN):
        found = figures.cost(names, how)
        low, high = found.interval
        # What images' own moments cost is shown for comparison: a box uses them only while it settles.
        limit = CLEAN_COST if how == RUNNING else float("nan")
        said.append(Goal(f"clean I-AUROC lost, {how}", found.value, limit, False, f"{low:+.4f} to {high:+.4f}"))
        each = {name: figures.cost([name], how).value for name in names}
        worst = max(each, key=lambda name: each[name])
        said.append(Goal(f"clean I-AUROC lost, {how}, worst method", each[worst], limit, False, worst))
    return said


def done_conditions(figures: Figures) -> list[str]:
    """Return what was judged, in the order of the series."""
    return [name for name in conditions() if name in figures.folders[0].rows]


def _required(figures: Figures) -> list[str]:
    return [name for name in REQUIRED if name in figures.folders[0].rows]


def _middle(series: Sequence[Series]) -> list[str]:
    names = [one.condition(one.strengths[len(one.strengths) // 2]) for one in series]
    return [name for name in names if name not in REQUIRED]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", help="folders in MVTec layout; generated webs if absent")
    parser.add_argument("--read", type=Path, nargs="+", help="JSON of earlier runs to print and draw instead")
    parser.add_argument("--detectors", nargs="+", choices=_NAMES, default=list(_NAMES))
    parser.add_argument("--series", nargs="+", choices=[one.name for one in SERIES], help="kinds of change; all")
    parser.add_argument("--preset", default="quick")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--alpha", type=float, default=ALPHA, help="false-alarm probability of the thresholds")
    counts = Counts()
    parser.add_argument("--train", type=int, default=counts.train, help="most training images of a folder")
    parser.add_argument("--moments", type=int, default=counts.moments, help="most good test images for moments")
    parser.add_argument("--good", type=int, default=counts.good, help="most good test images that are judged")
    parser.add_argument("--bad", type=int, default=counts.bad, help="most defective test images")
    parser.add_argument("--share", type=float, default=0.5, help="of these where no goal depends on them")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--required", action="store_true", help="only clean images and the shifts that goals are for")
    part.add_argument("--rest", action="store_true", help="only the others; --read puts both together")
    parser.add_argument("--keep", type=Path, help="folder of fitted detectors that are not fitted twice")
    parser.add_argument("--json", type=Path, help="all scores, written after each folder")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    parser.add_argument("--estimate", action="store_true", help="only say how long judging takes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Goal]:
    """Measure, print and draw; return the figures that have goals."""
    options = _options(arguments)
    heading("shift")
    series = [one for one in SERIES if not options.series or one.name in options.series]
    done: list[Scores] = []
    if options.read:
        done = read(options.read)
    else:
        torch.set_num_threads(1)
        many = len(options.data) if options.data else 3
        print(f"judging takes about {estimate(many, options, series):.0f} minutes of one core, fitting 2 per folder\n")
        if options.estimate:
            return []
        webs = generated_folders(train=options.train, test=2 * max(options.moments + options.good, options.bad))
        kept = nullcontext(str(options.keep)) if options.keep else TemporaryDirectory()
        with kept as keep, nullcontext(options.data) if options.data else webs as folders:
            for folder in folders:
                done.append(measure(folder, options, series, Path(keep)))
                if options.json:
                    options.json.parent.mkdir(parents=True, exist_ok=True)
                    options.json.write_text(json.dumps([one.plain() for one in done]), encoding="utf-8")
    return show(done, options.picture)


def read(paths: Sequence[Path]) -> list[Scores]:
    """Read scores; those of one folder in several files, of other shifts or detectors, are put together.

    Raises:
        ValueError: what is put together is not of the same images and thresholds.
    """
    found: dict[str, Scores] = {}
    for path in paths:
        for plain in json.loads(path.read_text(encoding="utf-8")):
            one = Scores.read(plain)
            found[one.folder] = found[one.folder].joined(one) if one.folder in found else one
    first = next(iter(found.values()))
    for one in found.values():
        judged = {tuple(sorted(each)) for by in one.scores.values() for each in by.values()}
        if judged != {tuple(sorted(first.rows))} or one.scores.keys() != first.scores.keys():
            raise ValueError(
                f"{one.folder}: not all detectors and shifts of {first.folder} were judged; read all files"
            )
    return list(found.values())


def show(done: Sequence[Scores], picture: Path | None) -> list[Goal]:
    """Print figures by both kinds of thresholds, draw those of the second, and return those of it that have goals."""
    if CLEAN not in done[0].rows:
        print("no clean images judged; read these scores together with those of --required")
        return []
    series = [one for one in SERIES if all(one.condition(strength) in done[0].rows for strength in one.strengths)]
    # Adapted-MoE as it is shipped adapts by itself; it is shown, and not in the means.
    names = [name for name in done[0].scores if name in METHODS] or list(done[0].scores)
    found: list[Goal] = []
    for what, figures in (
        ("thresholds calibrated on held-out images", Figures(done)),
        (f"thresholds that {MATCHED:.0%} of the clean good images reach", Figures(done, matched=MATCHED)),
    ):
        print(f"\n### {what}\n")
        print_strengths(figures, names)
        print_recoveries(figures, series)
        print_folders(figures, names)
        print()
        found = goals(figures, names)
        print_goals(found)
    if picture and series:
        title = f"Good images called defective, of which {MATCHED:.0%} are when clean; {len(names)} methods, "
        title += f"{len(done)} folders"
        draw(figures, names, picture, title=title, series=series)
    return found


if __name__ == "__main__":
    main()
