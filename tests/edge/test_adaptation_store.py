"""Followers on disk: they come back with their numbers, whatever becomes of the file or of the box."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edge.adaptation.follower import Snapshot
from edge.adaptation.moments import IMAGE, Moments
from edge.adaptation.store import AdaptationStore, MadeSnapshot
from edge.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

A, B = "aa/float32", "bb/float32"


def made(version: int, *, camera: str = "cam", level: float = 100.0) -> MadeSnapshot:
    moments = Moments(
        {IMAGE: np.full(3, level, np.float32), "s4": np.arange(4, dtype=np.float32)},
        {IMAGE: np.full(3, 9, np.float32), "s4": np.ones(4, np.float32)},
    )
    return MadeSnapshot(camera, A, "blue", Snapshot(version, 0, moments, 0.0, 1.5), 1_000_000 * version)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adaptation.db"


def test_follower_comes_back_under_its_own_bundle_only(path: Path) -> None:
    store = AdaptationStore(path)
    store.write("cam", A, b"state of a", 7, last=True)
    store.close()
    again = AdaptationStore(path)
    assert (again.read("cam", A).state, again.read("cam", A).version) == (b"state of a", 7)
    # Another bundle begins anew, but no number is given twice; one that is taken back goes on.
    assert (again.read("cam", B).state, again.read("cam", B).version) == (None, 7)
    again.write("cam", B, b"state of b", 9, last=True)
    assert (again.read("cam", A).state, again.read("cam", A).version) == (b"state of a", 9)
    assert again.read("other", A).version == 0


def test_box_that_was_killed_gives_no_number_twice(path: Path) -> None:
    store = AdaptationStore(path)
    store.write("cam", A, b"", 7, last=False)
    store.close()
    # Up to a thousand snapshots may have come into force since, and been named in alerts.
    assert AdaptationStore(path).read("cam", A).version == 1007


def test_snapshot_can_be_looked_up_until_newer_ones_take_its_room(path: Path) -> None:
    store = AdaptationStore(path, kept_snapshots=3)
    store.write("cam", A, b"", 2, [made(1, level=50), made(2, level=60)], last=False)
    store.write("other", A, b"", 1, [made(1, camera="other", level=7)], last=False)
    found = store.moments("cam", 2)
    assert found is not None
    assert found.mean[IMAGE].tolist() == [60, 60, 60]
    assert found.std["s4"].tolist() == [1, 1, 1, 1]
    store.write("cam", A, b"", 5, [made(3), made(4), made(5)], last=False)
    assert [store.moments("cam", version) is not None for version in range(1, 6)] == [False, False, True, True, True]
    assert store.moments("other", 1) is not None


@pytest.mark.parametrize("content", [b"no database at all" * 99, b"SQLite format 3\0" + b"\x07" * 4096])
def test_damaged_file_is_put_aside_and_numbers_go_on_above(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    store = AdaptationStore(path)
    kept = store.read("cam", A)
    assert kept.state is None
    assert kept.version > 1_000_000_000
    assert "begin at their bundle's moments again" in store.damage
    store.write("cam", A, b"new", kept.version + 1, last=True)
    store.close()
    again = AdaptationStore(path)
    assert again.read("cam", A).version == kept.version + 1
    assert not again.damage
    assert [one.read_bytes() for one in path.parent.glob("*.damaged-*")] == [content]


def test_damaged_snapshot_is_an_error_of_ours(path: Path) -> None:
    store = AdaptationStore(path)
    store.write("cam", A, b"", 1, [made(1)], last=True)
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE snapshots SET moments = x'0102'")
    with pytest.raises(StoreError, match="version 1 of cam is damaged"):
        AdaptationStore(path).moments("cam", 1)


def test_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="file"):
        AdaptationStore(tmp_path / "file" / "adaptation.db").read("cam", A)


def test_next_number_is_above_all_that_were_written_whatever_the_end(path: Path) -> None:
    highest = 0
    for count, clean in ((3, True), (40, False), (1, False), (0, True)):
        store = AdaptationStore(path)
        first = store.read("cam", A).version
        assert first >= highest
        highest = first + count
        store.write("cam", A, b"", highest, last=clean)
        store.close()


def test_clock_that_was_set_back_forgets_nothing_that_is_in_use(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdaptationStore(path)
    for number, bundle in enumerate("abcd"):
        store.write("cam", bundle, b"", number, last=True)
    monkeypatch.setattr("edge.adaptation.store._now_us", lambda: 1)
    store.write("cam", "e", b"state of e", 9, last=True)
    assert (store.read("cam", "e").state, store.read("cam", "e").version) == (b"state of e", 9)
