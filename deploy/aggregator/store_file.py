"""The aggregator's file: the database's tables, the service's lock, and the marks beside it.

Knows pages and files; what a row means is the store's business.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.database import DatabaseKind
from edge.errors import StoreError

_MARK_LIMIT_BYTES = 2**20
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


class StoreFullError(StoreError):
    """The disk has no room; what was to be stored is not, and may be sent again."""


FILE: DatabaseKind[StoreError] = DatabaseKind(
    name="store",
    application_id=0x4C4E5741,  # "LNWA"
    version=1,
    schema=_SCHEMA,
    error=StoreError,
    full=StoreFullError,
    kept="nothing that has a receipt is lost",
    in_use="end it or try again",
    pragmas=("foreign_keys=ON", f"journal_size_limit={64 * 2**20}"),
    timeout_s=5.0,  # an operator's command beside the service holds the lock for milliseconds
)
"""The database; others may open it too."""


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
