"""Scans drawn for people: shaded surfaces, displacement as colour, contact sheets with captions.

It must not know files or how a defect was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
from scipy import ndimage

from trainer.synthesis.surface3d_chart import lay_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Picture = npt.NDArray[np.uint8]
    Values = npt.NDArray[np.floating]

TILE = 240
"""Longer side of a drawn scan in pixels."""

_GROUND = (34, 31, 28)  # BGR, where there is no surface
_LIGHT = np.array((0.45, 0.55, 0.70))  # where it shines to, in the sensor's frame: from above, left and behind it
_AMBIENT = 0.18
_CAPTION = 22
_GAP = 6
_ORGANISED = 3
_POINTS_PER_CELL = 4.0  # so that the front of a part hides its back
_FILL = 2.0  # grid cells that a gap between the points of a cloud may be wide


@dataclass(frozen=True, slots=True)
class Raster:
    """Which valid point each pixel of a picture shows.

    Attributes:
        index: int64 [h, w], a point's number among the valid ones, -1 where there is none.
        frame: float64 [3, 3], the directions right, down and away from whoever looks.
    """

    index: npt.NDArray[np.int64]
    frame: npt.NDArray[np.float64]

    @classmethod
    def of(cls, valid: npt.NDArray[np.bool_], points: Values, normals: Values, *, side: int = TILE) -> Raster:
        """Choose a view: an organised scan as the sensor saw it, a cloud laid out flat, from where its normals point.

        Args:
            valid: bool [H, W] or [N].
            points: [M, 3], the valid points.
            normals: [M, 3], oriented.
            side: longer side in pixels.
        """
        if valid.ndim == _ORGANISED - 1:
            index, frame = _organised(valid), np.eye(3)
        else:
            index, frame = _splatted(np.asarray(points, np.float64), np.asarray(normals, np.float64))
        scale = side / max(index.shape)
        size = (max(1, round(index.shape[1] * scale)), max(1, round(index.shape[0] * scale)))
        # Numbers of points are exact in float64, and nearest neighbours mix none.
        drawn = cv2.resize(index.astype(np.float64), size, interpolation=cv2.INTER_NEAREST_EXACT).astype(np.int64)
        return cls(drawn, frame)

    def shaded(self, normals: Values) -> Picture:
        """Draw a surface lit from above, uint8 [h, w, 3] BGR.

        Args:
            normals: [M, 3], towards the sensor.
        """
        lit = np.clip(-(normals @ (_LIGHT @ self.frame / np.linalg.norm(_LIGHT))), 0.0, 1.0)
        grey = 255.0 * (_AMBIENT + (1 - _AMBIENT) * lit)
        return self._coloured(np.repeat(np.rint(grey).astype(np.uint8)[:, None], 3, axis=1))

    def diverging(self, values: Values, limit: float) -> Picture:
        """Draw signed values: blue below 0, white at 0, red above, full at ``limit``; uint8 [h, w, 3] BGR."""
        share = np.clip(values / max(limit, np.finfo(np.float64).tiny), -1.0, 1.0)[:, None]
        white, red, blue = (np.array(c, np.float64) for c in ((240, 240, 240), (30, 30, 190), (190, 90, 20)))
        colours = white + np.abs(share) * (np.where(share > 0, red, blue) - white)
        return self._coloured(np.rint(colours).astype(np.uint8))

    def heat(self, values: Values) -> Picture:
        """Draw values in [0, 1], dark to bright, uint8 [h, w, 3] BGR."""
        grey = np.rint(255 * np.clip(np.nan_to_num(values), 0.0, 1.0)).astype(np.uint8)
        return self._coloured(cv2.applyColorMap(grey[:, None], cv2.COLORMAP_VIRIDIS)[:, 0])

    def marked(self, mask: npt.NDArray[np.bool_]) -> Picture:
        """Draw which points are marked, white on grey, uint8 [h, w, 3] BGR."""
        return self._coloured(np.where(mask[:, None], np.uint8(255), np.uint8(90)).repeat(3, axis=1))

    def _coloured(self, colours: Picture) -> Picture:
        drawn = colours[np.maximum(self.index, 0)]
        drawn[self.index < 0] = _GROUND
        return np.asarray(drawn)


def _organised(valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    numbers = np.full(valid.shape, -1, np.int64)
    numbers[valid] = np.arange(np.count_nonzero(valid))
    rows, columns = np.flatnonzero(valid.any(1)), np.flatnonzero(valid.any(0))
    return numbers[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _splatted(
    points: npt.NDArray[np.float64], normals: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    chart = lay_out(points)
    towards = np.cross(*chart.axes)
    # A part that is closed has as many normals to either side.
    towards *= -1.0 if float((normals @ towards).sum()) < 0 else 1.0
    cell = float(np.sqrt(_POINTS_PER_CELL * chart.extent.prod() / len(points))) or 1.0
    place = ((chart.flat - chart.low) / cell).astype(np.int64)
    width, height = place.max(axis=0) + 1
    index = np.full((height, width), -1, np.int64)
    order = np.argsort(points @ towards, kind="stable")  # the nearest is written last
    index[place[order, 1], place[order, 0]] = order
    distance, (row, column) = ndimage.distance_transform_edt(index < 0, return_indices=True)
    return np.where(distance <= _FILL, index[row, column], -1), np.stack([*chart.axes, -towards])


def contact_sheet(
    rows: Sequence[Sequence[Picture]], *, columns: Sequence[str] = (), names: Sequence[str] = (), title: str = ""
) -> Picture:
    """Put pictures side by side, with a caption above each column and at the left of each row.

    Args:
        rows: pictures uint8 [h, w, 3] BGR, of any sizes; at least one.
        columns: caption of each column.
        names: caption of each row.
        title: above all.
    """
    width = max(picture.shape[1] for row in rows for picture in row) + _GAP
    left = 8 * max((len(name) for name in names), default=0) + (_GAP if names else 0)
    count = max(len(row) for row in rows)
    top = (_CAPTION if title else 0) + (_CAPTION if columns else 0)
    heights = [max(picture.shape[0] for picture in row) + _GAP for row in rows]
    least = 8 * len(title) + _GAP
    sheet = np.full((top + sum(heights) + _GAP, max(left + count * width + _GAP, least), 3), 255, np.uint8)
    if title:
        _write(sheet, title, _GAP, 0)
    for number, caption in enumerate(columns):
        _write(sheet, caption, left + number * width + _GAP, top - _CAPTION)
    y = top
    for number, row in enumerate(rows):
        if number < len(names):
            _write(sheet, names[number], _GAP, y)
        for column, picture in enumerate(row):
            x = left + column * width + _GAP
            sheet[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
        y += heights[number]
    return sheet


def _write(sheet: Picture, text: str, x: int, y: int) -> None:
    cv2.putText(sheet, text, (x, y + 15), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (40, 36, 32), 1, cv2.LINE_AA)
