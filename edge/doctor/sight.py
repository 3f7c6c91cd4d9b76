"""The smallest defect that a camera and its bundle can see, in pixels of the camera. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge.bundle import Manifest


@dataclass(frozen=True, slots=True)
class Sight:
    """What a map can tell apart.

    Attributes:
        cell_width: pixels of the camera frame that one map cell covers.
        cell_height: the same, upright.
        pooled: map cells whose mean is the score: a defect on fewer shares its score with good ones.
        enlarged: the frame has fewer pixels than the network looks at.
    """

    cell_width: float
    cell_height: float
    pooled: int
    enlarged: bool

    @property
    def smallest(self) -> float:
        """Side in pixels of a square defect that fills a cell wherever it lies: two cells."""
        return 2 * max(self.cell_width, self.cell_height)

    @property
    def full(self) -> float:
        """Side in pixels of a square defect that fills all cells of the score wherever it lies."""
        return (math.ceil(math.sqrt(self.pooled)) + 1) * max(self.cell_width, self.cell_height)


def sight(manifest: Manifest, *, frame_width: int, frame_height: int) -> Sight:
    """Follow the map back through stride, tiles and resize to the camera frame.

    The network's receptive field is larger than a cell and blurs this further; a defect's contrast decides the rest.

    Args:
        manifest: of the bundle.
        frame_width: pixels of the camera frame.
        frame_height: the same, upright.
    """
    preprocessing = manifest.preprocessing
    crop = preprocessing.crop
    width, height = (frame_width, frame_height) if crop is None else (crop.w, crop.h)
    across, upright = width / preprocessing.canvas_width, height / preprocessing.canvas_height
    return Sight(
        cell_width=manifest.map_stride * across,
        cell_height=manifest.map_stride * upright,
        pooled=manifest.pooling.cells,
        enlarged=across < 1 or upright < 1,
    )
