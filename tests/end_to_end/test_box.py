"""A whole box as its own process, a real broker, a subscriber."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import pytest
import yaml

from edge.alerts.message import Alert, Availability, CameraState, Status, VerdictMessage
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Received, Subscriber
from edge.box import Box
from edge.errors import OutboxError
from edge.settings import load_settings
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle

if TYPE_CHECKING:
    from edge.bundle import Bundle
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 30.0
LINEWARD = [str(Path(sys.executable).parent / "lineward")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty parts; 10 to 15 are defective."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(30):
        frame = defective_frame(1000 + index) if 10 <= index < 16 else good_frame(1000 + index)
        cv2.imwrite(str(folder / f"{index:03d}.png"), frame)
    return folder


@pytest.fixture
def defects(tmp_path: Path) -> Path:
    """Defective frames only: an event that lasts as long as its source loops."""
    folder = tmp_path / "defects"
    folder.mkdir()
    for index in range(3):
        cv2.imwrite(str(folder / f"{index}.png"), defective_frame(2000 + index))
    return folder


Configure = Callable[..., Path]


@pytest.fixture
def configure(tmp_path: Path, bundle: Bundle, images: Path) -> Configure:
    def write(url: str, *, camera: dict[str, Any] | None = None, **box: Any) -> Path:
        settings = {
            "site": "plant", "box": "box1", "state_dir": "state", "bundle": str(bundle.path), "threads": 1,
            "engine": "onnxruntime", "broker": {"url": url, "backoff_max_s": 0.5, "keepalive_s": 2},
            "cameras": [{"name": "cam", "source": {"kind": "folder", "path": str(images)}, **(camera or {})}],
            **box,
        }  # fmt: skip
        path = tmp_path / "box.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@contextlib.contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*LINEWARD, "run", "--config", str(config)], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@contextlib.contextmanager
def listening(url: str) -> Iterator[Subscriber]:
    with Subscriber(BrokerSettings(url=url, backoff_max_s=0.5), kinds=EVERYTHING) as subscriber:
        subscriber.wait_until_ready(SOON)
        yield subscriber


def collect(subscriber: Subscriber, until: Callable[[list[Any]], bool]) -> list[Any]:
    """Receive messages until the condition on all of them holds."""
    messages: list[Any] = []
    deadline = time.monotonic() + SOON
    while not until(messages):
        received: Received | None = subscriber.receive(deadline - time.monotonic())
        assert received is not None, f"waited in vain; received {messages}"
        messages.append(received.message)
    return messages


def read_log(box: subprocess.Popen[str], words: str) -> None:
    """Wait for a line of the box's log; what the line speaks of is on disk by then."""
    assert box.stderr is not None
    assert any(words in line for line in box.stderr), f"the box ended without saying {words!r}"


def availability(messages: list[Any]) -> list[str]:
    return [m.value for m in messages if isinstance(m, Availability)]


def phases(messages: list[Any]) -> list[str]:
    return [m.phase.value for m in messages if isinstance(m, Alert)]


def said(word: str) -> Callable[[list[Any]], bool]:
    return lambda messages: word in availability(messages)


def looping(folder: Path) -> dict[str, Any]:
    return {"source": {"kind": "folder", "path": str(folder), "loop": True, "fps": 50}}


def test_stream_of_a_folder_gives_one_event(mosquitto: Mosquitto, configure: Configure, bundle: Bundle) -> None:
    with listening(mosquitto.url) as subscriber, running(configure(mosquitto.url)) as box:
        messages = collect(subscriber, said("stopped"))

        assert box.wait(SOON) == 0
    new, end = (m for m in messages if isinstance(m, Alert))
    assert (new.phase.value, end.phase.value) == ("new", "end")
    assert new.event_id == end.event_id
    assert new.camera_seq == 12
    assert new.bundle.id == bundle.id
    assert new.score is not None
    assert new.threshold is not None
    assert new.score >= new.threshold
    assert new.p_value == pytest.approx(1 / 41)
    assert new.regions[0].x + new.regions[0].w > 36
    status = [m for m in messages if isinstance(m, Status)][-1]
    assert status.engine == "onnxruntime"
    assert status.bundle is not None
    assert status.bundle.id == bundle.id
    assert status.cameras["cam"]["counters"]["judged"] == 30  # type: ignore[index,call-overload]  # JSON
    assert status.cameras["cam"]["threshold"]["budget_supported"] is False  # type: ignore[index,call-overload]  # JSON
    assert set(status.latency_ms) >= {"preprocess", "inference", "judgement", "total", "store"}


def test_triggered_parts_have_one_verdict_each(
    mosquitto: Mosquitto, configure: Configure, images: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    for file in images.iterdir():
        (parts / file.name).write_bytes(file.read_bytes())
    (parts / "020.png").write_bytes(b"torn")
    camera = {"mode": "triggered", "source": {"kind": "folder", "path": str(parts)}}
    with listening(mosquitto.url) as subscriber, running(configure(mosquitto.url, camera=camera)):
        messages = collect(subscriber, said("stopped"))

    verdicts = {m.part_id: m.decision.value for m in messages if isinstance(m, VerdictMessage)}
    expected = {f"{index:03d}": "NOK" if 10 <= index < 16 else "OK" for index in range(30)} | {"020": "NOT_JUDGED"}
    assert verdicts == expected
    assert sum(isinstance(m, VerdictMessage) for m in messages) == 30


def test_retained_topics_tell_a_late_subscriber(mosquitto: Mosquitto, configure: Configure, defects: Path) -> None:
    config = configure(mosquitto.url, camera=looping(defects))
    with running(config), listening(mosquitto.url) as first:
        collect(first, lambda messages: any(isinstance(m, CameraState) and m.state == "nok" for m in messages))
        with listening(mosquitto.url) as second:
            messages = collect(
                second, lambda found: {Availability, CameraState, Status} <= {type(message) for message in found}
            )

    assert availability(messages) == ["online"]
    state = next(m for m in messages if isinstance(m, CameraState))
    assert state.state == "nok"
    assert state.event_id is not None


def test_sigterm_ends_the_event_and_says_stopped_within_3_s(
    mosquitto: Mosquitto, configure: Configure, defects: Path
) -> None:
    config = configure(mosquitto.url, camera=looping(defects))
    with listening(mosquitto.url) as subscriber, running(config) as box:
        before = collect(subscriber, lambda messages: "new" in phases(messages))
        started = time.monotonic()
        box.send_signal(signal.SIGTERM)
        code = box.wait(SOON)
        took = time.monotonic() - started
        messages = before + collect(subscriber, said("stopped"))

    assert code == 0
    assert took < 3
    assert phases(messages)[-1] == "end"
    states = [m for m in messages if isinstance(m, CameraState)]
    assert (states[-1].state, states[-1].reason) == ("not_judged", "stopped")
    assert availability(messages)[-1] == "stopped"


def test_sigterm_with_the_broker_down_stops_within_3_s(
    mosquitto: Mosquitto, configure: Configure, defects: Path
) -> None:
    config = configure(mosquitto.url, camera=looping(defects))
    with listening(mosquitto.url) as subscriber, running(config) as box:
        collect(subscriber, lambda messages: "new" in phases(messages))
        mosquitto.kill()
        started = time.monotonic()
        box.send_signal(signal.SIGINT)
        code = box.wait(SOON)

    assert code == 0
    assert time.monotonic() - started < 3


def test_killed_box_is_offline(mosquitto: Mosquitto, configure: Configure, defects: Path) -> None:
    config = configure(mosquitto.url, camera=looping(defects))
    with listening(mosquitto.url) as subscriber, running(config) as box:
        collect(subscriber, said("online"))
        box.kill()
        messages = collect(subscriber, said("offline"))

    assert availability(messages)[-1] == "offline"


def test_killed_box_sends_what_it_had_found_when_it_runs_again(
    mosquitto: Mosquitto, configure: Configure, defects: Path, images: Path
) -> None:
    mosquitto.kill()
    with running(configure(mosquitto.url, camera=looping(defects))) as box:
        read_log(box, "anomaly new")
        box.kill()
    mosquitto.start()
    with listening(mosquitto.url) as subscriber, running(configure(mosquitto.url)):
        messages = collect(subscriber, said("stopped"))

    alerts = [m for m in messages if isinstance(m, Alert)]
    assert [alert.phase.value for alert in sorted(alerts, key=lambda a: (a.epoch, a.seq))] == ["new", "new", "end"]
    assert min(alerts, key=lambda alert: alert.seq).late


def test_broker_down_at_start_loses_nothing(mosquitto: Mosquitto, configure: Configure) -> None:
    mosquitto.kill()
    with running(configure(mosquitto.url)) as box:
        read_log(box, "anomaly end")
        mosquitto.start()
        with listening(mosquitto.url) as subscriber:
            messages = collect(subscriber, lambda found: phases(found)[-1:] == ["end"])

    assert phases(messages) == ["new", "end"]


def test_full_disk_stops_no_judging_and_is_seen(
    mosquitto: Mosquitto, configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> list[int]:
        raise OutboxError("the disk is full; free some space")

    monkeypatch.setattr("edge.alerts.outbox.Outbox.append_many", full)
    box = Box(load_settings(configure(mosquitto.url, camera={"mode": "triggered"})))
    with listening(mosquitto.url) as subscriber:
        box.run()
        messages = collect(subscriber, said("stopped"))

    assert box.metrics.value("judged") == 30
    assert box.metrics.value("messages_lost") == 30
    status = [m for m in messages if isinstance(m, Status)][-1]
    assert any("messages are being lost: the disk is full" in warning for warning in status.warnings)
    assert status.drops["messages_lost"] == 30


def test_camera_that_is_missing_does_not_blind_the_others(
    mosquitto: Mosquitto, configure: Configure, images: Path, tmp_path: Path
) -> None:
    cameras = [
        {"name": "gone", "source": {"kind": "folder", "path": str(tmp_path / "nowhere")}},
        {"name": "here", "source": {"kind": "folder", "path": str(images)}},
    ]
    box = Box(load_settings(configure(mosquitto.url, cameras=cameras)))

    with listening(mosquitto.url) as subscriber:
        box.run()
        messages = collect(subscriber, said("stopped"))

    assert box.metrics.value("judged") == 30
    assert box.metrics.value("captures_refused") == 1
    assert phases(messages) == ["new", "end"]
    gone = [m for m in messages if isinstance(m, CameraState) and m.camera == "gone"]
    assert gone[-1].state == "not_judged"
    assert "nowhere" in gone[-1].reason


def test_replay_publishes_and_sums_up(mosquitto: Mosquitto, bundle: Bundle, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "summary.json"
    with listening(mosquitto.url) as subscriber:
        result = lineward(
            "replay", "--bundle", bundle.path, "--source", images, "--broker", mosquitto.url, "--json", out,
            "--engine", "onnxruntime", "--threads", "1",
        )  # fmt: skip
        messages = collect(subscriber, said("stopped"))

    assert result.returncode == 0, result.stderr
    summary = json.loads(out.read_text())
    assert phases(messages) == ["new", "end"]
    assert {key: summary[key] for key in ("frames", "judged", "nok", "events", "published", "unsent", "lost")} == {
        "frames": 30, "judged": 30, "nok": 6, "events": 1, "published": 2, "unsent": 0, "lost": 0,
    }  # fmt: skip
    assert [r["name"] for r in summary["results"] if r["decision"] == "NOK"] == [f"0{i}.png" for i in range(10, 16)]
    assert summary["frames_per_second"] > 0
    assert set(summary["latency_ms"]["processing"]) == {"p50", "p90", "p99", "max"}
    assert "anomaly events" in result.stdout


def test_replay_without_a_broker_keeps_what_it_found(
    mosquitto: Mosquitto, bundle: Bundle, images: Path, tmp_path: Path
) -> None:
    mosquitto.kill()
    arguments = ("replay", "--bundle", bundle.path, "--source", images, "--broker", mosquitto.url, "--state-dir",
                 tmp_path / "state", "--timeout", "0.5", "--engine", "onnxruntime")  # fmt: skip

    result = lineward(*arguments)

    assert result.returncode == 3
    assert "2 messages were not acknowledged" in result.stderr
    assert str(tmp_path / "state") in result.stderr
    assert len(_stored_alerts(tmp_path / "state" / "outbox.db")) == 2


def test_watch_prints_each_alert_once(mosquitto: Mosquitto, bundle: Bundle, images: Path) -> None:
    command = [*LINEWARD, "watch", "--broker", mosquitto.url, "--json", "--count", "2", "--timeout", str(SOON)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher, listening(mosquitto.url) as witness:
        # The watcher is ready when the broker shows its subscription; a message of its own kind would count.
        _wait_for_client(mosquitto, "lineward-watch", 2)
        lineward(
            "replay", "--bundle", bundle.path, "--source", images, "--broker", mosquitto.url, "--engine", "onnxruntime"
        )
        lines = watcher.communicate(timeout=SOON)[0].splitlines()
        collect(witness, said("stopped"))

    assert watcher.returncode == 0
    assert [json.loads(line)["phase"] for line in lines] == ["new", "end"]


def lineward(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*LINEWARD, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _stored_alerts(path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return [topic for (topic,) in db.execute("SELECT topic FROM rows WHERE topic LIKE '%/alert'")]


def _wait_for_client(mosquitto: Mosquitto, name: str, count: int) -> None:
    log = mosquitto.folder / "mosquitto.log"
    deadline = time.monotonic() + SOON
    while log.read_text().count(f"as {name}") < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)  # another process's log: nothing to await
