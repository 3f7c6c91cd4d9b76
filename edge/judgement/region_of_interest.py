"""The region of interest, drawn in pixels of the camera frame, as cells of an anomaly map.

Pure geometry; knows nothing of scores, thresholds or cameras, nor of OpenCV: settings are read without it.
"""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (pydantic needs it at run time)
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edge.errors import SettingsError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.bundle import Crop

# Each map cell is sampled at 4 x 4 points; an edge is then placed to an eighth of a cell.
SAMPLES = 4

Box = tuple[float, float, float, float]
"""x, y, w, h of the part of the camera frame that a map covers, in pixels."""


class Rectangle(BaseModel):
    """An upright rectangle in pixels of the camera frame."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    x: float = Field(title="Left", description="Left edge in pixels of the camera frame.", allow_inf_nan=False)
    y: float = Field(title="Top", description="Top edge in pixels of the camera frame.", allow_inf_nan=False)
    w: float = Field(gt=0, title="Width", description="Width in pixels.", allow_inf_nan=False)
    h: float = Field(gt=0, title="Height", description="Height in pixels.", allow_inf_nan=False)

    def outline(self) -> tuple[tuple[float, float], ...]:
        """Return the corners in order."""
        right, bottom = self.x + self.w, self.y + self.h
        return ((self.x, self.y), (right, self.y), (right, bottom), (self.x, bottom))


class Polygon(BaseModel):
    """A polygon in pixels of the camera frame; where it crosses itself the even-odd rule holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    points: tuple[tuple[float, float], ...] = Field(
        min_length=3, title="Points", description="Corners as [x, y] in pixels of the camera frame."
    )

    def outline(self) -> tuple[tuple[float, float], ...]:
        """Return the corners in order."""
        return self.points


class RegionOfInterest(BaseModel):
    """Where defects matter: inside any of ``include`` (empty: everywhere), outside ``exclude``, white in ``mask``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include: tuple[Rectangle | Polygon, ...] = Field(
        (), title="Include", description="Shapes that are judged; without any, the whole frame is."
    )
    exclude: tuple[Rectangle | Polygon, ...] = Field(
        (), title="Exclude", description="Shapes that are not judged, whatever include says."
    )
    mask: Path | None = Field(
        None,
        title="Mask",
        description="A grey PNG, white where defects matter: as large as the camera's frames, or scaled uniformly.",
    )

    @property
    def everywhere(self) -> bool:
        """Whether nothing is drawn."""
        return not self.include and not self.exclude and self.mask is None


def covered_box(crop: Crop | None, *, frame_width: int, frame_height: int) -> Box:
    """Return the part of the camera frame that a map covers: the manifest's crop, or all of it."""
    if crop is None:
        return (0.0, 0.0, float(frame_width), float(frame_height))
    return (float(crop.x), float(crop.y), float(crop.w), float(crop.h))


def rasterise(
    region: RegionOfInterest,
    box: Box,
    map_shape: tuple[int, int],
    *,
    drawn: npt.NDArray[np.bool_] | None = None,
    frame_shape: tuple[int, int] = (0, 0),
) -> npt.NDArray[np.bool_] | None:
    """Turn a region of interest into map cells.

    Args:
        region: what the settings draw.
        box: the part of the camera frame that the map covers.
        map_shape: (h, w) of the map.
        drawn: the region's mask bool [H, W], of any scale; None where it has none.
        frame_shape: (H, W) of the camera frame, which the mask covers.

    Returns:
        bool [h, w], True where at least half of the cell's area counts; None where the whole map counts.

    Raises:
        SettingsError: no cell is left.
    """
    if region.everywhere and drawn is None:
        return None
    height, width = map_shape
    x = box[0] + (np.arange(width * SAMPLES, dtype=np.float64) + 0.5) * (box[2] / (width * SAMPLES))
    y = box[1] + (np.arange(height * SAMPLES, dtype=np.float64) + 0.5) * (box[3] / (height * SAMPLES))
    counts = np.full((y.size, x.size), not region.include)
    for shape in region.include:
        counts |= _inside(shape.outline(), x, y)
    for shape in region.exclude:
        counts &= ~_inside(shape.outline(), x, y)
    if drawn is not None:
        counts &= _sampled(drawn, x / frame_shape[1], y / frame_shape[0])
    share = counts.reshape(height, SAMPLES, width, SAMPLES).mean(axis=(1, 3))
    mask: npt.NDArray[np.bool_] = share >= 0.5  # noqa: PLR2004 (half)
    if not mask.any():
        raise SettingsError(
            f"region_of_interest: nothing is left of the {box[2]:g}x{box[3]:g} pixels at ({box[0]:g}, {box[1]:g}) "
            "that this bundle judges; draw it in pixels of the camera frame"
        )
    return None if mask.all() else mask


def _sampled(
    drawn: npt.NDArray[np.bool_], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Return the mask at fractions of the frame's width and height; a crop beyond the frame counts nowhere."""
    column, row = np.floor(x * drawn.shape[1]).astype(int), np.floor(y * drawn.shape[0]).astype(int)
    inside = (row < drawn.shape[0])[:, np.newaxis] & (column < drawn.shape[1])[np.newaxis, :]
    last_row, last_column = drawn.shape[0] - 1, drawn.shape[1] - 1
    inside &= drawn[np.minimum(row, last_row)[:, np.newaxis], np.minimum(column, last_column)[np.newaxis, :]]
    return np.asarray(inside, dtype=np.bool_)


def _inside(
    outline: tuple[tuple[float, float], ...], x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.bool_]:
    """Return bool [len(y), len(x)] by the even-odd rule: a ray to the left crosses an odd number of edges."""
    inside = np.zeros((y.size, x.size), dtype=bool)
    for (x0, y0), (x1, y1) in zip(outline, (*outline[1:], outline[0]), strict=True):
        if y0 == y1:
            continue
        rows = (y >= min(y0, y1)) & (y < max(y0, y1))
        crossing = x0 + (y[rows] - y0) * ((x1 - x0) / (y1 - y0))
        inside[rows] ^= x[np.newaxis, :] >= crossing[:, np.newaxis]
    return inside
