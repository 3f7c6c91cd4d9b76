"""How long does an alert take from the decoded frame that completes its event to a subscriber?

One box of eight cameras at 15 frames/s each, replayed from memory, a real mosquitto, a subscriber on the same monotonic
clock. Every camera has an event a second. Takes about 4 minutes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from benchmarks._load_box import Report, Spec, box_settings, load_box, replay_frames, report_of
from benchmarks._setting import Goal, add_bundle_option, bundle_and_broker, print_goals
from benchmarks.box import fsync_ms
from edge.alerts.message import Alert
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import Subscriber
from edge.frames import EventPhase

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence
    from pathlib import Path

    from edge.bundle import Bundle

CAMERAS, FPS = 8, 15.0
LATENCY_GOAL_MS = 50.0
# A second of a line: four defective frames of fifteen. Three of five begin an event, five calm ones end it.
CYCLE = (0, 2, 4, 6, 8, 10, 0, 2, 4, 6, 8, 1, 3, 5, 7)
EVENTS = {"enter_hits": 3, "enter_window": 5, "leave_calm": 5, "leave_quantile": 0.999}
PATIENCE_S = 60.0


@dataclass
class Latencies:
    """Milliseconds from capture to receipt, per phase; ``late`` alerts were sent again."""

    ms: dict[EventPhase, list[float]] = field(default_factory=lambda: {EventPhase.NEW: [], EventPhase.END: []})
    late: int = 0
    stages: list[dict[str, float]] = field(default_factory=list)


def measure(
    bundle: Bundle, folder: Path, url: str, *, frames: Path, threshold: float, alerts: int, together: bool, warm: float
) -> tuple[Latencies, Report]:
    """Run a box until so many events have begun; what a subscriber saw, and what the box did."""
    external = {"value": threshold, "bundle_id": bundle.id, "memory_version": 0}
    settings = box_settings(bundle, folder / "state", url, source={}, events=EVENTS, threshold=external)
    # The sources are files to the box; a camera would drop its oldest frames.
    settings["cameras"][0]["source"]["policy"] = "drop_oldest"
    spec = Spec(
        settings=settings, cameras=CAMERAS, fps=FPS, frames=str(frames), cycle=CYCLE, together=together, warm_s=warm
    )
    with Subscriber(BrokerSettings(url=url)) as subscriber:
        subscriber.wait_until_ready(PATIENCE_S)
        with load_box(spec, folder) as process:
            began = time.monotonic()
            found = _listen(subscriber, process, alerts=alerts, since_ms=1000 * began)
            report = report_of(process)
    return found, report


def _listen(subscriber: Subscriber, process: subprocess.Popen[str], *, alerts: int, since_ms: float) -> Latencies:
    found = Latencies()
    while len(found.ms[EventPhase.NEW]) < alerts:
        received = subscriber.receive(PATIENCE_S)
        if received is None or process.poll() is not None:
            raise SystemExit(f"the box has ended or is silent for {PATIENCE_S:.0f} s")
        message = received.message
        if not isinstance(message, Alert) or message.phase not in found.ms or message.uptime_ms < since_ms:
            continue
        found.late += message.late
        # uptime_ms is the capture in whole milliseconds, rounded down: up to 1 ms too long.
        found.ms[message.phase].append(received.received_ns / 1e6 - message.uptime_ms)
        found.stages.append(dict(message.latency_ms))
    return found


def print_latencies(rows: dict[str, Sequence[float]]) -> None:
    print("| latency in ms | n | p50 | p95 | p99 | max |\n|---|---|---|---|---|---|")
    for name, values in rows.items():
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        print(f"| {name} | {len(values)} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {max(values):.1f} |")
    print()


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_bundle_option(parser)
    parser.add_argument("--alerts", type=int, default=1000, help="events that begin, of cameras that run free")
    parser.add_argument("--together", type=int, default=300, help="the same, of cameras that all expose at once")
    parser.add_argument("--warm", type=float, default=3.0, help="seconds before anything is measured")
    parser.add_argument("--tiny", action="store_true", help="few alerts, to see that it runs")
    options = parser.parse_args(argv)
    if options.tiny:
        options.alerts, options.together, options.warm = 8, 8, 0.1
    with bundle_and_broker("alert_latency", options.bundle) as (folder, bundle, broker):
        frames, threshold = replay_frames(bundle, folder)
        fsync = fsync_ms(folder / "probe", count=max(20, options.alerts))
        common = {"frames": frames, "threshold": threshold, "warm": options.warm}
        free, report = measure(bundle, folder / "free", broker.url, alerts=options.alerts, together=False, **common)
        at_once, other = measure(
            bundle, folder / "together", broker.url, alerts=options.together, together=True, **common
        )
        fsync += fsync_ms(folder / "probe again", count=max(20, options.alerts))
    goals = _report(free, report, at_once, other, fsync)
    print_goals(goals)
    return goals


def _report(free: Latencies, report: Report, at_once: Latencies, other: Report, fsync: list[float]) -> list[Goal]:
    begins, together = free.ms[EventPhase.NEW], at_once.ms[EventPhase.NEW]
    print(
        f"{CAMERAS} cameras of {FPS:g} frames/s in one box, int8: {report.judged / report.seconds:.0f} frames/s judged,"
        f" {report.totals['dropped']} dropped of {report.totals['captured']}, "
        f"{100 * report.cpu_s / report.seconds:.0f} % of one core; {free.late} alerts were late\n"
    )
    rows: dict[str, Sequence[float]] = {
        "cameras run free: frame to alert, event begins": begins,
        "cameras run free: frame to alert, event ends": free.ms[EventPhase.END] or [float("nan")],
        "all cameras at once: frame to alert, event begins": together,
        "one SQLite commit with fsync, this disk, no box running": fsync,
    }
    rows |= {
        f"of the first row, in the box: {stage}": [one[stage] for one in free.stages if stage in one]
        for stage in ("preprocess", "inference", "judgement", "total")
        if any(stage in one for one in free.stages)
    }
    print_latencies(rows)
    stored = ", ".join(f"{name} {value:.1f}" for name, value in report.store_ms.items())
    print(f"storing an alert in the box, ms: {stored}\n")
    unaccounted = abs(report.unaccounted) + abs(other.unaccounted)
    captured = report.totals["captured"] + other.totals["captured"]
    commits = f"p50 {np.percentile(fsync, 50):.1f}, p99 {np.percentile(fsync, 99):.1f} ms"
    return [
        Goal("frame decoded to alert received, p99", float(np.percentile(begins, 99)), LATENCY_GOAL_MS, False,
             f"{len(begins)} alerts, p50 {np.median(begins):.1f} ms, max {max(begins):.1f} ms; fsync {commits}", "ms"),
        Goal("the same with all cameras at once, p99", float(np.percentile(together, 99)), float("nan"), False,
             f"{len(together)} alerts, p50 {np.median(together):.1f} ms", "ms"),
        Goal("frames neither judged nor counted", unaccounted, 0, False, f"of {captured}"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
