"""`lineward demo`: the main job once, from images of good parts to alerts, on the embedded example or one's own images.

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

from edge.errors import DataError, GateError, UsageError
from edge.frames import EventPhase

if TYPE_CHECKING:
    from deploy.evaluation import Evaluation
    from edge.alerts.message import Alert
    from edge.bundle import Bundle
    from trainer.evaluation.live import Replay
    from trainer.evaluation.stream import Stream

Row = tuple[str, str, str]
"""Figure, value, and what it is a figure of."""

MARKER = ".lineward-demo"
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
        data: folder in MVTec layout.
        stream: what moves past the camera, with known defects.
        parts: whether every frame is another part (else a web in motion, seen on several frames).
        caveats: what limits the meaning of the figures, one sentence each.
    """

    data: Path
    stream: Stream
    parts: bool
    caveats: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What the summary is about: figures on test images, the replay, and rows on speed."""

    subject: Subject
    found: Evaluation
    result: Replay
    speed: list[Row]


def demo(
    data: Annotated[Path | None, typer.Option(help="Folder in MVTec layout; the embedded example if absent.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write; only a folder of an earlier demo is replaced.")] = Path(
        "demo-out"
    ),
    method: Annotated[str, typer.Option(help="pbas or memory.")] = "memory",
    preset: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    seed: Annotated[int, typer.Option(help="Seed of every random choice.")] = 0,
) -> None:
    """Train, pack, run a box, replay a line with defects, show the alerts."""
    started = time.monotonic()
    console = Console()
    out = prepare_folder(out)
    console.rule("1 of 6  Images")
    subject = _own_images(data, out, seed, console) if data is not None else _embedded_example(out, seed, console)
    bundle = _make_bundle(subject, out, method=method, preset=preset, seed=seed, console=console)
    console.rule("4 of 6  Test images")
    alpha = affordable_alpha(bundle, parts=subject.parts)
    found = _evaluate(bundle, subject, out, alpha=alpha)
    console.rule("5 of 6  Replay: broker, box, subscriber")
    result = _replay(bundle, subject, out, console, alpha=alpha)
    console.rule("6 of 6  Summary")
    speed = speed_rows(bundle, subject.stream, result)
    _summarise(console, Demonstration(subject, found, result, speed), out, seconds=time.monotonic() - started)


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
    return Subject(data, stream, parts=True, caveats=())


def _make_bundle(subject: Subject, out: Path, *, method: str, preset: str, seed: int, console: Console) -> Bundle:
    from edge.bundle import Bundle
    from trainer.export import export_run
    from trainer.fit import train
    from trainer.progress import progress_bars

    console.rule("2 of 6  Training on good parts")
    with progress_bars() as progress:
        run = train(
            method=method,
            data=subject.data,
            out=out / "run",
            preset=preset,
            seed=seed,
            progress=progress,
        )
    console.rule("3 of 6  Export, int8, parity, bundle")
    try:
        with progress_bars() as progress:
            packed = export_run(run.path, out / "bundle", precision="int8", progress=progress)
    except GateError as error:
        # With a handful of good images int8 can shift scores by a visible share of their spread; float32 cannot.
        console.print(f"{error}; packing float32 alone", style="yellow", markup=False)
        with progress_bars() as progress:
            packed = export_run(run.path, out / "bundle", precision="float32", progress=progress)
    bundle = Bundle.open(packed.path)
    console.print(f"bundle {bundle.id[:12]}, {_megabytes(bundle.path):.1f} MB, verified", highlight=False)
    return bundle


def _evaluate(bundle: Bundle, subject: Subject, out: Path, *, alpha: float) -> Evaluation:
    from trainer.evaluation.command import evaluate

    return evaluate(
        run=None,
        bundle=bundle.path,
        data=subject.data,
        json=out / "metrics.json",
        report=out / "report.html",
        alpha=alpha,
    )


def _replay(bundle: Bundle, subject: Subject, out: Path, console: Console, *, alpha: float) -> Replay:
    from deploy.embedded_broker import EmbeddedBroker
    from trainer.evaluation.live import replay

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
    """Return the false-alarm probability per frame to ask for.

    It is twice what the calibration images support at the least, since at the limit itself the threshold is their
    highest score, which one odd image decides; but no more than one frame in five.
    """
    groups = min(len(set(bundle.calibration(*pair).groups.tolist())) for pair in bundle.calibrated())
    return min(MOST_ALPHA, max(LEAST_ALPHA[parts], 2 / (groups + 1)))


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
                "source": {"kind": "folder", "path": subject.stream.path.name, "fps": LINE_SPEED},
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


def _summarise(console: Console, demonstration: Demonstration, out: Path, *, seconds: float) -> None:
    from rich.table import Table

    found, result = demonstration.found, demonstration.result
    table = Table(title=f"{found.subject.product}: {found.subject.method}", show_header=False, title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("of", style="dim")
    for row in accuracy_rows(found) + demonstration.speed:
        table.add_row(*row)
    table.add_section()
    for row in replay_rows(demonstration.subject, result, alpha=found.threshold.alpha):
        table.add_row(*row)
    console.print(table)
    for caveat in demonstration.subject.caveats:
        console.print(f"demonstration only: {caveat}", style="yellow", markup=False)
    for warning in result.status.warnings if result.status else ():
        console.print(f"box: {warning}", style="dim", markup=False)
    for name, file in (("report", "report.html"), ("alerts", "alerts.jsonl"), ("settings", "box.yaml")):
        console.print(f"{name:10}{_shown(out / file)}", highlight=False)
    console.print(f"{seconds:.0f} s in all", highlight=False)


def accuracy_rows(found: Evaluation) -> list[Row]:
    """Return rows on the test images; figures that need masks are absent without them."""
    figures = found.figures()
    of = f"{figures['n_defective']} defective, {figures['n_good']} good test images"
    return [
        (name, "-" if figures[key] is None else f"{figures[key]:.4f}", of if figures[key] is not None else "no masks")
        for name, key in (("I-AUROC", "image_auroc"), ("P-AUROC", "pixel_auroc"), ("AUPRO (0.3)", "aupro"))
    ]


def replay_rows(subject: Subject, result: Replay, *, alpha: float) -> list[Row]:
    """Return rows on what the replay found, missed and raised for nothing."""
    from trainer.evaluation.replay import score_replay

    labels = subject.stream.labels
    # A web's event may begin a few frames after the defect has left; a part's event is its own.
    score = score_replay(
        subject.stream.defects,
        result.events(len(labels) - 1),
        delay=0 if subject.parts else WINDOW - 1,
        lasting=not subject.parts,
    )
    kinds = sorted({span.label for span in score.missed})
    good = labels.count("")
    expected = f"; {alpha * good:.0f} allowed" if subject.parts else ""
    return [
        ("defects found", f"{len(score.found)} of {len(subject.stream.defects)}", f"replay of {len(labels)} frames"),
        ("missed defects", str(len(score.missed)), ", ".join(kinds)),
        ("false alarms", str(len(score.false_alarms)), f"on {good} good frames{expected}"),
    ]


def speed_rows(bundle: Bundle, stream: Stream, result: Replay) -> list[Row]:
    """Return rows on speed: measured here, by the box's own status, and as the subscriber saw it."""
    import numpy as np

    rate, runs_on = frames_per_second(bundle, stream)
    rows: list[Row] = [("frames per second", f"{rate:.0f}", f"decoded frame to map, {runs_on}")]
    total = result.status.latency_ms.get("total") if result.status else None
    if total:
        rows.append(("latency p50 / p99", f"{total['p50']:.1f} / {total['p99']:.1f} ms", "capture to verdict"))
    received = result.latency_ms()
    if received.size:
        p50, p99 = np.percentile(received, [50, 99])
        rows.append(("", f"{p50:.1f} / {p99:.1f} ms", "capture to subscriber"))
    return rows


def frames_per_second(bundle: Bundle, stream: Stream, *, seconds: float = 2.0) -> tuple[float, str]:
    """Measure how many frames a detector judges on this machine, and say on what it runs."""
    from datetime import datetime, timezone

    import cv2

    from edge.frames import Frame
    from edge.inference.detector import Detector

    detector = Detector.open(bundle)
    images = [image for path in sorted(stream.path.iterdir())[:16] if (image := cv2.imread(str(path))) is not None]
    now = datetime.now(timezone.utc)
    frames = [
        Frame(image=image, camera="cam-1", camera_seq=i, captured_ns=0, captured_at=now)
        for i, image in enumerate(images)
    ]
    count, started = 0, time.monotonic()
    while (spent := time.monotonic() - started) < seconds:
        detector.predict(frames[count % len(frames)])
        count += 1
    return count / spent, f"{detector.status.engine.value} {detector.status.precision.value}"
