"""From an anomaly map to an image score, by the manifest's rule, after the region of interest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.bundle import Pooling


def pool_score(
    anomaly_map: npt.NDArray[np.floating], pooling: Pooling, region: npt.NDArray[np.bool_] | None = None
) -> float:
    """Pool one map.

    Args:
        anomaly_map: float [h, w], raw.
        pooling: mean of the ``cells`` highest cells.
        region: bool [h, w], True where the map counts; None counts everywhere.

    Returns:
        The raw score; NaN where the map holds a NaN inside the region.

    Raises:
        ValueError: the region excludes every cell.
    """
    values = anomaly_map.ravel() if region is None else anomaly_map[region]
    if values.size == 0:
        raise ValueError("the region of interest excludes the whole map")
    if np.isnan(values).any():
        return float("nan")
    cells = min(pooling.cells, values.size)
    if cells == 1:
        return float(values.max())
    return float(np.partition(values, values.size - cells)[-cells:].astype(np.float64).mean())
