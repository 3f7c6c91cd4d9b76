"""What the command line does where a run or a bundle is of depth maps: train, evaluate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from deploy.evaluation import write_json
from deploy.report import write_report
from edge.bundle import Bundle, Modality
from edge.errors import UsageError
from edge.inference.detector import Detector
from trainer.depth.evaluate import evaluate_depth_bundle, evaluate_depth_run
from trainer.depth.fit import train_depth
from trainer.depth.method import NAME
from trainer.depth.run import DepthRun, is_depth_run
from trainer.evaluation.command import print_figures
from trainer.progress import progress_bars

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from deploy.evaluation import Evaluation
    from edge.bundle import Engine, Precision

_METHODS = ("memory", NAME)


def train(
    *,
    method: str,
    data: Sequence[Path],
    out: Path,
    preset: str,
    seed: int,
    size: tuple[int, int] | None,
    crop: tuple[int, int, int, int] | None,
    near_m: float,
    far_m: float | None,
    product: Sequence[str] | None,
    settings: Mapping[str, object],
) -> DepthRun:
    """Train a depth detector and say what came of it; see :func:`trainer.depth.fit.train_depth`.

    Raises:
        UsageError: another method than memory, several folders, or a value out of range.
        DataError: the folder or a scan cannot be used, or the run cannot be written.
    """
    if method not in _METHODS:
        raise UsageError(f"--method {method}: depth maps are judged by memory alone")
    if len(data) != 1 or len(product or ()) > 1:
        raise UsageError("--data: give one folder of scans; a depth detector knows one product")
    with progress_bars() as progress:
        run = train_depth(
            data=data[0],
            out=out,
            preset=preset,
            seed=seed,
            size=size,
            crop=crop,
            near_m=near_m,
            far_m=far_m,
            product=product[0] if product else None,
            settings=settings,
            progress=progress,
        )
    record = run.record
    Console(stderr=True).print(
        f"{record.method} for {record.product}: {record.train_scans} good scans at {record.preprocessing.height}x"
        f"{record.preprocessing.width}, noise floor {1000 * record.unit_m:.3g} mm, {record.seconds} s, I-AUROC "
        f"{max(record.validation.values()):.3f} on synthetic defects -> {out}"
    )
    return run


def evaluates_depth(run: Path | None, bundle: Path | None) -> bool:
    """Tell whether a run or a bundle is of depth maps; one that cannot be read is none."""
    if run is not None:
        return is_depth_run(run)
    return bundle is not None and bundle.is_dir() and Bundle.open(bundle).manifest.modality is Modality.DEPTH


def evaluate(
    *,
    run: Path | None,
    bundle: Path | None,
    data: Path,
    json: Path | None,
    report: Path | None,
    engine: Engine | None,
    precision: Precision | None,
    alpha: float,
) -> Evaluation:
    """Measure a depth run or bundle on labelled scans, print the figures and write what is asked for.

    Raises:
        UsageError: an engine or precision for a run, or alpha out of range.
        DataError: the folder, the run or an output file cannot be used.
        BundleError: the bundle is damaged or not calibrated for the engine and precision.
    """
    if run is not None and (bundle is not None or engine is not None or precision is not None):
        raise UsageError("--bundle, --engine and --precision belong to a bundle; a run is judged by torch in float32")
    if not 0.0 < alpha < 1.0:
        raise UsageError(f"--alpha is {alpha:g}; give a probability between 0 and 1, such as 0.01")
    with progress_bars() as progress:
        if run is not None:
            found, details = evaluate_depth_run(DepthRun.load(run), data, alpha, progress)
        else:
            assert bundle is not None
            detector = Detector.open(Bundle.open(bundle), engine=engine, precision=precision)
            found, details = evaluate_depth_bundle(detector, data, alpha, progress)
    found = replace(found, notes=(*found.notes, "The images are depth maps, shaded as if lit from the upper left."))
    if json is not None:
        write_json(json, found)
    if report is not None:
        figures = found.figures()
        details["Latency in ms per scan"] = {key: figures[key] for key in ("ms_per_image", "ms_p50", "ms_p99")}
        write_report(report, found, title=f"{found.subject.product}: evaluation of depth maps", details=details)
    print_figures(found, Console())
    return found
