"""A box whose memory changes while it runs, over a real broker: nothing is judged by the wrong thresholds."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import paho.mqtt.publish as mqtt_publish
import pytest
import yaml

from edge.alerts.command_messages import CommandResult
from edge.alerts.message import Availability, CameraState, Notice, Status, VerdictMessage
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.box import Box
from edge.errors import SettingsError
from edge.federation.keys import make_keys, write_keys
from edge.settings import load_settings
from tests.edge.memory_bench import Fleet, fleet_bank
from tests.edge.tiny_bundle import defective_frame, good_frame
from tests.edge.tiny_memory import make_memory_bundle
from tests.fleet_service import merging

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploy.aggregator.service import Service
    from edge.bundle import Bundle
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 30.0
LINEWARD = [str(Path(sys.executable).parent / "lineward")]
MEMORY = {"every_s": 0.02, "ship_every_s": 1, "shadow_frames": 5, "shadow_s": 0, "drift_per_week": 1000}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_memory_bundle(tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty parts, every fifth of them defective."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(20):
        frame = defective_frame(1000 + index) if index % 5 == 4 else good_frame(1000 + index)
        cv2.imwrite(str(folder / f"{index:03d}.png"), frame)
    return folder


@pytest.fixture
def configure(tmp_path: Path, bundle: Bundle, images: Path) -> Callable[..., Path]:
    def write(url: str, *, memory: dict[str, Any] | None = None, fps: float = 100, **box: Any) -> Path:
        source = {"kind": "folder", "path": str(images), "loop": True, "fps": fps}
        settings = {
            "site": "plant", "box": "box1", "state_dir": "state", "bundle": str(bundle.path), "threads": 1,
            "engine": "onnxruntime", "broker": {"url": url, "backoff_max_s": 0.5}, "status_every_s": 0.2,
            "memory": MEMORY | (memory or {}),
            "cameras": [{"name": "cam", "mode": "triggered", "budget": {"false_nok_per_1000": 20}, "source": source}],
            **box,
        }  # fmt: skip
        path = tmp_path / "box.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@contextlib.contextmanager
def listening(url: str) -> Iterator[Subscriber]:
    with Subscriber(BrokerSettings(url=url, backoff_max_s=0.5), kinds=EVERYTHING) as subscriber:
        subscriber.wait_until_ready(SOON)
        yield subscriber


def collect(subscriber: Subscriber, until: Callable[[Any], bool]) -> list[Any]:
    """Receive messages up to the first one that is wanted."""
    messages: list[Any] = []
    deadline = time.monotonic() + SOON
    while not messages or not until(messages[-1]):
        received = subscriber.receive(deadline - time.monotonic())
        assert received is not None, f"waited in vain; the last were {messages[-3:]}"
        messages.append(received.message)
    return messages


def noticed(kind: str) -> Callable[[Any], bool]:
    return lambda message: isinstance(message, Notice) and message.kind == kind


def said(word: str) -> Callable[[Any], bool]:
    return lambda message: isinstance(message, Availability) and message.value == word


@contextlib.contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*LINEWARD, "run", "--config", str(config)], stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextlib.contextmanager
def box_in_a_thread(box: Box) -> Iterator[None]:
    thread = threading.Thread(target=box.run, kwargs={"drain_s": 0.0})
    thread.start()
    try:
        yield
    finally:
        box.request_stop()
        thread.join(SOON)
        assert not thread.is_alive()


def test_switch_under_load_mixes_no_thresholds_and_names_the_memory(
    mosquitto: Mosquitto, configure: Callable[..., Path], bundle: Bundle, tmp_path: Path
) -> None:
    keys = {"key_file": "none", "aggregator_key_file": "none"}
    config = configure(
        mosquitto.url,
        memory={"learn": "off"},
        federation={"fleet": "f", "aggregator": "tcp://localhost:1", **keys},
    )
    link = Fleet()
    box = Box(load_settings(config), link=link)
    with listening(mosquitto.url) as subscriber, box_in_a_thread(box):
        messages = collect(subscriber, lambda message: isinstance(message, VerdictMessage))
        for version in range(1, 6):
            link.bank = fleet_bank(bundle, version, seeds=range(700 + version, 704 + version))
            messages += collect(subscriber, noticed("memory.switched"))
            messages += collect(
                subscriber, lambda m, v=version: isinstance(m, VerdictMessage) and m.memory.version == v
            )  # type: ignore[misc]
        messages += collect(subscriber, lambda m: isinstance(m, CameraState) and m.memory and m.memory.version == 5)

    verdicts = [m for m in messages if isinstance(m, VerdictMessage)]
    assert all(verdict.decision.value != "NOT_JUDGED" for verdict in verdicts)
    by_version: dict[int, set[float | None]] = {}
    for verdict in verdicts:
        by_version.setdefault(verdict.memory.version, set()).add(verdict.threshold)
        assert verdict.memory.fleet == verdict.memory.version
        assert (verdict.decision.value == "NOK") == (int(verdict.part_id or 0) % 5 == 4)
    assert sorted(by_version) == [0, 1, 2, 3, 4, 5]
    assert all(len(thresholds) == 1 for thresholds in by_version.values())
    assert len({next(iter(thresholds)) for thresholds in by_version.values()}) == 6
    order = [verdict.memory.version for verdict in sorted(verdicts, key=lambda verdict: verdict.seq)]
    assert order == sorted(order)
    # The same part has one score under one memory.
    scores: dict[tuple[int, str | None], set[float]] = {}
    for verdict in verdicts:
        scores.setdefault((verdict.memory.version, verdict.part_id), set()).add(round(verdict.score or 0, 4))
    assert all(len(found) == 1 for found in scores.values())
    states = [m for m in messages if isinstance(m, CameraState) and m.state != "not_judged"]
    assert all(state.memory is not None for state in states)
    assert {state.memory.version for state in states if state.memory} >= {0, 5}
    assert not box.metrics.value("frames_failed")


def test_killed_box_goes_on_with_its_memory(mosquitto: Mosquitto, configure: Callable[..., Path]) -> None:
    config = configure(mosquitto.url, memory={"quantile": 0.9, "update": {"beta": 0.5}, "min_frames": 1.5})
    with listening(mosquitto.url) as subscriber:
        with running(config) as box:
            switched = collect(subscriber, noticed("memory.switched"))[-1]
            judged = collect(subscriber, lambda m: isinstance(m, VerdictMessage) and m.memory.version >= 1)[-1]
            box.kill()
            last = [judged, *collect(subscriber, said("offline"))]
        # It learns no more, so what judges can only be what it had.
        with running(configure(mosquitto.url, memory={"learn": "off"})):
            collect(subscriber, said("online"))
            first = collect(subscriber, lambda m: isinstance(m, VerdictMessage) and not m.late)[-1]

    assert switched.detail["version"] >= 1
    before = [m for m in last if isinstance(m, VerdictMessage)][-1]
    # Killed between storing a memory and judging with it, the box goes on with the newer one.
    assert first.memory.version - before.memory.version in (0, 1)
    if first.memory.version == before.memory.version:
        assert first.threshold == before.threshold


def test_damaged_files_are_notices_and_no_crash_loop(
    mosquitto: Mosquitto, configure: Callable[..., Path], tmp_path: Path
) -> None:
    config = configure(mosquitto.url, memory={"quantile": 0.9, "update": {"beta": 0.5}, "min_frames": 1.5})
    with listening(mosquitto.url) as subscriber, running(config) as box:
        collect(subscriber, noticed("memory.switched"))
        box.send_signal(signal.SIGTERM)
        assert box.wait(SOON) == 0
    for file in (tmp_path / "state" / "memory").rglob("*.npz"):
        file.write_bytes(b"junk")
    (tmp_path / "state" / "outbox.db").write_bytes(b"junk" * 1000)
    config = configure(mosquitto.url, memory={"learn": "off"})
    with listening(mosquitto.url) as subscriber, running(config):
        messages = collect(subscriber, lambda m: isinstance(m, VerdictMessage) and not m.late)
        while sum(isinstance(m, Notice) for m in messages) < 3:
            messages += collect(subscriber, lambda m: isinstance(m, Notice))

    notices = [m for m in messages if isinstance(m, Notice)]
    assert sorted(m.kind for m in notices) == ["memory.damaged", "memory.damaged", "outbox.damaged"]
    assert {m.severity.value for m in notices} == {"alarm"}
    verdict = next(m for m in messages if isinstance(m, VerdictMessage) and not m.late)
    assert verdict.memory.version == 0


def test_part_is_declared_good_over_mqtt(mosquitto: Mosquitto, configure: Callable[..., Path]) -> None:
    config = configure(mosquitto.url, memory={"learn": "declared", "ship_every_s": 1000}, fps=20)

    def send(verb: str, **values: Any) -> None:
        topic = f"lineward/plant/box1/cmd/{verb}"
        mqtt_publish.single(topic, json.dumps(values), qos=1, hostname="127.0.0.1", port=mosquitto.port)

    with listening(mosquitto.url) as subscriber, running(config):
        nok = collect(subscriber, lambda m: isinstance(m, VerdictMessage) and m.decision.value == "NOK")[-1]
        answers = []
        for verb, values in (
            ("accept", {"camera": "cam", "part_id": nok.part_id, "id": "1"}),
            ("accept", {"camera": "cam", "camera_seq": 10**9, "id": "2"}),
            ("accept", {"camera": "cam", "id": "3"}),
            ("ship", {"id": "4"}),
            ("dance", {}),
        ):
            send(verb, **values)
            answers.append(collect(subscriber, lambda m: isinstance(m, CommandResult))[-1])
        status = collect(subscriber, lambda m: isinstance(m, Status) and m.detail["memory"]["frames_fed"] == 1)[-1]

    assert [(answer.verb, answer.ok, answer.id) for answer in answers] == [
        ("accept", True, "1"), ("accept", False, "2"), ("accept", False, "3"), ("ship", False, "4"),
        ("dance", False, None),
    ]  # fmt: skip
    assert "not kept here" in answers[1].reason
    assert "either camera_seq or part_id" in answers[2].reason
    assert "in no fleet" in answers[3].reason
    assert "known are: accept, " in answers[4].reason
    assert status.detail["memory"]["learn"] == "declared"


def test_key_that_others_can_read_is_refused(
    mosquitto: Mosquitto, configure: Callable[..., Path], tmp_path: Path
) -> None:
    public, secret = write_keys(tmp_path, make_keys(), name="box1")
    secret.chmod(0o644)
    federation = {"fleet": "f", "aggregator": "tcp://127.0.0.1:1", "key_file": secret.name,
                  "aggregator_key_file": public.name}  # fmt: skip
    config = configure(mosquitto.url, federation=federation)

    with pytest.raises(SettingsError, match="chmod 600"):
        Box(load_settings(config)).start()


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Service]:
    with merging(tmp_path, ("box1", "box2"), rows=48, soon=SOON) as service:
        yield service


def test_two_boxes_come_to_share_a_memory(
    mosquitto: Mosquitto, configure: Callable[..., Path], aggregator: Service
) -> None:
    memory = {"quantile": 0.9, "update": {"beta": 0.5}, "min_frames": 1.5}
    boxes = []
    for name in ("box1", "box2"):
        federation = {"fleet": "f", "aggregator": aggregator.endpoint, "key_file": f"{name}.key_secret",
                      "aggregator_key_file": "aggregator/aggregator.key"}  # fmt: skip
        config = configure(
            mosquitto.url, memory=memory, federation=federation, box=name, state_dir=f"state-{name}", fps=30
        )
        boxes.append(Box(load_settings(config)))
    shared: set[str] = set()
    with listening(mosquitto.url) as subscriber, box_in_a_thread(boxes[0]), box_in_a_thread(boxes[1]):
        while shared != {"box1", "box2"}:
            verdict = collect(subscriber, lambda m: isinstance(m, VerdictMessage) and m.memory.fleet >= 1)[-1]
            shared.add(verdict.box)
        links = [box.status()["detail"]["memory"]["link"] for box in boxes]

    assert {link["state"] for link in links} == {"connected"}
    assert all(link["receipts"] >= 1 and link["bank_version"] >= 1 for link in links)
    assert all(box.metrics.value("memory_failed") == box.metrics.value("frames_failed") == 0 for box in boxes)


def test_watch_shows_notices(mosquitto: Mosquitto, configure: Callable[..., Path]) -> None:
    command = [*LINEWARD, "watch", "--broker", mosquitto.url, "--timeout", str(SOON)]
    config = configure(mosquitto.url, memory={"quantile": 0.9, "update": {"beta": 0.5}, "min_frames": 1.5})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher, running(config):
        assert watcher.stdout is not None
        line = next(line for line in watcher.stdout if "/notice " in line)
        watcher.kill()

    assert line.startswith("lineward/plant/box1/notice kind=memory.switched severity=info text=memory version 1 judges")
