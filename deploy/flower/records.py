"""The content of the four Flower messages of a round, to values and back. It must not know who sends them.

A memory travels as the very bytes that also travel over ZeroMQ, in one bytes field, so that one parser guards both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ConfigRecord, RecordDict

from deploy.flower.exchange import Invitation, Outcome
from edge.errors import FederationError
from edge.federation.refusals import Refusal

ASK = "query.update"
"""Message type by which a box is asked for its update."""
TELL = "query.bank"
"""Message type that carries what became of the update, and the fleet's memory."""
_RECORD = "lineward"
_ROUNDS = "rounds"
_MAX_REASON = 500  # characters
_V = TypeVar("_V", str, int, bytes)


@dataclass(frozen=True, slots=True)
class Told:
    """What a box is told at the end of a round.

    Attributes:
        outcome: of its update; None where it gave none.
        bank: bytes of the newest fleet memory of its pool, or None.
    """

    outcome: Outcome | None
    bank: bytes | None


def ask(invitation: Invitation, *, ticket: str) -> RecordDict:
    """The content of :data:`ASK`.

    Args:
        invitation: what is asked.
        ticket: a random text that only the box that is asked can repeat. Flower 1.41 binds a reply to the node that
            was asked, not to the node that sends it; that is enough only while the message cannot be guessed.
    """
    record = _wrap(fleet=invitation.fleet, max_update_bytes=invitation.max_update_bytes, ticket=ticket)
    record[_ROUNDS] = ConfigRecord(dict(invitation.rounds))
    return record


def read_ask(content: RecordDict) -> Invitation:
    """The inverse of :func:`ask`.

    Raises:
        FederationError: ``malformed``.
    """
    record, rounds = _unwrap(content), _unwrap(content, _ROUNDS)
    return Invitation(
        fleet=_field(record, "fleet", str),
        rounds={pool: _field(rounds, pool, int) for pool in rounds},
        max_update_bytes=_field(record, "max_update_bytes", int),
    )


def read_ticket(content: RecordDict) -> str:
    """The ticket of any of the four messages.

    Raises:
        FederationError: ``malformed``.
    """
    return _field(_unwrap(content), "ticket", str)


def answer(update: bytes | None, *, ticket: str) -> RecordDict:
    """The content of the reply to :data:`ASK`: the bytes of an update, or nothing."""
    return _wrap(ticket=ticket) if update is None else _wrap(ticket=ticket, update=update)


def read_answer(content: RecordDict) -> bytes | None:
    """The inverse of :func:`answer`; the bytes may be anything.

    Raises:
        FederationError: ``malformed``.
    """
    record = _unwrap(content)
    return _field(record, "update", bytes) if "update" in record else None


def tell(told: Told, *, ticket: str) -> RecordDict:
    """The content of :data:`TELL`; ``ticket`` as in :func:`ask`."""
    record: dict[str, str | int | bytes] = {"ticket": ticket}
    if told.bank is not None:
        record["bank"] = told.bank
    if told.outcome is not None:
        record["sha256"] = told.outcome.sha256
        record["counted_in_round"] = told.outcome.counted_in_round
        record["refused"] = told.outcome.refused.value if told.outcome.refused else ""
        record["reason"] = told.outcome.reason[:_MAX_REASON]
    return _wrap(**record)


def read_tell(content: RecordDict) -> Told:
    """The inverse of :func:`tell`; a refusal of a later version reads as ``other``.

    Raises:
        FederationError: ``malformed``.
    """
    record = _unwrap(content)
    outcome = None
    if "sha256" in record:
        code = _field(record, "refused", str)
        outcome = Outcome(
            sha256=_field(record, "sha256", str),
            counted_in_round=_field(record, "counted_in_round", int),
            refused=_refusal(code) if code else None,
            reason=_field(record, "reason", str)[:_MAX_REASON],
        )
    return Told(outcome, _field(record, "bank", bytes) if "bank" in record else None)


def kept(version: int, *, ticket: str) -> RecordDict:
    """The content of the reply to :data:`TELL`: the version of the bank that the box keeps; 0 for none."""
    return _wrap(ticket=ticket, version=version)


def read_kept(content: RecordDict) -> int:
    """The inverse of :func:`kept`.

    Raises:
        FederationError: ``malformed``.
    """
    return _field(_unwrap(content), "version", int)


def _wrap(**fields: str | int | bytes) -> RecordDict:
    return RecordDict({_RECORD: ConfigRecord(dict(fields))})


def _unwrap(content: RecordDict, name: str = _RECORD) -> ConfigRecord:
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise FederationError(Refusal.MALFORMED, f"{name}: no such record; update the older of the two sides")
    return record


def _field(record: ConfigRecord, name: str, kind: type[_V]) -> _V:
    value = record.get(name)
    if type(value) is not kind:  # bool is an int
        raise FederationError(Refusal.MALFORMED, f"{name}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _refusal(code: str) -> Refusal:
    try:
        return Refusal(code)
    except ValueError:
        return Refusal.OTHER
