"""The round engine: answers boxes, closes rounds at k of n or at their deadline, keeps all of it in the store.

It must not know sockets or keys: who asks is settled before.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from deploy.aggregator.intake import Intake, open_round
from deploy.aggregator.records import EventKind, RoundState, UploadState
from deploy.aggregator.round_settings import Clock
from deploy.aggregator.store_file import StoreFullError
from edge.errors import FederationError, LinewardError, StoreError
from edge.federation.fields import format_time, parse_time
from edge.federation.messages import Chunk, Hello, Offer
from edge.federation.refusals import Refusal
from edge.federation.update import FleetBank
from edge.federation.wire import encode_bank

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from deploy.aggregator.closing import Closing, Decision
    from deploy.aggregator.records import Round
    from deploy.aggregator.round_settings import RoundSettings
    from deploy.aggregator.store import Store
    from edge.federation.messages import Reply, Request

LOG = logging.getLogger("lineward.aggregator")
_SAVE_NS = 30 * 10**9  # how much of a round's time a power cut can add to it
_EVENT_NS = 10 * 10**9  # one event for a box and a code in this time: a box in a loop does not fill the disk
_MAX_ATTEMPTS = 10
_RETRY_NS = 5 * 10**9
_LONGEST_WAIT_S = 1.0
_SECURITY = frozenset({Refusal.STOLEN_NAME, Refusal.REPLAYED_NONCE, Refusal.REVOKED, Refusal.WRONG_FLEET})
_QUIET = frozenset({Refusal.BUSY, Refusal.NO_SPACE})


class Merge(Protocol):
    """What closing a round computes."""

    def __call__(self, store: Store, pool: str, round_: int) -> Closing:
        """Examine and merge a round's updates."""

    def columns(self, pool: str) -> int:
        """Columns of a pool's rows as the trainer's reference has them, 0 where there is none."""


class Rounds:
    """Rounds of all pools of one fleet. All calls come from one thread; merging runs where ``submit`` puts it.

    A round's time is counted since boot, never by the wall clock: setting that clock moves no deadline. A restart
    resumes it; after a reboot what was left when last noted, at most 30 s before, is left again.

    Args:
        store: what survives; the engine itself remembers nothing that matters.
        settings: when a round closes, and what is taken.
        merge: what closing a round computes, see :class:`.closing.Merger`.
        submit: runs a function elsewhere, as an executor's method of this name does.
        clock: where time comes from.
    """

    def __init__(
        self,
        store: Store,
        *,
        settings: RoundSettings,
        merge: Merge,
        submit: Callable[[Callable[[], Closing]], Future[Closing]],
        clock: Clock | None = None,
    ) -> None:
        self.trouble = ""
        self._store = store
        self._settings = settings
        self._merge = merge
        self._submit = submit
        self._clock = clock or Clock()
        self._intake = Intake(store, settings=settings, clock=self._clock, columns=merge.columns)
        self._job: tuple[Round, Future[Closing]] | None = None
        self._not_before = 0
        self._saved = self._clock.now_ns()
        self._noted: dict[tuple[str, Refusal], int] = {}
        self._resume()

    def handle(self, box: str, request: Request, body: bytes) -> tuple[Reply, bytes]:
        """Answer a request of a box whose identity is settled.

        Args:
            box: name that belongs to the key it was sent with.
            request: what it asks.
            body: of a chunk.

        Returns:
            The reply and its body.

        Raises:
            FederationError: it is refused, and the banks are as they were; noted as an event.
        """
        try:
            if isinstance(request, Hello):
                return self._intake.hello(box, request), b""
            if isinstance(request, Offer):
                return self._intake.offer(box, request), b""
            if isinstance(request, Chunk):
                return self._intake.chunk(box, request, body), b""
            return self._intake.fetch(request)
        except FederationError as error:
            self.alarm(error.code, box, str(error))
            raise
        except StoreError as error:
            LOG.warning("%s", error)
            self.trouble = str(error)
            code = Refusal.NO_SPACE if isinstance(error, StoreFullError) else Refusal.BUSY
            raise FederationError(code, "the aggregator cannot store anything now; keep it and try later") from error

    def alarm(self, code: Refusal, box: str, text: str) -> None:
        """Note a refusal as an event; one in ten seconds for a box and a code."""
        now = self._clock.now_ns()
        last = self._noted.get((box, code))
        if code in _QUIET or (last is not None and now - last < _EVENT_NS):
            return
        self._noted[box, code] = now
        kind = EventKind.SECURITY if code in _SECURITY else EventKind.REFUSAL
        try:
            self._store.add_event(kind, text, box=box, code=code.value)
        except StoreError as error:
            LOG.warning("%s", error)

    def tick(self) -> float:
        """Close what is due and take in what was merged.

        Returns:
            Seconds until it wants to be called again, at most 1.
        """
        now = self._clock.now_ns()
        if now < self._not_before:
            return min(_LONGEST_WAIT_S, (self._not_before - now) / 1e9)
        try:
            self._take_in()
            for item in self._store.rounds(state=RoundState.OPEN):
                self._close_if_due(item, now)
            self._begin_merging()
            self._note_time_left(now)
            soonest = min((item.deadline_ns for item in self._store.rounds(state=RoundState.OPEN)), default=now)
        except StoreError as error:
            if str(error) != self.trouble:
                LOG.warning("%s; trying again every %d s", error, _RETRY_NS // 10**9)
            self.trouble = str(error)
            self._not_before = now + _RETRY_NS
            return _LONGEST_WAIT_S
        self.trouble = ""
        wait = (soonest - now) / 1e9 if soonest > now else _LONGEST_WAIT_S
        return min(_LONGEST_WAIT_S, wait, 0.05 if self._job else _LONGEST_WAIT_S)

    @property
    def merging(self) -> bool:
        """Whether a round is being merged now."""
        return self._job is not None

    def _resume(self) -> None:
        """Give open rounds a deadline of this boot, no later than a whole period from now."""
        now, boot, period = self._clock.now_ns(), self._clock.boot(), int(self._settings.period_s * 1e9)
        with self._store.transaction():
            for item in self._store.rounds(state=RoundState.OPEN):
                left = item.deadline_ns - now if boot and item.boot == boot else item.remaining_ns
                left = min(left, period)
                self._store.set_deadline(item, boot=boot, deadline_ns=now + left, left_ns=max(0, left))

    def _note_time_left(self, now: int) -> None:
        if now - self._saved < _SAVE_NS:
            return
        self._saved = now
        with self._store.transaction():
            for item in self._store.rounds(state=RoundState.OPEN):
                left = max(0, item.deadline_ns - now)
                self._store.set_deadline(item, boot=item.boot, deadline_ns=item.deadline_ns, left_ns=left)

    def _close_if_due(self, item: Round, now: int) -> None:
        boxes = self._store.waiting_boxes(item.pool, item.round)
        if boxes < self._settings.close_at and now < item.deadline_ns:
            return
        if boxes < self._settings.min_boxes:
            left = int(self._settings.period_s * 1e9)
            note = f"extended: {boxes} of at least {self._settings.min_boxes} boxes at its deadline"
            with self._store.transaction():
                self._store.set_deadline(item, boot=self._clock.boot(), deadline_ns=now + left, left_ns=left, note=note)
                if boxes:
                    self._store.add_event(EventKind.ROUND, f"round {item.round}: {note}", pool=item.pool)
            return
        with self._store.transaction():
            self._store.set_round_state(
                item.pool, item.round, RoundState.CLOSING, closed=format_time(self._clock.utc())
            )
            open_round(self._store, self._settings, self._clock, pool=item.pool, number=item.round + 1)
            self._store.drop_partials_before(item.pool, item.round)
        LOG.info("pool %s: round %d closes with %d boxes", item.pool, item.round, boxes)

    def _begin_merging(self) -> None:
        if self._job is not None:
            return
        item = next(iter(self._store.rounds(state=RoundState.CLOSING)), None)
        if item is None:
            return
        if item.attempts >= _MAX_ATTEMPTS:
            self._fail(item, f"merging it was begun {item.attempts} times and never ended")
            return
        self._store.count_attempt(item.pool, item.round)
        store, merge = self._store, self._merge
        self._job = (item, self._submit(lambda: merge(store, item.pool, item.round)))

    def _take_in(self) -> None:
        if self._job is None or not self._job[1].done():
            return
        item, future = self._job
        self._job = None
        error = future.exception()
        if error is None:
            self._finish(item, future.result())
        elif isinstance(error, LinewardError) and not isinstance(error, StoreError):
            self._fail(item, str(error))
        else:
            LOG.error("pool %s: merging round %d failed, trying again", item.pool, item.round, exc_info=error)
            self._not_before = self._clock.now_ns() + _RETRY_NS

    def _finish(self, item: Round, closing: Closing) -> None:
        """Store what closing a round came to: the bank and what became of its uploads, together."""
        with self._store.transaction():
            there = [r.round for r in self._store.rounds(state=RoundState.CLOSING, pool=item.pool)]
            if item.round not in there:
                return  # the store was begun anew meanwhile
            self._decide(item, closing)
            if closing.merged is None:
                note = f"void: {len(closing.members)} of at least {self._settings.min_boxes} boxes passed the gates"
                self._store.set_round_state(item.pool, item.round, RoundState.VOID, note=note)
                self._store.add_event(EventKind.ROUND, f"round {item.round}: {note}", pool=item.pool)
            else:
                version = self._add_bank(item, closing)
                note = f"bank {version} of {len(closing.members)} boxes"
                self._store.set_round_state(item.pool, item.round, RoundState.CLOSED, note=note)
            settings = self._settings
            self._store.prune(
                item.pool,
                keep_banks=settings.keep_banks,
                before_round=item.round - settings.keep_rounds + 1,
                keep_quarantined=settings.keep_quarantined,
            )
        LOG.info("pool %s: round %d: %s", item.pool, item.round, note)

    def _decide(self, item: Round, closing: Closing) -> None:
        for decision in closing.decisions:
            if decision.state is UploadState.ACCEPTED and closing.merged is None:
                self._store.set_upload(decision.upload, UploadState.WAITING, round_counted=item.round + 1)
                continue
            self._store.set_upload(decision.upload, decision.state, reasons=decision.reasons)
            if decision.state is not UploadState.ACCEPTED:
                self._tell(item, decision)

    def _tell(self, item: Round, decision: Decision) -> None:
        upload = self._store.upload_by_id(decision.upload)
        box = "" if upload is None else upload.box
        text = f"round {item.round}: update {decision.upload} is {decision.state.value}: {'; '.join(decision.reasons)}"
        self._store.add_event(EventKind.QUARANTINE, text, pool=item.pool, box=box, code=decision.state.value)
        LOG.warning("pool %s: box %s: %s", item.pool, box, text)

    def _add_bank(self, item: Round, closing: Closing) -> int:
        merged = closing.merged
        if merged is None:
            raise StoreError(f"round {item.round} of {item.pool} has no bank to store")
        version = self._store.last_version(item.pool) + 1
        created = item.closed or item.opened
        bank = FleetBank(
            fleet=self._settings.fleet,
            pool=item.pool,
            embedding_id=item.pool.partition("/")[0],
            version=version,
            round=item.round,
            rows=merged.rows,
            mass=merged.mass,
            boxes=merged.boxes,
            members=closing.members,
            created=parse_time(created),
        )
        self._store.add_bank(
            pool=item.pool,
            version=version,
            round_=item.round,
            columns=merged.rows.shape[1],
            payload=encode_bank(bank),
            inputs=closing.inputs,
            origin=f"round {item.round}",
            created=created,
        )
        return version

    def _fail(self, item: Round, why: str) -> None:
        """End a round that cannot be merged; its updates wait for an operator."""
        reason = f"round {item.round} could not be merged: {why}"
        with self._store.transaction():
            for upload in self._store.uploads(pool=item.pool, round_counted=item.round, state=UploadState.WAITING):
                self._store.set_upload(upload.id, UploadState.QUARANTINED, reasons=(reason,))
            self._store.set_round_state(item.pool, item.round, RoundState.FAILED, note=why[:500])
            self._store.add_event(EventKind.QUARANTINE, reason, pool=item.pool, code=RoundState.FAILED.value)
        LOG.error("pool %s: %s", item.pool, reason)
