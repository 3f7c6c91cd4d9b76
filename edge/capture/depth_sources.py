"""Depth maps from files: 16-bit images with a camera's geometry, organised scans, and a scene replayed with noise.

All give float32 [H, W, 3], XYZ in metres in the sensor's frame, NaN where nothing was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from edge.capture.scan_files import SCAN_EXTENSIONS, read_organised
from edge.capture.sources import CorruptFrameError, Grab
from edge.errors import CaptureError, DataError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from edge.capture.sense_settings import DepthSourceSettings

SUFFIXES = SCAN_EXTENSIONS | {".png"}
POINTS = "xyz"
"""Name in an npz of an organised scan float32 [H, W, 3] in metres; ``z`` [H, W] is depth alone, in metres."""
DEPTH = "z"
_MAP = 2


def points_of(depth: npt.NDArray[Any], settings: DepthSourceSettings) -> npt.NDArray[np.float32]:
    """Give each pixel of a depth image its point: x = (u - cx) z / fx, y = (v - cy) z / fy (pinhole, no distortion).

    Args:
        depth: float [H, W], z in metres; 0, negative or not finite is no measurement.
        settings: focal lengths and principal point, in pixels; ``fx`` must be set.

    Returns:
        float32 [H, W, 3], NaN where nothing was measured.

    Raises:
        CaptureError: ``fx`` is not set.
    """
    if settings.fx is None:
        raise CaptureError("depth images need the camera's geometry; set depth.fx (and fy, cx, cy) of the source")
    height, width = depth.shape
    cx = (width - 1) / 2 if settings.cx is None else settings.cx
    cy = (height - 1) / 2 if settings.cy is None else settings.cy
    z = np.where(np.isfinite(depth) & (depth > 0), depth, np.nan).astype(np.float32)
    across = ((np.arange(width) - cx) / settings.fx).astype(np.float32)
    down = ((np.arange(height) - cy) / (settings.fy or settings.fx)).astype(np.float32)
    return np.asarray(np.stack([z * across, z * down[:, np.newaxis], z], axis=-1), np.float32)


def read_depth(path: Path, settings: DepthSourceSettings) -> npt.NDArray[np.float32]:
    """Read one depth map.

    Args:
        path: a 16-bit PNG or TIFF in counts; an npz with ``z`` in metres; or an organised scan, as training reads it.
        settings: geometry and scale of depth without x and y.

    Returns:
        float32 [H, W, 3], XYZ in metres, NaN where invalid.

    Raises:
        CorruptFrameError: the file is unreadable or something else.
        CaptureError: the geometry is not set.
        MissingExtraError: what reads it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix in {".png", ".tif", ".tiff"}:
        counts = _counts(path)
        if counts is not None:
            return points_of(counts.astype(np.float32) * np.float32(settings.scale_m), settings)
    if suffix == ".npz":
        depth = _depth_alone(path)
        if depth is not None:
            return points_of(depth, settings)
    try:
        return read_organised(path)
    except DataError as error:
        raise CorruptFrameError(str(error), name=path.name) from error


def _counts(path: Path) -> npt.NDArray[np.uint16] | None:
    """The 16-bit depth image in a file; None where a TIFF is none, and may be a scan."""
    try:
        data = path.read_bytes()
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    except (OSError, cv2.error) as error:
        raise CorruptFrameError(f"{path}: cannot be read ({error})", name=path.name) from error
    if image is not None and image.dtype == np.uint16 and image.ndim == _MAP:
        return np.asarray(image, np.uint16)
    if path.suffix.lower() != ".png" and (image is None or image.dtype.kind == "f"):
        return None
    found = "nothing that can be decoded" if image is None else f"{image.dtype} {list(image.shape)}"
    raise CorruptFrameError(
        f"{path}: holds {found}; a depth image is one channel of 16 bits, a scan a TIFF of three float planes or an "
        f"npz with {POINTS}",
        name=path.name,
    )


def _depth_alone(path: Path) -> npt.NDArray[np.floating[Any]] | None:
    """The depth in metres of an npz without points; None where it has points."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            if POINTS in archive.files:
                return None
            depth = archive[DEPTH] if DEPTH in archive.files else None
    # A damaged archive fails wherever zipfile, numpy or a tokenizer stumbles over it.
    except Exception as error:
        raise CorruptFrameError(f"{path}: not a readable npz ({error})", name=path.name) from error
    # Whole numbers are counts, of which an npz does not say how long they are.
    if depth is None or depth.ndim != _MAP or not np.issubdtype(depth.dtype, np.floating):
        raise CorruptFrameError(
            f"{path}: has neither {POINTS} [H, W, 3] nor {DEPTH} [H, W], in floating-point metres", name=path.name
        )
    return np.asarray(depth)


class DepthFolderSource:
    """Depth maps of a folder, sorted by name; sub-folders are not visited."""

    def __init__(self, path: Path, settings: DepthSourceSettings, *, loop: bool = False) -> None:
        self._path, self._settings, self._loop = path, settings, loop
        self._files: list[Path] = []
        self._next = 0
        self._good_in_pass = 0

    def open(self) -> None:
        """List the files.

        Raises:
            CaptureError: no such folder, or no depth map in it.
        """
        if not self._path.is_dir():
            raise CaptureError(f"{self._path}: no such folder; set the source's path to a folder of depth maps")
        self._files = sorted(
            file for file in self._path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
        )
        if not self._files:
            raise CaptureError(f"{self._path}: holds no depth map ({' '.join(sorted(SUFFIXES))})")
        self._next = self._good_in_pass = 0

    def read(self) -> Grab | None:
        """Read the next one.

        Raises:
            CorruptFrameError: this file is no depth map.
            CaptureError: a looping folder holds no readable depth map at all, or the geometry is not set.
        """
        if self._next >= len(self._files):
            if not self._loop or not self._files:
                return None
            if self._good_in_pass == 0:
                raise CaptureError(f"{self._path}: not one of its {len(self._files)} files can be read; replace them")
            self._next = self._good_in_pass = 0
        file = self._files[self._next]
        self._next += 1
        points = read_depth(file, self._settings)
        self._good_in_pass += 1
        return Grab(points, file.name)

    def close(self) -> None:
        """Forget the list."""
        self._files = []


class DepthSceneSource:
    """One recorded depth map, seen again and again through a sensor that is noisy and misses points.

    The depth's noise grows with the square of the distance, as that of triangulating sensors does; a point moves along
    its own ray, so that x and y stay true to it. Frames differ, and are the same for one seed.

    Args:
        path: of the depth map, as :func:`read_depth` reads it.
        settings: its geometry, noise, dropout and seed.
        loop: whether it goes on for ever; else one frame is given.
    """

    def __init__(self, path: Path, settings: DepthSourceSettings, *, loop: bool = True) -> None:
        self._path, self._settings, self._loop = path, settings, loop
        self._points: npt.NDArray[np.float32] | None = None
        self._rng = np.random.default_rng(settings.seed)
        self._given = 0

    def open(self) -> None:
        """Read the scene.

        Raises:
            CaptureError: it cannot be read.
        """
        self._points = read_depth(self._path, self._settings)
        self._rng, self._given = np.random.default_rng(self._settings.seed), 0

    def read(self) -> Grab | None:
        """Return the scene as the sensor sees it this time."""
        if self._points is None or (self._given and not self._loop):
            return None
        settings, points = self._settings, self._points
        self._given += 1
        if settings.noise_m:
            noise = self._rng.standard_normal(points.shape[:2], dtype=np.float32) * np.float32(settings.noise_m)
            points = points * (1 + noise * points[..., 2])[..., np.newaxis]
        if settings.dropout:
            points = np.where((self._rng.random(points.shape[:2]) < settings.dropout)[..., np.newaxis], np.nan, points)
        return Grab(np.array(points, np.float32), f"{self._path.name} #{self._given}")

    def close(self) -> None:
        """Let go of the scene."""
        self._points = None
