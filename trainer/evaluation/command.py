"""The body of `lineward evaluate`: a run or a bundle, a folder of labelled images, a JSON file and a report.

The command line itself is in trainer/cli.py, the measuring in protocol.py.
"""

from __future__ import annotations

import html
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from deploy.evaluation import Evaluation, Subject, write_json
from deploy.pareto import ParetoPoint, pareto_html
from deploy.report import write_report
from edge.bundle import Bundle, Engine, Precision
from edge.errors import DataError, UsageError
from edge.inference.detector import Detector
from edge.judgement.threshold import fit_threshold
from trainer.data.folder import check, content_hash, read_folder
from trainer.evaluation.protocol import DEFAULT_ALPHA, LabelledImage
from trainer.evaluation.protocol import evaluate as measure
from trainer.progress import progress_bars
from trainer.runs import Run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from deploy.progress import Progress


def evaluate(
    *,
    run: Path | None,
    bundle: Path | None,
    data: Path,
    json: Path | None = None,
    report: Path | None = None,
    engine: Engine | str | None = None,
    precision: Precision | str | None = None,
    alpha: float = DEFAULT_ALPHA,
) -> Evaluation:
    """Measure a run or a bundle on the test images of a folder and print the figures.

    The threshold is frozen before the first test image: it comes from held-out good images, the run's own or those of
    the bundle's calibration for the engine and precision used.

    Args:
        run: folder of a run; or
        bundle: folder of a bundle.
        data: folder in MVTec layout with test images.
        json: where to write the figures, if anywhere.
        report: where to write the HTML report, if anywhere.
        engine: of a bundle, or its name; None for the box's own choice.
        precision: of a bundle, or its name; None for the box's own choice.
        alpha: false-alarm probability per good image for which the threshold is set.

    Returns:
        The evaluation that was printed and written.

    Raises:
        UsageError: not exactly one of run and bundle, an engine or precision for a run or of an unknown name, or
            alpha out of range.
        DataError: the folder, the run or an output file cannot be used.
        BundleError: the bundle is damaged or not calibrated for the engine and precision.
        EngineError: no engine runs the bundle here.
    """
    chosen = _check_usage(run, bundle, engine, precision, alpha)
    images = read_folder(data)
    if not images.test:
        raise DataError(f"{data / 'test'}: no test images; add test/good and test/<kind of defect>")
    with progress_bars() as progress:
        checked = check(replace(images, train=()), progress=progress)
        samples = [LabelledImage.from_sample(sample) for sample in images.test]
        if run is not None:
            found, details = _evaluate_run(Run.load(run), samples, alpha, progress)
        else:
            assert bundle is not None
            detector = Detector.open(Bundle.open(bundle), engine=chosen[0], precision=chosen[1])
            found, details = _evaluate_detector(detector, samples, alpha, progress)
    found = replace(found, notes=(*found.notes, *map(_sentence, checked.notes)))
    if json is not None:
        write_json(json, found)
    if report is not None:
        figures = found.figures()
        details["Latency in ms per image"] = {key: figures[key] for key in ("ms_per_image", "ms_p50", "ms_p99")}
        details["Test data"] = {"folder": str(data), "sha256": content_hash(images.test), "images": len(images.test)}
        sections = None if run is None else _distillation_section(run)
        write_report(report, found, title=f"{found.subject.product}: evaluation", details=details, sections=sections)
    print_figures(found, Console())
    return found


def print_figures(found: Evaluation, console: Console) -> None:
    """Print the figures as a table that fits one screen."""
    figures = found.figures()
    subject = found.subject
    table = Table(title=f"{subject.product}: {subject.method} on {subject.engine} {subject.precision}")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, key in (
        ("I-AUROC", "image_auroc"),
        ("average precision", "image_ap"),
        ("F1-max", "image_f1"),
        ("P-AUROC", "pixel_auroc"),
        ("AUPRO (0.3)", "aupro"),
        ("false alarms at the threshold", "fpr_at_threshold"),
        ("recall at the threshold", "recall_at_threshold"),
    ):
        table.add_row(name, "-" if figures[key] is None else f"{figures[key]:.4f}")
    table.add_row("threshold (raw score)", f"{found.threshold.value:.5g}")
    table.add_row("ms per image", f"{figures['ms_per_image']:.2f}")
    table.add_row("good / defective images", f"{figures['n_good']} / {figures['n_defective']}")
    console.print(table)
    for note in found.notes:
        console.print(note, style="dim", markup=False)


def _check_usage(
    run: Path | None, bundle: Path | None, engine: str | None, precision: str | None, alpha: float
) -> tuple[Engine | None, Precision | None]:
    if (run is None) == (bundle is None):
        raise UsageError("give exactly one of --run and --bundle")
    if run is not None and (engine is not None or precision is not None):
        raise UsageError("--engine and --precision belong to a bundle; a run is judged by torch in float32")
    if not 0.0 < alpha < 1.0:
        raise UsageError(f"--alpha is {alpha:g}; give a probability between 0 and 1, such as 0.01")
    try:
        return Engine(engine) if engine else None, Precision(precision) if precision else None
    except ValueError as error:
        engines, precisions = (", ".join(item.value for item in kind) for kind in (Engine, Precision))
        raise UsageError(f"{error}; --engine is one of {engines}, --precision one of {precisions}") from error


def _evaluate_run(
    run: Run, samples: Sequence[LabelledImage], alpha: float, progress: Progress
) -> tuple[Evaluation, dict[str, dict[str, Any]]]:
    record = run.record
    threshold = fit_threshold(run.holdout_scores(), run.holdout_groups, alpha)
    found = measure(
        run.judge,
        samples,
        preprocessing=record.preprocessing,
        pooling=record.pooling,
        threshold=threshold,
        subject=Subject(record.product, record.method, "torch", Precision.FLOAT32.value),
        progress=progress,
    )
    fields = {"preset", "seed", "train_images", "data_sha256", "validation", "versions", "created"}
    return found, {"Provenance": record.model_dump(mode="json", include=fields)}


def _distillation_section(path: Path) -> dict[str, str]:
    """Return what was tried when the run is a student's: the Pareto front of its candidates."""
    found = Run.load(path).record.distillation
    if found is None:
        return {}
    points = [
        ParetoPoint(
            name=f"{one.trunk}, {one.blocks} blocks, {one.height}x{one.width}, {one.rows} rows",
            milliseconds=one.milliseconds,
            low=one.milliseconds_low,
            high=one.milliseconds_high,
            image_auroc=one.image_auroc,
            bytes=one.bytes,
            note="chosen" if index == found.chosen else "; ".join(one.refused) if one.fits else "over the budget",
            chosen=index == found.chosen,
        )
        for index, one in enumerate(found.candidates)
    ]
    teachers = ", ".join(f"{one.method} on {one.trunk} at {one.height}x{one.width}" for one in found.teachers)
    taught = f"<p>Taught by {html.escape(teachers)}.</p>"
    return {"Students that were tried": taught + pareto_html(points, budget_ms=found.budget_ms)}


def _evaluate_detector(
    detector: Detector, samples: Sequence[LabelledImage], alpha: float, progress: Progress
) -> tuple[Evaluation, dict[str, dict[str, Any]]]:
    bundle, manifest, status = detector.bundle, detector.bundle.manifest, detector.status
    calibration = bundle.calibration(status.engine, status.precision)
    found = measure(
        detector.map_of_canvas,
        samples,
        preprocessing=manifest.preprocessing,
        pooling=manifest.pooling,
        threshold=fit_threshold(calibration.scores, calibration.groups, alpha),
        subject=Subject(manifest.product, manifest.method, status.engine.value, status.precision.value),
        progress=progress,
    )
    if status.fallback_reason:
        note = f"Runs on {status.engine.value} {status.precision.value} instead: {status.fallback_reason}"
        found = replace(found, notes=(*found.notes, _sentence(note)))
    identity = {"bundle": bundle.id, "created": manifest.created.isoformat()}
    return found, {
        "Provenance": identity | manifest.provenance.model_dump(mode="json"),
        "Parity": manifest.parity,
    }


def _sentence(note: str) -> str:
    return note[:1].upper() + note[1:].rstrip(".") + "."
