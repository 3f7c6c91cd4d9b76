"""The durable outbox: a message is on disk before anybody tries to send it, and stays until it is safe to forget.

Rows are opaque bytes with a number. This module must not know what they say nor who sends them.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from edge.alerts import outbox_file
from edge.alerts.outbox_file import Mark, MarkFile, boottime_ns
from edge.alerts.outbox_group import GroupCommit
from edge.alerts.outbox_rows import (
    DAMAGED_ROW,
    OUTBOX_FULL,
    DeadLetter,
    Draft,
    GapMaker,
    LiveLane,
    Make,
    Priority,
    Row,
    Rows,
    set_meta,
)
from edge.alerts.outbox_space import OwnedSpace
from edge.database import DamagedError, is_damage, is_full, transaction
from edge.errors import OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from edge.alerts.outbox_group import Call

__all__ = ["DAMAGED_ROW", "OUTBOX_FULL", "DeadLetter", "Draft", "GapMaker", "Make", "Outbox", "Priority", "Row"]

_T = TypeVar("_T")
_FEWEST_SHED = 64


class Outbox:
    """Messages in a file, safe against kill and power cut; any thread may call any method.

    A number is never given twice: not after a delete, a restart or a damage. The epoch is drawn when the file is made
    and again when the box was not shut down before its last boot ended, since a disk may then have lost rows.

    Args:
        path: the database file; ``-wal`` and ``-mark`` files lie beside it, ``-space`` while it is closed.
        make_gap: writes the message that stands for dropped rows.
        max_bytes: over it acknowledged rows go first, then dead letters, then waiting rows of the lowest priority,
            oldest first.
        replay_rows: acknowledged rows that are kept, the newest.
        replay_seconds: of them, those acknowledged within this time are sent again after a reconnect.
        clock: nanoseconds since boot.

    Raises:
        OutboxError: the file cannot be opened, is in use, or is not an outbox. A damaged one is put aside instead
            (:attr:`quarantined`, :attr:`damage`).
    """

    def __init__(
        self,
        path: Path,
        *,
        make_gap: GapMaker,
        max_bytes: int = 64 * 2**20,
        replay_rows: int = 10_000,
        replay_seconds: float = 300.0,
        clock: Callable[[], int] = boottime_ns,
    ) -> None:
        self.path = path
        self.quarantined: Path | None = None
        self.damage: str | None = None
        self._rows = Rows(make_gap=make_gap, max_bytes=max_bytes, replay_rows=replay_rows)
        self._replay_ns = int(replay_seconds * 1e9)
        self._clock = clock
        self._lock = threading.RLock()
        self._group: GroupCommit[Draft, list[int]] = GroupCommit(self._commit, lock=self._lock)
        self._mark = MarkFile(path)
        self._space = OwnedSpace(path)
        self._mark_errors = 0
        self._live = LiveLane()
        self._commits = 0
        self._listeners: list[Callable[[], None]] = []
        self._db: sqlite3.Connection | None = None
        try:
            self._open()
        except BaseException:
            self._release_files()
            raise

    def __enter__(self) -> Outbox:  # noqa: PYI034 (Self needs Python 3.11)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def epoch(self) -> str:
        """16 hex digits that new rows carry."""
        return self._rows.epoch

    @property
    def last_seq(self) -> int:
        """The highest number given so far, 0 before the first."""
        return self._rows.totals.last_seq

    @property
    def depth(self) -> int:
        """Rows that wait for an acknowledgement."""
        return self._rows.totals.depth

    @property
    def bytes(self) -> int:
        """Size of all rows, acknowledged ones and dead letters included."""
        return self._rows.totals.bytes

    @property
    def dead(self) -> int:
        """Dead letters that are kept."""
        return self._rows.totals.dead

    @property
    def counters(self) -> dict[str, int]:
        """``dropped`` since the file was made, the others since it opened.

        appended, acknowledged, requeued, ``set_aside`` as dead letters, ``trimmed``: acknowledged rows that were
        forgotten, ``dropped``: others given up on purpose, damaged, ``commits``: disk syncs that the appended rows
        took, mark_errors.
        """
        names = ("appended", "acknowledged", "requeued", "set_aside", "trimmed", "dropped", "damaged")
        with self._lock:
            counts = {name: getattr(self._rows.totals, name) for name in names}
            return counts | {"commits": self._commits, "mark_errors": self._mark_errors}

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` (quick, not raising) after rows were appended, in the appending thread."""
        self._listeners.append(listener)

    def append(self, topic: str, make: Make, *, priority: Priority = Priority.HIGH) -> int:
        """Store one message; on disk when this returns.

        Raises:
            OutboxError: nothing was stored, all that was accepted before is kept, and a later call may succeed.
        """
        return self.append_many([Draft(topic, make, priority)])[0]

    def append_many(self, drafts: Sequence[Draft]) -> list[int]:
        """Store messages with one disk sync for all of them, all or none; returns their numbers.

        Threads that call at the same time share one sync as well; each is still told of its own failure only.

        Raises:
            OutboxError: as :meth:`append`.
        """
        seqs = self._group.submit(drafts)
        for listener in self._listeners:
            listener()
        return seqs

    def pending(self, limit: int, *, boundary: int = 0) -> list[Row]:
        """Rows to send now, none of them in flight: live ones first, then late ones, each lane by number.

        Args:
            limit: at most so many.
            boundary: rows up to this number are late, as are rows that are sent again, and those that have waited for
                half a second and have 64 newer ones behind them.

        Raises:
            OutboxError: the file cannot be read.
        """
        with self._lock:
            late = max(boundary, self._live.boundary(self._clock(), self.last_seq))
            rows, damaged = self._guard(lambda db: self._rows.pending(db, limit, late))
            if damaged:
                self._write(lambda db: self._rows.drop_damaged(db, damaged))
            return rows

    def mark_sent(self, seqs: Iterable[int]) -> None:
        """These rows are in flight: not given out again before :meth:`release_sent`, and not dropped."""
        with self._lock:
            fresh = set(seqs) - self._rows.in_flight
            # A gap that may have been seen is never extended: a subscriber would drop the longer one as a duplicate.
            marks = ",".join("?" * len(fresh))
            query = f"SELECT seq FROM rows WHERE gap_first IS NOT NULL AND sent = 0 AND seq IN ({marks})"  # noqa: S608
            gaps = self._guard(lambda db: db.execute(query, tuple(fresh)).fetchall())
            if gaps:
                self._write(lambda db: db.executemany("UPDATE rows SET sent = 1 WHERE seq = ?", gaps))
            self._rows.in_flight |= fresh

    def release_sent(self, seqs: Iterable[int] | None = None) -> None:
        """These rows, or all, are not in flight any more and pending again: the connection is gone."""
        with self._lock:
            flying = self._rows.in_flight
            flying.difference_update(set(flying) if seqs is None else seqs)

    def acknowledge(self, seqs: Iterable[int]) -> int:
        """The broker has these rows. They are kept for the replay window; returns how many were waiting.

        Not synced to disk: an acknowledgement that is forgotten costs a duplicate, not a message.
        """
        numbers = list(seqs)
        with self._lock:
            now = self._clock()
            count = self._write(lambda db: self._rows.acknowledge(db, numbers, now), durable=False)
            self._rows.in_flight.difference_update(numbers)
            return count

    def set_aside(self, seqs: Iterable[int], reason: str) -> list[int]:
        """Make waiting rows dead letters: the broker refuses them for good. They are not sent, and kept in the file.

        Args:
            seqs: their numbers. Those of gap rows are left as they are: what a gap counts must still be said.
            reason: for a person who looks at them.

        Returns:
            The numbers that are dead letters now, and were not before.

        Raises:
            OutboxError: the file cannot be written; nothing has changed.
        """
        numbers = list(seqs)
        with self._lock:
            done = self._write(lambda db: self._rows.set_aside(db, numbers, reason), durable=False)
            self._rows.in_flight.difference_update(done)
            return done

    def dead_letters(self, limit: int) -> list[DeadLetter]:
        """The oldest dead letters, ``limit`` at most.

        Raises:
            OutboxError: the file cannot be read.
        """
        with self._lock:
            letters, damaged = self._guard(lambda db: self._rows.dead_letters(db, limit))
            if damaged:
                self._write(lambda db: self._rows.drop_damaged(db, damaged))
            return letters

    def requeue_dead(self) -> int:
        """Make all dead letters pending again, late; returns how many. Listeners are called.

        Raises:
            OutboxError: the file cannot be written; nothing has changed.
        """
        count = self._write(self._rows.requeue_dead, durable=False)
        for listener in self._listeners:
            listener()
        return count

    def requeue_acknowledged(self) -> int:
        """Make rows acknowledged within the replay window pending again, late; returns how many."""
        since = self._clock() - self._replay_ns
        return self._requeue("acked_at >= ?", (since,))

    def requeue_range(self, epoch: str, first: int, last: int) -> int:
        """Make the kept rows ``first`` .. ``last`` of an epoch pending again, late; returns how many were kept."""
        return self._requeue("epoch = ? AND seq BETWEEN ? AND ?", (epoch, first, last))

    def close(self) -> None:
        """Close the file; closing again does nothing."""
        with self._lock:
            if self._db is not None:
                with contextlib.suppress(OutboxError):
                    self._write(lambda db: set_meta(db, "clean", 1))
                self._release_files()

    def _requeue(self, condition: str, values: tuple[Any, ...]) -> int:
        return self._write(lambda db: self._rows.requeue(db, condition, values), durable=False)

    def _commit(self, calls: list[Call[Draft, list[int]]]) -> None:
        """Store what several threads append with one disk sync; each on its own where all together do not fit."""
        try:
            self._append(calls)
        except OutboxError as error:
            if len(calls) == 1:
                calls[0].error = error
                return
            for call in calls:
                self._commit([call])

    def _insert(self, db: sqlite3.Connection, drafts: Sequence[Draft]) -> tuple[list[int] | None, Exception | None]:
        try:
            return self._rows.insert(db, drafts), None
        except sqlite3.Error:
            raise
        except Exception as error:  # noqa: BLE001 (a message that cannot be made concerns its own thread only)
            return None, error

    def _append(self, calls: list[Call[Draft, list[int]]]) -> None:
        results: list[tuple[list[int] | None, Exception | None]] = []

        def work(db: sqlite3.Connection) -> None:
            results[:] = [self._insert(db, call.work) for call in calls]
            set_meta(db, "last_seq", self._rows.totals.last_seq)
            self._rows.make_room(db)

        self._write(work, shed=True)
        self._commits += 1
        self._live.note(self._clock(), self.last_seq)
        try:
            self._mark.write(Mark(self._rows.epoch, self._rows.totals.last_seq))
        except OSError:
            self._mark_errors += 1
        for call, (seqs, refusal) in zip(calls, results, strict=True):
            call.result, call.error = seqs, refusal

    def _open(self) -> None:
        self._space.take_back()
        try:
            self._db = outbox_file.FILE.open(self.path)
        except DamagedError as error:
            self._put_aside(str(error))
        else:
            self._load()

    def _put_aside(self, why: str) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None
        self._space.release()
        self._rows.in_flight.clear()
        self.quarantined = outbox_file.FILE.put_aside(self.path)
        self.damage = f"the outbox was damaged ({why}); it lies aside as {self.quarantined}, a new epoch has begun"
        try:
            self._db = outbox_file.FILE.open(self.path)
        except DamagedError as error:
            raise OutboxError(f"outbox {self.path}: a new file is damaged at once ({error}); check the disk") from error
        self._load()

    def _load(self) -> None:
        """Totals, epoch and the traces of how the last process ended."""
        boot = outbox_file.boot_id()
        mark = self._mark.read()

        def work(db: sqlite3.Connection) -> None:
            rows = self._rows
            meta, totals = rows.load(db), rows.totals
            if mark is not None and mark.epoch == rows.epoch and mark.seq > totals.last_seq:
                lost = mark.seq - totals.last_seq
                self.damage = f"{lost} rows of the outbox were lost with its damaged log; a gap message counts them"
                totals.damaged += lost
                totals.last_seq, first = mark.seq, totals.last_seq + 1
                set_meta(db, "last_seq", totals.last_seq)
                rows.write_gap(db, rows.epoch, (first, mark.seq, lost), DAMAGED_ROW)
            if meta.get("boot") != boot:
                # Times of another boot say nothing now: the window of those rows starts again.
                db.execute("UPDATE rows SET acked_at = ? WHERE acked = 1", (self._clock(),))
            if not rows.epoch or (meta.get("boot") != boot and not meta.get("clean")):
                rows.epoch = outbox_file.new_epoch()
            for key, value in (("epoch", rows.epoch), ("boot", boot), ("clean", 0)):
                set_meta(db, key, value)

        self._write(work)
        self._guard(self._space.own)

    def _write(self, work: Callable[[sqlite3.Connection], _T], *, durable: bool = True, shed: bool = False) -> _T:
        def attempt(db: sqlite3.Connection) -> _T:
            before = replace(self._rows.totals)
            try:
                with transaction(db, durable=durable):
                    return work(db)
            except BaseException:
                self._rows.totals = before
                raise

        try:
            return self._guard(attempt)
        except OutboxError as error:
            if not (isinstance(error.__cause__, sqlite3.Error) and is_full(error.__cause__)):
                raise
            if self._guard(self._space.grow):
                return self._write(work, durable=durable, shed=shed)
            if not (shed and self._rows.totals.acked):
                raise
            # Space is for what is still owed: acknowledged rows give theirs up, then one more try.
            fewest = max(_FEWEST_SHED, self._rows.totals.acked // 4)
            self._write(lambda db: self._rows.forget(db, rows=fewest), durable=False)
            return self._write(work, durable=durable)

    def _guard(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Run ``work``; a file found damaged meanwhile is put aside once and the work done on a fresh one."""
        with self._lock:
            if self._db is None:
                raise OutboxError(f"outbox {self.path} is closed")
            try:
                return work(self._db)
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise outbox_file.FILE.explain(error, self.path) from error
                self._put_aside(str(error))
            try:
                return work(self._db)
            except sqlite3.Error as error:
                raise outbox_file.FILE.explain(error, self.path) from error

    def _release_files(self) -> None:
        self._mark.close()
        if self._db is not None:
            self._db.close()
            self._db = None
        self._space.release()
        self._space.keep()
