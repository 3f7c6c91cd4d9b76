"""A window of a signal as the networks see it, and which cells of its map may be believed.

The trainer and the box use these same functions. Knows nothing of where signals come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.inputs import SignalPreprocessing


def signal_canvas(
    window: npt.NDArray[Any], preprocessing: SignalPreprocessing, *, out: npt.NDArray[np.float32] | None = None
) -> npt.NDArray[np.float32]:
    """Return a window without gaps: each lost sample lies on the line between its channel's neighbours.

    Before the first and behind the last sample that arrived, that sample's value is held. A channel of which nothing
    arrived is zero.

    Args:
        window: float32 [K, Q], NaN where samples were lost.
        preprocessing: the manifest's.
        out: contiguous float32 [K, Q] to write to; a new array where None.

    Returns:
        float32 [K, Q], finite; ``out`` where given.

    Raises:
        CaptureError: the window has another shape or type, or holds an infinity.
    """
    expected = (preprocessing.channels, preprocessing.samples)
    if window.shape != expected or window.dtype != np.float32:
        raise CaptureError(
            f"window is {window.dtype} {list(window.shape)}, the bundle judges float32 {list(expected)}; set "
            "the source to the channels and the rate that it was trained for"
        )
    canvas = np.empty(expected, np.float32) if out is None else out
    np.copyto(canvas, window)
    finite = np.isfinite(canvas)
    if finite.all():
        return canvas
    if np.isinf(canvas).any():
        raise CaptureError("window holds an infinite value; check the source's scale")
    places = np.arange(expected[1])
    for channel in np.flatnonzero(~finite.all(axis=1)):
        arrived = finite[channel]
        if arrived.any():
            canvas[channel, ~arrived] = np.interp(places[~arrived], places[arrived], canvas[channel, arrived])
        else:
            canvas[channel] = 0.0
    return canvas


def too_much_lost(window: npt.NDArray[np.float32], max_lost: float, channels: Sequence[str] = ()) -> str:
    """Return why a window says too little to be judged or learned from; empty where it says enough.

    A channel of which nothing arrived counts whatever its share is: zero in place of its usual value is an anomaly to
    a network that has learned how channels go together, and its other channels' cells would show it.

    Args:
        window: float32 [K, Q], NaN where samples were lost.
        max_lost: largest share of its values that may be lost.
        channels: their names; numbers from 1 where empty.
    """
    lost = np.isnan(window)
    share = float(lost.mean())
    if share > max_lost:
        return f"{100 * share:.3g} % of the window's samples were lost, {100 * max_lost:.3g} % may be"
    silent = [channels[one] if channels else str(one + 1) for one in np.flatnonzero(lost.all(axis=1)).tolist()]
    return f"nothing came of channel {', '.join(silent)} in this window" if silent else ""


def lost_cells(
    window: npt.NDArray[np.float32], map_shape: tuple[int, ...], max_lost: float
) -> npt.NDArray[np.bool_] | None:
    """Return which cells of a window's map say nothing, because too much of what they cover was lost.

    Args:
        window: float32 [K, Q], NaN where samples were lost.
        map_shape: (h, w): the cells divide channels and samples evenly, up to one.
        max_lost: largest share of a cell's values that may be lost for it to count.

    Returns:
        bool [h, w], True where a cell says nothing; None where none does.
    """
    lost = np.isnan(window)
    if not lost.any():
        return None
    rows = _sums(lost, map_shape[0], axis=0)
    cells = _sums(rows, map_shape[1], axis=1)
    sizes = np.outer(_sizes(lost.shape[0], map_shape[0]), _sizes(lost.shape[1], map_shape[1]))
    dead = cells > max_lost * sizes
    return dead if dead.any() else None


def _edges(length: int, cells: int) -> npt.NDArray[np.int64]:
    return np.asarray(np.linspace(0, length, cells + 1).round(), np.int64)


def _sizes(length: int, cells: int) -> npt.NDArray[np.int64]:
    edges = _edges(length, cells)
    return np.asarray(np.maximum(edges[1:] - edges[:-1], 1))


def _sums(values: npt.NDArray[Any], cells: int, *, axis: int) -> npt.NDArray[np.int64]:
    starts = np.minimum(_edges(values.shape[axis], cells)[:-1], values.shape[axis] - 1)
    return np.asarray(np.add.reduceat(values.astype(np.int64), starts, axis=axis))
