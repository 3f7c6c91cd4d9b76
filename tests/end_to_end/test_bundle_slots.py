"""A box with bundle slots as its own process: it follows a switch without losing a frame, and takes bad ones back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import onnx
import pytest
import yaml
from onnx import helper, numpy_helper

from edge.alerts.message import Notice, Status, VerdictMessage
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.bundle import Bundle, Engine, Precision, load_arrays
from edge.inference.detector import Detector
from edge.slots.slots import Slots
from tests.edge.tiny_bundle import make_tiny_bundle, repack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 40.0
LINEWARD = str(Path(sys.executable).parent / "lineward")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """``first``, ``second``, and ``bad``: golden frames pass, and any frame far from them gives NaN."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {name: make_tiny_bundle(folder / name, product=name) for name in ("first", "second", "bad")}
    golden = load_arrays(made["bad"].file(made["bad"].manifest.golden.file))["canvas"]
    detector = Detector.open(made["bad"], engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)
    farthest = max(float(detector.map_of_canvas(canvas).max()) for canvas in golden)
    made["bad"] = with_nan_beyond(made["bad"], 1.2 * farthest**2)
    return made


def with_nan_beyond(bundle: Bundle, limit: float) -> Bundle:
    """Let the head's map be NaN wherever the squared distance is beyond a limit."""
    path = bundle.path / "head.onnx"
    model = onnx.load(path)
    graph = model.graph
    graph.node[-1].output[0] = "map"
    graph.initializer.append(numpy_helper.from_array(np.array(limit, np.float32), "limit"))
    graph.node.extend(
        [
            helper.make_node("Sub", ["limit", "positive"], ["room"]),
            helper.make_node("Sqrt", ["room"], ["root"]),
            helper.make_node("Mul", ["root", "zero"], ["nothing"]),
            helper.make_node("Add", ["map", "nothing"], ["anomaly_map"]),
        ]
    )
    onnx.save(model, path)
    return repack(bundle)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Parts unlike any golden frame."""
    folder = tmp_path / "parts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(8):
        frame = 255 * rng.integers(0, 2, (12, 12, 3)).repeat(8, 0).repeat(8, 1)
        cv2.imwrite(str(folder / f"{index}.png"), frame.astype(np.uint8))
    return folder


@pytest.fixture
def config(mosquitto: Mosquitto, tmp_path: Path, parts: Path, bundles: dict[str, Bundle]) -> Path:
    slots = Slots(tmp_path / "bundles")
    slots.install(bundles["first"].path, examine=lambda *_: None)
    source = {"kind": "folder", "path": str(parts), "loop": True, "fps": 40}
    settings: dict[str, Any] = {
        "site": "plant", "box": "box1", "state_dir": "state", "bundle": "bundles/current", "threads": 1,
        "engine": "onnxruntime", "precision": "float32", "broker": {"url": mosquitto.url, "backoff_max_s": 0.5},
        "status_every_s": 0.5, "trial": {"seconds": 1, "frames": 60},
        "cameras": [{"name": "cam", "mode": "triggered", "source": source}],
    }  # fmt: skip
    path = tmp_path / "box.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@contextlib.contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    box = subprocess.Popen([LINEWARD, "run", "--config", str(config)])
    try:
        yield box
    finally:
        if box.poll() is None:
            box.terminate()
            box.wait(SOON)


@contextlib.contextmanager
def listening(url: str) -> Iterator[Subscriber]:
    with Subscriber(BrokerSettings(url=url), kinds=EVERYTHING) as subscriber:
        subscriber.wait_until_ready(SOON)
        yield subscriber


def collect(subscriber: Subscriber, *wanted: Callable[[Any], bool]) -> list[Any]:
    """Receive until a message of each kind came, in any order."""
    messages: list[Any] = []
    deadline = time.monotonic() + SOON
    missing = list(wanted)
    while missing:
        received = subscriber.receive(deadline - time.monotonic())
        assert received is not None, f"waited in vain; the last were {messages[-3:]}"
        messages.append(received.message)
        missing = [one for one in missing if not one(received.message)]
    return messages


def judges(bundle: Bundle) -> Callable[[Any], bool]:
    def said(message: Any) -> bool:
        return isinstance(message, VerdictMessage) and message.bundle.id == bundle.id

    return said


def notice(kind: str) -> Callable[[Any], bool]:
    return lambda message: isinstance(message, Notice) and message.kind == kind


def verb(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINEWARD, "bundle", *arguments, "--config", str(config)], capture_output=True, text=True, check=False
    )


def test_parts_are_beyond_what_the_bad_bundle_bears(bundles: dict[str, Bundle], parts: Path) -> None:
    """What the other tests stand on: golden frames pass, the parts do not."""
    detector = Detector.open(bundles["bad"], engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)

    for file in parts.iterdir():
        canvas = np.ascontiguousarray(cv2.resize(cv2.imread(str(file)), (64, 64))[:, :, ::-1])
        assert np.isnan(detector.map_of_canvas(canvas)).any()


def test_running_box_switches_without_losing_a_part(
    mosquitto: Mosquitto, config: Path, bundles: dict[str, Bundle]
) -> None:
    with listening(mosquitto.url) as subscriber, running(config):
        messages = collect(subscriber, judges(bundles["first"]))

        done = verb(config, "install", str(bundles["second"].path))

        assert done.returncode == 0, done.stderr
        messages += collect(subscriber, judges(bundles["second"]), notice("bundle.confirmed"))
    parts = [message for message in messages if isinstance(message, VerdictMessage)]
    numbers = sorted(message.camera_seq for message in parts)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert all(message.decision.value != "NOT_JUDGED" for message in parts)
    assert [m.kind for m in messages if isinstance(m, Notice)] == ["bundle.on_trial", "bundle.confirmed"]
    assert Slots(config.parent / "bundles").trial() is None


def test_bundle_that_cannot_judge_is_taken_back_soon(
    mosquitto: Mosquitto, config: Path, bundles: dict[str, Bundle]
) -> None:
    with listening(mosquitto.url) as subscriber, running(config):
        collect(subscriber, judges(bundles["first"]))

        done = verb(config, "install", str(bundles["bad"].path))
        assert done.returncode == 0, done.stderr
        switched = time.monotonic()
        collect(subscriber, judges(bundles["bad"]))
        messages = collect(subscriber, judges(bundles["first"]), notice("bundle.taken_back"))

        assert time.monotonic() - switched < 10
        text = next(m.text for m in messages if notice("bundle.taken_back")(m))
        assert "frames could not be judged" in text
        collect(
            subscriber, lambda m: isinstance(m, Status) and m.bundle is not None and m.bundle.id == bundles["first"].id
        )
    listed = verb(config, "list")
    assert listed.stdout.splitlines()[0].startswith("* a")
    assert "taken back" in listed.stdout
    again = verb(config, "install", str(bundles["bad"].path))
    assert again.returncode == 3
    assert "was taken back before" in again.stderr


def test_box_that_dies_on_trial_comes_back_with_the_bundle_before(
    mosquitto: Mosquitto, config: Path, bundles: dict[str, Bundle]
) -> None:
    slots = Slots(config.parent / "bundles")
    slots.install(bundles["second"].path, examine=lambda *_: None)
    with listening(mosquitto.url) as subscriber:
        with running(config) as box:
            collect(subscriber, judges(bundles["second"]))
            os.kill(box.pid, signal.SIGKILL)
            box.wait(SOON)
        with running(config):
            messages = collect(subscriber, judges(bundles["first"]), notice("bundle.taken_back"))

    text = next(m.text for m in messages if notice("bundle.taken_back")(m))
    assert "ended 1 times during its trial" in text
    assert slots.serving() == "a"


def test_box_that_is_stopped_on_trial_goes_on_with_it(
    mosquitto: Mosquitto, config: Path, bundles: dict[str, Bundle]
) -> None:
    slots = Slots(config.parent / "bundles")
    slots.install(bundles["second"].path, examine=lambda *_: None)
    config.write_text(config.read_text().replace("seconds: 1", "seconds: 600"))
    with listening(mosquitto.url) as subscriber:
        for _ in range(3):
            with running(config):
                collect(subscriber, judges(bundles["second"]))

    trial = slots.trial()
    assert trial is not None
    assert trial.starts == 0


def test_bundle_on_trial_that_cannot_be_opened_makes_way(
    mosquitto: Mosquitto, config: Path, bundles: dict[str, Bundle]
) -> None:
    slots = Slots(config.parent / "bundles")
    slots.install(bundles["second"].path, examine=lambda *_: None)
    (slots.current / "head.onnx").write_bytes(b"not a graph")
    with listening(mosquitto.url) as subscriber, running(config):
        messages = collect(subscriber, judges(bundles["first"]), notice("bundle.taken_back"))

    assert "cannot be opened" in next(m.text for m in messages if notice("bundle.taken_back")(m))


def test_plain_folder_has_no_slots(config: Path, bundles: dict[str, Bundle]) -> None:
    config.write_text(config.read_text().replace("bundles/current", str(bundles["first"].path)))

    done = verb(config, "list")

    assert done.returncode == 3
    assert "is a plain folder" in done.stderr
