"""The outbox's rows and their sums: what each step does inside a transaction, which its caller begins and ends.

Rows are opaque bytes with a number. This module must not know threads, files, nor how a transaction fails.
"""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable

# What SQLite spends on a row beside topic and payload: columns, two index entries, slack of its page.
_ROW_OVERHEAD = 120
_BATCH = 64
# A row that has waited for so long and has so many newer ones behind it is not live any more.
_LIVE_NS = 500_000_000
_LIVE_ROWS = 64
_MOMENT_NS = _LIVE_NS // 10
OUTBOX_FULL = "outbox full"
DAMAGED_ROW = "damaged row"
# Column `acked`: it waits, the broker has it, the broker refuses it for good.
_DEAD = 2
# Column `again`: 1 it was acknowledged before, 2 it was refused before.
_REVIVED = 2


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
        late: it was not sent in the connection in which it was made, or is sent again, or newer ones go before it.
    """

    seq: int
    epoch: str
    topic: str
    payload: bytes
    late: bool


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that the broker refuses for good, kept for a person to look at.

    Attributes:
        seq: its number, unique in this file.
        epoch: 16 hex digits.
        topic: where it was to go.
        payload: as it was appended.
        reason: why it was set aside.
    """

    seq: int
    epoch: str
    topic: str
    payload: bytes
    reason: str


class GapMaker(Protocol):
    """Gives topic and payload of the row that stands for dropped ones."""

    def __call__(self, *, epoch: str, seq: int, first: int, last: int, dropped: int, reason: str) -> tuple[str, bytes]:
        """``dropped`` of the numbers ``first`` .. ``last`` of an epoch are gone."""


class LiveLane:
    """Which of the rows made in a connection are live in it: all that are young, and the newest.

    A burst, or a line that stands still unnoticed, shall not hold up what comes after it.
    """

    def __init__(self) -> None:
        # (time, last number by then), oldest first: the first is the newest that is old enough.
        self._moments: deque[tuple[int, int]] = deque()

    def note(self, now: int, last_seq: int) -> None:
        """Rows up to ``last_seq`` are there since ``now``, in ns, or longer."""
        if not self._moments or now - self._moments[-1][0] >= _MOMENT_NS:
            self._forget(now)
            self._moments.append((now, last_seq))

    def boundary(self, now: int, last_seq: int) -> int:
        """Rows up to this number have waited, and newer ones behind them are enough to fill the lane."""
        self._forget(now)
        old = self._moments and self._moments[0][0] <= now - _LIVE_NS
        return min(self._moments[0][1], last_seq - _LIVE_ROWS) if old else 0

    def _forget(self, now: int) -> None:
        while len(self._moments) > 1 and self._moments[1][0] <= now - _LIVE_NS:
            self._moments.popleft()


@dataclass(slots=True)
class Totals:
    """What would otherwise be counted by a scan; goes back with a transaction that fails."""

    last_seq: int = 0
    depth: int = 0
    acked: int = 0
    dead: int = 0
    bytes: int = 0
    appended: int = 0
    acknowledged: int = 0
    requeued: int = 0
    set_aside: int = 0
    trimmed: int = 0
    damaged: int = 0
    dropped: int = 0


@dataclass(slots=True)
class Rows:
    """The steps on rows. Every method that takes a database is called inside a transaction on it.

    Attributes:
        make_gap: writes the message that stands for dropped rows.
        max_bytes: see :class:`~edge.alerts.outbox.Outbox`.
        replay_rows: likewise.
        epoch: that new rows carry.
        totals: sums over the table.
        in_flight: numbers that are given out; never dropped.
    """

    make_gap: GapMaker
    max_bytes: int
    replay_rows: int
    epoch: str = ""
    totals: Totals = field(default_factory=Totals)
    in_flight: set[int] = field(default_factory=set)

    def load(self, db: sqlite3.Connection) -> dict[str, Any]:
        """Sum the table up; returns the file's notes about itself."""
        meta = dict(db.execute("SELECT key, value FROM meta").fetchall())
        totals = self.totals = Totals(last_seq=meta.get("last_seq", 0), dropped=meta.get("dropped", 0))
        totals.depth, totals.acked, totals.dead, totals.bytes = db.execute(
            "SELECT count(*) FILTER (WHERE acked = 0), count(*) FILTER (WHERE acked = 1),"
            " count(*) FILTER (WHERE acked = 2), COALESCE(SUM(size), 0) FROM rows"
        ).fetchone()
        self.epoch = meta.get("epoch", "")
        return meta

    def insert(self, db: sqlite3.Connection, drafts: Iterable[Draft]) -> list[int]:
        """Store messages under the next numbers; nothing is stored where a ``make`` raises."""
        first = self.totals.last_seq + 1
        made = [(draft, draft.make(self.epoch, first + index)) for index, draft in enumerate(drafts)]
        for seq, (draft, payload) in enumerate(made, first):
            size = row_size(draft.topic, payload)
            db.execute(
                "INSERT INTO rows(seq, epoch, topic, payload, crc, size, priority) VALUES(?, ?, ?, ?, ?, ?, ?)",
                (seq, self.epoch, draft.topic, payload, checksum(draft.topic, payload), size, int(draft.priority)),
            )
            self.totals.bytes += size
        self.totals.last_seq += len(made)
        self.totals.depth += len(made)
        self.totals.appended += len(made)
        return list(range(first, first + len(made)))

    def pending(self, db: sqlite3.Connection, limit: int, boundary: int) -> tuple[list[Row], list[tuple[str, int]]]:
        """Rows to send, live ones first; and (epoch, number) of those found whose bytes have changed."""
        rows: list[Row] = []
        damaged: list[tuple[str, int]] = []
        # Within the index `lane`; rows in flight are few, so reading past them is cheap.
        reach = limit + len(self.in_flight)
        for lane in ("again = 0 AND seq > ?", "(again <> 0 OR seq <= ?)"):
            if len(rows) >= limit:
                break
            query = f"SELECT seq, epoch, topic, payload, crc FROM rows WHERE acked = 0 AND {lane} ORDER BY seq LIMIT ?"  # noqa: S608 (two fixed texts)
            for seq, epoch, topic, payload, crc in db.execute(query, (boundary, reach)).fetchall():
                if seq in self.in_flight or len(rows) >= limit:
                    continue
                if not _is_whole(topic, payload, crc):
                    damaged.append((epoch, seq))
                    continue
                rows.append(Row(seq, epoch, topic, payload, late=lane.startswith("(")))
        return rows, damaged

    def acknowledge(self, db: sqlite3.Connection, seqs: Iterable[int], now: int) -> int:
        """The broker has these rows; the oldest beyond the replay window are forgotten."""
        count = 0
        for seq in seqs:
            count += db.execute(
                "UPDATE rows SET acked = 1, again = 0, acked_at = ? WHERE seq = ? AND acked = 0", (now, seq)
            ).rowcount
        self.totals.depth -= count
        self.totals.acked += count
        self.totals.acknowledged += count
        if self.totals.acked > self.replay_rows:
            self.forget(db, rows=self.totals.acked - self.replay_rows)
        return count

    def requeue(self, db: sqlite3.Connection, condition: str, values: tuple[Any, ...]) -> int:
        """Make acknowledged rows pending again; ``condition`` is one of the caller's fixed texts."""
        query = f"UPDATE rows SET acked = 0, again = 1 WHERE acked = 1 AND {condition}"  # noqa: S608 (fixed texts)
        count = db.execute(query, values).rowcount
        self.totals.depth += count
        self.totals.acked -= count
        self.totals.requeued += count
        return count

    def set_aside(self, db: sqlite3.Connection, seqs: Iterable[int], reason: str) -> list[int]:
        """Make waiting rows dead letters; returns which. A gap row is none: what it counts was never said."""
        query = (
            "UPDATE rows SET acked = 2, again = 0, dead_reason = ? WHERE seq = ? AND acked = 0 AND gap_first IS NULL"
        )
        done = [seq for seq in seqs if db.execute(query, (reason, seq)).rowcount]
        self.totals.depth -= len(done)
        self.totals.dead += len(done)
        self.totals.set_aside += len(done)
        return done

    def dead_letters(self, db: sqlite3.Connection, limit: int) -> tuple[list[DeadLetter], list[tuple[str, int]]]:
        """The oldest dead letters; and (epoch, number) of those found whose bytes have changed."""
        query = "SELECT seq, epoch, topic, payload, crc, dead_reason FROM rows WHERE acked = 2 ORDER BY seq LIMIT ?"
        letters: list[DeadLetter] = []
        damaged: list[tuple[str, int]] = []
        for seq, epoch, topic, payload, crc, reason in db.execute(query, (limit,)).fetchall():
            if _is_whole(topic, payload, crc):
                letters.append(DeadLetter(seq, epoch, topic, payload, str(reason or "")))
            else:
                damaged.append((epoch, seq))
        return letters, damaged

    def requeue_dead(self, db: sqlite3.Connection) -> int:
        """Make all dead letters pending again."""
        query = "UPDATE rows SET acked = 0, again = ?, dead_reason = NULL WHERE acked = ?"
        count = db.execute(query, (_REVIVED, _DEAD)).rowcount
        self.totals.dead -= count
        self.totals.depth += count
        self.totals.requeued += count
        return count

    def make_room(self, db: sqlite3.Connection) -> None:
        """Get below the byte cap: what the broker has goes first, then what it refuses, then what waits."""
        while self._excess > 0 and self.forget(db, bytes_over=self._excess):
            pass
        for condition in (
            "acked = 2 ORDER BY seq",
            "acked = 0 AND gap_first IS NULL ORDER BY priority, seq",
        ):
            while self._excess > 0 and self._give_up(db, condition):
                pass

    @property
    def _excess(self) -> int:
        return self.totals.bytes - self.max_bytes

    def _give_up(self, db: sqlite3.Connection, condition: str) -> bool:
        query = f"SELECT epoch, seq, size FROM rows WHERE {condition} LIMIT ?"  # noqa: S608 (fixed texts)
        over, victims = self._excess, []
        for epoch, seq, size in db.execute(query, (_BATCH + len(self.in_flight),)).fetchall():
            if over > 0 and seq not in self.in_flight:
                victims.append((epoch, seq))
                over -= size
        self._drop(db, victims, reason=OUTBOX_FULL)
        return bool(victims)

    def forget(self, db: sqlite3.Connection, *, rows: int = _BATCH, bytes_over: int | None = None) -> int:
        """Delete the oldest rows that the broker has acknowledged; returns how many."""
        gone: list[tuple[int]] = []
        query = "SELECT seq, size, acked FROM rows WHERE acked = 1 OR again = 1 ORDER BY seq LIMIT ?"
        for seq, size, acked in db.execute(query, (rows + len(self.in_flight),)).fetchall():
            if (
                (not acked and seq in self.in_flight)
                or len(gone) >= rows
                or (bytes_over is not None and bytes_over <= 0)
            ):
                continue
            gone.append((seq,))
            bytes_over = None if bytes_over is None else bytes_over - size
            self.totals.bytes -= size
            self.totals.acked -= acked
            self.totals.depth -= 1 - acked
        db.executemany("DELETE FROM rows WHERE seq = ?", gone)
        self.totals.trimmed += len(gone)
        return len(gone)

    def drop_damaged(self, db: sqlite3.Connection, rows: list[tuple[str, int]]) -> None:
        """Delete rows whose bytes have changed; a gap row counts them."""
        self.totals.damaged += len(rows)
        self._drop(db, rows, reason=DAMAGED_ROW)

    def _drop(self, db: sqlite3.Connection, victims: list[tuple[str, int]], *, reason: str) -> None:
        """Delete rows; one gap row per epoch, extended while it has not been sent, counts them."""
        for epoch in {epoch for epoch, _ in victims}:
            seqs = sorted(seq for e, seq in victims if e == epoch)
            for seq in seqs:
                size, acked = db.execute("SELECT size, acked FROM rows WHERE seq = ?", (seq,)).fetchone()
                db.execute("DELETE FROM rows WHERE seq = ?", (seq,))
                self.totals.bytes -= size
                self.totals.dead -= acked == _DEAD
                self.totals.depth -= acked == 0
            self.write_gap(db, epoch, (seqs[0], seqs[-1], len(seqs)), reason)

    def write_gap(self, db: sqlite3.Connection, epoch: str, gap: tuple[int, int, int], reason: str) -> None:
        """Store that of the numbers ``gap[0]`` .. ``gap[1]`` ``gap[2]`` are gone."""
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
            self.totals.bytes -= old[4]
            self.totals.depth -= 1
        topic, payload = self.make_gap(epoch=epoch, seq=number, first=first, last=last, dropped=dropped, reason=reason)
        size = row_size(topic, payload)
        db.execute(
            "INSERT INTO rows(seq, epoch, topic, payload, crc, size, priority, gap_first, gap_last, gap_dropped,"
            " gap_reason) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (number, epoch, topic, payload, checksum(topic, payload), size, int(Priority.HIGH), first, last, dropped,
             reason),
        )  # fmt: skip
        self.totals.bytes += size
        self.totals.depth += 1
        self.totals.dropped += count
        set_meta(db, "dropped", self.totals.dropped)


def set_meta(db: sqlite3.Connection, key: str, value: int | str) -> None:
    """Note something about the file itself."""
    db.execute("INSERT INTO meta(key, value) VALUES(?, ?) ON CONFLICT(key) DO UPDATE SET value = ?2", (key, value))


def checksum(topic: str, payload: bytes) -> int:
    """CRC-32 of topic and payload: tells a row whose bytes have changed on the disk."""
    return zlib.crc32(payload, zlib.crc32(topic.encode()))


def row_size(topic: str, payload: bytes) -> int:
    """What a row takes of the byte cap."""
    return len(topic.encode()) + len(payload) + _ROW_OVERHEAD


def _is_whole(topic: object, payload: object, crc: object) -> bool:
    return isinstance(payload, bytes) and isinstance(topic, str) and checksum(topic, payload) == crc
