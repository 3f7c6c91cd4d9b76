"""Cameras that are unplugged, freeze, change size, send garbage or are not there: real sockets and child processes.

In each case another camera goes on beside it, and every frame stays counted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import edge.capture.gstreamer
import edge.capture.opencv
from edge.bundle import Engine, Precision
from edge.capture.capture import CameraState, Capture
from edge.capture.opencv import CameraSource
from edge.capture.settings import SourceSettings
from edge.inference.detector import Detector
from tests.edge.test_camera import work
from tests.edge.tiny_bundle import make_tiny_bundle
from tests.faults import rtsp_camera
from tests.faults.mjpeg_camera import MjpegCamera
from tests.faults.rtsp_camera import RtspCamera

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOON = 40
READ_TIMEOUT_MS = 800
needs_gstreamer = pytest.mark.skipif(
    shutil.which("gst-launch-1.0") is None, reason="gst-launch-1.0 is not installed (Debian gstreamer1.0-tools)"
)


def network_camera(url: str, **more: Any) -> SourceSettings:
    return SourceSettings(kind="camera", url=url, stall_seconds=0.3, reconnect_seconds=1, **more)


def pipeline(text: str, **more: Any) -> SourceSettings:
    return SourceSettings(kind="gstreamer", pipeline=text, stall_seconds=0.3, reconnect_seconds=1, **more)


class Consumer:
    """Takes every frame of a capture, and looks at its counters each time."""

    def __init__(self, name: str, settings: SourceSettings) -> None:
        self.capture = Capture(name=name, settings=settings, on_lost=lambda lost: self.lost.append(lost.camera_seq))
        self.numbers: list[int] = []
        self.lost: list[int] = []
        self.shapes: list[tuple[int, ...]] = []
        self.states: list[CameraState] = []
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Consumer:  # noqa: PYI034 (final)
        self.capture.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self.capture.stop()
        counters = self.capture.counters
        assert counters.captured == counters.delivered + counters.dropped
        assert counters.delivered == len(self.numbers)
        assert sorted(self.numbers + self.lost) == list(range(counters.captured + counters.corrupt))

    def _run(self) -> None:
        while not self._ending.is_set():
            frame = self.capture.get(0.05)
            if frame is not None:
                self.numbers.append(frame.camera_seq)
                if self.shapes[-1:] != [frame.image.shape]:
                    self.shapes.append(frame.image.shape)
            with self.capture._changed:
                counters, queued = self.capture.counters, self.capture.queued
            assert counters.captured == counters.delivered + counters.dropped + queued
            state = self.capture.state
            if self.states[-1:] != [state]:
                self.states.append(state)

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SOON
        while not condition():
            time.sleep(0.01)  # what is looked at tells nobody when it changes
            assert time.monotonic() < deadline, (self.capture, self.capture.error, self.capture.counters)

    def wait_for_frames(self, count: int) -> None:
        seen = len(self.numbers)
        self.wait(lambda: len(self.numbers) >= seen + count)

    def wait_for_state(self, state: CameraState) -> None:
        self.wait(lambda: self.capture.state is state)


@pytest.fixture(autouse=True)
def _short_time_outs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.capture.opencv, "_TIMEOUT_MS", READ_TIMEOUT_MS)


@pytest.fixture
def neighbour() -> Iterator[Consumer]:
    """Another camera of the box: after the test it must have noticed nothing."""
    with MjpegCamera() as camera, Consumer("neighbour", network_camera(camera.url, capacity=64)) as consumer:
        consumer.wait_for_frames(3)
        yield consumer
        consumer.wait_for_frames(3)
        assert consumer.states == [CameraState.STARTING, CameraState.STREAMING]
        assert consumer.numbers == list(range(len(consumer.numbers)))
        assert consumer.capture.counters.reconnects == 0


def test_camera_unplugged_and_back_with_another_size(neighbour: Consumer, caplog: pytest.LogCaptureFixture) -> None:
    with MjpegCamera() as camera, Consumer("a", network_camera(camera.url)) as consumer:
        consumer.wait_for_frames(3)
        camera.unplug()
        consumer.wait_for_state(CameraState.RECONNECTING)
        neighbour.wait_for_frames(10)
        camera.size = (32, 40)
        camera.plug_in()
        consumer.wait_for_frames(3)
        assert consumer.capture.state is CameraState.STREAMING
        assert consumer.shapes == [(48, 64, 3), (32, 40, 3)]
        counters = consumer.capture.counters
        assert (counters.reconnects, counters.resized) == (1, 1)
    assert "hunter2" not in caplog.text


def test_camera_that_freezes_is_stalled_and_then_connected_again(neighbour: Consumer) -> None:
    with MjpegCamera() as camera, Consumer("a", network_camera(camera.url)) as consumer:
        consumer.wait_for_frames(3)
        camera.freeze()
        consumer.wait_for_state(CameraState.STALLED)
        neighbour.wait_for_frames(3)
        consumer.wait_for_state(CameraState.STREAMING)
        consumer.wait_for_frames(3)
        assert camera.connections == 2
        assert consumer.states[1:4] == [CameraState.STREAMING, CameraState.STALLED, CameraState.RECONNECTING]


def test_driver_that_does_not_return_is_left_behind(neighbour: Consumer, monkeypatch: pytest.MonkeyPatch) -> None:
    # OpenCV's own limit is far: the read hangs.
    monkeypatch.setattr(edge.capture.opencv, "_TIMEOUT_MS", 60_000)
    with MjpegCamera() as camera:
        with Consumer("a", network_camera(camera.url, abandon_seconds=0.8)) as consumer:
            consumer.wait_for_frames(3)
            camera.freeze()
            consumer.wait(lambda: consumer.capture.counters.abandoned == 1)
            consumer.wait_for_frames(3)
            assert consumer.capture.state is CameraState.STREAMING
            hung = consumer.capture._hung
            assert [reader.alive for reader in hung] == [True]
            neighbour.wait_for_frames(3)
        camera.unplug()
        consumer.wait(lambda: not hung[0].alive)
        camera.plug_in()


def test_garbage_in_the_stream(neighbour: Consumer) -> None:
    with MjpegCamera() as camera, Consumer("a", network_camera(camera.url)) as consumer:
        consumer.wait_for_frames(3)
        camera.garbage = 8
        consumer.wait(lambda: camera.garbage == 0)
        consumer.wait_for_frames(3)
        assert consumer.capture.state is CameraState.STREAMING
        assert consumer.shapes == [(48, 64, 3)]
    neighbour.wait_for_frames(1)


def test_camera_that_refuses_or_never_answers(neighbour: Consumer) -> None:
    # A listener that accepts nothing: the connection stands, and no byte ever comes.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with (
            Consumer("silent", network_camera(f"http://admin:hunter2@127.0.0.1:{port}/a.mjpg")) as one,
            Consumer("refuses", network_camera("rtsp://admin:hunter2@127.0.0.1:1/a")) as two,
        ):
            for consumer in (one, two):
                consumer.wait_for_state(CameraState.RECONNECTING)
                assert "does not answer; check the address, the login and the network" in consumer.capture.error
                assert "hunter2" not in consumer.capture.error
            neighbour.wait_for_frames(3)
        assert one.capture.counters.captured == two.capture.counters.captured == 0


@pytest.mark.skipif(bool(rtsp_camera.missing()), reason=rtsp_camera.missing())
def test_rtsp_camera_with_a_login_unplugged_and_back(
    neighbour: Consumer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with RtspCamera(tmp_path) as camera, Consumer("a", network_camera(camera.url)) as consumer:
        consumer.wait_for_frames(3)
        camera.unplug()
        consumer.wait_for_state(CameraState.RECONNECTING)
        camera.size = "96x64"
        camera.plug_in()
        consumer.wait_for_frames(3)
        assert consumer.shapes == [(48, 64, 3), (64, 96, 3)]
        assert consumer.capture.counters.reconnects == 1
        neighbour.wait_for_frames(1)
    printed = capfd.readouterr()
    assert "hunter2" not in caplog.text + printed.out + printed.err


@pytest.mark.skipif(bool(rtsp_camera.missing()), reason=rtsp_camera.missing())
def test_rtsp_login_that_is_wrong(tmp_path: Path) -> None:
    with RtspCamera(tmp_path) as camera:
        url = camera.url.replace("hunter2", "hunter3")
        with Consumer("a", network_camera(url)) as consumer:
            consumer.wait_for_state(CameraState.RECONNECTING)
            assert "check the address, the login and the network" in consumer.capture.error
            assert "hunter3" not in consumer.capture.error


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@needs_gstreamer
@pytest.mark.skipif(bool(rtsp_camera.missing()), reason=rtsp_camera.missing())
@pytest.mark.parametrize("login", ["in the address", "as properties"])
def test_rtsp_camera_through_a_pipeline(tmp_path: Path, login: str, caplog: pytest.LogCaptureFixture) -> None:
    with RtspCamera(tmp_path, jpeg=True) as camera:
        location = f"location={camera.url}"
        if login == "as properties":
            location = f"location={camera.url.replace('admin:hunter2@', '')} user-id=admin user-pw=hunter2"
        settings = pipeline(f"rtspsrc {location} protocols=tcp latency=0 ! rtpjpegdepay ! jpegdec")
        with Consumer("a", settings) as consumer:
            consumer.wait_for_frames(3)
            camera.unplug()
            consumer.wait_for_state(CameraState.RECONNECTING)
            error = consumer.capture.error
            camera.plug_in()
            consumer.wait(lambda: consumer.capture.counters.reconnects >= 1)
            consumer.wait_for_frames(3)
            assert consumer.shapes == [(48, 64, 3)]
        assert "hunter2" not in caplog.text + str(error)


def child_of(consumer: Consumer) -> int | None:
    return consumer.capture._reader._source.pid


@needs_gstreamer
def test_pipeline_killed_frozen_and_back(neighbour: Consumer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.capture.gstreamer, "TIMEOUT_S", 0.6)
    settings = pipeline("videotestsrc is-live=true ! video/x-raw,width=320,height=240,framerate=50/1")
    with Consumer("a", settings) as consumer:
        consumer.wait_for_frames(3)
        children = [child_of(consumer)]
        os.kill(children[0], signal.SIGKILL)
        consumer.wait(lambda: consumer.capture.counters.reconnects == 1)
        consumer.wait_for_frames(3)
        children.append(child_of(consumer))
        os.kill(children[1], signal.SIGSTOP)
        consumer.wait_for_state(CameraState.STALLED)
        consumer.wait(lambda: consumer.capture.counters.reconnects == 2)
        consumer.wait_for_frames(3)
        children.append(child_of(consumer))
        neighbour.wait_for_frames(3)
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


@needs_gstreamer
def test_pipeline_that_changes_its_size_while_it_runs(neighbour: Consumer) -> None:
    shapes = "concat name=c"
    for width in (320, 34, 200):
        shapes += f" videotestsrc num-buffers=30 is-live=true ! video/x-raw,width={width},height=40,framerate=50/1 ! c."
    with Consumer("a", pipeline(f"{shapes} c.", capacity=64)) as consumer:
        consumer.wait(lambda: len(consumer.numbers) >= 90)
        assert consumer.shapes[:3] == [(40, 320, 3), (40, 34, 3), (40, 200, 3)]
        assert consumer.capture.counters.resized >= 2
    neighbour.wait_for_frames(1)


@needs_gstreamer
def test_many_faults_leave_no_descriptor_thread_or_child_behind() -> None:
    with Consumer(
        "a", pipeline("videotestsrc is-live=true ! video/x-raw,width=64,height=48,framerate=50/1")
    ) as consumer:
        consumer.wait_for_frames(3)
        before = descriptors(), threading.active_count()
        for round_ in range(1, 6):
            os.kill(child_of(consumer), signal.SIGKILL)
            consumer.wait(lambda: consumer.capture.counters.reconnects == round_)  # noqa: B023 (called in this round)
        consumer.wait_for_frames(1)
        assert (descriptors(), threading.active_count()) == before
        reader = consumer.capture._reader
    assert not reader.alive
    assert descriptors() == before[0] - 3


def test_buffers_hold_the_memory_of_a_camera_steady() -> None:
    with MjpegCamera() as camera:
        source = CameraSource(camera.url, buffers=4)
        source.open()
        source.read()
        addresses = set()
        for _ in range(20):
            grab = source.read()
            addresses.add(grab.image.ctypes.data)
            assert isinstance(grab.image, np.ndarray)
        assert len(addresses) <= 2
        with contextlib.suppress(OSError):
            source.close()


@needs_gstreamer
def test_judge_goes_on_when_a_camera_changes_its_size(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    detector = Detector.open(bundle, engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)
    text = "concat name=c"
    for width, height in ((96, 96), (160, 90), (50, 70)):
        text += f" videotestsrc num-buffers=10 ! video/x-raw,width={width},height={height} ! c."
    stop = threading.Event()
    worker, recorder, _ = work(
        tmp_path,
        detector=detector,
        stop=stop,
        mode="stream",
        source={"kind": "gstreamer", "pipeline": f"{text} c.", "capacity": 64},
    )
    worker.start()
    deadline = time.monotonic() + SOON
    while worker.status()["counters"]["judged"] + worker.status()["counters"]["not_judged"] < 30:
        time.sleep(0.01)  # the worker's own counters: they tell nobody
        assert time.monotonic() < deadline
    stop.set()
    assert worker.join(SOON)
    counters = worker.status()["counters"]
    assert counters["resized"] >= 2
    assert counters["failed"] == 0
    assert counters["judged"] >= 30
    assert not any("failed" in reason for _, reason in recorder.states)
