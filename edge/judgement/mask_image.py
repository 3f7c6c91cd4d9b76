"""A mask drawn as a PNG file: white where defects matter. It must not know maps."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (also read at run time)
from typing import TYPE_CHECKING

import cv2
import numpy as np

from edge.errors import SettingsError

if TYPE_CHECKING:
    import numpy.typing as npt

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 2**27
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IHDR = slice(16, 24)
_BIT_DEPTH, _COLOUR_TYPE = 24, 25
_GREY = 0
# Pixels between black and white belong to the smoothed edges of what was drawn; a photograph has them everywhere.
_BLACK, _WHITE, _HALF = 64, 192, 128
_MAX_BETWEEN = 0.1
# A mask drawn on a scaled copy has its proportions to within a rounded row or column.
_ROUNDED = 1.0


def read_mask(path: Path) -> npt.NDArray[np.bool_]:
    """Read a mask.

    Args:
        path: a PNG of one grey channel (PNG, third edition, 11.2.1: colour type 0), 1 to 8 bits, black and white.

    Returns:
        bool [H, W], True where the grey value is at least half of white.

    Raises:
        SettingsError: the file is missing, no such PNG, or a picture rather than a mask; or nothing in it is white.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(f"{path}: the mask is over {MAX_BYTES >> 20} MiB; save it as a 1-bit or 8-bit grey PNG")
        content = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path}: the mask cannot be read ({error.strerror}); name a PNG file") from error
    cure = "save it as a grey PNG of 1 to 8 bits without transparency, white where defects matter"
    if content[:8] != _SIGNATURE or len(content) <= _COLOUR_TYPE:
        raise SettingsError(f"{path}: the mask is no PNG; {cure}")
    width, height = (int.from_bytes(content[_IHDR][at : at + 4], "big") for at in (0, 4))
    if width * height > MAX_PIXELS:
        raise SettingsError(f"{path}: the mask has {width}x{height} pixels, over the limit; save it in camera pixels")
    if content[_COLOUR_TYPE] != _GREY or content[_BIT_DEPTH] > 8:  # noqa: PLR2004 (bits)
        raise SettingsError(f"{path}: the mask is not of one grey channel of at most 8 bits; {cure}")
    try:
        grey = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_GRAYSCALE)
    except cv2.error:
        grey = None
    if grey is None:
        raise SettingsError(f"{path}: the mask is a damaged PNG; {cure}")
    between = float(((grey > _BLACK) & (grey < _WHITE)).mean())
    if between > _MAX_BETWEEN:
        raise SettingsError(
            f"{path}: {between:.0%} of the mask is neither black nor white, so it is a picture; draw white where "
            "defects matter and black elsewhere"
        )
    drawn: npt.NDArray[np.bool_] = grey >= _HALF
    if not drawn.any():
        raise SettingsError(f"{path}: nothing in the mask is white; draw white where defects matter")
    return drawn


def check_proportions(drawn: tuple[int, int], frame: tuple[int, int], path: Path) -> None:
    """Refuse a mask that is no uniformly scaled picture of the camera frame.

    Args:
        drawn: (H, W) of the mask.
        frame: (H, W) of the camera frame.
        path: of the mask, for the error.

    Raises:
        SettingsError: scaled to the frame's width, the mask's height is off by more than one of its pixels.
    """
    (mask_h, mask_w), (frame_h, frame_w) = drawn, frame
    if abs(mask_h - frame_h * mask_w / frame_w) > _ROUNDED:
        raise SettingsError(
            f"{path}: the mask has {mask_w}x{mask_h} pixels, which is not the shape of the camera's frames "
            f"({frame_w}x{frame_h}); draw it on a frame of this camera, at its size or scaled uniformly"
        )
