"""A box whose cameras, engine or broker hang: it says so, and ends in time all the same."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import cv2
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import edge.box_contents
from edge.alerts.reconnector import Reconnector
from edge.box import Box
from edge.inference.detector import Detector
from edge.settings import load_settings
from tests.edge.tiny_bundle import good_frame, make_tiny_bundle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge.bundle import Bundle

SOON = 30.0
STOP_GOAL_S = 3.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def silent_broker() -> Iterator[str]:
    """An address that takes no connection and refuses none: a SYN to it is dropped."""
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            filling = sockets.enter_context(socket.socket())
            filling.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                filling.connect(listener.getsockname())
        yield f"mqtt://127.0.0.1:{listener.getsockname()[1]}"


def configured(folder: Path, bundle: Bundle, url: str, **more: Any) -> Path:
    images = folder / "images"
    images.mkdir()
    cv2.imwrite(str(images / "0.png"), good_frame(1))
    source = {"kind": "folder", "path": str(images), "loop": True, "fps": 20}
    content = {
        "site": "plant", "box": "box1", "state_dir": "state", "bundle": str(bundle.path), "threads": 1,
        "engine": "onnxruntime", "broker": {"url": url}, "cameras": [{"name": "cam", "source": source}], **more,
    }  # fmt: skip
    path = folder / "box.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@contextlib.contextmanager
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let no inference return; gives the event that one has begun."""
    begun, go_on = threading.Event(), threading.Event()
    golden = Detector.predict

    def predict(self: Detector, *arguments: Any, **values: Any) -> Any:
        begun.set()
        assert go_on.wait(SOON)
        return golden(self, *arguments, **values)

    monkeypatch.setattr(Detector, "predict", predict)
    yield begun
    go_on.set()


def test_stuck_judge_keeps_the_watchdogs_word_back_and_is_named(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge.box_contents, "WATCHDOG_LIMIT_S", 0.3)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd, hanging(monkeypatch) as begun:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        box = Box(load_settings(configured(tmp_path, bundle, "mqtt://127.0.0.1:1")))

        def said() -> set[bytes]:
            found = set()
            with contextlib.suppress(BlockingIOError):
                while True:
                    found.add(systemd.recv(4096))
            return found

        box.start()
        try:
            assert not box.healthy()
            box.supervise()
            assert begun.wait(SOON)
            deadline = time.monotonic() + SOON
            first = said()
            while box.healthy():
                box.supervise()
                first |= said()
                assert time.monotonic() < deadline
                time.sleep(0.02)  # the passing of time is what is awaited
            box.supervise()

            assert b"WATCHDOG=1" in first
            assert b"WATCHDOG=1" not in said()
            assert any("cam: stuck" in text for text in box.status()["warnings"])
        finally:
            box.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_publisher_that_has_ended_is_noticed(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(_self: Reconnector) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Reconnector, "_connect_and_serve", break_down)
    box = Box(load_settings(configured(tmp_path, bundle, "mqtt://127.0.0.1:1")))
    box.start()
    try:
        assert box.publisher is not None
        deadline = time.monotonic() + SOON
        while box.publisher.alive:
            assert time.monotonic() < deadline
            time.sleep(0.01)  # the end of a thread of another: nothing to await
        box.supervise()

        assert [text for text in box.troubles() if text.startswith("publisher: ")]
        assert not box.healthy()
    finally:
        box.stop()


def test_box_stops_in_time_although_engine_and_broker_hang(
    tmp_path: Path, bundle: Bundle, silent_broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hanging(monkeypatch) as begun:
        box = Box(load_settings(configured(tmp_path, bundle, silent_broker, metrics={"port": 0})))
        box.start()
        assert begun.wait(SOON)
        started = time.monotonic()
        box.stop()

        assert time.monotonic() - started < STOP_GOAL_S


def test_process_ends_in_time_although_a_camera_and_the_broker_hang(
    tmp_path: Path, bundle: Bundle, silent_broker: str
) -> None:
    config = configured(tmp_path, bundle, silent_broker)
    hang = (
        "import sys, time, edge.capture.sources as sources\n"
        "def read(self):\n"
        "    print('reading', flush=True)\n"
        "    time.sleep(600)\n"
        "sources.FolderSource.read = read\n"
        f"sys.argv = ['lineward', 'run', '--config', {str(config)!r}]\n"
        "from edge.cli import main; main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", hang], stdout=subprocess.PIPE, text=True) as box:
        try:
            assert box.stdout is not None
            assert box.stdout.readline() == "reading\n"
            started = time.monotonic()
            box.send_signal(signal.SIGTERM)

            assert box.wait(SOON) == 0
            assert time.monotonic() - started < STOP_GOAL_S
        finally:
            box.kill()


def test_running_box_shows_prometheus_what_it_does(tmp_path: Path, bundle: Bundle) -> None:
    box = Box(load_settings(configured(tmp_path, bundle, "mqtt://127.0.0.1:1", metrics={"port": 0})))
    box.start()
    try:
        deadline = time.monotonic() + SOON
        while box.metrics.value("judged") < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)  # the frames of a folder: nothing to await
        box.supervise()
        port = box.status()["detail"]["metrics"]["port"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=SOON) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=SOON) as answer:
            assert answer.read() == b"ok\n"
    finally:
        box.stop()
    found = {(sample.name, *sorted(sample.labels.values())): sample.value for one in families for sample in one.samples}
    assert found["lineward_frames_judged_total", "cam"] >= 3
    assert found["lineward_stage_duration_seconds_count", "inference"] >= 3
    assert found["lineward_broker_connected",] == 0
    assert found["lineward_healthy",] == 1
    assert found["lineward_bundle_info", bundle.id, "tiny", "tiny"] == 1
