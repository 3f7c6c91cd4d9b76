"""A source that was closed holds no frames: a camera whose settings change leaves the old one behind for a while."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from edge.capture.opencv import VideoSource
from edge.health import watchdog

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for value in (10, 20, 30):
        writer.write(np.full((48, 64, 3), value, np.uint8))
    writer.release()
    return path


def test_a_closed_source_holds_no_frame(video: Path) -> None:
    source = VideoSource(video, loop=True)
    source.open()
    held = []
    for _ in range(7):
        grab = source.read()
        assert grab is not None
        held.append(weakref.ref(grab.image))
        del grab
    assert any(image() is not None for image in held)
    source.close()

    assert all(image() is None for image in held)


def test_a_loop_of_a_video_keeps_its_buffers(video: Path) -> None:
    source = VideoSource(video, loop=True)
    source.open()
    for _ in range(2):
        source.read()
    before = source._pool.addresses
    for _ in range(9):
        source.read()

    assert before
    assert source._pool.addresses == before
    source.close()


def test_asking_for_the_clock_leaves_nothing_behind() -> None:
    watchdog.clock_synchronised()
    gc.collect()
    gc.disable()
    try:
        before = libraries()
        for _ in range(5):
            watchdog.clock_synchronised()
        assert libraries() == before
    finally:
        gc.enable()


def libraries() -> int:
    return sum(isinstance(one, ctypes.CDLL) for one in gc.get_objects())
