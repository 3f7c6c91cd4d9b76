"""`lineward demo`: the main job once, from images of good parts to alerts, on embedded examples or on own images.

It only puts the other parts in order and shows what they say; whatever it does can be done with the other verbs.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

from edge.errors import DataError, UsageError
from edge.frames import EventPhase

if TYPE_CHECKING:
    from deploy.evaluation import Evaluation
    from edge.alerts.message import Alert
    from edge.bundle import Bundle
    from trainer.evaluation.live import Replay
    from trainer.evaluation.stream import Stream
    from trainer.evaluation.summary import Demonstration

MARKER = ".lineward-demo"
PICTURE = "alert.jpg"
EXAMPLES = ("metal",)
"""A generated web: a photograph has too few independent pieces to calibrate a threshold on."""

TRAIN_IMAGES = 300
"""Of an example; a fifth of them calibrates the threshold."""

LINE_SPEED = 25.0
"""Frames per second at which the replay moves past the box."""

PARTS_PER_SECOND = 1.0
"""What the line is taken to make where every frame is another part; the replay only moves faster."""

HITS, WINDOW = 3, 5
"""A web shows a defect on several frames: so many of so many begin an event."""

LEAST_ALPHA = {True: 0.05, False: 0.01}
"""False-alarm probability per frame that is asked for, by whether frames are parts."""
MOST_ALPHA = 0.2


@dataclass(frozen=True, slots=True)
class Subject:
    """What is shown.

    Attributes:
        name: of the product.
        out: folder for whatever is made of it.
        data: folder in MVTec layout.
        stream: what moves past the camera, with known defects.
        parts: whether every frame is another part (else a web in motion, seen on several frames).
        caveat: what limits the meaning of the figures; empty for one's own images.
    """

    name: str
    out: Path
    data: Path
    stream: Stream
    parts: bool
    caveat: str = ""


def demo(
    data: Annotated[Path | None, typer.Option(help="Folder in MVTec layout; embedded examples if absent.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write; only a folder of an earlier demo is replaced.")] = Path(
        "demo-out"
    ),
    example: Annotated[
        list[str] | None, typer.Option(help="cloth, wafer, metal, brick, gravel or grass; may be repeated.")
    ] = None,
    method: Annotated[str, typer.Option(help="pbas or memory.")] = "memory",
    preset: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
    *,
    fleet: Annotated[
        bool | None,
        typer.Option(
            "--fleet/--no-fleet",
            help="Also show three boxes that share a memory; by default without --data or --example.",
        ),
    ] = None,
) -> None:
    """Train, pack, run a box, replay a line with defects, show the alerts, and let a fleet share what it learns."""
    started = time.monotonic()
    console = Console()
    kinds = _kinds(data, example)
    out = prepare_folder(out)
    console.rule("Images")
    if data is not None:
        subjects = [_own_images(data, out, seed, console)]
    else:
        subjects = [_embedded_example(kind, out / kind, seed, console) for kind in kinds]
    shown = [_show(subject, method=method, preset=preset, seed=seed, console=console) for subject in subjects]
    console.rule("Summary")
    _summarise(console, subjects, shown)
    if fleet if fleet is not None else data is None and not example:
        from trainer.demo_fleet import show_fleet

        show_fleet(out / "fleet", preset=preset, seed=seed, console=console)
    console.print(f"{time.monotonic() - started:.0f} s in all", highlight=False)


def _show(subject: Subject, *, method: str, preset: str, seed: int, console: Console) -> Demonstration:
    from trainer.evaluation.picture import write_alert_picture
    from trainer.evaluation.summary import Demonstration, frames_per_second

    bundle = _make_bundle(subject, method=method, preset=preset, seed=seed, console=console)
    alpha = affordable_alpha(bundle, parts=subject.parts)
    console.rule(f"{subject.name}: test images")
    found = _evaluate(bundle, subject, alpha=alpha)
    console.rule(f"{subject.name}: broker, box and subscriber")
    result = _replay(bundle, subject, console, alpha=alpha)
    strongest = max(result.alerts, key=lambda alert: alert.score or 0.0, default=None)
    if strongest is not None:
        write_alert_picture(bundle, sorted(subject.stream.path.iterdir()), strongest, subject.out / PICTURE)
    speed = frames_per_second(bundle, subject.stream.path)
    return Demonstration(subject.name, subject.parts, subject.stream, found, result, speed)


def _kinds(data: Path | None, example: list[str] | None) -> tuple[str, ...]:
    from trainer.data.conveyor import KINDS

    if data is not None and example:
        raise UsageError("--data and --example: give one of them")
    for kind in example or ():
        if kind not in KINDS:
            raise UsageError(f"--example {kind}: unknown; choose from {', '.join(KINDS)}")
    return tuple(dict.fromkeys(example or EXAMPLES))


def prepare_folder(out: Path) -> Path:
    """Empty the folder of an earlier demo, and no other.

    Raises:
        UsageError: the folder holds something that no demo wrote.
    """
    out = out.resolve()
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise UsageError(f"--out {out}: holds files that no demo wrote; choose a new folder, nothing was changed")
        for entry in out.iterdir():
            if entry.name != MARKER:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKER).write_text("Everything beside this file is replaced by the next demo.\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error
    return out


def _own_images(data: Path, out: Path, seed: int, console: Console) -> Subject:
    from trainer.data.folder import read_folder
    from trainer.evaluation.stream import arrange, write_stream

    images = read_folder(data)
    if not images.test:
        raise DataError(
            f"{data / 'test'}: no test images, so there is nothing to replay; add test/good and test/<kind of defect>, "
            "or use `lineward train`, which needs none"
        )
    stream = write_stream(arrange(images.test, seed=seed), out / "stream")
    console.print(
        f"{data}: {len(images.train)} good images to learn from, {len(images.test)} to test on; the replay shows "
        f"{len(stream.labels)} of them, one part per frame, {len(stream.defects)} defective",
        highlight=False,
    )
    for note in images.notes:
        console.print(f"note: {note}", style="dim", markup=False)
    return Subject(data.resolve().name, out, data, stream, parts=True)


def _embedded_example(kind: str, out: Path, seed: int, console: Console) -> Subject:
    from trainer.data.conveyor import independent_crops, write_default, write_replay
    from trainer.data.folder import read_folder
    from trainer.data.textures import TEXTURES
    from trainer.evaluation.stream import Stream
    from trainer.progress import progress_bars

    with progress_bars() as progress:
        data = write_default(out / "data", seed=seed, kind=kind, train=TRAIN_IMAGES, progress=progress)
        web = write_replay(out / "replay", seed=seed, kind=kind, progress=progress)
    images = read_folder(data)
    crops = independent_crops(kind, train=len(images.train), test=len(images.test))
    source = "a generated texture" if kind in TEXTURES else "a photograph"
    caveat = (
        f"{kind} is {source} with synthetic defects: {crops.train} independent pieces of surface to learn from and to "
        f"calibrate on, {crops.test} to test on"
    )
    console.print(caveat, highlight=False)
    return Subject(kind, out, data, Stream(web.frames, web.labels), parts=False, caveat=caveat)


def _make_bundle(subject: Subject, *, method: str, preset: str, seed: int, console: Console) -> Bundle:
    from edge.bundle import Bundle
    from trainer.export import export_run, refused
    from trainer.fit import train
    from trainer.progress import progress_bars

    out = subject.out
    console.rule(f"{subject.name}: training on good parts")
    with progress_bars() as progress:
        run = train(
            method=method,
            data=subject.data,
            out=out / "run",
            product=subject.name,
            preset=preset,
            seed=seed,
            progress=progress,
        )
    console.rule(f"{subject.name}: export, int8, parity, bundle")
    with progress_bars() as progress:
        packed = export_run(run.path, out / "bundle", progress=progress)
    for text in refused(packed):
        console.print(f"left out by the parity gate: {text}", style="yellow", markup=False)
    bundle = Bundle.open(packed.path)
    console.print(f"bundle {bundle.id[:12]}, {_megabytes(bundle.path):.1f} MB, verified", highlight=False)
    return bundle


def _evaluate(bundle: Bundle, subject: Subject, *, alpha: float) -> Evaluation:
    from trainer.evaluation.command import evaluate

    return evaluate(
        run=None,
        bundle=bundle.path,
        data=subject.data,
        json=subject.out / "metrics.json",
        report=subject.out / "report.html",
        alpha=alpha,
    )


def _replay(bundle: Bundle, subject: Subject, console: Console, *, alpha: float) -> Replay:
    from deploy.embedded_broker import EmbeddedBroker
    from trainer.evaluation.live import replay

    out = subject.out
    settings = box_settings(subject, bundle, alpha=alpha)
    config = out / "box.yaml"
    with EmbeddedBroker() as broker, (out / "alerts.jsonl").open("w", encoding="utf-8") as file:
        settings["broker"] = {"url": broker.url}
        config.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        console.print(f"lineward run --config {_shown(config)}", style="bold", highlight=False)
        console.print(f"lineward watch --broker {broker.url}  ({broker.program})", style="bold", highlight=False)

        def show(alert: Alert) -> None:
            file.write(alert.model_dump_json(by_alias=True) + "\n")
            # A part has gone by the next frame, so only a web's alerts have an end worth showing.
            if alert.phase is EventPhase.NEW or not subject.parts:
                console.print(alert_line(alert, subject.stream), highlight=False, markup=False)

        limit = 120 + 2 * len(subject.stream.labels) / LINE_SPEED
        return replay(config, broker=broker.url, log=out / "box.log", on_alert=show, timeout=limit)


def affordable_alpha(bundle: Bundle, *, parts: bool) -> float:
    """Return the false-alarm probability per frame to ask for, no more than one frame in five.

    For a web it is what the calibration images support at the least, since an event takes several frames. For parts it
    is twice that: at the limit itself the threshold is the highest score, which one odd image decides.
    """
    groups = min(len(set(bundle.calibration(*pair).groups.tolist())) for pair in bundle.calibrated())
    return min(MOST_ALPHA, max(LEAST_ALPHA[parts], (2 if parts else 1) / (groups + 1)))


def box_settings(subject: Subject, bundle: Bundle, *, alpha: float) -> dict[str, Any]:
    """Return the settings file of the demo's box, without its broker.

    Args:
        subject: what moves past the camera.
        bundle: what judges.
        alpha: false-alarm probability per frame.
    """
    hits, window = (1, 1) if subject.parts else (HITS, WINDOW)
    events: dict[str, float] = {"enter_hits": hits, "enter_window": window, "leave_calm": window}
    if subject.parts:
        events["leave_quantile"] = 0.999  # every part stands alone: the first below the threshold ends an event
    rate = PARTS_PER_SECOND if subject.parts else LINE_SPEED
    return {
        "site": "demo",
        "box": "box-1",
        "state_dir": "state",
        "bundle": bundle.path.name,
        "cameras": [
            {
                "name": "cam-1",
                "mode": "stream",
                "source": {
                    "kind": "folder",
                    "path": str(subject.stream.path.relative_to(subject.out)),
                    "fps": LINE_SPEED,
                },
                "frame_rate": rate,
                # Rounded up: a little less would already be more than the calibration images support.
                "budget": {"false_events_per_hour": math.ceil(alpha * rate * 3600 / hits * 1000) / 1000},
                "events": events,
            }
        ],
    }


def alert_line(alert: Alert, stream: Stream) -> str:
    """Return one line of at most 80 characters that shows an alert, with the truth of its frame at its end."""
    frame = min(alert.camera_seq, len(stream.labels) - 1)
    if alert.phase is not EventPhase.NEW:
        return f"{alert.phase.value:6} frame {frame:4}"
    where = "".join(f"{r.w}x{r.h} at {r.x},{r.y}" for r in alert.regions[:1])
    score = "no score" if alert.score is None else f"{alert.score:.2f}"
    threshold = "" if alert.threshold is None else f" >= {alert.threshold:.2f}"
    truth = stream.labels[frame] or "good"
    return f"{alert.phase.value:6} frame {frame:4}  score {score + threshold:16} {where:22} truth: {truth}"


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _summarise(console: Console, subjects: list[Subject], shown: list[Demonstration]) -> None:
    from trainer.evaluation.summary import summary_table

    console.print(summary_table(shown))
    for subject, one in zip(subjects, shown, strict=True):
        if subject.caveat:
            console.print(f"demonstration only: {subject.caveat}", style="yellow", markup=False)
        for warning in one.result.status.warnings if one.result.status else ():
            console.print(f"{subject.name}, {warning}", style="dim", markup=False)
    for subject in subjects:
        files = ("report.html", "alerts.jsonl", PICTURE, "box.yaml")
        found = [_shown(subject.out / file) for file in files if (subject.out / file).exists()]
        console.print("  ".join(found), highlight=False, markup=False)
