"""The smallest defect that counts, in camera pixels or square millimetres, as cells of an anomaly map. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from edge.judgement.region_of_interest import Box


class MinArea(BaseModel):
    """The smallest connected area, at or above the threshold, that makes a frame NOK.

    Either ``pixels``, or ``mm2`` with ``pixels_per_mm``. The area is that of the map's region (``regions[].area`` in
    messages): a map answers for its receptive field, so a defect's region is larger than the defect.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pixels: float | None = Field(
        None, gt=0, allow_inf_nan=False, title="Pixels", description="Area in pixels of the camera frame."
    )
    mm2: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        title="Square millimetres",
        description="Area on the part; needs pixels_per_mm.",
    )
    pixels_per_mm: float | None = Field(
        None, gt=0, le=10_000, title="Scale", description="Pixels of the camera frame per millimetre on the part."
    )

    @model_validator(mode="after")
    def _says_one_thing(self) -> MinArea:
        if (self.pixels is None) == (self.mm2 is None):
            raise ValueError("give either pixels or mm2")
        if (self.mm2 is None) != (self.pixels_per_mm is None):
            raise ValueError("mm2 and pixels_per_mm go together")
        return self

    @property
    def in_pixels(self) -> float:
        """The area in pixels of the camera frame."""
        if self.pixels is not None:
            return self.pixels
        assert self.mm2 is not None
        assert self.pixels_per_mm is not None
        return self.mm2 * self.pixels_per_mm**2


def area_in_cells(min_area: MinArea | None, box: Box, map_shape: tuple[int, int]) -> int:
    """Return the fewest cells whose area is at least the smallest one that counts; 1 where every cell does.

    Args:
        min_area: what the settings say.
        box: the part of the camera frame that the map covers.
        map_shape: (h, w) of the map.
    """
    if min_area is None:
        return 1
    cells = min_area.in_pixels / cell_area(box, map_shape)
    # 3 cells of a third of a pixel are one pixel, whatever binary fractions make of it.
    return max(1, math.ceil(cells - 1e-9 * cells))


def cell_area(box: Box, map_shape: tuple[int, int]) -> float:
    """Return the pixels of the camera frame that one map cell covers."""
    return box[2] * box[3] / (map_shape[0] * map_shape[1])
