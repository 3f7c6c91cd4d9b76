"""Depth cameras by stand-ins for their makers' packages, which have the same calls: what a device may do to them."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge.capture.building import build_source
from edge.capture.settings import SourceSettings
from edge.capture.sources import IDLE, Grab
from edge.errors import CaptureError


class Device:
    """A RealSense camera as pyrealsense2 2.59 shows it; the whole package, too."""

    def __init__(self, *, fx: float = 500.0, calibrated: bool = True) -> None:
        self.lens = SimpleNamespace(fx=fx, fy=fx, ppx=1.0, ppy=0.0)
        self.calibrated, self.plugged, self.streams = calibrated, True, 0
        self.frames: list[np.ndarray] = []
        self.stream, self.format = SimpleNamespace(depth=1), SimpleNamespace(z16=2)

    def config(self) -> Any:
        return SimpleNamespace(enable_device=lambda _serial: None, enable_stream=lambda *_words: None)

    def pipeline(self) -> Device:
        return self

    def start(self, _config: object) -> Device:
        if not self.plugged:
            raise RuntimeError("No device connected")
        self.streams += 1
        return self

    def stop(self) -> None:
        if not self.plugged:
            raise RuntimeError("stop() cannot be called before start()")
        self.streams -= 1

    def get_device(self) -> Any:
        if not self.calibrated:
            raise RuntimeError("Could not find requested sensor type!")
        sensor = SimpleNamespace(get_depth_scale=lambda: 0.001)
        return SimpleNamespace(first_depth_sensor=lambda: sensor)

    def get_stream(self, _stream: object) -> Any:
        video = SimpleNamespace(get_intrinsics=lambda: self.lens)
        return SimpleNamespace(as_video_stream_profile=lambda: video)

    def try_wait_for_frames(self, _timeout_ms: int) -> tuple[bool, Any]:
        if not self.plugged:
            raise RuntimeError("try_wait_for_frames cannot be called before start()")
        if not self.frames:
            return False, None
        frame = SimpleNamespace(get_data=lambda: self.frames.pop(0), get_frame_number=lambda: 7)
        return True, SimpleNamespace(get_depth_frame=lambda: frame)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device(**getattr(request, "param", {}))
    monkeypatch.setitem(sys.modules, "pyrealsense2", made)
    return made


SETTINGS = SourceSettings(kind="realsense", device="0")


def test_counts_become_points_by_the_cameras_own_scale_and_lens(device: Device) -> None:
    source = build_source(SETTINGS)
    source.open()
    assert source.read() is IDLE
    device.frames.append(np.array([[0, 800, 1000]], np.uint16))
    grab = source.read()
    assert isinstance(grab, Grab)
    assert np.isnan(grab.image[0, 0]).all()
    np.testing.assert_allclose(grab.image[0, 1:], [[0, 0, 0.8], [1 / 500, 0, 1]], atol=1e-7)


def test_camera_that_is_unplugged_is_opened_again_once_it_is_back(device: Device) -> None:
    source = build_source(SETTINGS)
    source.open()
    device.plugged = False
    with pytest.raises(CaptureError, match="before start"):
        source.read()
    source.close()
    with pytest.raises(CaptureError, match="No device connected"):
        source.open()
    source.close()
    device.plugged = True
    source.open()
    assert source.read() is IDLE


@pytest.mark.parametrize("device", [{"calibrated": False}, {"fx": 0.0}, {"fx": float("nan")}], indirect=True)
def test_camera_that_cannot_say_its_geometry_is_let_go_of(device: Device) -> None:
    source = build_source(SETTINGS)
    with pytest.raises(CaptureError, match="realsense 0"):
        source.open()
    source.close()
    assert device.streams == 0
