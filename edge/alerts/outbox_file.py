"""The outbox's files: the database's tables, and the mark beside it.

Knows pages and files; what a row means and when it goes is the outbox's business.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from edge.database import DatabaseKind
from edge.errors import OutboxError

_MARK_BYTES = 40
_MARK_FORM = re.compile(rb"([0-9a-f]{16}) (\d{1,19})\s*")
_SCHEMA = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE rows(
  seq INTEGER PRIMARY KEY, epoch TEXT NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL, crc INTEGER NOT NULL,
  size INTEGER NOT NULL, priority INTEGER NOT NULL, acked INTEGER NOT NULL DEFAULT 0, acked_at INTEGER,
  again INTEGER NOT NULL DEFAULT 0, sent INTEGER NOT NULL DEFAULT 0, gap_first INTEGER, gap_dropped INTEGER,
  gap_last INTEGER, gap_reason TEXT, dead_reason TEXT);
CREATE INDEX lane ON rows(seq) WHERE acked = 0;
CREATE INDEX victims ON rows(priority, seq) WHERE acked = 0 AND gap_first IS NULL;
CREATE INDEX dead ON rows(seq) WHERE acked = 2;
"""
# Version 1 had no dead letters.
_MIGRATIONS = {
    1: "ALTER TABLE rows ADD COLUMN dead_reason TEXT; CREATE INDEX dead ON rows(seq) WHERE acked = 2;",
}


FILE: DatabaseKind[OutboxError] = DatabaseKind(
    name="outbox",
    application_id=0x4C4E5744,  # "LNWD"
    version=2,
    schema=_SCHEMA,
    migrations=_MIGRATIONS,
    error=OutboxError,
    full=OutboxError,
    kept="nothing that was accepted is lost",
    in_use="give each box its own file",
    # One process per outbox. Set before the first access, so no shared-memory file is needed either.
    pragmas=("auto_vacuum=INCREMENTAL", "locking_mode=EXCLUSIVE", f"journal_size_limit={4 * 2**20}"),
)
"""The database."""


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
