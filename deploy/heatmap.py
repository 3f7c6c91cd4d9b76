"""Anomaly maps drawn over their images, for reports, documents and demonstrations.

It must not know of files, evaluations or HTML.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.bundle import Crop

# Inferno grows in lightness along its whole length, so it survives grey print and colour-blind eyes.
_COLOURS = cv2.COLORMAP_INFERNO
_DARKEST = 60  # of 255: the black end of the colour map would look like a dark defect
_STRONGEST = 0.75  # opacity at the hot end; the surface stays visible below
_OUTLINE = (255, 230, 0)  # cyan: the colour map has none, and neither dark nor light surfaces hide it
_MASK_OUTLINE = (80, 220, 60)


def heatmap_overlay(
    image: npt.NDArray[np.uint8],
    anomaly_map: npt.NDArray[np.float32],
    *,
    low: float,
    high: float,
    threshold: float | None = None,
    crop: Crop | None = None,
) -> npt.NDArray[np.uint8]:
    """Draw a map over its image: transparent at ``low`` and below, hot at ``high`` and above.

    Args:
        image: uint8 [H, W, 3] BGR; a grey copy of it is drawn on, so that colour means anomaly alone.
        anomaly_map: float [h, w], raw, covering the crop.
        low: map value that stays clear, such as the background of good parts.
        high: map value of the hottest colour, > low.
        threshold: outline the regions at or above this map value.
        crop: the part of the image that the map covers; None for all of it. Outside it the image is dimmed.

    Returns:
        uint8 [H, W, 3] BGR.

    Raises:
        ValueError: high is not above low.
    """
    if not high > low:
        raise ValueError(f"high ({high}) must be above low ({low})")
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
    drawn = grey if crop is None else grey // 3
    rows, columns = _inside(image, crop)
    base = grey[rows, columns]
    size = (base.shape[1], base.shape[0])
    enlarged = cv2.resize(np.asarray(anomaly_map, np.float32), size, interpolation=cv2.INTER_LINEAR)
    heat = np.clip((np.nan_to_num(enlarged, nan=low) - low) / (high - low), 0.0, 1.0)
    palette = np.rint(_DARKEST + heat * (255 - _DARKEST)).astype(np.uint8)
    colours = cv2.applyColorMap(palette, _COLOURS)
    opacity = (_STRONGEST * heat)[..., np.newaxis]
    blended = np.rint(base * (1 - opacity) + colours * opacity).astype(np.uint8)
    if threshold is not None:
        _outline(blended, enlarged >= threshold, _OUTLINE)
    drawn[rows, columns] = blended
    return np.asarray(drawn, np.uint8)


def mask_outline(image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Return a copy of the image, uint8 [H, W, 3] BGR, with a green line around the mask bool [H, W]."""
    drawn = image.copy()
    _outline(drawn, mask, _MASK_OUTLINE)
    return np.asarray(drawn, np.uint8)


def _inside(image: npt.NDArray[np.uint8], crop: Crop | None) -> tuple[slice, slice]:
    if crop is None:
        return slice(0, image.shape[0]), slice(0, image.shape[1])
    return slice(crop.y, crop.y + crop.h), slice(crop.x, crop.x + crop.w)


def _outline(drawn: npt.NDArray[np.uint8], region: npt.NDArray[np.bool_], colour: tuple[int, int, int]) -> None:
    """Draw around a region, outside of it: a defect of one pixel stays visible inside its line."""
    width = max(1, round(max(drawn.shape[:2]) / 256))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 3, 2 * width + 3))
    gap = cv2.getStructuringElement(cv2.MORPH_RECT, (3, 3))
    inner = region.astype(np.uint8)
    line = cv2.dilate(inner, kernel).astype(bool) & ~cv2.dilate(inner, gap).astype(bool)
    drawn[line] = colour
