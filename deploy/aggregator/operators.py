"""What an operator may do to the aggregator's store, beside the running service: look, roll back, release, dismiss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from deploy.aggregator.closing import own_limits
from deploy.aggregator.records import EventKind, UploadState
from edge.errors import UsageError
from edge.federation.fields import format_time
from edge.federation.wire import decode_bank, encode_bank

if TYPE_CHECKING:
    from datetime import datetime

    from deploy.aggregator.records import Bank, Round, Upload
    from deploy.aggregator.store import Store


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How a pool is doing.

    Attributes:
        pool: its name.
        round: the open one.
        waiting: boxes whose updates wait for it to close.
        bank: the newest, None before the first.
        quarantined: updates that wait for an operator.
    """

    pool: str
    round: Round | None
    waiting: int
    bank: Bank | None
    quarantined: tuple[Upload, ...]


def status(store: Store) -> list[PoolStatus]:
    """How all pools are doing, by name."""
    found = []
    for pool in store.pools():
        current = store.current_round(pool)
        waiting = 0 if current is None else store.waiting_boxes(pool, current.round)
        held = tuple(store.uploads(pool=pool, state=UploadState.QUARANTINED))
        found.append(PoolStatus(pool, current, waiting, store.bank(pool), held))
    return found


def roll_back(store: Store, pool: str, version: int, *, now: datetime) -> int:
    """Make a kept bank the newest again, under a new version: boxes fetch what is newer than what they have.

    Args:
        store: of the aggregator.
        pool: name of the pool.
        version: of a bank that is kept.
        now: UTC.

    Returns:
        The new version.

    Raises:
        UsageError: there is no such pool or bank, or it is the newest already.
        StoreError: it cannot be stored.
    """
    with store.transaction():
        banks = store.banks(pool)
        old = next((bank for bank in banks if bank.version == version), None)
        if old is None:
            kept = ", ".join(str(bank.version) for bank in banks) or "none"
            raise UsageError(f"pool {pool} has no bank {version}; kept are: {kept}")
        if old is banks[0]:
            raise UsageError(f"bank {version} is the newest of pool {pool} already; nothing to do")
        new = store.last_version(pool) + 1
        bank = decode_bank(store.bank_bytes(old), own_limits(old))
        store.add_bank(
            pool=pool,
            version=new,
            round_=old.round,
            columns=old.columns,
            payload=encode_bank(replace(bank, version=new, created=now)),
            inputs=old.inputs,
            origin=f"rollback to {version}",
            created=format_time(now),
        )
        text = f"bank {new} has the rows of bank {version}: rolled back by an operator"
        store.add_event(EventKind.OPERATOR, text, pool=pool)
    return new


def release(store: Store, number: int) -> int:
    """Let a quarantined update count in the open round of its pool, without being examined again.

    Returns:
        The round that it counts in.

    Raises:
        UsageError: there is no such update, or it is not quarantined.
        StoreError: it cannot be stored.
    """
    with store.transaction():
        upload = _quarantined(store, number)
        current = store.current_round(upload.pool)
        if current is None:
            raise UsageError(f"pool {upload.pool} has no open round; start the service first")
        store.set_upload(number, UploadState.WAITING, round_counted=current.round, released=True)
        text = f"update {number} of {upload.box} was released by an operator; it counts in round {current.round}"
        store.add_event(EventKind.OPERATOR, text, pool=upload.pool, box=upload.box)
    return current.round


def dismiss(store: Store, number: int) -> None:
    """Refuse a quarantined update for good.

    Raises:
        UsageError: there is no such update, or it is not quarantined.
        StoreError: it cannot be stored.
    """
    with store.transaction():
        upload = _quarantined(store, number)
        store.set_upload(number, UploadState.REFUSED, reasons=(*upload.reasons, "dismissed by an operator"))
        text = f"update {number} of {upload.box} was dismissed by an operator"
        store.add_event(EventKind.OPERATOR, text, pool=upload.pool, box=upload.box)


def _quarantined(store: Store, number: int) -> Upload:
    upload = store.upload_by_id(number)
    if upload is None or upload.state is not UploadState.QUARANTINED:
        held = ", ".join(str(item.id) for item in store.uploads(state=UploadState.QUARANTINED)) or "none"
        raise UsageError(f"update {number} is not quarantined; these are: {held}")
    return upload
