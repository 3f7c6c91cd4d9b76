"""GStreamer pipelines in a child process: exact pixels, exact frame ends, and no child left behind."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edge.capture.gstreamer import GstreamerSource, pipeline_words
from edge.capture.settings import SourceSettings
from edge.capture.sources import IDLE, CorruptFrameError, Grab
from edge.errors import CaptureError

pytestmark = pytest.mark.skipif(
    shutil.which("gst-launch-1.0") is None,
    reason="gst-launch-1.0 is not installed (Debian packages gstreamer1.0-tools, -plugins-base, -plugins-good)",
)
SOON = 20
BLUE = "videotestsrc pattern=solid-color foreground-color=0xff102030"


def source(pipeline: str, **settings: Any) -> GstreamerSource:
    return GstreamerSource(SourceSettings(kind="gstreamer", pipeline=pipeline, **settings), buffers=3)


def next_grab(one: GstreamerSource) -> Grab | None:
    deadline = time.monotonic() + SOON
    while (grab := one.read()) is IDLE:
        assert time.monotonic() < deadline
    return grab


def all_grabs(one: GstreamerSource) -> list[Grab]:
    grabs = []
    while (grab := next_grab(one)) is not None:
        grabs.append(grab)
    return grabs


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + SOON
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.01)


@pytest.mark.parametrize("size", [(48, 64), (5, 34), (7, 33), (20, 17)])
def test_pixels_arrive_as_they_are(tmp_path: Path, size: tuple[int, int]) -> None:
    """Rows of a width that is no multiple of four are padded on the way."""
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), image)
    one = source(f"filesrc location={tmp_path}/image.png ! pngdec")
    one.open()
    assert np.array_equal(next_grab(one).image, image)
    one.close()


def test_channels_are_bgr_and_the_end_is_none() -> None:
    one = source(f"{BLUE} num-buffers=3 ! video/x-raw,width=320,height=240")
    one.open()
    grabs = all_grabs(one)
    assert [grab.name for grab in grabs] == ["0", "1", "2"]
    assert all(grab.image.shape == (240, 320, 3) for grab in grabs)
    assert grabs[0].image[7, 9].tolist() == [0x30, 0x20, 0x10]
    one.close()


def test_another_size_within_the_stream() -> None:
    one = source(
        "concat name=c "
        f"{BLUE} num-buffers=20 ! video/x-raw,width=64,height=48 ! c. "
        f"{BLUE} num-buffers=20 ! video/x-raw,width=34,height=20 ! c. c."
    )
    one.open()
    shapes = [grab.image.shape for grab in all_grabs(one)]
    assert shapes == [(48, 64, 3)] * 20 + [(20, 34, 3)] * 20
    one.close()


def test_size_asked_for_is_demanded() -> None:
    one = source(BLUE, width=96, height=32)
    one.open()
    assert next_grab(one).image.shape == (32, 96, 3)
    one.close()
    other = source(f"{BLUE} ! video/x-raw,width=64,height=32", width=96, height=32)
    other.open()
    with pytest.raises(CaptureError, match="must end in raw video of the width and height asked for"):
        next_grab(other)
    other.close()


def test_buffers_are_used_again() -> None:
    one = source(f"{BLUE} num-buffers=30 ! video/x-raw,width=64,height=48")
    one.open()
    addresses = set()
    while (grab := next_grab(one)) is not None:
        addresses.add(grab.image.ctypes.data)
    assert len(addresses) <= 2  # the one held and the one being filled
    one.close()


def test_missing_program_names_the_packages() -> None:
    settings = SourceSettings(kind="gstreamer", pipeline=BLUE)
    with pytest.raises(CaptureError, match=r"packages gstreamer1\.0-tools, gstreamer1\.0-plugins-base and gst"):
        GstreamerSource(settings, buffers=1, program="gst-launch-9.9").open()


@pytest.mark.parametrize(
    ("element", "package"),
    [("nvarguscamerasrc", "nvidia-l4t-gstreamer"), ("avdec_h264", "gstreamer1.0-libav"), ("frobnicate", "that has it")],
)
def test_missing_element_names_its_package(element: str, package: str) -> None:
    one = source(f"{element} ! identity")
    one.open()
    with pytest.raises(CaptureError) as caught:
        next_grab(one)
    one.close()
    if "no element" not in str(caught.value):
        pytest.skip(f"{element} is installed here")
    assert package in str(caught.value)


def test_login_is_in_no_message() -> None:
    settings = SourceSettings(
        kind="gstreamer",
        pipeline='rtspsrc location=rtsp://admin:hunter2@127.0.0.1:1/a user-id=adm1n user-pw="hunter3 x" ! decodebin',
    )
    one = GstreamerSource(settings, buffers=1)
    one.open()
    with pytest.raises(CaptureError) as caught:
        next_grab(one)
    one.close()
    shown = f"{caught.value} {settings!r} {settings.label} {one!r}"
    assert not {secret for secret in ("hunter2", "hunter3", "adm1n") if secret in shown}
    assert "rtsp://***@127.0.0.1:1/a" in settings.label


def test_login_that_a_child_says_is_hidden(tmp_path: Path) -> None:
    program = tmp_path / "talking-gst"
    program.write_text("#!/bin/sh\necho 'cannot reach rtsp://admin:hunter2@cam/1 user-pw=hunter3' >&2\nexit 1\n")
    program.chmod(0o700)
    one = GstreamerSource(SourceSettings(kind="gstreamer", pipeline=BLUE), buffers=1, program=str(program))
    one.open()
    with pytest.raises(CaptureError) as caught:
        next_grab(one)
    one.close()
    assert str(caught.value) == "the pipeline ended: cannot reach rtsp://***@cam/1 user-pw=***"


def test_pipeline_is_never_a_shells_line(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    settings = SourceSettings(
        kind="gstreamer",
        pipeline=f"{BLUE} num-buffers=1 ! identity name='a$(touch {victim})' ! identity; touch {victim}",
    )
    words = pipeline_words(settings)
    assert f"name=a$(touch {victim})" in words
    one = GstreamerSource(settings, buffers=1)
    one.open()
    with pytest.raises(CaptureError):
        all_grabs(one)
    one.close()
    assert not victim.exists()


def test_frozen_pipeline_is_given_up_and_its_child_ended() -> None:
    one = source(f"{BLUE} ! video/x-raw,width=320,height=240")
    one.open()
    assert next_grab(one) is not None
    pid = one.pid
    os.kill(pid, signal.SIGSTOP)
    one._silence_s = 0.3
    with pytest.raises(CaptureError, match=r"no frame for 0\.3 s"):
        all_grabs(one)
    one.close()
    assert not Path(f"/proc/{pid}").exists(), "neither running nor a zombie"


def test_child_that_is_killed_within_a_frame() -> None:
    one = source(f"{BLUE} ! video/x-raw,width=1920,height=1080")
    one.open()
    assert next_grab(one) is not None
    waiting = bytearray(4)
    deadline = time.monotonic() + SOON
    while struct.unpack("i", waiting)[0] < 65536:
        fcntl.ioctl(one._data, termios.FIONREAD, waiting)
        assert time.monotonic() < deadline
    os.kill(one.pid, signal.SIGKILL)
    with pytest.raises(CorruptFrameError, match="within a frame"):
        all_grabs(one)
    one.close()


HEAD = b"--lineward\r\nContent-Type: video/x-raw\r\nContent-Length: %d\r\n\r\n"


@pytest.mark.parametrize(
    ("written", "error"),
    [
        (b"junk" * 200, "is no frame"),
        (HEAD % 9_999_999_999, "ask for a smaller size"),
        (HEAD % 0, "ask for a smaller size"),
        (HEAD % 7000, "have no size that it told"),
        (HEAD % 300 + b"x" * 600, "have no size|too small"),
        (HEAD[:30], "ended: it broke"),
        (HEAD % (64 * 48 * 3) + b"x" * 100, "within a frame"),
    ],
)
def test_damaged_stream_is_a_typed_error(tmp_path: Path, written: bytes, error: str) -> None:
    program = tmp_path / "broken-gst"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "caps = 'video/x-raw, width=(int)64, height=(int)48'\n"
        "print(f'/a/GstCapsFilter:lineward_caps.GstPad:src: caps = {caps}', flush=True)\n"
        f"os.write(int(sys.argv[-1].removeprefix('fd=')), {written!r})\n"
        "sys.exit('it broke')\n"
    )
    program.chmod(0o700)
    one = GstreamerSource(SourceSettings(kind="gstreamer", pipeline=BLUE), buffers=1, program=str(program))
    one.open()
    with pytest.raises(CaptureError, match=error):
        all_grabs(one)
    one.close()


def test_rows_that_a_driver_pads_are_cut_to_the_picture(tmp_path: Path) -> None:
    rows = b"".join(bytes([row]) * 64 * 3 + b"p" * 64 for row in range(48))
    program = tmp_path / "padding-gst"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, sys\n"
        "caps = 'video/x-raw, width=(int)64, height=(int)48'\n"
        "print(f'/a/GstCapsFilter:lineward_caps.GstPad:src: caps = {caps}', flush=True)\n"
        "with os.fdopen(int(sys.argv[-1].removeprefix('fd=')), 'wb') as pipe:\n"
        f"    for _ in range(20): pipe.write({HEAD % len(rows)!r} + {rows!r})\n"
        "    pipe.flush()\n"
        "    sys.stdin.read(); import time; time.sleep(99)\n"
    )
    program.chmod(0o700)
    one = GstreamerSource(SourceSettings(kind="gstreamer", pipeline=BLUE), buffers=1, program=str(program))
    one.open()
    started = time.monotonic()
    grabs = [next_grab(one) for _ in range(20)]
    # The layout is waited for once, a second long, not with each frame.
    assert time.monotonic() - started < 15
    one.close()
    assert all(grab.image.shape == (48, 64, 3) for grab in grabs)
    assert all((grab.image == np.arange(48, dtype=np.uint8)[:, None, None]).all() for grab in grabs)


def test_child_dies_with_a_box_that_is_killed() -> None:
    program = (
        "import sys, time\n"
        "from edge.capture.gstreamer import GstreamerSource\n"
        "from edge.capture.settings import SourceSettings\n"
        "one = GstreamerSource(SourceSettings(kind='gstreamer', pipeline='videotestsrc is-live=true'), buffers=2)\n"
        "one.open()\n"
        "while not hasattr(one.read(), 'image'): pass\n"
        "print(one.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    box = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(box.stdout.readline())
    # Stopped, it could not notice by itself that nobody reads its pipe.
    os.kill(child, signal.SIGSTOP)
    box.kill()
    box.wait()
    for pipe in (box.stdin, box.stdout):
        pipe.close()
    wait_until_gone(child)


@pytest.mark.parametrize(
    "pipeline",
    ["", " ", "videotestsrc !", "! videotestsrc", "videotestsrc name='a", "videotestsrc --gst-plugin-path=x"],
)
def test_pipeline_refused(pipeline: str) -> None:
    with pytest.raises(ValueError, match=r"pipeline"):
        SourceSettings(kind="gstreamer", pipeline=pipeline)
