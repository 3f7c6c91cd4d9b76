"""What does a running box need, how soon does it judge and end, and how long does an alert take to a subscriber?

A box as its own process, a real mosquitto, a folder of 1080p JPEG files as the camera. Times of the box and of the
subscriber are of one monotonic clock: both run on this machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import yaml

from benchmarks._setting import (
    HEIGHT,
    WIDTH,
    Goal,
    add_bundle_option,
    as_frame,
    bundle_and_broker,
    print_goals,
    spread,
)
from edge.alerts.message import Alert, CameraState, Status
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.bundle import Bundle, load_arrays
from edge.errors import LinewardError
from edge.frames import EventPhase
from edge.inference.detector import Detector
from edge.judgement.score import pool_score

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.mosquitto_process import Mosquitto

MEMORY_GOAL_MB, START_GOAL_S, STOP_GOAL_S, LATENCY_GOAL_MS = 250.0, 3.0, 3.0, 100.0
SITE, BOX, CAMERA = "bench", "box", "cam"
PATIENCE_S = 60.0
# Good and defective frames take turns in runs of so many; every run is one event's begin or end.
_RUN = 1

# Run in a process of its own, as a box is: what the time to the first judged frame goes into.
_TIMELINE = """
import time; start = time.perf_counter(); marks = {}
def mark(name):
    global start
    now = time.perf_counter(); marks[name] = 1000 * (now - start); start = now
import edge.cli, edge.settings; mark("import command and settings")
import edge.box; mark("import box")
import sys, json; from pathlib import Path; from edge.bundle import Bundle
bundle = Bundle.open(Path(sys.argv[1])); mark("verify bundle")
from edge.inference.engines import available_engines
from edge.inference.openvino_session import core
engine = available_engines()[0].value
core() if engine == "openvino" else __import__(engine); mark("import engine")
from edge.inference.detector import Detector
detector = Detector.open(bundle); mark("compile graphs, run golden frames")
detector.golden_error(); mark("of that, golden frames")
print(json.dumps(marks))
"""


def write_frames(bundle: Bundle, folder: Path, *, width: int = WIDTH, height: int = HEIGHT) -> float:
    """Write good and defective frames in turns, and find a threshold between their scores.

    The good ones are the bundle's own golden canvases, enlarged; the defective ones the same with a blot.

    Returns:
        A raw threshold in the middle of the gap.

    Raises:
        SystemExit: the bundle does not tell a blot of a quarter of the picture from its own good images.
    """
    detector = Detector.open(bundle)
    canvases = load_arrays(bundle.file(bundle.manifest.golden.file))["canvas"]
    scores: dict[bool, list[float]] = {False: [], True: []}
    folder.mkdir(parents=True)
    good = canvases[: len(canvases) // 2]
    for index in range(12):
        frame = cv2.resize(good[index // 2 % len(good)][:, :, ::-1], (width, height), interpolation=cv2.INTER_NEAREST)
        defective = index // _RUN % 2 == 1
        if defective:
            cv2.circle(frame, (width // 2, height // 2), height // 4, (255, 40, 200), -1)
        path = folder / f"{index:04d}.jpg"
        cv2.imwrite(str(path), frame, [cv2.IMWRITE_JPEG_QUALITY, 95])
        read = cv2.imread(str(path))
        prediction = detector.predict(as_frame(read, index))
        scores[defective].append(pool_score(prediction.anomaly_map, bundle.manifest.pooling))
    low, high = max(scores[False]), min(scores[True])
    if low >= high:
        raise SystemExit(f"{bundle.path}: scores good frames up to {low:.3g} and a blot only {high:.3g}; no alerts")
    return (low + high) / 2


def write_settings(
    folder: Path, bundle: Bundle, *, url: str, images: Path, fps: float, threshold: float | None
) -> Path:
    """Write the settings of a box that ends an event with every good frame and begins one with every other."""
    camera: dict[str, Any] = {
        "name": CAMERA,
        "source": {"kind": "folder", "path": str(images), "fps": fps, "loop": True},
        "events": {"enter_hits": 1, "enter_window": 1, "leave_calm": 1, "leave_quantile": 0.999},
    }
    if threshold is not None:
        camera["threshold"] = {"value": threshold, "bundle_id": bundle.id, "memory_version": 0}
    settings = {
        "site": SITE, "box": BOX, "state_dir": str(folder / "state"), "bundle": str(bundle.path.resolve()),
        "broker": {"url": url}, "status_every_s": 1.0, "cameras": [camera],
    }  # fmt: skip
    path = folder / "box.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


@contextmanager
def running_box(config: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start `lineward run`; gives the process and the monotonic time in ns just before it was started."""
    command = [str(Path(sys.executable).parent / "lineward"), "run", "--config", str(config)]
    with (config.parent / "box.log").open("ab") as log:
        started = time.monotonic_ns()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process, started
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _next(subscriber: Subscriber, process: subprocess.Popen[bytes], config: Path) -> Any:  # noqa: ANN401 (any message)
    received = subscriber.receive(PATIENCE_S)
    if received is None or process.poll() is not None:
        log = (config.parent / "box.log").read_text(encoding="utf-8")[-2000:]
        raise SystemExit(f"the box has ended or is silent for {PATIENCE_S:.0f} s; its log ends:\n{log}")
    return received


def measure_start_and_stop(config: Path, broker: Mosquitto, *, runs: int) -> dict[str, list[float]]:
    """Start a box, and end it once it judges; every second time its broker hangs (SIGSTOP) by then.

    Returns:
        Seconds: ``start`` from the start of the process until a subscriber sees the state of the first judged frame,
        ``stop`` from SIGTERM until the process is gone, ``stop_hung`` the same with a broker that hangs.
    """
    found: dict[str, list[float]] = {"start": [], "stop": [], "stop_hung": []}
    for run in range(2 * runs):
        shutil.rmtree(config.parent / "state", ignore_errors=True)
        with listening(broker.url) as subscriber, running_box(config) as (process, started):
            found["start"].append(_first_judged_s(subscriber, process, config, started))
            hung = run % 2 == 1
            assert broker.process is not None
            if hung:
                broker.process.send_signal(signal.SIGSTOP)
            try:
                ending = time.monotonic()
                process.terminate()
                process.wait(PATIENCE_S)
                found["stop_hung" if hung else "stop"].append(time.monotonic() - ending)
            finally:
                broker.process.send_signal(signal.SIGCONT)
    return found


def _first_judged_s(subscriber: Subscriber, process: subprocess.Popen[bytes], config: Path, started: int) -> float:
    while True:
        received = _next(subscriber, process, config)
        message = received.message
        # A retained state of the run before is older than this process.
        judged = isinstance(message, CameraState) and message.state in ("ok", "nok")
        if judged and received.received_ns > started and message.ts.timestamp() > time.time() - _age(started):
            return (received.received_ns - started) / 1e9


def _age(started: int) -> float:
    return (time.monotonic_ns() - started) / 1e9


@contextmanager
def listening(url: str) -> Iterator[Subscriber]:
    with Subscriber(BrokerSettings(url=url), kinds=EVERYTHING) as subscriber:
        subscriber.wait_until_ready(PATIENCE_S)
        yield subscriber


def measure_alerts(config: Path, url: str, *, alerts: int, frames: int) -> dict[str, Any]:
    """Run a box until it has raised so many alerts and judged so many frames.

    Returns:
        ``latency_ms`` of alerts that begin an event and of those that end one, from the moment its frame was decoded
        (``uptime_ms`` of the alert, whole milliseconds, rounded down: up to 1 ms too long) to its receipt; resident
        memory ``rss_mb`` at the end and ``peak_mb``; ``judged`` frames, ``seconds``, the box's own ``status``.
    """
    latency: dict[EventPhase, list[float]] = {EventPhase.NEW: [], EventPhase.END: []}
    status: Status | None = None
    judged = 0
    with listening(url) as subscriber, running_box(config) as (process, started):
        while len(latency[EventPhase.NEW]) < alerts or judged < frames:
            received = _next(subscriber, process, config)
            message = received.message
            if isinstance(message, Alert) and message.phase in latency:
                latency[message.phase].append(received.received_ns / 1e6 - message.uptime_ms)
            elif isinstance(message, Status) and message.uptime_ms is not None and message.cameras:
                status = message
                judged = message.cameras[CAMERA]["counters"]["judged"]
        memory = _memory_mb(process.pid)
        seconds = _age(started)
    return {"latency_ms": latency, **memory, "judged": judged, "seconds": seconds, "status": status}


def _memory_mb(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {"rss_mb": int(values["VmRSS"]) / 1024, "peak_mb": int(values["VmHWM"]) / 1024}


def fsync_ms(folder: Path, *, count: int) -> list[float]:
    """Milliseconds of a commit as the outbox makes it: SQLite, WAL, synchronous=FULL, one row of 1 kB."""
    folder.mkdir(parents=True, exist_ok=True)
    database = sqlite3.connect(folder / "probe.db", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE probe (content BLOB)")
    found = []
    for _ in range(count):
        start = time.perf_counter()
        database.execute("INSERT INTO probe VALUES (?)", (bytes(1000),))
        found.append(1000 * (time.perf_counter() - start))
    database.close()
    return found


def print_timeline(bundle: Bundle, *, runs: int) -> None:
    """Print what the time to the first judged frame goes into."""
    tables = []
    for _ in range(runs):
        process = subprocess.run(
            [sys.executable, "-c", _TIMELINE, str(bundle.path)], check=True, capture_output=True, text=True
        )
        tables.append(json.loads(process.stdout.splitlines()[-1]))
    print("| part of the start | ms best | median |\n|---|---|---|")
    for name in tables[0]:
        values = [table[name] for table in tables]
        print(f"| {name} | {min(values):.0f} | {np.median(values):.0f} |")
    print()


def measure(bundle: Bundle, folder: Path, broker: Mosquitto, options: argparse.Namespace) -> list[Goal]:
    """Measure start, alerts and memory, and print their tables."""
    threshold = write_frames(bundle, folder / "frames")
    config = write_settings(
        folder, bundle, url=broker.url, images=folder / "frames", fps=options.fps, threshold=threshold
    )
    print_timeline(bundle, runs=options.starts)
    times = measure_start_and_stop(config, broker, runs=options.starts)
    starts = times["start"]
    shutil.rmtree(folder / "state", ignore_errors=True)
    fsync = fsync_ms(folder / "probe", count=options.alerts)
    found = measure_alerts(config, broker.url, alerts=options.alerts, frames=options.frames)
    status: Status = found["status"]
    print(
        f"the box: {status.engine} {status.precision}, {found['judged']} frames in {found['seconds']:.0f} s at "
        f"{options.fps:g} frames/s asked, dropped: {status.drops.get('frames_dropped', 0)}\n"
    )
    print("| latency in ms | n | p50 | p95 | p99 | max |\n|---|---|---|---|---|---|")
    rows = {
        "frame decoded to alert received, event begins": found["latency_ms"][EventPhase.NEW],
        "frame decoded to alert received, event ends": found["latency_ms"][EventPhase.END],
        "one SQLite commit with fsync, this disk, box not running": fsync,
    }
    for name, values in rows.items():
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        print(f"| {name} | {len(values)} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {max(values):.1f} |")
    print("\nstages in the box, ms p50 / p99:", _stages(status), "\n")
    begins = found["latency_ms"][EventPhase.NEW]
    return [
        Goal("resident memory", found["rss_mb"], MEMORY_GOAL_MB, False,
             f"after {found['judged']} frames; peak {found['peak_mb']:.0f} MB", "MB"),
        Goal("process start to first judged frame", float(np.median(starts)), START_GOAL_S, False,
             f"{spread(starts)}; {len(starts)} runs, as a subscriber sees it", "s"),
        *(
            Goal(name, max(times[key]), STOP_GOAL_S, False, f"{spread(times[key])}; the longest of {len(times[key])}",
                 "s")
            for key, name in (("stop", "SIGTERM to the end"), ("stop_hung", "SIGTERM to the end, the broker hangs"))
        ),
        Goal("frame decoded to alert received, p99", float(np.percentile(begins, 99)), LATENCY_GOAL_MS, False,
             f"{len(begins)} alerts, p50 {np.median(begins):.1f} ms; fsync p99 {np.percentile(fsync, 99):.1f} ms",
             "ms"),
    ]  # fmt: skip


def _stages(status: Status) -> str:
    return ", ".join(
        f"{stage} {values['p50']:.1f} / {values['p99']:.1f}" for stage, values in status.latency_ms.items()
    )


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_bundle_option(parser)
    parser.add_argument("--alerts", type=int, default=1000, help="events that begin, at least")
    parser.add_argument("--frames", type=int, default=500, help="frames judged before memory is read, at least")
    parser.add_argument("--starts", type=int, default=7, help="starts of the process, twice")
    parser.add_argument("--fps", type=float, default=20.0, help="pace of the source")
    parser.add_argument("--tiny", action="store_true", help="few of everything, to see that it runs")
    options = parser.parse_args(argv)
    if options.tiny:
        options.alerts, options.frames, options.starts = 5, 10, 1
    with bundle_and_broker("box", options.bundle) as (folder, bundle, broker):
        try:
            goals = measure(bundle, folder, broker, options)
        except LinewardError as error:
            raise SystemExit(str(error)) from error
    print_goals(goals)
    return goals


if __name__ == "__main__":
    main()
