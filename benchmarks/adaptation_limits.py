"""What does following the light hide? Defects that look like another light, or that fill more and more of the image.

New defects at a frozen threshold, uncorrected, corrected by each image's own moments and by running ones; then lines
that turn bad slowly or at once, with parts of the guard off. Run ``python -m benchmarks.adaptation_limits``: about 6
minutes on 2 idle cores, on generated webs and photographs that ship with scikit-image.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks._limits import DEFECTS, GUARDED, GUARDS, Line, covering, trimming
from benchmarks._setting import Goal, heading, print_goals
from benchmarks._shift_heads import Counts, Fitting, detectors, open_source, trunk_of
from benchmarks._shift_scores import Eye, reference
from edge.judgement.threshold import fit_threshold
from trainer.data.conveyor import write_default

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from benchmarks._shift_heads import Detector

KINDS = ("cloth", "gravel")
HEADS = ("memory", "adapted_moe")
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
NONE, OWN, UNTRIMMED, RUNNING = "not corrected", "per image", "per image, not trimmed", "running"
WAYS = (NONE, OWN, UNTRIMMED, RUNNING)
NO_GUARD = "no guard"
ALPHA = 0.05
SLOW, SUDDEN, RESET = "slow", "sudden", "reset"
LINES = {
    SLOW: "The defect grows slowly",
    SUDDEN: "The defect comes at once and stays",
    RESET: "The defect comes at once, and somebody resets the camera as if the parts were good",
}
SMALL, SMALL_COST, LASTING_KEPT = 0.25, 0.02, 0.95
"""What running correction may cost of the detection of new defects up to a quarter of the image; and the share of the
alarms of a sudden lasting defect that must stay."""
_CALM, _LAST, _WINDOW, _SUDDEN = 40, 40, 20, 100
_STYLES = {
    NONE: {"color": "#000000", "linestyle": ":", "marker": "s"},
    OWN: {"color": "#e69f00", "linestyle": "--", "marker": "^"},
    UNTRIMMED: {"color": "#cc79a7", "linestyle": "-.", "marker": "v"},
    RUNNING: {"color": "#0072b2", "linestyle": "-", "marker": "o"},
    GUARDED: {"color": "#0072b2", "linestyle": "-"},
    NO_GUARD: {"color": "#d55e00", "linestyle": "--"},
}


@dataclass(frozen=True)
class Still:
    """The share of images that alarm when a defect is new.

    Attributes:
        kind: of surface.
        head: name of the method.
        way: of correction.
        defect: what it is; empty for good images.
        share: of the image that it covers.
        rate: of images that alarm.
    """

    kind: str
    head: str
    way: str
    defect: str
    share: float
    rate: float


@dataclass(frozen=True)
class Turn:
    """A line that turned bad.

    Attributes:
        kind: of surface.
        head: name of the method.
        guard: name of the guard; that of no correction where there was none.
        defect: what fills the image.
        how: it came, a key of ``LINES``.
        noticed: its strength when half of 20 frames alarm; None for never.
        end: share of the last 40 frames that alarm.
        shift: of the follower at the end, in units of what is usual.
        phase: of the follower at the end.
        rates: share of alarms in each window of 20 frames.
    """

    kind: str
    head: str
    guard: str
    defect: str
    how: str
    noticed: float | None
    end: float
    shift: float
    phase: str
    rates: tuple[float, ...]


def stills(line: Line, heads: Sequence[Detector], limits: Sequence[float], kind: str, images: int) -> list[Still]:
    """Judge new defects of every kind and size, after a line of good parts."""
    ways = {
        NONE: (None, True),
        OWN: (line.own(), True),
        UNTRIMMED: (line.own(), False),
        RUNNING: (line.settled(seed=1).look().correction, True),
    }
    parts = line.parts[:images]
    shown = {("", 0.0): list(parts)}
    for defect in DEFECTS:
        for share in SHARES:
            shown[defect, share] = [
                covering(part, defect, share, np.random.default_rng((index, round(100 * share))))
                for index, part in enumerate(parts)
            ]
    found = []
    for way, (correction, trimmed) in ways.items():
        for (defect, share), pictures in shown.items():
            with trimming(on=trimmed):
                rates = (line.scores(pictures, heads, correction) >= np.array(limits)).mean(0)
            found += [
                Still(kind, head.name, way, defect, share, float(rate)) for head, rate in zip(heads, rates, strict=True)
            ]
    return found


@dataclass(frozen=True)
class Slow:
    """How slowly a defect grows.

    Attributes:
        frames: over which it does.
        faster: how many times sooner than by default moments follow meanwhile.
    """

    frames: int
    faster: float


def turns(
    line: Line, judge: tuple[Detector, float], kind: str, guards: Sequence[str], slowness: Slow, *, lines: Sequence[str]
) -> list[Turn]:
    """Let lines turn bad under some guards."""
    head, limit = judge
    slowly = np.concatenate([np.zeros(_CALM), np.linspace(0, 1, slowness.frames), np.ones(_LAST)])
    at_once = np.concatenate([np.zeros(_CALM), np.ones(_SUDDEN)])
    found = []
    shown = {SLOW: (NONE, *guards), SUDDEN: (NONE, GUARDED, NO_GUARD), RESET: (NONE, GUARDED)}
    for defect, change in DEFECTS.items():
        for how in lines:
            strengths = slowly if how == SLOW else at_once
            changes = [partial(change, strength=float(strength)) for strength in strengths]
            for guard in shown[how]:
                course = line.run(
                    head,
                    limit,
                    GUARDS.get(guard),
                    changes,
                    seed=2,
                    faster=slowness.faster if how == SLOW else 1.0,
                    reset_at=_CALM if how == RESET else None,
                )
                noticed = course.noticed(strengths, _WINDOW)
                found.append(
                    Turn(
                        kind=kind,
                        head=head.name,
                        guard=guard,
                        defect=defect,
                        how=how,
                        noticed=None if np.isnan(noticed) else noticed,
                        end=float(course.alarms[-_LAST:].mean()),
                        shift=float(course.shifts[-1]),
                        phase=course.phase,
                        rates=tuple(course.rates(_WINDOW).round(3).tolist()),
                    )
                )
    return found


def measure(kind: str, options: argparse.Namespace, folder: Path) -> tuple[list[Still], list[Turn]]:
    """Fit the detectors of one surface and measure all."""
    started = time.monotonic()

    def report(done: str) -> None:
        print(f"  {time.monotonic() - started:5.0f} s  {kind}: {done}", file=sys.stderr, flush=True)

    parts = options.images + options.line
    data = write_default(folder / "data" / kind, seed=0, kind=kind, train=options.train, test_good=parts,
                         test_defective=1)  # fmt: skip
    counts = Counts(options.train, 1, parts, 1)
    source = open_source(data, counts, size=options.size, seed=0)
    heads = detectors(source, HEADS, Fitting(folder, "quick", 0, options.size, options.train))
    report("fitted")
    eye = Eye(trunk_of(options.size), tuple(dict.fromkeys(tap for head in heads for tap in head.taps)))
    line = Line(eye, reference(eye, source.fit, source.holdout), source.good)
    held = line.scores(list(source.holdout), heads, None)
    limits = [float(fit_threshold(row, source.holdout_groups, ALPHA).value) for row in held.T]
    new = stills(line, heads, limits, kind, options.images)
    report("new defects")
    turned = []
    for judge in zip(heads, limits, strict=True):
        # What each part of the guard does is seen on one method and surface.
        whole = (kind, judge[0].name) == (options.kinds[0], HEADS[0])
        guards = tuple(GUARDS) if whole else (GUARDED, NO_GUARD)
        turned += turns(line, judge, kind, guards, Slow(options.frames, options.faster), lines=options.lines)
        report(f"lines of {judge[0].name}")
    return new, turned


def print_stills(found: Sequence[Still]) -> None:
    """Print the detection of new defects: means over surfaces, each method beside the others."""
    heads = list(dict.fromkeys(one.head for one in found))
    print("Share of images that alarm, mean over surfaces; each cell: " + " / ".join(heads) + ".\n")
    print("| correction | good images | " + " | ".join(f"{name} {share:.0%}" for name in DEFECTS for share in SHARES)
          + " |\n" + "|---" * (2 + len(DEFECTS) * len(SHARES)) + "|")  # fmt: skip
    for way in WAYS:
        cells = []
        for defect, share in [("", 0.0), *((name, share) for name in DEFECTS for share in SHARES)]:
            cells.append(" / ".join(f"{rate(found, way, defect, share, head):.2f}" for head in heads))
        print(f"| {way} | {' | '.join(cells)} |")


def rate(found: Sequence[Still], way: str, defect: str, share: float, head: str = "") -> float:
    """Return the mean over surfaces, and over methods where none is named."""
    rates = [
        one.rate for one in found if (one.way, one.defect, one.share) == (way, defect, share) and head in {"", one.head}
    ]
    return float(np.mean(rates))


def print_turns(found: Sequence[Turn]) -> None:
    """Print what becomes of lines that turn bad."""
    for how, title in LINES.items():
        chosen = [one for one in found if one.how == how]
        if not chosen:
            continue
        print(
            f"\n{title}. Each cell: strength at which half of {_WINDOW} frames alarm, share of the last "
            f"{_LAST} that do, size of the shift that was followed; one surface after the other.\n"
        )
        print(f"| method | guard | {' | '.join(DEFECTS)} |\n" + "|---" * (2 + len(DEFECTS)) + "|")
        for head, guard in dict.fromkeys((one.head, one.guard) for one in chosen):
            cells = []
            for defect in DEFECTS:
                own = [one for one in chosen if (one.head, one.guard, one.defect) == (head, guard, defect)]
                cells.append("; ".join(
                    f"{'never' if one.noticed is None else f'{one.noticed:.2f}'}, {one.end:.2f}, {one.shift:.1f}"
                    for one in own
                ))  # fmt: skip
            print(f"| {head} | {guard} | {' | '.join(cells)} |")
    print()


def goals(new: Sequence[Still], turned: Sequence[Turn]) -> list[Goal]:
    """Return the figures that tell what is hidden; two have limits."""
    small = [(name, share) for name in DEFECTS for share in SHARES if share <= SMALL]
    filling = [(name, 1.0) for name in DEFECTS]
    said = []
    for title, cases, way, limit in (
        ("small defects lost, running", small, RUNNING, SMALL_COST),
        ("small defects lost, per image", small, OWN, float("nan")),
        ("defects that fill the image lost, running", filling, RUNNING, float("nan")),
        ("defects that fill the image lost, per image", filling, OWN, float("nan")),
    ):
        lost = {case: rate(new, NONE, *case) - rate(new, way, *case) for case in cases}
        worst = max(lost, key=lambda case: lost[case])
        spread = f"worst {worst[0]} {worst[1]:.0%}: {lost[worst]:+.2f}"
        said.append(Goal(title, float(np.mean(list(lost.values()))), limit, False, spread))
    for guard, limit in ((GUARDED, LASTING_KEPT), (NO_GUARD, float("nan"))):
        for how in LINES:
            kept = _kept(turned, guard, how)
            if kept is None:
                continue
            spread = f"{len(kept)} lines that alarm uncorrected; least {min(kept, default=float('nan')):.2f}"
            bounded = limit if how == SUDDEN else float("nan")
            said.append(
                Goal(f"alarms left, {how} defect, {guard}", float(np.mean(kept or [np.nan])), bounded, True, spread)
            )
    return said


def _kept(turned: Sequence[Turn], guard: str, how: str) -> list[float] | None:
    """Return, of the lines that alarm at the end without correction, the share of those alarms that are left.

    None where there are no such lines under that guard.
    """
    own = [one for one in turned if one.guard == guard and one.how == how]
    if not own:
        return None
    known = {(one.kind, one.head, one.defect): one.end for one in turned if one.guard == NONE and one.how == how}
    return [
        min(1.0, one.end / known[one.kind, one.head, one.defect])
        for one in own
        if known[one.kind, one.head, one.defect] >= 0.5
    ]


def draw(new: Sequence[Still], turned: Sequence[Turn], path: Path) -> None:
    """Write a PNG: above, detection against the share of the image that is defective; below, lines that turn bad."""
    figure = Figure(figsize=(13, 6.6), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots(2, len(DEFECTS), squeeze=False)
    for panel, defect in zip(axes[0], DEFECTS, strict=True):
        for way in WAYS:
            rates = [rate(new, way, defect, share) for share in SHARES]
            panel.plot([100 * share for share in SHARES], rates, label=way, clip_on=False, **_STYLES[way])
        panel.set_title(f"{defect}: new", fontsize=11)
        panel.set_xlabel("share of the image [%]")
        _finish(panel)
    for panel, defect in zip(axes[1], DEFECTS, strict=True):
        for guard in (NONE, GUARDED, NO_GUARD):
            rows = [one.rates for one in turned if (one.guard, one.defect, one.how) == (guard, defect, SLOW)]
            style = {key: value for key, value in _STYLES[guard].items() if key != "marker"}
            panel.plot(np.arange(len(rows[0])) + _WINDOW, np.mean(rows, axis=0), label=guard, clip_on=False, **style)
        panel.axvspan(_CALM, len(rows[0]) + _WINDOW - _LAST, color="#000000", alpha=0.06, linewidth=0)
        panel.set_title(f"{defect}: growing", fontsize=11)
        panel.set_xlabel("frame; it grows in the grey ones")
        _finish(panel)
    for row in axes:
        row[0].set_ylabel("images that alarm")
    # Where the lines are not.
    axes[0][-1].legend(fontsize=8, loc="lower left")
    axes[1][1].legend(fontsize=8, loc="upper left")
    figure.suptitle("What following the light hides: mean over methods and surfaces, frozen thresholds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _finish(panel: Axes) -> None:
    panel.set_ylim(0, 1)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="surfaces")
    parser.add_argument("--size", type=int, default=128, help="of the network's input in pixels")
    parser.add_argument("--train", type=int, default=80, help="training images of a surface")
    parser.add_argument("--images", type=int, default=20, help="images of each new defect")
    parser.add_argument("--line", type=int, default=20, help="further good parts that come on the line")
    parser.add_argument("--frames", type=int, default=240, help="over which a slow defect grows")
    parser.add_argument("--faster", type=float, default=4.0, help="how many times sooner moments follow meanwhile")
    parser.add_argument("--lines", nargs="+", choices=list(LINES), default=list(LINES), help="how lines turn bad")
    parser.add_argument("--json", type=Path, help="all figures")
    parser.add_argument("--read", type=Path, help="figures of an earlier run to print and draw instead")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Goal]:
    """Measure, print and draw; return the figures, some with limits."""
    options = _options(arguments)
    heading("adaptation limits")
    torch.set_num_threads(1)
    new: list[Still] = []
    turned: list[Turn] = []
    if options.read:
        plain = json.loads(options.read.read_text(encoding="utf-8"))
        new, turned = [Still(**one) for one in plain["new"]], [Turn(**one) for one in plain["turned"]]
    else:
        with TemporaryDirectory() as folder:
            for kind in options.kinds:
                more = measure(kind, options, Path(folder))
                new, turned = new + more[0], turned + more[1]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        plain = {"new": [asdict(one) for one in new], "turned": [asdict(one) for one in turned]}
        options.json.write_text(json.dumps(plain), encoding="utf-8")
    print_stills(new)
    print_turns(turned)
    found = goals(new, turned)
    print_goals(found)
    if options.picture and any(one.how == SLOW for one in turned):
        draw(new, turned, options.picture)
    return found


if __name__ == "__main__":
    main()
