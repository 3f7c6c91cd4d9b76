"""What closing a round computes: which of its updates may count, and what they make together. It decides nothing else.

It reads the store and leaves it as it is, so that it can run beside the service and again after a kill.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from deploy.aggregator.aggregate import aggregate
from deploy.aggregator.records import UploadState
from edge.errors import FederationError
from edge.federation.wire import Limits, decode_bank, decode_update
from edge.memory.bank import MemoryBank

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deploy.aggregator.aggregate import Aggregated, AggregateSettings
    from deploy.aggregator.records import Bank, Upload
    from deploy.aggregator.store import Store
    from edge.federation.update import MemoryUpdate

DAMAGED = "its bytes are damaged on the aggregator's disk"


class Examination(Protocol):
    """What a gate says of an update."""

    @property
    def accepted(self) -> bool:
        """Whether it may count."""

    @property
    def reasons(self) -> Sequence[str]:
        """Why it may not, in words for operators."""


class Gate(Protocol):
    """Examines one update; called in a thread of its own."""

    def __call__(
        self, update: MemoryUpdate, *, reference: MemoryBank | None, peers: Sequence[MemoryUpdate]
    ) -> Examination:
        """Compare an update with what the fleet knew (``reference``) and with the round's others (``peers``)."""


@runtime_checkable
class GateOfAll(Protocol):
    """A gate that examines a round's updates together, in time that grows with their number and not its square."""

    def examine_all(
        self, updates: Sequence[MemoryUpdate], *, reference: MemoryBank | None, first: int
    ) -> Sequence[Examination]:
        """Examine the ``first`` updates, each beside all others; one examination for each of them, in order."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of an upload, by its number; ``state`` is accepted, quarantined or refused."""

    upload: int
    state: UploadState
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Closing:
    """What closing a round came to.

    Attributes:
        pool: of the round.
        round: its number.
        decisions: one for each of its uploads.
        merged: what the accepted ones make; None where they come from fewer boxes than a bank needs.
        members: boxes of the accepted ones, sorted.
        inputs: sha256 of the accepted ones, sorted.
    """

    pool: str
    round: int
    decisions: tuple[Decision, ...]
    merged: Aggregated | None
    members: tuple[str, ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Merger:
    """How rounds are closed.

    Attributes:
        gate: examines updates; all of a round at once where it is a :class:`GateOfAll`.
        settings: of the merging.
        min_boxes: fewest boxes that a bank is made of.
        limits: of payloads.
        references: what updates are compared with, by pool or embedding id; the newest bank where a pool has none.
        carry_rounds: for so many rounds the last accepted update of a box that has sent nothing new counts on.
        seed: of the merging.
        threads: that share it.
    """

    gate: Gate
    settings: AggregateSettings
    min_boxes: int
    limits: Limits
    references: Mapping[str, MemoryBank]
    carry_rounds: int = 0
    seed: int = 0
    threads: int = 1

    def __call__(self, store: Store, pool: str, round_: int) -> Closing:
        """Examine and merge a round's uploads; the same uploads and reference give the same result.

        Raises:
            DataError: they cannot be merged.
            StoreError: they cannot be read.
        """
        reference = self.reference(store, pool)
        loaded, decisions = self._load(store, pool, round_, None if reference is None else reference.width)
        carried = self._carried(store, pool, round_, loaded)
        # Released ones are peers of the others and are not examined themselves.
        pairs = sorted([*loaded, *carried], key=lambda pair: pair[0].released)
        first = sum(not upload.released for upload, _ in pairs)
        found = self._examine([update for _, update in pairs], reference, first)
        counted = pairs[first:]
        # What was decided of a carried one stays: it is asked again only whether it counts on.
        fresh = [upload for upload, _ in counted if upload.round_counted == round_]
        decisions += [Decision(upload.id, UploadState.ACCEPTED) for upload in fresh]
        for (upload, update), examination in zip(pairs, found, strict=False):
            new = upload.round_counted == round_
            if examination.accepted:
                counted.append((upload, update))
                decisions += [Decision(upload.id, UploadState.ACCEPTED)] if new else []
            elif new:
                decisions.append(Decision(upload.id, UploadState.QUARANTINED, tuple(examination.reasons)))
        members = tuple(sorted({upload.box for upload, _ in counted}))
        merged = None
        if len(members) >= self.min_boxes:
            merged = aggregate(
                [update for _, update in counted], settings=self.settings, seed=self.seed, threads=self.threads
            )
        inputs = tuple(sorted(upload.sha256 for upload, _ in counted))
        return Closing(pool, round_, tuple(decisions), merged, members, inputs)

    def _examine(
        self, updates: Sequence[MemoryUpdate], reference: MemoryBank | None, first: int
    ) -> Sequence[Examination]:
        if not first:
            return []
        if isinstance(self.gate, GateOfAll):
            return self.gate.examine_all(updates, reference=reference, first=first)
        return [
            self.gate(update, reference=reference, peers=[other for other in updates if other is not update])
            for update in updates[:first]
        ]

    def columns(self, pool: str) -> int:
        """Columns of the reference of a pool, 0 where it has none."""
        found = self.references.get(pool) or self.references.get(pool.partition("/")[0])
        return 0 if found is None else found.width

    def reference(self, store: Store, pool: str) -> MemoryBank | None:
        """The trainer's memory, else the pool's newest bank; ``support`` and ``frames`` are shares of the fleet.

        The trainer's first: what came in a little at a time would hide behind itself in a bank.
        """
        trained = self.references.get(pool) or self.references.get(pool.partition("/")[0])
        found = None if trained is not None else store.bank(pool)
        if found is None:
            return trained
        bank = decode_bank(store.bank_bytes(found), own_limits(found))
        return MemoryBank(bank.rows, bank.mass, bank.mass)

    def _carried(
        self, store: Store, pool: str, round_: int, present: Sequence[tuple[Upload, MemoryUpdate]]
    ) -> list[tuple[Upload, MemoryUpdate]]:
        """The last accepted update of each box that has sent none: what a fleet knew is not lost with one late box."""
        have: set[tuple[str, str, str] | None] = {(one.box, one.product, one.subclass) for _, one in present}
        width = present[0][1].rows.shape[1] if present else None
        found = []
        for before in range(round_ - 1, max(0, round_ - 1 - self.carry_rounds), -1):
            for upload in store.uploads(pool=pool, round_counted=before, state=UploadState.ACCEPTED):
                payload = store.payload(upload)
                try:
                    update = None if payload is None else decode_update(payload, self.limits)
                except FederationError:  # the limits were lowered since it came
                    continue
                key = None if update is None else (update.box, update.product, update.subclass)
                if update is not None and key not in have and update.rows.shape[1] == width:
                    have.add(key)
                    found.append((upload, update))
        return found

    def _load(
        self, store: Store, pool: str, round_: int, width: int | None
    ) -> tuple[list[tuple[Upload, MemoryUpdate]], list[Decision]]:
        """The round's updates, and decisions on those that cannot be compared with the others."""
        loaded, decisions = [], []
        for upload in store.uploads(pool=pool, round_counted=round_, state=UploadState.WAITING):
            payload = store.payload(upload)
            try:
                update = None if payload is None else decode_update(payload, self.limits)
            except FederationError:  # the limits were lowered since it came
                update = None
            if update is None:
                decisions.append(Decision(upload.id, UploadState.REFUSED, (DAMAGED,)))
            else:
                loaded.append((upload, update))
        width = width or _usual_width([(upload.box, update.rows.shape[1]) for upload, update in loaded])
        fitting = [(upload, update) for upload, update in loaded if update.rows.shape[1] == width]
        reason = f"its rows have other than the pool's {width} columns"
        decisions += [
            Decision(upload.id, UploadState.QUARANTINED, (reason,))
            for upload, update in loaded
            if update.rows.shape[1] != width
        ]
        return fitting, decisions


def own_limits(bank: Bank) -> Limits:
    """Limits that a stored bank keeps: it was made here, so only its declared size is held against it."""
    return Limits(max_bytes=max(bank.size, 4 * 2**20), max_rows=2**17, max_columns=2**17)


def _usual_width(widths: Sequence[tuple[str, int]]) -> int:
    """The columns that most boxes have; the fewest where two are as common."""
    counts = Counter(width for _, width in sorted(set(widths)))
    return min(counts, key=lambda width: (-counts[width], width)) if counts else 0
