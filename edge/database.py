"""A SQLite file of ours: opened with checks, its errors typed, put aside where damaged. It must know no table."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from edge.errors import LinewardError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_E = TypeVar("_E", bound=LinewardError)
_T = TypeVar("_T")
_AGAIN_S = 0.01


class DamagedError(Exception):
    """The file is not readable as a database; internal to its owner, who puts it aside."""


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the file's content is broken; its numeric codes need Python 3.11."""
    text = str(error)
    return "malformed" in text or "not a database" in text or "disk image" in text


def is_full(error: sqlite3.Error) -> bool:
    """Whether the disk, or the file's allowance, is used up."""
    return "disk is full" in str(error)


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, *, durable: bool) -> Iterator[sqlite3.Connection]:
    """All of it or nothing.

    Args:
        db: in autocommit mode.
        durable: whether it is on disk, and not only in the log's pages in memory, when this returns.

    Raises:
        sqlite3.Error: it could not be committed, and is undone.
    """
    db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after some errors (a full disk), after others it has not.
        with contextlib.suppress(sqlite3.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")
        raise


@dataclass(frozen=True, slots=True)
class DatabaseKind(Generic[_E]):
    """What all files of one kind have in common.

    Attributes:
        name: for people: ``outbox``.
        application_id: in the file's header (``PRAGMA application_id``).
        version: of the tables (``PRAGMA user_version``).
        schema: SQL that makes the tables.
        error: what is raised; ``full`` where the disk is.
        full: a kind of ``error``.
        kept: what a full disk does not lose: ``nothing that was accepted is lost``.
        in_use: what to do about another process that has the file.
        pragmas: ``name=value``, before the first access; WAL and synchronous=FULL are always set.
        timeout_s: how long to wait for another process that has the file.
        migrations: SQL that leads from the version in the key to the next; a file of a version without is refused.
    """

    name: str
    application_id: int
    version: int
    schema: str
    error: type[_E]
    full: type[_E]
    kept: str
    in_use: str
    pragmas: Sequence[str] = ()
    timeout_s: float = 0.0
    migrations: Mapping[int, str] = field(default_factory=dict)

    def open(self, path: Path) -> sqlite3.Connection:
        """The database, checked and with its tables; made where it is missing.

        Raises:
            DamagedError: its pages are broken.
            LinewardError: of type ``error``: it is in use, cannot be opened, or is another program's or version's.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=self.timeout_s)
        except (OSError, sqlite3.Error) as error:
            raise self._unwritable(path, str(error)) from error
        try:
            self._prepare(db, path)
        except sqlite3.Error as error:
            db.close()
            if is_damage(error):
                raise DamagedError(str(error)) from error
            raise self.explain(error, path) from error
        except BaseException:
            db.close()
            raise
        return db

    def explain(self, error: sqlite3.Error, path: Path) -> _E:
        """SQLite's error as ours, with a cure."""
        text = str(error)
        if is_full(error):
            return self.full(f"{self.name} {path}: the disk is full; free space, {self.kept}")
        if "locked" in text:
            return self.error(f"{self.name} {path} is in use by another process; {self.in_use}")
        if "readonly" in text or "unable to open" in text:
            return self._unwritable(path, text)
        return self.error(f"{self.name} {path}: {text}; check the disk and the file's permissions")

    def put_aside(self, path: Path) -> Path:
        """Rename a damaged database and its companions; returns the new name of the database.

        Raises:
            LinewardError: of type ``error``: the folder does not allow it.
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
            raise self.error(f"{self.name} {path} is damaged and cannot be renamed: {error}; move it away") from error
        return target

    def _prepare(self, db: sqlite3.Connection, path: Path) -> None:
        for pragma in self.pragmas:
            db.execute(f"PRAGMA {pragma}")
        self._begin_wal(db)
        db.execute("PRAGMA synchronous=FULL")
        found = [row[0] for row in db.execute("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise DamagedError(str(found[0]))
        while (found_version := self._version_of(db, path)) != self.version:
            step = self.schema if found_version is None else self.migrations[found_version]
            version = self.version if found_version is None else found_version + 1
            try:
                db.executescript(
                    f"BEGIN IMMEDIATE; {step} PRAGMA application_id={self.application_id};"
                    f" PRAGMA user_version={version}; COMMIT;"
                )
            except sqlite3.OperationalError:
                # Another process may have made the tables between our look and our turn.
                if db.in_transaction:
                    db.execute("ROLLBACK")
                if self._version_of(db, path) == found_version:
                    raise

    def _begin_wal(self, db: sqlite3.Connection) -> None:
        """Turn to write-ahead logging. SQLite does not wait for others here, whatever the timeout says."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                db.execute("PRAGMA journal_mode=WAL")
            except sqlite3.OperationalError as error:  # noqa: PERF203 (at most a hundred times a second)
                if "locked" not in str(error) or time.monotonic() >= deadline:
                    raise
                time.sleep(_AGAIN_S)
            else:
                return

    def _version_of(self, db: sqlite3.Connection, path: Path) -> int | None:
        """Which version's tables are there, of those that lead to ours; None: an empty file, which is nobody's yet."""
        db.execute("BEGIN")  # one look at all three: another process may be making the tables
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        db.execute("ROLLBACK")
        if application == self.application_id:
            if all(step in self.migrations for step in range(version, self.version)) and version <= self.version:
                return version
            raise self.error(
                f"{self.name} {path} has schema {version}, this program knows {self.version}; name another file"
            )
        if tables:
            raise self.error(f"{self.name} {path} is a database of another program; name another file")
        return None

    def _unwritable(self, path: Path, text: str) -> _E:
        return self.error(f"{self.name} {path}: {text}; name a file in a folder that this user can write to")


class Database(Generic[_E]):
    """One file of a kind; any thread may call any method.

    It is opened by the first that needs it, and again after :meth:`close`. A damaged one is put aside (:attr:`damage`)
    and a new one begun, also where the damage shows only within a piece of work, which is then done in the new one.

    Args:
        kind: of file.
        path: where it lies.
        lost: what a damaged file costs, for :attr:`damage`: ``keys of earlier commands are forgotten``.
    """

    def __init__(self, kind: DatabaseKind[_E], path: Path, *, lost: str = "") -> None:
        self.path = path
        self.damage = ""
        self._kind = kind
        self._lost = f", {lost}" if lost else ""
        self._lock = threading.RLock()
        self._ended = False
        self._db: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open the file now, where it is not open.

        Raises:
            LinewardError: of the kind's ``error``: it is in use, cannot be opened, is another program's or version's,
                or was closed for good.
        """
        with self._lock:
            self._opened()

    def close(self, *, for_good: bool = False) -> None:
        """Close the file; the next call opens it again, or is refused where it was closed ``for_good``."""
        with self._lock:
            self._ended |= for_good
            if self._db is not None:
                self._db.close()
                self._db = None

    def do(self, work: Callable[[sqlite3.Connection], _T], *, durable: bool = True) -> _T:
        """Do a piece of work in a transaction of its own.

        Args:
            work: what to do; done once more, in a new file, where the old one shows its damage.
            durable: as in :func:`transaction`.

        Raises:
            LinewardError: of the kind's ``error``: the file cannot be used; nothing is done, a later call may succeed.
        """
        with self._lock:
            try:
                return self._transact(work, durable=durable)
            except sqlite3.Error as error:
                if not is_damage(error):
                    raise self._kind.explain(error, self.path) from error
                self._put_aside(error)
            try:
                return self._transact(work, durable=durable)
            except sqlite3.Error as error:
                raise self._kind.explain(error, self.path) from error

    def _transact(self, work: Callable[[sqlite3.Connection], _T], *, durable: bool) -> _T:
        with transaction(self._opened(), durable=durable) as db:
            return work(db)

    def _opened(self) -> sqlite3.Connection:
        if self._db is not None:
            return self._db
        if self._ended:
            raise self._kind.error(f"{self._kind.name} {self.path} is closed")
        try:
            self._db = self._kind.open(self.path)
        except DamagedError as error:
            self._put_aside(error)
            try:
                self._db = self._kind.open(self.path)
            except DamagedError as again:
                raise self._kind.error(
                    f"{self._kind.name} {self.path}: {again} as soon as it is made; check the disk"
                ) from again
        return self._db

    def _put_aside(self, error: Exception) -> None:
        self.close()
        self.damage = f"{error}; kept as {self._kind.put_aside(self.path).name}{self._lost}"
