"""Sources: a folder of images, a video file, a camera, behind one small protocol.

A source knows how to open, read and close one place; it knows nothing of threads, queues, pacing or reconnecting.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cv2
import numpy as np

from edge.capture.settings import SourceKind, SourceSettings, redact
from edge.errors import CaptureError

if TYPE_CHECKING:
    import numpy.typing as npt

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
# A camera that does not answer must give the thread back: OpenCV's own limit is 30 s for each.
_TIMEOUT_MS = 5000
_COLOUR_CHANNELS = 3


class CorruptFrameError(CaptureError):
    """One image cannot be decoded; the source goes on with the next."""

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True)
class Grab:
    """One image as a source read it.

    Attributes:
        image: uint8 [H, W, 3] BGR.
        name: file name or position, for people.
    """

    image: npt.NDArray[np.uint8]
    name: str


class Source(Protocol):
    """A place that frames come from; used by one thread."""

    def open(self) -> None:
        """Make ready to read from the start.

        Raises:
            CaptureError: the place is missing or unreadable; the message names it and the cure.
        """

    def read(self) -> Grab | None:
        """Return the next image; None at the end of a file, or when a camera gives no more.

        Raises:
            CorruptFrameError: this image cannot be decoded; the next call goes on behind it.
            CaptureError: the source as a whole is broken.
        """

    def close(self) -> None:
        """Let go of the place; may be called twice."""


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Decode an image file as colour.

    Returns:
        uint8 [H, W, 3] BGR; greyscale is spread over the channels, 16 bits are reduced to 8.

    Raises:
        CorruptFrameError: the file is unreadable, empty, truncated or of an unknown format.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptFrameError(f"{path}: cannot be read ({error.strerror})", name=path.name) from error
    if not data or _is_truncated(data):
        raise CorruptFrameError(f"{path}: the image is truncated; copy it again", name=path.name)
    level = cv2.utils.logging.getLogLevel()
    try:
        # OpenCV prints several lines per bad file; we report it ourselves, once.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise CorruptFrameError(f"{path}: cannot be decoded ({error.err})", name=path.name) from error
    finally:
        cv2.utils.logging.setLogLevel(level)
    if image is None:
        raise CorruptFrameError(f"{path}: no image that OpenCV can decode; remove or replace it", name=path.name)
    return np.asarray(image, dtype=np.uint8)


def _is_truncated(data: bytes) -> bool:
    """Whether a JPEG or PNG lacks its end: OpenCV before 5 fills the missing part with grey and says nothing."""
    if data.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in data[2:]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data[-64:]
    return False


class FolderSource:
    """Images of a folder, sorted by name; sub-folders are not visited."""

    def __init__(self, path: Path, *, loop: bool = False) -> None:
        self._path = path
        self._loop = loop
        self._files: list[Path] = []
        self._next = 0
        self._good_in_pass = 0

    def open(self) -> None:
        """List the images.

        Raises:
            CaptureError: no such folder, or no image in it.
        """
        if not self._path.is_dir():
            raise CaptureError(f"{self._path}: no such folder; set the source's path to a folder of images")
        try:
            files = [file for file in self._path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
        except OSError as error:
            raise CaptureError(f"{self._path}: cannot be listed ({error.strerror}); check its permissions") from error
        if not files:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise CaptureError(f"{self._path}: holds no image ({suffixes}); point the source at the images themselves")
        self._files = sorted(files, key=lambda file: file.name)
        self._next = self._good_in_pass = 0

    def read(self) -> Grab | None:
        """Decode the next image.

        Raises:
            CorruptFrameError: this file is no readable image.
            CaptureError: a looping folder holds no readable image at all.
        """
        if self._next >= len(self._files):
            if not self._loop or not self._files:
                return None
            if self._good_in_pass == 0:
                raise CaptureError(f"{self._path}: not one of its {len(self._files)} images can be read; replace them")
            self._next = self._good_in_pass = 0
        file = self._files[self._next]
        self._next += 1
        image = read_image(file)
        self._good_in_pass += 1
        return Grab(image, file.name)

    def close(self) -> None:
        """Forget the list."""
        self._files = []


class _BufferPool:
    """Frame buffers that are used again once nobody holds them: a fresh 6 MB array a frame costs page faults.

    A buffer is free when its reference count is back to that of an untouched one; a view of a frame holds its
    buffer too, so a consumer may keep a frame as long as it likes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffers: list[npt.NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """Return a buffer that nobody else refers to."""
        if self._buffers and self._buffers[0].shape != shape:
            self._buffers = []
        # The count of an untouched array in a list, read the same way, so no interpreter's convention is assumed.
        idle = _references([np.empty(0, np.uint8)], 0)
        for index in range(len(self._buffers)):
            if _references(self._buffers, index) == idle:
                return self._buffers[index]
        buffer: npt.NDArray[np.uint8] = np.empty(shape, np.uint8)
        if len(self._buffers) < self._limit:
            self._buffers.append(buffer)
        return buffer


def _references(buffers: list[npt.NDArray[np.uint8]], index: int) -> int:
    return sys.getrefcount(buffers[index])


class _CvSource:
    """What a video file and a camera share: an OpenCV capture that reads into rotating buffers."""

    def __init__(self, label: str, buffers: int) -> None:
        self._label = label
        self._pool = _BufferPool(buffers)
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
        """Release the device or file."""
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
        self.close()
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
    """A local camera (index or /dev path) or a network stream."""

    def __init__(
        self,
        place: int | str,
        *,
        fps: float | None = None,
        width: int | None = None,
        height: int | None = None,
        buffers: int = 8,
    ) -> None:
        super().__init__(redact(str(place)), buffers)
        self._place = place
        self._asked = {cv2.CAP_PROP_FRAME_WIDTH: width, cv2.CAP_PROP_FRAME_HEIGHT: height, cv2.CAP_PROP_FPS: fps}

    def __repr__(self) -> str:
        return f"CameraSource({self._label})"

    def open(self) -> None:
        """Connect.

        Raises:
            CaptureError: the camera does not answer.
        """
        self.close()
        self._position = 0
        if isinstance(self._place, str) and "://" in self._place:
            timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
            self._capture = _open_capture(self._place, _stream_backends(), timeouts)
            cure = "check the address, the login and the network"
        else:
            self._capture = _open_capture(self._place, [cv2.CAP_V4L2, cv2.CAP_ANY], [])
            cure = "check its cable, its index and that you may read /dev/video* (group video)"
        if self._capture is None:
            raise CaptureError(f"camera {self._label}: does not answer; {cure}")
        if not (isinstance(self._place, str) and "://" in self._place):
            for prop, value in self._asked.items():
                if value is not None:
                    self._capture.set(prop, value)

    def read(self) -> Grab | None:
        """Wait for the next frame.

        Raises:
            CaptureError: the camera gives something other than 8-bit colour.
        """
        return self._grab()


def _stream_backends() -> list[int]:
    """Backends for files and URLs. CAP_ANY is left out: its image-sequence reader logs the URL with its password."""
    available = cv2.videoio_registry.getBackends()
    return [backend for backend in (cv2.CAP_FFMPEG, cv2.CAP_GSTREAMER) if backend in available]


def _open_capture(place: int | str, backends: list[int], parameters: list[int]) -> cv2.VideoCapture | None:
    # FFmpeg prints to stderr past OpenCV's own level; read once, when its backend is first used.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    level = cv2.utils.logging.getLogLevel()
    try:
        # A camera that is away is tried for hours; the caller logs it once.
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        for backend in backends:
            capture = cv2.VideoCapture()
            # GStreamer and V4L2 refuse parameters that they do not know.
            if capture.open(place, backend, parameters if backend == cv2.CAP_FFMPEG else []):
                return capture
            capture.release()
    finally:
        cv2.utils.logging.setLogLevel(level)
    return None


def build_source(settings: SourceSettings) -> Source:
    """Return the source that the settings describe, not yet opened."""
    # The queue, the frame being judged and the one being read.
    buffers = settings.capacity + 2
    if settings.kind is SourceKind.FOLDER:
        return FolderSource(Path(str(settings.path)).expanduser(), loop=settings.loop)
    if settings.kind is SourceKind.VIDEO:
        return VideoSource(Path(str(settings.path)).expanduser(), loop=settings.loop, buffers=buffers)
    place = settings.url if settings.url is not None else settings.device
    assert place is not None  # the settings' validator saw to it
    return CameraSource(place, fps=settings.fps, width=settings.width, height=settings.height, buffers=buffers)
