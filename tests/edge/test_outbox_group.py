"""Group commit: threads that append at once share a disk sync, in order, and each is told of its own failure only."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from edge.alerts.outbox_group import Call, GroupCommit
from edge.errors import OutboxError
from tests.edge.test_outbox import body, full_disk, open_outbox, seqs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge.alerts.outbox import Outbox

THREADS = 8


def append_at_once(outbox: Outbox, makes: list[Callable[[str, int], bytes]]) -> list[int | BaseException]:
    """Let a thread each append one row while the file is held, so that all of them wait; in their order of waiting."""
    found: list[int | BaseException] = [0] * len(makes)

    def append(index: int) -> None:
        try:
            found[index] = outbox.append("t", makes[index])
        except (OutboxError, ValueError) as error:
            found[index] = error

    threads = [threading.Thread(target=append, args=(index,), daemon=True) for index in range(len(makes))]
    with outbox._lock:
        for count, thread in enumerate(threads, 1):
            thread.start()
            while len(outbox._group._waiting) < count:
                pass
    for thread in threads:
        thread.join(10)
    return found


def test_threads_that_append_at_once_share_one_sync(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        assert append_at_once(outbox, [body()] * THREADS) == list(range(1, THREADS + 1))
        assert outbox.counters["commits"] == 1
        assert seqs(outbox) == list(range(1, THREADS + 1))
    with open_outbox(tmp_path) as outbox:
        assert outbox.last_seq == THREADS


def test_lone_thread_commits_each_row_at_once(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        for _ in range(5):
            outbox.append("t", body())
        assert outbox.counters["commits"] == 5


def test_message_that_cannot_be_made_fails_alone_and_takes_no_number(tmp_path: Path) -> None:
    def broken(epoch: str, seq: int) -> bytes:
        raise ValueError(f"{epoch} {seq}")

    with open_outbox(tmp_path) as outbox:
        found = append_at_once(outbox, [body(), broken, body(), broken, body()])
        assert [found[0], found[2], found[4]] == [1, 2, 3]
        assert [str(found[1]), str(found[3])] == [f"{outbox.epoch} 2", f"{outbox.epoch} 3"]
        assert seqs(outbox) == [1, 2, 3]
        assert outbox.counters["commits"] == 1


def test_row_too_large_for_the_disk_is_refused_and_the_others_are_stored(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        with full_disk(outbox, more_pages=4):
            found = append_at_once(outbox, [body(), body(100_000), body()])
        assert isinstance(found[1], OutboxError)
        assert "disk is full" in str(found[1])
        assert [found[0], found[2]] == [1, 2]
        assert seqs(outbox) == [1, 2]


def test_append_returns_only_after_its_commit(tmp_path: Path) -> None:
    """What append has returned is in the file for a reader of the same moment, however many threads append."""
    with open_outbox(tmp_path) as outbox:
        missing: list[int] = []

        def work() -> None:
            for _ in range(40):
                seq = outbox.append("t", body())
                with outbox._lock:
                    found = outbox._db.execute("SELECT 1 FROM rows WHERE seq = ?", (seq,)).fetchone()  # type: ignore[union-attr]
                if found is None:
                    missing.append(seq)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert missing == []
        assert outbox.last_seq == outbox.counters["appended"] == 40 * THREADS
        assert outbox.counters["commits"] < outbox.counters["appended"]


def test_group_holds_a_limited_number_of_rows() -> None:
    sizes: list[int] = []

    def commit(calls: list[Call[int, int]]) -> None:
        sizes.append(sum(len(call.work) for call in calls))
        for call in calls:
            call.result = 0

    lock = threading.RLock()
    group = GroupCommit(commit, lock=lock, limit=4)
    threads = [threading.Thread(target=group.submit, args=([0] * count,), daemon=True) for count in (1, 3, 2, 9, 1)]
    with lock:
        for count, thread in enumerate(threads, 1):
            thread.start()
            while len(group._waiting) < count:
                pass
    for thread in threads:
        thread.join(10)
    assert sizes == [4, 2, 9, 1]


def test_commit_that_is_interrupted_refuses_its_own_thread_only() -> None:
    """A signal's exception in the thread that leads: those who wait with it are taken by the next."""
    attempts: list[int] = []

    def commit(calls: list[Call[str, str]]) -> None:
        attempts.append(len(calls))
        if len(attempts) == 1:
            raise KeyboardInterrupt
        for call in calls:
            call.result = call.work[0]

    lock = threading.RLock()
    group = GroupCommit(commit, lock=lock)
    found: dict[str, str] = {}

    def submit(name: str) -> None:
        try:
            found[name] = group.submit([name])
        except KeyboardInterrupt:
            found[name] = "interrupted"

    threads = [threading.Thread(target=submit, args=(name,), daemon=True) for name in "abc"]
    with lock:
        for count, thread in enumerate(threads, 1):
            thread.start()
            while len(group._waiting) < count:
                pass
    for thread in threads:
        thread.join(10)
    assert found == {"a": "interrupted", "b": "b", "c": "c"}
    assert attempts == [3, 2]
    assert group.submit(["d"]) == "d"


def test_thread_interrupted_while_it_waits_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    committed: list[str] = []

    def commit(calls: list[Call[str, str]]) -> None:
        for call in calls:
            committed.append(call.work[0])
            call.result = call.work[0]

    class Interrupted:
        def acquire(self) -> None:
            raise KeyboardInterrupt

        def release(self) -> None:
            """Nobody waits."""

    lock = threading.RLock()
    group = GroupCommit(commit, lock=lock)
    first = threading.Thread(target=group.submit, args=(["a"],), daemon=True)
    with lock:
        first.start()
        while not group._waiting:
            pass
        original = Call.__init__

        def interrupted(self: Call[str, str], work: list[str]) -> None:
            original(self, work)
            self.turn = Interrupted()  # type: ignore[assignment]

        monkeypatch.setattr(Call, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            group.submit(["b"])
        monkeypatch.setattr(Call, "__init__", original)
    first.join(10)
    assert group.submit(["c"]) == "c"
    assert committed == ["a", "c"]
