"""What the aggregator answers a box: its round, where to go on with an update, a receipt, a bank. No sockets.

A receipt is given once the whole update is checked and on disk; every request may come again.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from edge.errors import FederationError, StoreError
from edge.federation.fields import format_time
from edge.federation.messages import Chunk, Fetch, Hello, Nothing, Offer, Part, Progress, Receipt, Resume, Welcome
from edge.federation.refusals import Refusal
from edge.federation.wire import decode_update

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploy.aggregator.records import Partial, Round
    from deploy.aggregator.round_settings import Clock, RoundSettings
    from deploy.aggregator.store import Store
    from edge.federation.messages import Reply
    from edge.federation.update import MemoryUpdate


def open_round(store: Store, settings: RoundSettings, clock: Clock, *, pool: str, number: int) -> None:
    """Begin a round of a pool, its deadline one period from now."""
    left = int(settings.period_s * 1e9)
    store.open_round(
        pool,
        number,
        opened=format_time(clock.utc()),
        boot=clock.boot(),
        deadline_ns=clock.now_ns() + left,
        left_ns=left,
    )


class Intake:
    """Answers requests of boxes whose identity is settled.

    A box has one update a round, product and sub-class: the same one may come again and again, a second and different
    one is refused, since the first has its receipt and the box has forgotten it.

    Every method raises FederationError where a request is refused, and StoreError where it cannot be stored.

    Args:
        store: where updates and banks are.
        settings: what is taken.
        clock: where time comes from.
        columns: of a pool's rows, for pools that have no bank yet; 0 where nobody knows.
    """

    def __init__(self, store: Store, *, settings: RoundSettings, clock: Clock, columns: Callable[[str], int]) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._columns = columns

    def hello(self, box: str, hello: Hello) -> Welcome:
        """Name the open round and the newest bank of a box's pool."""
        if hello.box != box:
            raise FederationError(Refusal.STOLEN_NAME, f"box: {hello.box!r} is claimed with the key of {box!r}")
        if hello.fleet != self._settings.fleet:
            raise FederationError(Refusal.WRONG_FLEET, f"fleet: {hello.fleet!r} is not {self._settings.fleet!r}")
        current = self._current(hello.embedding_id, hello.product)
        left = max(0, current.deadline_ns - self._clock.now_ns()) // 10**6
        return Welcome(
            id=hello.id,
            round=current.round,
            closes_in_ms=left,
            bank_version=self._store.newest(current.pool)[0],
            max_chunk=self._settings.max_chunk,
            max_update_bytes=self._settings.max_update_bytes,
        )

    def offer(self, box: str, offer: Offer) -> Reply:
        """Say from which byte on an update is wanted, or that it is stored already."""
        known = self._store.upload(box, offer.sha256)
        if known is not None:
            return Receipt(id=offer.id, sha256=offer.sha256, counted_in_round=known.round_counted)
        most = self._settings.max_update_bytes
        if offer.size > most:
            raise FederationError(Refusal.TOO_LARGE, f"size: {offer.size} bytes are over the limit of {most}")
        current = self._current(offer.embedding_id, offer.product)
        _check_round(offer.round, current.round)
        partial = self._store.partial(box, offer.sha256)
        if partial is None or (partial.pool, partial.round, partial.size) != (current.pool, offer.round, offer.size):
            if self._store.promised_bytes() + offer.size > self._settings.max_incoming_bytes:
                raise FederationError(Refusal.BUSY, "too many updates are on their way; try later")
            self._store.begin_partial(
                box=box, sha256=offer.sha256, pool=current.pool, round_=offer.round, size=offer.size
            )
            return Resume(id=offer.id, sha256=offer.sha256, offset=0)
        return Resume(id=offer.id, sha256=offer.sha256, offset=partial.stored)

    def chunk(self, box: str, chunk: Chunk, body: bytes) -> Reply:
        """Store bytes of an update; with the last of them check it and give the receipt."""
        partial = self._store.partial(box, chunk.sha256)
        if partial is None:
            known = self._store.upload(box, chunk.sha256)
            if known is None:
                raise FederationError(Refusal.BAD_OFFSET, "sha256: this update was not announced; offer it first")
            return Receipt(id=chunk.id, sha256=chunk.sha256, counted_in_round=known.round_counted)
        if chunk.offset != partial.stored:  # sent again, or after bytes that were lost: the offset puts it right
            return Progress(id=chunk.id, sha256=chunk.sha256, offset=partial.stored)
        end = partial.stored + len(body)
        if len(body) > self._settings.max_chunk or end > partial.size:
            raise FederationError(Refusal.TOO_LARGE, f"body: {len(body)} bytes at {chunk.offset} are too many")
        if end < partial.size:
            self._store.append_chunk(partial, body)
            return Progress(id=chunk.id, sha256=chunk.sha256, offset=end)
        try:
            counted = self._complete(partial, self._store.partial_bytes(partial) + body)
        except FederationError:
            self._store.drop_partial(partial)
            raise
        return Receipt(id=chunk.id, sha256=chunk.sha256, counted_in_round=counted)

    def _complete(self, partial: Partial, payload: bytes) -> int:
        """Store a whole update; returns the round that it counts in."""
        if hashlib.sha256(payload).hexdigest() != partial.sha256:
            raise FederationError(Refusal.BAD_HASH, "sha256: the bytes that arrived are others; offer the update again")
        update = decode_update(payload, self._settings.limits)
        with self._store.transaction():
            current = self._store.current_round(partial.pool)
            if current is None:
                raise FederationError(Refusal.BUSY, "the pool has no round; say hello again")
            self._check(update, partial, current)
            self._store.add_upload(
                pool=partial.pool,
                box=partial.box,
                product=update.product,
                subclass=update.subclass,
                round_sent=update.round,
                round_counted=current.round,
                sha256=partial.sha256,
                nonce=update.nonce,
                payload=payload,
            )
            self._store.drop_partial(partial)
        return current.round

    def _check(self, update: MemoryUpdate, partial: Partial, current: Round) -> None:
        """Refuse an update that does not belong where it was announced, or contradicts what is stored."""
        self._check_sender(update, partial)
        _check_round(update.round, current.round)
        self._check_rows(update, partial)
        if self._store.upload_by_nonce(update.nonce) is not None:
            raise FederationError(Refusal.REPLAYED_NONCE, "nonce: another update carried it")
        there = self._store.upload_of_round(
            pool=partial.pool, box=update.box, product=update.product, subclass=update.subclass, round_=update.round
        )
        if there is not None:
            raise FederationError(Refusal.ALREADY_COUNTED, f"round: {update.round} has another update of this box")

    def _check_sender(self, update: MemoryUpdate, partial: Partial) -> None:
        if update.box != partial.box:
            raise FederationError(Refusal.STOLEN_NAME, f"box: the update names {update.box!r}, not its sender")
        if update.fleet != self._settings.fleet:
            raise FederationError(Refusal.WRONG_FLEET, f"fleet: {update.fleet!r} is not {self._settings.fleet!r}")
        if update.embedding_id != partial.pool.partition("/")[0]:
            raise FederationError(Refusal.WRONG_EMBEDDING, "embedding_id: is not the one that was announced")
        if self._settings.pool(update.embedding_id, update.product) != partial.pool:
            raise FederationError(Refusal.WRONG_PRODUCT, f"product: {update.product!r} was not announced")
        if update.round != partial.round:
            raise FederationError(Refusal.MALFORMED, f"round: {update.round} is not the announced {partial.round}")

    def _check_rows(self, update: MemoryUpdate, partial: Partial) -> None:
        width = self._width(partial.pool)
        if width not in (0, update.rows.shape[1]):
            raise FederationError(Refusal.BAD_SHAPE, f"rows: {update.rows.shape[1]} columns, the pool has {width}")
        least = float(update.frames.min())
        if least < self._settings.min_frames:
            most = self._settings.min_frames
            raise FederationError(Refusal.SUPPORT_TOO_SMALL, f"frames: a row has {least:g}, at least {most:g} must")
        if float(update.frames.max()) > update.n_frames:
            raise FederationError(Refusal.BAD_SUPPORT, f"frames: a row has more than all {update.n_frames}")

    def fetch(self, fetch: Fetch) -> tuple[Reply, bytes]:
        """Give bytes of a bank."""
        pool = self._current(fetch.embedding_id, fetch.product).pool
        bank = self._store.bank(pool, fetch.version)
        if bank is None:
            return Nothing(id=fetch.id, bank_version=self._store.newest(pool)[0]), b""
        if fetch.offset >= bank.size:
            raise FederationError(Refusal.BAD_OFFSET, f"offset: {fetch.offset} is not below the size {bank.size}")
        body = self._store.bank_bytes(bank, fetch.offset, self._settings.max_chunk)
        part = Part(id=fetch.id, version=bank.version, size=bank.size, sha256=bank.sha256, offset=fetch.offset)
        return part, body

    def _current(self, embedding_id: str, product: str) -> Round:
        """The open round of a pool, the first one where the pool is new.

        Raises:
            FederationError: it is not served.
        """
        settings = self._settings
        if settings.embedding_ids and embedding_id not in settings.embedding_ids:
            raise FederationError(Refusal.WRONG_EMBEDDING, f"embedding_id: {embedding_id} is not served here")
        if settings.products and product not in settings.products:
            raise FederationError(Refusal.WRONG_PRODUCT, f"product: {product!r} is not served here")
        pool = settings.pool(embedding_id, product)
        current = self._store.current_round(pool)
        if current is not None:
            return current
        if len(self._store.pools()) >= settings.max_pools:
            raise FederationError(Refusal.BUSY, f"there are {settings.max_pools} pools already; raise max_pools")
        with self._store.transaction():
            open_round(self._store, settings, self._clock, pool=pool, number=self._store.add_pool(pool, embedding_id))
        found = self._store.current_round(pool)
        if found is None:
            raise StoreError(f"store {self._store.path}: the round of {pool} is not there after it was stored")
        return found

    def _width(self, pool: str) -> int:
        """Columns of the pool's rows, 0 where neither a bank nor a reference tells them yet."""
        return self._store.newest(pool)[1] or self._columns(pool)


def _check_round(named: int, current: int) -> None:
    """Take the open round and the one before it: a late update counts in the open one."""
    if named > current:
        raise FederationError(Refusal.FUTURE_ROUND, f"round: {named} has not begun, {current} is open")
    if named < current - 1:
        raise FederationError(Refusal.STALE_ROUND, f"round: {named} is too old, {current} is open")
