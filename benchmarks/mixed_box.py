"""Does a box of two cameras, a depth source and a signal of twelve channels keep up with all of them?

One `lineward run` on two cores, a real mosquitto, a subscriber on the same monotonic clock. The signal (500 Hz, over
TCP) comes in real time; a fault in it every few seconds makes alerts, and the time counts from when the sample that
completes the window was sent. Takes about 3 minutes; without bundles given, the camera's is trained first (minutes
more), and the others are hand-made graphs that cost next to nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from benchmarks._setting import Goal, add_bundle_option, bundle_and_broker, print_goals
from benchmarks.box import write_frames
from edge.alerts.message import Alert, Status
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.bundle import Bundle, Resize
from edge.frames import EventPhase
from tests.edge.tiny_senses import bearing, make_depth_bundle, make_signal_bundle, scan, signal_layout
from tests.signal_sender import SignalSender

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.inputs import SignalLayout

LATENCY_GOAL_MS = 150.0
CORES = 2
LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
EVENTS = {"enter_hits": 1, "enter_window": 1, "leave_calm": 1}
PATIENCE_S = 120.0
CHUNK_S = 0.02
FAULT_EVERY_S = 2.0
DEPTH_FRAME = (480, 640)


@dataclass
class Sent:
    """When the samples of the signal were sent: number of the last sample of each chunk, and monotonic nanoseconds."""

    last: list[int] = field(default_factory=list)
    at_ns: list[int] = field(default_factory=list)

    def moment(self, number: int) -> int:
        """Monotonic nanoseconds at which a sample was sent."""
        return self.at_ns[int(np.searchsorted(self.last, number))]


@dataclass
class Seen:
    """What a subscriber saw, and how many samples were sent."""

    samples: int = 0
    ms: dict[str, list[float]] = field(default_factory=dict)
    status: Status | None = None


def stream(sender: SignalSender, layout: SignalLayout, sent: Sent, stop: threading.Event) -> None:
    """Send the signal in real time, a fault in its first channel every two seconds, until told to stop."""
    rate, step = layout.rate_hz, max(1, round(CHUNK_S * layout.rate_hz))
    block = max(FAULT_EVERY_S, 2 * layout.window_s)
    began, number = time.monotonic(), 0
    seed = 0
    samples = np.empty((0, len(layout.channels)), np.float32)
    while not stop.is_set():
        if len(samples) < step:
            more = bearing(
                block, rate_hz=rate, channels=len(layout.channels), fault_at=block / 2, fault_s=0.2, seed=seed
            )
            samples, seed = np.concatenate([samples, more]), seed + 1
        number += step
        stop.wait(max(0.0, began + number / rate - time.monotonic()))
        sent.at_ns.append(time.monotonic_ns())
        sent.last.append(number - 1)
        sender.send(samples[:step])
        samples = samples[step:]


def box_settings(
    folder: Path, url: str, bundles: dict[str, Bundle], sender: SignalSender, *, fps: float, threshold: float
) -> Path:
    """Write the YAML file of the box."""
    image = bundles["image"]
    (folder / "scans").mkdir()
    for index in range(4):
        points = scan(index, height=DEPTH_FRAME[0], width=DEPTH_FRAME[1], dent_m=0.012 * (index % 2))
        np.savez(folder / "scans" / f"{index}.npz", xyz=points)
    images = {"kind": "folder", "path": str(folder / "images"), "loop": True, "fps": fps, "policy": "drop_oldest"}
    scans = {**images, "kind": "depth_folder", "path": str(folder / "scans")}
    given = {"value": threshold, "bundle_id": image.id, "memory_version": 0}
    content: dict[str, Any] = {
        "site": "bench", "box": "box", "state_dir": str(folder / "state"), "bundle": str(image.path.resolve()),
        "broker": {"url": url}, "status_every_s": 1.0,
        "cameras": [
            *({"name": name, "source": images, "threshold": given, "events": EVENTS} for name in ("left", "right")),
            {"name": "height", "source": scans, "bundle": str(bundles["depth"].path.resolve()), "events": EVENTS},
        ],
        "signals": [
            {"name": "signal", "source": {"kind": "signal_tcp", "url": sender.url}, "events": EVENTS,
             "bundle": str(bundles["signal"].path.resolve())},
        ],
    }  # fmt: skip
    path = folder / "box.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def listen(
    subscriber: Subscriber, box: subprocess.Popen[bytes], sent: Sent, layout: SignalLayout, until: float
) -> Seen:
    """Take what comes until a monotonic time."""
    found = Seen()
    while time.monotonic() < until:
        received = subscriber.receive(1.0)
        if box.poll() is not None:
            raise SystemExit("the box has ended")
        if received is None:
            continue
        if isinstance(received.message, Status):
            found.status = received.message
        elif isinstance(received.message, Alert) and received.message.phase is EventPhase.NEW:
            alert = received.message
            # uptime_ms is the capture in whole milliseconds, rounded down: up to 1 ms too long.
            began = alert.uptime_ms * 1e6
            if alert.camera == "signal":
                began = sent.moment(alert.camera_seq * layout.hop + layout.window - 1)
            found.ms.setdefault(alert.camera, []).append((received.received_ns - began) / 1e6)
    return found


def measure(
    folder: Path, url: str, bundles: dict[str, Bundle], *, fps: float, threshold: float, seconds: float
) -> Seen:
    """Run the box for so many seconds after its first judged window; the last status is of the running box."""
    layout = bundles["signal"].manifest.signal
    assert layout is not None
    sent, stop = Sent(), threading.Event()
    # The limits of two cores hold for the box alone: sender, broker and subscriber are other machines on a line.
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:CORES])
    with SignalSender(rate_hz=layout.rate_hz) as sender, Subscriber(BrokerSettings(url=url), kinds=EVERYTHING) as heard:
        heard.wait_until_ready(PATIENCE_S)
        config = box_settings(folder, url, bundles, sender, fps=fps, threshold=threshold)
        words = ["taskset", "-c", cores, str(Path(sys.executable).parent / "lineward"), "run", "--config", str(config)]
        with (folder / "log").open("wb") as log:
            box = subprocess.Popen(words, stderr=log)
        thread = threading.Thread(target=stream, args=(sender, layout, sent, stop), daemon=True)
        try:
            sender.wait_for_listener(PATIENCE_S)
            thread.start()
            found = listen(heard, box, sent, layout, time.monotonic() + seconds)
            stop.set()
            thread.join()
            # A last status, once all that was sent is judged or counted.
            settled = listen(heard, box, sent, layout, time.monotonic() + 3.0)
            found.status = settled.status or found.status
        finally:
            stop.set()
            with contextlib.suppress(ProcessLookupError):
                box.terminate()
            box.wait(PATIENCE_S)
        found.samples = sent.last[-1] + 1
        return found


def main(argv: Sequence[str] | None = None) -> list[Goal]:
    parser = argparse.ArgumentParser(description=__doc__)
    add_bundle_option(parser)
    parser.add_argument("--depth-bundle", type=Path, help="of modality depth; hand-made if absent")
    parser.add_argument("--signal-bundle", type=Path, help="of modality signal; hand-made if absent")
    parser.add_argument("--fps", type=float, default=5.0, help="of each camera and the depth source")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--tiny", action="store_true", help="a few seconds with hand-made bundles, to see that it runs")
    options = parser.parse_args(argv)
    if options.tiny:
        options.seconds = 8.0
    with bundle_and_broker("mixed_box", options.bundle) as (folder, image, broker):
        layout = signal_layout(channels=LEADS, unit="mV", rate_hz=500.0, window=500, hop=250)
        bundles = {
            "image": image,
            "depth": Bundle.open(options.depth_bundle)
            if options.depth_bundle
            else make_depth_bundle(folder / "depth", size=224, frame=DEPTH_FRAME),
            "signal": Bundle.open(options.signal_bundle)
            if options.signal_bundle
            else make_signal_bundle(folder / "signal", layout, cell=25),
        }
        assert bundles["depth"].manifest.preprocessing.resize is Resize.VALID
        threshold = write_frames(image, folder / "images")
        found = measure(folder, broker.url, bundles, fps=options.fps, threshold=threshold, seconds=options.seconds)
    goals = report(found)
    print_goals(goals)
    return goals


def report(found: Seen) -> list[Goal]:
    """Print the tables and return the figures beside their goals."""
    assert found.status is not None
    sent = found.samples
    print("| latency in ms | alerts | p50 | p95 | p99 | max |\n|---|---|---|---|---|---|")
    for name, values in sorted(found.ms.items()):
        p50, p95, p99 = np.percentile(values, (50, 95, 99))
        print(f"| {name} | {len(values)} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {max(values):.1f} |")
    print("\n| source | frames or windows | judged | not judged | dropped | queued |\n|---|---|---|---|---|---|")
    unaccounted, dropped = 0, 0
    for name, shown in found.status.cameras.items():
        camera: Any = shown
        counts = camera["counters"]
        left = counts["captured"] - counts["judged"] - counts["not_judged"] - counts["dropped"] - camera["queued"]
        # A frame may be in the engine while the status is made.
        unaccounted += 0 if 0 <= left <= 1 else abs(left)
        dropped += counts["dropped"]
        print(f"| {name} | {counts['captured']} | {counts['judged']} | {counts['not_judged']} | {counts['dropped']} | "
              f"{camera['queued']} |")  # fmt: skip
    signal: Any = found.status.cameras["signal"]
    samples = signal["samples"]
    kept = samples["windowed"] + samples["unwindowed"] + samples["skipped"] + samples["pending"]
    missing = abs(sent - samples["received"] - samples["lost"] - samples["repeated"])
    missing += abs(samples["received"] + samples["lost"] - kept)
    print(f"\n{sent} samples of {len(LEADS)} channels sent, {samples['received']} received, {samples['lost']} lost, "
          f"{samples['windowed']} in windows, {samples['pending']} in none yet\n")  # fmt: skip
    values = found.ms.get("signal", [float("nan")])
    return [
        Goal("sample that completes a window sent to alert received, p99", float(np.percentile(values, 99)),
             LATENCY_GOAL_MS, False, f"{len(values)} alerts, p50 {np.median(values):.1f} ms", "ms"),
        Goal("samples neither judged nor counted", missing, 0, False, f"of {sent}"),
        Goal("frames and windows neither judged nor counted", unaccounted, 0, False, f"{dropped} dropped"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
