"""From an anomaly map to an image score, by the manifest's rule, after the region of interest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.bundle import Pooling


def pool_score(
    anomaly_map: npt.NDArray[np.floating],
    pooling: Pooling,
    region: npt.NDArray[np.bool_] | None = None,
    min_cells: int = 1,
) -> float:
    """Pool one map.

    Args:
        anomaly_map: float [h, w], raw.
        pooling: mean of the ``cells`` highest cells.
        region: bool [h, w], True where the map counts; None counts everywhere.
        min_cells: smallest connected area that counts, in cells; the map is area-opened first where it is more than
            1, see :func:`~edge.judgement.area_opening.opened_score`.

    Returns:
        The raw score; NaN where the map holds a NaN inside the region, and with a smallest area also where it holds
        an infinity.

    Raises:
        ValueError: the region excludes every cell, or has no connected part as large as the smallest area.
    """
    values = anomaly_map.ravel() if region is None else anomaly_map[region]
    if values.size == 0:
        raise ValueError("the region of interest excludes the whole map")
    if min_cells > 1:
        # An infinite cell would be opened away, and a frame that cannot be judged would be called good.
        if not np.isfinite(values).all():
            return float("nan")
        from edge.judgement.area_opening import opened_score  # noqa: PLC0415 (needs OpenCV, most callers do not)

        return opened_score(anomaly_map, cells=pooling.cells, min_cells=min_cells, region=region)
    if np.isnan(values).any():
        return float("nan")
    cells = min(pooling.cells, values.size)
    if cells == 1:
        return float(values.max())
    return float(np.partition(values, values.size - cells)[-cells:].astype(np.float64).mean())
