"""Disk space that the outbox's files own ahead of need, so that a full disk leaves them working within it.

Without it a full disk would wedge them: even to delete a row, SQLite first writes to its log, and the log is emptied
only into a database that may have to grow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from pathlib import Path

from edge.database import is_full

# The log is emptied at half of what it owns; only a larger transaction lets it grow.
_WAL_BYTES = 4 * 2**20
_WAL_PAGES = 500
_STEP_PAGES = 256
# Of what is kept over a restart, for the other files that a box opens beside.
_SPARE_BYTES = 2**20
_MOST_PAGES = 2**32 - 2  # SQLite's own limit


class OwnedSpace:
    """Lets the database grow by steps that are allocated first: none of its pages is ever without a place on the disk.

    Args:
        path: of the database. Where the system or its file system cannot allocate (``posix_fallocate``), files grow as
            SQLite likes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._kept = Path(f"{path}-space")
        self._file: int | None = None
        # Whether there is something to keep: not beside a file that another process has, or of another program.
        self._owned = False
        self._allocate = getattr(os, "posix_fallocate", None)

    def take_back(self) -> None:
        """Make room for opening the database: give up what :meth:`keep` has kept."""
        with contextlib.suppress(OSError):
            self._kept.unlink()
            self._owned = True

    def keep(self) -> None:
        """Keep the log's space until the next start, which would fail on a full disk without; after the connection.

        SQLite deletes the log of a database that is closed.
        """
        if self._allocate is None or not self._owned:
            return
        try:
            kept = os.open(self._kept, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            try:
                self._allocate(kept, 0, _WAL_BYTES + _SPARE_BYTES)
            finally:
                os.close(kept)
        except OSError:
            self.take_back()

    def own(self, db: sqlite3.Connection) -> None:
        """Take the log's space, and limit the database to its own. After a first write: the log is there then."""
        if self._allocate is None:
            return
        db.execute(f"PRAGMA wal_autocheckpoint={_WAL_PAGES}")
        pages, page_size = _pages(db)
        try:
            if self._file is None:
                # Held open as long as the connection: closing any descriptor of a file ends the process's locks on it
                # (fcntl(2)), SQLite's own too. The log has no locks.
                self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            self._allocate(self._file, 0, pages * page_size)
            self._own_log()
            self._owned = True
        except OSError as error:
            if not _is_used_up(error):
                self._allocate = None
                return
            # The first row that needs more will say so.
        db.execute(f"PRAGMA max_page_count={pages}")

    def _own_log(self) -> None:
        assert self._allocate is not None
        log = os.open(f"{self._path}-wal", os.O_RDWR | os.O_CLOEXEC)
        try:
            self._allocate(log, 0, _WAL_BYTES)
        finally:
            os.close(log)

    def grow(self, db: sqlite3.Connection) -> bool:
        """Let the database grow by a step; False where the disk has none. Outside of a transaction."""
        if self._allocate is None or self._file is None:
            return False
        pages, page_size = _pages(db)
        try:
            self._allocate(self._file, pages * page_size, _STEP_PAGES * page_size)
        except OSError as error:
            if _is_used_up(error):
                return False
            self._allocate = None
            db.execute(f"PRAGMA max_page_count={_MOST_PAGES}")
            return True
        db.execute(f"PRAGMA max_page_count={pages + _STEP_PAGES}")
        try:
            # A checkpoint cuts the file to the pages that the database counts: make it count them, as free ones.
            # The blob takes those that are free already, and leaves some for what a table needs to hold it.
            blob = db.execute("PRAGMA freelist_count").fetchone()[0] * 511 // 512 + _STEP_PAGES - 16
            db.execute("BEGIN IMMEDIATE")
            db.execute("INSERT INTO meta(key, value) VALUES('space', zeroblob(?))", (blob * (page_size - 4),))
            db.execute("DELETE FROM meta WHERE key = 'space'")
            db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if not is_full(error):
                raise
        grown, _ = _pages(db)
        db.execute(f"PRAGMA max_page_count={grown}")
        return grown > pages

    def release(self) -> None:
        """Close the file, after the connection: see :meth:`own`."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _is_used_up(error: OSError) -> bool:
    """Whether there is no space left, as against a file system that cannot allocate."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _pages(db: sqlite3.Connection) -> tuple[int, int]:
    """How many pages the database counts, and their size in bytes."""
    pages: int = db.execute("PRAGMA page_count").fetchone()[0]
    page_size: int = db.execute("PRAGMA page_size").fetchone()[0]
    return pages, page_size
