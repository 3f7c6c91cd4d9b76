"""Capture: what reaches the consumer, what is lost and counted, and what a source says of itself."""

from __future__ import annotations

import logging
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge.capture.building import build_source
from edge.capture.capture import MAX_HUNG, CameraState, Capture, LostFrame
from edge.capture.opencv import VideoSource, ask
from edge.capture.settings import DropPolicy, SourceSettings, redact
from edge.capture.sources import IDLE, FolderSource, Grab, Idle
from edge.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.frames import Frame

CAMERA = SourceSettings(kind="camera", url="rtsp://admin:hunter2@cam/1", stall_seconds=5, reconnect_seconds=4)
WAIT_SECONDS = 20


def folder_of(path: Path, count: int, *, suffix: str = ".png") -> Path:
    path.mkdir()
    for index in range(count):
        cv2.imwrite(str(path / f"{index:03d}{suffix}"), np.full((32, 48, 3), 10 * index, np.uint8))
    return path


def video_of(path: Path, count: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for index in range(count):
        writer.write(np.full((48, 64, 3), 20 * index, np.uint8))
    writer.release()
    return path


def drain(capture: Capture) -> list[Frame]:
    frames = []
    while not capture.finished:
        frame = capture.get(WAIT_SECONDS)
        if frame is not None:
            frames.append(frame)
    return frames


class ScriptedSource:
    """Plays a script: an int is that many frames, None a disconnection, an exception is raised, a callable called."""

    def __init__(self, script: list[object]) -> None:
        self.script = script
        self.opened = self.closed = 0

    def open(self) -> None:
        self.opened += 1
        if self.script and isinstance(self.script[0], CaptureError):
            raise self.script.pop(0)

    def read(self) -> Grab | None:
        while self.script and callable(self.script[0]):
            self.script.pop(0)()
        if not self.script:
            return None
        step = self.script[0]
        if isinstance(step, Exception):
            raise self.script.pop(0)
        if step is None:
            self.script.pop(0)
            return None
        self.script[0] = step - 1
        if step == 1:
            self.script.pop(0)
        return Grab(np.zeros((4, 4, 3), np.uint8), "")

    def close(self) -> None:
        self.closed += 1


class FakeTime:
    """A clock that only waiting moves; remembers the waits and ends the run after ``limit`` of them."""

    def __init__(self, limit: int = 100) -> None:
        self.now = 0
        self.waits: list[float] = []
        self.limit = limit
        self.done = threading.Event()

    def clock(self) -> int:
        return self.now

    def wait(self, stop: threading.Event, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now += round(seconds * 1e9)
        if len(self.waits) >= self.limit:
            self.done.set()
            return stop.wait(WAIT_SECONDS)
        return stop.is_set()


def test_folder_frames_sorted_and_numbered(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "images", 5)
    (folder / "notes.txt").write_text("no image")
    with Capture(name="a", settings=SourceSettings(kind="folder", path=str(folder))) as capture:
        frames = drain(capture)
        assert [frame.name for frame in frames] == [f"{index:03d}.png" for index in range(5)]
        assert [frame.camera_seq for frame in frames] == list(range(5))
        assert [int(frame.image.mean()) for frame in frames] == [0, 10, 20, 30, 40]
        assert all(frame.captured_at.utcoffset() is not None for frame in frames)
        assert capture.state is CameraState.ENDED
        assert capture.counters.delivered == capture.counters.captured == 5


@pytest.mark.parametrize("damage", ["empty", "noise", "truncated jpeg", "truncated png"])
def test_folder_corrupt_image_skipped_and_reported(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "images", 3)
    noisy = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    suffix = ".jpg" if "jpeg" in damage else ".png"
    whole = cv2.imencode(suffix, noisy)[1].tobytes()
    bad = folder / f"001b{suffix}"
    bad.write_bytes({"empty": b"", "noise": bytes(range(256))}.get(damage, whole[: len(whole) * 3 // 4]))
    lost: list[LostFrame] = []
    with Capture(name="a", settings=SourceSettings(kind="folder", path=str(folder)), on_lost=lost.append) as capture:
        frames = drain(capture)
        assert [frame.camera_seq for frame in frames] == [0, 1, 3]
        assert capture.counters.corrupt == 1
    assert [(item.camera_seq, item.name, item.reason) for item in lost] == [(2, bad.name, "corrupt")]
    assert sum(str(bad) in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_missing_place_names_path_and_cure(tmp_path: Path, kind: str) -> None:
    capture = Capture(name="a", settings=SourceSettings(kind=kind, path=str(tmp_path / "nowhere")))
    with pytest.raises(CaptureError, match=r"nowhere: no such .*set the source's path"):
        capture.start()
    assert capture.state is CameraState.FAILED


def test_folder_without_images_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="holds no image"):
        FolderSource(tmp_path).open()


def test_folder_loop_without_one_good_image_fails_instead_of_spinning(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"junk")
    with Capture(name="a", settings=SourceSettings(kind="folder", path=str(tmp_path), loop=True)) as capture:
        assert capture.get(WAIT_SECONDS) is None
        assert capture.state is CameraState.FAILED
        assert "not one of its 1 images" in str(capture.error)


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_loop_starts_again(tmp_path: Path, kind: str) -> None:
    place = folder_of(tmp_path / "f", 3) if kind == "folder" else video_of(tmp_path / "v.avi", 3)
    with Capture(name="a", settings=SourceSettings(kind=kind, path=str(place), loop=True)) as capture:
        frames = [capture.get(WAIT_SECONDS) for _ in range(7)]
    assert [frame.camera_seq for frame in frames] == list(range(7))
    assert np.array_equal(frames[0].image, frames[6].image)


def test_fps_paces_a_folder(tmp_path: Path) -> None:
    fake = FakeTime()
    settings = SourceSettings(kind="folder", path=str(folder_of(tmp_path / "f", 4)), fps=10)
    with Capture(name="a", settings=settings, clock=fake.clock, wait=fake.wait) as capture:
        frames = drain(capture)
    assert [frame.captured_ns for frame in frames] == [0, 100_000_000, 200_000_000, 300_000_000]


@pytest.mark.parametrize(("policy", "kept"), [(DropPolicy.DROP_OLDEST, [4, 5]), (DropPolicy.DROP_NEWEST, [0, 1])])
def test_drop_policy_chooses_and_counts(policy: DropPolicy, kept: list[int]) -> None:
    lost: list[LostFrame] = []
    read_all, hold = threading.Event(), threading.Event()
    source = ScriptedSource([6, read_all.set, hold.wait])
    capture = Capture(
        name="a", settings=CAMERA, policy=policy, capacity=2, make_source=lambda: source, on_lost=lost.append
    )
    capture.start()
    assert read_all.wait(WAIT_SECONDS)
    assert [capture.get(WAIT_SECONDS).camera_seq for _ in kept] == kept
    hold.set()
    capture.stop()
    assert capture.counters.dropped == 4
    assert sorted(item.camera_seq for item in lost) == sorted(set(range(6)) - set(kept))
    assert {item.reason for item in lost} == {"dropped"}


def test_wait_policy_loses_nothing(tmp_path: Path) -> None:
    settings = SourceSettings(kind="folder", path=str(folder_of(tmp_path / "f", 9)), capacity=1)
    with Capture(name="a", settings=settings) as capture:
        assert [frame.camera_seq for frame in drain(capture)] == list(range(9))
        assert capture.counters.dropped == 0


def test_stop_counts_what_was_left(tmp_path: Path) -> None:
    lost: list[LostFrame] = []
    settings = SourceSettings(kind="folder", path=str(folder_of(tmp_path / "f", 9)), capacity=2)
    capture = Capture(name="a", settings=settings, on_lost=lost.append)
    capture.start()
    assert capture.get(WAIT_SECONDS) is not None
    capture.stop()
    capture.stop()
    counters = capture.counters
    assert counters.captured == counters.delivered + counters.dropped == 1 + len(lost)
    assert capture.finished
    assert capture.get(0) is None


def test_camera_away_at_start_is_retried_with_bounded_backoff(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fake = FakeTime(limit=6)
    source = ScriptedSource([CaptureError("away rtsp://admin:hunter2@cam/1") for _ in range(9)])
    capture = Capture(name="a", settings=CAMERA, make_source=lambda: source, clock=fake.clock, wait=fake.wait)
    capture.start()
    assert fake.done.wait(WAIT_SECONDS)
    assert capture.state is CameraState.RECONNECTING
    capture.stop()
    assert fake.waits == [0.5, 1, 2, 4, 4, 4]
    changes = [record.getMessage() for record in caplog.records if "reconnecting" in record.getMessage()]
    assert changes == [
        "camera a: starting -> reconnecting: away rtsp://***@cam/1",
        "camera a: reconnecting -> ended",
    ]


def test_camera_lost_is_reconnected_and_numbers_go_on() -> None:
    fake = FakeTime(limit=3)
    source = ScriptedSource([2, None, CaptureError("away"), 3])
    capture = Capture(
        name="a", settings=CAMERA, capacity=9, make_source=lambda: source, clock=fake.clock, wait=fake.wait
    )
    capture.start()
    assert [capture.get(WAIT_SECONDS).camera_seq for _ in range(5)] == [0, 1, 2, 3, 4]
    assert fake.done.wait(WAIT_SECONDS)
    assert capture.counters.reconnects == 1
    # The wait starts small again after a connection that gave frames.
    assert fake.waits == [0.5, 1, 0.5]
    capture.stop()
    assert source.closed >= 2


def test_camera_silent_is_stalled_until_the_next_frame() -> None:
    fake = FakeTime()
    silent, speak, hold = threading.Event(), threading.Event(), threading.Event()
    source = ScriptedSource([1, silent.set, speak.wait, 1, hold.wait])
    capture = Capture(name="a", settings=CAMERA, make_source=lambda: source, clock=fake.clock, wait=fake.wait)
    capture.start()
    assert capture.get(WAIT_SECONDS) is not None
    assert silent.wait(WAIT_SECONDS)
    assert capture.state is CameraState.STREAMING
    fake.now += 5_000_000_000
    assert capture.state is CameraState.STALLED
    assert capture.error == "no frame for 5.0 s"
    speak.set()
    assert capture.get(WAIT_SECONDS) is not None
    assert capture.state is CameraState.STREAMING
    hold.set()
    capture.stop()


def test_driver_failure_ends_in_failed_and_is_counted_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    source = ScriptedSource([1, ZeroDivisionError("rtsp://admin:hunter2@cam/1")])
    with Capture(name="a", settings=CAMERA, make_source=lambda: source) as capture:
        assert capture.get(WAIT_SECONDS) is not None
        assert capture.get(WAIT_SECONDS) is None
        assert capture.state is CameraState.FAILED
        assert capture.error == "ZeroDivisionError: rtsp://***@cam/1"
    assert "hunter2" not in caplog.text
    assert source.closed == 1


def test_real_camera_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    settings = SourceSettings(kind="camera", url="rtsp://admin:hunter2@127.0.0.1:1/1")
    fake = FakeTime(limit=1)
    capture = Capture(name="a", settings=settings, clock=fake.clock, wait=fake.wait)
    capture.start()
    assert fake.done.wait(WAIT_SECONDS)
    assert (
        capture.error
        == "camera rtsp://***@127.0.0.1:1/1: does not answer; check the address, the login and the network"
    )
    capture.stop()
    printed = capfd.readouterr()
    assert "hunter2" not in printed.out + printed.err + repr(capture) + repr(settings) + repr(build_source(settings))


def test_video_held_frames_are_never_overwritten(tmp_path: Path) -> None:
    settings = SourceSettings(kind="video", path=str(video_of(tmp_path / "v.avi", 12)), capacity=1)
    with Capture(name="a", settings=settings) as capture:
        rows = [frame.image[:1] for frame in drain(capture)]  # a view of each, the frame itself let go
    assert [round(float(row.mean()) / 20) for row in rows] == list(range(12))


def test_video_buffers_are_used_again_once_nobody_holds_them(tmp_path: Path) -> None:
    source = VideoSource(video_of(tmp_path / "v.avi", 12), buffers=2)
    source.open()
    source.read()  # tells the size; the frames behind it come in the pool's buffers
    first = source.read().image.ctypes.data
    held = [source.read() for _ in range(3)]
    addresses = [grab.image.ctypes.data for grab in held]
    assert addresses[0] == first
    assert len(set(addresses)) == 3
    del held[0]
    assert source.read().image.ctypes.data == first
    assert list(source._pool.addresses) == addresses[:2]
    source.close()


def test_video_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.avi").write_bytes(b"junk" * 100)
    with pytest.raises(CaptureError, match=r"v\.avi: no video that OpenCV can decode"):
        VideoSource(tmp_path / "v.avi").open()


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "folder"},
        {"kind": "folder", "path": "a", "device": 0},
        {"kind": "camera", "path": "a"},
        {"kind": "camera", "device": 0, "url": "rtsp://a/"},
        {"kind": "camera", "device": -1},
        {"kind": "camera", "device": "video0"},
        {"kind": "camera", "url": "cam.local/stream"},
        {"kind": "camera", "device": 0, "loop": True},
        {"kind": "folder", "path": "a", "colour": "red"},
        {"kind": "folder", "path": "a", "capacity": 0},
    ],
)
def test_settings_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SourceSettings.model_validate(content)


def test_settings_error_does_not_repeat_a_password() -> None:
    with pytest.raises(ValidationError) as caught:
        SourceSettings.model_validate({"kind": "folder", "url": "rtsp://admin:hunter2@cam/1"})
    assert "hunter2" not in str(caught.value)


def test_settings_every_field_has_title_and_description() -> None:
    for name, field in SourceSettings.model_fields.items():
        assert field.title, name
        assert field.description, name


def test_settings_default_policy_suits_the_kind() -> None:
    assert SourceSettings(kind="folder", path="a").drop_policy is DropPolicy.WAIT
    assert SourceSettings(kind="camera", device="0").drop_policy is DropPolicy.DROP_OLDEST
    assert SourceSettings(kind="camera", device="0").device == 0


SECRET = st.text("abcXYZ0189:@/%!$#?", min_size=8, max_size=20).filter(lambda text: "secret" not in text)


@given(SECRET, st.sampled_from(["rtsp", "http"]))
def test_redact_hides_every_password(password: str, scheme: str) -> None:
    text = f"open {scheme}://user:{password}@host.local/stream failed"
    assert password not in redact(text)
    assert "user" not in redact(text)
    assert redact("a@b.c and http://host/x?a=1") == "a@b.c and http://host/x?a=1"


def test_redact_hides_login_in_query() -> None:
    assert redact("http://h/v?user=me&pwd=x1&ch=2") == "http://h/v?user=***&pwd=***&ch=2"


class HangingSource:
    """A camera whose driver never returns from a call, until it is let go."""

    def __init__(self, let_go: threading.Event, *, frames: int, hangs_in: str = "read") -> None:
        self.let_go, self.frames, self.hangs_in = let_go, frames, hangs_in
        self.closed = threading.Event()

    def open(self) -> None:
        if self.hangs_in == "open":
            self.let_go.wait(WAIT_SECONDS)

    def read(self) -> Grab | None:
        if self.frames == 0:
            self.let_go.wait(WAIT_SECONDS)
            return Grab(np.full((4, 4, 3), 99, np.uint8), "late")
        self.frames -= 1
        return Grab(np.zeros((4, 4, 3), np.uint8), "")

    def close(self) -> None:
        self.closed.set()


IMPATIENT = CAMERA.model_copy(update={"abandon_seconds": 10})


def until(condition: Callable[[], bool], capture: Capture) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        capture.get(0.01)
        assert time.monotonic() < deadline, capture


@pytest.mark.parametrize("hangs_in", ["open", "read"])
def test_driver_that_never_returns_is_left_behind_and_the_camera_opened_anew(hangs_in: str) -> None:
    fake, let_go, hold = FakeTime(), threading.Event(), threading.Event()
    made = [HangingSource(let_go, frames=2, hangs_in=hangs_in), HangingSource(hold, frames=3)]
    left = list(made)
    capture = Capture(
        name="a", settings=IMPATIENT, make_source=lambda: left.pop(0), clock=fake.clock, wait=fake.wait, capacity=9
    )
    capture.start()
    before = 0 if hangs_in == "open" else 2
    assert [capture.get(WAIT_SECONDS).camera_seq for _ in range(before)] == list(range(before))
    until(lambda: capture._reader.hung_seconds() == 0 and capture._reader._calling_since is not None, capture)
    fake.now += 9_000_000_000
    assert capture.state is (CameraState.STARTING if hangs_in == "open" else CameraState.STALLED)
    fake.now += 1_000_000_000
    assert capture.state is CameraState.RECONNECTING or capture.counters.captured > before
    assert [capture.get(WAIT_SECONDS).camera_seq for _ in range(3)] == list(range(before, before + 3))
    assert capture.state is CameraState.STREAMING
    assert capture.counters.abandoned == 1
    let_go.set()
    assert made[0].closed.wait(WAIT_SECONDS), "it cleans up once its driver returns"
    until(lambda: not capture._hung[0].alive, capture)
    assert capture.counters.captured == before + 3, "what it gives then is nobody's frame"
    assert capture.state is CameraState.STREAMING
    assert capture.counters.reconnects == (hangs_in == "read")
    hold.set()
    capture.stop()


def test_threads_that_hang_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    fake, let_go = FakeTime(), threading.Event()
    made: list[HangingSource] = []

    def make() -> HangingSource:
        made.append(HangingSource(let_go, frames=0))
        return made[-1]

    capture = Capture(name="a", settings=IMPATIENT, make_source=make, clock=fake.clock, wait=fake.wait)
    capture.start()
    for _ in range(MAX_HUNG + 5):
        until(lambda: capture._reader._calling_since is not None, capture)
        fake.now += 10_000_000_000
        state = capture.state
    assert len(made) == MAX_HUNG + 1
    assert capture.counters.abandoned == MAX_HUNG
    assert state is CameraState.STALLED
    assert "4 threads hang in its driver; switch the camera off and on" in capture.error
    assert sum("threads hang" in record.getMessage() for record in caplog.records) == 1
    let_go.set()
    until(lambda: capture.state is CameraState.STREAMING, capture)
    capture.stop()


def test_another_frame_size_is_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    class Resizing(ScriptedSource):
        def read(self) -> Grab | None:
            grab = super().read()
            return grab if grab is None else Grab(np.zeros((4, 4 if len(self.script) > 1 else 6, 3), np.uint8), "")

    hold = threading.Event()
    source = Resizing([3, hold.is_set, 2, hold.wait])
    capture = Capture(name="a", settings=CAMERA, capacity=9, make_source=lambda: source)
    capture.start()
    shapes = [capture.get(WAIT_SECONDS).image.shape[1] for _ in range(5)]
    hold.set()
    capture.stop()
    assert sorted(set(shapes)) == [4, 6]
    assert capture.counters.resized == 1
    told = [record.getMessage() for record in caplog.records if "pixels now" in record.getMessage()]
    assert told == ["camera a: frames are 6x4 pixels now, they were 4x4; regions and masks are those of the old size"]


@pytest.mark.parametrize("kind", ["folder", "video"])
def test_software_trigger_gives_the_next_image_of_a_file(tmp_path: Path, kind: str) -> None:
    place = folder_of(tmp_path / "f", 3) if kind == "folder" else video_of(tmp_path / "v.avi", 3)
    with Capture(name="a", settings=SourceSettings(kind=kind, path=str(place), trigger="software")) as capture:
        assert capture.get(0.2) is None
        capture.fire()
        assert capture.get(WAIT_SECONDS).camera_seq == 0
        assert capture.get(0.1) is None
        capture.fire()
        capture.fire()
        assert [capture.get(WAIT_SECONDS).camera_seq for _ in range(2)] == [1, 2]
        capture.fire()
        assert capture.get(WAIT_SECONDS) is None
        assert capture.state is CameraState.ENDED
        with pytest.raises(CaptureError, match="cannot be triggered, it is ended"):
            capture.fire()


def test_source_without_software_trigger_refuses(tmp_path: Path) -> None:
    settings = SourceSettings(kind="folder", path=str(folder_of(tmp_path / "f", 3)), loop=True)
    capture = Capture(name="a", settings=settings)
    with pytest.raises(CaptureError, match="cannot be triggered, it is starting"):
        capture.fire()
    with capture, pytest.raises(CaptureError, match="has no software trigger; set the source's trigger"):
        capture.fire()


class ArmedSource:
    """A camera with a software trigger: a frame per trigger, as long as it answers."""

    def __init__(self) -> None:
        self.due = threading.Semaphore(0)
        self.deaf = False
        self.reads = 0

    def open(self) -> None:
        pass

    def fire(self) -> None:
        if not self.deaf:
            self.due.release()

    def read(self) -> Grab | Idle:
        self.reads += 1
        return Grab(np.zeros((4, 4, 3), np.uint8), "") if self.due.acquire(timeout=0.01) else IDLE

    def close(self) -> None:
        pass


def test_armed_camera_is_stalled_only_where_a_trigger_gives_no_frame() -> None:
    fake, source = FakeTime(), ArmedSource()
    settings = SourceSettings(kind="genicam", device="x", trigger="software", stall_seconds=5)
    with Capture(name="a", settings=settings, make_source=lambda: source, clock=fake.clock) as capture:
        until(lambda: capture.state is CameraState.STREAMING, capture)

        def pass_time() -> None:
            # In steps shorter than the stall time, each within another call of the driver.
            for _ in range(4):
                fake.now += 4_000_000_000
                seen = source.reads
                until(lambda: source.reads >= seen + 2, capture)  # noqa: B023 (called in this round)

        pass_time()
        assert capture.state is CameraState.STREAMING
        capture.fire()
        assert capture.get(WAIT_SECONDS) is not None
        pass_time()
        assert capture.state is CameraState.STREAMING
        source.deaf = True
        capture.fire()
        pass_time()
        assert capture.state is CameraState.STALLED
        source.deaf = False
        capture.fire()
        assert capture.get(WAIT_SECONDS) is not None
        assert capture.state is CameraState.STREAMING


class StubbornDriver:
    """A V4L2 driver that chooses other values than it is asked for, and says nothing."""

    def __init__(self, **given: float) -> None:
        self.values = {cv2.CAP_PROP_FOURCC: given.get("fourcc", 0), cv2.CAP_PROP_FPS: given.get("fps", 0)}
        self.asked: list[int] = []

    def set(self, prop: int, value: float) -> bool:
        self.asked.append(prop)
        self.values.setdefault(prop, value)
        return True

    def get(self, prop: int) -> float:
        return self.values[prop]


def test_local_camera_that_gives_something_else_is_remarked() -> None:
    yuyv = float(cv2.VideoWriter_fourcc(*"YUYV"))
    driver = StubbornDriver(fourcc=yuyv, fps=29.97)
    asked = {"fps": 60.0, "width": 1920, "height": None, "pixel_format": "MJPG"}
    assert ask(driver, asked) == (
        "pixel_format MJPG was asked for, the camera gives YUYV",
        "fps 60 was asked for, the camera gives 29.97",
    )
    assert driver.asked == [cv2.CAP_PROP_FOURCC, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FPS]
    assert ask(driver, {"fps": 30.0, "pixel_format": "YUYV"}) == ()


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "folder", "path": "a", "trigger": "hardware"},
        {"kind": "camera", "device": 0, "trigger": "software"},
        {"kind": "gstreamer", "pipeline": "videotestsrc", "trigger": "hardware"},
        {"kind": "gstreamer"},
        {"kind": "gstreamer", "device": 0},
        {"kind": "genicam"},
        {"kind": "genicam", "device": "x", "pixel_format": "Mono12"},
        {"kind": "genicam", "device": "x", "loop": True},
        {"kind": "genicam", "device": "x", "genicam": {"trigger_source": "a b"}},
        {"kind": "camera", "device": 0, "genicam": {"gain": 1}},
        {"kind": "camera", "device": 0, "pixel_format": "JPEG2"},
        {"kind": "camera", "url": "rtsp://a/", "pixel_format": "YUYV"},
    ],
)
def test_settings_of_kinds_and_triggers_refused(content: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        SourceSettings.model_validate(content)


def test_serial_number_without_quotation_marks_is_text() -> None:
    assert SourceSettings(kind="genicam", device=21345).device == "21345"


@given(SECRET)
def test_redact_hides_logins_of_pipelines(password: str) -> None:
    text = f'rtspsrc user-id=admin7 user-pw={password} ! a proxy-pw="{password} x" ! video/x-raw,width=64'
    shown = redact(text)
    assert password not in shown
    assert "admin7" not in shown
    assert shown.endswith("! video/x-raw,width=64")


def test_sources_of_the_manual_are_valid() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "cameras.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yml\n(source:.*?)```", manual, re.DOTALL)
    kinds = [SourceSettings.model_validate(yaml.safe_load(block)["source"]).kind.value for block in blocks]
    assert set(kinds) == {"camera", "gstreamer", "genicam", "folder"}
    assert len(blocks) == manual.count("```yml") == 11
