"""DynamicMemory: a bank that follows the good frames it is fed, one at a time, without forgetting what is rare.

Pure numpy; it must not know which frames are good (a gate decides), nor where its state is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edge.errors import DataError
from edge.memory.bank import MemoryBank
from edge.memory.search import nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]
    Index = npt.NDArray[np.int64]
    Doubles = npt.NDArray[np.float64]
    Arrays = Mapping[str, npt.NDArray[Any]]

STATE_VERSION = 1
_FARTHEST = 80.0  # widths; exp(-80) still is a normal float32, so no cell loses all its weight
_STATE: dict[str, tuple[type, int]] = {
    "version": (np.int64, 0),
    "rows": (np.float64, 2),
    "support": (np.float64, 1),
    "frames": (np.float64, 1),
    "idle": (np.int64, 1),
    "counts": (np.int64, 1),
    "mean": (np.float64, 1),
    "squares": (np.float64, 1),
}
"""Types and axes of the arrays of a kept memory."""
_SIGNED = ("rows", "mean")
_ROUNDING = 1 + 1e-9  # frames may exceed the support that they equal by a last bit


class DynamicSettings(BaseModel):
    """How a memory follows what it is fed.

    Two clocks keep what is rare apart from what is gone. A row moves, and its counts fade, by ``beta`` with each frame
    that touches it: a look that comes once in a hundred frames keeps its rows as they were when it last came. Time
    alone halves the counts only every ``half_life`` frames.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    # 0.9 is FedDyMem's; fed 3,000 good frames of three generated webs, 0.95 kept 0.010 to 0.026 more I-AUROC on each.
    beta: float = Field(
        0.95,
        ge=0,
        lt=1,
        title="Inertia",
        description="What a row keeps of itself at each frame that touches it; counts fade alike, so at most "
        "1 / (1 - beta) frames stand behind a row. Near 1 learns slowly and takes one bad frame lightly.",
    )
    half_life: float = Field(
        2000.0,
        gt=0,
        title="Half-life",
        description="Fed frames in which the counts of a row that nothing touches halve. Short forgets looks that went "
        "out of use; long keeps those that are rare but normal.",
    )
    min_support: float = Field(
        1.0, ge=0, title="Least support", description="Patches behind a row, below which it counts as idle."
    )
    patience: int = Field(
        500,
        ge=1,
        title="Patience",
        description="Fed frames that a row must have been idle before it may be given to a look the bank lacks. A look "
        "rarer than once in so many frames can be lost.",
    )
    reseeds: int = Field(
        4, ge=0, title="Re-seeded rows", description="Most idle rows that one frame may take; 0 keeps every row."
    )


class DynamicMemory:
    """Rows that follow the patches nearest to them, with decayed counts of what stands behind each.

    A fed frame's patches are assigned to their nearest rows; a row r that some touch becomes
    ``beta m_r + (1 - beta) sum u_i z_i / sum u_i`` with ``u_i = exp(-||z_i - m_r||^2 / tau)``, tau the frame's median
    squared distance (FedDyMem's dynamic update; weights and decay are our reading). Idle rows are given to the frame's
    patches that are farthest from the bank (max-min), but only where such a patch is farther from the bank than the
    row is from its nearest neighbour, so that a lonely rare row is never given up for less than it covers.
    """

    def __init__(self, bank: MemoryBank, settings: DynamicSettings | None = None) -> None:
        """Go on from a bank.

        Args:
            bank: rows and what stands behind them.
            settings: how to follow; the defaults if None.
        """
        self.settings = settings or DynamicSettings()
        self._rows = bank.rows.astype(np.float64)
        self._support, self._frames = bank.support.astype(np.float64), bank.frames.astype(np.float64)
        self._idle = np.zeros(len(bank), np.int64)
        self._feeds = self._patches = 0
        self._mean, self._squares = np.zeros(bank.width), np.zeros(bank.width)

    @classmethod
    def begin(cls, rows: Rows, settings: DynamicSettings | None = None) -> DynamicMemory:
        """Begin with a bundle's rows float32 [R, D]: nothing stands behind them, so none leaves until it is fed.

        Raises:
            DataError: the rows are no bank.
        """
        nothing = np.zeros(len(rows), np.float32)
        return cls(MemoryBank(rows=rows, support=nothing, frames=nothing.copy()), settings)

    @property
    def bank(self) -> MemoryBank:
        """The memory as it is now: a copy; as many rows as it was begun with, in their places."""
        support = self._support.astype(np.float32)
        frames = np.minimum(self._frames.astype(np.float32), support)
        return MemoryBank(rows=self._rows.astype(np.float32), support=support, frames=frames)

    @property
    def feeds(self) -> int:
        """Frames that fed the memory since it was begun."""
        return self._feeds

    @property
    def patches(self) -> int:
        """Patches that fed the memory since it was begun."""
        return self._patches

    @property
    def mean(self) -> Rows:
        """Mean float32 [D] of all patches that fed the memory, without decay; zeros before the first."""
        return self._mean.astype(np.float32)

    @property
    def std(self) -> Rows:
        """Standard deviation float32 [D] of all patches that fed the memory, without decay; zeros before the first."""
        return np.sqrt(self._squares / max(1, self._patches)).astype(np.float32)

    def feed(self, embedding: Rows) -> None:
        """Learn one good frame.

        Args:
            embedding: float32 [L, D], the frame's patch rows, of all its tiles.

        Raises:
            DataError: another width, no rows, or values that are not finite; nothing is learned of that frame.
        """
        if embedding.ndim != 2 or embedding.shape[1] != self._rows.shape[1] or not len(embedding):  # noqa: PLR2004
            raise DataError(
                f"embedding is {list(embedding.shape)}, the memory is fed [patches, {self._rows.shape[1]}]; the bundle "
                "of the frame and that of the memory differ"
            )
        rows = self._rows.astype(np.float32)
        squared, cell = nearest(embedding, rows)
        self._count(embedding.astype(np.float64))
        self._fade()
        self._follow(embedding.astype(np.float64), squared.astype(np.float64), cell)
        self._reseed(embedding)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return all that :meth:`restore` needs, as named arrays for an npz."""
        return {
            "version": np.array(STATE_VERSION, np.int64),
            "rows": self._rows.copy(),
            "support": self._support.copy(),
            "frames": self._frames.copy(),
            "idle": self._idle.copy(),
            "counts": np.array([self._feeds, self._patches], np.int64),
            "mean": self._mean.copy(),
            "squares": self._squares.copy(),
        }

    @classmethod
    def restore(cls, arrays: Arrays, settings: DynamicSettings | None = None) -> DynamicMemory:
        """Go on from a kept state, bit for bit.

        Args:
            arrays: what :meth:`state` returned.
            settings: how to follow; the defaults if None.

        Raises:
            DataError: an array is missing, of another type or shape, or out of its range; the message names it.
        """
        _check_state(arrays)
        memory = cls.begin(arrays["rows"].astype(np.float32), settings)
        memory._rows, memory._support, memory._frames, memory._idle, memory._mean, memory._squares = (  # noqa: SLF001 (our own)
            np.array(arrays[name]) for name in ("rows", "support", "frames", "idle", "mean", "squares")
        )
        memory._feeds, memory._patches = (int(count) for count in arrays["counts"])  # noqa: SLF001 (our own)
        return memory

    def _count(self, patches: Doubles) -> None:
        """Merge the frame's moments (Chan, Golub and LeVeque 1979; Welford's update for many values at once)."""
        n, mean = len(patches), patches.mean(0)
        total, shift = self._patches + n, mean - self._mean
        self._squares += np.square(patches - mean).sum(0) + shift * shift * (self._patches * n / total)
        self._mean += shift * (n / total)
        self._patches, self._feeds = total, self._feeds + 1

    def _fade(self) -> None:
        kept = 0.5 ** (1 / self.settings.half_life)
        self._support *= kept
        self._frames *= kept

    def _follow(self, patches: Doubles, squared: Doubles, cell: Index) -> None:
        order = np.argsort(cell, kind="stable")
        starts = np.flatnonzero(np.diff(cell[order], prepend=-1))
        touched = cell[order[starts]]
        tau = float(np.median(squared))
        # The weight relative to the cell's nearest patch: the same average, and no cell loses all its weight.
        excess = squared - _spread(np.minimum.reduceat(squared[order], starts), order, starts)
        weight = np.exp(-np.minimum(excess / tau if tau > 0 else excess * 0, _FARTHEST))[order]
        average = np.add.reduceat(patches[order] * weight[:, None], starts) / np.add.reduceat(weight, starts)[:, None]
        beta = self.settings.beta
        self._rows[touched] = beta * self._rows[touched] + (1 - beta) * average
        self._support[touched] = beta * self._support[touched] + np.diff(starts, append=len(order))
        self._frames[touched] = beta * self._frames[touched] + 1

    def _reseed(self, embedding: Rows) -> None:
        idle = self._support < self.settings.min_support
        self._idle = np.where(idle, self._idle + 1, 0)
        ready = np.flatnonzero(self._idle >= self.settings.patience)
        if not (len(ready) and self.settings.reseeds):
            return
        rows = self._rows.astype(np.float32)
        distance = nearest(embedding, rows)[0]
        for _ in range(min(self.settings.reseeds, len(ready))):
            lonely = _to_others(rows, ready)
            place, patch = int(lonely.argmin()), int(distance.argmax())
            if not distance[patch] > lonely[place]:
                return
            row = ready[place]
            rows[row], self._rows[row] = embedding[patch], embedding[patch]
            self._support[row] = self._frames[row] = 1.0
            self._idle[row] = 0
            ready = np.delete(ready, place)
            if not len(ready):
                return
            distance = np.minimum(distance, nearest(embedding, rows[row : row + 1])[0])


def _spread(values: Doubles, order: Index, starts: Index) -> Doubles:
    """Give every patch the value of its cell, in the order of the patches."""
    spread = np.empty(len(order))
    spread[order] = np.repeat(values, np.diff(starts, append=len(order)))
    return spread


def _to_others(rows: Rows, some: Index) -> Rows:
    """Return the squared distance of some rows to the nearest other row."""
    if len(rows) == 1:
        return np.full(len(some), np.inf, np.float32)
    found = np.empty(len(some), np.float32)
    for place, row in enumerate(some):
        others = np.square(rows - rows[row]).sum(1)
        others[row] = np.inf
        found[place] = others.min()
    return found


def _check_state(arrays: Arrays) -> None:
    """Raise DataError where a kept memory is not what :meth:`DynamicMemory.state` gives."""
    for name, (kind, axes) in _STATE.items():
        if name not in arrays:
            raise _refused(name, "is missing")
        if arrays[name].dtype != kind or arrays[name].ndim != axes:
            raise _refused(name, f"is {arrays[name].dtype} {list(arrays[name].shape)}")
    if int(arrays["version"]) != STATE_VERSION:
        raise _refused("version", f"is {int(arrays['version'])}, this release reads {STATE_VERSION}")
    R, D = arrays["rows"].shape
    shapes = {"support": (R,), "frames": (R,), "idle": (R,), "counts": (2,), "mean": (D,), "squares": (D,)}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise _refused(name, f"is {list(arrays[name].shape)}, expected {list(shape)} beside rows {[R, D]}")
    for name in _STATE:
        if not np.isfinite(arrays[name]).all() or (name not in _SIGNED and (arrays[name] < 0).any()):
            raise _refused(name, "holds values out of range")
    if (arrays["frames"] > arrays["support"] * _ROUNDING).any():
        raise _refused("frames", "exceed the support")


def _refused(name: str, why: str) -> DataError:
    return DataError(f"kept memory: {name} {why}; remove the kept memory, it begins again from the bundle")
