"""Does a box stay as it is while things around it fail? Memory, descriptors, threads, messages, over minutes of faults.

A box of two network cameras (one through OpenCV, one through GStreamer) with evidence, a real mosquitto behind a TCP
proxy. In every minute another fault, whose end the box has to come back from. Takes 17 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml

from benchmarks._mjpeg_server import MjpegServer
from benchmarks._setting import Goal, add_bundle_option, bundle_for, heading, print_goals
from benchmarks._soak_parts import (
    CAMERAS,
    FPS,
    PATIENCE_S,
    Fault,
    Sample,
    Soak,
    Watcher,
    faults_of,
    settings_of,
)
from benchmarks.box import write_frames
from tests.faults.fault_proxy import FaultProxy
from tests.mosquitto_process import Mosquitto

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from edge.bundle import Bundle

SLOPE_GOAL_MB_H, DESCRIPTORS_GOAL, THREADS_GOAL, FILE_GOAL = 1.0, 2, 0, 2.0
WIDTH, HEIGHT = 640, 360
# Two seconds of a line: one event.
CYCLE = (0, 2, 4, 6, 8, 10, 0, 2, 4, 6, 8, 10, 0, 2, 4, 6, 1, 3, 5, 7)
# An outbox grows by steps of so much disk space, allocated ahead, so that a full disk leaves it room.
OWNED_BYTES = 2**20
FAULTS = 8
IMAGE = Path(__file__).parent.parent / "docs" / "images" / "soak.png"
SAMPLE_S = 1.0
# Of a period: when its fault begins, when it is over, from when on the box counts as calm again.
FAULT_AT, FAULT_OVER, CALM_FROM = 0.1, 0.45, 0.8


def theil_sen(
    x: Sequence[float], y: Sequence[float], seasons: Sequence[int] | None = None
) -> tuple[float, float, float]:
    """The median of the slopes of all pairs, and the interval that holds it in 95 of 100 cases (Sen, 1968).

    Args:
        x: one per point.
        y: as x.
        seasons: only pairs of one season are looked at (Hirsch, Slack and Smith, 1982): what each fault leaves for a
            while is then no slope. All pairs by default.

    Returns:
        slope, lower, upper; NaN with fewer than 3 points.
    """
    if len(x) < 3:
        return math.nan, math.nan, math.nan
    seasons = [0] * len(x) if seasons is None else list(seasons)
    pairs = [(i, j) for i, j in itertools.combinations(range(len(x)), 2) if seasons[i] == seasons[j]]
    slopes = np.sort([(y[j] - y[i]) / (x[j] - x[i]) for i, j in pairs])
    counts = [seasons.count(season) for season in set(seasons)]
    reach = 1.96 * math.sqrt(sum(n * (n - 1) * (2 * n + 5) for n in counts) / 18)
    low, high = (len(slopes) - reach) / 2, (len(slopes) + reach) / 2
    return (
        float(np.median(slopes)),
        float(slopes[max(0, math.floor(low))]),
        float(slopes[min(len(slopes) - 1, math.ceil(high))]),
    )


def sample(pid: int, at_s: float, *, calm: bool) -> Sample:
    """Look at the process now."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "Threads"))}
    descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return Sample(at_s, int(values["VmRSS"]) / 1024, descriptors, int(values["Threads"]), calm)


def go_through(
    soak: Soak,
    process: subprocess.Popen[bytes],
    faults: list[Fault],
    watcher: Watcher,
    *,
    periods: int,
    period_s: float,
) -> None:
    """One fault in each period, and samples all the while."""
    began = time.monotonic()
    for number in range(periods):
        fault = faults[number % len(faults)]
        start = began + number * period_s
        steps: list[tuple[float, Callable[[], object]]] = [(FAULT_AT, fault.begin), (FAULT_OVER, fault.end)]
        print(f"minute {number + 1} of {periods}: {fault.name}", file=sys.stderr, flush=True)
        while (now := time.monotonic()) < start + period_s:
            share = (now - start) / period_s
            if steps and share >= steps[0][0]:
                soak.faults += [(now - began, fault.name)] * (len(steps) == 2)
                steps.pop(0)[1]()
            if process.poll() is not None:
                raise SystemExit(f"the box has ended with {process.returncode} during {fault.name!r}")
            soak.samples.append(sample(process.pid, now - began, calm=share >= CALM_FROM))
            time.sleep(min(SAMPLE_S, period_s / 20))
        key = f"{number + 1} {fault.name}"
        soak.recovered[key] = all(soak.states.get(name) in ("ok", "nok") for name in CAMERAS)
        watcher.ask_again()


@contextlib.contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`lineward run`, killed at the end where it still runs."""
    command = [str(Path(sys.executable).parent / "lineward"), "run", "--config", str(config)]
    with (config.parent / "box.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool], what: str, config: Path) -> None:
    """Wait for something that another process does.

    Raises:
        SystemExit: it did not come; with the end of the box's log.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            log = (config.parent / "box.log").read_text(encoding="utf-8", errors="replace")[-2000:]
            raise SystemExit(f"waited in vain for {what}; the box's log ends:\n{log}")
        time.sleep(0.05)


def outbox_bytes(folder: Path, suffix: str = "") -> int:
    """Of the database as it lies on disk, or of its log (``-wal``), which SQLite writes over from its beginning."""
    path = folder / "state" / f"outbox.db{suffix}"
    return path.stat().st_size if path.exists() else 0


def stored(folder: Path) -> tuple[str, int, int]:
    """Epoch, highest number, and bytes of the rows that a stopped box has kept."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'state' / 'outbox.db'}?mode=ro", uri=True)) as database:
        meta = dict(database.execute("SELECT key, value FROM meta").fetchall())
        (kept,) = database.execute("SELECT coalesce(sum(size), 0) FROM rows").fetchone()
    return str(meta["epoch"]), int(meta["last_seq"]), int(kept)


def measure(bundle: Bundle, folder: Path, *, periods: int, period_s: float) -> tuple[Soak, dict[str, float]]:
    """Run it all; what was seen, and the figures of the end."""
    threshold = write_frames(bundle, folder / "images", width=WIDTH, height=HEIGHT)
    pictures = [path.read_bytes() for path in sorted((folder / "images").iterdir())]
    shown = [pictures[index] for index in CYCLE]
    (folder / "broker").mkdir()
    broker, soak = Mosquitto(folder / "broker", autosave_s=5), Soak()
    broker.start()
    config = folder / "box.yaml"
    with contextlib.ExitStack() as stack:
        stack.callback(broker.stop)
        cameras = {name: stack.enter_context(MjpegServer(shown, FPS)) for name in CAMERAS}
        proxy = stack.enter_context(FaultProxy(broker.port))
        settings = settings_of(bundle, folder, proxy=proxy.port, cameras=cameras, threshold=threshold)
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        watcher = stack.enter_context(Watcher(broker.url, soak))
        process = stack.enter_context(running(config))
        wait_for(lambda: all(soak.states.get(name) in ("ok", "nok") for name in CAMERAS), "both cameras", config)
        wait_for(lambda: bool(soak.received), "the first alert", config)
        empty = outbox_bytes(folder)
        faults = faults_of(process, broker, proxy, cameras, config)
        assert len(faults) == FAULTS
        go_through(soak, process, faults, watcher, periods=periods, period_s=period_s)
        wait_for(lambda: _drained(soak), "the outbox to drain", config)
        # Cameras that are gone make no more alerts: what is missing now is missing.
        for camera in cameras.values():
            camera.cut()
        wait_for(lambda: all(soak.states.get(name) == "not_judged" for name in CAMERAS), "the cameras to go", config)
        wait_for(lambda: _drained(soak), "the outbox to drain", config)
        watcher.ask_again()
        wait_for(lambda: _drained(soak), "the outbox to drain", config)
        size, log = outbox_bytes(folder), outbox_bytes(folder, "-wal")
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE_S)
        epoch, last, kept = stored(folder)
        with contextlib.suppress(SystemExit):
            wait_for(lambda: _missing(soak, epoch, last) == 0, "the last messages", config)
        return soak, {
            "code": code, "empty": empty, "size": size, "log": log, "kept": kept, "stored": last,
            "missing": _missing(soak, epoch, last), "duplicates": watcher.duplicates,
            "evidence_mb": sum(p.stat().st_size for p in (folder / "state" / "evidence").rglob("*.*")) / 2**20,
        }  # fmt: skip


def _drained(soak: Soak) -> bool:
    status = soak.status
    return status is not None and status.outbox is not None and status.outbox.depth == 0


def _missing(soak: Soak, epoch: str, last: int) -> int:
    explained = {seq for gap in soak.gaps if gap.epoch == epoch for seq in range(gap.first, gap.last + 1)}
    return len(set(range(1, last + 1)) - {seq for one, seq in soak.received if one == epoch} - explained)


def calm_points(soak: Soak, period_s: float, *, warm: int) -> list[tuple[float, float, float, float]]:
    """Medians of the calm end of each period after the warm-up: hours, MB, descriptors, threads."""
    points = []
    periods = sorted({int(one.at_s / period_s) for one in soak.samples})
    for number in periods[warm:]:
        calm = [one for one in soak.samples if one.calm and int(one.at_s / period_s) == number]
        if calm:
            middle = [
                float(np.median(v)) for v in zip(*((s.rss_mb, s.descriptors, s.threads) for s in calm), strict=True)
            ]
            points.append(((number + 0.9) * period_s / 3600, *middle))
    return points


def print_periods(soak: Soak, period_s: float) -> None:
    """Print what the box was like at the calm end of each period."""
    print("| period | fault | resident | descriptors | threads | cameras judged again |\n|---|---|---|---|---|---|")
    for (_, rss, descriptors, threads), (key, done) in zip(
        calm_points(soak, period_s, warm=0), soak.recovered.items(), strict=False
    ):
        number, _, fault = key.partition(" ")
        told = "yes" if done else "no"
        print(f"| {number} | {fault} | {rss:.1f} MB | {descriptors:.0f} | {threads:.0f} | {told} |")
    print()


def goals_of(soak: Soak, end: dict[str, float], period_s: float, *, warm: int) -> list[Goal]:
    """The figures beside their goals."""
    hours, rss, descriptors, threads = zip(*calm_points(soak, period_s, warm=warm), strict=True)
    seasons = [(warm + index) % FAULTS for index in range(len(rss))]
    whole = len(rss) >= 2 * FAULTS
    slope, low, high = theil_sen(hours, rss, seasons if whole else None)
    needed = end["empty"] + end["kept"] + OWNED_BYTES
    back = [key for key, done in soak.recovered.items() if not done]
    status = soak.status
    drops = {} if status is None else {k: v for k, v in status.drops.items() if "lost" in k or "dropped" in k}
    return [
        Goal("slope of resident memory after the warm-up", slope, SLOPE_GOAL_MB_H, False,
             f"95 % interval {low:.2f} to {high:.2f}, {len(rss)} points over {60 * (hours[-1] - hours[0]):.0f} min, "
             f"{'each fault beside itself' if whole else 'all pairs'}; "
             f"{rss[0]:.1f} MB first, {rss[-1]:.1f} last, {max(s.rss_mb for s in soak.samples):.1f} most", "MB/h"),
        Goal("descriptors, calm periods, most less fewest", max(descriptors) - min(descriptors), DESCRIPTORS_GOAL,
             False, f"{min(descriptors):.0f} to {max(descriptors):.0f}"),
        Goal("threads, calm periods, most less fewest", max(threads) - min(threads), THREADS_GOAL, False,
             f"{min(threads):.0f} to {max(threads):.0f}"),
        Goal("messages lost", end["missing"], 0, False,
             f"of {end['stored']:.0f} stored; {end['duplicates']:.0f} duplicates, {soak.repeated} asked for again; "
             f"the box counts {drops}"),
        Goal("periods after which a camera was not judged", len(back), 0, False, ", ".join(back) or "none"),
        Goal("outbox on disk, drained, over what it has to be", end["size"] / needed, FILE_GOAL, False,
             f"{end['size'] / 1024:.0f} KiB; with one message {end['empty'] / 1024:.0f}, kept for replay "
             f"{end['kept'] / 1024:.0f}, owned ahead {OWNED_BYTES / 1024:.0f}; its log {end['log'] / 1024:.0f}"),
        Goal("exit code of the box", end["code"], 0, False, f"{end['evidence_mb']:.1f} MiB of evidence, 8 allowed"),
    ]  # fmt: skip


def draw(soak: Soak, path: Path) -> None:
    """Draw memory, descriptors and threads over time, with the faults."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (memory, counts) = plt.subplots(2, 1, figsize=(11, 7), sharex=True, layout="constrained")
    minutes = [one.at_s / 60 for one in soak.samples]
    memory.plot(minutes, [one.rss_mb for one in soak.samples])
    memory.set(ylabel="resident memory, MB", ylim=(0, 1.2 * max(one.rss_mb for one in soak.samples)))
    counts.step(minutes, [one.descriptors for one in soak.samples], where="post", label="descriptors")
    counts.step(minutes, [one.threads for one in soak.samples], where="post", label="threads")
    counts.set(xlabel="minutes", ylim=(0, 1.2 * max(one.descriptors for one in soak.samples)))
    counts.legend(loc="lower right")
    for at_s, name in soak.faults:
        for axes in (memory, counts):
            axes.axvline(at_s / 60, color="0.8", zorder=0)
        memory.text(at_s / 60, 1, f" {name}", rotation=90, va="bottom", fontsize=8)
    for axes in (memory, counts):
        axes.grid(visible=True, alpha=0.3, axis="y")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_bundle_option(parser)
    parser.add_argument(
        "--periods", type=int, default=16, help="each with one of eight faults; a slope needs 24 and more"
    )
    parser.add_argument("--period", type=float, default=60.0, help="seconds")
    parser.add_argument("--warm", type=int, default=8, help="periods before memory counts: each fault once")
    parser.add_argument("--image", type=Path, default=IMAGE, help="where it is drawn")
    options = parser.parse_args(argv)
    for program in ("mosquitto", "gst-launch-1.0"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not on the path; on Debian: apt-get install mosquitto gstreamer1.0-tools")
    heading("soak")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = bundle_for(options.bundle, folder / "bundle")
        soak, end = measure(bundle, folder, periods=options.periods, period_s=options.period)
    draw(soak, options.image)
    print_periods(soak, options.period)
    goals = goals_of(soak, end, options.period, warm=options.warm)
    print_goals(goals)
    return goals


if __name__ == "__main__":
    main()
