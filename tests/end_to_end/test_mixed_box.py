"""`lineward run` of two cameras, a depth source and a signal of twelve channels: each alerts in its own terms."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import yaml

from edge.alerts.message import Alert, CameraState, Status
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle
from tests.edge.tiny_senses import bearing, make_depth_bundle, make_signal_bundle, scan, signal_layout
from tests.signal_sender import SignalSender

if TYPE_CHECKING:
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 60.0
RATE_HZ, WINDOW, HOP = 500.0, 500, 250
CHANNELS = tuple(f"sensor {index}" for index in range(1, 13))
EVENTS = {"enter_hits": 1, "enter_window": 1, "leave_calm": 1}


def write_box(tmp_path: Path, url: str, sender: SignalSender) -> tuple[Path, dict[str, str]]:
    """Write the settings of the box; returns their file and the bundle's id of each source."""
    for name, frame in (("left", defective_frame), ("right", good_frame)):
        (tmp_path / name).mkdir()
        for index in range(4):
            cv2.imwrite(str(tmp_path / name / f"{index}.png"), frame(index))
    np.savez(tmp_path / "scene.npz", xyz=scan(7, dent_m=0.012))
    image = make_tiny_bundle(tmp_path / "images")
    depth = make_depth_bundle(tmp_path / "depth")
    layout = signal_layout(channels=CHANNELS, rate_hz=RATE_HZ, window=WINDOW, hop=HOP)
    signal = make_signal_bundle(tmp_path / "signal", layout, cell=25)

    def folder(name: str) -> dict[str, Any]:
        return {"kind": "folder", "path": str(tmp_path / name), "loop": True, "fps": 5}

    scene = {"kind": "depth_scene", "path": "scene.npz", "loop": True, "fps": 5, "depth": {"noise_m": 0.0002}}
    # Sent faster than real time here: no window may be dropped.
    stream = {"kind": "signal_tcp", "url": sender.url, "capacity": 64}
    settings = {
        "site": "plant", "box": "box1", "state_dir": "state", "threads": 1,
        "status_every_s": 0.5, "broker": {"url": url}, "evidence": {},
        "cameras": [
            {"name": "left", "source": folder("left"), "bundle": str(image.path), "events": EVENTS},
            {"name": "right", "source": folder("right"), "bundle": str(image.path), "events": EVENTS},
            {"name": "height", "source": scene, "bundle": str(depth.path), "events": EVENTS},
        ],
        "signals": [
            {"name": "spindle", "source": stream, "bundle": str(signal.path), "events": EVENTS},
        ],
    }  # fmt: skip
    config = tmp_path / "box.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config, {"left": image.id, "right": image.id, "height": depth.id, "spindle": signal.id}


def test_mixed_box_alerts_in_pixels_metres_and_seconds(tmp_path: Path, mosquitto: Mosquitto) -> None:
    samples = bearing(9, rate_hz=RATE_HZ, channels=12, fault_at=4.5, fault_s=0.2)
    with SignalSender(rate_hz=RATE_HZ) as sender:
        config, bundles = write_box(tmp_path, mosquitto.url, sender)
        with Subscriber(BrokerSettings(url=mosquitto.url), kinds=EVERYTHING) as subscriber:
            subscriber.wait_until_ready(SOON)
            with (tmp_path / "log").open("w") as log:
                lineward = str(Path(sys.executable).parent / "lineward")
                box = subprocess.Popen([lineward, "run", "--config", str(config)], stderr=log)

            def stream() -> None:
                for at in range(0, 4000, 50):
                    sender.send(samples[at : at + 50])
                sender.lose(10)
                for at in range(4010, 4500, 50):
                    sender.send(samples[at : at + 50])

            streaming = threading.Thread(target=stream, daemon=True)
            streaming.start()
            try:
                alerts, status = listen(subscriber, until=all_seen)
                wait_for_evidence(tmp_path / "state" / "evidence", alerts["spindle"])
            finally:
                box.terminate()
                box.wait(SOON)
                streaming.join(SOON)
    assert {one.camera: one.bundle.id for one in alerts.values()} == {
        name: one for name, one in bundles.items() if name != "right"
    }
    assert alerts["left"].span is None
    assert alerts["height"].span is None
    assert alerts["height"].channels == ()

    found = alerts["spindle"]
    assert found.channels == ("sensor 1",)
    assert found.span is not None
    # The window that holds the fault begins at 1750 or 2000 samples: 3.5 or 4 s; the fault is 4.5 to 4.7 s.
    begins = 4.5 - found.span.from_s, 4.7 - found.span.to_s
    assert min(abs(begin - first) for begin in begins for first in (3.5, 3.75, 4.0)) <= 0.06
    assert (found.ts - found.span.first_ts).total_seconds() == pytest.approx((WINDOW - 1) / RATE_HZ, abs=1e-3)
    assert all(region.y == 0 and region.h == 1 for region in found.regions)

    shown: Any = status.cameras["spindle"]
    samples_of, counters = shown["samples"], shown["counters"]
    assert (samples_of["received"], samples_of["lost"]) == (4490, 10)
    assert samples_of["received"] + samples_of["lost"] == samples_of["windowed"] + samples_of["pending"]
    assert counters["captured"] == 17
    assert counters["judged"] + counters["not_judged"] + counters["dropped"] == 17
    # Ten of 500 samples are 2 %: less than the layout's 5 %.
    assert counters["not_judged"] == 0
    keeps_evidence(tmp_path / "state" / "evidence", found)


def all_seen(alerts: dict[str, Alert], status: Status | None) -> bool:
    if status is None or not {"left", "height", "spindle"} <= set(alerts):
        return False
    shown: Any = status.cameras.get("spindle", {})
    samples = shown.get("samples", {})
    done = shown.get("counters", {}).get("judged", 0) + shown.get("counters", {}).get("dropped", 0)
    return bool(samples.get("received") == 4490 and done == 17)


def listen(subscriber: Subscriber, *, until: Any) -> tuple[dict[str, Alert], Status]:
    alerts: dict[str, Alert] = {}
    status: Status | None = None
    deadline = time.monotonic() + SOON
    while not until(alerts, status):
        received = subscriber.receive(deadline - time.monotonic())
        assert received is not None, (alerts, status)
        message = received.message
        if isinstance(message, Alert):
            alerts.setdefault(message.camera, message)
        elif isinstance(message, Status):
            status = message
        elif isinstance(message, CameraState):
            assert message.camera != "right" or message.state != "nok"
    assert status is not None
    return alerts, status


def wait_for_evidence(folder: Path, alert: Alert) -> None:
    """Pictures are written in the background; a box that is stopped under load leaves what it cannot finish."""
    assert alert.evidence is not None
    deadline = time.monotonic() + SOON
    while not (folder / alert.evidence / "event.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


def keeps_evidence(folder: Path, alert: Alert) -> None:
    """The event's traces and its samples are on disk; written in the background."""
    assert alert.evidence is not None
    kept = folder / alert.evidence
    record = json.loads((kept / "event.json").read_text())
    assert {"window.npy", "overlay.jpg", "frame.jpg", "map.png"} <= set(record["files"])
    window = np.load(kept / "window.npy")
    assert window.shape == (12, WINDOW)
    overlay = cv2.imread(str(kept / "overlay.jpg"))
    assert overlay is not None
    assert overlay.shape[1] == 1280


def test_source_of_another_modality_than_its_bundle_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with SignalSender() as sender:
        config, _ = write_box(tmp_path, "mqtt://127.0.0.1:1", sender)
        settings = yaml.safe_load(config.read_text())
        settings["bundle"] = settings["cameras"][0]["bundle"]
        del settings["signals"][0]["bundle"]
        config.write_text(yaml.safe_dump(settings))
        lineward = str(Path(sys.executable).parent / "lineward")
        done = subprocess.run([lineward, "run", "--config", str(config)], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "spindle: kind signal_tcp gives frames of modality signal" in done.stderr
    assert not list(itertools.islice((tmp_path / "state").glob("outbox*"), 1))
