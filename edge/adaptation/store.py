"""AdaptationStore: followers across restarts, and the snapshots that frames were corrected by, in one SQLite file.

It must not know what a follower decides: a state is bytes, a snapshot is what its version's moments were.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edge.adaptation.moments import Moments
from edge.database import Database, DatabaseKind
from edge.errors import StoreError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable
    from pathlib import Path

    import numpy.typing as npt

    from edge.adaptation.follower import Snapshot

ADAPTATION_FILE = "adaptation.db"
# Enough for a day of snapshots of most lines; a few kilobytes each.
KEPT_SNAPSHOTS = 1000
# Numbers that a running box may give before its next save.
_AHEAD = 1000
_KEPT_BUNDLES = 4
_SCHEMA = """
CREATE TABLE cameras(camera TEXT NOT NULL, bundle TEXT NOT NULL, state BLOB NOT NULL, reserved INTEGER NOT NULL,
    saved_us INTEGER NOT NULL, PRIMARY KEY(camera, bundle)) WITHOUT ROWID;
CREATE TABLE snapshots(n INTEGER PRIMARY KEY AUTOINCREMENT, camera TEXT NOT NULL, version INTEGER NOT NULL,
    bundle TEXT NOT NULL, subclass TEXT NOT NULL, own REAL NOT NULL, shift REAL NOT NULL, made_us INTEGER NOT NULL,
    moments BLOB NOT NULL, UNIQUE(camera, version));
"""
_FILE: DatabaseKind[StoreError] = DatabaseKind(
    name="adaptation store",
    application_id=0x4C4E5741,  # "LNWA"
    version=1,
    schema=_SCHEMA,
    error=StoreError,
    full=StoreError,
    kept="nothing that was kept is lost",
    in_use="give each box its own state_dir",
    pragmas=("auto_vacuum=INCREMENTAL",),
    timeout_s=2.0,
)


@dataclass(frozen=True, slots=True)
class Kept:
    """What is kept of one camera's follower.

    Attributes:
        state: as :meth:`edge.adaptation.follower.Follower.state` gave it; None where there is none of this bundle.
        version: the highest that may have been given; the next is above it.
    """

    state: bytes | None
    version: int


@dataclass(frozen=True, slots=True)
class MadeSnapshot:
    """A snapshot and where it belongs.

    Attributes:
        camera: its name.
        bundle: id of the bundle that it corrects for.
        subclass: name of its expert's sub-class; empty where the bundle has none.
        snapshot: what was in force.
        made_us: when, in microseconds of UTC since 1970.
    """

    camera: str
    bundle: str
    subclass: str
    snapshot: Snapshot
    made_us: int


class AdaptationStore:
    """Any thread may call any method; the file is opened by the first that needs it, and again after an error.

    A damaged file is put aside and a new one begun. Versions then begin where no earlier one can have been.

    Args:
        path: of the database.
        kept_snapshots: the newest that are kept of each camera.
    """

    def __init__(self, path: Path, *, kept_snapshots: int = KEPT_SNAPSHOTS) -> None:
        self._path, self._most = path, kept_snapshots
        self._file = Database(_FILE, path, lost="cameras begin at their bundle's moments again")
        self._opened_s = int(time.time())

    def read(self, camera: str, bundle: str) -> Kept:
        """Return what is kept of a camera under a bundle; numbers are counted over all its bundles.

        Raises:
            StoreError: the file cannot be used.
        """

        def work(db: sqlite3.Connection) -> Kept:
            query = "SELECT state FROM cameras WHERE camera = ? AND bundle = ?"
            row = db.execute(query, (camera, bundle)).fetchone()
            most = db.execute("SELECT MAX(reserved) FROM cameras WHERE camera = ?", (camera,)).fetchone()[0]
            return Kept(None if row is None else bytes(row[0]), max(most or 0, self._first))

        return self._file.do(work)

    def write(
        self, camera: str, bundle: str, state: bytes, version: int, made: Iterable[MadeSnapshot] = (), *, last: bool
    ) -> None:
        """Keep a follower in place of what was kept before, and snapshots beside; on disk when this returns.

        Args:
            camera: its name.
            bundle: id of its bundle.
            state: of the follower.
            version: of its newest snapshot.
            made: snapshots since the last call.
            last: no more will be given in this run; else numbers are set aside for those that nobody may come to keep.

        Raises:
            StoreError: the file cannot be used; what was kept stays.
        """
        row = (camera, bundle, state, version if last else version + _AHEAD)
        rows = [_row(one) for one in made]

        def work(db: sqlite3.Connection) -> None:
            newest = db.execute("SELECT MAX(saved_us) FROM cameras WHERE camera = ?", (camera,)).fetchone()[0]
            # A clock that was set back must not make what is written now the oldest, which makes room.
            saved_us = max(_now_us(), (newest or 0) + 1)
            db.execute(
                "INSERT INTO cameras VALUES (?, ?, ?, ?, ?) ON CONFLICT(camera, bundle) DO UPDATE SET"
                " state = excluded.state, reserved = excluded.reserved, saved_us = excluded.saved_us",
                (*row, saved_us),
            )
            # The last bundles are kept, so that one that is taken back makes way for what was learned before.
            db.execute(
                "DELETE FROM cameras WHERE camera = ? AND saved_us < (SELECT saved_us FROM cameras WHERE camera = ?"
                " ORDER BY saved_us DESC LIMIT 1 OFFSET ?)",
                (camera, camera, _KEPT_BUNDLES - 1),
            )
            db.executemany(
                "INSERT OR REPLACE INTO snapshots(camera, version, bundle, subclass, own, shift, made_us, moments)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                rows,
            )
            if rows:
                db.execute(
                    "DELETE FROM snapshots WHERE camera = ? AND n <= (SELECT n FROM snapshots WHERE camera = ?"
                    " ORDER BY n DESC LIMIT 1 OFFSET ?)",
                    (camera, camera, self._most),
                )

        self._file.do(work)

    def moments(self, camera: str, version: int) -> Moments | None:
        """Return the moments that frames of a version were corrected by; None where they are not kept (any more).

        Raises:
            StoreError: the file cannot be used, or holds something else there.
        """

        def work(db: sqlite3.Connection) -> bytes | None:
            query = "SELECT moments FROM snapshots WHERE camera = ? AND version = ?"
            row = db.execute(query, (camera, version)).fetchone()
            return None if row is None else bytes(row[0])

        found = self._file.do(work)
        if found is None:
            return None
        parts: dict[str, dict[str, npt.NDArray[np.float32]]] = {"mean": {}, "std": {}}
        try:
            for key, values in load(found).items():
                part, name = key.split("/", 1)
                parts[part][name] = values
        except (SafetensorError, KeyError, ValueError) as error:
            raise StoreError(f"{self._path}: version {version} of {camera} is damaged ({error})") from error
        return Moments(parts["mean"], parts["std"])

    @property
    def damage(self) -> str:
        """What was found damaged, and where it is kept; empty where nothing was."""
        return self._file.damage

    def close(self) -> None:
        """Close the file; the next call opens it again."""
        self._file.close()

    @property
    def _first(self) -> int:
        # Seconds since 1970 are above any count of snapshots, so no number of a lost file is given twice.
        return self._opened_s if self._file.damage else 0


def _row(made: MadeSnapshot) -> tuple[object, ...]:
    one = made.snapshot
    tensors = {f"mean/{name}": np.ascontiguousarray(values, np.float32) for name, values in one.moments.mean.items()}
    tensors |= {f"std/{name}": np.ascontiguousarray(values, np.float32) for name, values in one.moments.std.items()}
    return made.camera, one.version, made.bundle, made.subclass, one.own, one.shift, made.made_us, save(tensors)


def _now_us() -> int:
    return time.time_ns() // 1000
