"""A box with stations as its own process: a PLC over Modbus TCP and a subscriber over MQTT agree on every part."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import pytest
import yaml

import edge.box
from edge.alerts.commander import Commander
from edge.alerts.message import CameraState, Status, VerdictMessage
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.box import Box
from edge.settings import load_settings
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle
from tests.plc import Plc, wait_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge.bundle import Bundle
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 30.0
LINEWARD = [str(Path(sys.executable).parent / "lineward")]
PARTS = 20
FIRST_NUMBER = 4_000_000_000
DEFECTS = {"left": {3, 4, 11}, "right": {4, 7}, "hand": {1}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three folders that give a picture when fired; one of ``left`` cannot be read."""
    found = []
    for name, defects in DEFECTS.items():
        folder = tmp_path_factory.mktemp(name)
        for index in range(PARTS):
            frame = defective_frame(4000 + index) if index in defects else good_frame(4000 + index)
            cv2.imwrite(str(folder / f"{index:03d}.png"), frame)
        if name == "left":
            (folder / "015.png").write_bytes(b"torn")
        source = {"kind": "folder", "path": str(folder), "trigger": "software"}
        found.append({"name": name, "mode": "triggered", "source": source})
    return found


def write(path: Path, url: str, bundle: Bundle, cameras: list[dict[str, Any]]) -> Path:
    settings = {
        "site": "plant", "box": "box1", "state_dir": str(path / "state"), "bundle": str(bundle.path), "threads": 1,
        "engine": "onnxruntime", "broker": {"url": url, "backoff_max_s": 0.5}, "cameras": cameras,
        "modbus": {"port": 0},
        "stations": [
            {"name": "press", "cameras": ["left", "right"], "trigger": "modbus", "deadline_ms": 20_000},
            {"name": "bench", "cameras": ["hand"], "trigger": "mqtt", "deadline_ms": 20_000},
        ],
    }  # fmt: skip
    config = path / "box.yaml"
    config.write_text(yaml.safe_dump(settings))
    return config


@contextmanager
def running(config: Path) -> Iterator[int]:
    """A box; the port of its registers."""
    process = subprocess.Popen([*LINEWARD, "run", "--config", str(config)], stderr=subprocess.PIPE, text=True)
    log: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"modbus: listening on 127\.0\.0\.1:(\d+)", line):
                break
        else:
            pytest.fail("the box does not listen:\n" + "".join(log))
        drain = threading.Thread(target=lambda: log.extend(process.stderr or ()), daemon=True)
        drain.start()
        yield int(found[1])
    finally:
        process.terminate()
        process.wait(SOON)


@contextmanager
def listening(url: str) -> Iterator[Subscriber]:
    with Subscriber(BrokerSettings(url=url, backoff_max_s=0.5), kinds=EVERYTHING) as subscriber:
        subscriber.wait_until_ready(SOON)
        yield subscriber


def collect(subscriber: Subscriber, until: Callable[[list[Any]], bool]) -> list[Any]:
    messages: list[Any] = []
    deadline = time.monotonic() + SOON
    while not until(messages):
        received = subscriber.receive(deadline - time.monotonic())
        assert received is not None, f"waited in vain; received {messages}"
        messages.append(received.message)
    return messages


def verdicts(messages: list[Any], station: str) -> list[VerdictMessage]:
    return [one for one in messages if isinstance(one, VerdictMessage) and one.camera == station]


def expected(part: int) -> str:
    if part in DEFECTS["left"] | DEFECTS["right"]:
        return "NOK"
    return "NOT_JUDGED" if part == 15 else "OK"


def test_plc_and_subscriber_agree_on_every_part(
    mosquitto: Mosquitto, bundle: Bundle, cameras: list[dict[str, Any]], tmp_path: Path
) -> None:
    with listening(mosquitto.url) as subscriber, running(write(tmp_path, mosquitto.url, bundle, cameras)) as port:
        plc = Plc(port)
        plc.wait_until_running()
        found = []
        for part in range(PARTS):
            plc.trigger(FIRST_NUMBER + part)
            found.append(plc.verdict())
        messages = collect(subscriber, lambda messages: len(verdicts(messages, "press")) == PARTS)
        before = plc.box()
        wait_for(lambda: plc.box()[1] != before[1])

    assert before[5] == 2
    assert [one["number"] for one in found] == [FIRST_NUMBER + part for part in range(PARTS)]
    assert [one["trigger"] for one in found] == list(range(1, PARTS + 1))
    assert [one["decision"] for one in found] == [expected(part) for part in range(PARTS)]
    assert [one["nok"] for one in found] == [
        (part in DEFECTS["left"]) + 2 * (part in DEFECTS["right"]) for part in range(PARTS)
    ]
    assert found[15]["code"] == 3
    for told, read in zip(verdicts(messages, "press"), found, strict=True):
        assert told.part_id == str(read["number"])
        assert told.decision.value == read["decision"]
        assert round(told.latency_ms["part"]) == read["latency_ms"]
        assert [view.camera for view in told.views] == ["left", "right"]
        if told.score is not None:
            assert told.score == pytest.approx(read["score"], rel=1e-6)
            assert told.decided_by in ("left", "right")
            assert told.score == next(view.score for view in told.views if view.camera == told.decided_by)
    states = [one for one in messages if isinstance(one, CameraState) and one.camera == "press"]
    assert {state.state for state in states} >= {"ok", "nok", "not_judged"}


def test_part_that_is_announced_over_mqtt_has_its_verdict_there(
    mosquitto: Mosquitto, bundle: Bundle, cameras: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = write(tmp_path, mosquitto.url, bundle, cameras)
    broker = BrokerSettings(url=mosquitto.url, backoff_max_s=0.5)
    with (
        listening(mosquitto.url) as subscriber,
        running(config) as port,
        Commander(broker, site="plant", box="box1") as ask,
    ):
        Plc(port).wait_until_running()
        messages = []
        for part in ("blue 1", "blue 2"):
            answer = ask.ask("trigger", {"part_id": part}, timeout=SOON)
            assert (answer.ok, answer.count) == (True, 1)
            messages += collect(subscriber, lambda found: bool(verdicts(found, "bench")))
        refused = ask.ask("trigger", {"part_id": "x", "station": "press"}, timeout=SOON)

    assert not refused.ok
    assert "bench" in refused.reason
    told = verdicts(messages, "bench")
    assert [(one.part_id, one.decision.value) for one in told] == [("blue 1", "OK"), ("blue 2", "NOK")]
    assert [one.camera_seq for one in told] == [0, 1]
    assert told[1].regions


def test_box_that_stops_gives_open_parts_their_verdict(
    mosquitto: Mosquitto, bundle: Bundle, cameras: list[dict[str, Any]], tmp_path: Path
) -> None:
    away = {"name": "right", "mode": "triggered", "source": {"kind": "camera", "url": "rtsp://127.0.0.1:9/none"}}
    config = write(tmp_path, mosquitto.url, bundle, [cameras[0], away, cameras[2]])
    with listening(mosquitto.url) as subscriber:
        with running(config) as port:
            plc = Plc(port)
            plc.wait_until_running()
            plc.trigger(1)
        # A retained state may overtake a verdict, which goes to the disk first.
        messages = collect(
            subscriber,
            lambda found: (
                any(isinstance(one, CameraState) and one.camera == "press" and one.reason == "stopped" for one in found)
                and bool(verdicts(found, "press"))
            ),
        )

    (told,) = verdicts(messages, "press")
    assert told.decision.value == "NOT_JUDGED"
    assert told.views[1].reason == "stopped"
    assert told.part_id == "1"


def test_heartbeat_stands_still_once_nobody_supervises_the_box(
    mosquitto: Mosquitto, bundle: Bundle, cameras: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.box, "SUPERVISED_S", 0.5)
    box = Box(load_settings(write(tmp_path, mosquitto.url, bundle, cameras)))
    box.start()
    try:
        inspection = box.status()["detail"]["inspection"]
        plc = Plc(inspection["modbus"]["port"])
        starting = plc.box()
        wait_for(lambda: box.supervise() or plc.box()[1] >= starting[1] + 3)
        # It notices by itself that nobody looks after it.
        wait_for(lambda: plc.box()[2] != 1)
        stopped = plc.box()
        assert stopped[2:4] == [2, 1]
        time.sleep(0.3)  # three beats of a box that is well
        assert plc.box()[1] == stopped[1]
        wait_for(lambda: box.supervise() or plc.box()[1] != stopped[1])
    finally:
        box.stop()


def test_reload_changes_one_station_and_leaves_the_other_alone(
    mosquitto: Mosquitto, bundle: Bundle, cameras: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = write(tmp_path, mosquitto.url, bundle, cameras)
    box = Box(load_settings(config))
    box.start()
    try:
        port = box.status()["detail"]["inspection"]["modbus"]["port"]
        before = Plc(port)
        wait_for(lambda: box.supervise() or before.box()[2] == 1)
        before.trigger(1)
        assert before.verdict()["decision"] == "OK"
        session = before.box()[4]
        hand = box.cameras["hand"]
        config.write_text(config.read_text().replace("name: press", "name: press-2"))

        box.reload(load_settings(config))

        box.supervise()
        assert not [text for text in box.status()["warnings"] if "not in force" in text]
        assert box.cameras["hand"] is hand
        after = Plc(port)
        assert after.box()[4] != session
        assert (after.triggered, after.read) == (0, 0)
        after.trigger(2)
        assert after.verdict()["number"] == 2
        assert set(box.status()["detail"]["inspection"]["stations"]) == {"press-2", "bench"}
    finally:
        box.stop()


def test_status_tells_of_stations(
    mosquitto: Mosquitto, bundle: Bundle, cameras: list[dict[str, Any]], tmp_path: Path
) -> None:
    with listening(mosquitto.url) as subscriber, running(write(tmp_path, mosquitto.url, bundle, cameras)):
        messages = collect(
            subscriber,
            lambda found: any(isinstance(one, Status) and "inspection" in one.detail for one in found),
        )

    said = next(one for one in messages if isinstance(one, Status) and "inspection" in one.detail).detail["inspection"]
    assert set(said["stations"]) == {"press", "bench"}  # type: ignore[index,call-overload,arg-type]  # JSON
