"""GenICam cameras through Aravis: pixel formats, features, triggers, and a camera that goes away and comes back."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import edge.capture.aravis
from edge.capture.aravis import Image, library
from edge.capture.capture import CameraState, Capture
from edge.capture.genicam import FORMATS, GenicamSource, to_bgr
from edge.capture.settings import GENICAM_FORMATS, SourceSettings
from edge.capture.sources import IDLE, CorruptFrameError, Grab
from edge.errors import CaptureError
from tests.edge import gige_camera
from tests.edge.gige_camera import GigeCamera

if TYPE_CHECKING:
    from collections.abc import Callable

needs_aravis = pytest.mark.skipif(bool(gige_camera.missing()), reason=gige_camera.missing())
SOON = 30
BLUE, GREEN, RED = 30, 120, 210
CODES = dict(zip(GENICAM_FORMATS, FORMATS, strict=True))


def source(device: str = "Fake_1", **settings: Any) -> GenicamSource:
    return GenicamSource(SourceSettings(kind="genicam", device=device, **settings), buffers=3)


def next_grab(one: GenicamSource) -> Grab:
    deadline = time.monotonic() + SOON
    while True:
        # The first image of a stream may lack its beginning.
        with contextlib.suppress(CorruptFrameError):
            grab = one.read()
            if grab is not IDLE:
                assert grab is not None
                return grab
        assert time.monotonic() < deadline


def wait_for(condition: Callable[[], bool], capture: Capture) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        capture.get(0.05)
        assert time.monotonic() < deadline, (capture.state, capture.error, capture.counters)


def sent(name: str, height: int = 16, width: int = 24) -> np.ndarray:
    """One colour, as a camera with this pixel format sends it (PFNC 2.4)."""
    if name == "Mono8":
        return np.full(height * width, GREEN, np.uint8)
    if name in {"RGB8", "BGR8"}:
        colour = (RED, GREEN, BLUE) if name == "RGB8" else (BLUE, GREEN, RED)
        return np.tile(np.array(colour, np.uint8), height * width)
    if name.startswith("YUV"):
        # Grey: no colour difference, so only the order of luma and chroma counts.
        return np.tile(np.array((GREEN, 128) if name == "YUV422_8" else (128, GREEN), np.uint8), height * width)
    value = {"R": RED, "G": GREEN, "B": BLUE}
    first, second = name[5], name[6]
    rows = {"R": "GB", "B": "GR", "G": None}[first] or {"R": "BG", "B": "RG"}[second]
    cell = [[value[first], value[second]], [value[rows[0]], value[rows[1]]]]
    return np.tile(np.array(cell, np.uint8), (height // 2, width // 2)).ravel()


@pytest.mark.parametrize("name", GENICAM_FORMATS)
def test_pixel_format_becomes_bgr(name: str) -> None:
    out = np.zeros((16, 24, 3), np.uint8)
    padded = np.concatenate([sent(name), np.zeros(5, np.uint8)])
    to_bgr(Image(padded, 24, 16, CODES[name], 1), out)
    colour = (GREEN,) * 3 if name == "Mono8" or name.startswith("YUV") else (BLUE, GREEN, RED)
    inner = out[2:-2, 2:-2].reshape(-1, 3).astype(int)
    assert np.abs(inner - colour).max() <= (20 if name.startswith("YUV") else 0)


def test_other_pixel_format_names_those_that_are_read() -> None:
    with pytest.raises(CaptureError, match="0x01100003, which is not read; set pixel_format to one of Mono8, Bayer"):
        to_bgr(Image(np.zeros(32, np.uint8), 4, 4, 0x01100003, 1), np.zeros((4, 4, 3), np.uint8))


def test_short_image_is_corrupt() -> None:
    with pytest.raises(CorruptFrameError, match="15 bytes came, 16 are needed"):
        to_bgr(Image(np.zeros(15, np.uint8), 4, 4, CODES["Mono8"], 7), np.zeros((4, 4, 3), np.uint8))


def test_missing_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.capture.aravis, "_LIBRARY", "libaravis-9.9.so")
    library.cache_clear()
    try:
        with pytest.raises(CaptureError, match=r"install the Debian package libaravis-0\.8-0"):
            source().open()
    finally:
        library.cache_clear()


@needs_aravis
def test_fake_device_is_listed() -> None:
    assert any(device.id == "Fake_1" and device.serial == "1" for device in library().devices(fake=True))


@needs_aravis
@pytest.mark.parametrize("name", ["Mono8", "BayerRG8", "BayerGB8", "RGB8"])
def test_frames_of_the_fake_camera(name: str) -> None:
    one = source(pixel_format=name)
    one.open()
    first, second = next_grab(one), next_grab(one)
    assert first.image.shape == (512, 512, 3)
    assert int(second.name) == int(first.name) + 1
    grey = np.array_equal(first.image[..., 0], first.image[..., 2])
    assert grey is (name == "Mono8")
    assert not np.array_equal(first.image, second.image)
    one.close()
    one.close()


@needs_aravis
def test_buffers_are_used_again_and_held_frames_are_left_alone() -> None:
    one = source(fps=100)
    one.open()
    held = next_grab(one).image
    before = held.copy()
    addresses = {next_grab(one).image.ctypes.data for _ in range(12)}
    assert len(addresses) == 1
    assert np.array_equal(held, before)
    one.close()


@needs_aravis
def test_features_are_set_and_what_differs_is_remarked() -> None:
    one = source(
        width=130, height=96, fps=40, pixel_format="Mono8", genicam={"exposure_us": 5000, "gain": 3, "offset_x": 16}
    )
    one.open()
    camera = one._camera
    assert camera.text("PixelFormat") == "Mono8"
    assert camera.ask("get_exposure_time") == 5000
    assert camera.ask("get_gain") == 3
    assert camera.ask("get_frame_rate") == pytest.approx(40, rel=0.01)
    assert camera.ask("get_integer", b"OffsetX") == 16
    grab = next_grab(one)
    assert grab.image.shape[:2] == (96, camera.ask("get_integer", b"Width"))
    assert one.remarks == () if grab.image.shape[1] == 130 else "Width 130 was asked for" in one.remarks[0]
    one.close()


@needs_aravis
def test_feature_that_a_camera_lacks_is_a_typed_error() -> None:
    with pytest.raises(CaptureError, match=r"camera Fake_1: .*TriggerSource|camera Fake_1: .*Line77"):
        source(trigger="hardware", genicam={"trigger_source": "Line77"}).open()


@needs_aravis
def test_camera_that_is_not_there() -> None:
    with pytest.raises(CaptureError, match=r"camera Fake_99: .*not found; check its power, cable and address"):
        source("Fake_99").open()


@needs_aravis
def test_triggering_needs_a_connection() -> None:
    one = source(trigger="software")
    with pytest.raises(CaptureError, match="is not connected"):
        one.fire()


@needs_aravis
@pytest.mark.parametrize("device", [gige_camera.ADDRESS, gige_camera.SERIAL])
def test_gige_frames_over_the_network(device: str) -> None:
    with GigeCamera():
        one = source(device, pixel_format="BayerRG8", fps=50)
        one.open()
        numbers = [int(next_grab(one).name) for _ in range(8)]
        assert numbers == list(range(numbers[0], numbers[0] + 8))
        one.close()


@needs_aravis
def test_software_trigger_gives_one_frame_each() -> None:
    settings = SourceSettings(
        kind="genicam", device=gige_camera.ADDRESS, trigger="software", pixel_format="Mono8", fps=100, stall_seconds=1
    )
    with GigeCamera(), Capture(name="a", settings=settings) as capture:
        wait_for(lambda: capture.state is CameraState.STREAMING, capture)
        for number in range(5):
            assert capture.get(0.1) is None
            capture.fire()
            assert capture.get(SOON).camera_seq == number
        assert capture.get(0.3) is None
        assert capture.counters.captured == 5
        assert capture.state is CameraState.STREAMING


@needs_aravis
def test_hardware_trigger_waits_for_its_line() -> None:
    settings = SourceSettings(
        kind="genicam",
        device=gige_camera.ADDRESS,
        trigger="hardware",
        genicam={"trigger_source": "Line0"},
        stall_seconds=1.0,  # of one call of the driver too, which gives the thread back after a fifth of that
    )
    with GigeCamera(), Capture(name="a", settings=settings) as capture:
        wait_for(lambda: capture.state is CameraState.STREAMING, capture)
        # Longer than the stall time: that no part comes by is no fault of the camera.
        assert capture.get(1.6) is None
        assert capture.state is CameraState.STREAMING
        with pytest.raises(CaptureError, match="has no software trigger"):
            capture.fire()


@needs_aravis
@pytest.mark.slow  # Aravis tries for 14 s before it lets go of a camera that is away
@pytest.mark.parametrize("trigger", ["free", "software", "hardware"])
def test_camera_unplugged_and_back(trigger: str) -> None:
    more = {"genicam": {"trigger_source": "Line0"}} if trigger == "hardware" else {}
    settings = SourceSettings(
        kind="genicam",
        device=gige_camera.ADDRESS,
        trigger=trigger,
        pixel_format="Mono8",
        fps=50,
        reconnect_seconds=1,
        **more,
    )
    with GigeCamera() as camera, Capture(name="a", settings=settings) as capture:
        wait_for(lambda: capture.state is CameraState.STREAMING, capture)
        camera.unplug()
        wait_for(lambda: capture.state is CameraState.RECONNECTING, capture)
        if trigger == "software":
            with pytest.raises(CaptureError, match=r"is not connected|does not answer|cannot"):
                capture.fire()
        camera.plug_in()
        wait_for(lambda: capture.state is CameraState.STREAMING, capture)
        assert capture.counters.reconnects == 1
        if trigger == "software":
            seen = capture.counters.captured
            capture.fire()
            wait_for(lambda: capture.counters.captured == seen + 1, capture)


@needs_aravis
def test_lost_packets_are_counted_and_whole_frames_go_on() -> None:
    lost = []
    settings = SourceSettings(kind="genicam", device=gige_camera.ADDRESS, pixel_format="Mono8", fps=50)
    with GigeCamera(lost=0.02), Capture(name="a", settings=settings, on_lost=lost.append) as capture:
        wait_for(lambda: capture.counters.corrupt >= 3 and capture.counters.delivered >= 1, capture)
        counters = capture.counters
        assert counters.captured == counters.delivered + counters.dropped + capture.queued
    assert {item.reason for item in itertools.islice(lost, counters.corrupt)} <= {"corrupt", "dropped"}
