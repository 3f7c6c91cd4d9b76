"""A box as its own process with a pipeline, a network stream, a GigE camera that is fired and a disabled camera."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from edge.alerts.commander import Commander
from edge.alerts.message import CameraState, Status, VerdictMessage
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from tests.edge import gige_camera
from tests.edge.gige_camera import GigeCamera
from tests.edge.tiny_bundle import make_tiny_bundle
from tests.faults.mjpeg_camera import MjpegCamera

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.mosquitto_process import Mosquitto

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(bool(gige_camera.missing()), reason=gige_camera.missing()),
    pytest.mark.skipif(
        shutil.which("gst-launch-1.0") is None, reason="gst-launch-1.0 is not installed (Debian gstreamer1.0-tools)"
    ),
]
SOON = 60.0


class Plant:
    """What a subscriber has heard."""

    def __init__(self, subscriber: Subscriber) -> None:
        self._subscriber = subscriber
        self.messages: list[Any] = []

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SOON
        while not condition():
            received = self._subscriber.receive(deadline - time.monotonic())
            assert received is not None, f"waited in vain; the last: {self.messages[-3:]}"
            self.messages.append(received.message)

    def forget(self) -> None:
        self.messages.clear()

    def says(self, camera: str, state: str, reason: str = "") -> bool:
        found = [m for m in self.messages if isinstance(m, CameraState) and m.camera == camera]
        return bool(found) and found[-1].state in state.split() and reason in found[-1].reason

    def parts(self) -> list[str | None]:
        return [message.part_id for message in self.messages if isinstance(message, VerdictMessage)]

    def cameras(self) -> dict[str, Any]:
        found = [m for m in self.messages if isinstance(m, Status)]
        return found[-1].cameras if found else {}


def children(pid: int) -> list[int]:
    text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    return [int(word) for word in text.split()]


def test_cameras_of_many_kinds_in_one_box(mosquitto: Mosquitto, tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    pipeline = "videotestsrc is-live=true ! video/x-raw,width=96,height=96,framerate=10/1"
    gige = {"kind": "genicam", "device": gige_camera.ADDRESS, "trigger": "software", "pixel_format": "Mono8"}
    with GigeCamera(), MjpegCamera() as stream:
        settings = {
            "site": "plant", "box": "box1", "state_dir": "state", "bundle": str(bundle.path), "threads": 1,
            "engine": "onnxruntime", "broker": {"url": mosquitto.url}, "status_every_s": 0.5,
            "cameras": [
                {"name": "pipe", "source": {"kind": "gstreamer", "pipeline": pipeline}},
                {"name": "net", "source": {"kind": "camera", "url": stream.url, "reconnect_seconds": 1}},
                {"name": "off", "enabled": False, "source": {"kind": "camera", "device": 0}},
                {"name": "gige", "mode": "triggered", "source": gige},
            ],
            "stations": [{"name": "bench", "cameras": ["gige"], "trigger": "mqtt", "deadline_ms": 20_000}],
        }  # fmt: skip
        config = tmp_path / "box.yaml"
        config.write_text(yaml.safe_dump(settings))
        broker = BrokerSettings(url=mosquitto.url)
        with (
            Subscriber(broker, kinds=EVERYTHING) as subscriber,
            Commander(broker, site="plant", box="box1") as commander,
        ):
            subscriber.wait_until_ready(SOON)
            plant = Plant(subscriber)
            lineward = str(Path(sys.executable).parent / "lineward")
            with (tmp_path / "log").open("w") as log:
                box = subprocess.Popen([lineward, "run", "--config", str(config)], stderr=log)
            try:
                _live(plant, commander, stream)
                spawned = children(box.pid)
                assert spawned, "the pipeline runs in a child"
            finally:
                box.terminate()
                box.wait(SOON)
            assert not [child for child in spawned if Path(f"/proc/{child}").exists()]
        assert "hunter2" not in (tmp_path / "log").read_text()
        assert not any("hunter2" in str(message) for message in plant.messages)


def _live(plant: Plant, commander: Commander, stream: MjpegCamera) -> None:
    plant.until(lambda: plant.says("pipe", "ok nok") and plant.says("net", "ok nok"))
    plant.until(lambda: {name: one["state"] for name, one in plant.cameras().items()} == {
        "pipe": "streaming", "net": "streaming", "off": "disabled", "gige": "streaming",
    })  # fmt: skip
    plant.until(lambda: plant.says("off", "not_judged", "disabled"))

    for number in range(3):
        result = commander.ask("trigger", {"station": "bench", "part_id": f"P{number}"}, timeout=SOON)
        assert result.ok, result
        plant.until(lambda: plant.parts()[-1:] == [f"P{number}"])  # noqa: B023 (called in this round)
    assert plant.parts() == ["P0", "P1", "P2"]
    assert {m.decision.value for m in plant.messages if isinstance(m, VerdictMessage)} <= {"OK", "NOK"}

    stream.unplug()
    plant.until(
        lambda: plant.says("net", "not_judged", "does not answer; check the address, the login and the network")
    )
    plant.until(lambda: plant.cameras()["net"]["state"] == "reconnecting")
    assert plant.cameras()["pipe"]["state"] == "streaming"
    plant.forget()
    stream.plug_in()
    plant.until(lambda: plant.says("net", "ok nok"))
    plant.until(lambda: plant.cameras().get("net", {}).get("counters", {}).get("reconnects") == 1)
    assert plant.cameras()["pipe"]["counters"]["reconnects"] == 0
