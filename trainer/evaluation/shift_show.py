"""A report of the sub-class shift protocol for people: its tables and its drawing.

It must not know how figures came about.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from edge.errors import DataError, UsageError
from trainer.data.subclass_shift import SHOTS
from trainer.evaluation.shift_report import FIGURES
from trainer.evaluation.shift_settings import OWN, SETTINGS, UNSEEN, by_moments

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from trainer.evaluation.shift_pairs import Comparison
    from trainer.evaluation.shift_report import MaterialResult, ShiftReport, Spread

_TITLES = {
    "image_auroc": "I-AUROC",
    "pixel_auroc": "P-AUROC",
    "aupro": "AUPRO (0.3)",
    "false_positive_rate": "false positives",
    "miss_rate": "misses",
}
_DRAWN = ("image_auroc", "pixel_auroc", "false_positive_rate")
_COMPARED = (UNSEEN, OWN, by_moments(SHOTS[1]))  # shown on the screen; the JSON has all
# Apart for colour-blind eyes (Okabe and Ito), and each method has a mark of its own.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_MARKS = "osD^vPX<>*h"


def tables(report: ShiftReport) -> list[Table]:
    """Return the tables of each material: figures by method and setting, then comparisons where there are any."""
    found = []
    source = "generated stand-in, not Texture-AD" if report.generated else report.data
    for material in report.materials:
        found.append(_figures(material, source))
        if material.comparisons:
            found.append(_comparisons(material, source))
    return found


def _figures(material: MaterialResult, source: str) -> Table:
    title = f"{material.material}: {len(material.subclasses)} sub-classes ({source}); mean ± deviation over rotations"
    table = Table(title=title, title_justify="left")
    table.add_column("method", overflow="fold", min_width=8)
    # In 80 columns nothing is cut off: unseen+5 and unseen+5 rows differ at their ends, and figures wrap.
    table.add_column("setting", no_wrap=True, min_width=14)
    for figure in FIGURES:
        table.add_column(_TITLES[figure], justify="right", overflow="fold", min_width=5)
    table.add_column("drop of I-AUROC", justify="right", overflow="fold", min_width=5)
    for one in material.methods:
        for setting, figures in one.settings.items():
            lost = one.drop.get(setting, {}).get("image_auroc")
            cells = [_shown(figures.get(figure)) for figure in FIGURES]
            name = one.name if setting == next(iter(one.settings)) else ""
            table.add_row(name, setting, *cells, "" if lost is None else f"{100 * lost.mean:+.0f} %")
        table.add_section()
    return table


def _comparisons(material: MaterialResult, source: str) -> Table:
    table = Table(
        title=f"{material.material}: differences, paired by rotation, mean and 95 % interval ({source})",
        title_justify="left",
    )
    table.add_column("first less second", overflow="fold")
    table.add_column("setting", no_wrap=True)
    for figure in _DRAWN:
        table.add_column(_TITLES[figure], justify="right")
    table.add_column("I-AUROC of each rotation", justify="right")
    of = {(one.first, one.second, one.setting, one.figure): one for one in material.comparisons}
    for first, second in dict.fromkeys((one.first, one.second) for one in material.comparisons):
        for setting in _COMPARED:
            cells = [of.get((first, second, setting, figure)) for figure in _DRAWN]
            ranking = cells[0]
            table.add_row(
                f"{first} - {second}" if setting == _COMPARED[0] else "",
                setting,
                *("-" if one is None else f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for one in cells),
                "-" if ranking is None else " ".join(f"{value:+.3f}" for value in ranking.differences),
            )
        table.add_section()
    return table


def legend(report: ShiftReport) -> list[str]:
    """Return what the settings that have figures mean, one sentence each."""
    shown = {setting for material in report.materials for one in material.methods for setting in one.settings}
    return [f"{setting.name}: {setting.meaning}" for setting in report.settings if setting.name in shown]


def refuse_picture(path: Path) -> str:
    """Return the kind of a picture by its ending.

    Raises:
        UsageError: it is neither PNG nor SVG.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in {"png", "svg"}:
        raise UsageError(f"--picture {path}: end the name with .png or .svg")
    return kind


def draw(report: ShiftReport, path: Path) -> None:
    """Draw I-AUROC, P-AUROC and false positives by setting, a line per method, and the differences of pairs.

    Whiskers of methods reach from the least to the most of the rotations; those of differences are their intervals.

    Args:
        report: what was found.
        path: PNG or SVG, by its ending.

    Raises:
        UsageError: another ending.
        DataError: the file cannot be written.
    """
    kind = refuse_picture(path)
    paired = any(one.comparisons for one in report.materials)
    columns = len(_DRAWN) + paired
    figure = Figure(figsize=(4.4 * columns, 1.2 + 3.3 * len(report.materials)), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots(len(report.materials), columns, squeeze=False)
    for row, material in zip(axes, report.materials, strict=True):
        for column, name in zip(row[: len(_DRAWN)], _DRAWN, strict=True):
            _draw_panel(column, material, name)
        row[0].set_ylabel(material.material)
        if paired:
            _draw_pairs(row[-1], material.comparisons)
    titles = [_TITLES[name] for name in _DRAWN[:-1]]
    titles += [f"{_TITLES[_DRAWN[-1]]} at the frozen threshold", f"paired differences, {UNSEEN}"]
    for column, title in zip(axes[0], titles[:columns], strict=True):
        column.set_title(title)
    # A method may be in some materials only.
    shown = {}
    for column in axes[:, 0]:
        shown.update(zip(*reversed(column.get_legend_handles_labels()), strict=True))
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=min(4, max(1, len(shown))))
    source = "generated sub-classes" if report.generated else report.data
    figure.suptitle(f"Sub-class shift, {source}, {report.rotations} rotations")
    data = io.BytesIO()
    # No date: the same figures give the same file.
    figure.savefig(data, format=kind, dpi=90, metadata={"Date": None} if kind == "svg" else None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.getvalue())
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or choose another file") from error


def _draw_panel(axes: Axes, material: MaterialResult, name: str) -> None:
    # Variants are drawn where they are compared; here they would hide the methods.
    methods = [one for one in material.methods if one.name == one.method] or list(material.methods)
    known = {setting for one in methods for setting in one.settings}
    settings = [setting.name for setting in SETTINGS if setting.name in known]
    width = 0.6 / max(1, len(methods))
    for index, one in enumerate(methods):
        points = [(settings.index(setting), found[name]) for setting, found in one.settings.items() if name in found]
        if not points:
            continue
        at = np.array([x for x, _ in points]) + (index - (len(methods) - 1) / 2) * width
        middle = np.array([spread.mean for _, spread in points])
        below = np.array([spread.mean - spread.min for _, spread in points])
        above = np.array([spread.max - spread.mean for _, spread in points])
        axes.errorbar(
            at,
            middle,
            yerr=np.clip([below, above], 0, None),
            fmt=_MARKS[index % len(_MARKS)],
            color=_COLOURS[index % len(_COLOURS)],
            markersize=4,
            capsize=2,
            linestyle="none",  # settings are no scale: nothing lies between them
            linewidth=1,
            label=one.name,
        )
    axes.set_xticks(range(len(settings)), [_in_lines(setting) for setting in settings], fontsize=6)
    axes.set_xlim(-0.5, len(settings) - 0.5)
    for between in range(1, len(settings)):
        axes.axvline(between - 0.5, color="#dddddd", linewidth=0.6)
    axes.grid(axis="y", alpha=0.3)


def _draw_pairs(axes: Axes, comparisons: Sequence[Comparison]) -> None:
    pairs = list(dict.fromkeys((one.first, one.second) for one in comparisons))
    if not pairs:
        axes.set_axis_off()
        return
    for offset, name, colour in ((-0.12, "image_auroc", _COLOURS[0]), (0.12, "pixel_auroc", _COLOURS[1])):
        shown = [one for one in comparisons if one.setting == UNSEEN and one.figure == name]
        if not shown:
            continue
        ends = [[max(0.0, one.mean - one.low) for one in shown], [max(0.0, one.high - one.mean) for one in shown]]
        axes.errorbar(
            [one.mean for one in shown],
            [pairs.index((one.first, one.second)) + offset for one in shown],
            xerr=ends,
            fmt="o" if name == "image_auroc" else "s",
            color=colour,
            markersize=4,
            capsize=2,
            linestyle="none",
            label=_TITLES[name],
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(pairs)), [f"{first}\nless {second}" for first, second in pairs], fontsize=6)
    axes.set_ylim(len(pairs) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7)


def _in_lines(setting: str) -> str:
    return setting.replace(", ", ",\n").replace("+", "\n+").replace(" rows", "\nrows")


def _shown(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    return f"{spread.mean:.3f}" if spread.std is None else f"{spread.mean:.3f} ±{spread.std:.2f}"
