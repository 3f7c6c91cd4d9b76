"""Evaluating a run or a bundle of several products: each with its own threshold, as its product and as it is routed.

It must not know whether torch or an engine of the box makes the maps; `command.py` hands both over as a Judged.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from deploy.evaluation import Evaluation, Subject, write_whole
from deploy.metrics import image_auroc
from deploy.report import render_page, write_report
from edge.adaptation.routing import nearest
from edge.errors import DataError
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from edge.judgement.threshold import fit_threshold
from trainer.evaluation.protocol import LabelledImage
from trainer.evaluation.protocol import evaluate as measure

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Pooling, Preprocessing
    from edge.judgement.threshold import Threshold
    from trainer.data.products import ProductFolder

    Canvas = npt.NDArray[np.uint8]

FIGURES = (
    ("I-AUROC", "image_auroc"),
    ("P-AUROC", "pixel_auroc"),
    ("pixel AP", "pixel_ap"),
    ("AUPRO", "aupro"),
    ("alarms", "fpr_at_threshold"),
    ("recall", "recall_at_threshold"),
)
ROUTED_FIGURES = (("I-AUROC", "image_auroc"), ("alarms", "false_alarms"), ("recall", "recall"))
"""Alarms: share of good images that raise a false one."""


@dataclass(frozen=True)
class Unified:
    """A detector of several products, however it is run.

    Attributes:
        products: their names.
        subject: which detector; its product is replaced by that of the images.
        preprocessing: the detector's.
        pooling: from a map to a score.
        good: raw scores of held-out good images, their groups and their products, all [n].
        judge: from a canvas and the product that it is judged as to a raw map.
        route: from a canvas to how near it is to each product, float32 [P]; None where there is no router.
    """

    products: tuple[str, ...]
    subject: Subject
    preprocessing: Preprocessing
    pooling: Pooling
    good: tuple[npt.NDArray[np.float32], npt.NDArray[np.str_], npt.NDArray[np.str_]]
    judge: Callable[[Canvas, int], npt.NDArray[np.float32]]
    route: Callable[[Canvas], npt.NDArray[np.float32]] | None

    def threshold(self, product: str, alpha: float) -> Threshold:
        """Return the threshold of a product, from its held-out good images alone."""
        own = self.good[2] == product
        return fit_threshold(self.good[0][own], self.good[1][own], alpha)


@dataclass(frozen=True)
class Routing:
    """What became of one product's test images without anybody to say which product they show.

    Attributes:
        images: how many.
        right: judged as the product that they show.
        wrong: judged as another.
        refused: of no known product, so not judged.
        image_auroc: of those judged, by score over the threshold of the product that each was judged as.
        false_alarms: share of good images that raised one.
        recall: share of defective images that were found.
    """

    images: int
    right: int
    wrong: int
    refused: int
    image_auroc: float | None
    false_alarms: float | None
    recall: float | None


@dataclass(frozen=True)
class ProductsEvaluation:
    """Figures of several products.

    Attributes:
        subject: which detector.
        products: the evaluation of each, with the product given.
        routing: of each; empty without a router.
    """

    subject: Subject
    products: Mapping[str, Evaluation]
    routing: Mapping[str, Routing]

    def figures(self) -> dict[str, Any]:
        """Return the figures of each product and their means; a mean is over the products that have the figure."""
        each: dict[str, dict[str, Any]] = {}
        for name, found in self.products.items():
            each[name] = found.figures() | {"pixel_ap": found.pixels.ap if found.pixels else None}
            if name in self.routing:
                each[name]["routed"] = vars(self.routing[name])
        mean = {
            key: _mean([one[key] for one in each.values()])
            for _, key in (*FIGURES, ("", "image_ap"), ("", "ms_per_image"))
        }
        routed: dict[str, float | None] = {}
        if self.routing:
            images = sum(one.images for one in self.routing.values())
            routed = {key: sum(getattr(one, key) for one in self.routing.values()) / images
                      for key in ("right", "wrong", "refused")}  # fmt: skip
            routed |= {key: _mean([getattr(one, key) for one in self.routing.values()])
                       for key in ("image_auroc", "false_alarms", "recall")}  # fmt: skip
        named = {"product": self.subject.product, "method": self.subject.method, "engine": self.subject.engine,
                 "precision": self.subject.precision}  # fmt: skip
        return named | {"mean": mean, "routed": routed, "products": each}


def evaluate_products(
    detector: Unified, folders: Sequence[ProductFolder], *, alpha: float, progress: Progress
) -> ProductsEvaluation:
    """Judge the test images of every folder.

    Args:
        detector: of all their products, or of more.
        folders: with test images.
        alpha: false-alarm probability per good image that each threshold is set for.
        progress: progress function.

    Raises:
        DataError: a folder shows a product that the detector does not know, has no test image, or a damaged one.
        EngineError: the detector gave a map with a NaN.
    """
    unknown = [one.name for one in folders if one.name not in detector.products]
    if unknown:
        raise DataError(
            f"{unknown[0]}: no product of this detector, which knows {', '.join(detector.products)}; name the folders "
            "with --product"
        )
    found, routing = {}, {}
    thresholds = [detector.threshold(name, alpha) for name in detector.products]
    for folder in folders:
        if not folder.images.test:
            raise DataError(f"{folder.images.root / 'test'}: no test images; add test/good and test/<kind of defect>")
        images = [LabelledImage.from_sample(sample) for sample in folder.images.test]
        index = detector.products.index(folder.name)
        found[folder.name] = measure(
            partial(_judge, detector, index),
            images,
            preprocessing=detector.preprocessing,
            pooling=detector.pooling,
            threshold=thresholds[index],
            subject=replace(detector.subject, product=folder.name),
            progress=progress,
        )
        if detector.route is not None:
            routing[folder.name] = _routed(detector, images, found[folder.name], thresholds, index)
    return ProductsEvaluation(detector.subject, found, routing)


def _judge(detector: Unified, product: int, canvas: Canvas) -> npt.NDArray[np.float32]:
    return detector.judge(canvas, product)


def _routed(
    detector: Unified, images: Sequence[LabelledImage], given: Evaluation, thresholds: Sequence[Threshold], own: int
) -> Routing:
    assert detector.route is not None
    shown, over, alarms = [], [], []
    for image, scored in zip(images, given.images, strict=True):
        canvas = to_canvas(image.load(), detector.preprocessing)
        product = nearest(detector.route(canvas))
        score, alarm = np.nan, False
        if product is not None:
            # As its own product it has been judged before.
            raw = scored.score if product == own else pool_score(detector.judge(canvas, product), detector.pooling)
            score = raw / max(thresholds[product].value, 1e-12)
            alarm = raw >= thresholds[product].value
        shown.append(-1 if product is None else product)
        over.append(score)
        alarms.append(alarm)
    products, scores, raised, labels = np.array(shown), np.array(over), np.array(alarms), given.labels
    judged = products >= 0
    return Routing(
        images=len(images),
        right=int(np.sum(products == own)),
        wrong=int(np.sum(judged & (products != own))),
        refused=int(np.sum(~judged)),
        image_auroc=image_auroc(labels[judged], scores[judged]) if judged.any() else None,
        false_alarms=float(np.mean(raised[~labels])) if (~labels).any() else None,
        recall=float(np.mean(raised[labels])) if labels.any() else None,
    )


def products_tables(found: ProductsEvaluation) -> list[Table]:
    """Return tables with a row per product and one of the means: with the product given, and as routed."""
    figures, subject = found.figures(), found.subject
    titles = (f"{subject.product}: {subject.method} on {subject.engine} {subject.precision}", "by the router")
    tables = []
    for title, rows in zip(titles, (_given_rows(figures), _routed_rows(figures)), strict=True):
        if not rows:
            continue
        table = Table(title=title)
        for index, name in enumerate(rows[0]):
            table.add_column(name, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row.values())
        tables.append(table)
    return tables


def write_products_json(path: Path, found: ProductsEvaluation) -> None:
    """Write :meth:`ProductsEvaluation.figures` as JSON, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    write_whole(path, json.dumps(found.figures(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_products_report(path: Path, found: ProductsEvaluation, details: Mapping[str, Mapping[str, Any]]) -> None:
    """Write an overview, and beside it a page for each product.

    Raises:
        DataError: a file cannot be written.
    """
    pages = {name: f"{path.stem}-{index + 1}-{_file_name(name)}.html" for index, name in enumerate(found.products)}
    for name, evaluation in found.products.items():
        write_report(path.with_name(pages[name]), evaluation, title=f"{name}: evaluation", details=details)
    figures = found.figures()
    given = _html_table(_given_rows(figures), pages)
    routed = _html_table(_routed_rows(figures), {})
    subject = found.subject
    said = html.escape(f"{subject.method} on {subject.engine} {subject.precision}")
    title = f"{subject.product}: evaluation of {len(found.products)} products"
    write_whole(
        path,
        render_page(
            title,
            f'<header><h1>{html.escape(title)}</h1><p class="subject">{said}</p>'
            "<p>Each product has a threshold of its own, frozen before the first test image.</p></header>"
            f"<section><h2>With the product given</h2>{given}</section>"
            + (f"<section><h2>By the router</h2>{routed}</section>" if routed else ""),
        ),
    )


def _given_rows(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = (*figures["products"].items(), ("mean", figures["mean"]))
    return [{"product": name} | {heading: _shown(one[key]) for heading, key in FIGURES} for name, one in rows]


def _routed_rows(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    if not figures["routed"]:
        return []
    rows = []
    for name, one in (*figures["products"].items(), ("mean", figures)):
        routed = one["routed"]
        count = routed.get("images", 1)  # of the mean they are shares already
        shares = {what: _shown(routed[what] / count) for what in ("right", "wrong", "refused")}
        rows.append({"product": name} | shares | {heading: _shown(routed[key]) for heading, key in ROUTED_FIGURES})
    return rows


def _html_table(rows: Sequence[Mapping[str, str]], links: Mapping[str, str]) -> str:
    if not rows:
        return ""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in rows[0])]
    for row in rows:
        name, *cells = row.values()
        shown = html.escape(name)
        first = f'<a href="{html.escape(links[name])}">{shown}</a>' if name in links else shown
        lines.append(f"<td>{first}</td>" + "".join(f'<td class="number">{cell}</td>' for cell in cells))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _file_name(product: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", product)
