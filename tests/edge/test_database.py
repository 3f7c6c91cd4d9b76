"""Opening one file from several processes at once: the tables are made once, and everybody gets them."""

from __future__ import annotations

import multiprocessing
import sqlite3
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from edge.database import Database, DatabaseKind
from edge.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

KIND: DatabaseKind[StoreError] = DatabaseKind(
    name="file", application_id=77, version=1, schema="CREATE TABLE things(id INTEGER PRIMARY KEY);",
    error=StoreError, full=StoreError, kept="nothing is lost", in_use="wait", timeout_s=10.0,
)  # fmt: skip


def _opened(path: Path) -> int:
    db = KIND.open(path)
    db.execute("INSERT INTO things DEFAULT VALUES")
    db.close()
    return 1


def test_file_is_made_once_by_whoever_comes_first(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        for number in range(8):
            assert sum(pool.map(_opened, [tmp_path / f"{number}.db"] * 4)) == 4


def test_tables_that_another_has_made_meanwhile_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.db"
    real, looks = DatabaseKind._version_of, []

    def late(self: DatabaseKind[StoreError], db: sqlite3.Connection, where: Path) -> int | None:
        looks.append(where)
        if len(looks) == 1:  # the other process is quicker between our look and our turn
            monkeypatch.setattr(DatabaseKind, "_version_of", real)
            _opened(path)
            monkeypatch.setattr(DatabaseKind, "_version_of", late)
            return None
        return real(self, db, where)

    monkeypatch.setattr(DatabaseKind, "_version_of", late)
    db = KIND.open(path)
    assert db.execute("SELECT count(*) FROM things").fetchone() == (1,)
    db.close()


def test_file_that_cannot_be_made_keeps_its_reason(tmp_path: Path) -> None:
    broken: DatabaseKind[StoreError] = DatabaseKind(
        name="file", application_id=77, version=1, schema="CREATE NONSENSE;", error=StoreError, full=StoreError,
        kept="nothing", in_use="wait",
    )  # fmt: skip
    with pytest.raises(StoreError, match="syntax error"):
        broken.open(tmp_path / "b.db")


NEWER = replace(
    KIND,
    version=3,
    schema="CREATE TABLE things(id INTEGER PRIMARY KEY, name TEXT, size INTEGER);",
    migrations={1: "ALTER TABLE things ADD COLUMN name TEXT;", 2: "ALTER TABLE things ADD COLUMN size INTEGER;"},
)


def _opened_newer(path: Path) -> int:
    NEWER.open(path).close()
    return 1


def test_older_file_is_led_to_the_newer_version_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    _opened(path)
    for _ in range(2):
        db = NEWER.open(path)
        assert db.execute("SELECT id, name, size FROM things").fetchall() == [(1, None, None)]
        assert db.execute("PRAGMA user_version").fetchone() == (3,)
        db.close()


def test_older_file_is_led_on_once_by_whoever_comes_first(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        for number in range(8):
            path = tmp_path / f"{number}.db"
            _opened(path)
            assert sum(pool.map(_opened_newer, [path] * 4)) == 4


def test_version_that_no_step_leads_on_from_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    KIND.open(path).close()
    with pytest.raises(StoreError, match="schema 1, this program knows 3"):
        replace(NEWER, migrations={2: "DROP TABLE things;"}).open(path)
    _opened(path)


def test_step_that_fails_leaves_the_older_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    KIND.open(path).close()
    broken = replace(NEWER, version=2, migrations={1: "DROP TABLE things; CREATE NONSENSE;"})
    with pytest.raises(StoreError, match="syntax error"):
        broken.open(path)
    _opened(path)


def _count(database: Database[StoreError]) -> int:
    return int(database.do(lambda db: db.execute("SELECT count(*) FROM things").fetchone()[0]))


def _add(database: Database[StoreError]) -> None:
    database.do(lambda db: db.execute("INSERT INTO things DEFAULT VALUES"))


def test_database_opens_when_it_is_needed_and_again_after_a_close(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    database = Database(KIND, path)
    assert not path.exists()
    _add(database)
    database.close()
    database.close()
    assert _count(database) == 1
    database.close(for_good=True)
    with pytest.raises(StoreError, match=r"a\.db is closed"):
        _count(database)


@pytest.mark.parametrize("damage", ["no database at all", "a page within"])
def test_damaged_database_is_put_aside_and_a_new_one_begun(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.db"
    database = Database(KIND, path, lost="things are gone")
    _add(database)
    database.close()
    content = bytearray(path.read_bytes())
    if damage == "no database at all":
        content[:16] = b"x" * 16
    else:
        content[4096:] = b"x" * (len(content) - 4096)
    path.write_bytes(content)

    assert _count(database) == 0
    assert database.damage.endswith(", things are gone")
    assert len(list(tmp_path.glob("a.db.damaged-*"))) == 1
    _add(database)
    assert _count(database) == 1
    database.close()


def test_damage_that_shows_within_a_piece_of_work_is_mended_and_the_work_done_once_more(tmp_path: Path) -> None:
    database = Database(KIND, tmp_path / "a.db")
    _add(database)
    tried = []

    def work(db: sqlite3.Connection) -> int:
        tried.append(db)
        db.execute("INSERT INTO things DEFAULT VALUES")
        if len(tried) == 1:
            raise sqlite3.DatabaseError("database disk image is malformed")
        return int(db.execute("SELECT count(*) FROM things").fetchone()[0])

    assert database.do(work) == 1
    assert "malformed; kept as a.db.damaged-" in database.damage
    database.close()


def test_piece_of_work_that_fails_is_undone_and_keeps_the_file(tmp_path: Path) -> None:
    database = Database(KIND, tmp_path / "a.db")
    with pytest.raises(StoreError, match="syntax error"):
        database.do(lambda db: (db.execute("INSERT INTO things DEFAULT VALUES"), db.execute("NONSENSE")))
    with pytest.raises(ZeroDivisionError):
        database.do(lambda db: (db.execute("INSERT INTO things DEFAULT VALUES"), 1 / 0))
    assert (_count(database), database.damage) == (0, "")
    database.close()
