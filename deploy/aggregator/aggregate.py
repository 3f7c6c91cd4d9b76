"""The aggregator's core: memory updates in, one fleet memory out, the same bits in any order and on any threads.

A pure function; it must not know files, sockets, rounds or whether an update may be trusted.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deploy.aggregator.lloyd import Lloyd, assign, cluster, single_threaded_blas
from edge.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from deploy.aggregator.lloyd import Double, Half, Single
    from edge.federation.update import MemoryUpdate

LARGEST = float(np.finfo(np.float16).max)
"""Largest magnitude that a row may hold: rows are merged and sent back in float16."""


class AggregateSettings(BaseModel):
    """How updates are merged."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int = Field(
        512,
        ge=1,
        le=65536,
        title="Rows",
        description="Rows of the fleet memory, fewer where there are fewer; no more than the bundles have room for.",
    )
    row_cap: float = Field(
        4.0,
        ge=1,
        title="Row cap",
        description="No row of an update counts for more than this many times the median support of its rows.",
    )
    group_cap: float = Field(
        4.0,
        ge=1,
        title="Group cap",
        description="All boxes of one product and sub-class together count for at most this many times the smallest "
        "such group, so that many boxes of one product do not crowd out a lone box of another.",
    )
    sample_factor: int = Field(
        16,
        ge=4,
        le=1024,
        title="Sample factor",
        description="Where there are more, this many uploaded rows for each row of the fleet memory are clustered "
        "first; more is slower and lies closer to clustering all.",
    )
    iterations: int = Field(
        25, ge=1, le=1000, title="Iterations", description="Most Lloyd iterations on that sample, or on all rows."
    )
    passes: int = Field(
        5, ge=1, le=1000, title="Passes", description="Most Lloyd iterations on all rows after those on the sample."
    )
    tolerance: float = Field(
        1e-4,
        ge=0,
        lt=1,
        title="Tolerance",
        description="Stop where no row of the memory moves by more than this share of the updates' spread.",
    )


@dataclass(frozen=True, slots=True)
class Aggregated:
    """A fleet memory without its papers.

    Attributes:
        rows: float32 [R, D], exactly representable in float16, distinct, in canonical order (by float16 bytes).
        mass: float32 [R] > 0, share of the fleet behind each row; sums to 1.
        boxes: uint16 [R] >= 1, boxes that have a row nearest to this one; 65,535 stands for that many or more.
    """

    rows: Single
    mass: Single
    boxes: npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class _Pool:
    """Distinct rows in canonical order, and who brought them.

    Attributes:
        rows: float16 [n, D].
        mass: float64 [n] > 0, sums to about 1.
        row_of: int32 [m], for each uploaded row its place in ``rows``.
        box_of: int32 [m], the box that uploaded it.
        box_count: boxes.
    """

    rows: Half
    mass: Double
    row_of: npt.NDArray[np.int32]
    box_of: npt.NDArray[np.int32]
    box_count: int

    def boxes_behind(self, labels: npt.NDArray[np.int32], clusters: int) -> npt.NDArray[np.uint16]:
        """Count the distinct boxes of each cluster, given each row's cluster int32 [n]."""
        pairs = np.unique(labels[self.row_of].astype(np.int64) * self.box_count + self.box_of)
        counts = np.bincount(pairs // self.box_count, minlength=clusters)
        return np.minimum(counts, np.iinfo(np.uint16).max).astype(np.uint16)


def aggregate(
    updates: Sequence[MemoryUpdate], *, settings: AggregateSettings, seed: int, threads: int = 1
) -> Aggregated:
    """Merge memories of one embedding space by weighted k-means (FedDyMem, server side; see :mod:`.lloyd`).

    Every box has the same mass, however many patches stand behind its rows; a box's updates share it; within an
    update a row's mass follows its support up to a cap, and groups of one product and sub-class are capped against
    the smallest. The result depends on the set of updates and the seed: not on their order, a repeated delivery, or
    the number of threads. Another processor or BLAS may add products in another order and give other bits.

    Args:
        updates: of one embedding id, at least one.
        settings: how many rows, caps, how long to search.
        seed: of the clustering.
        threads: that share the work, >= 1; the BLAS is kept to one thread meanwhile.

    Returns:
        The merged rows: all distinct ones where there are no more than asked for.

    Raises:
        DataError: there is no update, embedding ids or widths differ, or an update has values that are not finite,
            beyond float16, or support that is not positive; the message names the box.
        UsageError: ``threads`` is less than 1 or ``seed`` is negative.
    """
    if threads < 1 or seed < 0:
        raise UsageError(f"threads is {threads} and seed {seed}; they must be at least 1 and 0")
    _refuse(updates)
    pool = _pool(updates, settings)
    if len(pool.rows) <= settings.rows:
        labels = np.arange(len(pool.rows), dtype=np.int32)
        return _result(pool.rows, pool.mass, pool.boxes_behind(labels, len(labels)))
    search = Lloyd(
        clusters=settings.rows,
        sample=settings.rows * settings.sample_factor,
        iterations=settings.iterations,
        passes=settings.passes,
        tolerance=settings.tolerance,
    )
    with single_threaded_blas(threads) as workers:
        centres = cluster(pool.rows, pool.mass, search, seed=seed, workers=workers)
        # Judged after rounding: mass and boxes belong to the rows that are sent.
        sent = _canonical(centres)
        found = assign(pool.rows, pool.mass, sent.astype(np.float64), workers=workers)
    boxes = pool.boxes_behind(found.labels, len(sent))
    used = boxes > 0
    return _result(sent[used], found.mass[used], boxes[used])


def update_mass(updates: Sequence[MemoryUpdate], settings: AggregateSettings) -> list[Double]:
    """Return the mass float64 [R] of each update's rows; all masses together sum to about 1.

    Args:
        updates: as in :func:`aggregate`; the result does not depend on their order.
        settings: the caps.
    """
    sent = Counter(update.box for update in updates)
    share = [1 / sent[update.box] for update in updates]
    groups: dict[tuple[str, str], list[float]] = {}
    for update, part in zip(updates, share, strict=True):
        groups.setdefault((update.product, update.subclass), []).append(part)
    # fsum rounds once, so the sums are the same in any order.
    sums = {group: math.fsum(parts) for group, parts in groups.items()}
    most = settings.group_cap * min(sums.values())
    whole = math.fsum(min(total, most) for total in sums.values())
    masses = []
    for update, part in zip(updates, share, strict=True):
        total = sums[update.product, update.subclass]
        support = update.support.astype(np.float64)
        capped = np.minimum(support, settings.row_cap * np.median(support))
        masses.append(capped / capped.sum() * (part * min(1.0, most / total) / whole))
    return masses


def _pool(updates: Sequence[MemoryUpdate], settings: AggregateSettings) -> _Pool:
    masses = np.concatenate(update_mass(updates, settings))
    numbers = {box: number for number, box in enumerate(sorted({update.box for update in updates}))}
    boxes = np.repeat([numbers[update.box] for update in updates], [len(update.rows) for update in updates])
    rows = np.empty((len(masses), updates[0].rows.shape[1]), np.float16)
    filled = 0
    for update in updates:
        rows[filled : filled + len(update.rows)] = update.rows
        filled += len(update.rows)
    rows += np.float16(0)  # -0 has other bytes than 0
    order = np.lexsort((masses, _keys(rows)))
    rows, masses = rows[order], masses[order]
    keys = _keys(rows)
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    row_of = np.repeat(np.arange(len(starts), dtype=np.int32), np.diff(np.r_[starts, len(rows)]))
    distinct = rows if len(starts) == len(rows) else rows[starts]
    return _Pool(distinct, np.add.reduceat(masses, starts), row_of, boxes[order].astype(np.int32), len(numbers))


def _canonical(centres: Double) -> Half:
    """Return the distinct rows float16 in the order of their bytes."""
    rows: Half = centres.astype(np.float16)
    rows += np.float16(0)
    return rows[np.unique(_keys(rows), return_index=True)[1]]


def _keys(rows: Half) -> npt.NDArray[np.bytes_]:
    """Return rows float16 [n, D] as strings of bytes [n]; equal width, so the zeros that numpy strips tell nothing."""
    return np.ascontiguousarray(rows).view(f"S{2 * rows.shape[1]}")[:, 0]


def _result(rows: Half, mass: Double, boxes: npt.NDArray[np.uint16]) -> Aggregated:
    share = (mass / mass.sum()).astype(np.float32)
    # A share below float32's smallest number is still a share.
    return Aggregated(rows.astype(np.float32), np.maximum(share, np.finfo(np.float32).tiny), boxes)


def _refuse(updates: Sequence[MemoryUpdate]) -> None:
    if not updates:
        raise DataError("there is no update to merge; wait until a box has sent one")
    first = updates[0]
    for update in updates:
        if update.embedding_id != first.embedding_id:
            raise DataError(
                f"{first.box} has embedding id {first.embedding_id} and {update.box} {update.embedding_id}; "
                "merge each embedding space in a pool of its own"
            )
        if update.rows.ndim != 2 or not update.rows.size:  # noqa: PLR2004 (rows are a matrix)
            raise DataError(f"{update.box}: rows are {list(update.rows.shape)}, expected [R, D]; leave that update out")
        if update.rows.shape[1] != first.rows.shape[1]:
            raise DataError(
                f"{first.box} has rows of {first.rows.shape[1]} channels and {update.box} of {update.rows.shape[1]}; "
                "leave out the one that does not fit the embedding id"
            )
        support = update.support
        if support.shape != (len(update.rows),) or not (np.isfinite(support).all() and (support > 0).all()):
            raise DataError(f"{update.box}: support is not {len(update.rows)} finite values > 0; leave that update out")
        if not (np.abs(update.rows) <= LARGEST).all():  # NaN compares False
            raise DataError(f"{update.box}: rows are not finite or beyond {LARGEST:g}; leave that update out")
