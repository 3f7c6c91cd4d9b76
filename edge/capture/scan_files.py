"""Scans from files: PLY, PCD, NPZ and TIFF, damaged ones refused; the trainer and the box use these same functions.

It knows files and points; it must not know folders, labels or cameras. What reads a kind of file is imported for it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.bundle import load_arrays
from edge.errors import BundleError, DataError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SCAN_EXTENSIONS = frozenset({".ply", ".pcd", ".npz", ".tif", ".tiff"})
ORGANISED_EXTENSIONS = frozenset({".npz", ".tif", ".tiff"})
"""Kinds of files that hold an organised scan; a PCD may, too."""

_ORGANISED, _AXES = 3, 3
_MOST_VALUES = 3 * 2**26


@dataclass(frozen=True, slots=True)
class ScanFile:
    """What a file holds.

    Attributes:
        xyz: float32 [H, W, 3], an organised scan, or [N, 3]; metres; NaN is invalid.
        viewpoint: float64 [3], where the sensor stood, where the file says so.
        closed: the file is a mesh or cloud that names no sensor, perhaps of a whole part.
    """

    xyz: npt.NDArray[np.float32]
    viewpoint: npt.NDArray[np.float64] | None
    closed: bool = False

    @property
    def organised(self) -> bool:
        """Whether the points have rows and columns."""
        return self.xyz.ndim == _ORGANISED


def read_scan(path: Path) -> ScanFile:
    """Read a scan.

    PLY (points or a mesh's corners) by trimesh, PCD by pypcd4 (organised where its height is over 1), TIFF of three
    float planes by tifffile, NPZ with an array ``xyz`` and perhaps ``viewpoint``. Coordinates are metres. All-zero
    points become NaN, as TIFF scans mark invalid ones.

    Raises:
        DataError: the file is missing, damaged or of another kind, or holds no points.
        MissingExtraError: what reads it is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in SCAN_EXTENSIONS:
        raise DataError(f"{path}: no scan file; give one of {', '.join(sorted(e[1:] for e in SCAN_EXTENSIONS))}")
    read = {".ply": _read_ply, ".pcd": _read_pcd, ".npz": _read_npz}.get(suffix, _read_tiff)
    found = read(path)
    xyz = found.xyz
    if xyz.ndim not in {2, _ORGANISED} or xyz.shape[-1] != _AXES or not xyz.size:
        raise DataError(f"{path}: points are {list(xyz.shape)}, expected [H, W, 3] or [N, 3]; export the scan again")
    xyz = np.array(xyz, np.float32)
    xyz[~np.isfinite(xyz).all(-1) | (xyz == 0).all(-1)] = np.nan
    return ScanFile(xyz, found.viewpoint, found.closed)


def read_organised(path: Path) -> npt.NDArray[np.float32]:
    """Read a scan that has rows and columns, as a depth detector sees it, which is in front of its sensor.

    Returns:
        float32 [H, W, 3], metres in the sensor's frame; NaN where invalid, or where z is not above 0.

    Raises:
        DataError: it has none, or cannot be read.
        MissingExtraError: what reads it is not installed.
    """
    # Nobody needs to install what reads a PLY in order to hear that it has no rows.
    found = None if path.suffix.lower() == ".ply" else read_scan(path)
    if found is None or not found.organised:
        count = "" if found is None else f"{len(found.xyz)} "
        raise DataError(
            f"{path}: {count}points without rows and columns; a depth detector needs both: save an organised scan as "
            "NPZ, TIFF or PCD"
        )
    found.xyz[~(found.xyz[..., 2] > 0)] = np.nan
    return found.xyz


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check that it exists and its permissions"
        ) from error


def _read_npz(path: Path) -> ScanFile:
    try:
        arrays = load_arrays(path)
    except BundleError as error:
        read_bytes(path)  # a missing file says so in the words of all others
        raise DataError(f"{path}: not a readable npz; export the scan again") from error
    # Whole numbers are counts of a sensor, not metres.
    if "xyz" not in arrays or not np.issubdtype(arrays["xyz"].dtype, np.floating):
        raise DataError(f"{path}: no 'xyz' in floating-point metres in it, but {', '.join(arrays) or 'nothing'}")
    viewpoint = arrays.get("viewpoint")
    if viewpoint is not None and (viewpoint.shape != (_AXES,) or not np.isfinite(viewpoint).all()):
        raise DataError(f"{path}: viewpoint is {list(viewpoint.shape)}, expected 3 finite numbers")
    origin = None if viewpoint is None else viewpoint.astype(np.float64)
    # A cloud that names no sensor may go around the part; an organised scan has one, at the origin.
    xyz = np.asarray(arrays["xyz"], np.float32)
    return ScanFile(xyz, origin, closed=origin is None and xyz.ndim == _AXES - 1)


def _read_tiff(path: Path) -> ScanFile:
    try:
        import tifffile  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise _missing("tifffile", path) from error
    content = read_bytes(path)
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as tiff:
            series = tiff.series[0]
            # Memory is taken, and filled, for what the header says.
            if series.size > _MOST_VALUES:
                raise ValueError(f"says {list(series.shape)}")  # noqa: TRY301 (told as what else is damaged)
            xyz = series.asarray()
    # A damaged file fails wherever the reader stumbles over it.
    except Exception as error:
        raise DataError(f"{path}: not a readable TIFF ({error}); export the scan again") from error
    if not np.issubdtype(xyz.dtype, np.floating):
        raise DataError(f"{path}: {xyz.dtype} values; a scan has x, y and z in metres, as float32")
    return ScanFile(np.asarray(xyz, np.float32), None)


def _read_pcd(path: Path) -> ScanFile:
    try:
        from pypcd4 import PointCloud  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise _missing("pypcd4", path) from error
    content = read_bytes(path)
    try:
        cloud = PointCloud.from_fileobj(io.BytesIO(content))
        xyz = np.asarray(cloud.numpy(("x", "y", "z")), np.float32)
        meta = cloud.metadata
        if meta.height > 1:
            xyz = xyz.reshape(meta.height, meta.width, _AXES)
        viewpoint = np.array([float(value) for value in tuple(meta.viewpoint)[:_AXES]])
    # The same.
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a readable PCD with x, y and z ({why}); export the scan again") from error
    return ScanFile(xyz, viewpoint)


def _read_ply(path: Path) -> ScanFile:
    try:
        import trimesh  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise _missing("trimesh", path) from error
    content = read_bytes(path)
    try:
        loaded = trimesh.load(io.BytesIO(content), file_type="ply", process=False)
        xyz = np.asarray(loaded.vertices, np.float32)
    # The same.
    except Exception as error:
        raise DataError(f"{path}: not a readable PLY ({error}); export the scan again") from error
    return ScanFile(xyz, None, closed=True)


def _missing(package: str, path: Path) -> MissingExtraError:
    return MissingExtraError(f"{path}: {package} reads it and is not installed; run: pip install 'lineward[three-d]'")
