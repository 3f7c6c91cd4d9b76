"""Sources: the protocol that each kind of place speaks, and the folder of images.

A source knows how to open, read and close one place; it knows nothing of threads, queues, pacing or reconnecting.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import cv2
import numpy as np

from edge.errors import CaptureError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
TIMEOUT_S = 5.0
"""A camera that does not answer gives the thread back after this long."""


class CorruptFrameError(CaptureError):
    """One image cannot be decoded; the source goes on with the next."""

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True, slots=True)
class Grab:
    """One image as a source read it.

    Attributes:
        image: uint8 [H, W, 3] BGR, or as :class:`edge.inputs.Modality` says.
        name: file name or position, for people.
        captured_ns: monotonic time at which it was complete; None where that is now.
        refusal: why it must not be judged; empty where it may.
    """

    image: npt.NDArray[Any]
    name: str
    captured_ns: int | None = None
    refusal: str = ""


class Idle(Enum):
    """No frame yet, the source is well: lets the reading thread look whether it should stop.

    ``alive``: something came that is no frame yet, such as a part of one.
    """

    IDLE = "idle"
    ALIVE = "alive"


IDLE: Final = Idle.IDLE
ALIVE: Final = Idle.ALIVE


class Source(Protocol):
    """A place that frames come from; used by one thread."""

    def open(self) -> None:
        """Make ready to read from the start.

        Raises:
            CaptureError: the place is missing or unreadable; the message names it and the cure.
        """

    def read(self) -> Grab | Idle | None:
        """Return the next image; IDLE when there is none yet; None at the end of a file or of a camera's stream.

        Raises:
            CorruptFrameError: this image cannot be decoded; the next call goes on behind it.
            CaptureError: the source as a whole is broken.
        """

    def close(self) -> None:
        """Let go of the place; may be called twice."""


@runtime_checkable
class TriggeredSource(Source, Protocol):
    """A source that gives a frame when told to."""

    def fire(self) -> None:
        """Ask for one frame; may be called from any thread.

        Raises:
            CaptureError: the camera is not connected or refuses.
        """


@runtime_checkable
class RemarkingSource(Source, Protocol):
    """A source that has to say something once it is open, such as that it does not give the size asked for."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an operator should know; empty when all is as asked."""


@runtime_checkable
class CountingSource(Source, Protocol):
    """A source that accounts for what frames are made of, such as samples."""

    @property
    def counts(self) -> dict[str, int]:
        """By name, since it was made."""


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
    # OpenCV prints several lines per bad file; we report it ourselves, once.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise CorruptFrameError(f"{path}: cannot be decoded ({error.err})", name=path.name) from error
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
