"""Connected regions of an anomaly map at or above a threshold, in pixels of the camera frame.

Knows nothing of how the threshold came about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from edge.frames import Region

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.judgement.region_of_interest import Box


def find_regions(
    anomaly_map: npt.NDArray[np.float32],
    threshold: float,
    box: Box,
    *,
    mask: npt.NDArray[np.bool_] | None = None,
    limit: int = 16,
    min_cells: int = 1,
) -> tuple[Region, ...]:
    """Find connected regions at or above the threshold (8 neighbours).

    Args:
        anomaly_map: float32 [h, w], raw, without NaN.
        threshold: raw.
        box: the part of the camera frame that the map covers.
        mask: bool [h, w], True where the map counts; None everywhere.
        limit: most regions to return.
        min_cells: cells that a region needs to count.

    Returns:
        The regions in pixels of the camera frame, highest peak first, larger first among equal peaks.
    """
    hot = anomaly_map >= threshold
    if mask is not None:
        hot &= mask
    if not hot.any():
        return ()
    count, labels, stats, _ = cv2.connectedComponentsWithStats(hot.astype(np.uint8), connectivity=8)
    peaks = np.full(count, -np.inf, dtype=np.float64)
    np.maximum.at(peaks, labels[hot], anomaly_map[hot].astype(np.float64))
    areas = stats[:, cv2.CC_STAT_AREA]
    large = [label for label in range(1, count) if areas[label] >= min_cells]
    order = sorted(large, key=lambda label: (-peaks[label], -int(areas[label])))[:limit]
    return tuple(_scaled(stats[label], float(peaks[label]), anomaly_map.shape, box) for label in order)


def _scaled(stats: npt.NDArray[np.int32], peak: float, map_shape: tuple[int, ...], box: Box) -> Region:
    cell_w, cell_h = box[2] / map_shape[1], box[3] / map_shape[0]
    left, top = (int(stats[cv2.CC_STAT_LEFT]), int(stats[cv2.CC_STAT_TOP]))
    right, bottom = left + int(stats[cv2.CC_STAT_WIDTH]), top + int(stats[cv2.CC_STAT_HEIGHT])
    x, y = round(box[0] + left * cell_w), round(box[1] + top * cell_h)
    return Region(
        x=x,
        y=y,
        w=max(1, round(box[0] + right * cell_w) - x),
        h=max(1, round(box[1] + bottom * cell_h) - y),
        area=max(1, round(int(stats[cv2.CC_STAT_AREA]) * cell_w * cell_h)),
        peak=peak,
    )
