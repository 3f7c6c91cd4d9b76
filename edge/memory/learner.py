"""Learner: what the box learns from its good frames, and the reduced update that may leave it.

It must not know threads, files or sockets.
"""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.errors import DataError
from edge.federation.update import MemoryUpdate, Order
from edge.federation.wire_rows import on_wire
from edge.memory.dynamic import DynamicMemory
from edge.memory.gate import FrameGate, Learn
from edge.memory.reduce import reduce_anchor, reduce_positional

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from edge.memory.bank import MemoryBank
    from edge.memory.settings import MemorySettings

    Rows = npt.NDArray[np.float32]

# Frames that a positional update averages over; 64 of 784 x 152 values are 15 MiB.
POSITIONAL_FRAMES = 64


@dataclass(frozen=True, slots=True)
class Sender:
    """Whose updates these are; see :class:`~edge.federation.update.MemoryUpdate` for the fields."""

    fleet: str
    box: str
    product: str
    subclass: str
    embedding_id: str


class Learner:
    """The memory that follows the line. One thread uses it.

    Attributes:
        fed: frames that fed it since the start.
        turned_away: frames that were offered since the start and did not.
    """

    def __init__(self, settings: MemorySettings, memory: DynamicMemory) -> None:
        self._settings = settings
        self._memory = memory
        self._frames: deque[npt.NDArray[np.float16]] = deque(maxlen=POSITIONAL_FRAMES)
        self.fed = 0
        self.turned_away = 0

    @classmethod
    def begin(cls, settings: MemorySettings, rows: Rows) -> Learner:
        """Begin with rows float32 [R, D] that nothing stands behind yet."""
        return cls(settings, DynamicMemory.begin(rows, settings.update))

    @classmethod
    def restore(cls, settings: MemorySettings, arrays: Mapping[str, npt.NDArray[Any]]) -> Learner:
        """Go on from what :meth:`state` gave.

        Raises:
            DataError: the arrays are not those.
        """
        return cls(settings, DynamicMemory.restore(arrays, settings.update))

    @property
    def feeds(self) -> int:
        """Frames that fed the memory since it was begun, restarts included."""
        return self._memory.feeds

    @property
    def rows(self) -> Rows:
        """The memory's rows float32 [R, D] as they are now."""
        return self._memory.bank.rows

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Return what :meth:`restore` needs. Frames kept for a positional update are not in it: it begins anew."""
        return self._memory.state()

    def take(
        self,
        embedding: Rows,
        score: float,
        gate: FrameGate,
        *,
        inside: npt.NDArray[np.bool_] | None,
        alarmed: bool,
        declared: bool | None = None,
    ) -> bool:
        """Learn a frame where it may be learned.

        Args:
            embedding: float32 [tiles, L, D].
            score: raw, of the memory in force.
            gate: of that memory and camera.
            inside: bool [tiles, L], patches inside the camera's region of interest; None where all are. Nobody has
                judged the others: they teach nothing, but for a positional update, which has a row for each place.
            alarmed: the frame is NOK or part of an anomaly event; it never feeds unless it is declared good.
            declared: True where an operator or PLC declared the part good.

        Returns:
            Whether it fed the memory.

        Raises:
            DataError: the embedding does not fit the memory.
        """
        if (alarmed and not declared) or not gate.admits(score, declared=declared):
            self.turned_away += 1
            return False
        self._memory.feed(embedding.reshape(-1, embedding.shape[-1]) if inside is None else embedding[inside])
        if self._settings.order is Order.POSITIONAL:
            self._frames.append(embedding.reshape(-1, embedding.shape[-1]).astype(np.float16))
        self.fed += 1
        return True

    def update(self, sender: Sender, *, round_number: int, base_version: int) -> MemoryUpdate:
        """Reduce what was learned to what may leave the box.

        Args:
            sender: whose it is.
            round_number: that it is meant for, >= 1.
            base_version: fleet memory in force, 0 for none.

        Raises:
            DataError: too few frames stand behind every row; the message says how many are missing.
            FederationError: values that cannot travel.
        """
        if self._settings.learn is Learn.OFF:
            raise DataError("memory.learn is off, so there is nothing to send")
        reduced = self._reduced()
        return MemoryUpdate(
            fleet=sender.fleet,
            box=sender.box,
            product=sender.product,
            subclass=sender.subclass,
            embedding_id=sender.embedding_id,
            round=round_number,
            order=self._settings.order,
            rows=on_wire(reduced.rows, self._settings.wire),
            support=reduced.support,
            frames=reduced.frames,
            n_frames=self._memory.feeds,
            mean=self._memory.mean,
            std=self._memory.std,
            base_version=base_version,
            created=datetime.now(timezone.utc),
            nonce=secrets.token_hex(16),
            wire=self._settings.wire,
        )

    def _reduced(self) -> MemoryBank:
        settings = self._settings
        if settings.order is Order.ANCHOR:
            return reduce_anchor(self._memory.bank, settings.rows, min_frames=settings.min_frames)
        if not self._frames:
            raise DataError(f"no frame was learned since the start, {settings.min_frames:g} are needed")
        frames = np.stack(self._frames).astype(np.float32)
        return reduce_positional(frames, min_frames=settings.min_frames)
