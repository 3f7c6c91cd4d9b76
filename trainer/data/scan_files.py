"""Scans as files: NPZ and TIFF out; what reads them is in :mod:`edge.capture.scan_files`.

It knows files and points; it must not know folders, labels or defects.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt


def write_tiff(path: Path, xyz: npt.NDArray[np.float32]) -> None:
    """Write an organised scan as TIFF, float32 [H, W, 3], invalid points all zero.

    Raises:
        DataError: it cannot be written.
        MissingExtraError: tifffile is not installed.
    """
    try:
        import tifffile  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{path}: tifffile writes it and is not installed; run: pip install 'lineward[three-d]'"
        ) from error
    content = io.BytesIO()
    tifffile.imwrite(content, np.nan_to_num(np.asarray(xyz, np.float32)), compression="zlib", photometric="rgb")
    _write(path, content.getvalue())


def write_npz(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Write arrays, such as ``xyz`` and ``mask``.

    Raises:
        DataError: the file cannot be written.
    """
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    _write(path, content.getvalue())


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or choose another folder") from error
