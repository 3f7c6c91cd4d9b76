"""Measuring the moments of one image, on its canvas and in the trunk's taps; references are measured with it too.

It must not know what moments are compared with.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import cv2
import numpy as np

from edge.adaptation.moments import DETAIL, IMAGE, Moments

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.adaptation.look import Taps

    Vector = npt.NDArray[np.float32]

TRIM = 0.05
"""Share of an image's patches, those that lie farthest from its mean, that its moments leave out: a small defect has no
say in them, and one that fills more of the image has less. On generated cloth, corrected by each image's own moments,
0, 0.05 and 0.3 ranked small defects alike."""
_PATCH = 8
# The middle of grey levels: squares of what is near 0 keep their digits.
_GREY = 128.0
_LEAST_GREY = 1.0
# Sharpness is measured in so many rows and columns of parts.
_PARTS = 4
# OpenCV takes the binomial filter of this size: the fastest that it has.
_KERNEL = (3, 3)
_OF_THREAD = threading.local()
# More positions than of a map of so many rows and columns say nothing more about a mean.
_GRID = 28
_LEAST_VARIANCE = np.float32(1e-12)


def measure_canvas(tiles: npt.NDArray[np.uint8]) -> Moments:
    """Measure the colours and the sharpness of one image.

    Of every second pixel in both directions; patches are 16 x 16 pixels.

    Args:
        tiles: uint8 [T, H, W, 3] RGB, all of one image.

    Returns:
        Moments of :data:`edge.adaptation.moments.IMAGE` and :data:`edge.adaptation.moments.DETAIL`.
    """
    means, squares = [], []
    for tile in tiles:
        half = np.subtract(tile[::2, ::2], np.float32(_GREY), dtype=np.float32)
        size = (max(1, half.shape[1] // _PATCH), max(1, half.shape[0] // _PATCH))
        means.append(cv2.resize(half, size, interpolation=cv2.INTER_AREA).reshape(-1, 3))
        squares.append(cv2.resize(np.square(half, out=half), size, interpolation=cv2.INTER_AREA).reshape(-1, 3))
    rows = np.concatenate(means).T
    middle = rows.mean(axis=1, dtype=np.float32)
    mean, std = _trimmed(rows, np.concatenate(squares).T, np.square(rows - middle[:, np.newaxis]))
    detail = np.array([_detail(tiles) / max(float(std.mean()), _LEAST_GREY)], np.float32)
    return Moments({IMAGE: mean + np.float32(_GREY), DETAIL: np.zeros(1, np.float32)}, {IMAGE: std, DETAIL: detail})


def blurred(tile: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return a tile uint8 [H, W, 3] without its finest detail, in a buffer of this thread that its next call uses."""
    buffer: npt.NDArray[np.uint8] | None = getattr(_OF_THREAD, "buffer", None)
    if buffer is None or buffer.shape != tile.shape:
        buffer = _OF_THREAD.buffer = np.empty(tile.shape, np.uint8)
    cv2.GaussianBlur(tile, _KERNEL, 0, dst=buffer)
    return buffer


def _detail(tiles: npt.NDArray[np.uint8]) -> float:
    """Deviation of the finest detail in grey levels, without the parts of the image that have most of it."""
    found = []
    for tile in tiles:
        smooth = blurred(tile)
        height, width = tile.shape[:2]
        for top in range(_PARTS):
            rows = slice(top * height // _PARTS, (top + 1) * height // _PARTS)
            for left in range(_PARTS):
                columns = slice(left * width // _PARTS, (left + 1) * width // _PARTS)
                part = tile[rows, columns]
                found.append(cv2.norm(part, smooth[rows, columns], cv2.NORM_L2SQR) / part.size)
    found.sort()
    kept = found[: len(found) - math.ceil(len(found) * TRIM)]
    return math.sqrt(sum(kept) / len(kept))


def measure_taps(taps: Taps) -> Moments:
    """Measure the channels of one image's taps; of large ones every n-th row and column.

    Args:
        taps: float32 [T, C, h, w] by name, all of one image; only read.

    Returns:
        Moments of each tap.
    """
    mean, std = {}, {}
    for name, tap in taps.items():
        step = max(1, min(tap.shape[2:]) // _GRID)
        some = tap[:, :, ::step, ::step]
        rows = np.ascontiguousarray(some.swapaxes(0, 1)).reshape(tap.shape[1], -1)
        near = rows.mean(axis=1, dtype=np.float32)
        rows = np.subtract(rows, near[:, np.newaxis])
        squares = np.square(rows)
        mean[name], std[name] = _trimmed(rows, squares, squares)
        mean[name] += near
    return Moments(mean, std)


def joined(parts: Sequence[Moments]) -> Moments:
    """Return what was measured in several places as one; no name may be in two."""
    return Moments(
        {name: values for part in parts for name, values in part.mean.items()},
        {name: values for part in parts for name, values in part.std.items()},
    )


def _trimmed(
    values: npt.NDArray[np.float32], squares: npt.NDArray[np.float32], apart: npt.NDArray[np.float32]
) -> tuple[Vector, Vector]:
    """Mean and deviation of each row, without the columns that lie farthest.

    Args:
        values: float32 [C, P], near 0; P patches.
        squares: float32 [C, P], mean square in each patch.
        apart: float32 [C, P], squared distance of each patch from the middle.
    """
    patches = values.shape[1]
    keep = patches - int(patches * TRIM)
    # einsum rather than a matrix product: threads of BLAS would take cores from the engine for a microsecond's work.
    unit = 1 / np.maximum(apart.mean(axis=1, dtype=np.float32), _LEAST_VARIANCE)
    far = np.einsum("c,cp->p", unit, apart)
    weights = np.zeros(patches, np.float32)
    weights[np.argpartition(far, keep - 1)[:keep]] = 1 / keep
    mean = np.einsum("cp,p->c", values, weights)
    variance = np.einsum("cp,p->c", squares, weights) - mean * mean
    return mean, np.sqrt(np.maximum(variance, np.float32(0)))
