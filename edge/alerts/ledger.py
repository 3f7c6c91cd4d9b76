"""The ledger: what a publisher must remember beside its rows, in one SQLite file that survives kill and power cut.

Keys of commands with their answers, the latest UTC seen, topics to clear one day. Must not know who acts on it.
"""

from __future__ import annotations

import sqlite3
import threading
from typing import TYPE_CHECKING, TypeVar

from edge.database import DamagedError, DatabaseKind, is_damage, transaction
from edge.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

_T = TypeVar("_T")
_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE commands(n INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, digest TEXT NOT NULL, answer TEXT);
CREATE TABLE topics(topic TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_FILE: DatabaseKind[StoreError] = DatabaseKind(
    name="ledger",
    application_id=0x4C4E574C,  # "LNWL"
    version=1,
    schema=_SCHEMA,
    error=StoreError,
    full=StoreError,
    kept="nothing that was noted is lost",
    in_use="give each box its own state_dir",
    pragmas=("auto_vacuum=INCREMENTAL", "locking_mode=EXCLUSIVE"),
)


class Ledger:
    """Any thread may call any method; the file is opened by the first that needs it, and again after an error.

    A damaged file is put aside (:attr:`damage`) and a new one begun: keys noted before are then forgotten.

    Args:
        path: the database file.
        max_keys: the newest that are kept.
    """

    def __init__(self, path: Path, *, max_keys: int = 4096) -> None:
        self.path = path
        self.damage = ""
        self._max_keys = max_keys
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def seen_us(self) -> int:
        """The latest UTC noted, in microseconds since 1970; 0 before the first.

        Raises:
            StoreError: the file cannot be used.
        """

        def work(db: sqlite3.Connection) -> int:
            row = db.execute("SELECT value FROM meta WHERE key = 'seen_us'").fetchone()
            return 0 if row is None else int(row[0])

        return self._do(work, durable=False)

    def note_seen(self, moment_us: int) -> None:
        """Note a UTC, unless a later one is noted.

        Raises:
            StoreError: the file cannot be used.
        """
        query = (
            "INSERT INTO meta VALUES ('seen_us', ?) ON CONFLICT(key) DO UPDATE SET value = MAX(value, excluded.value)"
        )
        self._do(lambda db: db.execute(query, (moment_us,)), durable=False)

    def find(self, key: str) -> tuple[str, str | None] | None:
        """Digest and answer noted for a key; the answer is None where none was noted; None: a new key.

        Raises:
            StoreError: the file cannot be used.
        """

        def work(db: sqlite3.Connection) -> tuple[str, str | None] | None:
            row = db.execute("SELECT digest, answer FROM commands WHERE key = ?", (key,)).fetchone()
            return None if row is None else (str(row[0]), None if row[1] is None else str(row[1]))

        return self._do(work, durable=False)

    def begin(self, key: str, digest: str) -> None:
        """Note that a command is about to be done; on disk, synced, when this returns.

        Raises:
            StoreError: the file cannot be used; the command must not be done.
        """

        def work(db: sqlite3.Connection) -> None:
            number = db.execute("INSERT INTO commands(key, digest) VALUES (?, ?)", (key, digest)).lastrowid or 0
            db.execute("DELETE FROM commands WHERE n <= ?", (number - self._max_keys,))

        self._do(work)

    def finish(self, key: str, answer: str) -> None:
        """Note the answer to a command. Not synced: after a power cut it may read as interrupted, never as not begun.

        Raises:
            StoreError: the file cannot be used.
        """
        self._do(lambda db: db.execute("UPDATE commands SET answer = ? WHERE key = ?", (answer, key)), durable=False)

    def topics(self) -> frozenset[str]:
        """Retained topics that were published and not cleared.

        Raises:
            StoreError: the file cannot be used.
        """
        return self._do(lambda db: frozenset(row[0] for row in db.execute("SELECT topic FROM topics")), durable=False)

    def add_topics(self, topics: Iterable[str]) -> None:
        """Remember retained topics before they are published.

        Raises:
            StoreError: the file cannot be used.
        """
        rows = [(topic,) for topic in topics]
        self._do(lambda db: db.executemany("INSERT OR IGNORE INTO topics VALUES (?)", rows))

    def remove_topic(self, topic: str) -> None:
        """Forget a topic that the broker has cleared.

        Raises:
            StoreError: the file cannot be used.
        """
        self._do(lambda db: db.execute("DELETE FROM topics WHERE topic = ?", (topic,)), durable=False)

    def _do(self, work: Callable[[sqlite3.Connection], _T], *, durable: bool = True) -> _T:
        """Run work in a transaction; a file found damaged is put aside and the work done in a new one."""
        with self._lock:
            try:
                return self._transact(work, durable=durable)
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise _FILE.explain(error, self.path) from error
                self._put_aside(error)
            try:
                return self._transact(work, durable=durable)
            except sqlite3.Error as error:
                raise _FILE.explain(error, self.path) from error

    def _transact(self, work: Callable[[sqlite3.Connection], _T], *, durable: bool) -> _T:
        with transaction(self._db if self._db is not None else self._open(), durable=durable) as db:
            return work(db)

    def _open(self) -> sqlite3.Connection:
        try:
            self._db = _FILE.open(self.path)
        except DamagedError as error:
            self._put_aside(error)
            try:
                self._db = _FILE.open(self.path)
            except DamagedError as again:
                raise StoreError(f"ledger {self.path}: {again} as soon as it is made; check the disk") from again
        return self._db

    def _put_aside(self, error: Exception) -> None:
        self.close()
        self.damage = f"{error}; kept as {_FILE.put_aside(self.path).name}, keys of earlier commands are forgotten"
