"""The durable outbox: a message is on disk before anybody tries to send it, and stays until it is safe to forget.

Rows are opaque bytes with a number. This module must not know what they say nor who sends them.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import zlib
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, TypeVar

from edge.alerts import outbox_file
from edge.alerts.outbox_file import Mark, MarkFile, boottime_ns
from edge.database import DamagedError, is_damage, is_full
from edge.errors import OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

_T = TypeVar("_T")
# What SQLite spends on a row beside topic and payload: columns, two index entries, slack of its page.
_ROW_OVERHEAD = 120
_BATCH = 64
OUTBOX_FULL = "outbox full"
DAMAGED_ROW = "damaged row"


class Priority(IntEnum):
    """What may go first when the outbox is full: the lowest priority, and of it the oldest."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


Make: TypeAlias = "Callable[[str, int], bytes]"


class Draft(NamedTuple):
    """A message before it has its number: ``make(epoch, seq)`` gives the payload."""

    topic: str
    make: Make
    priority: Priority = Priority.HIGH


@dataclass(frozen=True, slots=True)
class Row:
    """A message on its way.

    Attributes:
        seq: its number, unique in this file.
        epoch: 16 hex digits.
        topic: where to.
        payload: as it was appended.
        late: it was not sent in the connection in which it was made, or is sent again.
    """

    seq: int
    epoch: str
    topic: str
    payload: bytes
    late: bool


class GapMaker(Protocol):
    """Gives topic and payload of the row that stands for dropped ones."""

    def __call__(self, *, epoch: str, seq: int, first: int, last: int, dropped: int, reason: str) -> tuple[str, bytes]:
        """``dropped`` of the numbers ``first`` .. ``last`` of an epoch are gone."""


@dataclass(slots=True)
class _Totals:
    """What would otherwise be counted by a scan; goes back with a transaction that fails."""

    last_seq: int = 0
    depth: int = 0
    acked: int = 0
    bytes: int = 0
    appended: int = 0
    acknowledged: int = 0
    requeued: int = 0
    trimmed: int = 0
    damaged: int = 0
    dropped: int = 0


class Outbox:
    """Messages in a file, safe against kill and power cut; any thread may call any method.

    A number is never given twice: not after a delete, a restart or a damage. The epoch is drawn when the file is made
    and again when the box was not shut down before its last boot ended, since a disk may then have lost rows.

    Args:
        path: the database file; ``-wal`` and ``-mark`` files lie beside it.
        make_gap: writes the message that stands for dropped rows.
        max_bytes: over it acknowledged rows go first, then waiting ones of the lowest priority, oldest first.
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
        self._make_gap = make_gap
        self._max_bytes = max_bytes
        self._replay_rows = replay_rows
        self._replay_ns = int(replay_seconds * 1e9)
        self._clock = clock
        self._lock = threading.RLock()
        self._mark = MarkFile(path)
        self._mark_errors = 0
        self._in_flight: set[int] = set()
        self._listeners: list[Callable[[], None]] = []
        self._totals = _Totals()
        self._epoch = ""
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
        return self._epoch

    @property
    def last_seq(self) -> int:
        """The highest number given so far, 0 before the first."""
        return self._totals.last_seq

    @property
    def depth(self) -> int:
        """Rows that wait for an acknowledgement."""
        return self._totals.depth

    @property
    def bytes(self) -> int:
        """Size of all rows, acknowledged ones included."""
        return self._totals.bytes

    @property
    def counters(self) -> dict[str, int]:
        """``dropped`` since the file was made; appended, acknowledged, requeued, trimmed and damaged since it opened.

        ``trimmed`` are acknowledged rows that were forgotten, ``dropped`` waiting ones given up on purpose.
        """
        names = ("appended", "acknowledged", "requeued", "trimmed", "dropped", "damaged")
        with self._lock:
            return {name: getattr(self._totals, name) for name in names} | {"mark_errors": self._mark_errors}

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

        Raises:
            OutboxError: as :meth:`append`.
        """

        def work(db: sqlite3.Connection) -> list[int]:
            seqs = [self._insert(db, draft) for draft in drafts]
            self._set_meta(db, "last_seq", self._totals.last_seq)
            self._make_room(db)
            return seqs

        with self._lock:
            seqs = self._write(work, shed=True)
            try:
                self._mark.write(Mark(self._epoch, self._totals.last_seq))
            except OSError:
                self._mark_errors += 1
        for listener in self._listeners:
            listener()
        return seqs

    def pending(self, limit: int, *, boundary: int = 0) -> list[Row]:
        """Rows to send now, none of them in flight: live ones first, then late ones, each lane by number.

        Args:
            limit: at most so many.
            boundary: rows up to this number are late, as are rows that are sent again.

        Raises:
            OutboxError: the file cannot be read.
        """

        def work(db: sqlite3.Connection) -> list[Row]:
            rows: list[Row] = []
            # Within the index `lane`; rows in flight are few, so reading past them is cheap.
            reach = limit + len(self._in_flight)
            for lane in ("again = 0 AND seq > ?", "(again = 1 OR seq <= ?)"):
                query = (
                    f"SELECT seq, epoch, topic, payload, crc FROM rows WHERE acked = 0 AND {lane} ORDER BY seq LIMIT ?"  # noqa: S608 (two fixed texts)
                )
                for seq, epoch, topic, payload, crc in db.execute(query, (boundary, reach)).fetchall():
                    if seq in self._in_flight or len(rows) >= limit:
                        continue
                    if not isinstance(payload, bytes) or not isinstance(topic, str) or _crc(topic, payload) != crc:
                        damaged.append((epoch, seq))
                        continue
                    rows.append(Row(seq, epoch, topic, payload, late=lane.startswith("(")))
            return rows

        with self._lock:
            damaged: list[tuple[str, int]] = []
            rows = self._read(work)
            if damaged:
                self._write(lambda db: self._drop_damaged(db, damaged))
            return rows

    def mark_sent(self, seqs: Iterable[int]) -> None:
        """These rows are in flight: not given out again before :meth:`release_sent`, and not dropped."""
        with self._lock:
            fresh = set(seqs) - self._in_flight
            # A gap that may have been seen is never extended: a subscriber would drop the longer one as a duplicate.
            marks = ",".join("?" * len(fresh))
            query = f"SELECT seq FROM rows WHERE gap_first IS NOT NULL AND sent = 0 AND seq IN ({marks})"  # noqa: S608
            gaps = self._read(lambda db: db.execute(query, tuple(fresh)).fetchall())
            if gaps:
                self._write(lambda db: db.executemany("UPDATE rows SET sent = 1 WHERE seq = ?", gaps))
            self._in_flight |= fresh

    def release_sent(self, seqs: Iterable[int] | None = None) -> None:
        """These rows, or all, are not in flight any more and pending again: the connection is gone."""
        with self._lock:
            self._in_flight.difference_update(set(self._in_flight) if seqs is None else seqs)

    def acknowledge(self, seqs: Iterable[int]) -> int:
        """The broker has these rows. They are kept for the replay window; returns how many were waiting.

        Not synced to disk: an acknowledgement that is forgotten costs a duplicate, not a message.
        """

        def work(db: sqlite3.Connection) -> int:
            now = self._clock()
            count = 0
            for seq in numbers:
                count += db.execute(
                    "UPDATE rows SET acked = 1, again = 0, acked_at = ? WHERE seq = ? AND acked = 0", (now, seq)
                ).rowcount
            self._totals.depth -= count
            self._totals.acked += count
            self._totals.acknowledged += count
            if self._totals.acked > self._replay_rows:
                self._forget(db, rows=self._totals.acked - self._replay_rows)
            return count

        numbers = list(seqs)
        with self._lock:
            count = self._write(work, durable=False)
            self._in_flight.difference_update(numbers)
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
                    self._write(lambda db: self._set_meta(db, "clean", 1))
                self._release_files()

    def _requeue(self, condition: str, values: tuple[Any, ...]) -> int:
        def work(db: sqlite3.Connection) -> int:
            query = f"UPDATE rows SET acked = 0, again = 1 WHERE acked = 1 AND {condition}"  # noqa: S608 (fixed texts)
            count = db.execute(query, values).rowcount
            self._totals.depth += count
            self._totals.acked -= count
            self._totals.requeued += count
            return count

        with self._lock:
            return self._write(work, durable=False)

    def _insert(self, db: sqlite3.Connection, draft: Draft) -> int:
        seq = self._totals.last_seq + 1
        payload = draft.make(self._epoch, seq)
        size = _size(draft.topic, payload)
        db.execute(
            "INSERT INTO rows(seq, epoch, topic, payload, crc, size, priority) VALUES(?, ?, ?, ?, ?, ?, ?)",
            (seq, self._epoch, draft.topic, payload, _crc(draft.topic, payload), size, int(draft.priority)),
        )
        self._totals.last_seq = seq
        self._totals.depth += 1
        self._totals.appended += 1
        self._totals.bytes += size
        return seq

    def _make_room(self, db: sqlite3.Connection) -> None:
        while self._totals.bytes > self._max_bytes and self._forget(
            db, bytes_over=self._totals.bytes - self._max_bytes
        ):
            pass
        while self._totals.bytes > self._max_bytes:
            query = (
                "SELECT epoch, seq, size FROM rows WHERE acked = 0 AND gap_first IS NULL ORDER BY priority, seq LIMIT ?"
            )
            rows = db.execute(query, (_BATCH + len(self._in_flight),)).fetchall()
            over, victims = self._totals.bytes - self._max_bytes, []
            for epoch, seq, size in rows:
                if over > 0 and seq not in self._in_flight:
                    victims.append((epoch, seq))
                    over -= size
            if not victims:
                return
            self._drop(db, victims, reason=OUTBOX_FULL)

    def _forget(self, db: sqlite3.Connection, *, rows: int = _BATCH, bytes_over: int | None = None) -> int:
        """Delete the oldest rows that the broker has acknowledged; returns how many."""
        gone: list[tuple[int]] = []
        query = "SELECT seq, size, acked FROM rows WHERE acked = 1 OR again = 1 ORDER BY seq LIMIT ?"
        for seq, size, acked in db.execute(query, (rows + len(self._in_flight),)).fetchall():
            if (
                (not acked and seq in self._in_flight)
                or len(gone) >= rows
                or (bytes_over is not None and bytes_over <= 0)
            ):
                continue
            gone.append((seq,))
            bytes_over = None if bytes_over is None else bytes_over - size
            self._totals.bytes -= size
            self._totals.acked -= acked
            self._totals.depth -= 1 - acked
        db.executemany("DELETE FROM rows WHERE seq = ?", gone)
        self._totals.trimmed += len(gone)
        return len(gone)

    def _drop(self, db: sqlite3.Connection, victims: list[tuple[str, int]], *, reason: str) -> None:
        """Delete waiting rows; one gap row per epoch, extended while it has not been sent, counts them."""
        for epoch in {epoch for epoch, _ in victims}:
            seqs = sorted(seq for e, seq in victims if e == epoch)
            freed = 0
            for seq in seqs:
                freed += db.execute("SELECT size FROM rows WHERE seq = ?", (seq,)).fetchone()[0]
                db.execute("DELETE FROM rows WHERE seq = ?", (seq,))
            self._totals.bytes -= freed
            self._totals.depth -= len(seqs)
            self._write_gap(db, epoch, (seqs[0], seqs[-1], len(seqs)), reason)

    def _write_gap(self, db: sqlite3.Connection, epoch: str, gap: tuple[int, int, int], reason: str) -> None:
        first, last, count = gap
        dropped, number = count, last
        query = (
            "SELECT seq, gap_first, gap_last, gap_dropped, size FROM rows"
            " WHERE acked = 0 AND again = 0 AND sent = 0 AND gap_first IS NOT NULL AND epoch = ? AND gap_reason = ?"
        )
        old = db.execute(query, (epoch, reason)).fetchone()
        if old is not None:
            number, first, last, dropped = old[0], min(first, old[1]), max(last, old[2]), dropped + old[3]
            db.execute("DELETE FROM rows WHERE seq = ?", (number,))
            self._totals.bytes -= old[4]
            self._totals.depth -= 1
        topic, payload = self._make_gap(epoch=epoch, seq=number, first=first, last=last, dropped=dropped, reason=reason)
        size = _size(topic, payload)
        db.execute(
            "INSERT INTO rows(seq, epoch, topic, payload, crc, size, priority, gap_first, gap_last, gap_dropped,"
            " gap_reason) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                number,
                epoch,
                topic,
                payload,
                _crc(topic, payload),
                size,
                int(Priority.HIGH),
                first,
                last,
                dropped,
                reason,
            ),
        )
        self._totals.bytes += size
        self._totals.depth += 1
        self._totals.dropped += count
        self._set_meta(db, "dropped", self._totals.dropped)

    def _drop_damaged(self, db: sqlite3.Connection, rows: list[tuple[str, int]]) -> None:
        self._totals.damaged += len(rows)
        self._drop(db, rows, reason=DAMAGED_ROW)

    def _open(self) -> None:
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
        self._in_flight.clear()
        self.quarantined = outbox_file.FILE.put_aside(self.path)
        self.damage = f"the outbox was damaged ({why}); it lies aside as {self.quarantined}, a new epoch has begun"
        try:
            self._db = outbox_file.FILE.open(self.path)
        except DamagedError as error:
            raise OutboxError(f"outbox {self.path}: a new file is damaged at once ({error}); check the disk") from error
        self._load()

    def _load(self) -> None:
        """Totals, epoch and the traces of how the last process ended."""
        self._totals, boot = _Totals(), outbox_file.boot_id()
        mark = self._mark.read()

        def work(db: sqlite3.Connection) -> None:
            totals = self._totals
            meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
            totals.last_seq = meta.get("last_seq", 0)
            totals.dropped = meta.get("dropped", 0)
            totals.depth, totals.acked, totals.bytes = db.execute(
                "SELECT count(*) FILTER (WHERE acked = 0), count(*) FILTER (WHERE acked = 1), COALESCE(SUM(size), 0) FROM rows"  # noqa: E501
            ).fetchone()
            self._epoch = meta.get("epoch", "")
            if mark is not None and mark.epoch == self._epoch and mark.seq > totals.last_seq:
                lost = mark.seq - totals.last_seq
                self.damage = f"{lost} rows of the outbox were lost with its damaged log; a gap message counts them"
                totals.damaged += lost
                totals.last_seq, first = mark.seq, totals.last_seq + 1
                self._set_meta(db, "last_seq", totals.last_seq)
                self._write_gap(db, self._epoch, (first, mark.seq, lost), DAMAGED_ROW)
            if meta.get("boot") != boot:
                # Times of another boot say nothing now: the window of those rows starts again.
                db.execute("UPDATE rows SET acked_at = ? WHERE acked = 1", (self._clock(),))
            if not self._epoch or (meta.get("boot") != boot and not meta.get("clean")):
                self._epoch = outbox_file.new_epoch()
            for key, value in (("epoch", self._epoch), ("boot", boot), ("clean", 0)):
                self._set_meta(db, key, value)

        self._write(work)

    @staticmethod
    def _set_meta(db: sqlite3.Connection, key: str, value: int | str) -> None:
        db.execute("INSERT INTO meta(key, value) VALUES(?, ?) ON CONFLICT(key) DO UPDATE SET value = ?2", (key, value))

    def _read(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        return self._guard(work)

    def _write(self, work: Callable[[sqlite3.Connection], _T], *, durable: bool = True, shed: bool = False) -> _T:
        def transaction(db: sqlite3.Connection) -> _T:
            before = replace(self._totals)
            db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            try:
                result = work(db)
                db.execute("COMMIT")
            except BaseException:
                self._totals = before
                # SQLite has rolled back by itself after some errors (a full disk), after others it has not.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return result

        try:
            return self._guard(transaction)
        except OutboxError as error:
            full = isinstance(error.__cause__, sqlite3.Error) and is_full(error.__cause__)
            if not (shed and full and self._totals.acked):
                raise
            # Space is for what is still owed: acknowledged rows give theirs up, then one more try.
            self._write(lambda db: self._forget(db, rows=max(_BATCH, self._totals.acked // 4)), durable=False)
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


def _crc(topic: str, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(topic.encode()))


def _size(topic: str, payload: bytes) -> int:
    return len(topic.encode()) + len(payload) + _ROW_OVERHEAD
