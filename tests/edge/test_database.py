"""Opening one file from several processes at once: the tables are made once, and everybody gets them."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

import pytest

from edge.database import DatabaseKind
from edge.errors import StoreError

if TYPE_CHECKING:
    import sqlite3
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
    real, looks = DatabaseKind._is_ours, []

    def late(self: DatabaseKind[StoreError], db: sqlite3.Connection, where: Path) -> bool:
        looks.append(where)
        if len(looks) == 1:  # the other process is quicker between our look and our turn
            monkeypatch.setattr(DatabaseKind, "_is_ours", real)
            _opened(path)
            monkeypatch.setattr(DatabaseKind, "_is_ours", late)
            return False
        return real(self, db, where)

    monkeypatch.setattr(DatabaseKind, "_is_ours", late)
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
