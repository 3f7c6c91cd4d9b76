"""Damaged files of the outbox: what was committed before the damage is there, numbers stay unique, the box goes on."""

from __future__ import annotations

import contextlib
import random
import shutil
from typing import TYPE_CHECKING

import pytest

from edge.alerts.message import Alert, Gap, gap_maker, parse
from edge.alerts.outbox import Outbox
from edge.errors import OutboxError
from tests.alert_values import IDENTITY, draft

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 40


def open_outbox(path: Path) -> Outbox:
    return Outbox(path, make_gap=gap_maker(IDENTITY))


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The files of a box that died after 40 rows, all in the write-ahead log, and the log's length after each."""
    folder = tmp_path_factory.mktemp("crashed")
    outbox = open_outbox(folder / "outbox.db")
    outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]
    outbox._db.execute("PRAGMA wal_autocheckpoint=0")  # type: ignore[union-attr]
    lengths = []
    for _ in range(ROWS):
        outbox.append_many([draft()])
        lengths.append((folder / "outbox.db-wal").stat().st_size)
    copy = tmp_path_factory.mktemp("copy")
    for file in folder.iterdir():
        shutil.copy(file, copy / file.name)
    outbox.close()
    return copy, lengths


def damaged_copy(source: Path, target: Path, name: str, change: object) -> Path:
    target.mkdir()
    for file in source.iterdir():
        shutil.copy(file, target / file.name)
    content = bytearray((target / name).read_bytes())
    (target / name).write_bytes(change(content))  # type: ignore[operator]
    return target / "outbox.db"


def contents(outbox: Outbox) -> tuple[list[int], list[Gap]]:
    messages = [parse(row.topic, row.payload) for row in outbox.pending(1000)]
    return [m.seq for m in messages if isinstance(m, Alert)], [m for m in messages if isinstance(m, Gap)]


def test_log_damaged_anywhere_keeps_all_rows_before_and_counts_the_others(
    crashed: tuple[Path, list[int]], tmp_path: Path
) -> None:
    source, lengths = crashed
    rng = random.Random(5)
    for case in range(60):
        at = rng.randrange(32, lengths[-1])
        kind = case % 3

        def change(content: bytearray, at: int = at, kind: int = kind) -> bytes:
            if kind == 0:
                return bytes(content[:at])
            if kind == 1:
                content[at] ^= 1 << rng.randrange(8)
                return bytes(content)
            return bytes(content[:at]) + bytes(len(content) - at)

        safe = sum(length <= at for length in lengths)
        with open_outbox(damaged_copy(source, tmp_path / str(case), "outbox.db-wal", change)) as outbox:
            seqs, gaps = contents(outbox)
            assert seqs[:safe] == list(range(1, safe + 1)), f"case {case}: a committed row is gone"
            assert seqs == list(range(1, len(seqs) + 1)), f"case {case}: a hole"
            lost = ROWS - len(seqs)
            assert [(gap.first, gap.last, gap.dropped) for gap in gaps] == (
                [(len(seqs) + 1, ROWS, lost)] if lost else []
            )
            assert (outbox.damage is not None) == (lost > 0)
            assert outbox.append(*draft()[:2]) == ROWS + 1, "a number that may have been seen is not given again"
            assert outbox.quarantined is None


def test_log_undamaged_after_a_crash_is_no_damage(crashed: tuple[Path, list[int]], tmp_path: Path) -> None:
    """The control: the same files and the same check, nothing changed."""
    with open_outbox(damaged_copy(crashed[0], tmp_path / "same", "outbox.db-wal", bytes)) as outbox:
        assert contents(outbox) == (list(range(1, ROWS + 1)), [])
        assert outbox.damage is None


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    with open_outbox(tmp_path / "whole" / "outbox.db") as outbox:
        outbox.append_many([draft()] * ROWS)
    return tmp_path / "whole"


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"\0" * 100 + bytes(content[100:]),
        lambda content: bytes(content[: len(content) // 2]),
        lambda content: b"not a database at all, but long enough for a header".ljust(len(content), b"!"),
        lambda content: bytes(content[:4096]) + b"\xa5" * (len(content) - 4096),
    ],
    ids=["header zeroed", "cut in half", "text", "pages overwritten"],
)
def test_damaged_database_is_put_aside_and_a_new_epoch_begins(closed: Path, tmp_path: Path, change: object) -> None:
    with open_outbox(closed / "outbox.db") as outbox:
        before = outbox.epoch
    path = damaged_copy(closed, tmp_path / "damaged", "outbox.db", change)
    with open_outbox(path) as outbox:
        assert outbox.epoch != before
        assert outbox.quarantined is not None
        assert outbox.quarantined.exists()
        assert ".damaged-" in outbox.quarantined.name
        assert outbox.damage is not None
        assert outbox.append(*draft()[:2]) == 1
    with open_outbox(path) as outbox:
        assert outbox.quarantined is None, "no crash loop: the next start is an ordinary one"
        assert outbox.depth == 1


def test_row_whose_bytes_changed_is_not_sent_but_counted(closed: Path, tmp_path: Path) -> None:
    def change(content: bytearray) -> bytes:
        return bytes(content.replace(b'"seq":7,', b'"seq":8,'))

    with open_outbox(damaged_copy(closed, tmp_path / "changed", "outbox.db", change)) as outbox:
        contents(outbox)
        seqs, gaps = contents(outbox)
        assert 7 not in seqs
        assert [(gap.first, gap.last, gap.dropped, gap.reason) for gap in gaps] == [(7, 7, 1, "damaged row")]
        assert outbox.counters["damaged"] == 1


def test_damage_while_running_is_put_aside_and_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "outbox.db"
    with open_outbox(path) as outbox:
        outbox.append_many([draft()] * ROWS)
        outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]
        outbox._db.execute("PRAGMA cache_size=0")  # type: ignore[union-attr]
        before = outbox.epoch
        size = path.stat().st_size
        with path.open("r+b", buffering=0) as file:
            file.seek(4096)
            file.write(b"\xa5" * (size - 4096))
        seq = outbox.append(*draft()[:2])
        assert outbox.quarantined is not None
        assert outbox.epoch != before
        assert [row.seq for row in outbox.pending(10)] == [seq]


def test_full_disk_in_a_burst_loses_nothing_that_was_accepted(tmp_path: Path) -> None:
    with open_outbox(tmp_path / "outbox.db") as outbox:
        outbox._db.execute("PRAGMA max_page_count=40")  # type: ignore[union-attr]
        accepted, refused = [], 0
        for _ in range(300):
            with contextlib.suppress(OutboxError):
                accepted.append(outbox.append(*draft()[:2]))
                continue
            refused += 1
        assert refused > 0, "the disk was never full: this test would show nothing"
        assert contents(outbox)[0] == accepted == list(range(1, len(accepted) + 1))
        assert outbox._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)  # type: ignore[union-attr]
        outbox._db.execute("PRAGMA max_page_count=10000")  # type: ignore[union-attr]
        assert outbox.append(*draft()[:2]) == len(accepted) + 1
