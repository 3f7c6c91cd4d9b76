"""The Pareto front of detectors that were tried: I-AUROC against milliseconds, as a picture and a table in HTML.

It must not know how any of them was trained or timed.
"""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Sequence

_FRONT, _OTHER, _LINE = "#0072b2", "#b0b5ba", "#222222"


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One detector that was tried.

    Attributes:
        name: what it is.
        milliseconds: median time for one image.
        low: lower quartile.
        high: upper quartile.
        image_auroc: that it was chosen by.
        bytes: of its files.
        note: such as ``chosen``; empty for most.
        chosen: whether it was kept.
    """

    name: str
    milliseconds: float
    low: float
    high: float
    image_auroc: float
    bytes: int
    note: str
    chosen: bool


def pareto_front(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Return the points that no other is both as fast and as good as, fastest first.

    Of points that are equal in both, the first stays.
    """
    front: list[ParetoPoint] = []
    for point in sorted(points, key=lambda one: (one.milliseconds, -one.image_auroc)):
        if not front or point.image_auroc > front[-1].image_auroc:
            front.append(point)
    return front


def pareto_html(points: Sequence[ParetoPoint], *, budget_ms: float | None = None) -> str:
    """Return a figure and a table of what was tried; names are escaped.

    Args:
        points: at least one.
        budget_ms: milliseconds that were allowed, drawn as a line; None for no limit.
    """
    front = pareto_front(points)
    names = {id(point) for point in front}
    rows = "".join(
        f'<tr><th scope="row">{html.escape(point.name)}</th><td class="number">{point.milliseconds:.2f}</td>'
        f'<td class="number">{point.low:.2f} to {point.high:.2f}</td><td class="number">{point.image_auroc:.4f}</td>'
        f'<td class="number">{point.bytes / 1000:.0f}</td><td>{"yes" if id(point) in names else "no"}</td>'
        f'<td class="meaning">{html.escape(point.note)}</td></tr>'
        for point in sorted(points, key=lambda one: one.milliseconds)
    )
    head = "".join(
        f'<th scope="col"{kind}>{name}</th>'
        for name, kind in (
            ("Candidate", ""),
            ("ms, median", ' class="number"'),
            ("middle half", ' class="number"'),
            ("I-AUROC", ' class="number"'),
            ("kB", ' class="number"'),
            ("on the front", ""),
            ("", ""),
        )
    )
    caption = "Processor milliseconds of trunk and head in int8 on one thread; I-AUROC on synthetic defects."
    return (
        f"{_picture(points, front, budget_ms)}<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


def _picture(points: Sequence[ParetoPoint], front: Sequence[ParetoPoint], budget_ms: float | None) -> str:
    figure = Figure(figsize=(5.4, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.step(
        [one.milliseconds for one in front], [one.image_auroc for one in front], where="post", color=_FRONT, linewidth=1
    )
    on_front = {id(point) for point in front}
    for point in points:
        axes.errorbar(
            point.milliseconds,
            point.image_auroc,
            xerr=[
                [max(0.0, point.milliseconds - point.low)],
                [max(0.0, point.high - point.milliseconds)],
            ],
            fmt="s" if point.chosen else "o",
            markersize=9 if point.chosen else 6,
            color=_FRONT if id(point) in on_front else _OTHER,
        )
    if budget_ms is not None:
        axes.axvline(budget_ms, color=_LINE, linestyle="--", linewidth=1, label=f"budget {budget_ms:g} ms")
        axes.legend(loc="lower right", frameon=False)
    axes.set(xlabel="processor ms per image, int8, one thread", ylabel="I-AUROC on synthetic defects")
    axes.set_xlim(left=0)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    said = "; ".join(f"{point.name} {point.milliseconds:.2f} ms {point.image_auroc:.3f}" for point in points)
    width, height = (round(inches * 100) for inches in figure.get_size_inches())
    return (
        f'<figure><img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}" width="{width}" '
        f'height="{height}" alt="{html.escape(f"I-AUROC against milliseconds: {said}.")}">'
        "<figcaption>What was tried; the line is the Pareto front, the square is what was kept.</figcaption></figure>"
    )
