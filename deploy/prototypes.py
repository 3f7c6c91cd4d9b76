"""Prototypes of several boxes become one set: matched by transport within each cell, then averaged by mass.

Pure numpy; it must not know graphs, files or where the sets come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Single = npt.NDArray[np.float32]
    Double = npt.NDArray[np.float64]

_ROUNDS = 20
_TINY = 1e-12


@dataclass(frozen=True)
class PrototypeSet:
    """One set of prototypes, as the head of the prototype method holds it.

    Attributes:
        prototypes: float32 [K, C]; all cells, then all cells again for the next copy.
        mass: float32 [K] >= 0, good patches behind each.
        farthest: largest distance between a good patch and a prototype, > 0.
        typical: mean cost of good patches, > 0.
    """

    prototypes: Single
    mass: Single
    farthest: float
    typical: float


def merge(sets: Sequence[PrototypeSet], *, cells: int, unit: bool) -> PrototypeSet:
    """Merge sets of one head into their barycentre.

    The copies of a cell are in no order, so those of each set are first matched with the barycentre's by the transport
    of least squared distance between uniform masses, which is an assignment; then each prototype becomes the mean of
    its partners, weighted by their masses, and the two steps are repeated until the partners stay (a fixed point as in
    Alvarez-Esteban et al., 2016). Masses add up. A prototype without mass moves nothing. The same sets give the same
    bits in any order; merging merged sets may give another fixed point than merging all at once.

    Args:
        sets: at least one, of one shape, whose patches were compared by one graph.
        cells: that the prototypes lie in; 1 where they know no places, so that all may be matched with all.
        unit: prototypes are of unit length (the cosine), and so are their means.

    Raises:
        DataError: there is no set, shapes differ, the cells do not divide them, or values are not finite.
    """
    _refuse(sets, cells)
    # In the order of their bytes, so that no sum depends on the order given.
    known = sorted(sets, key=_key)
    count = len(known[0].mass)
    # Of cell and copy: the copies of a cell side by side.
    rows = np.stack([_by_cell(one.prototypes.astype(np.float64), cells) for one in known])
    masses = np.stack([_by_cell(one.mass.astype(np.float64), cells) for one in known])
    middle, mass = np.empty_like(rows[0]), np.empty_like(masses[0])
    for cell in range(cells):
        middle[cell], mass[cell] = _barycentre(rows[:, cell], masses[:, cell], unit=unit)
    total = masses.sum((1, 2))
    share = total / total.sum() if total.sum() > 0 else np.full(len(known), 1 / len(known))
    typical = known[0].typical + math.fsum(
        part * (one.typical - known[0].typical) for part, one in zip(share, known, strict=True)
    )
    return PrototypeSet(
        middle.transpose(1, 0, 2).reshape(count, -1).astype(np.float32),
        mass.T.reshape(count).astype(np.float32),
        max(one.farthest for one in known),
        typical,
    )


def assignment(cost: Double) -> npt.NDArray[np.int64]:
    """Return the column of each row, int64 [n], of the assignment of least total cost.

    Shortest augmenting paths (Jonker and Volgenant, 1987; Kuhn, 1955), O(n^3).

    Args:
        cost: float64 [n, n], finite.
    """
    n = len(cost)
    u, v = np.zeros(n + 1), np.zeros(n + 1)
    owner = np.zeros(n + 1, np.int64)  # row of each column, from 1; column 0 is where a path begins
    for row in range(1, n + 1):
        owner[0], column = row, 0
        least, before = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
        seen = np.zeros(n + 1, np.bool_)
        while True:
            seen[column] = True
            reduced = np.r_[np.inf, cost[owner[column] - 1] - u[owner[column]] - v[1:]]
            better = ~seen & (reduced < least)
            least[better], before[better] = reduced[better], column
            following = int(np.where(seen, np.inf, least).argmin())
            step = least[following]
            u[owner[seen]] += step
            v[seen] -= step
            least[~seen] -= step
            column = following
            if owner[column] == 0:
                break
        while column:
            owner[column] = owner[before[column]]
            column = int(before[column])
    found = np.empty(n, np.int64)
    found[owner[1:] - 1] = np.arange(n)
    return found


def _barycentre(rows: Double, mass: Double, *, unit: bool) -> tuple[Double, Double]:
    """Merge the copies of one cell: rows [sets, copies, C] and mass [sets, copies]; returns [copies, C], [copies]."""
    middle = rows[int(mass.sum(1).argmax())]
    partners: npt.NDArray[np.int64] | None = None
    for _ in range(_ROUNDS):
        found = np.stack([assignment(_apart(middle, one)) for one in rows])
        if partners is not None and np.array_equal(found, partners):
            break
        partners = found
        weight = np.take_along_axis(mass, partners, 1)
        matched = np.take_along_axis(rows, partners[..., None], 1)
        total = weight.sum(0)
        share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
        # As differences from the first: equal partners give themselves, to the last bit.
        middle = matched[0] + (share[..., None] * (matched - matched[0])).sum(0)
        if unit:
            middle = middle / np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), _TINY)
    assert partners is not None
    return middle, np.take_along_axis(mass, partners, 1).sum(0)


def _apart(first: Double, second: Double) -> Double:
    """Return squared distances [n, n]."""
    products = first @ second.T
    apart = (first * first).sum(1)[:, None] + (second * second).sum(1) - 2 * products
    return np.asarray(np.maximum(apart, 0.0), np.float64)


def _by_cell(values: Double, cells: int) -> Double:
    """Return [cells, copies, ...] of [copies * cells, ...]."""
    return np.swapaxes(values.reshape(-1, cells, *values.shape[1:]), 0, 1)


def _key(one: PrototypeSet) -> bytes:
    numbers = np.array([one.farthest, one.typical], np.float64).tobytes()
    return b"".join((np.ascontiguousarray(one.prototypes).tobytes(), np.ascontiguousarray(one.mass).tobytes(), numbers))


def _refuse(sets: Sequence[PrototypeSet], cells: int) -> None:
    if not sets:
        raise DataError("there is no set of prototypes to merge; give one at least")
    shape = sets[0].prototypes.shape
    if len(shape) != 2 or not sets[0].prototypes.size or cells < 1 or shape[0] % cells:  # noqa: PLR2004 (a matrix)
        raise DataError(f"prototypes {list(shape)} do not lie in {cells} cells; give [copies * cells, channels]")
    for number, one in enumerate(sets):
        if one.prototypes.shape != shape or one.mass.shape != shape[:1]:
            raise DataError(
                f"set {number}: prototypes {list(one.prototypes.shape)} and mass {list(one.mass.shape)}, the first has "
                f"{list(shape)}; merge sets of one head"
            )
        finite = np.isfinite(one.prototypes).all() and np.isfinite(one.mass).all() and (one.mass >= 0).all()
        if not (finite and 0 < one.farthest < math.inf and 0 < one.typical < math.inf):
            raise DataError(f"set {number}: values are not finite, or a mass or normaliser is too small; leave it out")
