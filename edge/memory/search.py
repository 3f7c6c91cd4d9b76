"""Distances to the nearest row of a bank, and the map that a memory head makes of them, in numpy.

It mirrors the exported head, so that a bank can be judged before a graph holds it; it must not know graphs or files.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.bundle import Inputs, MemoryLayout

    Rows = npt.NDArray[np.float32]
    Index = npt.NDArray[np.int64]

_BLOCK_ROWS, _BLOCK_BANK = 1024, 4096  # 16 MiB of products at a time, whatever the sizes


def nearest(rows: Rows, bank: Rows) -> tuple[Rows, Index]:
    """Find the nearest bank row of every row, by one matrix product a block.

    The products of rows less the bank's mean choose the row, its distance is then taken from the differences: a row
    that is in the bank is 0 away, which ``||q||^2 + ||m||^2 - 2 q.m`` alone does not give.

    Args:
        rows: float32 [n, D], finite, n >= 0.
        bank: float32 [R, D], finite, R >= 1.

    Returns:
        Squared Euclidean distances float32 [n] and indices int64 [n]; of rows as near as each other, up to rounding,
        the first.

    Raises:
        DataError: widths differ, the bank is empty, or a value is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # told below, as an error
        _check(rows, bank)
        squared, index = _search(rows, bank)
    if not np.isfinite(squared).all():
        raise DataError("distances overflow float32; the embedding or the bank is damaged, make that bank again")
    return squared, index


def pad_bank(rows: Rows, size: int) -> Rows:
    """Repeat rows until a bank is full, which changes no distance to it.

    Args:
        rows: float32 [R, D], R >= 1.
        size: rows that the head's state holds.

    Returns:
        float32 [size, D], the rows in their order, then again from the first.

    Raises:
        DataError: there is no row, or there are more than ``size``.
    """
    if not len(rows):
        raise DataError("an empty bank cannot be padded; an absent fleet bank is filled with the local rows")
    if len(rows) > size:
        raise DataError(
            f"{len(rows)} rows do not fit the bundle's bank of {size}; reduce them first, or export the bundle with "
            "a larger bank"
        )
    return rows[np.arange(size) % len(rows)]


def anomaly_map(
    embedding: Rows,
    banks: Sequence[Rows],
    layout: MemoryLayout,
    preprocessing: Inputs,
    map_stride: int,
) -> Rows:
    """Return the raw map of one frame under other banks than the graph's; agrees with the graphs to 1e-3 relative.

    Args:
        embedding: float32 [tiles, L, D], the frame's patch rows, L the cells of ``layout.grid``, row-major.
        banks: float32 [R_i, D] each; a patch keeps its distance to the nearest row of all.
        layout: the manifest's.
        preprocessing: the manifest's.
        map_stride: the manifest's.

    Returns:
        float32 [canvas_height / map_stride, canvas_width / map_stride], higher is more anomalous.

    Raises:
        DataError: the embedding's shape is not the manifest's, no bank is given, widths differ or a value is not
            finite.
    """
    from edge.inference.preprocessing import join_maps  # noqa: PLC0415 (brings OpenCV, which an aggregator lacks)

    tiles = preprocessing.tiles.rows * preprocessing.tiles.cols
    height, width = layout.grid
    if embedding.ndim != 3 or embedding.shape[:2] != (tiles, height * width):  # noqa: PLR2004 (tiles, sites, channels)
        raise DataError(
            f"embedding is {list(embedding.shape)}, the bundle gives [{tiles}, {height * width}, channels]; use the "
            "embedding of that bundle's head"
        )
    if (height * map_stride, width * map_stride) != (preprocessing.height, preprocessing.width):
        raise DataError(f"memory grid {height}x{width} at stride {map_stride} is not the tile; export the bundle again")
    if not banks:
        raise DataError("no bank to compare with; give the local rows at least")
    rows = embedding.reshape(tiles * height * width, -1)
    squared = np.min([nearest(rows, bank)[0] for bank in banks], axis=0)
    maps = np.sqrt(squared).reshape(tiles, height, width)
    for _ in range(layout.smoothing):
        maps = _patch_mean(maps)
    maps = maps - np.float32(layout.background) * maps.mean((1, 2), keepdims=True)
    return join_maps(maps, preprocessing, map_stride)


def _check(rows: Rows, bank: Rows) -> None:
    if rows.ndim != 2 or bank.ndim != 2 or rows.shape[1] != bank.shape[1] or not bank.size:  # noqa: PLR2004 (matrices)
        raise DataError(
            f"rows {list(rows.shape)} cannot be searched in a bank {list(bank.shape)}; both are [rows, channels] of "
            "one width, and the bank has at least one row"
        )
    # A sum is finite only where every value is, and needs no temporary array; a sum that overflows is looked at again.
    for name, values in (("rows", rows), ("bank", bank)):
        if not (math.isfinite(float(values.sum())) or np.isfinite(values).all()):
            raise DataError(f"{name} hold values that are not finite; the embedding is damaged")


def _search(rows: Rows, bank: Rows) -> tuple[Rows, Index]:
    centre = bank.mean(0, dtype=np.float64).astype(np.float32)
    squared, index = np.empty(len(rows), np.float32), np.zeros(len(rows), np.int64)
    moved = [bank[start : start + _BLOCK_BANK] - centre for start in range(0, len(bank), _BLOCK_BANK)]
    norms = [np.einsum("ij,ij->i", part, part) for part in moved]
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        index[block] = _closest(rows[block] - centre, moved, norms)
        difference = rows[block] - bank[index[block]]
        squared[block] = np.einsum("ij,ij->i", difference, difference)
    return squared, index


def _closest(rows: Rows, moved: Sequence[Rows], norms: Sequence[Rows]) -> Index:
    best = np.full(len(rows), np.inf, np.float32)
    index = np.zeros(len(rows), np.int64)
    first = 0
    for part, norm in zip(moved, norms, strict=True):
        value = norm - np.float32(2) * (rows @ part.T)
        at = value.argmin(1)
        value = value[np.arange(len(rows)), at]
        closer = value < best
        best[closer], index[closer] = value[closer], at[closer] + first
        first += len(part)
    return index


def _patch_mean(maps: Rows) -> Rows:
    """Return 3x3 means of [tiles, h, w] that count the padding as zeros, as the head's pooling does."""
    _, height, width = maps.shape
    padded = np.pad(maps, ((0, 0), (1, 1), (1, 1)))
    total = sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3))
    return np.asarray(total / np.float32(9), dtype=np.float32)
