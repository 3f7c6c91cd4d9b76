"""The trainer's verbs: train, distill, evaluate, export, canaries. Heavy imports wait until a verb is called."""

from __future__ import annotations

from enum import Enum
from pathlib import Path  # noqa: TC003 (typer reads the annotations at run time)
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from edge.errors import UsageError

if TYPE_CHECKING:
    from trainer.data.texture_factory import TextureFactory

Choice = TypeVar("Choice", bound=Enum)


def _parse_size(size: str | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, cross, width = size.lower().partition("x")
    try:
        return int(height), int(width if cross else height)
    except ValueError as error:
        raise UsageError(f"--size {size}: give pixels as 224 or HEIGHTxWIDTH, multiples of 32") from error


def _parse_crop(crop: str | None) -> tuple[int, int, int, int] | None:
    if crop is None:
        return None
    try:
        x, y, w, h = (int(part) for part in crop.split(","))
    except ValueError as error:
        raise UsageError(f"--crop {crop}: give X,Y,WIDTH,HEIGHT in pixels of the camera frame") from error
    return x, y, w, h


def _parse_tiles(tiles: str) -> tuple[int, int]:
    rows, _, cols = tiles.lower().partition("x")
    try:
        return int(rows), int(cols)
    except ValueError as error:
        raise UsageError(f"--tiles {tiles}: give ROWSxCOLS, such as 2x3") from error


def _parse_choice(option: str, value: str | None, kind: type[Choice]) -> Choice | None:
    if value is None:
        return None
    try:
        return kind(value)
    except ValueError as error:
        known = ", ".join(member.value for member in kind)
        raise UsageError(f"--{option} {value}: unknown; choose one of {known}") from error


def _parse_settings(given: list[str]) -> dict[str, str]:
    settings = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not equals or not name or name in settings:
            raise UsageError(f"--set {one}: give NAME=VALUE, each name once")
        settings[name] = value
    return settings


def train(
    data: Annotated[
        list[Path],
        typer.Option(help="Folder in MVTec layout; only train/good is read. Repeat it: one run for several products."),
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    method: Annotated[
        str | None,
        typer.Option(
            help="Image: memory (default), pbas, fader, hetnet, feddymem, adapted_moe, uniad, onenip or prototypes. "
            "Signal: pca_residual (default) or mmae_ecg. Depth: memory.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    size: Annotated[
        str | None, typer.Option(help="Network input: 224, HEIGHTxWIDTH (multiples of 32); default 224.")
    ] = None,
    tiles: Annotated[str, typer.Option(help="Cut the image into ROWSxCOLS network inputs.")] = "1x1",
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring tiles share, a multiple of 32.")] = 0,
    crop: Annotated[str | None, typer.Option(help="X,Y,WIDTH,HEIGHT of the part in the camera frame.")] = None,
    resize: Annotated[
        str, typer.Option(help="pyramid sees every pixel; linear is 1 ms faster on 1080p and may miss thin defects.")
    ] = "pyramid",
    product: Annotated[
        list[str] | None, typer.Option(help="Name of the product, one for each --data; default: the folder's name.")
    ] = None,
    router: Annotated[
        bool, typer.Option(help="Of several products: let the detector tell by itself which one it sees.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    trunk: Annotated[str, typer.Option(help="lite0, or lite2: slower, a teacher for `lineward distill`.")] = "lite0",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the method: rows_precision=int8; repeatable.")
    ] = None,
    modality: Annotated[
        str, typer.Option(help="image; signal: --data has recordings; depth: --data has scans (docs/depth.md).")
    ] = "image",
    window: Annotated[
        float | None,
        typer.Option(help="Signal: seconds that are judged at once; default: 2, of PTB-XL a whole record."),
    ] = None,
    hop: Annotated[float | None, typer.Option(help="Signal: seconds between windows; default: half a window.")] = None,
    low_hz: Annotated[float | None, typer.Option(help="Signal: take off what is slower, such as a drift.")] = None,
    high_hz: Annotated[float | None, typer.Option(help="Signal: take off what is faster, such as noise.")] = None,
    near: Annotated[float, typer.Option(help="Depth: metres; nearer points are not of the part.")] = 0.0,
    far: Annotated[float | None, typer.Option(help="Depth: metres; further points are not of the part.")] = None,
) -> None:
    """Learn what good parts look like."""
    from rich.console import Console

    from edge.bundle import Resize
    from trainer.fit import preprocessing_for
    from trainer.fit import train as fit
    from trainer.progress import progress_bars

    if method is None:
        method = "pca_residual" if modality == "signal" else "memory"
    if modality == "signal":
        from trainer.signals.command import train_signal

        train_signal(
            method=method, data=data, out=out, window_s=window, hop_s=hop, low_hz=low_hz, high_hz=high_hz,
            preset=preset, seed=seed, product=product, device=device, settings=_parse_settings(settings or []),
        )  # fmt: skip
        return
    if modality == "depth":
        from trainer.depth.command import train as train_depth

        train_depth(
            method=method, data=data, out=out, preset=preset, seed=seed, size=_parse_size(size),
            crop=_parse_crop(crop), near_m=near, far_m=far, product=product, settings=_parse_settings(settings or []),
        )  # fmt: skip
        return
    if modality != "image":
        raise UsageError(f"--modality {modality}: unknown; choose image, signal or depth")
    wanted = preprocessing_for(
        size=_parse_size(size),
        tiles=_parse_tiles(tiles),
        overlap=overlap,
        crop=_parse_crop(crop),
        resize=_parse_choice("resize", resize, Resize) or Resize.PYRAMID,
    )
    with progress_bars() as progress:
        run = fit(
            method=method,
            data=data,
            out=out,
            preset=preset,
            seed=seed,
            preprocessing=wanted,
            product=product,
            router=router,
            device=device,
            trunk=trunk,
            settings=_parse_settings(settings or []),
            progress=progress,
        )
    record = run.record
    best = max(record.validation.values())
    Console(stderr=True).print(
        f"{record.method} for {record.product}: {record.train_images} good images at "
        f"{record.preprocessing.canvas_height}x{record.preprocessing.canvas_width}, {record.seconds} s, "
        f"I-AUROC {best:.3f} on synthetic defects -> {out}"
    )


def _parse_numbers(option: str, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError as error:
        raise UsageError(f"--{option} {value}: give whole numbers with commas between, such as 160,224") from error


def distill(
    teacher: Annotated[list[Path], typer.Option(help="Run folder of a teacher; several are an ensemble.")],
    data: Annotated[Path, typer.Option(help="The folder that the teachers learned from; only train/good is read.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    budget_ms: Annotated[
        float | None, typer.Option(help="Processor milliseconds on one thread for trunk and head in int8.")
    ] = None,
    preset: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    trunk: Annotated[str, typer.Option(help="Network of the students: lite0 or lite2.")] = "lite0",
    blocks: Annotated[str | None, typer.Option(help="Blocks of it to keep, to be tried: 6,11.")] = None,
    sizes: Annotated[str | None, typer.Option(help="Input heights in pixels, to be tried: 160,224.")] = None,
    rows: Annotated[str | None, typer.Option(help="Rows of a level's bank, to be tried: 64,256.")] = None,
    students: Annotated[int, typer.Option(help="How many of those that fit are trained.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Teach small students what trained detectors know, and keep the best that fits the budget."""
    from rich.console import Console

    from trainer.distill import command
    from trainer.progress import progress_bars

    with progress_bars() as progress:
        run = command.distill(
            teachers=teacher,
            data=data,
            out=out,
            budget_ms=budget_ms,
            preset=preset,
            trunk=trunk,
            blocks=_parse_numbers("blocks", blocks) or command.BLOCKS,
            sizes=_parse_numbers("sizes", sizes) or command.SIZES,
            rows=_parse_numbers("rows", rows) or command.ROWS,
            students=students,
            device=device,
            progress=progress,
        )
    found = run.record.distillation
    assert found is not None
    best = found.candidates[found.chosen]
    Console(stderr=True).print(
        f"student for {run.record.product}: {best.blocks} blocks of {best.trunk} at {best.height}x{best.width}, "
        f"{best.milliseconds:.2f} ms ({best.engine} {best.precision}, one thread), I-AUROC {best.image_auroc:.3f} on "
        f"synthetic defects; {len(found.candidates)} trained, {run.record.seconds} s -> {out}"
    )


def evaluate(
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of labelled images in MVTec layout, repeated for several products; or what a protocol reads "
            "(docs/shift.md)."
        ),
    ] = None,
    product: Annotated[
        list[str] | None, typer.Option(help="Product of each --data, of a detector for several; default: its name.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="A run folder (torch).")] = None,
    bundle: Annotated[Path | None, typer.Option(help="A bundle (the engine of a box).")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    engine: Annotated[str | None, typer.Option(help="onnxruntime or openvino.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or int8.")] = None,
    alpha: Annotated[float, typer.Option(help="False-alarm rate per image that the threshold is set for.")] = 0.01,
    protocol: Annotated[
        str | None, typer.Option(help="texture-ad: train on some sub-classes, judge others; generated without --data.")
    ] = None,
    material: Annotated[list[str] | None, typer.Option(help="Protocol: material to take; repeatable.")] = None,
    methods: Annotated[
        str, typer.Option(help="Protocol: methods to train, with commas between; method:setting=value changes one.")
    ] = "",
    compare: Annotated[str, typer.Option(help="Protocol: the same, to compare in pairs.")] = "",
    images: Annotated[
        str, typer.Option(help="Protocol: generated images per sub-class, such as 24,16,24: train, good, defective.")
    ] = "",
    side: Annotated[int | None, typer.Option(help="Protocol: height and width of generated images in pixels.")] = None,
    rotations: Annotated[int, typer.Option(help="Protocol: trainings, each leaving other sub-classes out.")] = 5,
    by: Annotated[
        str, typer.Option(help="Protocol: what makes sub-classes of an MVTec folder: condition or time.")
    ] = "condition",
    picture: Annotated[Path | None, typer.Option(help="Protocol or signal: draw, PNG or SVG.")] = None,
    preset: Annotated[str, typer.Option(help="Protocol: quick or full.")] = "quick",
    seed: Annotated[int, typer.Option(help="Protocol: seed of splits, methods and generated images.")] = 0,
    size: Annotated[str | None, typer.Option(help="Protocol: network input, such as 224.")] = None,
    device: Annotated[str, typer.Option(help="Protocol: auto, cpu or cuda.")] = "auto",
) -> None:
    """Judge test images and print the figures; or train and judge methods under a protocol."""
    from edge.bundle import Engine, Precision

    if protocol is None:
        from trainer.evaluation.command import evaluate as judge

        if not data:
            raise UsageError("--data: missing; give a folder of labelled images, or --protocol texture-ad")
        from trainer.signals.command import evaluates_signal

        if evaluates_signal(run, bundle):
            from trainer.signals.evaluate import evaluate_signal

            evaluate_signal(
                run=run, bundle=bundle, data=_only(data), json=json, report=report, picture=picture, alpha=alpha,
                engine=_parse_choice("engine", engine, Engine),
                precision=_parse_choice("precision", precision, Precision),
            )  # fmt: skip
            return
        from trainer.depth.command import evaluate as evaluate_depth
        from trainer.depth.command import evaluates_depth

        if evaluates_depth(run, bundle):
            evaluate_depth(
                run=run, bundle=bundle, data=_only(data), json=json, report=report, alpha=alpha,
                engine=_parse_choice("engine", engine, Engine),
                precision=_parse_choice("precision", precision, Precision),
            )  # fmt: skip
            return
        if material or methods or compare or images or side or picture:
            raise UsageError(
                "--material, --methods, --compare, --images, --side and --picture belong to --protocol texture-ad"
            )
        judge(
            run=run,
            bundle=bundle,
            data=data,
            product=product or (),
            json=json,
            report=report,
            engine=_parse_choice("engine", engine, Engine),
            precision=_parse_choice("precision", precision, Precision),
            alpha=alpha,
        )
        return
    if protocol != "texture-ad":
        raise UsageError(f"--protocol {protocol}: unknown; there is texture-ad")
    if run or bundle or report or engine or precision or product:
        raise UsageError(
            "--protocol trains methods itself: leave out --run, --bundle, --report, --engine, --precision, --product"
        )
    folder = _only(data) if data else None
    from trainer.data.texture_ad import By
    from trainer.evaluation.command import evaluate_shift
    from trainer.evaluation.shift import ShiftSettings
    from trainer.evaluation.shift_variants import COMPARED
    from trainer.fit import preprocessing_for
    from trainer.methods.registry import methods as registered

    evaluate_shift(
        settings=ShiftSettings(
            methods=tuple(methods.split(",")) if methods else tuple(registered()),
            # A run that chooses nothing answers the usual question too.
            compare=tuple(compare.split(",")) if compare else () if methods else COMPARED,
            preset=preset,
            seed=seed,
            rotations=rotations,
            alpha=alpha,
            preprocessing=preprocessing_for(size=_parse_size(size), tiles=(1, 1), overlap=0, crop=None),
            device=device,
        ),
        data=folder,
        materials=material or (),
        by=_parse_choice("by", by, By) or By.CONDITION,
        json=json,
        picture=picture,
        factory=_parse_factory(images, side, seed, folder),
    )


def _only(data: list[Path]) -> Path:
    if len(data) > 1:
        raise UsageError("--data: given several times, but only a detector of several products is judged on several")
    return data[0]


def _parse_factory(images: str, side: int | None, seed: int, data: Path | None) -> TextureFactory | None:
    from trainer.data.texture_factory import TextureFactory

    if not images and side is None:
        return None
    if data is not None:
        raise UsageError("--images and --side are of generated images; leave them out where --data gives some")
    counts = images.split(",") if images else []
    if len(counts) not in {0, 3} or not all(count.isdecimal() for count in counts):
        raise UsageError(f"--images {images}: give three whole numbers, such as 24,16,24")
    named = dict(zip(("train", "good", "defective"), map(int, counts), strict=False))
    try:
        return TextureFactory(seed=seed, **named, **({} if side is None else {"side": side}))
    except ValueError as error:
        raise UsageError(f"--images, --side: {error}") from error


def export(
    run: Annotated[Path, typer.Option(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to write.")],
    precision: Annotated[
        str,
        typer.Option(help="auto: int8 beside float32 unless the gate refuses it; int8: exit 4 then; or float32."),
    ] = "auto",
) -> None:
    """Export, quantise, check parity and pack a bundle for boxes."""
    from trainer.depth.export import export_depth
    from trainer.depth.run import is_depth_run
    from trainer.export import export_run, refused
    from trainer.progress import progress_bars
    from trainer.signals.export import export_signal_run
    from trainer.signals.runs import is_signal_run

    with progress_bars() as progress:
        pack = export_signal_run if is_signal_run(run) else export_depth if is_depth_run(run) else export_run
        bundle = pack(run, out, precision=precision, progress=progress)
    for text in refused(bundle):
        typer.echo(f"left out by the parity gate: {text}", err=True)
    typer.echo(f"{bundle.path}  {bundle.id}")


def canaries(
    bundle: Annotated[Path, typer.Option(help="Bundle of a method whose memory boxes share.")],
    data: Annotated[Path, typer.Option(help="Folder in MVTec layout; good images of train/good become canaries.")],
    out: Annotated[Path, typer.Option(help="File to write, into the aggregator's folder of canaries: NAME.npz.")],
    engine: Annotated[str | None, typer.Option(help="onnxruntime or openvino.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or int8: one file for each that boxes run.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the defects.")] = 0,
) -> None:
    """Write what an aggregator tests updates with: rows of synthetic defects and of good parts."""
    from edge.bundle import Bundle, Engine, Precision
    from trainer.canaries import write_canaries
    from trainer.progress import progress_bars

    with progress_bars() as progress:
        made = write_canaries(
            Bundle.open(bundle),
            data,
            out,
            engine=_parse_choice("engine", engine, Engine),
            precision=_parse_choice("precision", precision, Precision),
            seed=seed,
            progress=progress,
        )
    typer.echo(f"{out}  {len(made.defect)} rows of defects, {len(made.good)} of good parts  {made.embedding_id}")
