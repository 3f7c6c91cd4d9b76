"""The aggregator's file: opening, checking and putting aside the SQLite database, and the mark beside it.

Knows pages and files; what a row means is the store's business.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.alerts.outbox_file import DamagedError, is_damage, is_full, quarantine
from edge.errors import OutboxError, StoreError

_APPLICATION_ID = 0x4C4E5741  # "LNWA"
_USER_VERSION = 1
_WAL_LIMIT_BYTES = 64 * 2**20
_MARK_LIMIT_BYTES = 2**20
BUSY_S = 5.0  # an operator's command beside the service holds the lock for milliseconds
_SCHEMA = """
CREATE TABLE pools(
  pool TEXT PRIMARY KEY, embedding_id TEXT NOT NULL, last_version INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE rounds(
  pool TEXT NOT NULL, round INTEGER NOT NULL, state TEXT NOT NULL, opened TEXT NOT NULL, closed TEXT,
  boot TEXT NOT NULL, deadline_ns INTEGER NOT NULL, remaining_ns INTEGER NOT NULL,
  attempts INTEGER NOT NULL DEFAULT 0, note TEXT NOT NULL DEFAULT '',
  PRIMARY KEY(pool, round)) WITHOUT ROWID;
CREATE TABLE partials(
  id INTEGER PRIMARY KEY AUTOINCREMENT, box TEXT NOT NULL, sha256 TEXT NOT NULL, pool TEXT NOT NULL,
  round INTEGER NOT NULL, size INTEGER NOT NULL, stored INTEGER NOT NULL DEFAULT 0, UNIQUE(box, sha256));
CREATE TABLE chunks(
  partial INTEGER NOT NULL REFERENCES partials(id) ON DELETE CASCADE, start INTEGER NOT NULL, body BLOB NOT NULL,
  UNIQUE(partial, start));
CREATE TABLE uploads(
  id INTEGER PRIMARY KEY AUTOINCREMENT, pool TEXT NOT NULL, box TEXT NOT NULL, product TEXT NOT NULL,
  subclass TEXT NOT NULL, round_sent INTEGER NOT NULL, round_counted INTEGER NOT NULL, sha256 TEXT NOT NULL,
  nonce TEXT NOT NULL UNIQUE, size INTEGER NOT NULL, state TEXT NOT NULL, reasons TEXT NOT NULL DEFAULT '[]',
  released INTEGER NOT NULL DEFAULT 0, received TEXT NOT NULL, payload BLOB,
  UNIQUE(pool, box, product, subclass, round_sent), UNIQUE(box, sha256));
CREATE INDEX counted ON uploads(pool, round_counted, state);
CREATE INDEX states ON uploads(state, id);
CREATE TABLE banks(
  pool TEXT NOT NULL, version INTEGER NOT NULL, round INTEGER NOT NULL, columns INTEGER NOT NULL,
  sha256 TEXT NOT NULL, size INTEGER NOT NULL, inputs TEXT NOT NULL, origin TEXT NOT NULL, created TEXT NOT NULL,
  payload BLOB NOT NULL, UNIQUE(pool, version));
CREATE TABLE events(
  id INTEGER PRIMARY KEY AUTOINCREMENT, ts TEXT NOT NULL, kind TEXT NOT NULL, pool TEXT NOT NULL, box TEXT NOT NULL,
  code TEXT NOT NULL, text TEXT NOT NULL);
"""


class PoolMark(BaseModel):
    """Highest round and bank version that a pool was ever given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    round: int = Field(ge=1)
    version: int = Field(ge=0)


class _Marks(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    pools: dict[str, PoolMark]


def open_database(path: Path, *, create: bool) -> sqlite3.Connection:
    """The database, checked and with its tables; others may open it too.

    Raises:
        DamagedError: its pages are broken.
        StoreError: it cannot be opened, is another program's or version's, or is missing and not to be created.
    """
    if not create and not path.is_file():
        raise StoreError(f"store {path}: there is none; name the folder of an aggregator that has run")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_S)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"store {path}: {error}; name a file in a folder that this user can write to") from error
    try:
        _prepare(db, path)
    except sqlite3.Error as error:
        db.close()
        if is_damage(error):
            raise DamagedError(str(error)) from error
        raise translate(error, path) from error
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")  # a receipt means durability
    db.execute("PRAGMA foreign_keys=ON")
    db.execute(f"PRAGMA journal_size_limit={_WAL_LIMIT_BYTES}")
    found = [row[0] for row in db.execute("PRAGMA quick_check(1)")]
    if found != ["ok"]:
        raise DamagedError(str(found[0]))
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if (application, version) == (_APPLICATION_ID, _USER_VERSION):
        return
    if application == _APPLICATION_ID:
        raise StoreError(f"store {path} has schema {version}, this program knows {_USER_VERSION}; name another file")
    if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise StoreError(f"store {path} is a database of another program; name another file")
    db.executescript(
        f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id={_APPLICATION_ID};"
        f" PRAGMA user_version={_USER_VERSION}; COMMIT;"
    )


def translate(error: sqlite3.Error, path: Path) -> StoreError:
    """SQLite's error as ours, with a cure."""
    text = str(error)
    if is_full(error):
        return StoreFullError(f"store {path}: the disk is full; free space, nothing that has a receipt is lost")
    if "locked" in text:
        return StoreError(f"store {path} is in use by another process; end it or try again")
    if "readonly" in text or "unable to open" in text:
        return StoreError(f"store {path}: {text}; name a file in a folder that this user can write to")
    return StoreError(f"store {path}: {text}; check the disk and the file's permissions")


class StoreFullError(StoreError):
    """The disk has no room; what was to be stored is not, and may be sent again."""


def put_aside(path: Path) -> Path:
    """Rename a damaged database and its companions; returns the new name.

    Raises:
        StoreError: the folder does not allow it.
    """
    try:
        return quarantine(path)
    except OutboxError as error:
        raise StoreError(f"store {path} is damaged and cannot be renamed ({error}); move it away") from error


class ServiceLock:
    """Keeps a second service from the same store; an operator's command needs none. Gone with the process.

    Raises:
        StoreError: another service holds it, or the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        name = Path(f"{path}-lock")
        try:
            name.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise StoreError(f"store {path}: {error}; name a file in a folder that this user can write to") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise StoreError(f"store {path} is served by another aggregator; end it first") from error

    def close(self) -> None:
        """Let another service have the store."""
        os.close(self._file)


class Marks:
    """Highest rounds and versions in a file of their own, written before the commit that uses them.

    Boxes know these numbers: after a damaged database the count goes on above them, so that no version ever means two
    banks. Not synced: after a crash of the process the page cache has it.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(f"{path}-mark")

    def of(self, pool: str) -> PoolMark:
        """The mark of a pool; round 1 and version 0 where it has none."""
        return self._read().get(pool, PoolMark(round=1, version=0))

    def raise_to(self, pool: str, *, round_: int, version: int) -> None:
        """Put a pool's mark up, never down.

        Raises:
            StoreError: the file cannot be written.
        """
        pools = self._read()  # an operator's command may have written it meanwhile
        old = pools.get(pool)
        new = PoolMark(round=max(old.round, round_), version=max(old.version, version)) if old else None
        new = new or PoolMark(round=round_, version=version)
        if new == old:
            return
        text = json.dumps({"pools": {name: mark.model_dump() for name, mark in (pools | {pool: new}).items()}})
        beside = self._path.with_name(f"{self._path.name}.new")
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(self._path)
        except OSError as error:
            raise StoreFullError(f"store mark {self._path}: {error}; free space or correct its permissions") from error

    def _read(self) -> dict[str, PoolMark]:
        try:
            with self._path.open("rb") as file:
                return _Marks.model_validate_json(file.read(_MARK_LIMIT_BYTES)).pools
        except (OSError, ValidationError):
            return {}
