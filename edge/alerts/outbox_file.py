"""The outbox's files: opening, checking and quarantining the SQLite database, and the mark beside it.

Knows pages and files; what a row means and when it goes is the outbox's business.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sqlite3
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from edge.errors import OutboxError

_APPLICATION_ID = 0x4C4E5744  # "LNWD"
_USER_VERSION = 1
_WAL_LIMIT_BYTES = 4 * 2**20
_MARK_BYTES = 40
_MARK_FORM = re.compile(rb"([0-9a-f]{16}) (\d{1,19})\s*")
_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE rows(
  seq INTEGER PRIMARY KEY, epoch TEXT NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL, crc INTEGER NOT NULL,
  size INTEGER NOT NULL, priority INTEGER NOT NULL, acked INTEGER NOT NULL DEFAULT 0, acked_at INTEGER,
  again INTEGER NOT NULL DEFAULT 0, sent INTEGER NOT NULL DEFAULT 0, gap_first INTEGER, gap_dropped INTEGER,
  gap_last INTEGER, gap_reason TEXT);
CREATE INDEX lane ON rows(seq) WHERE acked = 0;
CREATE INDEX victims ON rows(priority, seq) WHERE acked = 0 AND gap_first IS NULL;
"""


class DamagedError(Exception):
    """The database file is not readable as one; internal to the outbox, which puts it aside."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Highest number ever handed out, in a file of its own: tells whether a damaged log has lost rows."""

    epoch: str
    seq: int


def boottime_ns() -> int:
    """Nanoseconds since boot, time asleep included where the system counts it; never set back."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic_ns() if clock is None else time.clock_gettime_ns(clock)


def boot_id() -> str:
    """Differs after every boot; empty where the system has no such thing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def new_epoch() -> str:
    """64 random bits as 16 hex digits: JSON numbers are exact to 53 bits only."""
    return secrets.token_hex(8)


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the file's content is broken; its numeric codes need Python 3.11."""
    text = str(error)
    return "malformed" in text or "not a database" in text or "disk image" in text


def is_full(error: sqlite3.Error) -> bool:
    """Whether the disk, or the file's allowance, is used up."""
    return "disk is full" in str(error)


def connect(path: Path) -> sqlite3.Connection:
    """The database, opened for this process alone, checked and with its tables.

    Raises:
        DamagedError: its pages are broken.
        OutboxError: it is in use, cannot be opened, or is another program's file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
    except (OSError, sqlite3.Error) as error:
        raise OutboxError(f"outbox {path}: {error}; name a file in a folder that this user can write to") from error
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
    db.execute("PRAGMA auto_vacuum=INCREMENTAL")
    # One process per outbox. Set before the first access, so no shared-memory file is needed either.
    db.execute("PRAGMA locking_mode=EXCLUSIVE")
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute(f"PRAGMA journal_size_limit={_WAL_LIMIT_BYTES}")
    found = [row[0] for row in db.execute("PRAGMA quick_check(1)")]
    if found != ["ok"]:
        raise DamagedError(str(found[0]))
    application = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if application == _APPLICATION_ID and version == _USER_VERSION:
        return
    if application == _APPLICATION_ID:
        raise OutboxError(f"outbox {path} has schema {version}, this program knows {_USER_VERSION}; name another file")
    if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise OutboxError(f"outbox {path} is a database of another program; name another file")
    db.executescript(
        f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id={_APPLICATION_ID};"
        f" PRAGMA user_version={_USER_VERSION}; COMMIT;"
    )


def translate(error: sqlite3.Error, path: Path) -> OutboxError:
    """SQLite's error as ours, with a cure."""
    text = str(error)
    if is_full(error):
        return OutboxError(f"outbox {path}: the disk is full; free space, nothing that was accepted is lost")
    if "locked" in text:
        return OutboxError(f"outbox {path} is in use by another process; give each box its own file")
    if "readonly" in text or "unable to open" in text:
        return OutboxError(f"outbox {path}: {text}; name a file in a folder that this user can write to")
    return OutboxError(f"outbox {path}: {text}; check the disk and the file's permissions")


def quarantine(path: Path) -> Path:
    """Rename the database and its companions aside; returns the new name of the database.

    Raises:
        OutboxError: the folder does not allow it.
    """
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    target = path.with_name(f"{path.name}.damaged-{stamp}")
    serial = 1
    while target.exists():
        serial += 1
        target = path.with_name(f"{path.name}.damaged-{stamp}-{serial}")
    try:
        for suffix in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{path}{suffix}").rename(f"{target}{suffix}")
    except OSError as error:
        raise OutboxError(f"outbox {path} is damaged and cannot be renamed: {error}; move it away") from error
    return target


class MarkFile:
    """The mark's file, written in place after each commit.

    Not synced: after a crash of the process the page cache still has it, and after a power cut a new epoch makes
    old numbers harmless.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(f"{path}-mark")
        self._file: int | None = None

    def read(self) -> Mark | None:
        """The last mark, None where there is none that can be read."""
        try:
            found = _MARK_FORM.fullmatch(self._path.read_bytes()[: 2 * _MARK_BYTES])
        except OSError:
            return None
        return Mark(found[1].decode(), int(found[2])) if found else None

    def write(self, mark: Mark) -> None:
        """Replace the mark in one write.

        Raises:
            OSError: as ``os.pwrite``.
        """
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
        os.pwrite(self._file, f"{mark.epoch} {mark.seq}".ljust(_MARK_BYTES - 1).encode() + b"\n", 0)

    def close(self) -> None:
        """Close the file; the next write opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
