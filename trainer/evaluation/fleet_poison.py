"""What a box sends that wants to harm the fleet. It must not know how any of it is found out."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from edge.federation.wire_rows import LARGEST, on_wire
from edge.memory.bank import MemoryBank
from edge.memory.reduce import reduce_anchor

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.federation.update import MemoryUpdate

    Single = npt.NDArray[np.float32]

_NOISE = 10.0  # deviations of the box's own rows
_SCALE = 100.0
_COUNTS = 1e4


class Poison(str, Enum):
    """How an update is spoilt.

    ``noise``: rows are noise of ten times their deviation. ``scaled``: rows times 100. ``counts``: rows are noise and
    10,000 times as many patches stand behind them. ``defects``: rows are patches with defects, so that the fleet
    would take defects for normal.
    """

    NOISE = "noise"
    SCALED = "scaled"
    COUNTS = "counts"
    DEFECTS = "defects"


def poisoned(update: MemoryUpdate, kind: Poison, *, defects: Single, rng: np.random.Generator) -> MemoryUpdate:
    """Spoil an update as a box that holds its own key could: whatever is checked of its form still holds.

    Args:
        update: an honest one.
        kind: how.
        defects: float32 [n, D], patch rows with defects; n >= 1 for ``defects``.
        rng: source of the noise.

    Raises:
        ValueError: ``defects`` is asked for and there are none.
    """
    rows, support, frames = update.rows, update.support, update.frames
    if kind is Poison.SCALED:
        rows = rows * np.float32(_SCALE)
    elif kind is Poison.DEFECTS:
        if not len(defects):
            raise ValueError(f"{update.box} has no defect rows to send; give its data some")
        ones = np.ones(len(defects), np.float32)
        taught = reduce_anchor(MemoryBank(defects, ones, ones), len(rows), min_frames=1).rows
        rows, support, frames = taught, support[: len(taught)], frames[: len(taught)]
    else:
        deviation = _NOISE * rows.std(0)
        rows = rng.standard_normal(rows.shape).astype(np.float32) * deviation + rows.mean(0)
        if kind is Poison.COUNTS:
            support = support * np.float32(_COUNTS)
    rows = on_wire(np.clip(rows, -LARGEST, LARGEST).astype(np.float32), update.wire)
    return replace(update, rows=rows, support=support, frames=frames)
