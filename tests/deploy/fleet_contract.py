"""What holds however updates come and banks go: the contract of every transport between boxes and aggregator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from deploy.aggregator.aggregate import Aggregated, AggregateSettings, aggregate
from edge.federation.refusals import Refusal
from edge.federation.wire import Limits, decode_bank, encode_update
from tests.deploy.fleet_values import fleet

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edge.federation.update import FleetBank, MemoryUpdate

FLEET = "plant"
PRODUCT = "part0"
EMBEDDING = "ab" * 32
SEED = 5
MERGE = AggregateSettings(rows=24)
A, B, C = BOXES = ("plant/a", "plant/b", "plant/c")


@dataclass(frozen=True)
class Given:
    """An update, and the bytes that are sent for it."""

    update: MemoryUpdate
    payload: bytes


@dataclass(frozen=True)
class Verdict:
    """What a box was told."""

    counted_in_round: int
    refused: Refusal | None = None


class Transport(Protocol):
    def hand_over(self, given: Mapping[str, Given]) -> dict[str, Verdict]:
        """Let each box give its update; return what each was told."""

    def bank(self, box: str, version: int) -> bytes:
        """The bytes of that bank as they are at a box."""


def settings_text(folder: Path, *, period_s: float) -> str:
    """The aggregator's settings file: two of three boxes close a round, and a bank is made of two at least."""
    return f"""
listen: tcp://127.0.0.1:0
key_file: {folder}/aggregator.key_secret
boxes: {folder}/boxes
state_dir: {folder}/state
rounds:
  fleet: {FLEET}
  close_at: 2
  min_boxes: 2
  period_s: {period_s}
  carry_rounds: 0
  embedding_ids: [{EMBEDDING}]
  products: [{PRODUCT}]
merge:
  rows: {MERGE.rows}
seed: {SEED}
"""


def given(update: MemoryUpdate) -> Given:
    return Given(update, encode_update(update))


def updates_of(box: str, seed: int, round_: int, **changes: object) -> MemoryUpdate:
    made = fleet(BOXES.index(box) + 1, rows=64, width=8, seed=seed)[-1]
    return replace(
        made,
        fleet=FLEET,
        box=box,
        product=PRODUCT,
        round=round_,
        support=np.maximum(made.support, made.frames),
        nonce=f"{round_:016x}{BOXES.index(box):016x}",
        **changes,
    )


def with_nan(update: MemoryUpdate) -> Given:
    """An update whose first value of the rows is not a number, though its header and length are right."""
    data = encode_update(update)
    rows = update.rows.astype("<f2").tobytes()
    at = data.index(rows)
    return Given(update, data[:at] + np.array([np.nan], "<f2").tobytes() + data[at + 2 :])


@dataclass
class Ledger:
    """What was given and what came of it, step by step."""

    given: list[Mapping[str, Given]] = field(default_factory=list)
    verdicts: list[dict[str, Verdict]] = field(default_factory=list)
    banks: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def do(self, transport: Transport, step: Mapping[str, Given]) -> None:
        self.given.append(step)
        self.verdicts.append(transport.hand_over(step))


def keep_books(transport: Transport) -> Ledger:
    """Three steps: two of three boxes; then a duplicate, NaN and a late one; then another embedding and a good one."""
    ledger = Ledger()
    first = {box: given(updates_of(box, 1, 1)) for box in BOXES}
    ledger.do(transport, {A: first[A], B: first[B]})
    ledger.banks[A, 1], ledger.banks[B, 1] = transport.bank(A, 1), transport.bank(B, 1)
    ledger.do(transport, {A: first[A], B: with_nan(updates_of(B, 2, 2)), C: first[C]})
    other = updates_of(B, 3, 2, embedding_id="cd" * 32)
    ledger.do(transport, {A: given(updates_of(A, 3, 2)), B: given(other)})
    ledger.banks[A, 2], ledger.banks[C, 2] = transport.bank(A, 2), transport.bank(C, 2)
    return ledger


def decoded(payload: bytes) -> FleetBank:
    return decode_bank(payload, Limits())


def expected(updates: list[MemoryUpdate]) -> Aggregated:
    return aggregate(updates, settings=MERGE, seed=SEED)


class FleetContract:
    """The tests; a subclass gives the fixture ``ledger``, made by :func:`keep_books`."""

    def test_bank_is_that_of_the_same_updates_merged_here(self, ledger: Ledger) -> None:
        wanted = expected([ledger.given[0][box].update for box in (A, B)])

        bank = decoded(ledger.banks[A, 1])

        assert bank.rows.tobytes() == wanted.rows.tobytes()
        assert bank.mass.tobytes() == wanted.mass.tobytes()
        assert bank.boxes.tobytes() == wanted.boxes.tobytes()
        assert (bank.members, bank.version, bank.round) == ((A, B), 1, 1)

    def test_every_box_has_the_same_bytes(self, ledger: Ledger) -> None:
        assert ledger.banks[A, 1] == ledger.banks[B, 1]
        assert ledger.banks[A, 2] == ledger.banks[C, 2]

    def test_good_updates_count_in_their_round(self, ledger: Ledger) -> None:
        assert ledger.verdicts[0] == {A: Verdict(1), B: Verdict(1)}

    def test_same_update_again_counts_once(self, ledger: Ledger) -> None:
        assert ledger.verdicts[1][A] == Verdict(1)

    def test_update_that_is_not_finite_is_refused(self, ledger: Ledger) -> None:
        assert ledger.verdicts[1][B] == Verdict(0, Refusal.NOT_FINITE)

    def test_late_update_counts_in_the_next_round(self, ledger: Ledger) -> None:
        assert ledger.verdicts[1][C] == Verdict(2)

    def test_update_of_another_embedding_is_refused(self, ledger: Ledger) -> None:
        assert ledger.verdicts[2] == {A: Verdict(2), B: Verdict(0, Refusal.WRONG_EMBEDDING)}

    def test_second_bank_holds_the_late_and_the_new_update_and_nothing_else(self, ledger: Ledger) -> None:
        wanted = expected([ledger.given[1][C].update, ledger.given[2][A].update])

        bank = decoded(ledger.banks[A, 2])

        assert bank.rows.tobytes() == wanted.rows.tobytes()
        assert (bank.members, bank.version, bank.round) == ((A, C), 2, 2)
