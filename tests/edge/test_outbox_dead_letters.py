"""Dead letters: what the broker refuses for good is neither sent nor lost, bounded, and can be given another chance."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from edge.alerts import outbox_file
from edge.alerts.outbox import Priority
from tests.edge.test_outbox import body, fill, gaps, open_outbox, seqs

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

# As files were before there were dead letters; boxes in the field have them.
VERSION_1 = """
PRAGMA journal_mode=WAL;
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE rows(
  seq INTEGER PRIMARY KEY, epoch TEXT NOT NULL, topic TEXT NOT NULL, payload BLOB NOT NULL, crc INTEGER NOT NULL,
  size INTEGER NOT NULL, priority INTEGER NOT NULL, acked INTEGER NOT NULL DEFAULT 0, acked_at INTEGER,
  again INTEGER NOT NULL DEFAULT 0, sent INTEGER NOT NULL DEFAULT 0, gap_first INTEGER, gap_dropped INTEGER,
  gap_last INTEGER, gap_reason TEXT);
CREATE INDEX lane ON rows(seq) WHERE acked = 0;
CREATE INDEX victims ON rows(priority, seq) WHERE acked = 0 AND gap_first IS NULL;
INSERT INTO meta VALUES ('boot', 'BOOT'), ('clean', 1), ('epoch', '0123456789abcdef'), ('last_seq', 5);
INSERT INTO rows(seq, epoch, topic, payload, crc, size, priority, acked, acked_at) VALUES
  (3, '0123456789abcdef', 't', x'74687265650a', 3419361085, 127, 2, 1, 1),
  (4, '0123456789abcdef', 't', x'666f75720a', 4221621021, 126, 2, 0, NULL),
  (5, '0123456789abcdef', 't', x'666976650a', 3641619982, 126, 0, 0, NULL);
PRAGMA application_id=0x4C4E5744;
PRAGMA user_version=1;
"""


def test_row_set_aside_is_kept_and_not_sent(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        fill(outbox, 4)
        outbox.mark_sent([2, 3])
        before = outbox.bytes
        assert outbox.set_aside([2, 4, 99], "Packet too large") == [2, 4]
        assert outbox.set_aside([2], "again") == []
        outbox.release_sent()
        assert seqs(outbox) == [1, 3]
        assert (outbox.depth, outbox.dead, outbox.counters["set_aside"]) == (2, 2, 2)
        assert outbox.bytes == before
    with open_outbox(tmp_path) as outbox:
        letters = outbox.dead_letters(10)
        assert [(letter.seq, letter.topic, letter.reason) for letter in letters] == [
            (2, "t", "Packet too large"),
            (4, "t", "Packet too large"),
        ]
        assert letters[0].payload.rstrip() == f"{letters[0].epoch}:2".encode()
        assert outbox.dead_letters(1) == letters[:1]
        assert (outbox.depth, outbox.dead) == (2, 2)


def test_dead_letters_are_sent_again_late_on_demand_only(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        told: list[int] = []
        fill(outbox, 3)
        outbox.set_aside([1, 2], "Not authorized")
        assert outbox.requeue_acknowledged() == 0
        assert outbox.requeue_range(outbox.epoch, 1, 3) == 0
        outbox.add_listener(lambda: told.append(outbox.depth))
        assert outbox.requeue_dead() == 2
        assert told == [3], "the publisher is woken"
        assert [(row.seq, row.late) for row in outbox.pending(10)] == [(3, False), (1, True), (2, True)]
        assert (outbox.depth, outbox.dead, outbox.dead_letters(10)) == (3, 0, [])
        assert outbox.acknowledge([1, 2]) == 2
        assert outbox.requeue_dead() == 0


def test_requeued_dead_letter_is_owed_and_not_forgotten_with_the_acknowledged(tmp_path: Path) -> None:
    with open_outbox(tmp_path, replay_rows=0) as outbox:
        fill(outbox, 3)
        outbox.set_aside([1], "Not authorized")
        outbox.requeue_dead()
        outbox.acknowledge([2, 3])
        assert seqs(outbox) == [1]


def test_acknowledged_row_is_not_set_aside(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        outbox.acknowledge(fill(outbox, 2))
        assert outbox.set_aside([1, 2], "late refusal") == []
        assert outbox.dead == 0


def test_gap_row_is_no_dead_letter(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=5 * 1000) as outbox:
        fill(outbox, 8, size=900)
        gap = next(row for row in outbox.pending(100) if row.topic == "gap")
        assert outbox.set_aside([gap.seq], "Not authorized") == []
        assert gap in outbox.pending(100)


def test_cap_gives_dead_letters_up_before_what_waits_and_counts_them(tmp_path: Path) -> None:
    with open_outbox(tmp_path, max_bytes=10 * 1000) as outbox:
        fill(outbox, 4, size=800, priority=Priority.HIGH)
        outbox.set_aside([2, 3, 4], "Packet too large")
        fill(outbox, 8, size=800, priority=Priority.LOW)
        assert outbox.bytes <= 10_000
        assert outbox.dead < 3
        lost = outbox.counters["dropped"]
        assert [letter.seq for letter in outbox.dead_letters(10)] == list(range(2 + lost, 5))
        waiting = [row.seq for row in outbox.pending(100) if row.topic == "t"]
        assert waiting == [1, *range(5, 13)]
        assert gaps(outbox)[0][2:] == [2, 1 + lost, lost, "outbox full"]


def test_dead_letter_whose_bytes_changed_is_counted_and_not_shown(tmp_path: Path) -> None:
    with open_outbox(tmp_path) as outbox:
        fill(outbox, 3)
        outbox.set_aside([2, 3], "Packet too large")
        outbox._db.execute("UPDATE rows SET payload = x'00' WHERE seq = 2")  # type: ignore[union-attr]
        assert [letter.seq for letter in outbox.dead_letters(10)] == [3]
        assert (outbox.dead, outbox.counters["damaged"]) == (1, 1)
        assert gaps(outbox)[0][2:] == [2, 2, 1, "damaged row"]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["append", "acknowledge", "set aside", "requeue", "reopen"]), st.integers(50, 1500)),
        max_size=60,
    )
)
def test_every_number_is_somewhere_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    folder = tmp_path_factory.mktemp("dead")
    outbox = open_outbox(folder, max_bytes=8000)
    appended, acknowledged = 0, set()
    for step, size in steps:
        first = next((row for row in outbox.pending(5) if row.topic == "t"), None)
        if step == "append":
            outbox.append("t", body(size))
            appended += 1
        elif step == "acknowledge" and first:
            outbox.acknowledge([first.seq])
            acknowledged.add(first.seq)
        elif step == "set aside" and first:
            assert outbox.set_aside([first.seq], "no") == [first.seq]
        elif step == "requeue":
            outbox.requeue_dead()
        elif step == "reopen":
            outbox.close()
            outbox = open_outbox(folder, max_bytes=8000)
        assert outbox.bytes <= 8000
    waiting = outbox.pending(10_000)
    dead = outbox.dead_letters(10_000)
    assert (outbox.depth, outbox.dead) == (len(waiting), len(dead))
    kept = {row.seq for row in waiting if row.topic == "t"} | {letter.seq for letter in dead}
    assert outbox.counters["dropped"] == appended - len(kept | acknowledged)
    outbox.close()


def test_file_of_the_version_before_is_led_on_with_its_rows(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "outbox.db") as db:
        db.executescript(VERSION_1.replace("BOOT", outbox_file.boot_id()))
    db.close()
    with open_outbox(tmp_path, replay_seconds=1e9) as outbox:
        assert outbox.epoch == "0123456789abcdef"
        assert [(row.seq, row.payload) for row in outbox.pending(10)] == [(4, b"four\n"), (5, b"five\n")]
        assert (outbox.depth, outbox.dead, outbox.bytes) == (2, 0, 127 + 126 + 126)
        assert outbox.append("t", body()) == 6
        assert outbox.set_aside([4], "no") == [4]
        assert outbox.requeue_acknowledged() == 1
    with open_outbox(tmp_path) as outbox:
        assert [letter.payload for letter in outbox.dead_letters(10)] == [b"four\n"]
        assert seqs(outbox) == [5, 6, 3]
