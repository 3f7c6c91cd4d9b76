"""Decode image files the way the box does and refuse the ones that are damaged; write pictures without loss.

It knows files and pixels; it must not know folders, labels or splits.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import cv2
import numpy as np

from edge.capture.scan_files import read_bytes
from edge.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

_PNG = b"\x89PNG\r\n\x1a\n"
_MASK_MIDDLE = 127
_STANDALONE_JPEG_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})


def load_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read one image as the box would read it from a folder.

    Grey becomes three equal channels, alpha is dropped, 16-bit values keep their high byte (value // 256), palettes
    are resolved and an EXIF orientation is applied.

    Args:
        path: a PNG, JPEG, BMP, TIFF or WebP file.

    Returns:
        uint8 [H, W, 3], BGR.

    Raises:
        DataError: the file is missing, unreadable, no image, or damaged or truncated.
    """
    return _decode(path, cv2.IMREAD_COLOR)


def load_mask_file(path: Path, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Read a mask: pixels above 0 are defective, above 127 in a JPEG, whose compression blurs edges.

    Args:
        path: an image file; colour is reduced to grey first.
        shape: (height, width) of the image that it belongs to.

    Returns:
        bool [H, W].

    Raises:
        DataError: the file is missing or damaged, or its size differs from ``shape``.
    """
    grey = _decode(path, cv2.IMREAD_UNCHANGED)
    if grey.ndim == 3:  # noqa: PLR2004
        grey = grey[..., :3].max(axis=2)  # alpha says nothing about defects
    if grey.shape != shape:
        raise DataError(
            f"{path}: the mask is {grey.shape[1]}x{grey.shape[0]} but its image is {shape[1]}x{shape[0]}; "
            "save the mask at the size of its image"
        )
    lossy = path.suffix.lower() in {".jpg", ".jpeg"}
    return np.asarray(grey > (_MASK_MIDDLE if lossy else 0))


def write_png(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """Write a picture, and the folders above it.

    Args:
        path: ending in ``.png``.
        image: uint8 [H, W] or [H, W, 3] BGR.

    Raises:
        DataError: it cannot be written.
    """
    # Level 1: sensor noise does not compress, and higher levels only take longer.
    done, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done  # a PNG of uint8 always encodes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror}); free some space or choose another folder"
        ) from error


def new_folder(path: Path) -> None:
    """Make a folder to write in.

    Raises:
        DataError: it holds files already, or cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise DataError(f"{path}: holds files already; choose a new folder, nothing was changed")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error


def _decode(path: Path, flags: int) -> npt.NDArray[np.generic]:
    data = read_bytes(path)
    damage = find_damage(data)
    image = None
    if not damage:
        try:
            image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error as error:
            damage = f"OpenCV says: {error.err or error}"
    if image is None:
        raise DataError(
            f"{path}: not a readable image ({damage or 'unknown or damaged format'}); copy it again from its source, "
            "or remove it"
        )
    return image


def find_damage(data: bytes) -> str:
    """Say what is missing from an image file, or return an empty string.

    The PNG and JPEG decoders fill the missing part of a truncated file with grey and only print a warning, so these
    containers are checked here: PNG chunks with their CRC (ISO/IEC 15948), and the JPEG end marker (ITU-T T.81
    annex B). The decoders of BMP, TIFF and WebP refuse truncated files themselves.
    """
    if not data:
        return "the file is empty"
    if data.startswith(_PNG):
        return _png_damage(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg_damage(data)
    return ""


def _png_damage(data: bytes) -> str:
    position = len(_PNG)
    while position + 12 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if end > len(data):
            return "truncated"
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return f"checksum of a PNG chunk is wrong at byte {position}"
        if data[position + 4 : position + 8] == b"IEND":
            return ""
        position = end
    return "truncated"


def _jpeg_damage(data: bytes) -> str:
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:  # noqa: PLR2004
            return f"no JPEG marker at byte {position}"
        marker = data[position + 1]
        if marker == 0xFF:  # noqa: PLR2004 (fill byte)
            position += 1
        elif marker in _STANDALONE_JPEG_MARKERS:
            position += 2
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker == 0xDA:  # noqa: PLR2004 (start of scan: entropy-coded data never contains FF D9)
                return "" if data.find(b"\xff\xd9", position) >= 0 else "truncated"
    return "truncated"
