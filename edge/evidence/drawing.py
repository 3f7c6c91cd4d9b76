"""What a frame looks like to a person, whatever its modality: an image as it is, a depth map in colours, traces.

Pure functions from arrays to arrays; knows nothing of files, events or JPEG.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.frames import Region
    from edge.judgement.region_of_interest import Box

TRACES_WIDTH = 1280
_TRACES_HEIGHT, _LANE_MIN, _LANE_MAX = 900, 6, 120
_CHANNELS_BY_SAMPLES = 2
_INK, _LOST, _LINE = (60, 40, 20), (200, 200, 255), (225, 225, 225)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture of a frame.

    Attributes:
        picture: uint8 [H', W', 3] BGR.
        across: pixels of the picture per pixel (or sample) of the frame.
        down: pixels of the picture per pixel (or channel) of the frame.
    """

    picture: npt.NDArray[np.uint8]
    across: float = 1.0
    down: float = 1.0

    def box(self, box: Box) -> Box:
        """A part of the frame, in the picture's pixels."""
        x, y, w, h = box
        return x * self.across, y * self.down, w * self.across, h * self.down

    def regions(self, regions: Sequence[Region]) -> tuple[Region, ...]:
        """Regions of the frame, in the picture's pixels."""
        if self.across == self.down == 1:
            return tuple(regions)
        found = []
        for region in regions:
            x, y, w, h = (round(side) for side in self.box((region.x, region.y, region.w, region.h)))
            found.append(dataclasses.replace(region, x=x, y=y, w=max(1, w), h=max(1, h)))
        return tuple(found)


def draw(image: npt.NDArray[Any]) -> Drawing:
    """Draw a frame.

    Args:
        image: uint8 [H, W, 3] BGR is drawn as it is; float32 [H, W, 3] by its depth, near points red, invalid ones
            black; float32 [K, Q] as K traces over one time, lost samples marked.
    """
    if image.dtype == np.uint8:
        return Drawing(image)
    return _traces(image) if image.ndim == _CHANNELS_BY_SAMPLES else Drawing(_depth(image))


def _depth(points: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    z = points[..., 2]
    valid = np.isfinite(z)
    low, high = np.quantile(z[valid], (0.01, 0.99)) if valid.any() else (0.0, 1.0)
    near = 1 - (np.nan_to_num(z, nan=high) - low) / max(float(high - low), 1e-9)
    picture = cv2.applyColorMap(np.clip(255 * near, 0, 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    picture[~valid] = 0
    return np.asarray(picture, np.uint8)


def _traces(window: npt.NDArray[np.float32]) -> Drawing:
    channels, samples = window.shape
    lane = int(np.clip(_TRACES_HEIGHT // channels, _LANE_MIN, _LANE_MAX))
    picture = np.full((lane * channels, TRACES_WIDTH, 3), 255, np.uint8)
    across = TRACES_WIDTH / samples
    places = (np.arange(samples) + 0.5) * across
    for index, values in enumerate(window):
        top = index * lane
        lost = np.isnan(values)
        for begin, end in _runs(lost):
            picture[top : top + lane, int(begin * across) : max(int(begin * across) + 1, round(end * across))] = _LOST
        picture[top] = _LINE
        if lost.all():
            continue
        low, high = np.nanquantile(values, (0.005, 0.995))
        middle, span = (high + low) / 2, max(float(high - low), 1e-12)
        heights = top + lane * np.clip(0.5 - 0.8 * (values - middle) / span, 0.02, 0.98)
        for begin, end in _runs(~lost):
            points = np.stack([places[begin:end], heights[begin:end]], axis=1).round().astype(np.int32)
            cv2.polylines(
                picture, [points[:, np.newaxis]], isClosed=False, color=_INK, thickness=1, lineType=cv2.LINE_AA
            )
    return Drawing(picture, across, float(lane))


def _runs(where: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Begin and end of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], where.astype(np.int8), [0]])))
    return [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]
