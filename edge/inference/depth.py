"""A depth map as the networks see it: metres on the canvas's grid, NaN where too little was measured.

The trainer and the box use these same functions. Knows nothing of where depth maps come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from edge.errors import CaptureError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.inputs import DepthLayout, Preprocessing

_XYZ = 3
_HALF = 0.5


def depth_canvas(
    points: npt.NDArray[Any], preprocessing: Preprocessing, *, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Crop an organised scan and resize it: a cell is the mean of its valid points, and NaN where most are invalid.

    Args:
        points: float32 [H, W, 3], XYZ in metres; a point with a coordinate that is not finite is invalid.
        preprocessing: the manifest's, with ``resize: valid``.
        out: contiguous float32 [canvas_height, canvas_width, 3] to write to; a new array where None.

    Returns:
        float32 [canvas_height, canvas_width, 3], XYZ in metres, all three NaN where invalid; ``out`` where given.

    Raises:
        CaptureError: no such array, or smaller than the crop.
    """
    if points.ndim != _XYZ or points.shape[2] != _XYZ or points.dtype != np.float32:
        raise CaptureError(
            f"depth frame is {points.dtype} {list(points.shape)}, expected float32 [H, W, 3] in metres; check the "
            "source's kind"
        )
    crop = preprocessing.crop
    if crop is not None:
        if crop.x + crop.w > points.shape[1] or crop.y + crop.h > points.shape[0]:
            raise CaptureError(
                f"depth frame is {points.shape[1]}x{points.shape[0]}, too small for the crop {crop.w}x{crop.h} at "
                f"({crop.x}, {crop.y}); set the sensor to the size that the bundle was trained for"
            )
        points = points[crop.y : crop.y + crop.h, crop.x : crop.x + crop.w]
    shape = preprocessing.canvas_shape
    canvas = np.empty(shape, np.float32) if out is None else out
    valid = np.isfinite(points).all(axis=2)
    if points.shape == shape:
        np.copyto(canvas, points)
        canvas[~valid] = np.nan
        return canvas
    shrinks = points.shape[0] >= shape[0] and points.shape[1] >= shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    size = (shape[1], shape[0])
    weight = cv2.resize(valid.astype(np.float32), size, interpolation=how)
    sums = cv2.resize(np.where(valid[..., np.newaxis], points, np.float32(0)), size, interpolation=how)
    # A weight of exactly a half may come out a rounding below it.
    enough = weight >= _HALF - 1e-4
    canvas[...] = np.nan
    canvas[enough] = sums[enough] / weight[enough, np.newaxis]
    return canvas


def within_range(canvas: npt.NDArray[np.float32], layout: DepthLayout) -> None:
    """Make points of a canvas invalid, in place, that are nearer or further than the layout allows."""
    z = canvas[..., 2]
    with np.errstate(invalid="ignore"):
        outside = z < layout.near_m
        if layout.far_m is not None:
            outside |= z > layout.far_m
    canvas[outside] = np.nan


def valid_share(canvas: npt.NDArray[np.float32]) -> float:
    """Return the share of a canvas's cells that were measured."""
    return float(np.isfinite(canvas[..., 2]).mean())
