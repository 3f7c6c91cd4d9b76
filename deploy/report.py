"""One HTML file that shows what an evaluation found: figures, curves and heat maps; no scripts, nothing from outside.

It must not know how a detector was trained or run.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deploy.evaluation import Evaluation, Picture, colour_scale, write_whole
from deploy.heatmap import heatmap_overlay, mask_outline
from deploy.metrics import roc_curve

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt
    from matplotlib.axes import Axes

__all__ = ["heatmap_overlay", "render_page", "render_report", "write_report"]

# Blue and vermilion stay apart for colour-blind eyes and in grey print (Okabe and Ito).
_GOOD, _DEFECTIVE, _LINE = "#0072b2", "#d55e00", "#222222"
_PICTURE_WIDTH = 360
_HEADLINE = (
    ("image_auroc", "I-AUROC", "chance that a defective image scores above a good one"),
    ("image_ap", "Average precision", "precision averaged over recall"),
    ("image_f1", "F1-max", "best F1 of all thresholds; sees the test labels"),
    ("pixel_auroc", "P-AUROC", "the same chance for pixels"),
    ("aupro", "AUPRO", "mean overlap with defect regions up to 30 % false-positive pixels"),
    ("recall_at_threshold", "Recall", "share of defective images at or above the frozen threshold"),
    ("fpr_at_threshold", "False alarms", "share of good images at or above the frozen threshold"),
    ("ms_per_image", "Time per image", "mean, from the decoded image to its score"),
)

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.5rem 4rem; background: #fff; color: #1c1e21;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid #d5d8dc; }
p { margin: .5rem 0; max-width: 46rem; }
.subject, figcaption, .meaning { color: #50565d; }
.summary { font-size: 1.1rem; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; color: #50565d; padding-bottom: .4rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid #e6e8eb; }
th { font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.value { overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { font-size: .875rem; margin: .3rem 0 0; overflow-wrap: anywhere; }
img { display: block; max-width: 100%; height: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(30rem, 1fr)); gap: 1.5rem; }
.views { display: grid; grid-template-columns: repeat(3, 1fr); gap: .4rem; align-items: start; }
.views img { width: 100%; background: #eceef0; }
.none { color: #50565d; font-style: italic; }
@media (max-width: 40rem) { .pictures { grid-template-columns: 1fr; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } .pictures { grid-template-columns: 1fr 1fr; } }
"""


def write_report(
    path: Path,
    evaluation: Evaluation,
    *,
    title: str,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    sections: Mapping[str, str] | None = None,
) -> None:
    """Write the report, whole or not at all.

    Args:
        path: the HTML file; missing folders are made.
        evaluation: what to show.
        title: heading and title of the page.
        details: further tables by heading, such as parity, provenance and latency; values may be nested mappings.
        sections: further sections by heading, in HTML that is shown as it is, such as a Pareto front.

    Raises:
        DataError: the file cannot be written.
    """
    write_whole(path, render_report(evaluation, title=title, details=details, sections=sections))


def render_report(
    evaluation: Evaluation,
    *,
    title: str,
    details: Mapping[str, Mapping[str, Any]] | None = None,
    sections: Mapping[str, str] | None = None,
) -> str:
    """Return the report as one HTML document; see :func:`write_report`. Every name of ours in it is escaped."""
    scale = colour_scale(evaluation)
    parts = [
        _header(evaluation, title),
        _section("Figures", _figures_table(evaluation)),
        _section("Scores", f'<div class="charts">{_roc_figure(evaluation)}{_histogram_figure(evaluation)}</div>'),
        _section("Kinds of images", _label_table(evaluation)),
        _pictures_section(
            "Defects found", "The strongest defects at or above the threshold.", evaluation.found, evaluation, scale
        ),
        _pictures_section(
            "Defects missed", "Defects below the threshold, faintest first.", evaluation.missed, evaluation, scale
        ),
        _pictures_section(
            "Good images with the highest scores",
            "The likeliest false alarms; at or above the threshold they are false alarms.",
            evaluation.alarming,
            evaluation,
            scale,
        ),
        *(_section(heading, body) for heading, body in (sections or {}).items()),
        *(_section(heading, _details_table(heading, values)) for heading, values in (details or {}).items() if values),
    ]
    return render_page(title, "\n".join(part for part in parts if part))


def render_page(title: str, body: str) -> str:
    """Return an HTML document in the report's style.

    Args:
        title: of the page, escaped here.
        body: HTML that is shown as it is.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + body
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(evaluation: Evaluation, title: str) -> str:
    subject, threshold = evaluation.subject, evaluation.threshold
    labels, flagged = evaluation.labels, evaluation.scores >= threshold.value
    sentences = []
    if labels.any():
        sentences.append(f"{np.count_nonzero(flagged & labels)} of {np.count_nonzero(labels)} defective images found")
    if not labels.all():
        good = np.count_nonzero(~labels)
        sentences.append(f"{np.count_nonzero(flagged & ~labels)} of {good} good images raised a false alarm")
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in evaluation.notes)
    return (
        f"<header><h1>{html.escape(title)}</h1>"
        f'<p class="subject">{html.escape(subject.product)} &middot; {html.escape(subject.method)} &middot; '
        f"{html.escape(subject.engine)} {html.escape(subject.precision)}</p>"
        f'<p class="summary">At the frozen threshold {", ".join(sentences)}.</p>'
        f"<p>The threshold, a raw score of {_number(threshold.value)}, was set from {threshold.n} held-out good images "
        f"for a false-alarm rate of {threshold.alpha:g} per image. No test image took part in it.</p>"
        f"{notes}</header>"
    )


def _section(heading: str, body: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{body}</section>"


def _figures_table(evaluation: Evaluation) -> str:
    figures = evaluation.figures()
    rows = []
    for key, name, meaning in _HEADLINE:
        value = figures[key]
        shown = "&ndash;" if value is None else f"{value:.2f} ms" if key == "ms_per_image" else f"{value:.4f}"
        rows.append(
            f'<tr><th scope="row">{name}</th><td class="number">{shown}</td><td class="meaning">{meaning}</td></tr>'
        )
    counts = f"{figures['n_good']} good and {figures['n_defective']} defective images"
    return (
        f"<table><caption>{counts}; a dash stands where a figure is undefined.</caption>"
        '<thead><tr><th scope="col">Figure</th><th scope="col" class="number">Value</th><th scope="col">Meaning</th>'
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _label_table(evaluation: Evaluation) -> str:
    rows = []
    for name, row in evaluation.per_label().items():
        auroc = "&ndash;" if row["image_auroc"] is None else f"{row['image_auroc']:.4f}"
        rows.append(
            f'<tr><th scope="row">{html.escape(name)}</th><td class="number">{row["images"]}</td>'
            f'<td class="number">{row["flagged"]}</td><td class="number">{_number(row["median_score"])}</td>'
            f'<td class="number">{auroc}</td></tr>'
        )
    head = "".join(
        f'<th scope="col" class="number">{name}</th>'
        for name in ("Images", "At or above threshold", "Median score", "I-AUROC against good")
    )
    return (
        f'<table><caption>Scores by kind.</caption><thead><tr><th scope="col">Kind</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _details_table(heading: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td class="value">{html.escape(value)}</td></tr>'
        for name, value in _flatten(values)
    )
    return f"<table><caption>{html.escape(heading)}, as recorded.</caption><tbody>{rows}</tbody></table>"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{name} / ")
        elif isinstance(value, list | tuple):
            rows.append((prefix + name, ", ".join(_number(item) for item in value)))
        else:
            rows.append((prefix + name, _number(value)))
    return rows


def _number(value: object) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _pictures_section(
    heading: str, text: str, pictures: Sequence[Picture], evaluation: Evaluation, scale: tuple[float, float]
) -> str:
    if not pictures:
        return _section(heading, '<p class="none">None.</p>')
    shown = "".join(_picture(picture, evaluation.threshold.value, scale) for picture in pictures)
    legend = (
        f"{text} Each row shows the image, the anomaly map over it (clear at {_number(scale[0])}, hottest from "
        f"{_number(scale[1])}, a cyan line around what lies at or above the threshold) and, where it is known, "
        "the marked defect in green."
    )
    return _section(heading, f'<p>{html.escape(legend)}</p><div class="pictures">{shown}</div>')


def _picture(picture: Picture, threshold: float, scale: tuple[float, float]) -> str:
    scored = picture.scored
    side = "at or above" if scored.score >= threshold else "below"
    caption = f"{scored.name}: score {_number(scored.score)}, {side} the threshold"
    overlay = heatmap_overlay(
        picture.image, picture.anomaly_map, low=scale[0], high=scale[1], threshold=threshold, crop=picture.crop
    )
    views = [
        _image_tag(picture.image, f"Image {scored.name}, kind {scored.label}"),
        _image_tag(overlay, f"Anomaly map of {scored.name}, score {_number(scored.score)}, {side} the threshold"),
    ]
    if picture.mask is not None:
        views.append(_image_tag(mask_outline(picture.image, picture.mask), f"Marked defect of {scored.name}"))
    return f'<figure><div class="views">{"".join(views)}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def _image_tag(image: npt.NDArray[np.uint8], description: str) -> str:
    height, width = image.shape[:2]
    if width > _PICTURE_WIDTH:
        height, width = max(1, round(height * _PICTURE_WIDTH / width)), _PICTURE_WIDTH
        image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 88])
    return _tag("jpeg", data.tobytes(), description, width, height)


def _tag(kind: str, data: bytes, description: str, width: int, height: int) -> str:
    return (
        f'<img src="data:image/{kind};base64,{base64.b64encode(data).decode()}" width="{width}" height="{height}" '
        f'alt="{html.escape(description)}">'
    )


def _roc_figure(evaluation: Evaluation) -> str:
    curve = roc_curve(evaluation.labels, evaluation.scores)
    if curve is None:
        return '<p class="none">No ROC curve: it needs good and defective images.</p>'
    figures = evaluation.figures()
    fpr, recall = figures["fpr_at_threshold"], figures["recall_at_threshold"]
    figure, axes = _axes()
    axes.plot([0, 1], [0, 1], color="#b0b5ba", linewidth=1, linestyle=":")
    axes.plot(curve.fpr, curve.tpr, color=_GOOD, linewidth=2, label=f"I-AUROC {figures['image_auroc']:.4f}")
    axes.plot([fpr], [recall], "o", color=_DEFECTIVE, markersize=8, clip_on=False, label="frozen threshold", zorder=5)
    axes.set(xlim=(0, 1), ylim=(0, 1.005), xlabel="false alarms (share of good)", ylabel="recall (share of defective)")
    axes.set_aspect("equal")
    axes.legend(loc="lower right", frameon=False)
    description = (
        f"ROC curve of the image scores, area {figures['image_auroc']:.4f}; at the frozen threshold recall is "
        f"{recall:.3f} at a false-alarm rate of {fpr:.3f}."
    )
    return _chart(figure, description, "ROC curve of the image scores, with the point of the frozen threshold.")


def _histogram_figure(evaluation: Evaluation) -> str:
    labels, scores, threshold = evaluation.labels, evaluation.scores, evaluation.threshold.value
    finite = scores[np.isfinite(scores)]
    figure, axes = _axes()
    low, high = (min(finite.min(), threshold), max(finite.max(), threshold)) if finite.size else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, 41)
    for chosen, colour, name in ((~labels, _GOOD, "good"), (labels, _DEFECTIVE, "defective")):
        values = scores[chosen & np.isfinite(scores)]
        if values.size:
            axes.hist(
                values,
                bins=edges.tolist(),
                weights=np.full(values.size, 100 / values.size),
                color=colour,
                alpha=0.55,
                label=f"{name} ({values.size})",
            )
    axes.axvline(threshold, color=_LINE, linestyle="--", linewidth=1.5, label="frozen threshold")
    axes.set(xlabel="raw score", ylabel="% of the images of that class")
    axes.legend(frameon=False)
    parts = [
        f"{name} images range from {_number(float(scores[chosen].min()))} to {_number(float(scores[chosen].max()))}"
        for chosen, name in ((~labels, "good"), (labels, "defective"))
        if chosen.any()
    ]
    description = f"Histogram of raw scores: {'; '.join(parts)}; the frozen threshold is {_number(threshold)}."
    return _chart(figure, description, "Raw scores of good and defective images, each class as its own 100 %.")


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.4, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _chart(figure: Figure, description: str, caption: str) -> str:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    width, height = (round(inches * 100) for inches in figure.get_size_inches())
    return (
        f"<figure>{_tag('png', buffer.getvalue(), description, width, height)}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
