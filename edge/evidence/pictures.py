"""Pictures for people and for later study: JPEG frames, lossless anomaly maps, maps laid over their frames.

Pure functions from arrays to bytes; knows nothing of files, queues or events.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from edge.errors import EvidenceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from edge.frames import Region
    from edge.judgement.region_of_interest import Box

LEVELS = 65_535
# People look at an overlay on a screen; the frame itself is beside it.
OVERLAY_WIDTH = 1280
_MAP_SHARE = 0.45
_RED, _WHITE = (40, 40, 255), (255, 255, 255)


def encode_jpeg(image: npt.NDArray[np.uint8], quality: int) -> bytes:
    """JPEG of an image uint8 [H, W, 3] BGR; ``quality`` 1 .. 100.

    Raises:
        EvidenceError: it is larger than the format allows (65,535 pixels a side).
    """
    return _encode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])


def encode_map(anomaly_map: npt.NDArray[np.float32]) -> tuple[bytes, dict[str, Any]]:
    """A raw anomaly map as a 16-bit grey PNG, and what its pixels mean.

    Args:
        anomaly_map: float32 [h, w], raw.

    Returns:
        The PNG and ``{"minimum": a, "step": b, ...}``: raw value = a + b * pixel, off by b / 2 at most. Values that are
        not finite are stored as 0 and counted in ``not_finite``.

    Raises:
        EvidenceError: it has no pixel.
    """
    finite = np.isfinite(anomaly_map)
    values = anomaly_map[finite].astype(np.float64)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    step = (high - low) / LEVELS
    scaled = np.where(finite, anomaly_map, low).astype(np.float64) - low
    pixels = np.rint(scaled / step) if step > 0 else np.zeros(anomaly_map.shape)
    scale = {"minimum": low, "step": step, "not_finite": int(anomaly_map.size - values.size)}
    return _encode(".png", np.clip(pixels, 0, LEVELS).astype(np.uint16), []), scale


def encode_array(values: npt.NDArray[Any]) -> bytes:
    """An array as an npy file, without pickle."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def decode_map(png: bytes, scale: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """The anomaly map float32 [h, w] that :func:`encode_map` was given, to half a step.

    Raises:
        EvidenceError: it is no 16-bit PNG.
    """
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise EvidenceError("map.png: is no 16-bit PNG; fetch it again")
    return np.asarray(scale["minimum"] + scale["step"] * pixels.astype(np.float64), dtype=np.float32)


def draw_overlay(
    image: npt.NDArray[np.uint8],
    anomaly_map: npt.NDArray[np.float32],
    *,
    box: Box,
    threshold: float,
    regions: Sequence[Region],
) -> npt.NDArray[np.uint8]:
    """The map in colours over its frame, with a frame around each region.

    Args:
        image: uint8 [H, W, 3] BGR.
        anomaly_map: float32 [h, w], raw. Its lowest value is blue; red is its highest, or the threshold where that is
            higher, so that a part below the threshold is never all red.
        box: the part of the frame that the map covers, in pixels.
        threshold: raw.
        regions: in pixels of the frame.

    Returns:
        uint8 [H', W', 3] BGR of the frame's aspect, at most 1,280 pixels wide.
    """
    height, width = image.shape[:2]
    ratio = min(1.0, OVERLAY_WIDTH / width)
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    canvas = np.array(cv2.resize(image, size, interpolation=cv2.INTER_AREA))
    x0, y0 = max(0, round(box[0] * ratio)), max(0, round(box[1] * ratio))
    x1, y1 = min(size[0], round((box[0] + box[2]) * ratio)), min(size[1], round((box[1] + box[3]) * ratio))
    if x1 > x0 and y1 > y0:
        colours = cv2.applyColorMap(_as_bytes(anomaly_map, threshold), cv2.COLORMAP_TURBO)
        colours = cv2.resize(colours, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        part = canvas[y0:y1, x0:x1]
        canvas[y0:y1, x0:x1] = cv2.addWeighted(colours, _MAP_SHARE, part, 1 - _MAP_SHARE, 0)
    for region in regions:
        corner = (round(region.x * ratio), round(region.y * ratio))
        other = (round((region.x + region.w) * ratio), round((region.y + region.h) * ratio))
        cv2.rectangle(canvas, corner, other, _WHITE, 3)
        cv2.rectangle(canvas, corner, other, _RED, 1)
    return canvas


def _as_bytes(anomaly_map: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.uint8]:
    finite = np.nan_to_num(anomaly_map, nan=0.0, posinf=0.0, neginf=0.0)
    low = float(finite.min())
    high = max(float(finite.max()), threshold if np.isfinite(threshold) else low)
    span = high - low if high > low else 1.0
    return np.asarray(np.clip(255 * (finite - low) / span, 0, 255), dtype=np.uint8)


def _encode(suffix: str, image: npt.NDArray[Any], parameters: list[int]) -> bytes:
    try:
        done, data = cv2.imencode(suffix, image, parameters)
    except cv2.error as error:
        raise EvidenceError(f"a picture of {image.shape} cannot be encoded ({error.err})") from error
    if not done:
        raise EvidenceError(f"a picture of {image.shape} cannot be encoded as {suffix}")
    return bytes(data)
