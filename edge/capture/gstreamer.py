"""A GStreamer pipeline in a child process, for decoders that OpenCV's wheel lacks (a Jetson's, VA-API).

Knows pipes and processes; frames arrive as raw BGR, never as JPEG. It must not know queues or reconnecting.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import time
from collections import deque
from typing import TYPE_CHECKING

from edge.capture.addresses import NAME_CURE, unresolved_host
from edge.capture.buffers import BufferPool
from edge.capture.settings import redact
from edge.capture.sources import IDLE, TIMEOUT_S, CorruptFrameError, Grab, Idle
from edge.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import numpy.typing as npt

    from edge.capture.settings import SourceSettings

PROGRAM = "gst-launch-1.0"
# The cap of an unprivileged process (pipe(7), /proc/sys/fs/pipe-max-size): fewer turns per frame than with 64 KiB.
_PIPE_BYTES = 1 << 20
_POLL_S = 0.2
# A network stream may wait for its next key frame, a camera service for its start.
_FIRST_FRAME_S = 15.0
_CAPS_WAIT_S = 1.0
_END_S = 1.0
_END_POLL_S = 0.01
_HEAD_BYTES = 512
_MAX_FRAME_BYTES = 3 * 16384 * 16384
_CHANNELS = 3
# Bytes at the end of a row: 3 where GStreamer chose the layout, more where a driver did.
_MAX_PADDING = 256
_BOUNDARY = "lineward"
# In front of each frame, by multipartmux; that is how a frame's end is known when the size changes.
_HEAD = re.compile(rb"\s*--lineward\r\nContent-Type: video/x-raw\r\nContent-Length: (\d{1,10})\r\n\r\n")
_CAPS = re.compile(r"lineward_caps\.GstPad:src: caps = .*?width=\(int\)(\d+), height=\(int\)(\d+)")
_NO_ELEMENT = re.compile(r'no element "([^"]+)"')
_CANNOT_LINK = re.compile(r"could not link|not-negotiated")
_CANNOT_OPEN = "Could not open resource"
_PACKAGES = (
    (re.compile(r"multipartmux|v4l2|rtsp|rtp|jpeg|udpsrc|souphttpsrc|matroska|qtdemux"), "gstreamer1.0-plugins-good"),
    (re.compile(r"nv"), "nvidia-l4t-gstreamer (on a Jetson)"),
    (re.compile(r"avdec"), "gstreamer1.0-libav"),
    (re.compile(r"vaapi"), "gstreamer1.0-vaapi"),
    (re.compile(r"va[a-z0-9]+|h26[45]parse"), "gstreamer1.0-plugins-bad"),
)


class GstreamerSource:
    """Frames of a pipeline that ``gst-launch-1.0`` runs; it is given words, never a shell's line.

    The pipeline is continued by a conversion to raw BGR, a header per frame (``multipartmux``) and a pipe. Where the
    settings name a size it is demanded of the pipeline; else the one negotiated is used and may change.

    Args:
        settings: kind gstreamer.
        buffers: frames kept for re-use.
        program: in place of ``gst-launch-1.0``.
    """

    def __init__(self, settings: SourceSettings, *, buffers: int, program: str = PROGRAM) -> None:
        self._settings = settings
        self._program = program
        self._pool = BufferPool(buffers)
        # Where the settings allow a camera to be silent for longer, it may.
        self._silence_s = max(TIMEOUT_S, settings.stall_seconds)
        self._child: subprocess.Popen[bytes] | None = None
        self._data = self._text = self._errors = -1
        self._reset()

    def __repr__(self) -> str:
        return f"GstreamerSource({self._settings.label})"

    @property
    def pid(self) -> int | None:
        """Of the child; None while there is none."""
        return None if self._child is None else self._child.pid

    def open(self) -> None:
        """Start the pipeline; whether it can run shows with the first read.

        Raises:
            CaptureError: GStreamer's tools are not installed, or no process can be started.
        """
        self.close()
        program = shutil.which(self._program)
        if program is None:
            raise CaptureError(
                f"{self._program} is not installed; install the Debian packages gstreamer1.0-tools, "
                "gstreamer1.0-plugins-base and gstreamer1.0-plugins-good"
            )
        self._reset()
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            os.set_blocking(read_end, False)
            self._child = subprocess.Popen(  # noqa: S603 (words from the box's owner, no shell)
                [*_dies_with_us(), program, "-v", *pipeline_words(self._settings), f"fd={write_end}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(write_end,),
                # A signal from the terminal is for the box, which ends the child itself.
                start_new_session=True,
                env=_environment(),
            )
        except OSError as error:
            os.close(read_end)
            raise CaptureError(
                f"{self._program}: cannot be started ({error.strerror}); check memory and limits"
            ) from error
        finally:
            os.close(write_end)
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        self._data, self._text, self._errors = read_end, self._child.stdout.fileno(), self._child.stderr.fileno()
        os.set_blocking(self._text, False)
        os.set_blocking(self._errors, False)
        self._heard = time.monotonic()

    def read(self) -> Grab | Idle | None:
        """Return the next frame; IDLE after a fifth of a second without one; None when the pipeline has ended well.

        Raises:
            CorruptFrameError: the pipeline ended within a frame.
            CaptureError: it failed, hangs, or writes something else.
        """
        if self._child is None:
            return None
        until = time.monotonic() + _POLL_S
        while True:
            now = time.monotonic()
            ready = self._poll(max(0.0, until - now))
            if self._data in ready:
                done = self._fill()
                if done is None:
                    self._ended()
                    return None
                self._heard = now
                if done:
                    return self._finished_frame()
            elif now >= until:
                limit = self._silence_s if self._frames else max(_FIRST_FRAME_S, self._silence_s)
                if now - self._heard >= limit:
                    raise CaptureError(f"the pipeline gives no frame for {limit:g} s{self._because()}")
                return IDLE

    def close(self) -> None:
        """End the child, by force where it does not end by itself; may be called twice."""
        if self._data >= 0:
            # First of all: a sink that waits for room in the pipe gets an error instead.
            os.close(self._data)
            self._data = -1
        self._pool.clear()
        child, self._child = self._child, None
        if child is None:
            return
        os.killpg(child.pid, signal.SIGINT)
        # Until it is waited for, its number and its group belong to it: no other process can be hit.
        _ends_within(child, _END_S)
        # The group, always: what the pipeline itself started must not stay behind.
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for pipe in (child.stdout, child.stderr):
            if pipe is not None:
                pipe.close()
        self._text = self._errors = -1

    def _reset(self) -> None:
        self._frames = 0
        self._heard = 0.0
        self._head = bytearray()
        self._body: npt.NDArray[np.uint8] | None = None
        self._size = (0, 0)
        self._filled = 0
        self._padded = 0
        self._negotiated: deque[tuple[int, int]] = deque(maxlen=8)
        self._rest_of_text = b""
        self._said: deque[str] = deque(maxlen=8)
        self._rest_of_errors = b""

    def _poll(self, seconds: float, *, data: bool = True) -> set[int]:
        poll = select.poll()
        for one in (self._data, self._text, self._errors):
            if one >= 0 and (data or one != self._data):
                poll.register(one, select.POLLIN)
        ready = {one for one, _ in poll.poll(1000 * seconds)}
        if self._text in ready:
            self._listen()
        if self._errors in ready:
            self._hear_errors()
        return ready

    def _listen(self) -> None:
        data = _available(self._text)
        if data is None:
            self._text = -1
            return
        *lines, self._rest_of_text = (self._rest_of_text + data).split(b"\n")
        self._rest_of_text = self._rest_of_text[-4096:]
        for line in lines:
            found = _CAPS.search(line.decode("utf-8", "replace"))
            if found is not None:
                self._negotiated.append((int(found[1]), int(found[2])))

    def _hear_errors(self) -> None:
        data = _available(self._errors)
        if data is None:
            self._errors = -1
            return
        *lines, self._rest_of_errors = (self._rest_of_errors + data).split(b"\n")
        self._rest_of_errors = self._rest_of_errors[-4096:]
        texts = (redact(line.decode("utf-8", "replace").strip()) for line in lines)
        self._said.extend(text for text in texts if text)

    def _fill(self) -> bool | None:
        """Read on; True when a frame is whole, False when it is not yet, None at the end."""
        try:
            if self._body is None:
                data = os.read(self._data, _HEAD_BYTES)
                if data:
                    self._head += data
                    self._start_body()
            else:
                count = os.readv(self._data, [self._body.reshape(-1)[self._filled :].data])
                self._filled += count
                data = b"x" * (count > 0)
        except BlockingIOError:
            return False
        if not data:
            return None
        return self._body is not None and self._filled == self._body.size

    def _start_body(self) -> None:
        found = _HEAD.match(self._head)
        if found is None:
            if len(self._head) >= _HEAD_BYTES // 2:
                raise CaptureError("the pipeline writes to the box's pipe what is no frame; name no sink of its own")
            return
        length = int(found[1])
        width, height = self._size_of(length)
        # Rows of raw video are padded to a multiple of four bytes (GstVideoInfo); the padding stays in the buffer.
        self._body = self._pool.take((height, length // height))
        self._size = (width, height)
        rest = memoryview(self._head)[found.end() :]
        self._filled = len(rest)
        if self._filled > length:
            raise CaptureError("the pipeline's frames are too small to tell apart; ask for a larger size")
        self._body.reshape(-1).data[: self._filled] = rest
        rest.release()
        self._head = bytearray()

    def _size_of(self, length: int) -> tuple[int, int]:
        if not 0 < length <= _MAX_FRAME_BYTES:
            raise CaptureError(f"the pipeline's frames have {length} bytes; ask for a smaller size")
        deadline = time.monotonic() + _CAPS_WAIT_S
        while True:
            size = _fitting(self._negotiated, length, exact=True)
            if size is not None:
                return size
            # gst-launch says new caps from another thread, at times after their first frame.
            if self._text < 0 or length == self._padded or time.monotonic() >= deadline:
                break
            self._poll(_END_POLL_S, data=False)
        size = _fitting(self._negotiated, length, exact=False)
        if size is None:
            raise CaptureError(
                f"the pipeline's frames of {length} bytes have no size that it told; it must end in raw video"
            )
        # Waited for once: the frames behind it have the same layout.
        self._padded = length
        return size

    def _finished_frame(self) -> Grab:
        assert self._body is not None
        width, height = self._size
        image = self._body[:, : _CHANNELS * width].reshape(height, width, _CHANNELS)
        self._body = None
        self._frames += 1
        return Grab(image, f"{self._frames - 1}")

    def _ended(self) -> None:
        assert self._child is not None
        cut = self._body is not None
        self._body = None
        os.close(self._data)
        self._data = -1
        deadline = time.monotonic() + _END_S
        # Its last words; both pipes end with it.
        while max(self._text, self._errors) >= 0 and time.monotonic() < deadline:
            self._poll(_END_POLL_S)
        if cut:
            raise CorruptFrameError("the pipeline ended within a frame", name=f"{self._frames}")
        if _ends_within(self._child, _END_S) == 0:
            return
        raise CaptureError(f"the pipeline ended{self._because()}")

    def _because(self) -> str:
        """What the child said last, without credentials, and the package that it lacks."""
        said = " ".join(self._said)
        missing = _NO_ELEMENT.search(said)
        cure = ""
        if missing is not None:
            package = next((name for name_of, name in _PACKAGES if name_of.match(missing[1])), None)
            cure = "; install " + (package or "the Debian package of gstreamer1.0-plugins-* that has it")
        elif _CANNOT_LINK.search(said):
            cure = "; the pipeline must end in raw video of the width and height asked for, and name no sink"
        elif _CANNOT_OPEN in said and (host := unresolved_host(self._settings.pipeline or "")):
            # Its rtspsrc says no more than "Generic error".
            return f": the name {host!r} cannot be resolved; {NAME_CURE}"
        return (f": {said[:400]}" if said else "") + cure


def _fitting(sizes: Iterable[tuple[int, int]], length: int, *, exact: bool) -> tuple[int, int] | None:
    """The newest size that a frame of so many bytes can have: when it changes, the pipe holds frames of the one before.

    Args:
        sizes: width and height, in the order told.
        length: of the frame.
        exact: rows padded as GStreamer does it (GstVideoInfo: to a multiple of four bytes), not as a driver may.
    """
    for width, height in reversed(tuple(sizes)):
        padding = length // height - _CHANNELS * width
        if length % height == 0 and 0 <= padding < _MAX_PADDING and (not exact or padding == -_CHANNELS * width % 4):
            return width, height
    return None


def pipeline_words(settings: SourceSettings) -> list[str]:
    """Return the settings' pipeline, continued to a pipe, as words; the sink's ``fd`` is left to the caller."""
    assert settings.pipeline is not None  # the settings' validator saw to it
    caps = "video/x-raw,format=BGR"
    if settings.width is not None:
        caps += f",width={settings.width}"
    if settings.height is not None:
        caps += f",height={settings.height}"
    return [
        *shlex.split(settings.pipeline),
        "!", "videoconvert",
        "!", "capsfilter", "name=lineward_caps", f"caps={caps}",
        "!", "multipartmux", f"boundary={_BOUNDARY}",
        "!", "fdsink", "sync=false",
    ]  # fmt: skip


def _dies_with_us() -> list[str]:
    """The kernel ends the child with the thread that started it (prctl(2), PR_SET_PDEATHSIG), even after a SIGKILL.

    By util-linux' setpriv, since code between fork and exec may lock up in a process of many threads. Where that is
    not installed the child ends at its next write into a pipe that nobody reads.
    """
    setpriv = shutil.which("setpriv")
    return [] if setpriv is None else [setpriv, "--pdeathsig", "KILL", "--"]


def _environment() -> dict[str, str]:
    """English, since what the child says is looked for words; and not the box's line to systemd."""
    kept = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    return kept | {"LC_ALL": "C", "GST_DEBUG_NO_COLOR": "1"}


def _ends_within(child: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Wait for the end of a child without taking its status; its exit code, None when it runs on."""
    deadline = time.monotonic() + seconds
    while (result := os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)) is None:
        if time.monotonic() >= deadline:
            return None
        time.sleep(_END_POLL_S)
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def _available(descriptor: int) -> bytes | None:
    """What can be read now; None at the end."""
    try:
        return os.read(descriptor, 65536) or None
    except BlockingIOError:
        return b""
