"""Memory-reduce: from a memory to the few weighted averages that may leave the box.

Pure numpy, deterministic and independent of the order of its input; it must not know messages or files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError
from edge.memory.bank import MemoryBank
from edge.memory.search import nearest

if TYPE_CHECKING:
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]
    Index = npt.NDArray[np.int64]
    Doubles = npt.NDArray[np.float64]

_PROJECTION = 32
_FARTHEST = 80.0  # widths; exp(-80) still is a normal float32, so no cell loses all its weight
_COLUMNS = 16  # of float64 sums at a time
_POSITIONS = 64  # of float64 deviations at a time


def reduce_anchor(bank: MemoryBank, size: int, *, min_frames: float, seed: int = 0) -> MemoryBank:
    """Reduce a memory to weighted averages around anchors; for textures and parts that are not aligned.

    Rows that fewer than ``min_frames`` frames stand behind are left out before anything is averaged, so that they
    leave the box in no form. Anchors are a greedy max-min coreset (PatchCore, Roth et al., 2022, section 3.2) on a
    random projection to 32 dimensions; every row then counts for the average of its nearest anchor's cell with weight
    ``support * exp(-||z - a||^2 / tau)``, tau the median squared distance of the rows that are no anchor (FedDyMem's
    memory-reduce "based on weighted averages"; the weight is our reading).

    Args:
        bank: the memory; raw patch rows have support and frames 1.
        size: most rows of the result, >= 1.
        min_frames: frames that must stand behind a row, >= 1.
        seed: of the projection.

    Returns:
        At most ``size`` rows in canonical order, fewer where distinct rows are fewer. Support adds up; ``frames`` is
        the largest of a cell's members, a lower bound of the frames of all of them. No more rows than ``size`` to
        begin with: they are returned as they are.

    Raises:
        DataError: no row stands on ``min_frames`` frames; the message says how many are missing.
        ValueError: ``size`` or ``min_frames`` is below 1.
    """
    if size < 1 or not min_frames >= 1:
        raise ValueError(f"size {size} and min_frames {min_frames} must be at least 1")
    kept = _canonical(_leaving(bank, min_frames))
    anchors = coreset(kept.rows, size, seed=seed)
    if len(anchors) == len(kept):
        return kept
    squared, cell = nearest(kept.rows, kept.rows[anchors])
    weight = kept.support.astype(np.float64) * _closeness(squared)
    return _canonical(_cell_averages(kept, cell, weight))


def reduce_positional(embeddings: Rows, *, min_frames: float) -> MemoryBank:
    """Reduce frames of an aligned part to one weighted mean for each patch position, however many they are.

    ``m_l = sum_n u_n z_nl`` with u the softmax over frames of ``-||z_nl - mean_l||^2 / tau_l``, tau the position's
    median squared distance, so that positions where good parts vary much and little treat a stray frame alike.

    Args:
        embeddings: float32 [N, L, D], patch rows of N accepted frames of one position grid.
        min_frames: frames that must stand behind a row, >= 1.

    Returns:
        L rows in the order of positions, support and frames N each.

    Raises:
        DataError: not float32 [N, L, D], values that are not finite, or fewer than ``min_frames`` frames.
        ValueError: ``min_frames`` is below 1.
    """
    if not min_frames >= 1:
        raise ValueError(f"min_frames {min_frames} must be at least 1")
    if embeddings.dtype != np.float32 or embeddings.ndim != 3 or not embeddings.size:  # noqa: PLR2004 (frames, sites, channels)
        raise DataError(f"embeddings are {embeddings.dtype} {list(embeddings.shape)}, expected float32 [N, L, D]")
    frames = len(embeddings)
    if frames < min_frames:
        raise DataError(
            f"{frames} accepted frames, {min_frames:g} must stand behind every row that leaves the box; feed "
            f"{int(np.ceil(min_frames - frames))} more good frames"
        )
    if not np.isfinite(embeddings).all():
        raise DataError("embeddings hold values that are not finite; drop the frame that gave them")
    ordered = embeddings[_canonical_order(embeddings.reshape(frames, -1))]
    rows = np.empty(embeddings.shape[1:], np.float32)
    for start in range(0, embeddings.shape[1], _POSITIONS):
        block = slice(start, start + _POSITIONS)
        rows[block] = _softmax_means(ordered[:, block].astype(np.float64))
    behind = np.full(len(rows), frames, np.float32)
    return MemoryBank(rows=rows, support=behind, frames=behind.copy())


def coreset(rows: Rows, size: int, *, seed: int) -> Index:
    """Choose rows by greedy max-min distance on a random projection; the first is the one nearest to the mean.

    Args:
        rows: float32 [n, D], in canonical order where the choice must not depend on it.
        size: most rows to choose.
        seed: of the projection to 32 dimensions; narrower rows are used as they are.

    Returns:
        int64 [<= size], ascending; fewer than ``size`` where fewer rows are distinct.
    """
    points = rows
    if rows.shape[1] > _PROJECTION:
        projection = np.random.default_rng(seed).standard_normal((rows.shape[1], _PROJECTION)) / np.sqrt(_PROJECTION)
        points = rows @ projection.astype(np.float32)
    current = int(_squared_to(points, points.mean(0, dtype=np.float64).astype(np.float32)).argmin())
    distance = np.full(len(points), np.inf, np.float32)
    chosen: list[int] = []
    while len(chosen) < min(size, len(points)):
        chosen.append(current)
        np.minimum(distance, _squared_to(points, points[current]), out=distance)
        current = int(distance.argmax())
        if distance[current] == 0:  # copies of chosen rows are all that is left
            break
    return np.sort(np.array(chosen, np.int64))


def _leaving(bank: MemoryBank, min_frames: float) -> MemoryBank:
    enough = (bank.frames >= min_frames) & (bank.support > 0)
    if not enough.any():
        best = float(bank.frames.max())
        raise DataError(
            f"no row of the memory stands on {min_frames:g} frames, the best has {best:.1f}; feed at least "
            f"{int(np.ceil(min_frames - best))} more good frames"
        )
    return _taken(bank, np.flatnonzero(enough))


def _taken(bank: MemoryBank, index: Index) -> MemoryBank:
    return MemoryBank(rows=bank.rows[index], support=bank.support[index], frames=bank.frames[index])


def _canonical(bank: MemoryBank) -> MemoryBank:
    """Sort by content, counts included, so that the order of the input leaves no trace."""
    return _taken(bank, _canonical_order(np.column_stack([bank.rows, bank.support, bank.frames])))


def _canonical_order(values: Rows) -> Index:
    # Bytes of big-endian numbers: one comparison a pair, the same on every machine; + 0 makes one zero of -0 and 0.
    content = np.ascontiguousarray(values + np.float32(0)).astype(">f4")
    return np.argsort(content.view(f"V{content.shape[1] * 4}").ravel(), kind="stable")


def _squared_to(points: Rows, point: Rows) -> Rows:
    difference = points - point
    return np.asarray(np.einsum("ij,ij->i", difference, difference), dtype=np.float32)


def _closeness(squared: Rows) -> Doubles:
    apart = squared[squared > 0]
    tau = float(np.median(apart)) if apart.size else 1.0
    return np.exp(-np.minimum(squared.astype(np.float64) / tau, _FARTHEST))


def _cell_averages(bank: MemoryBank, cell: Index, weight: Doubles) -> MemoryBank:
    order = np.argsort(cell, kind="stable")
    starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
    total = np.add.reduceat(weight[order], starts)
    rows = np.empty((len(starts), bank.width), np.float32)
    for column in range(0, bank.width, _COLUMNS):
        some = slice(column, column + _COLUMNS)
        sums = np.add.reduceat(bank.rows[order, some] * weight[order, None], starts, axis=0)
        rows[:, some] = sums / total[:, None]
    return MemoryBank(
        rows=rows,
        support=np.add.reduceat(bank.support[order].astype(np.float64), starts).astype(np.float32),
        frames=np.maximum.reduceat(bank.frames[order], starts),
    )


def _softmax_means(patches: Doubles) -> Doubles:
    """Return the weighted means [L, D] of patches [N, L, D]."""
    difference = patches - patches.mean(0)
    squared = np.einsum("nld,nld->nl", difference, difference)
    tau = np.median(squared, axis=0)
    weight = np.exp(-np.minimum((squared - squared.min(0)) / np.where(tau > 0, tau, 1.0), _FARTHEST))
    return np.asarray(np.einsum("nl,nld->ld", weight / weight.sum(0), patches))
