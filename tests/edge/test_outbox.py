"""The outbox: on disk when append returns, numbered without holes, bounded, and usable again after trouble."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.alerts import outbox_file
from edge.alerts.outbox import Draft, Outbox, Priority
from edge.errors import OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SECOND = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 1000 * SECOND

    def __call__(self) -> int:
        return self.now


def make_gap(*, epoch: str, seq: int, first: int, last: int, dropped: int, reason: str) -> tuple[str, bytes]:
    return "gap", json.dumps([epoch, seq, first, last, dropped, reason]).encode()


def body(size: int = 20) -> Callable[[str, int], bytes]:
    return lambda epoch, seq: f"{epoch}:{seq}".encode().ljust(size)


def open_outbox(folder: Path, **options: object) -> Outbox:
    """An outbox whose clock stands still unless told otherwise: rows are live or not by their numbers alone."""
    return Outbox(folder / "outbox.db", make_gap=make_gap, **{"clock": Clock(), **options})  # type: ignore[arg-type]


def fill(outbox: Outbox, count: int, *, priority: Priority = Priority.HIGH, size: int = 20) -> list[int]:
    return outbox.append_many([Draft("t", body(size), priority)] * count)


def seqs(outbox: Outbox, limit: int = 10_000, boundary: int = 0) -> list[int]:
    return [row.seq for row in outbox.pending(limit, boundary=boundary)]


def gaps(outbox: Outbox) -> list[list[object]]:
    return [json.loads(row.payload) for row in outbox.pending(10_000) if row.topic == "gap"]


def test_append_gives_epoch_and_number_to_the_payload(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        assert [outbox.append("a/b", body()), outbox.append("a/b", body())] == [1, 2]
        first, second = outbox.pending(10)
        assert first.payload.rstrip() == f"{outbox.epoch}:1".encode()
        assert (second.seq, second.epoch, second.topic, second.late) == (2, outbox.epoch, "a/b", False)
        assert len(outbox.epoch) == 16
        assert outbox.depth == 2


def test_rows_epoch_and_counter_survive_a_restart(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        epoch = outbox.epoch
        fill(outbox, 3)
        outbox.acknowledge([1])
    with open_outbox(tmp_path) as outbox:
        assert outbox.epoch == epoch
        assert seqs(outbox) == [2, 3]
        assert outbox.depth == 2
        assert outbox.append("t", body()) == 4


def test_numbers_are_not_reused_after_everything_was_forgotten(tmp_path: Path) -> None:
    with open_outbox(tmp_path, replay_rows=0) as outbox:
        outbox.acknowledge(fill(outbox, 5))
        assert outbox.bytes == 0
    with open_outbox(tmp_path, replay_rows=0) as outbox:
        assert fill(outbox, 1) == [6]


def test_append_that_fails_in_make_uses_no_number(tmp_path: Path) -> None:
    def broken(epoch: str, seq: int) -> bytes:
        raise ValueError(f"{epoch} {seq}")

    with open_outbox(tmp_path) as outbox:
        fill(outbox, 1)
        with pytest.raises(ValueError):
            outbox.append_many([Draft("t", body()), Draft("t", broken)])
        assert fill(outbox, 1) == [2]
        assert (outbox.depth, outbox.counters["appended"]) == (2, 2)


def test_append_from_many_threads_leaves_no_hole(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        given_out: list[int] = []
        threads = [
            threading.Thread(target=lambda: given_out.extend(outbox.append("t", body()) for _ in range(25)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(given_out) == seqs(outbox) == list(range(1, 101))


def test_append_calls_the_listeners_after_the_row_is_there(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        seen: list[int] = []
        outbox.add_listener(lambda: seen.append(outbox.depth))
        fill(outbox, 2)
        assert seen == [2]


def test_pending_puts_live_rows_before_late_ones(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        fill(outbox, 4)
        rows = outbox.pending(10, boundary=2)
        assert [(row.seq, row.late) for row in rows] == [(3, False), (4, False), (1, True), (2, True)]
        assert seqs(outbox, limit=3, boundary=2) == [3, 4, 1]


def test_burst_of_this_connection_is_late_once_it_has_waited_and_newer_rows_are_there(tmp_path: Path) -> None:
    clock = Clock()
    with open_outbox(tmp_path, clock=clock) as outbox:
        fill(outbox, 1000)
        assert not any(row.late for row in outbox.pending(1000))
        clock.now += SECOND
        newest = fill(outbox, 1)[0]
        rows = outbox.pending(100)
        live = [row.seq for row in rows if not row.late]
        assert live == list(range(newest - 63, newest + 1)), "the newest go first, in their order"
        assert [row.seq for row in rows if row.late] == list(range(1, 37))


def test_rows_that_come_steadily_are_live_however_long_none_is_sent_of_few(tmp_path: Path) -> None:
    clock = Clock()
    with open_outbox(tmp_path, clock=clock) as outbox:
        for _ in range(64):
            clock.now += SECOND
            fill(outbox, 1)
        assert not any(row.late for row in outbox.pending(1000))
        clock.now += SECOND
        fill(outbox, 1)
        assert [row.seq for row in outbox.pending(1000) if row.late] == [1]
        assert len(outbox._live._moments) < 20


def test_rows_in_flight_are_given_out_once(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        fill(outbox, 4)
        outbox.mark_sent([1, 3])
        assert seqs(outbox, limit=2) == [2, 4]
        outbox.release_sent([3])
        assert seqs(outbox) == [2, 3, 4]
        outbox.release_sent()
        assert seqs(outbox) == [1, 2, 3, 4]


def test_acknowledged_rows_come_back_late_within_the_window_of_time(tmp_path: Path) -> None:
    clock = Clock()
    with open_outbox(tmp_path, replay_seconds=10, clock=clock) as outbox:
        outbox.acknowledge(fill(outbox, 1))
        clock.now += 8 * SECOND
        outbox.acknowledge(fill(outbox, 1))
        clock.now += 5 * SECOND
        assert outbox.requeue_acknowledged() == 1
        rows = outbox.pending(10, boundary=0)
        assert [(row.seq, row.late) for row in rows] == [(2, True)]
        assert outbox.acknowledge([2]) == 1
        assert outbox.acknowledge([2]) == 0
        assert outbox.depth == 0


def test_acknowledged_rows_are_kept_up_to_the_window_of_rows(tmp_path: Path) -> None:
    with open_outbox(tmp_path, replay_rows=3) as outbox:
        outbox.acknowledge(fill(outbox, 10))
        assert outbox.requeue_acknowledged() == 3
        assert seqs(outbox) == [8, 9, 10]
        assert outbox.counters["trimmed"] == 7


def test_requeue_range_answers_for_its_epoch_only(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        outbox.acknowledge(fill(outbox, 10))
        assert outbox.requeue_range("f" * 16, 1, 10) == 0
        assert outbox.requeue_range(outbox.epoch, 4, 99) == 7
        assert seqs(outbox) == list(range(4, 11))


def test_window_starts_again_in_another_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with open_outbox(tmp_path, clock=clock) as outbox:
        outbox.acknowledge(fill(outbox, 2))
        epoch = outbox.epoch
    monkeypatch.setattr(outbox_file, "boot_id", lambda: "another")
    clock.now = 1
    with open_outbox(tmp_path, clock=clock) as outbox:
        assert outbox.epoch == epoch, "it was shut down in order"
        clock.now += 299 * SECOND
        assert outbox.requeue_acknowledged() == 2


def test_boot_without_an_orderly_end_before_it_begins_a_new_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox = open_outbox(tmp_path)
    fill(outbox, 2)
    before = outbox.epoch
    outbox._release_files()  # what a power cut leaves: nobody wrote that the end was orderly
    with open_outbox(tmp_path) as outbox:
        assert outbox.epoch == before, "the same boot: the page cache has kept everything"
        outbox._release_files()
    monkeypatch.setattr(outbox_file, "boot_id", lambda: "another")
    with open_outbox(tmp_path) as outbox:
        assert outbox.epoch != before
        assert fill(outbox, 1) == [3]
        assert [row.epoch for row in outbox.pending(10)] == [before, before, outbox.epoch]


def test_cap_forgets_acknowledged_rows_first(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=10 * 1000) as outbox:
        outbox.acknowledge(fill(outbox, 5, size=900))
        fill(outbox, 7, size=900)
        assert outbox.bytes <= 10_000
        assert seqs(outbox) == list(range(6, 13))
        assert outbox.counters["dropped"] == 0
        assert outbox.counters["trimmed"] > 0


def test_cap_drops_the_oldest_of_the_lowest_priority_and_counts_them(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=10 * 1000) as outbox:
        fill(outbox, 3, priority=Priority.HIGH, size=800)
        fill(outbox, 6, priority=Priority.LOW, size=800)
        fill(outbox, 4, priority=Priority.HIGH, size=800)
        assert outbox.bytes <= 10_000
        left = [row.seq for row in outbox.pending(100) if row.topic == "t"]
        dropped = sorted(set(range(1, 14)) - set(left))
        assert dropped == list(range(4, 4 + len(dropped)))
        assert len(dropped) in (3, 4)
        assert gaps(outbox) == [[outbox.epoch, gaps(outbox)[0][1], 4, dropped[-1], len(dropped), "outbox full"]]
        assert gaps(outbox)[0][1] in dropped, "the gap takes the place of a dropped row"
        assert outbox.counters["dropped"] == len(dropped)


def test_cap_never_drops_what_is_in_flight(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=5 * 1000) as outbox:
        outbox.mark_sent(fill(outbox, 2, priority=Priority.LOW, size=900))
        fill(outbox, 8, priority=Priority.HIGH, size=900)
        outbox.release_sent()
        assert seqs(outbox)[:2] == [1, 2]


def test_gap_that_was_sent_is_not_extended(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=5 * 1000) as outbox:
        fill(outbox, 6, size=900)
        first = next(row for row in outbox.pending(100) if row.topic == "gap")
        outbox.mark_sent([first.seq])
        outbox.release_sent()
        fill(outbox, 3, size=900)
        found = gaps(outbox)
        assert found[0] == json.loads(first.payload)
        assert len(found) == 2
        assert sum(gap[4] for gap in found) == outbox.counters["dropped"]  # type: ignore[misc]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(list(Priority)), st.integers(100, 1500), st.booleans()), max_size=60),
    reopen=st.integers(0, 60),
)
def test_cap_keeps_exact_count_of_what_is_missing(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Priority, int, bool]], reopen: int
) -> None:
    folder = tmp_path_factory.mktemp("cap")
    outbox = open_outbox(folder, max_bytes=8000)
    acknowledged: set[int] = set()
    for number, (priority, size, acknowledge) in enumerate(steps):
        if number == reopen:
            outbox.close()
            outbox = open_outbox(folder, max_bytes=8000)
        fill(outbox, 1, priority=priority, size=size)
        if acknowledge and (row := next(iter(outbox.pending(1)), None)):
            outbox.mark_sent([row.seq])
            outbox.acknowledge([row.seq])
            if row.topic == "t":
                acknowledged.add(row.seq)
        assert outbox.bytes <= 8000
    waiting = {row.seq for row in outbox.pending(10_000) if row.topic == "t"}
    assert outbox.counters["dropped"] == len(steps) - len(waiting) - len(acknowledged)
    assert outbox.depth == len(outbox.pending(10_000))
    outbox.close()


@contextlib.contextmanager
def full_disk(outbox: Outbox, *, more_pages: int = 0) -> Iterator[None]:
    """The disk gives nothing more than ``more_pages`` beyond what the file has in use or owns."""

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    allocate = outbox._space._allocate
    pages, limit = (outbox._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "max_page_count"))  # type: ignore[union-attr]
    outbox._space._allocate = refuse
    outbox._db.execute(f"PRAGMA max_page_count={pages + more_pages}")  # type: ignore[union-attr]
    yield
    outbox._space._allocate = allocate
    outbox._db.execute(f"PRAGMA max_page_count={limit}")  # type: ignore[union-attr]


def fill_disk(outbox: Outbox) -> list[int]:
    """Append until nothing more is taken; returns the numbers of what was."""
    taken = []
    with contextlib.suppress(OutboxError):
        while True:
            taken += fill(outbox, 1, size=1000)
    return taken


def test_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        fill(outbox, 5, size=1000)
        with full_disk(outbox):
            with pytest.raises(OutboxError, match="disk is full"):
                fill(outbox, 2000, size=1000)
            assert seqs(outbox) == [1, 2, 3, 4, 5]
            assert outbox.depth == 5
            assert fill_disk(outbox)[0] == 6, "what the file owns is used to the end"
            last = outbox.last_seq
            assert outbox.acknowledge([1]) == 1, "what needs no space goes on"
            assert fill(outbox, 1) == [last + 1], "and gives some back"
        assert fill(outbox, 2000, size=1000)[0] == last + 2
    with open_outbox(tmp_path) as outbox:
        assert seqs(outbox) == list(range(2, last + 2002))


def test_full_disk_takes_space_from_acknowledged_rows(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        with full_disk(outbox, more_pages=50):
            acknowledged = fill_disk(outbox)
            outbox.acknowledge(acknowledged)
            first = acknowledged[-1] + 1
            assert fill(outbox, 40, size=1000) == list(range(first, first + 40))
        assert outbox.counters["trimmed"] > 0


def test_file_owns_the_space_it_grows_into(tmp_path: Path) -> None:
    """After each growth the database's file is as long as it counts pages, and the log has its size."""
    with open_outbox(tmp_path) as outbox:
        for _ in range(30):
            fill(outbox, 100, size=1000)
            stat = (tmp_path / "outbox.db").stat()
            pages = outbox._db.execute("PRAGMA page_count").fetchone()[0]  # type: ignore[union-attr]
            assert stat.st_size >= pages * 4096
            assert stat.st_blocks * 512 >= pages * 4096
            assert (tmp_path / "outbox.db-wal").stat().st_size == 4 * 2**20
        assert outbox._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)  # type: ignore[union-attr]


def test_space_is_kept_from_one_start_to_the_next(tmp_path: Path) -> None:
    kept = tmp_path / "outbox.db-space"
    with open_outbox(tmp_path):
        assert not kept.exists()
        with pytest.raises(OutboxError, match="in use"):
            open_outbox(tmp_path)
        assert not kept.exists(), "who comes second has nothing to keep"
    assert kept.stat().st_blocks * 512 >= 5 * 2**20
    with open_outbox(tmp_path):
        assert not kept.exists()


def test_outbox_works_where_the_system_cannot_allocate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    with open_outbox(tmp_path) as outbox:
        assert len(fill(outbox, 3000, size=1000)) == 3000
    with open_outbox(tmp_path) as outbox:
        assert outbox.depth == 3000


@pytest.mark.parametrize("after", [0, 2], ids=["from the beginning", "later"])
def test_outbox_works_where_the_file_system_cannot_allocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    calls: list[int] = []

    def refuse(file: int, offset: int, size: int) -> None:
        calls.append(file)
        if len(calls) > after:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        os.truncate(file, max(offset + size, os.fstat(file).st_size))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with open_outbox(tmp_path) as outbox:
        for _ in range(30):
            fill(outbox, 100, size=1000)
        assert outbox.depth == 3000
    assert len(calls) == after + 1, "asked once more, then never again"


def test_second_process_stays_refused_while_the_file_grows(tmp_path: Path) -> None:
    """Closing any descriptor of a file would end this process's locks on it: another process could then open it."""
    program = (
        "import pathlib, sys\nfrom edge.alerts.outbox import Outbox\n"
        "Outbox(pathlib.Path(sys.argv[1]), make_gap=lambda **_: ('', b''))"
    )
    with open_outbox(tmp_path) as outbox:
        fill(outbox, 3000, size=1000)
        path = str(tmp_path / "outbox.db")
        found = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=False)
        assert "is in use by another process" in found.stderr


def test_second_process_is_refused(tmp_path: Path) -> None:
    with open_outbox(tmp_path), pytest.raises(OutboxError, match="in use"):
        open_outbox(tmp_path)
    open_outbox(tmp_path).close()


def test_foreign_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "outbox.db") as db:
        db.execute("CREATE TABLE theirs(x)")
    db.close()
    with pytest.raises(OutboxError, match="another program"):
        open_outbox(tmp_path)
    db = sqlite3.connect(tmp_path / "outbox.db")
    assert db.execute("SELECT count(*) FROM theirs").fetchone() == (0,)
    db.close()
    assert [file.name for file in tmp_path.iterdir()] == ["outbox.db"]


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    open_outbox(tmp_path).close()
    db = sqlite3.connect(tmp_path / "outbox.db")
    db.execute("PRAGMA user_version=3")
    db.close()
    with pytest.raises(OutboxError, match="schema 3, this program knows 2"):
        open_outbox(tmp_path)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutboxError, match="folder"):
        open_outbox(tmp_path / "file" / "below")


def test_closed_outbox_says_so(tmp_path: Path) -> None:
    outbox = open_outbox(tmp_path)
    outbox.close()
    outbox.close()
    with pytest.raises(OutboxError, match="closed"):
        fill(outbox, 1)
