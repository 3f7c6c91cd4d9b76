"""Damaged files of the outbox: what was committed before the damage is there, numbers stay unique, the box goes on."""

from __future__ import annotations

import contextlib
import shutil
from typing import TYPE_CHECKING

import pytest

from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings
from edge.errors import OutboxError
from tests.alert_values import IDENTITY, draft
from tests.edge.test_outbox import full_disk
from tests.faults.history import Id
from tests.faults.listener import Listener
from tests.faults.log_damage import ROWS, contents, damage_log, leave_crashed, open_outbox

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

START_S = 2.0
SEED = 5


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The files of a box that died after 40 rows, all in the write-ahead log, and the log's length after each."""
    copy = tmp_path_factory.mktemp("copy")
    return copy, leave_crashed(tmp_path_factory.mktemp("crashed"), copy)


def damaged_copy(source: Path, target: Path, name: str, change: object) -> Path:
    target.mkdir()
    for file in source.iterdir():
        shutil.copy(file, target / file.name)
    content = bytearray((target / name).read_bytes())
    (target / name).write_bytes(change(content))  # type: ignore[operator]
    return target / "outbox.db"


@pytest.mark.parametrize("cases", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_log_damaged_anywhere_keeps_all_rows_before_and_counts_the_others(
    crashed: tuple[Path, list[int]], tmp_path: Path, cases: int
) -> None:
    found = damage_log(*crashed, tmp_path, cases=cases, seed=SEED)
    assert found.findings == [], f"seed {SEED}"
    assert found.cases == cases
    assert found.lost > cases / 2, "the damage does none: this test would show nothing"
    assert found.slowest_s <= START_S


@pytest.mark.broker
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_rows_before_the_damage_are_delivered(
    crashed: tuple[Path, list[int]], tmp_path: Path, mosquitto: Mosquitto, share: float
) -> None:
    source, lengths = crashed
    at = int(share * lengths[-1])
    path = damaged_copy(source, tmp_path / "cut", "outbox.db-wal", lambda content: bytes(content[:at]))
    with Listener(mosquitto.port, tmp_path / "history.jsonl") as listener, open_outbox(path) as outbox:
        safe = {Id(IDENTITY.box, outbox.epoch, seq) for seq, length in enumerate(lengths, 1) if length <= at}
        with Publisher(settings=BrokerSettings(url=mosquitto.url), identity=IDENTITY, outbox=outbox) as publisher:
            assert publisher.wait_until_drained(20)
        assert safe
        assert listener.wait_for(safe, quiet_s=5.0) == set()
        gap = listener.wait_for_gap(10)
        assert (gap.last, gap.first + gap.dropped) == (ROWS, ROWS + 1)


def test_log_undamaged_after_a_crash_is_no_damage(crashed: tuple[Path, list[int]], tmp_path: Path) -> None:
    """The control: the same files and the same check, nothing changed."""
    with open_outbox(damaged_copy(crashed[0], tmp_path / "same", "outbox.db-wal", bytes)) as outbox:
        assert contents(outbox) == (list(range(1, ROWS + 1)), [])
        assert outbox.damage is None


def test_loss_is_not_counted_without_the_mark(crashed: tuple[Path, list[int]], tmp_path: Path) -> None:
    """The control of the count: the same damage, and the file that knows the last number is gone."""
    source = tmp_path / "unmarked"
    shutil.copytree(crashed[0], source)
    (source / "outbox.db-mark").unlink()
    found = damage_log(source, crashed[1], tmp_path, cases=9, seed=SEED)
    assert any("gaps count []" in text for text in found.findings)
    assert any("is given again" in text for text in found.findings)


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
        accepted, refused = [], 0
        with full_disk(outbox, more_pages=40):
            for _ in range(300):
                with contextlib.suppress(OutboxError):
                    accepted.append(outbox.append(*draft()[:2]))
                    continue
                refused += 1
            assert refused > 0, "the disk was never full: this test would show nothing"
            assert contents(outbox)[0] == accepted == list(range(1, len(accepted) + 1))
            assert outbox._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)  # type: ignore[union-attr]
        assert outbox.append(*draft()[:2]) == len(accepted) + 1
