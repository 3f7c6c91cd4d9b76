"""From a frame to network inputs, and from tile maps back to one map.

The trainer and the box use these same functions, so that a model sees in production what it saw in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from edge.errors import CaptureError
from edge.inference.depth import depth_canvas
from edge.inference.signals import signal_canvas
from edge.inputs import Inputs, Preprocessing, Resize, SignalPreprocessing

if TYPE_CHECKING:
    import numpy.typing as npt

    Scratch = dict[tuple[int, ...], npt.NDArray[np.uint8]]

# Frames of ever new sizes must not fill the memory.
_SCRATCH_SIZES = 8


def to_canvas(
    image: npt.NDArray[Any],
    preprocessing: Inputs,
    *,
    out: npt.NDArray[Any] | None = None,
    scratch: Scratch | None = None,
) -> npt.NDArray[Any]:
    """Make the canvas of a frame, of whichever modality the preprocessing is.

    Args:
        image: uint8 [H, W, 3] BGR; a depth map or a window as :class:`edge.inputs.Modality` says.
        preprocessing: the manifest's.
        out: contiguous, of the canvas's shape and type, to write to; a new array where None.
        scratch: buffers of the steps between, kept by a caller who makes many canvases; one thread at a time.

    Returns:
        uint8 [canvas_height, canvas_width, 3] RGB; float32 [canvas_height, canvas_width, 3] of a depth map, float32
        [channels, samples] of a signal. ``out`` where given.

    Raises:
        CaptureError: the frame is not of that modality, or smaller than the crop.
    """
    if isinstance(preprocessing, SignalPreprocessing):
        return signal_canvas(image, preprocessing, out=out)
    if preprocessing.resize is Resize.VALID:
        return depth_canvas(image, preprocessing, out=out)
    return _image_canvas(image, preprocessing, out, scratch)


def _image_canvas(
    image: npt.NDArray[np.uint8],
    preprocessing: Preprocessing,
    out: npt.NDArray[np.uint8] | None,
    scratch: Scratch | None,
) -> npt.NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:  # noqa: PLR2004
        raise CaptureError(f"frame is {image.dtype} {image.shape}, expected uint8 [H, W, 3]; check the camera's format")
    crop = preprocessing.crop
    if crop is not None:
        height, width = image.shape[:2]
        if crop.x + crop.w > width or crop.y + crop.h > height:
            raise CaptureError(
                f"frame is {width}x{height}, too small for the crop {crop.w}x{crop.h} at ({crop.x}, {crop.y}); "
                "set the camera to the size that the bundle was trained for"
            )
        image = image[crop.y : crop.y + crop.h, crop.x : crop.x + crop.w]
    height, width = preprocessing.canvas_height, preprocessing.canvas_width
    if preprocessing.resize is Resize.PYRAMID:
        while image.shape[0] >= 2 * height and image.shape[1] >= 2 * width:
            # cv2 turns an exact bilinear halving into a 2x2 mean, vectorised.
            image = _resized(image, image.shape[0] // 2, image.shape[1] // 2, scratch)
    if image.shape[:2] != (height, width):
        image = _resized(image, height, width, scratch)
    if out is None:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out)
    return out


def _resized(image: npt.NDArray[np.uint8], height: int, width: int, scratch: Scratch | None) -> npt.NDArray[np.uint8]:
    target = None
    if scratch is not None:
        target = scratch.get((height, width))
        if target is None:
            if len(scratch) >= _SCRATCH_SIZES:
                scratch.clear()
            target = scratch[height, width] = np.empty((height, width, 3), np.uint8)
    return np.asarray(cv2.resize(image, (width, height), dst=target, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def tiles_of(image: npt.NDArray[Any], preprocessing: Inputs, *, out: npt.NDArray[Any], scratch: Scratch) -> None:
    """Make the canvas of a frame and cut it into the buffer of network inputs.

    Args:
        image: as for :func:`to_canvas`.
        preprocessing: the manifest's.
        out: contiguous, [rows * cols, ...] of the preprocessing's tile shape and type, written whole.
        scratch: as for :func:`to_canvas`.

    Raises:
        CaptureError: as :func:`to_canvas`.
    """
    if len(out) == 1:
        to_canvas(image, preprocessing, out=out[0], scratch=scratch)
    else:
        np.copyto(out, cut_tiles(to_canvas(image, preprocessing, scratch=scratch), preprocessing))


def cut_tiles(canvas: npt.NDArray[Any], preprocessing: Inputs) -> npt.NDArray[Any]:
    """Cut a canvas into tiles, row by row.

    Returns:
        [rows * cols, ...], uint8 [..., height, width, 3] of images; a view of the canvas where one tile is the canvas.
    """
    tiles = preprocessing.tiles
    if tiles.rows == tiles.cols == 1:
        return canvas[np.newaxis]
    step_y, step_x = preprocessing.height - tiles.overlap, preprocessing.width - tiles.overlap
    return np.stack(
        [
            canvas[r * step_y : r * step_y + preprocessing.height, c * step_x : c * step_x + preprocessing.width]
            for r in range(tiles.rows)
            for c in range(tiles.cols)
        ]
    )


def cut_map(cells: npt.NDArray[Any], preprocessing: Inputs, map_stride: int) -> npt.NDArray[Any]:
    """Cut what belongs to the cells of a frame's map into tiles, as :func:`cut_tiles` cuts the canvas.

    Args:
        cells: [canvas_height / map_stride, canvas_width / map_stride].
        preprocessing: the manifest's.
        map_stride: canvas pixels per map cell.

    Returns:
        [rows * cols, height / map_stride, width / map_stride].
    """
    tiles = preprocessing.tiles
    height, width = preprocessing.height // map_stride, preprocessing.width // map_stride
    step_y, step_x = height - tiles.overlap // map_stride, width - tiles.overlap // map_stride
    return np.stack(
        [
            cells[r * step_y : r * step_y + height, c * step_x : c * step_x + width]
            for r in range(tiles.rows)
            for c in range(tiles.cols)
        ]
    )


def join_maps(maps: npt.NDArray[np.float32], preprocessing: Inputs, map_stride: int) -> npt.NDArray[np.float32]:
    """Join the maps of one frame's tiles; cells that several tiles cover get their mean.

    Args:
        maps: float32 [rows * cols, height / map_stride, width / map_stride].
        preprocessing: the manifest's.
        map_stride: canvas pixels per map cell.

    Returns:
        float32 [canvas_height / map_stride, canvas_width / map_stride].
    """
    tiles = preprocessing.tiles
    if tiles.rows == tiles.cols == 1:
        return np.asarray(maps[0], dtype=np.float32)
    h, w = maps.shape[1:]
    overlap = tiles.overlap // map_stride
    total = np.zeros((tiles.rows * (h - overlap) + overlap, tiles.cols * (w - overlap) + overlap), np.float32)
    count = np.zeros_like(total)
    for index, tile in enumerate(maps):
        y, x = (index // tiles.cols) * (h - overlap), (index % tiles.cols) * (w - overlap)
        total[y : y + h, x : x + w] += tile
        count[y : y + h, x : x + w] += 1
    return np.divide(total, count, dtype=np.float32)
