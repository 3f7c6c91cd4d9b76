"""The report on signals: figures beside baselines, and traces with what was found shaded, in one HTML file.

It must not know how figures come about.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

from deploy.evaluation import write_whole
from edge.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt
    from matplotlib.figure import Figure

    from trainer.signals.evaluate import SignalEvaluation

_SHOWN = 6
# Points of a drawn trace: more than pixels say nothing more.
_POINTS = 900
_WIDTH, _HEIGHT = 900, 54
_MOST_CHANNELS = 12
_SEEN = 0.02
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1f23; max-width: 62rem; margin: 0 auto; padding: 2rem 1rem; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, figcaption { color: #50565d; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #e6e8eb; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
text { paint-order: stroke; stroke: #fff; stroke-width: 3px; }
figure { margin: 0 0 1.6rem; } svg { width: 100%; height: auto; display: block; }
.key span { display: inline-block; width: 1.2em; height: .8em; margin: 0 .3em 0 1em; vertical-align: baseline; }
"""
_LABELLED, _FOUND, _TRACE = "#f2b8b5", "#c62828", "#1f3a5f"


def write_signal_report(path: Path, found: SignalEvaluation) -> None:
    """Write the report, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    write_whole(path, render(found))


def render(found: SignalEvaluation) -> str:
    """Return the report as one HTML document that loads nothing."""
    from trainer.signals.evaluate import cells_of  # noqa: PLC0415 (the two know each other's values)

    subject, layout, figures = found.subject, found.layout, found.figures()
    title = html.escape(f"{subject.product}: evaluation")
    rows = "".join(
        f"<tr><td>{html.escape(row.name)}</td>" + "".join(f'<td class="number">{cell}</td>' for cell in cells_of(row))
        + "</tr>"
        for row in found.rows
    )  # fmt: skip
    other = "".join(
        f'<tr><td>{name}</td><td class="number">{_number(figures[key])}</td></tr>'
        for name, key in (
            ("average precision over windows", "window_ap"),
            ("false alarms at the threshold", "fpr_at_threshold"),
            ("recall at the threshold", "recall_at_threshold"),
            ("threshold (raw score)", "threshold"),
            ("false-alarm rate that it was set for", "alpha"),
            ("milliseconds per window", "ms_per_window"),
        )
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in found.notes)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<style>{_STYLE}</style></head><body>"
        f"<h1>{title}</h1><p>{html.escape(subject.method)} on {html.escape(subject.engine)} "
        f"{html.escape(subject.precision)}; {len(layout.channels)} channels "
        f"({html.escape(', '.join(layout.channels))}) "
        f"in {html.escape(layout.unit)} at {layout.rate_hz:g} Hz, windows of {layout.window_s:g} s; "
        f"{figures['n_good']} good and {figures['n_anomalous']} anomalous ones.</p>"
        '<h2>Figures</h2><table><tr><th>score</th><th class="number">window AUROC</th><th class="number">95 % interval'
        f'</th><th class="number">point AUROC</th></tr>{rows}</table>{notes}'
        f"<h2>At the threshold</h2><table>{other}</table>"
        f'<p class="key"><span style="background:{_LABELLED}"></span>labelled anomalous'
        f'<span style="background:{_FOUND}"></span>found: the darker, the further above the threshold</p>'
        f"<p>Each picture is a window of {layout.window_s:g} s from left to right, called by recording and first "
        "sample. Beside a channel's name stand its lowest and its highest value.</p>"
        + "".join(_section(heading, found, indices) for heading, indices in chosen(found).items())
        + "<p>Not a medical device: nothing here may be used to diagnose or to monitor a patient.</p></body></html>\n"
    )


def chosen(found: SignalEvaluation) -> dict[str, npt.NDArray[np.intp]]:
    """Return which windows are shown: found and missed anomalies, and good windows of the highest scores."""
    labels, scores, value = found.windows.anomalous, found.scores, found.threshold.value
    order = np.argsort(-scores, kind="stable")
    return {
        "Anomalies found": order[labels[order] & (scores[order] >= value)][:_SHOWN],
        "Anomalies missed": order[::-1][labels[order[::-1]] & (scores[order[::-1]] < value)][:_SHOWN],
        "Good windows with the highest scores": order[~labels[order]][:_SHOWN],
    }


def draw(found: SignalEvaluation, path: Path) -> None:
    """Draw the strongest window of each kind that is shown, PNG or SVG.

    Raises:
        UsageError: another ending.
        DataError: the file cannot be written.
    """
    if path.suffix.lower() not in {".png", ".svg"}:
        raise UsageError(f"--picture {path}: give a name that ends in .png or .svg")
    shown = {heading: int(indices[0]) for heading, indices in chosen(found).items() if len(indices)}
    figure = _figure(found, shown)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or choose another file") from error


def _figure(found: SignalEvaluation, shown: dict[str, int]) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415 (drawing alone needs it)

    channels = min(len(found.layout.channels), _MOST_CHANNELS)
    figure = Figure(figsize=(10, 0.6 + len(shown) * (0.5 + 0.7 * channels)), layout="constrained")
    axes = figure.subplots(channels * len(shown), 1, squeeze=False)[:, 0]
    time = np.arange(found.layout.window) / found.layout.rate_hz
    for block, (heading, index) in enumerate(shown.items()):
        strength = strengths(found, index)
        edges = np.linspace(0, found.layout.window_s, strength.shape[1] + 1)
        for channel in range(channels):
            axis = axes[block * channels + channel]
            trace = found.windows.values[index, channel]
            low, high = float(trace.min()), float(trace.max())
            axis.pcolormesh(edges, [low, high], strength[channel : channel + 1], cmap="Reds", vmin=0, vmax=1.4)
            _shade(axis, found.windows.points[index], time, low, high)
            axis.plot(time, trace, color=_TRACE, linewidth=0.8)
            axis.set_ylabel(found.layout.channels[channel], rotation=0, ha="right", va="center", fontsize=8)
            axis.tick_params(labelsize=7, labelbottom=channel == channels - 1)
            axis.margins(x=0)
        axes[block * channels].set_title(f"{heading}: {found.windows.names[index]}", fontsize=9, loc="left")
    axes[-1].set_xlabel(f"seconds; traces in {found.layout.unit}; bars below: labelled", fontsize=8)
    return figure


def _shade(
    axis: object, points: npt.NDArray[np.bool_], time: npt.NDArray[np.floating], low: float, high: float
) -> None:
    base = low - 0.08 * (high - low)
    axis.fill_between(time, base, low, where=points, color=_FOUND, linewidth=0)  # type: ignore[attr-defined]


def strengths(found: SignalEvaluation, index: int) -> npt.NDArray[np.float32]:
    """Return how far each cell of a window's map is above the threshold, 0 to 1, [K, cells]; 1 at three times it."""
    value = max(found.threshold.value, 1e-12)
    return np.clip((found.maps[index] / value - 1) / 2, 0, 1)


def _section(heading: str, found: SignalEvaluation, indices: Sequence[int] | npt.NDArray[np.intp]) -> str:
    shown = "".join(_traces(found, int(index)) for index in indices) or "<p>None.</p>"
    return f"<h2>{heading}</h2>{shown}"


def _traces(found: SignalEvaluation, index: int) -> str:
    channels = min(len(found.layout.channels), _MOST_CHANNELS)
    height = channels * _HEIGHT
    parts = [_bands(found.windows.points[index], height)]
    strength = strengths(found, index)
    cell = _WIDTH / strength.shape[1]
    for channel in range(channels):
        top = channel * _HEIGHT
        parts += [
            f'<rect x="{place * cell:.1f}" y="{top}" width="{cell + 0.2:.1f}" height="{_HEIGHT}" fill="{_FOUND}" '
            f'opacity="{0.15 + 0.6 * float(strength[channel, place]):.2f}"/>'
            for place in np.flatnonzero(strength[channel] > _SEEN)
        ]
        trace = found.windows.values[index, channel]
        parts.append(_line(trace, top))
        name = f"{found.layout.channels[channel]}, {trace.min():.3g} to {trace.max():.3g} {found.layout.unit}"
        parts.append(f'<text x="4" y="{top + 12}" font-size="11" fill="#50565d">{html.escape(name)}</text>')
    caption = f"{found.windows.names[index]}: score {found.scores[index]:.4g}, threshold {found.threshold.value:.4g}"
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(caption)}">'
        + "".join(parts)
        + f"</svg><figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _bands(points: npt.NDArray[np.bool_], height: int) -> str:
    edges = np.flatnonzero(np.diff(np.r_[False, points, False].astype(np.int8)))
    scale = _WIDTH / len(points)
    return "".join(
        f'<rect x="{begin * scale:.1f}" y="0" width="{(end - begin) * scale:.1f}" height="{height}" '
        f'fill="{_LABELLED}" opacity="0.6"/>'
        for begin, end in zip(edges[::2], edges[1::2], strict=True)
    )


def _line(trace: npt.NDArray[np.float32], top: int) -> str:
    """Draw a trace; where samples are closer than pixels, the lowest and the highest of each pixel."""
    low, high = float(trace.min()), float(trace.max())
    if len(trace) > _POINTS:
        width = -(-len(trace) // (_POINTS // 2))
        padded = np.pad(trace, (0, -len(trace) % width), mode="edge").reshape(-1, width)
        trace = np.stack([padded.min(1), padded.max(1)], 1).ravel()
    x = np.linspace(0, _WIDTH, len(trace))
    y = top + 4 + (_HEIGHT - 8) * (1 - (trace - low) / max(high - low, 1e-12))
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline points="{path}" fill="none" stroke="{_TRACE}" stroke-width="1"/>'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
