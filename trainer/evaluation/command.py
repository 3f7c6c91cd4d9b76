"""The body of `lineward evaluate`: a run or a bundle on labelled images, or methods under the sub-class shift protocol.

The command line itself is in trainer/cli.py, the measuring in protocol.py and shift.py.
"""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from deploy.evaluation import Evaluation, Subject, write_json, write_whole
from deploy.pareto import ParetoPoint, pareto_html
from deploy.report import write_report
from edge.adaptation.look import Look
from edge.bundle import Bundle, Engine, Precision
from edge.errors import BundleError, DataError, UsageError
from edge.inference.detector import Detector
from edge.judgement.threshold import fit_threshold
from trainer.backbones.registry import build_trunk, trunk_id
from trainer.data.folder import check, content_hash, read_folder
from trainer.data.products import read_products
from trainer.data.texture_ad import By, read_materials
from trainer.data.texture_factory import TextureFactory
from trainer.evaluation.products import (
    ProductsEvaluation,
    Unified,
    evaluate_products,
    products_tables,
    write_products_json,
    write_products_report,
)
from trainer.evaluation.protocol import DEFAULT_ALPHA, LabelledImage
from trainer.evaluation.protocol import evaluate as measure
from trainer.evaluation.shift import evaluate_material
from trainer.evaluation.shift_report import (
    HARD_AUROC,
    HARD_FALSE_POSITIVES,
    ShiftReport,
)
from trainer.evaluation.shift_show import draw, legend, refuse_picture, tables
from trainer.fit import choose_device, versions
from trainer.progress import progress_bars
from trainer.runs import Run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from deploy.progress import Progress
    from trainer.data.subclasses import Material
    from trainer.evaluation.shift import ShiftSettings
    from trainer.evaluation.shift_report import MaterialResult


def evaluate(
    *,
    run: Path | None,
    bundle: Path | None,
    data: Path | Sequence[Path],
    product: Sequence[str] = (),
    json: Path | None = None,
    report: Path | None = None,
    engine: Engine | str | None = None,
    precision: Precision | str | None = None,
    alpha: float = DEFAULT_ALPHA,
) -> Evaluation | ProductsEvaluation:
    """Measure a run or a bundle on the test images of a folder and print the figures.

    One of several products is measured on a folder for each of them, or for some.

    The threshold is frozen before the first test image: it comes from held-out good images, the run's own or those of
    the bundle's calibration for the engine and precision used.

    Args:
        run: folder of a run; or
        bundle: folder of a bundle.
        data: folder in MVTec layout with test images, or several.
        product: of each folder, where the detector is for several; the folder's own name if not given.
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
    folders = [data] if isinstance(data, PurePath) else list(data)
    loaded = Run.load(run) if run is not None else None
    opened = Bundle.open(bundle) if bundle is not None else None
    if loaded.record.products if loaded else opened and opened.manifest.products:
        return _evaluate_products(
            loaded, opened, folders, product, engine=chosen[0], precision=chosen[1], alpha=alpha, json=json,
            report=report,
        )  # fmt: skip
    if len(folders) != 1 or product:
        raise UsageError("--data, --product: this detector is for one product; give one folder, and no name")
    data = folders[0]
    images = read_folder(data)
    if not images.test:
        raise DataError(f"{data / 'test'}: no test images; add test/good and test/<kind of defect>")
    with progress_bars() as progress:
        checked = check(replace(images, train=()), progress=progress)
        samples = [LabelledImage.from_sample(sample) for sample in images.test]
        if loaded is not None:
            found, details = _evaluate_run(loaded, samples, alpha, progress)
        else:
            assert opened is not None
            detector = Detector.open(opened, engine=chosen[0], precision=chosen[1])
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


def _evaluate_products(
    run: Run | None,
    bundle: Bundle | None,
    folders: Sequence[Path],
    names: Sequence[str],
    *,
    engine: Engine | None,
    precision: Precision | None,
    alpha: float,
    json: Path | None,
    report: Path | None,
) -> ProductsEvaluation:
    products = read_products(folders, names, needs_train=False)
    if run is not None:
        detector, details = _unified_run(run), {"Provenance": _provenance(run)}
    else:
        assert bundle is not None
        opened = Detector.open(bundle, engine=engine, precision=precision)
        detector, details = _unified_bundle(opened), {"Parity": bundle.manifest.parity}
    with progress_bars() as progress:
        for one in products:
            check(replace(one.images, train=()), progress=progress)
        found = evaluate_products(detector, products, alpha=alpha, progress=progress)
    if json is not None:
        write_products_json(json, found)
    if report is not None:
        write_products_report(report, found, details)
    console = Console()
    for table in products_tables(found):
        console.print(table)
    for name, one in found.products.items():
        for note in one.notes:
            console.print(f"{name}: {note}", style="dim", markup=False)
    return found


def _unified_run(run: Run) -> Unified:
    record = run.record
    routed = run.see(run.holdout[0])[1] is not None

    def route(canvas: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        found = run.see(canvas)[1]
        assert found is not None
        return found

    return Unified(
        products=record.products,
        subject=Subject(record.product, record.method, "torch", Precision.FLOAT32.value),
        preprocessing=record.preprocessing,
        pooling=record.pooling,
        good=(run.holdout_scores(), run.holdout_groups, run.holdout_subclasses),
        judge=run.judge,
        route=route if routed else None,
    )


def _unified_bundle(detector: Detector) -> Unified:
    manifest, status = detector.bundle.manifest, detector.status
    good = detector.bundle.calibration(status.engine, status.precision)
    if good.products is None:
        raise BundleError(f"{detector.bundle.path}: its calibration names no products; export the bundle again")
    return Unified(
        products=manifest.products,
        subject=Subject(manifest.product, manifest.method, status.engine.value, status.precision.value),
        preprocessing=manifest.preprocessing,
        pooling=manifest.pooling,
        good=(good.scores, good.groups, good.products),
        judge=lambda canvas, product: detector.map_of_canvas(canvas, Look(product)),
        route=detector.route_of_canvas if detector.has_router else None,
    )


def evaluate_shift(
    *,
    settings: ShiftSettings,
    data: Path | None,
    materials: Sequence[str] = (),
    by: By = By.CONDITION,
    json: Path | None = None,
    picture: Path | None = None,
    factory: TextureFactory | None = None,
) -> ShiftReport:
    """Run the Texture-AD protocol: train on some sub-classes of each material, judge these and the others.

    Args:
        settings: methods, rotations and the like.
        data: folder in Texture-AD's layout, one material of it, or a folder in MVTec layout with a meta.csv; None
            generates a stand-in.
        materials: names wanted; empty is all.
        by: how a folder in MVTec layout is seen.
        json: where to write the report, if anywhere.
        picture: PNG or SVG to draw, if any.
        factory: how much of the stand-in to make.

    Returns:
        The report that was printed and written.

    Raises:
        UsageError: a name, number or ending is not known.
        DataError: the data cannot be used, or a file not be written.
        EngineError: a method gave a map with a NaN.
    """
    _check_shift_usage(settings, picture)
    console, drawn = Console(), factory or TextureFactory(seed=settings.seed)
    with progress_bars() as progress:
        results = [
            evaluate_material(material, settings, progress=progress)
            for material in _materials(data, materials, by, factory=drawn, progress=progress)
        ]
    report = ShiftReport(
        data="generated" if data is None else str(data),
        generated=data is None,
        seed=settings.seed,
        rotations=settings.rotations,
        alpha=settings.alpha,
        preset=settings.preset,
        trunk=settings.trunk,
        trunk_sha256=trunk_id(build_trunk(settings.trunk)),
        preprocessing=settings.preprocessing.model_dump(mode="json"),
        versions=versions(),
        materials=tuple(results),
        notes=tuple(_shift_notes(results, generated=data is None)),
    )
    if json is not None:
        write_whole(json, report.text())
    if picture is not None:
        draw(report, picture)
    for table in tables(report):
        console.print(table)
    for note in dict.fromkeys((*legend(report), *report.notes, *_details(results))):
        console.print(note, style="dim", markup=False)
    return report


def _check_shift_usage(settings: ShiftSettings, picture: Path | None) -> None:
    if not settings.methods or len(set(settings.methods)) < len(settings.methods):
        raise UsageError("--methods: name at least one method, and each once, with commas between")
    if len(settings.compare) == 1 or len(set(settings.compare)) < len(settings.compare):
        raise UsageError("--compare: name at least two methods, and each once, with commas between")
    if not 0.0 < settings.alpha < 1.0:
        raise UsageError(f"--alpha is {settings.alpha:g}; give a probability between 0 and 1, such as 0.01")
    if settings.rotations < 1:
        raise UsageError(f"--rotations {settings.rotations}: give at least 1; 5 leave every sub-class out once")
    if settings.seed < 0:
        raise UsageError(f"--seed {settings.seed}: give a whole number of at least 0")
    if picture is not None:
        refuse_picture(picture)
    settings.variants()
    choose_device(settings.device)


def _materials(
    data: Path | None, names: Sequence[str], by: By, *, factory: TextureFactory, progress: Progress
) -> Iterator[Material]:
    """Yield one material after the other: a generated one is let go before the next is drawn."""
    if data is not None:
        yield from read_materials(data, names=names, by=by)
        return
    unknown = sorted({name.lower() for name in names} - set(factory.subclasses))
    if unknown:
        raise UsageError(f"--material {', '.join(unknown)}: choose among {', '.join(factory.subclasses)}")
    wanted = {name.lower() for name in names} or set(factory.subclasses)
    for name in factory.subclasses:
        if name in wanted:
            yield factory.material(name, progress=progress)


def _shift_notes(results: Sequence[MaterialResult], *, generated: bool) -> list[str]:
    notes = []
    if generated:
        notes.append(
            "The images are generated, not Texture-AD's: give --data for those. Their defects are of families that "
            "validation and some methods' training draw from too."
        )
    notes += [
        f"{one.material}: {method.name} loses less than {HARD_AUROC:g} I-AUROC and gains fewer than "
        f"{HARD_FALSE_POSITIVES:g} false positives from seen to unseen: the shift is too easy to compare it by."
        for one in results
        for method in one.methods
        if method.shift_is_real is False
    ]
    return notes


def _details(results: Sequence[MaterialResult]) -> Iterator[str]:
    for one in results:
        yield from (f"{one.material}: {_sentence(note)}" for note in one.notes)
        for method in one.methods:
            for setting, reason in method.unavailable.items():
                yield f"{one.material}: {method.name} has no {setting}: {reason}."
            for rotation in method.rotations:
                yield from (f"{one.material}, rotation {rotation.rotation}: {note}." for note in rotation.notes)


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
    return found, {"Provenance": _provenance(run)}


def _provenance(run: Run) -> dict[str, Any]:
    fields = {"preset", "seed", "train_images", "data_sha256", "validation", "versions", "created"}
    return run.record.model_dump(mode="json", include=fields)


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
