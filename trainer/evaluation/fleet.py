"""A fleet in one process: boxes learn, send, are late or lie; an aggregator examines and merges; boxes judge with it.

Every step is the product's own function, and every message is its own bytes. It must not know where images come from.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deploy.aggregator.aggregate import AggregateSettings, aggregate
from deploy.aggregator.lloyd import single_threaded_blas
from deploy.progress import no_progress
from edge.errors import DataError
from edge.federation.update import FleetBank
from edge.federation.wire import Limits, decode_bank, decode_update, encode_bank, encode_update
from edge.memory.bank import MemoryBank
from trainer.evaluation.fleet_box import FLEET, BoxSettings, SimulatedBox
from trainer.evaluation.fleet_judge import Exam, Judgement
from trainer.evaluation.fleet_poison import Poison, poisoned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deploy.aggregator.closing import Gate
    from deploy.progress import Progress
    from edge.federation.update import MemoryUpdate
    from trainer.evaluation.fleet_box import BoxData
    from trainer.evaluation.fleet_judge import Judge, Judged


class FleetSettings(BaseModel):
    """What a fleet does in a simulation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: int = Field(10, ge=1, title="Rounds", description="Rounds of updates.")
    box: BoxSettings = Field(BoxSettings(), title="Box", description="What every box does.")
    aggregate: AggregateSettings = Field(AggregateSettings(), title="Aggregate", description="How updates are merged.")
    late: float = Field(
        0.0, ge=0, lt=1, title="Late", description="Chance that an update comes after its round has closed."
    )
    cut_off: float = Field(
        0.0,
        ge=0,
        lt=1,
        title="Cut off",
        description="Chance that a box is cut off for a round: its update comes a round late, and it gets no memory.",
    )
    poison: Poison | None = Field(None, title="Poison", description="What poisoners send.")
    poisoners: int = Field(0, ge=0, title="Poisoners", description="Boxes that send it, the first ones.")
    judged_rounds: tuple[int, ...] = Field(
        (1, 2, 3, 5, 10), title="Judged rounds", description="Rounds after which test images are judged, and the last."
    )
    alpha: float = Field(
        0.05, gt=0, lt=1, title="Alpha", description="False-alarm probability that thresholds are set for."
    )


@dataclass(frozen=True, slots=True)
class RoundFigures:
    """One round.

    Attributes:
        number: from 1.
        counted: updates in the fleet memory.
        late: those of them that were a round late.
        cut_off: boxes that neither sent nor fetched.
        silent: boxes that had too few frames behind every row to send any.
        refused: box and reason of each update that was kept out.
        bytes_up: of all updates that arrived.
        bytes_down: of all banks that were fetched.
        rows: of the fleet memory.
        aggregate_s: seconds to merge.
        examine_s: seconds to decode and examine all updates.
        judged: None where this round was not judged.
    """

    number: int
    counted: int
    late: int
    cut_off: int
    silent: int
    refused: tuple[tuple[str, str], ...]
    bytes_up: int
    bytes_down: int
    rows: int
    aggregate_s: float
    examine_s: float
    judged: Judged | None


class Simulation:
    """A fleet from its first round on.

    Attributes:
        boxes: all of them, poisoners first.
        honest: data of the honest ones.
        exam: their test images.
        bank: the fleet memory of the last round, None before the first.
    """

    def __init__(
        self,
        boxes: Sequence[BoxData],
        settings: FleetSettings,
        judge: Judge,
        *,
        embedding_id: str,
        seed: int,
        gate: Gate | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """Start the boxes.

        Args:
            boxes: at least one that is honest.
            settings: what they do.
            judge: how they judge.
            embedding_id: 64 hex digits.
            seed: of lateness, poison and clustering.
            gate: examines every update; None lets all in.
            progress: called after each round.

        Raises:
            ValueError: no box is honest, or poisoners without poison.
        """
        if settings.poisoners >= len(boxes) or (settings.poisoners and settings.poison is None):
            raise ValueError("give more boxes than poisoners, and say what poisoners send")
        self.settings, self.judge = settings, judge
        self._embedding_id, self._seed, self._progress = embedding_id, seed, progress
        self._gate = gate
        self.boxes = [
            SimulatedBox(box, settings.box, embedding_id=embedding_id, rounds=settings.rounds, seed=seed)
            for box in boxes
        ]
        self.honest = boxes[settings.poisoners :]
        self.exam = Exam.of(self.honest)
        self.bank: FleetBank | None = None
        self._held: list[FleetBank | None] = [None] * len(boxes)  # what each box has
        self._waiting: list[bytes] = []  # updates that came after their round had closed

    def run(self) -> list[RoundFigures]:
        """Run all rounds."""
        with single_threaded_blas(1):
            return [self.round(number) for number in range(1, self.settings.rounds + 1)]

    def round(self, number: int) -> RoundFigures:
        """Let every box learn and send, merge what came, and let every box that can fetch it."""
        late = self._waiting
        on_time, self._waiting, cut_off = self._send(number)
        started = time.perf_counter()
        arrived = [decode_update(message, Limits()) for message in (*late, *on_time)]
        accepted, refused = examined(arrived, self._gate, self.bank)
        ready = time.perf_counter()
        if accepted:
            self._merge(accepted, number)
        merged = time.perf_counter()
        down = self._fetch(cut_off)
        judged = None
        if number in self.settings.judged_rounds or number == self.settings.rounds:
            judged = self._judge()
        self._progress("rounds", number, self.settings.rounds)
        return RoundFigures(
            number=number,
            counted=len(accepted),
            late=len(late),
            cut_off=len(cut_off),
            silent=len(self.boxes) - len(on_time) - len(self._waiting),
            refused=tuple(refused),
            bytes_up=sum(map(len, late)) + sum(map(len, on_time)),
            bytes_down=down,
            rows=0 if self.bank is None else len(self.bank.rows),
            aggregate_s=merged - ready,
            examine_s=ready - started,
            judged=judged,
        )

    def _send(self, number: int) -> tuple[list[bytes], list[bytes], set[int]]:
        """Return the messages on time, those that come next round, and who is cut off."""
        on_time, late, cut_off = [], [], set()
        for index, box in enumerate(self.boxes):
            rng = np.random.default_rng((self._seed, number, index))
            box.live(number)
            held = self._held[index]
            version = 0 if held is None else held.version
            try:
                update = box.update(number, base_version=version, seed=int(rng.integers(2**63)))
            except DataError:  # too few frames stand behind every row: it sends in a later round
                continue
            if index < self.settings.poisoners:
                assert self.settings.poison is not None
                update = poisoned(update, self.settings.poison, defects=box.data.defects, rng=rng)
            chance = rng.random()
            if chance < self.settings.cut_off:
                cut_off.add(index)
            (late if chance < self.settings.cut_off + self.settings.late else on_time).append(encode_update(update))
        return on_time, late, cut_off

    def _merge(self, accepted: Sequence[MemoryUpdate], number: int) -> None:
        merged = aggregate(accepted, settings=self.settings.aggregate, seed=self._seed)
        self.bank = FleetBank(
            fleet=FLEET,
            pool=self._embedding_id,
            embedding_id=self._embedding_id,
            version=1 if self.bank is None else self.bank.version + 1,
            round=number,
            rows=merged.rows,
            mass=merged.mass,
            boxes=merged.boxes,
            members=tuple(sorted(Counter(update.box for update in accepted))),
            created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        )

    def _fetch(self, cut_off: set[int]) -> int:
        if self.bank is None:
            return 0
        message = encode_bank(self.bank)
        received = decode_bank(message, Limits())
        there = [index for index in range(len(self.boxes)) if index not in cut_off]
        for index in there:
            self._held[index] = received
        return len(message) * len(there)

    def _judge(self) -> Judged:
        """Judge all test images with each honest box's memories, at the threshold that it calibrates for them."""
        boxes = range(self.settings.poisoners, len(self.boxes))
        judgement = self.judgement()
        held = [None if (bank := self._held[index]) is None else bank.rows for index in boxes]
        return judgement.judged(held, alpha=self.settings.alpha)

    def judgement(self) -> Judgement:
        """Return how the honest boxes judge with their memories as they are now."""
        honest = self.boxes[self.settings.poisoners :]
        return Judgement(self.judge, self.exam, self.honest, [box.rows for box in honest])


def examined(
    updates: Sequence[MemoryUpdate], gate: Gate | None, bank: FleetBank | None
) -> tuple[list[MemoryUpdate], list[tuple[str, str]]]:
    """Examine updates as a closing round does.

    Args:
        updates: of one round.
        gate: None lets all in.
        bank: the fleet memory in force, which they are compared with; None for none.

    Returns:
        The accepted ones, and box and reason of each other.
    """
    if gate is None:
        return list(updates), []
    reference = None if bank is None else MemoryBank(bank.rows, bank.mass, bank.mass)
    accepted, refused = [], []
    for update in updates:
        found = gate(update, reference=reference, peers=[other for other in updates if other is not update])
        if found.accepted:
            accepted.append(update)
        else:
            refused.append((update.box, "; ".join(found.reasons)))
    return accepted, refused
