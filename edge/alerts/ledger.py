"""The ledger: what a publisher must remember beside its rows, in one SQLite file that survives kill and power cut.

Keys of commands with their answers, the latest UTC seen, topics to clear one day. Must not know who acts on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.database import Database, DatabaseKind
from edge.errors import StoreError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable
    from pathlib import Path

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
        self._max_keys = max_keys
        self._file = Database(_FILE, path, lost="keys of earlier commands are forgotten")

    @property
    def damage(self) -> str:
        """What was found damaged, and where it is kept; empty where nothing was."""
        return self._file.damage

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        self._file.close()

    def seen_us(self) -> int:
        """The latest UTC noted, in microseconds since 1970; 0 before the first.

        Raises:
            StoreError: the file cannot be used.
        """

        def work(db: sqlite3.Connection) -> int:
            row = db.execute("SELECT value FROM meta WHERE key = 'seen_us'").fetchone()
            return 0 if row is None else int(row[0])

        return self._file.do(work, durable=False)

    def note_seen(self, moment_us: int) -> None:
        """Note a UTC, unless a later one is noted.

        Raises:
            StoreError: the file cannot be used.
        """
        query = (
            "INSERT INTO meta VALUES ('seen_us', ?) ON CONFLICT(key) DO UPDATE SET value = MAX(value, excluded.value)"
        )
        self._file.do(lambda db: db.execute(query, (moment_us,)), durable=False)

    def find(self, key: str) -> tuple[str, str | None] | None:
        """Digest and answer noted for a key; the answer is None where none was noted; None: a new key.

        Raises:
            StoreError: the file cannot be used.
        """

        def work(db: sqlite3.Connection) -> tuple[str, str | None] | None:
            row = db.execute("SELECT digest, answer FROM commands WHERE key = ?", (key,)).fetchone()
            return None if row is None else (str(row[0]), None if row[1] is None else str(row[1]))

        return self._file.do(work, durable=False)

    def begin(self, key: str, digest: str) -> None:
        """Note that a command is about to be done; on disk, synced, when this returns.

        Raises:
            StoreError: the file cannot be used; the command must not be done.
        """

        def work(db: sqlite3.Connection) -> None:
            number = db.execute("INSERT INTO commands(key, digest) VALUES (?, ?)", (key, digest)).lastrowid or 0
            db.execute("DELETE FROM commands WHERE n <= ?", (number - self._max_keys,))

        self._file.do(work)

    def finish(self, key: str, answer: str) -> None:
        """Note the answer to a command. Not synced: after a power cut it may read as interrupted, never as not begun.

        Raises:
            StoreError: the file cannot be used.
        """
        self._file.do(
            lambda db: db.execute("UPDATE commands SET answer = ? WHERE key = ?", (answer, key)), durable=False
        )

    def topics(self) -> frozenset[str]:
        """Retained topics that were published and not cleared.

        Raises:
            StoreError: the file cannot be used.
        """
        return self._file.do(
            lambda db: frozenset(row[0] for row in db.execute("SELECT topic FROM topics")), durable=False
        )

    def add_topics(self, topics: Iterable[str]) -> None:
        """Remember retained topics before they are published.

        Raises:
            StoreError: the file cannot be used.
        """
        rows = [(topic,) for topic in topics]
        self._file.do(lambda db: db.executemany("INSERT OR IGNORE INTO topics VALUES (?)", rows))

    def remove_topic(self, topic: str) -> None:
        """Forget a topic that the broker has cleared.

        Raises:
            StoreError: the file cannot be used.
        """
        self._file.do(lambda db: db.execute("DELETE FROM topics WHERE topic = ?", (topic,)), durable=False)
