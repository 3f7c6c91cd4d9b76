"""Weighted k-means whose result is the same bits for any number of threads. It must not know boxes or memories.

Rows come in a fixed order, are cut into fixed shards and blocks, and every sum is taken in float64 in that order.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    Half = npt.NDArray[np.float16]
    Single = npt.NDArray[np.float32]
    Double = npt.NDArray[np.float64]
    Labels = npt.NDArray[np.int32]

_BLOCK = 2048  # rows; with 1,024 centres a block's distances are 8 MiB
_SHARDS = 16  # more than the threads of an aggregator; each holds one table of sums
_CANDIDATES = 3  # rows tried for each seed; the one that lowers the error most is taken
# float32 products are wrong by about 1e-6 of the squared norms; whatever lies closer than this is judged in float64,
# so that rounding in float32 does not tip a row to another centre.
_NEAR = 1e-5


@dataclass(frozen=True, slots=True)
class Lloyd:
    """How long to search.

    Attributes:
        clusters: centres wanted, >= 1.
        sample: rows of the weighted sample that is clustered first; where there are no more rows, all are.
        iterations: most passes over that sample.
        passes: most passes over all rows after it.
        tolerance: stop where no centre moves by more than this share of the data's scale.
    """

    clusters: int
    sample: int
    iterations: int
    passes: int
    tolerance: float


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which centre is nearest to each row.

    Attributes:
        labels: int32 [n].
        squared: float32 [n], squared distance to it.
        mass: float64 [K], sum of the rows' mass of each centre.
        sums: float64 [K, D], mass-weighted sums of its rows, less the origin that the distances were taken from.
    """

    labels: Labels
    squared: Single
    mass: Double
    sums: Double

    def inertia(self, mass: Double) -> float:
        """Return the mean squared distance of rows with ``mass`` float64 [n]."""
        return float(mass @ self.squared.astype(np.float64) / mass.sum())


class _Points(NamedTuple):
    rows: Half
    mass: Double
    origin: Double


class Workers:
    """Threads for blocks, each of which runs its matrix products on itself alone."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool

    def each(self, work: Callable[[int, int], None], count: int) -> None:
        """Call ``work(start, stop)`` for the shards of ``count`` rows; the cuts do not depend on the threads."""
        edges = shard_edges(count)
        if self._pool is None:
            for start, stop in edges:
                work(start, stop)
        else:
            list(self._pool.map(lambda edge: work(*edge), edges))


@contextmanager
def single_threaded_blas(threads: int) -> Iterator[Workers]:
    """Keep the BLAS to one thread, which fixes its order of adding, and give ``threads`` workers instead."""
    with threadpool_limits(limits=1, user_api="blas"):
        if threads == 1:
            yield Workers(None)
        else:
            with ThreadPoolExecutor(threads) as pool:
                yield Workers(pool)


def shard_edges(count: int) -> list[tuple[int, int]]:
    """Cut ``count`` rows into at most 16 runs of whole blocks."""
    blocks = -(-count // _BLOCK)
    step = -(-blocks // _SHARDS) * _BLOCK
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def cluster(rows: Half, mass: Double, search: Lloyd, *, seed: int, workers: Workers) -> Double:
    """Find centres that rows lie close to: Lloyd's iteration on a weighted sample, then on all rows.

    Seeds by k-means++ (Arthur and Vassilvitskii, 2007). The sample is a lightweight coreset (Bachem, Lucic and Krause,
    2018): half of it goes by mass, half by mass times squared distance to the mean, so that rare far rows are in it.
    A centre without rows moves to the row that is farthest from its own centre.

    Args:
        rows: float16 [n, D], distinct, in an order that depends on nothing but their values; n > ``clusters``.
        mass: float64 [n] > 0.
        search: how long.
        seed: of the sample and the first centres.
        workers: threads.

    Returns:
        float64 [clusters, D].
    """
    rng = np.random.default_rng(seed)
    origin, scale, squared = _spread(rows, mass, workers)
    index, weight = _sample(mass, squared, search.sample, rng)
    if len(index) < search.clusters:  # a few rows hold almost all mass and were drawn again and again
        index, weight = np.arange(len(rows)), mass
    part = _Points(rows[index], weight, origin)
    centres = _seed(_moved(part.rows, origin), weight, search.clusters, rng)
    stop = search.tolerance * scale
    centres = _iterate(part, centres, most=search.iterations, stop=stop, workers=workers)
    if len(index) < len(rows):
        centres = _iterate(_Points(rows, mass, origin), centres, most=search.passes, stop=stop, workers=workers)
    return centres + origin


def assign(rows: Half, mass: Double, centres: Double, *, origin: Double | None = None, workers: Workers) -> Assignment:
    """Find the nearest centre of each row; ties go to the first.

    Args:
        rows: float16 [n, D].
        mass: float64 [n].
        centres: float64 [K, D], less ``origin``.
        origin: float64 [D] to take distances from, which keeps float32 products exact; None is the centres' mean.
        workers: threads.
    """
    if origin is None:
        origin = centres.mean(0)
        centres = centres - origin
    labels, squared = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    parts = {start: (np.zeros(len(centres)), np.zeros(centres.shape)) for start, _ in shard_edges(len(rows))}
    # One product gives |c|^2 - 2 x.c: the rows get a column of ones.
    table = np.vstack([-2 * centres.T, (centres * centres).sum(1)]).astype(np.float32)

    def work(first: int, last: int) -> None:
        masses, sums = parts[first]
        for start in range(first, last, _BLOCK):
            block = slice(start, min(start + _BLOCK, last))
            moved = _moved(rows[block], origin)
            labels[block], squared[block] = _nearest(moved, centres, table)
            _add(masses, sums, moved, mass[block], labels[block])

    workers.each(work, len(rows))
    total, sums = np.zeros(len(centres)), np.zeros(centres.shape)
    for start in sorted(parts):
        total += parts[start][0]
        sums += parts[start][1]
    return Assignment(labels, squared, total, sums)


def _iterate(points: _Points, centres: Double, *, most: int, stop: float, workers: Workers) -> Double:
    for _ in range(most):
        found = assign(points.rows, points.mass, centres, origin=points.origin, workers=workers)
        filled = found.mass > 0
        moved = np.divide(found.sums, found.mass[:, None], out=centres.copy(), where=filled[:, None])
        if not filled.all():
            empty = np.flatnonzero(~filled)
            moved[empty] = _farthest(points, centres, found, len(empty))
        shift = float(np.sqrt(((moved - centres) ** 2).sum(1).max()))
        centres = moved
        if shift < stop:
            break
    return centres


def _farthest(points: _Points, centres: Double, found: Assignment, count: int) -> Double:
    """Return the rows farthest from their centres, farthest first; float32 only narrows the choice."""
    likely = np.sort(np.argsort(-found.squared, kind="stable")[: count + 64])
    moved = _moved(points.rows[likely], points.origin)
    apart = moved - centres[found.labels[likely]]
    return moved[np.argsort(-(apart * apart).sum(1), kind="stable")[:count]]


def _nearest(moved: Double, centres: Double, table: Single) -> tuple[Labels, Single]:
    rows = np.empty((len(moved), moved.shape[1] + 1), np.float32)
    rows[:, :-1], rows[:, -1] = moved, 1
    scores = rows @ table
    each = np.arange(len(moved))
    labels = scores.argmin(1)
    best = scores[each, labels].astype(np.float64)
    norm = (moved * moved).sum(1)
    squared = np.maximum(best + norm, 0)
    if len(centres) > 1:
        scores[each, labels] = np.inf
        # A centre that ties is no longer than row and distance together.
        close = scores.min(1) - best < _NEAR * (np.sqrt(norm) + np.sqrt(squared)) ** 2
        if close.any():
            exact = (centres * centres).sum(1) - 2 * moved[close] @ centres.T
            labels[close] = exact.argmin(1)
            squared[close] = np.maximum(exact.min(1) + norm[close], 0)
    return labels.astype(np.int32), squared.astype(np.float32)


def _add(masses: Double, sums: Double, moved: Double, mass: Double, labels: Labels) -> None:
    order = np.argsort(labels, kind="stable")
    ordered = labels[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    present, weight = ordered[starts], mass[order]
    masses[present] += np.add.reduceat(weight, starts)
    sums[present] += np.add.reduceat(moved[order] * weight[:, None], starts, axis=0)


def _spread(rows: Half, mass: Double, workers: Workers) -> tuple[Double, float, Double]:
    """Return the weighted mean float64 [D], the root mean squared distance to it, and each row's squared distance."""
    origin = assign(rows, mass, np.zeros((1, rows.shape[1])), origin=np.zeros(rows.shape[1]), workers=workers)
    mean = origin.sums[0] / origin.mass[0]
    squared = np.empty(len(rows))

    def work(first: int, last: int) -> None:
        for start in range(first, last, _BLOCK):
            block = slice(start, min(start + _BLOCK, last))
            squared[block] = (_moved(rows[block], mean) ** 2).sum(1)

    workers.each(work, len(rows))
    return mean, float(np.sqrt((mass * squared).sum() / mass.sum())), squared


def _sample(mass: Double, squared: Double, size: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], Double]:
    if len(mass) <= size:
        return np.arange(len(mass)), mass
    pull = mass * squared
    chance = 0.5 * mass / mass.sum() + 0.5 * pull / max(pull.sum(), np.finfo(np.float64).tiny)
    # Systematic: evenly spaced along the cumulated chance, so neighbours in the order are not drawn by luck.
    edges = np.cumsum(chance)
    places = (np.arange(size) + rng.random()) / size * edges[-1]
    index, count = np.unique(
        np.minimum(np.searchsorted(edges, places, side="right"), len(mass) - 1), return_counts=True
    )
    return index, count * mass[index] / (chance[index] * size)


def _seed(moved: Double, weight: Double, count: int, rng: np.random.Generator) -> Double:
    """Choose ``count`` of the rows by k-means++; float64, because one flipped draw changes all that follow."""
    norm = (moved * moved).sum(1)
    chosen = [int(np.searchsorted(np.cumsum(weight), rng.random() * weight.sum(), side="right"))]
    left = np.maximum(norm + norm[chosen[0]] - 2 * moved @ moved[chosen[0]], 0)
    left[chosen[0]] = 0
    while len(chosen) < count:
        edges = np.cumsum(weight * left)
        if not edges[-1] > 0:
            # Rows so close that their distances round to nothing: any of the others will do.
            chosen += np.setdiff1d(np.arange(len(moved)), chosen)[: count - len(chosen)].tolist()
            break
        tried = np.minimum(np.searchsorted(edges, rng.random(_CANDIDATES) * edges[-1], side="right"), len(moved) - 1)
        apart = norm[tried] - 2 * moved @ moved[tried].T
        apart += norm[:, None]
        apart[tried, np.arange(_CANDIDATES)] = 0
        np.clip(apart, 0, left[:, None], out=apart)
        best = int(np.argmin(weight @ apart))
        chosen.append(int(tried[best]))
        left = np.ascontiguousarray(apart[:, best])
    return moved[chosen]


def _moved(rows: Half, origin: Double) -> Double:
    return rows.astype(np.float64) - origin
