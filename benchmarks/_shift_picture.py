"""The drawing of shift strengths: one small plot for each kind of change, one for the methods; knows figures only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks._shift_figures import FALSE_POSITIVES
from benchmarks._shift_scores import CORRECTIONS, NONE, OWN, RUNNING
from benchmarks._shifts import CLEAN, REQUIRED, SERIES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks._shift_figures import Figures
    from benchmarks._shifts import Series

# Apart for colour-blind eyes (Okabe and Ito), and each has a mark and a dash of its own.
_STYLES = {
    NONE: {"color": "#000000", "marker": "s", "linestyle": ":", "label": "not corrected"},
    OWN: {"color": "#e69f00", "marker": "^", "linestyle": "--", "label": "corrected, each image by its own moments"},
    RUNNING: {"color": "#0072b2", "marker": "o", "linestyle": "-", "label": "corrected by running moments"},
}
_COLUMNS = 4


def draw(figures: Figures, names: Sequence[str], path: Path, *, title: str, series: Sequence[Series] = SERIES) -> None:
    """Write a PNG: false-positive rate at the frozen threshold against strength, mean over methods and folders.

    Args:
        figures: see there.
        names: of the detectors to average.
        path: file to write.
        title: above all.
        series: changes to draw, in order.
    """
    rows = -(-(len(series) + 1) // _COLUMNS)
    figure = Figure(figsize=(13, 0.9 + 2.9 * rows), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for panel, one in zip(axes, series, strict=False):
        _strengths(panel, figures, names, one)
    _methods(axes[len(series)], figures)
    for panel in axes[len(series) + 1 :]:
        panel.set_visible(False)
    for panel in axes[::_COLUMNS]:
        panel.set_ylabel("good images called defective")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=11)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _strengths(panel: Axes, figures: Figures, names: Sequence[str], one: Series) -> None:
    conditions = [CLEAN, *(one.condition(strength) for strength in one.strengths)]
    at = np.arange(len(conditions))
    for correction in CORRECTIONS:
        found = [figures.rate(FALSE_POSITIVES, names, correction, [condition]) for condition in conditions]
        style = _STYLES[correction]
        panel.plot(at, [each.value for each in found], markersize=5, linewidth=1.8, clip_on=False, **style)
        low, high = np.array([each.interval for each in found]).T
        panel.fill_between(at, low, high, color=style["color"], alpha=0.13, linewidth=0)
    panel.set_xticks(at, ["clean", *(f"{strength:g}" for strength in one.strengths)])
    panel.set_title(f"{one.name} [{one.unit}]" if one.unit else one.name)
    _finish(panel)


def _methods(panel: Axes, figures: Figures) -> None:
    """Each detector under the shifts that the goals are for."""
    names = figures.detectors
    required = [name for name in REQUIRED if name in figures.folders[0].rows]
    for correction in CORRECTIONS:
        rates = [figures.rate(FALSE_POSITIVES, [name], correction, required or [CLEAN]).value for name in names]
        style = {**_STYLES[correction], "linestyle": ""}
        panel.plot(rates, np.arange(len(names)), markersize=7, clip_on=False, **style)
    # Names above their marks: beside them they would push the other panels together.
    panel.set_yticks(np.arange(len(names)), [""] * len(names))
    for row, name in enumerate(names):
        panel.text(0.0, row - 0.22, name, fontsize=8, va="bottom")
    panel.set_ylim(len(names) - 0.6, -0.9)
    panel.set_xlim(0, 1)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title("by method: gain+offset, gamma, blur", fontsize=10)


def _finish(panel: Axes) -> None:
    panel.set_ylim(0, 1)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
