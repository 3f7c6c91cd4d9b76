"""What of a camera's map counts, and from which area on: region of interest, mask and smallest area together.

Knows geometry only, neither scores nor thresholds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import SettingsError
from edge.judgement.min_area import MinArea, area_in_cells, cell_area
from edge.judgement.region_of_interest import Box, RegionOfInterest, covered_box, rasterise

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.bundle import Crop, Pooling


@dataclass(frozen=True, slots=True)
class Cells:
    """A scope in cells of one map.

    Attributes:
        box: the part of the camera frame that the map covers.
        mask: bool [h, w], True where the map counts; None where all of it does.
        min_cells: cells of the smallest connected area that counts, >= 1.
        notes: what an operator should know; empty where all is as asked for.
    """

    box: Box
    mask: npt.NDArray[np.bool_] | None
    min_cells: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scope:
    """Region of interest, its mask and the smallest area of one camera; ``digest`` names the three."""

    region: RegionOfInterest
    drawn: npt.NDArray[np.bool_] | None
    min_area: MinArea | None
    digest: str

    @classmethod
    def of(
        cls,
        region: RegionOfInterest | None = None,
        drawn: npt.NDArray[np.bool_] | None = None,
        min_area: MinArea | None = None,
    ) -> Scope:
        """Put the three together.

        Args:
            region: in pixels of the camera frame; everywhere where None.
            drawn: its mask, bool [H, W].
            min_area: the smallest area.
        """
        region = region or RegionOfInterest()
        content = hashlib.sha256(region.model_dump_json(exclude={"mask"}).encode())
        if drawn is not None:
            content.update(f"{drawn.shape}".encode() + np.packbits(drawn).tobytes())
        if min_area is not None:
            content.update(f"{min_area.in_pixels!r}".encode())
        return cls(region=region, drawn=drawn, min_area=min_area, digest=content.hexdigest()[:16])

    def look(
        self, crop: Crop | None, pooling: Pooling, frame_shape: tuple[int, int], map_shape: tuple[int, int]
    ) -> Cells:
        """Say the scope in cells of a map.

        Args:
            crop: the manifest's; the map covers it, or the whole frame.
            pooling: the manifest's rule, which wants so many cells.
            frame_shape: (H, W) of the camera frame.
            map_shape: (h, w) of the map.

        Raises:
            SettingsError: no cell is left, the mask is not of the frame's shape, or no connected part of what is left
                is as large as the smallest area.
        """
        box = covered_box(crop, frame_width=frame_shape[1], frame_height=frame_shape[0])
        if self.drawn is not None and self.region.mask is not None:
            # OpenCV reads masks; whoever draws shapes only does without.
            from edge.judgement.mask_image import check_proportions  # noqa: PLC0415

            check_proportions((self.drawn.shape[0], self.drawn.shape[1]), frame_shape, self.region.mask)
        mask = rasterise(self.region, box, map_shape, drawn=self.drawn, frame_shape=frame_shape)
        min_cells = area_in_cells(self.min_area, box, map_shape)
        self._check_area(mask, min_cells, map_shape)
        return Cells(box, mask, min_cells, tuple(self._notes(mask, min_cells, pooling, cell_area(box, map_shape))))

    def _check_area(self, mask: npt.NDArray[np.bool_] | None, min_cells: int, map_shape: tuple[int, int]) -> None:
        if min_cells == 1:
            return
        largest = map_shape[0] * map_shape[1] if mask is None else _largest_part(mask)
        if min_cells > largest:
            raise SettingsError(
                f"min_area: {min_cells} cells of the anomaly map are asked for, but the largest connected part of what "
                f"is judged has {largest}; make min_area smaller or the region of interest larger"
            )

    def _notes(self, mask: npt.NDArray[np.bool_] | None, min_cells: int, pooling: Pooling, pixels: float) -> list[str]:
        notes = []
        if self.min_area is not None and min_cells == 1:
            notes.append(
                f"min_area: {self.min_area.in_pixels:g} pixels are no more than one cell of the anomaly map "
                f"({pixels:.4g} pixels), so it has no effect"
            )
        left = None if mask is None else int(np.count_nonzero(mask))
        if left is not None and left < pooling.cells:
            notes.append(
                f"region_of_interest: it leaves {left} cells of the anomaly map, and the bundle's score is the mean of "
                f"the highest {pooling.cells}; draw it larger"
            )
        return notes


def _largest_part(mask: npt.NDArray[np.bool_]) -> int:
    import cv2  # noqa: PLC0415 (whoever has no smallest area does without)

    _, _, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return int(stats[1:, cv2.CC_STAT_AREA].max(initial=0))
