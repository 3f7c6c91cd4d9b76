"""What a simulated fleet gave, as tables to read, a picture and JSON. It must not know how any of it was measured."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edge.errors import DataError
from trainer.evaluation.fleet_cost import EXTRAPOLATED, extrapolated, growth

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from trainer.evaluation.fleet_cost import Cost
    from trainer.evaluation.fleet_curves import Point

_BLUE, _GREY, _ORANGE, _GREEN = "#0072b2", "#8a9097", "#d55e00", "#009e73"


@dataclass(frozen=True, slots=True)
class RoundLine:
    """Means over the honest boxes after a round; NaN where it was not judged.

    Attributes:
        number: of the round.
        counted: updates in the fleet memory.
        late: those of them that came a round late.
        cut_off: boxes that neither sent nor fetched.
        refused: updates kept out.
        bytes_up: of all updates.
        bytes_down: of all fetched banks.
        rows: of the fleet memory.
        aggregate_s: seconds to merge.
        local_mixed: I-AUROC on all boxes' images with a box's own memory alone.
        fleet_mixed: the same with the fleet's memory beside it.
        local_own: I-AUROC on a box's own images with its own memory alone.
        fleet_own: the same with both.
        worst_own: largest drop of a box on its own images by the fleet's memory.
        false_alarms: share of good images of the own product at or above the threshold, with both.
    """

    number: int
    counted: int
    late: int
    cut_off: int
    refused: int
    bytes_up: int
    bytes_down: int
    rows: int
    aggregate_s: float
    local_mixed: float
    fleet_mixed: float
    local_own: float
    fleet_own: float
    worst_own: float
    false_alarms: float


@dataclass(frozen=True, slots=True)
class PoisonLine:
    """What one kind of poison did.

    Attributes:
        kind: ``none``, or what the poisoners sent.
        gates: whether updates were examined.
        poisoners: boxes that sent it.
        kept_out: poisoned updates that were kept out.
        honest_out: honest updates that were kept out.
        mixed: I-AUROC of the honest boxes on all honest boxes' images.
    """

    kind: str
    gates: bool
    poisoners: int
    kept_out: int
    honest_out: int
    mixed: float


@dataclass(frozen=True, slots=True)
class FleetReport:
    """One simulation.

    Attributes:
        about: what was simulated: name to value, for people and JSON.
        rounds: one line per round.
        pooled: I-AUROC on all images with all frames in one place, by rows of that bank.
        curve: ways to share at the end of the last round.
        poison: what poisoners did at the end of the last round.
        costs: fleets of growing size.
    """

    about: dict[str, Any]
    rounds: tuple[RoundLine, ...]
    pooled: dict[int, float]
    curve: tuple[Point, ...]
    poison: tuple[PoisonLine, ...]
    costs: tuple[Cost, ...]

    def as_json(self) -> dict[str, Any]:
        """Return everything, undefined figures as null."""
        content = {
            "about": self.about,
            "rounds": [asdict(line) for line in self.rounds],
            "pooled": {str(rows): value for rows, value in self.pooled.items()},
            "curve": [asdict(point) for point in self.curve],
            "poison": [asdict(line) for line in self.poison],
            "costs": [asdict(cost) for cost in self.costs],
            "extrapolated": self.extrapolation(),
        }
        return {key: _without_nan(value) for key, value in content.items()}

    def extrapolation(self) -> dict[str, float]:
        """Return the cost of a round of 10,000 boxes by the line through the two largest fleets measured."""
        return {"boxes": EXTRAPOLATED} | {
            what: extrapolated(self.costs, what)
            for what in ("decode_s", "aggregate_s", "cpu_s", "peak_mb", "bytes_up", "bytes_down")
        }


def tables(report: FleetReport) -> str:
    """Return the report as Markdown tables."""
    parts = [_rounds_table(report), _curve_table(report.curve)]
    if report.poison:
        parts.append(_poison_table(report.poison))
    if report.costs:
        parts.append(_cost_table(report))
    return "\n\n".join(parts)


def _rounds_table(report: FleetReport) -> str:
    lines = [
        (
            "| round | updates (late) | refused | kB up | kB down | mixed I-AUROC: own memory | with fleet memory "
            "| own product: own memory | with fleet memory | worst drop | false alarms |"
        ),
        "|" + "---|" * 11,
    ]
    lines += [
        f"| {one.number} | {one.counted} ({one.late}) | {one.refused} | {one.bytes_up / 1000:.0f} "
        f"| {one.bytes_down / 1000:.0f} | {one.local_mixed:.4f} | {one.fleet_mixed:.4f} | {one.local_own:.4f} "
        f"| {one.fleet_own:.4f} | {one.worst_own:+.4f} | {one.false_alarms:.3f} |"
        for one in report.rounds
        if not math.isnan(one.fleet_mixed)
    ]
    lines += ["", *(f"All frames in one place, {rows} rows: {value:.4f}." for rows, value in report.pooled.items())]
    return "\n".join(lines)


def _curve_table(curve: Sequence[Point]) -> str:
    lines = ["| sent | rows | kB per update | | mixed I-AUROC | own product | worst drop |", "|" + "---|" * 7]
    lines += [
        f"| {one.name} | {one.rows or '-'} | {one.bytes / 1000:.1f} | {'measured' if one.measured else 'computed'} "
        f"| {_figure(one.mixed)} | {_figure(one.own)} | {_figure(one.worst_own)} |"
        for one in curve
    ]
    return "\n".join(lines)


def _poison_table(poison: Sequence[PoisonLine]) -> str:
    lines = ["| poison | gates | poisoners | kept out | honest kept out | mixed I-AUROC of honest boxes |"]
    lines += ["|" + "---|" * 6]
    lines += [
        f"| {one.kind} | {'on' if one.gates else 'off'} | {one.poisoners} | {one.kept_out} | {one.honest_out} "
        f"| {one.mixed:.4f} |"
        for one in poison
    ]
    return "\n".join(lines)


def _cost_table(report: FleetReport) -> str:
    lines = ["| boxes | | read s | merge s | processor s | MB at most | MB up | MB down |", "|" + "---|" * 8]
    lines += [
        f"| {one.boxes} | measured | {one.decode_s:.2f} | {one.aggregate_s:.1f} | {one.cpu_s:.1f} "
        f"| {one.peak_mb:.0f} | {one.bytes_up / 1e6:.1f} | {one.bytes_down / 1e6:.1f} |"
        for one in report.costs
    ]
    far = report.extrapolation()
    if report.costs[-1].boxes < EXTRAPOLATED and not math.isnan(far["cpu_s"]):
        lines.append(
            f"| {EXTRAPOLATED} | extrapolated | {far['decode_s']:.2f} | {far['aggregate_s']:.1f} | {far['cpu_s']:.1f} "
            f"| {far['peak_mb']:.0f} | {far['bytes_up'] / 1e6:.1f} | {far['bytes_down'] / 1e6:.1f} |"
        )
    power = growth(report.costs, "cpu_s")
    if not math.isnan(power):
        lines += ["", f"Processor seconds grow with boxes to the power {power:.2f} at the end; 1 is linear."]
    return "\n".join(lines)


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def draw(report: FleetReport, path: Path) -> None:
    """Write the curves as a PNG: I-AUROC against rounds, against bytes, and cost against boxes.

    Raises:
        DataError: the file cannot be written.
    """
    figure = Figure(figsize=(15, 4.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 3 if report.costs else 2)
    draw_rounds(panels[0], report.rounds, report.pooled)
    draw_bytes(panels[1], report.curve, local=report.rounds[-1].local_mixed, pooled=report.pooled)
    if report.costs:
        _draw_costs(panels[2], report)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        with path.open("wb") as file:
            FigureCanvasAgg(figure).print_png(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


def draw_rounds(axes: Axes, rounds: Sequence[RoundLine], pooled: dict[int, float]) -> None:
    """Draw I-AUROC against rounds."""
    judged = [one for one in rounds if not math.isnan(one.fleet_mixed)]
    numbers = [one.number for one in judged]
    axes.plot(numbers, [one.fleet_mixed for one in judged], "o-", color=_BLUE, label="all images, with fleet memory")
    axes.plot(numbers, [one.local_mixed for one in judged], "s-", color=_ORANGE, label="all images, own memory alone")
    axes.plot(numbers, [one.fleet_own for one in judged], "^--", color=_BLUE, label="own images, with fleet memory")
    axes.plot(numbers, [one.local_own for one in judged], "v--", color=_ORANGE, label="own images, own memory alone")
    _pooled_lines(axes, pooled)
    _finish(axes, "round", "I-AUROC, mean over boxes")


def draw_bytes(axes: Axes, curve: Sequence[Point], *, local: float, pooled: dict[int, float]) -> None:
    """Draw I-AUROC against bytes per update."""
    drawn = {"float16": (_BLUE, "o-"), "uint8": (_GREEN, "s-")}
    for name, (colour, form) in drawn.items():
        points = [one for one in curve if one.name == name]
        axes.plot([one.bytes for one in points], [one.mixed for one in points], form, color=colour, label=name)
    for one in curve:
        if one.name in drawn:
            continue
        if math.isnan(one.mixed):
            axes.axvline(one.bytes, color=_GREY, linewidth=1, linestyle=":")
            axes.annotate(one.name, (one.bytes, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7,
                          ha="right", color=_GREY)  # fmt: skip
        else:
            axes.plot([one.bytes], [one.mixed], "D", color=_ORANGE, label=one.name)
    axes.axhline(local, color=_ORANGE, linewidth=1, label="own memory alone")
    _pooled_lines(axes, pooled)
    axes.set_xscale("log")
    _finish(axes, "bytes of one box's update", "I-AUROC on all images, mean over boxes")


def _draw_costs(axes: Axes, report: FleetReport) -> None:
    boxes = [one.boxes for one in report.costs]
    seconds, memory = [one.cpu_s for one in report.costs], [one.peak_mb for one in report.costs]
    axes.plot(boxes, seconds, "o-", color=_BLUE, label="processor seconds to merge")
    axes.plot(boxes, memory, "s-", color=_GREEN, label="MB of memory at most")
    axes.plot(boxes, [one.bytes_up / 1e6 for one in report.costs], "^-", color=_ORANGE, label="MB of updates")
    far = report.extrapolation()
    if boxes[-1] < EXTRAPOLATED and not math.isnan(far["cpu_s"]):
        for what, last, colour in (("cpu_s", seconds[-1], _BLUE), ("peak_mb", memory[-1], _GREEN)):
            axes.plot([boxes[-1], EXTRAPOLATED], [last, far[what]], "--", color=colour)
        axes.plot([], [], "--", color=_GREY, label="extrapolated")
    axes.set_xscale("log")
    axes.set_yscale("log")
    _finish(axes, "boxes", "cost of a round at the aggregator")


def _pooled_lines(axes: Axes, pooled: dict[int, float]) -> None:
    for index, (rows, value) in enumerate(pooled.items()):
        style = ("-", ":")[index % 2]
        axes.axhline(value, color=_GREY, linewidth=1, linestyle=style, label=f"frames in one place, {rows} rows")


def _finish(axes: Axes, x: str, y: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set(xlabel=x, ylabel=y)
    axes.legend(frameon=False, fontsize=7)


def _without_nan(value: Any) -> Any:  # noqa: ANN401 (JSON)
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return value
