"""One box of a simulated fleet: what it sees, its own memory, and the update that it makes of it.

It uses the box's own functions throughout; it must not know rounds, links or other boxes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from edge.federation.update import MemoryUpdate, Order, WireRows
from edge.federation.wire_rows import on_wire
from edge.memory.bank import MemoryBank
from edge.memory.dynamic import DynamicMemory, DynamicSettings
from edge.memory.reduce import reduce_anchor
from edge.memory.settings import MemorySettings

if TYPE_CHECKING:
    import numpy.typing as npt

    Half = npt.NDArray[np.float16]
    Single = npt.NDArray[np.float32]

FLEET = "bench"
_RAW_ROWS = 40_000
"""Most raw rows that a first bank is reduced from; more gains nothing and takes as many times as long."""


class BoxSettings(BaseModel):
    """What every box of the fleet does alike."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    local_rows: int = Field(512, ge=1, title="Local rows", description="Rows of a box's own memory.")
    update_rows: int = Field(512, ge=1, title="Update rows", description="Most rows of an update.")
    min_frames: float = Field(
        MemorySettings.model_fields["min_frames"].default,
        ge=1,
        title="Least frames",
        description="Frames behind a row that leaves a box.",
    )
    wire: WireRows = Field(WireRows.FLOAT16, title="Wire", description="Numbers that rows travel in.")
    first_share: float = Field(
        0.5, gt=0, le=1, title="First share", description="Share of its frames that a box has seen before round 1."
    )
    dynamic: DynamicSettings = Field(DynamicSettings(), title="Dynamic", description="How a memory follows frames.")


@dataclass(frozen=True, slots=True)
class BoxData:
    """Embeddings of the images of one box.

    Attributes:
        name: ``<site>/<box>``.
        product: what it judges.
        condition: how it sees it; the sub-class of its updates.
        learn: float16 [N, L, D], good frames in the order in which they are seen.
        commissioning: float16 [C, L, D], good frames that give the threshold and are never learnt.
        test: float16 [M, L, D].
        labels: bool [M], True is defective.
        groups: unicode [M]; images of one group are not independent.
        defects: float32 [n, D], patch rows with defects: what the box sends if it is a poisoner. May be empty.
    """

    name: str
    product: str
    condition: str
    learn: Half
    commissioning: Half
    test: Half
    labels: npt.NDArray[np.bool_]
    groups: npt.NDArray[np.str_]
    defects: Single


def sampled_rows(frames: Half, *, seed: int) -> Single:
    """Return at most 40,000 raw rows float32 [n, D] of frames [N, L, D], in their order."""
    rows = frames.reshape(-1, frames.shape[-1])
    if len(rows) > _RAW_ROWS:
        chosen = np.random.default_rng(seed).choice(len(rows), _RAW_ROWS, replace=False)
        rows = rows[np.sort(chosen)]
    return rows.astype(np.float32)


def first_bank(frames: Half, size: int, *, seed: int) -> Single:
    """Reduce raw frames [N, L, D] to the rows float32 [<= size, D] that a bundle brings."""
    rows = sampled_rows(frames, seed=seed)
    ones = np.ones(len(rows), np.float32)
    return reduce_anchor(MemoryBank(rows, ones, ones), size, min_frames=1, seed=seed).rows


class SimulatedBox:
    """A box with a memory of its own.

    Attributes:
        data: what it sees.
        settings: as of every box.
    """

    def __init__(self, data: BoxData, settings: BoxSettings, *, embedding_id: str, rounds: int, seed: int) -> None:
        """Begin with the rows of a bundle that was trained on the first frames, and see those frames.

        Args:
            data: what it sees.
            settings: as of every box.
            embedding_id: 64 hex digits.
            rounds: over which it sees the other frames.
            seed: of its choices.
        """
        self.data, self.settings = data, settings
        self._embedding_id, self._seed = embedding_id, seed
        first = max(1, round(settings.first_share * len(data.learn)))
        self.memory = DynamicMemory.begin(
            first_bank(data.learn[:first], settings.local_rows, seed=seed), settings.dynamic
        )
        self._see(data.learn[:first])
        self._coming = np.array_split(data.learn[first:], rounds)

    @property
    def rows(self) -> Single:
        """The local memory float32 [R, D]."""
        return self.memory.bank.rows

    def live(self, round_number: int) -> None:
        """See the frames that come before the end of a round, counted from 1."""
        self._see(self._coming[round_number - 1])

    def update(
        self, round_number: int, *, base_version: int, seed: int, rows: int | None = None, wire: WireRows | None = None
    ) -> MemoryUpdate:
        """Reduce the memory and make it what travels.

        Args:
            round_number: that it is for.
            base_version: of the fleet memory that the box has.
            seed: of the nonce.
            rows: most rows; None for those of the settings.
            wire: numbers that they travel in; None for those of the settings.

        Raises:
            DataError: too few frames stand behind every row.
        """
        settings, wire = self.settings, wire or self.settings.wire
        size = rows or settings.update_rows
        bank = reduce_anchor(self.memory.bank, size, min_frames=settings.min_frames, seed=self._seed)
        return MemoryUpdate(
            fleet=FLEET,
            box=self.data.name,
            product=self.data.product,
            subclass=self.data.condition,
            embedding_id=self._embedding_id,
            round=round_number,
            order=Order.ANCHOR,
            rows=on_wire(bank.rows, wire),
            support=bank.support,
            frames=bank.frames,
            n_frames=self.memory.feeds,
            mean=self.memory.mean,
            std=self.memory.std,
            base_version=base_version,
            created=datetime(2026, 1, 1, tzinfo=timezone.utc),
            nonce=np.random.default_rng((seed, round_number)).bytes(16).hex(),
            wire=wire,
        )

    def _see(self, frames: Half) -> None:
        for frame in frames:
            self.memory.feed(frame.astype(np.float32))
