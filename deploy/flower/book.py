"""The aggregator's durable rounds as an engine of whole updates asks for them. It must not know Flower.

Every update goes through :meth:`.rounds.Rounds.handle`, as one that comes over ZeroMQ does, chunk by chunk.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING

from deploy.aggregator.closing import Merger
from deploy.aggregator.examiner import CanaryFolder, Examiner, read_references
from deploy.aggregator.notices import Notices
from deploy.aggregator.records import RoundState
from deploy.aggregator.round_settings import Clock
from deploy.aggregator.rounds import Rounds
from deploy.aggregator.settings import load_settings
from deploy.aggregator.store import Store
from deploy.flower.exchange import Invitation, Outcome
from edge.errors import FederationError, StoreError
from edge.federation.messages import Chunk, Offer, Receipt, Resume
from edge.federation.refusals import Refusal
from edge.federation.wire import decode_update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from deploy.aggregator.closing import Closing
    from deploy.aggregator.round_settings import RoundSettings
    from edge.federation.update import MemoryUpdate

LOG = logging.getLogger("lineward.flower")


class RoundsBook:
    """Rounds for :class:`.rounds.Conductor`.

    Args:
        store: what survives.
        rounds: the engine on it.
        settings: its settings.
        answer_s: a deadline that is over or nearly so is put off until then: nobody ran the rounds meanwhile, so
            nobody could be asked.
        notices: told to look at the store's events, after each tick.
        clock: where time comes from.
    """

    def __init__(
        self,
        store: Store,
        rounds: Rounds,
        settings: RoundSettings,
        *,
        answer_s: float,
        notices: Callable[[], object] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        self._notices = notices
        self._store = store
        self._rounds = rounds
        self._settings = settings
        self._clock = clock or Clock()
        self._put_off(round(answer_s * 1e9))
        self._unfinished = self._deadlines()
        self._idle_since_ns = self._clock.now_ns()
        # Which bank a box wants is known by its updates, as far back as they are kept.
        self._pools = {upload.box: upload.pool for upload in sorted(store.uploads(), key=lambda upload: upload.id)}

    def invitation(self) -> Invitation:
        """The open round of each pool."""
        rounds = {item.pool: item.round for item in self._store.rounds(state=RoundState.OPEN)}
        return Invitation(self._settings.fleet, rounds, self._settings.max_update_bytes)

    def take(self, box: str, update: bytes) -> Outcome:
        """Check and store an update.

        Args:
            box: name that belongs to the key it was sent with.
            update: bytes that may be anything.
        """
        digest = hashlib.sha256(update).hexdigest()
        try:
            try:
                decoded = decode_update(update, self._settings.limits)
            except FederationError as error:
                self._rounds.alarm(error.code, box, str(error))
                raise
            counted = self._store_update(box, decoded, update, digest)
        except FederationError as error:
            return Outcome(digest, refused=error.code, reason=str(error))
        self._pools[box] = self._settings.pool(decoded.embedding_id, decoded.product)
        return Outcome(digest, counted_in_round=counted)

    def tick(self) -> int:
        """Close what is due.

        Returns:
            Rounds whose bank is stored, or that were found to make none, or that had to be extended, since the last
            call; 1 too for a whole period in which there was no round, for want of any update.
        """
        self._rounds.tick()
        try:
            self._notices()
            now = self._deadlines()
        except StoreError as error:  # a full disk, say; the engine tries again, and so do the boxes
            LOG.warning("%s", error)
            return 0
        ended = sum(1 for key, deadline in self._unfinished.items() if now.get(key) != deadline)
        self._unfinished = now
        if now or ended:
            self._idle_since_ns = self._clock.now_ns()
        elif self._clock.now_ns() - self._idle_since_ns >= self._settings.period_s * 1e9:
            self._idle_since_ns, ended = self._clock.now_ns(), 1
        return ended

    def newest(self, box: str) -> int:
        """Version of the newest bank of the pool of a box's last update; 0 for none."""
        bank = self._store.bank(self._pools[box]) if box in self._pools else None
        return 0 if bank is None else bank.version

    def bank(self, box: str) -> bytes | None:
        """That bank."""
        bank = self._store.bank(self._pools[box]) if box in self._pools else None
        return None if bank is None else self._store.bank_bytes(bank)

    def _put_off(self, left: int) -> None:
        now = self._clock.now_ns()
        with self._store.transaction():
            for item in self._store.rounds(state=RoundState.OPEN):
                if item.deadline_ns < now + left:
                    self._store.set_deadline(item, boot=self._clock.boot(), deadline_ns=now + left, left_ns=left)

    def _deadlines(self) -> dict[tuple[str, int], int]:
        """Deadline of each round that has not ended: extending a round moves it; closing it does not."""
        states = (RoundState.OPEN, RoundState.CLOSING)
        return {
            (item.pool, item.round): item.deadline_ns for state in states for item in self._store.rounds(state=state)
        }

    def _store_update(self, box: str, decoded: MemoryUpdate, update: bytes, digest: str) -> int:
        """Offer an update and hand over its chunks; returns the round that it counts in."""
        offer = Offer(
            id=0,
            embedding_id=decoded.embedding_id,
            product=decoded.product,
            round=decoded.round,
            sha256=digest,
            size=len(update),
        )
        reply, _ = self._rounds.handle(box, offer, b"")
        step = self._settings.max_chunk
        start = reply.offset if isinstance(reply, Resume) else 0
        for offset in range(start, len(update), step):
            if isinstance(reply, Receipt):
                break
            reply, _ = self._rounds.handle(
                box, Chunk(id=0, sha256=digest, offset=offset), update[offset : offset + step]
            )
        if not isinstance(reply, Receipt):
            raise FederationError(Refusal.BUSY, "the update was not stored; it is asked for again")
        return reply.counted_in_round


@contextlib.contextmanager
def open_book(path: Path, *, answer_s: float, patience_s: float = 30.0) -> Iterator[RoundsBook]:
    """The rounds of an aggregator's settings file, the same that ``lineward aggregate run`` reads.

    ``listen``, ``key_file`` and ``boxes`` are ZeroMQ's and are not used. Only one process serves a store at a time.

    Args:
        path: of the file.
        answer_s: as in :class:`RoundsBook`.
        patience_s: how long to try to open the store. Where SuperLink was killed, its ServerApp is a process that
            notices some seconds later, and has the store until then.

    Raises:
        SettingsError: the file cannot be read.
        DataError: canaries or references cannot be read.
        BundleError: a reference is damaged.
        StoreError: the store cannot be opened, or another aggregator serves it.
        OutboxError: the outbox of the notices cannot be opened.
    """
    settings = load_settings(path)
    merger = Merger(
        gate=Examiner(settings.gates, CanaryFolder(settings.canaries)),
        settings=settings.merge,
        min_boxes=settings.rounds.min_boxes,
        limits=settings.rounds.limits,
        carry_rounds=settings.rounds.carry_rounds,
        references=read_references(settings.references),
        seed=settings.seed,
        threads=settings.threads,
    )
    with _open_store(settings.store, patience_s) as store, contextlib.closing(Notices(settings, store)) as notices:
        if store.damage:
            LOG.error("%s: %s", settings.store, store.damage)
        rounds = Rounds(store, settings=settings.rounds, merge=merger, submit=_at_once)
        yield RoundsBook(store, rounds, settings.rounds, answer_s=answer_s, notices=notices.look)


def _open_store(path: Path, patience_s: float) -> Store:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return Store(path)
        except StoreError as error:
            if time.monotonic() >= deadline:
                raise
            LOG.info("%s; trying again", error)
        time.sleep(min(1.0, patience_s))


def _at_once(work: Callable[[], Closing]) -> Future[Closing]:
    """Merge here and now: nobody waits for an answer meanwhile, Flower keeps the messages."""
    future: Future[Closing] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 (whoever takes the future in gets it)
        future.set_exception(error)
    return future
