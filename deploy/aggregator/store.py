"""The aggregator's memory on disk: rounds, uploads on their way and whole, banks, events. One SQLite file.

What a call stored is on disk when its transaction ends. It must not know sockets, nor when a round closes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import threading
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from deploy.aggregator.records import Bank, Event, EventKind, Partial, Round, RoundState, Upload, UploadState
from deploy.aggregator.store_file import FILE, Marks, ServiceLock
from edge.database import DamagedError, is_damage
from edge.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

MAX_EVENTS = 10_000
MAX_EVENT_TEXT = 1000
_UPLOAD = (
    "id, pool, box, product, subclass, round_sent, round_counted, sha256, nonce, size, state, reasons, released,"
    " received"
)
_BANK = "pool, version, round, columns, sha256, size, inputs, origin, created"
_ROUND = "pool, round, state, opened, closed, boot, deadline_ns, remaining_ns, attempts, note"
_PARTIAL = "id, box, sha256, pool, round, size, stored"


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Store:
    """The aggregator's file; any thread may call any method, one after the other.

    Args:
        path: the database; ``-wal``, ``-shm``, ``-mark`` and ``-lock`` files lie beside it.
        serve: for the service: makes the file, keeps a second service away, puts a damaged file aside
            (:attr:`damage`) and begins a new one. An operator's command opens what is there beside the service.

    Raises:
        StoreError: the file cannot be opened, is in use, or belongs to another program or version.
    """

    def __init__(self, path: Path, *, serve: bool = True) -> None:
        self.path = path
        self.damage = ""
        self._serve = serve
        self._mutex = threading.RLock()
        self._depth = 0
        self._lock = ServiceLock(path) if serve else None
        try:
            self._marks = Marks(path)
            self._db = self._open()
        except BaseException:
            if self._lock is not None:
                self._lock.close()
            raise

    def __enter__(self) -> Store:  # noqa: PYI034 (Self needs Python 3.11)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        with self._mutex:
            self._db.close()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All calls within it take effect together, on disk when it ends, or none of them.

        Raises:
            StoreError: nothing was stored; :class:`.store_file.StoreFullError` where a later try may succeed.
        """
        with self._mutex, self._translated():
            if self._depth:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            self._depth = 1
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._depth = 0

    def pools(self) -> list[str]:
        """Names of all pools, sorted."""
        return [row[0] for row in self._rows("SELECT pool FROM pools ORDER BY pool")]

    def add_pool(self, pool: str, embedding_id: str) -> int:
        """Begin a pool where there is none; returns the number that its first round is to have."""
        mark = self._marks.of(pool)
        with self.transaction():
            self._run("INSERT OR IGNORE INTO pools VALUES (?, ?, ?)", pool, embedding_id, mark.version)
        return mark.round

    def open_round(self, pool: str, number: int, *, opened: str, boot: str, deadline_ns: int, left_ns: int) -> None:
        """Begin a round."""
        with self.transaction():
            self._marks.raise_to(pool, round_=number, version=0)
            values = (pool, number, RoundState.OPEN.value, opened, boot, deadline_ns, left_ns)
            self._run(
                "INSERT INTO rounds(pool, round, state, opened, boot, deadline_ns, remaining_ns)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                *values,
            )

    def current_round(self, pool: str) -> Round | None:
        """The open round of a pool; None where the pool is not known."""
        found = self.rounds(state=RoundState.OPEN, pool=pool)
        return found[-1] if found else None

    def rounds(self, *, state: RoundState, pool: str | None = None) -> list[Round]:
        """All rounds of a state, oldest first."""
        query = f"SELECT {_ROUND} FROM rounds WHERE state = ? AND (? IS NULL OR pool = ?) ORDER BY pool, round"  # noqa: S608 (own column names)
        return [Round(r[0], r[1], RoundState(r[2]), *r[3:]) for r in self._rows(query, state.value, pool, pool)]

    def set_deadline(self, item: Round, *, boot: str, deadline_ns: int, left_ns: int, note: str | None = None) -> None:
        """Put a round's deadline elsewhere, or note how much of it is left."""
        query = (
            "UPDATE rounds SET boot = ?, deadline_ns = ?, remaining_ns = ?, note = coalesce(?, note)"
            " WHERE pool = ? AND round = ?"
        )
        with self.transaction():
            self._run(query, boot, deadline_ns, left_ns, note, item.pool, item.round)

    def set_round_state(
        self, pool: str, number: int, state: RoundState, *, closed: str | None = None, note: str = ""
    ) -> None:
        """Move a round on; ``closed`` is kept where it is not given."""
        query = "UPDATE rounds SET state = ?, closed = coalesce(?, closed), note = ? WHERE pool = ? AND round = ?"
        with self.transaction():
            self._run(query, state.value, closed, note, pool, number)

    def count_attempt(self, pool: str, number: int) -> None:
        """Note that merging a round is begun once more."""
        with self.transaction():
            self._run("UPDATE rounds SET attempts = attempts + 1 WHERE pool = ? AND round = ?", pool, number)

    def partial(self, box: str, sha256: str) -> Partial | None:
        """The update of this hash that a box is sending."""
        rows = self._rows(f"SELECT {_PARTIAL} FROM partials WHERE box = ? AND sha256 = ?", box, sha256)  # noqa: S608 (own column names)
        return Partial(*rows[0]) if rows else None

    def begin_partial(self, *, box: str, sha256: str, pool: str, round_: int, size: int) -> None:
        """Make room for an update; a box sends one at a time for a pool, so what it began before is forgotten."""
        with self.transaction():
            self._run("DELETE FROM partials WHERE box = ? AND pool = ?", box, pool)
            query = "INSERT INTO partials(box, sha256, pool, round, size) VALUES (?, ?, ?, ?, ?)"
            self._run(query, box, sha256, pool, round_, size)

    def promised_bytes(self) -> int:
        """Declared sizes of all updates on their way."""
        return int(self._rows("SELECT coalesce(sum(size), 0) FROM partials")[0][0])

    def append_chunk(self, partial: Partial, body: bytes) -> None:
        """Add bytes to the end of what has arrived."""
        with self.transaction():
            self._run("INSERT INTO chunks VALUES (?, ?, ?)", partial.id, partial.stored, body)
            self._run("UPDATE partials SET stored = stored + ? WHERE id = ?", len(body), partial.id)

    def partial_bytes(self, partial: Partial) -> bytes:
        """All that has arrived, in order."""
        query = "SELECT body FROM chunks WHERE partial = ? ORDER BY start"
        return b"".join(row[0] for row in self._rows(query, partial.id))

    def drop_partial(self, partial: Partial) -> None:
        """Forget what has arrived."""
        with self.transaction():
            self._run("DELETE FROM partials WHERE id = ?", partial.id)

    def drop_partials_before(self, pool: str, round_: int) -> None:
        """Forget updates on their way that name a round below ``round_``: they cannot be counted any more."""
        with self.transaction():
            self._run("DELETE FROM partials WHERE pool = ? AND round < ?", pool, round_)

    def add_upload(
        self, *, pool: str, box: str, product: str, subclass: str, round_sent: int, round_counted: int, sha256: str,
        nonce: str, payload: bytes,
    ) -> None:  # fmt: skip
        """Keep a whole update, waiting for its round to close."""
        query = (
            "INSERT INTO uploads(pool, box, product, subclass, round_sent, round_counted, sha256, nonce, size, state,"
            " received, payload) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
        )
        values = (pool, box, product, subclass, round_sent, round_counted, sha256, nonce, len(payload))
        with self.transaction():
            self._run(query, *values, UploadState.WAITING.value, _utc_now(), payload)

    def upload(self, box: str, sha256: str) -> Upload | None:
        """The update of this hash that a box has sent."""
        return self._first_upload("box = ? AND sha256 = ?", box, sha256)

    def upload_by_id(self, number: int) -> Upload | None:
        """The update of this number."""
        return self._first_upload("id = ?", number)

    def upload_by_nonce(self, nonce: str) -> Upload | None:
        """The update that carried this nonce."""
        return self._first_upload("nonce = ?", nonce)

    def upload_of_round(self, *, pool: str, box: str, product: str, subclass: str, round_: int) -> Upload | None:
        """What a box has sent for a round."""
        where = "pool = ? AND box = ? AND product = ? AND subclass = ? AND round_sent = ?"
        return self._first_upload(where, pool, box, product, subclass, round_)

    def uploads(
        self, *, pool: str | None = None, round_counted: int | None = None, state: UploadState | None = None
    ) -> list[Upload]:
        """Updates in an order that does not depend on when they came: by pool, box and hash."""
        wanted = {"pool": pool, "round_counted": round_counted, "state": None if state is None else state.value}
        given = {name: value for name, value in wanted.items() if value is not None}
        where = " AND ".join(f"{name} = ?" for name in given) or "1"
        query = f"SELECT {_UPLOAD} FROM uploads WHERE {where} ORDER BY pool, box, sha256"  # noqa: S608 (own column names)
        return [_upload(row) for row in self._rows(query, *given.values())]

    def waiting_boxes(self, pool: str, round_: int) -> int:
        """Boxes whose updates wait for a round to close."""
        query = "SELECT count(DISTINCT box) FROM uploads WHERE pool = ? AND round_counted = ? AND state = 'waiting'"
        return int(self._rows(query, pool, round_)[0][0])

    def payload(self, upload: Upload) -> bytes | None:
        """The bytes of an update; None where they are gone or no longer those of its hash."""
        rows = self._rows("SELECT payload FROM uploads WHERE id = ?", upload.id)
        found = rows[0][0] if rows else None
        return found if isinstance(found, bytes) and hashlib.sha256(found).hexdigest() == upload.sha256 else None

    def set_upload(
        self,
        number: int,
        state: UploadState,
        *,
        reasons: Sequence[str] = (),
        round_counted: int | None = None,
        released: bool | None = None,
    ) -> None:
        """Decide on an update; what is not given stays."""
        query = (
            "UPDATE uploads SET state = ?, reasons = ?, round_counted = coalesce(?, round_counted),"
            " released = coalesce(?, released) WHERE id = ?"
        )
        with self.transaction():
            self._run(query, state.value, json.dumps(list(reasons)), round_counted, released, number)

    def last_version(self, pool: str) -> int:
        """The highest version that a bank of a pool was given, 0 before the first."""
        rows = self._rows("SELECT last_version FROM pools WHERE pool = ?", pool)
        return int(rows[0][0]) if rows else self._marks.of(pool).version

    def add_bank(
        self, *, pool: str, version: int, round_: int, columns: int, payload: bytes, inputs: Sequence[str], origin: str,
        created: str,
    ) -> None:  # fmt: skip
        """Keep a bank as the newest of its pool."""
        digest, names = hashlib.sha256(payload).hexdigest(), json.dumps(list(inputs))
        values = (pool, version, round_, columns, digest, len(payload), names, origin, created, payload)
        with self.transaction():
            self._marks.raise_to(pool, round_=round_, version=version)
            self._run("UPDATE pools SET last_version = ? WHERE pool = ?", version, pool)
            query = f"INSERT INTO banks({_BANK}, payload) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 (own names)
            self._run(query, *values)

    def banks(self, pool: str) -> list[Bank]:
        """The banks of a pool that are kept, newest first."""
        rows = self._rows(f"SELECT {_BANK} FROM banks WHERE pool = ? ORDER BY version DESC", pool)  # noqa: S608 (own column names)
        return [_bank(row) for row in rows]

    def bank(self, pool: str, version: int = 0) -> Bank | None:
        """A bank that is kept, the newest for version 0."""
        where = "pool = ?1 AND (?2 = 0 OR version = ?2) ORDER BY version DESC LIMIT 1"
        rows = self._rows(f"SELECT {_BANK} FROM banks WHERE {where}", pool, version)  # noqa: S608 (own column names)
        return _bank(rows[0]) if rows else None

    def newest(self, pool: str) -> tuple[int, int]:
        """Version and columns of a pool's newest bank, 0 and 0 before the first; asked with every greeting."""
        rows = self._rows("SELECT version, columns FROM banks WHERE pool = ? ORDER BY version DESC LIMIT 1", pool)
        return rows[0] if rows else (0, 0)

    def bank_bytes(self, bank: Bank, start: int = 0, length: int | None = None) -> bytes:
        """Bytes of a bank from ``start`` on."""
        query = "SELECT substr(payload, ?, ?) FROM banks WHERE pool = ? AND version = ?"
        rows = self._rows(query, start + 1, bank.size if length is None else length, bank.pool, bank.version)
        return bytes(rows[0][0]) if rows else b""

    def prune(self, pool: str, *, keep_banks: int, before_round: int, keep_quarantined: int) -> None:
        """Forget banks beyond the newest, and updates counted before a round; quarantined ones beyond a number."""
        with self.transaction():
            self._run(
                "DELETE FROM banks WHERE pool = ?1 AND version NOT IN"
                " (SELECT version FROM banks WHERE pool = ?1 ORDER BY version DESC LIMIT ?2)",
                pool,
                keep_banks,
            )
            self._run(
                "DELETE FROM uploads WHERE pool = ? AND round_counted < ? AND state IN ('accepted', 'refused')",
                pool,
                before_round,
            )
            self._run(
                "DELETE FROM uploads WHERE pool = ?1 AND state = 'quarantined' AND id NOT IN"
                " (SELECT id FROM uploads WHERE pool = ?1 AND state = 'quarantined' ORDER BY id DESC LIMIT ?2)",
                pool,
                keep_quarantined,
            )
            self._run(
                "DELETE FROM rounds WHERE pool = ? AND round < ? AND state NOT IN ('open', 'closing')",
                pool,
                before_round,
            )

    def add_event(self, kind: EventKind, text: str, *, pool: str = "", box: str = "", code: str = "") -> None:
        """Note something for operators; the oldest of more than 10,000 are forgotten."""
        with self.transaction():
            query = "INSERT INTO events(ts, kind, pool, box, code, text) VALUES (?, ?, ?, ?, ?, ?)"
            self._run(query, _utc_now(), kind.value, pool, box, code, text[:MAX_EVENT_TEXT])
            self._run("DELETE FROM events WHERE id <= (SELECT max(id) FROM events) - ?", MAX_EVENTS)

    def events(self, *, after: int | None = None, limit: int = 100) -> list[Event]:
        """Events, oldest first: the newest ones, or those that come next after a number."""
        newest = "SELECT id, ts, kind, pool, box, code, text FROM events ORDER BY id DESC LIMIT ?"
        following = "SELECT id, ts, kind, pool, box, code, text FROM events WHERE id > ? ORDER BY id LIMIT ?"
        rows = self._rows(newest, limit)[::-1] if after is None else self._rows(following, after, limit)
        return [Event(r[0], r[1], EventKind(r[2]), *r[3:]) for r in rows]

    def _first_upload(self, where: str, *values: object) -> Upload | None:
        rows = self._rows(f"SELECT {_UPLOAD} FROM uploads WHERE {where}", *values)  # noqa: S608 (own column names)
        return _upload(rows[0]) if rows else None

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._mutex, self._translated():
            return self._db.execute(query, values).fetchall()

    def _run(self, query: str, *values: object) -> None:
        self._db.execute(query, values)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if is_damage(error) and self._serve:
                self._begin_anew(str(error))
                raise StoreError(f"store {self.path}: {self.damage}; boxes send again what has no receipt") from error
            raise FILE.explain(error, self.path) from error

    def _open(self) -> sqlite3.Connection:
        if not self._serve and not self.path.is_file():
            raise StoreError(f"store {self.path}: there is none; name the folder of an aggregator that has run")
        try:
            return FILE.open(self.path)
        except DamagedError as error:
            if not self._serve:
                raise StoreError(
                    f"store {self.path} is damaged ({error}); start the service, it begins anew"
                ) from error
            return self._fresh(str(error))

    def _begin_anew(self, why: str) -> None:
        self._db.close()
        self._db = self._fresh(why)

    def _fresh(self, why: str) -> sqlite3.Connection:
        aside = FILE.put_aside(self.path)
        self.damage = f"the database was damaged ({why}) and is kept as {aside.name}; a new one was begun"
        db = FILE.open(self.path)
        values = (_utc_now(), EventKind.DAMAGE.value, self.damage)
        db.execute("INSERT INTO events(ts, kind, pool, box, code, text) VALUES (?, ?, '', '', '', ?)", values)
        return db


def _bank(row: tuple[Any, ...]) -> Bank:
    values = (*row[:6], tuple(json.loads(row[6])), *row[7:])
    return Bank(**dict(zip(Bank.__slots__, values, strict=True)))


def _upload(row: tuple[Any, ...]) -> Upload:
    values = (*row[:10], UploadState(row[10]), tuple(json.loads(row[11])), bool(row[12]), row[13])
    return Upload(**dict(zip(Upload.__slots__, values, strict=True)))
