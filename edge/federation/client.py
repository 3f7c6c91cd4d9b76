"""FederationClient: takes updates to the aggregator and brings fleet memories back, in a thread of its own.

What is sent lies in the spool until its receipt. It must not know what a memory is for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import zmq

from edge.errors import FederationError, StoreError
from edge.federation.connection import Connection, LinkDownError, LinkKind, LinkState, StoppedError
from edge.federation.pace import Pace
from edge.federation.refusals import Refusal
from edge.federation.session import Member, Session
from edge.federation.spool import Spool
from edge.federation.wire import Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge.federation.keys import KeyPair
    from edge.federation.messages import Welcome
    from edge.federation.spool import Upload
    from edge.federation.update import FleetBank, MemoryUpdate

LOG = logging.getLogger("lineward.federation")
# These say who we are, not what we sent: a person has to act, and nothing else on this connection will be taken.
_NOT_TAKEN = frozenset({Refusal.REVOKED, Refusal.UNKNOWN_BOX, Refusal.STOLEN_NAME, Refusal.BAD_VERSION})


class FederationClient:
    """A box's link to its aggregator; see :class:`edge.federation.link.FleetLink` for what its user may expect.

    Args:
        address: of the aggregator, ``tcp://host:port``.
        server_key: its public key, Z85.
        keys: the box's own pair.
        fleet: name of the fleet.
        box: ``<site>/<box>``; the aggregator takes it only from the key that it enrolled under this name.
        product: what the box judges.
        subclass: variant of the product; may be empty.
        embedding_id: 64 hex digits; banks of this space are fetched.
        path: file of the spool.
        limits: of a bank that is fetched.
        poll_s: seconds between two looks for a new bank.
        connect_s: seconds until a connection must stand, handshake included.
        reply_s: seconds without an answer after which a connection counts as dead. There is no time-out for a
            transfer: each chunk that arrives is progress, and slow links get small chunks.
        backoff_min_s: first pause between two attempts; then doubled.
        backoff_max_s: longest pause.

    Raises:
        StoreError: the spool cannot be opened.
    """

    def __init__(
        self,
        *,
        address: str,
        server_key: str,
        keys: KeyPair,
        fleet: str,
        box: str,
        product: str,
        embedding_id: str,
        path: Path,
        subclass: str = "",
        limits: Limits | None = None,
        poll_s: float = 10.0,
        connect_s: float = 10.0,
        reply_s: float = 30.0,
        backoff_min_s: float = 0.5,
        backoff_max_s: float = 8.0,
    ) -> None:
        self._address = address
        self._server_key = server_key
        self._keys = keys
        self._member = Member(fleet, box, product, subclass, embedding_id)
        self._limits = limits or Limits()
        self._poll_s = poll_s
        self._times = {"connect_s": connect_s, "reply_s": reply_s}
        self._backoff = (backoff_min_s, backoff_max_s)
        self._spool = Spool(path)
        self._round = self._spool.round
        self._pace = Pace()
        self._state = LinkState(LinkKind.DISABLED, "not started")
        self._changed = threading.Condition()
        self._counts: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._last_error = ""
        self._held_until = 0.0
        self._holds = 0
        self._stopping = threading.Event()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closed = False
        self._bank, self._version = self._stored_bank()
        self._thread = threading.Thread(target=self._run, name="federation", daemon=True)

    def __enter__(self) -> FederationClient:  # noqa: PYI034 (Self needs Python 3.11)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(5.0)

    @property
    def state(self) -> LinkState:
        """Where the link stands; ``reason`` names the cure where a person is needed."""
        return self._state

    @property
    def round(self) -> int:
        """The round that the aggregator collects for, as it said last; 1 before it said anything."""
        return self._round

    @property
    def waiting(self) -> int:
        """Updates that have no receipt yet."""
        return self._spool.waiting

    @property
    def last_error(self) -> str:
        """What went wrong last; empty as long as nothing has."""
        return self._last_error

    @property
    def counters(self) -> dict[str, Any]:
        """Since the start, for the status; JSON values.

        ``connections``, ``receipts``, ``banks``, ``bytes_sent`` and ``bytes_received`` (updates and banks without
        headers), ``given_up`` (updates pushed out by newer ones), ``refused`` (a number for each code).
        """
        counts = {
            name: self._counts[name] for name in ("connections", "receipts", "banks", "bytes_sent", "bytes_received")
        }
        more = {"given_up": self._spool.given_up, "refused": dict(self._refusals), "round": self._round}
        return {**counts, **more, "bank_version": self._version, "damage": self._spool.damage}

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def stop(self, timeout: float = 2.0) -> None:
        """End within ``timeout`` seconds; what is not delivered stays in the spool. Stopping again does nothing."""
        self._stopping.set()
        if self._closed:
            return
        os.eventfd_write(self._stop, 1)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._thread.is_alive():
            LOG.warning("the link to the aggregator does not stop; left behind")
            return
        self._closed = True
        self._spool.close()
        os.close(self._stop)
        os.close(self._wake)

    def submit(self, update: MemoryUpdate) -> None:
        """Keep an update, on disk when this returns, and send it until its receipt comes.

        Raises:
            FederationError: it cannot be encoded.
            StoreError: it cannot be stored; a later call may succeed.
        """
        self._spool.put(update)
        os.eventfd_write(self._wake, 1)

    def poll_bank(self) -> FleetBank | None:
        """Return the newest fleet memory where this object has not returned it before, else None."""
        with self._changed:
            bank, self._bank = self._bank, None
            return bank

    def wait_for(self, what: Callable[[], object], timeout: float) -> bool:
        """Wait until ``what()`` is true, looked at whenever state, counters or bank have changed."""
        with self._changed:
            return bool(self._changed.wait_for(what, timeout))

    def _stored_bank(self) -> tuple[FleetBank | None, int]:
        stored = self._spool.bank(self._member.pool)
        if stored is None:
            return None, 0
        version, payload = stored
        try:
            return self._member.check_bank(payload, version, self._limits), version
        except FederationError as error:
            # Written by another version of this program, perhaps; it is fetched again.
            LOG.warning("the stored fleet memory is not used: %s", error)
            return None, 0

    def _set(self, kind: LinkKind, reason: str = "") -> None:
        before, state = self._state, LinkState(kind, reason)
        if state != before:
            said = LOG.info if kind in {LinkKind.CONNECTED, LinkKind.CONNECTING, LinkKind.DISABLED} else LOG.warning
            said("federation %s%s", kind.value, f": {reason}" if reason else "")
        with self._changed:
            self._state = state
            if kind in {LinkKind.REFUSED, LinkKind.UNREACHABLE, LinkKind.WRONG_SERVER_KEY}:
                self._last_error = reason
            self._changed.notify_all()

    def _count(self, name: str, number: int = 1) -> None:
        with self._changed:
            self._counts[name] += number
            self._changed.notify_all()

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        last = LinkState(LinkKind.DISABLED, "stopped")
        try:
            self._keep_connected(context)
        except StoppedError:
            pass
        except BaseException as error:
            last = LinkState(LinkKind.UNREACHABLE, f"ended by a defect: {error!r}")
            raise
        finally:
            context.destroy(linger=0)
            self._set(last.kind, last.reason)

    def _keep_connected(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        least, most = self._backoff
        delay, broken_off = least, 0
        while True:
            # A trouble stays visible until the next success: else every attempt would be two changes of state.
            if self._state.kind is LinkKind.DISABLED:
                self._set(LinkKind.CONNECTING)
            welcomed = self._counts["connections"]
            try:
                self._attempt(context)
            except LinkDownError as down:
                kind = down.kind
                # Once may be a line that was cut in the middle of a handshake; twice in a row is not.
                broken_off = broken_off + 1 if kind is LinkKind.WRONG_SERVER_KEY else 0
                self._set(LinkKind.UNREACHABLE if broken_off == 1 else kind, str(down))
            except StoreError as error:
                self._set(LinkKind.UNREACHABLE, str(error))
            if self._counts["connections"] > welcomed:
                delay = least
            if self._stopping.wait(delay * random.uniform(0.75, 1.0)):  # noqa: S311 (no secret)
                raise StoppedError
            delay = min(2 * delay, most)

    def _attempt(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Connect, and serve until the connection ends; it never returns otherwise than by an error."""
        with Connection(
            context,
            self._address,
            server_key=self._server_key,
            keys=self._keys,
            stop=self._stop,
            wake=self._wake,
            **self._times,
        ) as connection:
            connection.open()
            session = Session(
                connection,
                member=self._member,
                spool=self._spool,
                limits=self._limits,
                pace=self._pace,
                count=self._count,
            )
            welcome = self._hello(session)
            self._count("connections")
            self._set(LinkKind.CONNECTED)
            while True:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                connection.idle(self._work(session, welcome))
                welcome = self._hello(session, welcome)

    def _hello(self, session: Session, last: Welcome | None = None) -> Welcome:
        """Say hello; where the aggregator is only busy, what it said last is as good."""
        try:
            welcome = session.hello(self._version)
        except FederationError as error:
            self._note(error)
            busy = error.code in {Refusal.BUSY, Refusal.NO_SPACE}
            if busy and last is not None:
                self._hold()
                return last
            kind = LinkKind.UNREACHABLE if busy else LinkKind.REFUSED
            raise LinkDownError(kind, f"{error.code.value}: {error}") from error
        if welcome.round != self._round:
            self._spool.keep_round(welcome.round)
            with self._changed:
                self._round = welcome.round
                self._changed.notify_all()
        return welcome

    def _work(self, session: Session, welcome: Welcome) -> float:
        """Send what waits and fetch what is new; returns the seconds until there is something to do again."""
        held = self._held_until - time.monotonic()
        if held > 0:
            return min(held, self._poll_s)
        try:
            while (upload := self._spool.first()) is not None:
                self._deliver(session, upload, welcome)
            if welcome.bank_version not in {0, self._version}:
                self._fetch(session, welcome.bank_version)
        except FederationError as error:
            self._note(error)
            if error.code in _NOT_TAKEN:
                raise LinkDownError(LinkKind.REFUSED, f"{error.code.value}: {error}") from error
            return min(self._hold(), self._poll_s)
        self._holds = 0
        return self._poll_s

    def _hold(self) -> float:
        """Ask for nothing for a while, longer each time in a row; returns the seconds."""
        least, most = self._backoff
        self._holds += 1
        held = min(most, least * 2.0 ** min(self._holds, 10))
        self._held_until = time.monotonic() + held
        return held

    def _deliver(self, session: Session, upload: Upload, welcome: Welcome) -> None:
        """Send one update until its receipt, or until it is known that it can never be taken.

        Raises:
            FederationError: not now; it stays.
        """
        try:
            session.send(upload, welcome)
        except FederationError as error:
            if not error.code.final:
                raise
            self._note(error)
            self._spool.done(upload)
        else:
            self._spool.done(upload)
            self._count("receipts")

    def _fetch(self, session: Session, version: int) -> None:
        bank = session.fetch(version)
        LOG.info("fleet memory %d of round %d is here (%d rows)", version, bank.round, len(bank.rows))
        with self._changed:
            self._bank, self._version = bank, version
            self._counts["banks"] += 1
            self._changed.notify_all()

    def _note(self, error: FederationError) -> None:
        LOG.warning("the aggregator refuses (%s): %s", error.code.value, error)
        with self._changed:
            self._refusals[error.code.value] += 1
            self._last_error = f"{error.code.value}: {error}"
            self._changed.notify_all()
