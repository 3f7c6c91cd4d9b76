"""The box's half of what is on its way: updates until their receipt, a bank while it arrives and once it is whole.

One SQLite file, safe against kill and power cut. It must not know sockets.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge.database import Database, DatabaseKind
from edge.errors import StoreError
from edge.federation.wire import encode_update

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from edge.federation.update import MemoryUpdate

_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE uploads(
  id INTEGER PRIMARY KEY AUTOINCREMENT, sha256 TEXT NOT NULL UNIQUE, embedding_id TEXT NOT NULL, product TEXT NOT NULL,
  round INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE TABLE download(
  one INTEGER PRIMARY KEY CHECK(one = 1), pool TEXT NOT NULL, version INTEGER NOT NULL, sha256 TEXT NOT NULL,
  size INTEGER NOT NULL);
CREATE TABLE parts(start INTEGER PRIMARY KEY, body BLOB NOT NULL);
CREATE TABLE banks(
  pool TEXT PRIMARY KEY, version INTEGER NOT NULL, sha256 TEXT NOT NULL, payload BLOB NOT NULL) WITHOUT ROWID;
"""
_FILE: DatabaseKind[StoreError] = DatabaseKind(
    name="spool",
    application_id=0x4C4E5746,  # "LNWF"
    version=1,
    schema=_SCHEMA,
    error=StoreError,
    full=StoreError,
    kept="nothing that was accepted is lost",
    in_use="give each box its own state_dir",
    pragmas=("auto_vacuum=INCREMENTAL", "locking_mode=EXCLUSIVE"),
)


@dataclass(frozen=True, slots=True)
class Upload:
    """An encoded update that has no receipt yet; sha256 in hex is of the payload."""

    id: int
    sha256: str
    embedding_id: str
    product: str
    round: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Download:
    """How much of a bank has arrived; size in bytes and sha256 are of the whole."""

    version: int
    sha256: str
    size: int
    have: int = 0


class Spool:
    """Updates and banks of one box on disk; any thread may call any method.

    Args:
        path: the database file; a damaged one is put aside (:attr:`damage`) and a new one begun.
        max_waiting: updates without receipt that are kept, the newest; a fleet that was away for days wants no more.

    Raises:
        StoreError: the file cannot be opened, is in use, or belongs to another program.
    """

    def __init__(self, path: Path, *, max_waiting: int = 8) -> None:
        self.path = path
        self.given_up = 0
        self._max_waiting = max_waiting
        self._file = Database(_FILE, path)
        self._file.open()

    @property
    def damage(self) -> str:
        """What was found damaged, and where it is kept; empty where nothing was."""
        return self._file.damage

    def close(self) -> None:
        """Close the file, for good: a late call must not take it from the box that starts next."""
        self._file.close(for_good=True)

    @property
    def waiting(self) -> int:
        """Updates that have no receipt yet."""
        return int(self._file.do(lambda db: db.execute("SELECT count(*) FROM uploads").fetchone()[0]))

    @property
    def round(self) -> int:
        """The round that the aggregator named last; 1 before it named any."""

        def work(db: sqlite3.Connection) -> int:
            row = db.execute("SELECT value FROM meta WHERE key = 'round'").fetchone()
            return 1 if row is None else int(row[0])

        return self._file.do(work)

    def keep_round(self, number: int) -> None:
        """Remember the round: an update that is made after a restart, with nobody there to ask, names it."""
        self._file.do(lambda db: db.execute("INSERT OR REPLACE INTO meta VALUES ('round', ?)", (number,)))

    def put(self, update: MemoryUpdate) -> None:
        """Keep an update; on disk when this returns.

        Raises:
            FederationError: it cannot be encoded.
            StoreError: it cannot be stored; a later call may succeed.
        """
        payload = encode_update(update)
        row = (hashlib.sha256(payload).hexdigest(), update.embedding_id, update.product, update.round, payload)

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT OR IGNORE INTO uploads(sha256, embedding_id, product, round, payload) VALUES (?, ?, ?, ?, ?)",
                row,
            )
            self.given_up += db.execute(
                "DELETE FROM uploads WHERE id NOT IN (SELECT id FROM uploads ORDER BY id DESC LIMIT ?)",
                (self._max_waiting,),
            ).rowcount

        self._file.do(work)

    def first(self) -> Upload | None:
        """Return the oldest update that has no receipt."""

        def work(db: sqlite3.Connection) -> Upload | None:
            query = "SELECT id, sha256, embedding_id, product, round, payload FROM uploads ORDER BY id LIMIT 1"
            while (row := db.execute(query).fetchone()) is not None:
                upload = Upload(*row)
                if _is_whole(upload.payload, upload.sha256):
                    return upload
                self._forget(db, upload.id)
                self.given_up += 1
            return None

        return self._file.do(work)

    def done(self, upload: Upload) -> None:
        """Forget an update: its receipt is here, or it can never be taken."""
        self._file.do(lambda db: self._forget(db, upload.id))

    def download(self, pool: str) -> Download | None:
        """Return how far the bank of a pool has arrived, None where nothing has."""

        def work(db: sqlite3.Connection) -> Download | None:
            row = db.execute("SELECT version, sha256, size FROM download WHERE pool = ?", (pool,)).fetchone()
            if row is None:
                return None
            have = db.execute("SELECT coalesce(max(start + length(body)), 0) FROM parts").fetchone()[0]
            return Download(row[0], row[1], row[2], have)

        return self._file.do(work)

    def take_part(self, pool: str, bank: Download, body: bytes) -> Download:
        """Keep the next bytes of a bank; another bank than before begins anew.

        Args:
            pool: whose bank.
            bank: what it is; ``have`` is where the bytes belong.
            body: the bytes.
        """

        def work(db: sqlite3.Connection) -> None:
            if not bank.have:
                self._abandon(db)
                db.execute("INSERT INTO download VALUES (1, ?, ?, ?, ?)", (pool, bank.version, bank.sha256, bank.size))
            db.execute("INSERT OR REPLACE INTO parts VALUES (?, ?)", (bank.have, body))

        # A part that a power cut takes is asked for again.
        self._file.do(work, durable=False)
        return Download(bank.version, bank.sha256, bank.size, bank.have + len(body))

    def arrived(self) -> bytes:
        """Return the bytes that have arrived, in order."""
        return self._file.do(lambda db: b"".join(row[0] for row in db.execute("SELECT body FROM parts ORDER BY start")))

    def abandon(self) -> None:
        """Forget the bank that was arriving."""
        self._file.do(self._abandon)

    def keep_bank(self, pool: str, version: int, payload: bytes) -> None:
        """Keep a whole bank, in place of the pool's former one; on disk when this returns."""

        def work(db: sqlite3.Connection) -> None:
            row = (pool, version, hashlib.sha256(payload).hexdigest(), payload)
            db.execute("DELETE FROM banks")  # of other pools too: a box has one bundle at a time
            db.execute("INSERT INTO banks VALUES (?, ?, ?, ?)", row)
            self._abandon(db)

        self._file.do(work)

    def bank(self, pool: str) -> tuple[int, bytes] | None:
        """Return version and bytes of a pool's bank, None where there is none that is whole."""

        def work(db: sqlite3.Connection) -> tuple[int, bytes] | None:
            row = db.execute("SELECT version, sha256, payload FROM banks WHERE pool = ?", (pool,)).fetchone()
            return (row[0], row[2]) if row is not None and _is_whole(row[2], row[1]) else None

        return self._file.do(work)

    @staticmethod
    def _forget(db: sqlite3.Connection, number: int) -> None:
        db.execute("DELETE FROM uploads WHERE id = ?", (number,))

    @staticmethod
    def _abandon(db: sqlite3.Connection) -> None:
        db.execute("DELETE FROM download")
        db.execute("DELETE FROM parts")


def _is_whole(payload: object, sha256: str) -> bool:
    return isinstance(payload, bytes) and hashlib.sha256(payload).hexdigest() == sha256
