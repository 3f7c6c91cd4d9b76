"""`lineward threshold`: shows which thresholds budgets mean for a bundle. Knows tables, not how they are made."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (typer needs it at run time)
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edge.errors import BundleError, MissingExtraError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge.bundle import Bundle, Engine, Precision
    from edge.judgement.scope import Scope
    from edge.judgement.table import ThresholdTable
    from edge.settings import BoxSettings, CameraSettings


def threshold(
    bundle: Annotated[Path | None, typer.Option(help="Folder of the bundle.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="A box's YAML file in its place.", show_default=False)] = None,
    camera: Annotated[str | None, typer.Option(help="Only this camera of the box.", show_default=False)] = None,
    product: Annotated[str | None, typer.Option(help="Only this product of the bundle.", show_default=False)] = None,
    engine: Annotated[str | None, typer.Option(help="onnxruntime or openvino; what a box would take.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or int8; what a box would take.")] = None,
    mode: Annotated[str, typer.Option(help="stream or triggered; of a bundle alone.")] = "stream",
    frame_rate: Annotated[float, typer.Option(help="Frames per second; of a bundle alone.")] = 25.0,
    enter_hits: Annotated[int, typer.Option(help="Hits that begin an event; of a bundle alone.")] = 3,
    mask: Annotated[Path | None, typer.Option(help="Mask of the region of interest; of a bundle alone.")] = None,
    min_area: Annotated[float | None, typer.Option(help="Smallest area in pixels; of a bundle alone.")] = None,
    frame_size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT of the camera's frames in pixels.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which thresholds false-alarm budgets mean for a bundle, and which budgets it supports."""
    if (bundle is None) == (config is None):
        raise UsageError("threshold: give either --bundle FOLDER or --config FILE")
    if config is not None:
        from edge.settings import load_settings

        asked = _of_box(load_settings(config), camera)
    else:
        assert bundle is not None
        asked = iter([("", _alone(mode, frame_rate, enter_hits, mask, min_area), bundle, engine, precision)])
    shown: list[ThresholdTable] = []
    opened: dict[Path, Bundle] = {}
    for name, settings, path, its_engine, its_precision in asked:
        if path not in opened:
            from edge.bundle import Bundle

            opened[path] = Bundle.open(path)
        pair = _pair(opened[path], engine or its_engine, precision or its_precision)
        shown += [
            _table(opened[path], pair, settings, _size(frame_size), name, one)
            for one in _products(opened[path], product)
        ]
    if as_json:
        import dataclasses
        import json

        typer.echo(json.dumps([dataclasses.asdict(table) for table in shown], indent=1))
        return
    for table in shown:
        _print(table, opened)


def _of_box(
    settings: BoxSettings, camera: str | None
) -> Iterator[tuple[str, CameraSettings, Path, str | None, str | None]]:
    names = [one.name for one in settings.cameras]
    if camera is not None and camera not in names:
        raise UsageError(f"threshold: no camera {camera!r}; the file has {', '.join(names)}")
    for one in settings.cameras:
        if camera is None or one.name == camera:
            engine = None if settings.engine is None else settings.engine.value
            precision = None if settings.precision is None else settings.precision.value
            yield one.name, one, one.bundle or settings.bundle, engine, precision


def _alone(mode: str, frame_rate: float, enter_hits: int, mask: Path | None, min_area: float | None) -> CameraSettings:
    from pydantic import ValidationError

    from edge.settings import CameraSettings, explain

    content: dict[str, Any] = {
        "name": "camera", "source": {"kind": "folder", "path": "."}, "mode": mode, "frame_rate": frame_rate,
        "events": {"enter_hits": enter_hits, "enter_window": max(enter_hits, 5)},
        "region_of_interest": {"mask": mask}, "min_area": None if min_area is None else {"pixels": min_area},
    }  # fmt: skip
    try:
        return CameraSettings.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"threshold: {explain(error, CameraSettings)}") from error


def _pair(bundle: Bundle, engine: str | None, precision: str | None) -> tuple[Engine, Precision]:
    """What a box would take: an engine that is installed here before others, int8 before float32."""
    from edge.bundle import Engine, Precision
    from edge.inference.engines import available_engines

    engines = (*available_engines(), *Engine)
    numerics = (Precision.INT8, Precision.FLOAT32, *Precision)
    pairs = sorted(bundle.calibrated(), key=lambda pair: (engines.index(pair[0]), numerics.index(pair[1])))
    fitting = [pair for pair in pairs if engine in (None, pair[0].value) and precision in (None, pair[1].value)]
    if not fitting:
        known = ", ".join(f"{one.value} {two.value}" for one, two in pairs)
        raise BundleError(f"{bundle.path}: not calibrated for {engine or ''} {precision or ''}; it is for {known}")
    return fitting[0]


def _products(bundle: Bundle, wanted: str | None) -> tuple[str, ...]:
    """Those that are asked for, each with thresholds of its own; a bundle for one product has one without a name."""
    products = bundle.manifest.products
    if wanted is None:
        return products or ("",)
    if wanted not in products:
        raise UsageError(f"threshold: no product {wanted!r}; the bundle has {', '.join(products) or 'a single one'}")
    return (wanted,)


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    width, x, height = text.partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UsageError(f"--frame-size {text}: write it as WIDTHxHEIGHT, such as 1920x1080")
    return int(height), int(width)


def _table(
    bundle: Bundle,
    pair: tuple[Engine, Precision],
    camera: CameraSettings,
    frame_shape: tuple[int, int] | None,
    name: str,
    product: str,
) -> ThresholdTable:
    from edge.judgement.scope import Scope
    from edge.judgement.table import threshold_table

    region, source = camera.region_of_interest, camera.source
    try:
        drawn = None
        if region.mask is not None:
            from edge.judgement.mask_image import read_mask

            drawn = read_mask(region.mask)
        if frame_shape is None and source.width is not None and source.height is not None:
            frame_shape = (source.height, source.width)
        if frame_shape is None and drawn is not None and not (region.include or region.exclude or camera.min_area):
            frame_shape = (drawn.shape[0], drawn.shape[1])  # a mask alone means the same at any scale
        scope: Scope = Scope.of(region, drawn, camera.min_area)
        return threshold_table(bundle, *pair, camera, scope, frame_shape=frame_shape, name=name, product=product)
    except ModuleNotFoundError as error:
        if (error.name or "") != "cv2":
            raise
        raise MissingExtraError(
            "threshold: a mask or smallest area needs OpenCV: pip install 'lineward[box-cpu]'"
        ) from error


def _print(table: ThresholdTable, bundles: dict[Path, Bundle]) -> None:
    from rich.console import Console
    from rich.table import Table

    if table.camera:
        typer.echo(f"camera     {table.camera}")
    if table.product:
        typer.echo(f"product    {table.product}")
    others = [
        f"{engine.value} {precision.value}"
        for bundle in bundles.values()
        if bundle.id == table.bundle_id
        for engine, precision in bundle.calibrated()
        if (engine, precision) != (table.engine, table.precision)
    ]
    typer.echo(f"bundle     {table.bundle_id}")
    also = f" (also calibrated for {', '.join(others)})" if others else ""
    typer.echo(f"engine     {table.engine.value} {table.precision.value}{also}")
    typer.echo(f"calibrated {table.n} good scores in {table.groups} groups, the highest {table.highest_score:.6g}")
    typer.echo(f"supported  budgets of {table.smallest_budget:.3g} {table.unit} and more")
    shown = Table(box=None, pad_edge=False)
    for heading in (table.unit, "per frame", "threshold", "enter", "leave", "", ""):
        shown.add_column(heading)
    for row in table.rows:
        shown.add_row(
            f"{row.budget:g}", f"{row.alpha:.3g}", *(_figure(x) for x in (row.threshold, row.enter_level,
            row.leave_level)), _word(row.method, supported=row.supported), "<- asked for" if row.chosen else "",
        )  # fmt: skip
    Console(width=120).print(shown)
    for note in table.notes:
        typer.echo(f"note: {note}", err=True)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _word(method: str, *, supported: bool) -> str:
    if supported:
        return "supported"
    return "extrapolated" if method else "too few scores"
