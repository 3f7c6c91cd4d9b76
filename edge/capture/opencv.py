"""Video files, local cameras and network streams through OpenCV. Knows no threads, queues or reconnecting."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import cv2
import numpy as np

from edge.capture.addresses import NAME_CURE, unresolved_host
from edge.capture.buffers import BufferPool
from edge.capture.settings import redact
from edge.capture.sources import TIMEOUT_S, Grab
from edge.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# OpenCV's own limit is 30 s for each.
_TIMEOUT_MS = round(TIMEOUT_S * 1000)
_COLOUR_CHANNELS = 3
_RATE_TOLERANCE = 0.02


class _CvSource:
    """What a video file and a camera share: an OpenCV capture that reads into rotating buffers."""

    def __init__(self, label: str, buffers: int) -> None:
        self._label = label
        self._pool = BufferPool(buffers)
        self._capture: cv2.VideoCapture | None = None
        self._shape: tuple[int, ...] | None = None
        self._position = 0

    def _grab(self) -> Grab | None:
        if self._capture is None:
            return None
        try:
            ok, image = self._capture.read(None if self._shape is None else self._pool.take(self._shape))
        except cv2.error as error:
            raise CaptureError(f"{self._label}: reading failed ({redact(error.err)})") from error
        if not ok or image is None:
            return None
        if image.ndim != _COLOUR_CHANNELS or image.dtype != np.uint8:
            raise CaptureError(f"{self._label}: gives {image.dtype} {image.shape}, not 8-bit colour; change its format")
        self._shape = image.shape
        self._position += 1
        return Grab(image, f"{self._position - 1}")

    def close(self) -> None:
        """Release the device or file, and the buffers: what refers to a source may outlive it for long."""
        self._release()
        self._pool.clear()

    def _release(self) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None


class VideoSource(_CvSource):
    """Frames of a video file."""

    def __init__(self, path: Path, *, loop: bool = False, buffers: int = 8) -> None:
        super().__init__(str(path), buffers)
        self._path = path
        self._loop = loop

    def open(self) -> None:
        """Open the file at its first frame.

        Raises:
            CaptureError: no such file, or no decoder for it.
        """
        if not self._path.is_file():
            raise CaptureError(f"{self._path}: no such video file; set the source's path to a video")
        self._release()
        self._capture = _open_capture(str(self._path), _stream_backends(), [])
        self._position = 0
        if self._capture is None:
            raise CaptureError(
                f"{self._path}: no video that OpenCV can decode; convert it, for instance to MJPEG in AVI"
            )

    def read(self) -> Grab | None:
        """Decode the next frame.

        Raises:
            CaptureError: the file gives no frame at all.
        """
        grab = self._grab()
        if grab is not None:
            return grab
        if self._position == 0 and self._capture is not None:
            raise CaptureError(f"{self._path}: holds no frame that can be decoded; convert or replace it")
        if not self._loop or self._capture is None:
            return None
        # Opening again is exact for every container; seeking to frame 0 is not.
        self.open()
        return self._grab()


class CameraSource(_CvSource):
    """A local camera (index or /dev path) or a network stream.

    Args:
        place: index, path or URL.
        fps: asked of a local camera.
        width: pixels, asked of a local camera.
        height: as width.
        pixel_format: four letters (V4L2's fourcc), asked of a local camera.
        buffers: frames kept for re-use.
    """

    def __init__(
        self,
        place: int | str,
        *,
        fps: float | None = None,
        width: int | None = None,
        height: int | None = None,
        pixel_format: str | None = None,
        buffers: int = 8,
    ) -> None:
        super().__init__(redact(str(place)), buffers)
        self._place = place
        self._asked = {"pixel_format": pixel_format, "width": width, "height": height, "fps": fps}
        self._remarks: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"CameraSource({self._label})"

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the camera gives other than asked for."""
        return self._remarks

    def open(self) -> None:
        """Connect, and ask a local camera for format, size and rate.

        Raises:
            CaptureError: the camera does not answer.
        """
        self.close()
        self._position = 0
        local = not (isinstance(self._place, str) and "://" in self._place)
        if local:
            # Seconds that a read of V4L2 may last; read from the environment at the first one.
            os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", f"{TIMEOUT_S:.0f}")
            self._capture = _open_capture(self._place, [cv2.CAP_V4L2, cv2.CAP_ANY], [])
            cure = "check its cable, its index and that you may read /dev/video* (group video)"
        else:
            timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
            self._capture = _open_capture(self._place, _stream_backends(), timeouts)
            cure = "check the address, the login and the network"
        if self._capture is None:
            host = "" if local else unresolved_host(str(self._place))
            if host:
                raise CaptureError(f"camera {self._label}: the name {host!r} cannot be resolved; {NAME_CURE}")
            raise CaptureError(f"camera {self._label}: does not answer; {cure}")
        if local:
            self._remarks = ask(self._capture, self._asked)

    def read(self) -> Grab | None:
        """Wait for the next frame.

        Raises:
            CaptureError: the camera gives something other than 8-bit colour.
        """
        return self._grab()


def ask(capture: cv2.VideoCapture, asked: Mapping[str, float | str | None]) -> tuple[str, ...]:
    """Ask a local camera for what the settings name, and read back what it chose: drivers refuse silently.

    Args:
        capture: an open camera.
        asked: pixel_format, width, height and fps; None leaves the camera's own.

    Returns:
        One remark for each that the camera does not give.
    """
    # V4L2 offers its sizes per format, and its rates per size.
    order = {
        "pixel_format": cv2.CAP_PROP_FOURCC,
        "width": cv2.CAP_PROP_FRAME_WIDTH,
        "height": cv2.CAP_PROP_FRAME_HEIGHT,
        "fps": cv2.CAP_PROP_FPS,
    }
    wanted = {name: asked[name] for name in order if asked.get(name) is not None}
    for name, value in wanted.items():
        capture.set(order[name], _fourcc(value) if isinstance(value, str) else float(value or 0))
    remarks = []
    for name, value in wanted.items():
        given = capture.get(order[name])
        if isinstance(value, str):
            if round(given) != _fourcc(value):
                remarks.append(f"{name} {value} was asked for, the camera gives {_letters(round(given))}")
        elif abs(given - float(value or 0)) > (_RATE_TOLERANCE * float(value or 0) if name == "fps" else 0):
            remarks.append(f"{name} {value:g} was asked for, the camera gives {given:g}")
    return tuple(remarks)


def _fourcc(letters: str) -> int:
    return int.from_bytes(letters.encode("ascii"), "little")


def _letters(fourcc: int) -> str:
    letters = fourcc.to_bytes(8, "little", signed=True)[:4].decode("latin-1")
    return "".join(letter if letter.isprintable() else "?" for letter in letters)


def _stream_backends() -> list[int]:
    """Backends for files and URLs. CAP_ANY is left out: its image-sequence reader logs the URL with its password."""
    available = cv2.videoio_registry.getBackends()
    return [backend for backend in (cv2.CAP_FFMPEG, cv2.CAP_GSTREAMER) if backend in available]


def _open_capture(place: int | str, backends: list[int], parameters: list[int]) -> cv2.VideoCapture | None:
    # FFmpeg prints to stderr past OpenCV's own level; read once, when its backend is first used.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    # A camera that is away is tried for hours; the capture says so once. Set for good: the level is one for the whole
    # process, and threads that put it back would undo each other's.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    for backend in backends:
        capture = cv2.VideoCapture()
        # GStreamer and V4L2 refuse parameters that they do not know.
        if capture.open(place, backend, parameters if backend == cv2.CAP_FFMPEG else []):
            return capture
        capture.release()
    return None
