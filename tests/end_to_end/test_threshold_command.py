"""Thresholds given to a running box over a real broker: they hold at once, survive a restart, and are never misused."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cv2
import pytest
from typer.testing import CliRunner

from edge.alerts.commander import Commander
from edge.alerts.message import Notice, Status, VerdictMessage
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.box import Box
from edge.cli import app
from edge.settings import BoxSettings
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edge.alerts.command_messages import CommandResult
    from edge.bundle import Bundle
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 30.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    for index in range(4):
        cv2.imwrite(str(folder / f"{index}.png"), defective_frame(index) if index % 2 else good_frame(index))
    return folder


@dataclass
class Heard:
    """What a subscriber received, in order; conditions look at what came after the mark."""

    subscriber: Subscriber
    messages: list[Any] = field(default_factory=list)
    mark: int = 0

    def forget(self) -> None:
        self.mark = len(self.messages)


class Plant:
    """One box, its broker and whoever listens."""

    def __init__(self, url: str, tmp_path: Path, bundle: Bundle, parts: Path) -> None:
        self.url, self.bundle, self.tmp_path = url, bundle, tmp_path
        self.camera: dict[str, Any] = {
            "name": "cam", "source": {"kind": "folder", "path": str(parts), "loop": True, "fps": 40},
            "mode": "triggered",
        }  # fmt: skip

    def settings(self) -> BoxSettings:
        return BoxSettings.model_validate({
            "site": "plant", "box": "box1", "state_dir": str(self.tmp_path / "state"), "bundle": str(self.bundle.path),
            "threads": 1, "engine": "onnxruntime", "broker": {"url": self.url, "backoff_max_s": 0.5},
            "status_every_s": 0.2, "cameras": [self.camera],
        })  # fmt: skip

    @contextlib.contextmanager
    def running(self) -> Iterator[Box]:
        box = Box(self.settings())
        thread = threading.Thread(target=box.run, kwargs={"drain_s": 5})
        thread.start()
        try:
            yield box
        finally:
            box.request_stop()
            thread.join(SOON)
            assert not thread.is_alive()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Heard]:
        with Subscriber(BrokerSettings(url=self.url, backoff_max_s=0.5), kinds=EVERYTHING) as subscriber:
            subscriber.wait_until_ready(SOON)
            yield Heard(subscriber)

    def ask(self, value: float | None, **changes: Any) -> CommandResult:
        fields = {"camera": "cam", "value": value, "bundle_id": self.bundle.id, "memory_version": 0, **changes}
        with Commander(BrokerSettings(url=self.url, backoff_max_s=0.5), site="plant", box="box1") as commander:
            return commander.ask("threshold", fields, timeout=SOON)


@pytest.fixture
def plant(mosquitto: Mosquitto, tmp_path: Path, bundle: Bundle, parts: Path) -> Plant:
    return Plant(mosquitto.url, tmp_path, bundle, parts)


def wait_for(heard: Heard, wanted: Callable[[Any], bool]) -> Any:
    """Return the first message since the last mark that is as wanted."""
    deadline = time.monotonic() + SOON
    at = heard.mark
    while True:
        while at < len(heard.messages):
            if wanted(heard.messages[at]):
                return heard.messages[at]
            at += 1
        left = deadline - time.monotonic()
        received = heard.subscriber.receive(left) if left > 0 else None
        assert received is not None, f"waited in vain; last was {heard.messages[-1:]}"
        heard.messages.append(received.message)


def judged_by(threshold: float) -> Callable[[Any], bool]:
    return lambda message: isinstance(message, VerdictMessage) and message.threshold == threshold


def judged_now_by(threshold: float) -> Callable[[Any], bool]:
    # After a restart earlier verdicts come once more.
    return lambda message: judged_by(threshold)(message) and not message.late


def test_threshold_holds_at_once_survives_a_restart_and_goes_back_to_the_budget(plant: Plant) -> None:
    with plant.running(), plant.listening() as heard:
        first = wait_for(heard, lambda message: isinstance(message, VerdictMessage))
        result = plant.ask(1e6)
        assert result.ok, result.reason
        assert result.detail["before"] == first.threshold
        assert result.detail["source"] == "run time"
        verdict = wait_for(heard, judged_by(1e6))
        assert verdict.decision.value == "OK"
        assert (first.adaptation.threshold, verdict.adaptation.threshold) == (0, 1)
        # A status reads the cameras first, the parts after them: what a camera shows, its part has.
        status = wait_for(
            heard, lambda m: isinstance(m, Status) and m.cameras["cam"].get("threshold", {}).get("method") == "external"
        )
        assert status.detail["thresholds"]["cameras"]["cam"]["in_force"]
        notice = wait_for(heard, lambda m: isinstance(m, Notice) and m.kind == "threshold.set")
        assert notice.detail["threshold"] == 1e6
    assert not any("ignored" in text for text in status.warnings)

    with plant.running(), plant.listening() as heard:
        assert wait_for(heard, judged_now_by(1e6)).adaptation.threshold == 1
        assert plant.ask(None).ok
        heard.forget()
        assert wait_for(heard, judged_now_by(first.threshold)).adaptation.threshold == 2
    with plant.running(), plant.listening() as heard:
        assert wait_for(heard, judged_now_by(first.threshold)).adaptation.threshold == 2


def test_box_connects_when_all_its_commands_are_known(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited at the broker comes at once; it must not be an unknown command."""
    known: list[set[str]] = []
    begin = Publisher.start

    def start(self: Publisher) -> None:
        known.append(set(self._desk._handlers))
        begin(self)

    monkeypatch.setattr(Publisher, "start", start)
    with plant.running() as box, plant.listening() as heard:
        wait_for(heard, lambda message: isinstance(message, VerdictMessage))
        assert box.publisher is not None
        assert known == [set(box.publisher._desk._handlers)]
    assert "threshold" in known[0]


def test_threshold_at_run_time_wins_over_the_settings(plant: Plant) -> None:
    plant.camera["threshold"] = {"value": 5e5, "bundle_id": plant.bundle.id}
    with plant.running(), plant.listening() as heard:
        wait_for(heard, judged_by(5e5))
        assert plant.ask(7e5).ok
        wait_for(heard, judged_by(7e5))
        heard.forget()
        # Back to the budget, not to the settings.
        result = plant.ask(None)
        assert result.detail["threshold"] < 5e5
        wait_for(heard, judged_by(result.detail["threshold"]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bundle_id": "a" * 64}, "it was set for bundle aaaaaaaaaaaa"),
        ({"memory_version": 3}, "it was set for memory version 3, not 0"),
        ({"camera": "other"}, "no camera 'other' is running; running are: cam"),
    ],
)
def test_threshold_that_does_not_fit_is_refused_and_not_kept(plant: Plant, changes: dict[str, Any], said: str) -> None:
    with plant.running() as box, plant.listening() as heard:
        first = wait_for(heard, lambda message: isinstance(message, VerdictMessage))
        result = plant.ask(1e6, **changes)
        assert not result.ok
        assert said in result.reason
        if "camera" not in changes:
            notice = wait_for(heard, lambda m: isinstance(m, Notice) and m.kind == "threshold.ignored")
            assert said in notice.text
        (worker,) = box.cameras
        assert worker.judge.threshold.value == first.threshold
    assert not (plant.tmp_path / "state" / "thresholds.json").exists()


def test_kept_threshold_of_another_bundle_or_scope_is_ignored_in_sight(plant: Plant, tmp_path: Path) -> None:
    with plant.running(), plant.listening() as heard:
        wait_for(heard, lambda message: isinstance(message, VerdictMessage))
        assert plant.ask(1e6).ok
    plant.camera["region_of_interest"] = {"exclude": [{"x": 0, "y": 0, "w": 8, "h": 8}]}
    with plant.running(), plant.listening() as heard:
        status = wait_for(heard, lambda m: isinstance(m, Status) and any("ignored" in w for w in m.warnings))
        assert any("the camera's region, mask or smallest area was another one" in text for text in status.warnings)
        assert not status.detail["thresholds"]["cameras"]["cam"]["in_force"]
        wait_for(heard, lambda m: isinstance(m, Notice) and m.kind == "threshold.ignored")
    del plant.camera["region_of_interest"]
    plant.bundle = make_tiny_bundle(tmp_path / "other", product="other")
    with plant.running(), plant.listening() as heard:
        verdict = wait_for(heard, lambda message: isinstance(message, VerdictMessage))
        assert verdict.threshold < 1e6
        notice = wait_for(heard, lambda m: isinstance(m, Notice) and "set for bundle" in m.text)
        assert notice.kind == "threshold.ignored"


def test_damaged_file_is_put_aside_and_told(plant: Plant) -> None:
    state = plant.tmp_path / "state"
    state.mkdir()
    (state / "thresholds.json").write_text('{"schema": "lineward.thresholds/1", "cameras": {"cam": {"value": "x"')
    with plant.running(), plant.listening() as heard:
        wait_for(heard, lambda m: isinstance(m, Notice) and m.kind == "threshold.damaged")
        assert plant.ask(1e6).ok
        wait_for(heard, judged_by(1e6))
    assert json.loads((state / "thresholds.json").read_text())["cameras"]["cam"]["value"] == 1e6
    assert len(list(state.glob("thresholds.json.damaged-*"))) == 1


def test_command_line_sets_a_threshold_and_takes_it_back(plant: Plant) -> None:
    arguments = ["command", "threshold", "--site", "plant", "--box", "box1", "--broker", plant.url]
    for name, value in (("camera", "cam"), ("bundle_id", plant.bundle.id), ("memory_version", "0")):
        arguments += ["--set", f"{name}={value}"]
    with plant.running() as box, plant.listening() as heard:
        wait_for(heard, lambda message: isinstance(message, VerdictMessage))
        (worker,) = box.cameras
        for value, source in (("1e6", "run time"), ("null", "budget")):
            result = CliRunner().invoke(app, [*arguments, "--set", f"value={value}"])
            assert result.exit_code == 0, result.output
            assert worker.judge.threshold_source == source
            assert (worker.judge.threshold.value == 1e6) == (value == "1e6")
