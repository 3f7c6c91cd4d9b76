"""The aggregator's file: what survives a restart, damage and a full disk, and who may have it open."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.aggregator.aggregate import AggregateSettings
from deploy.aggregator.records import EventKind, RoundState, UploadState
from deploy.aggregator.store import MAX_EVENTS, Store
from deploy.aggregator.store_file import StoreFullError
from edge.errors import FederationError, StoreError
from edge.federation.messages import Receipt, Resume, Welcome
from edge.federation.refusals import Refusal
from edge.federation.wire import encode_update
from tests.deploy.round_values import POOL, Fleet, memory_folder
from tests.edge.federation_values import update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BOXES = ("north/one", "north/two", "south/three")


def close_a_round(fleet: Fleet, round_: int) -> None:
    for number, box in enumerate(BOXES):
        fleet.send(update(box, seed=10 * round_ + number, round=round_))
    fleet.settle()


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    """An engine that has closed two rounds, and has one update waiting and one half there."""
    made = Fleet(tmp_path / "state" / "aggregator.db")
    for round_ in (1, 2):
        close_a_round(made, round_)
    made.send(update(BOXES[0], seed=90, round=3))
    half = encode_update(update(BOXES[1], seed=91, round=3))
    made.offer(BOXES[1], half, 3)
    partial = made.store.partial(BOXES[1], _only_partial(made))
    assert partial is not None
    made.store.append_chunk(partial, half[:321])
    return made


def _only_partial(fleet: Fleet) -> str:
    return str(fleet.store._rows("SELECT sha256 FROM partials")[0][0])


def snapshot(store: Store) -> list[object]:
    banks = store.banks(POOL)
    partials = store._rows("SELECT box, sha256, size, stored FROM partials")
    rounds = [store.rounds(state=state) for state in RoundState]
    uploads = store.uploads()
    return [
        banks,
        [store.bank_bytes(bank) for bank in banks],
        partials,
        [[(r.pool, r.round, r.state, r.note) for r in found] for found in rounds],
        uploads,
        [store.payload(upload) for upload in uploads],
        [(event.kind, event.text) for event in store.events()],
        store.last_version(POOL),
    ]


def copied(fleet: Fleet, target: Path) -> Path:
    """The files as a kill would leave them: copied while they are open."""
    shutil.copytree(fleet.path.parent, target)
    return target / fleet.path.name


def test_what_was_stored_is_there_after_a_kill_and_after_an_orderly_end(fleet: Fleet, tmp_path: Path) -> None:
    before = snapshot(fleet.store)
    killed = copied(fleet, tmp_path / "killed")
    assert killed.with_name("aggregator.db-wal").stat().st_size > 0, "nothing was left to recover: this shows nothing"
    with Store(killed) as store:
        assert snapshot(store) == before
        assert store.damage == ""
    fleet.restart()
    assert snapshot(fleet.store) == before
    assert len(before[4]) == 7  # type: ignore[arg-type]


def test_transaction_that_fails_leaves_nothing_behind(fleet: Fleet) -> None:
    before = snapshot(fleet.store)
    with pytest.raises(KeyError), fleet.store.transaction():  # noqa: PT012 (what was done before it fails is the point)
        fleet.store.add_event(EventKind.ROUND, "inside")
        with fleet.store.transaction():
            fleet.store.set_upload(1, UploadState.REFUSED)
        raise KeyError
    assert snapshot(fleet.store) == before
    fleet.store.add_event(EventKind.ROUND, "after")
    assert snapshot(fleet.store) != before


def test_second_service_is_kept_away_and_an_operator_is_not(fleet: Fleet) -> None:
    with pytest.raises(StoreError, match="another aggregator"):
        Store(fleet.path)
    with Store(fleet.path, serve=False) as beside:
        assert beside.banks(POOL) == fleet.store.banks(POOL)
        beside.add_event(EventKind.OPERATOR, "seen from beside")
        assert fleet.store.events()[-1].text == "seen from beside"
    fleet.store.close()
    Store(fleet.path).close()


def test_operator_of_a_store_that_is_not_there_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is none"):
        Store(tmp_path / "nowhere.db", serve=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("statement", "match"),
    [("PRAGMA user_version=9", "schema 9"), ("PRAGMA application_id=7", "another program")],
)
def test_file_of_another_version_or_program_is_left_alone(fleet: Fleet, statement: str, match: str) -> None:
    fleet.store.close()
    db = sqlite3.connect(fleet.path)
    db.execute(statement)
    db.close()
    content = fleet.path.read_bytes()
    with pytest.raises(StoreError, match=match):
        Store(fleet.path)
    assert fleet.path.read_bytes() == content


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "header zeroed": lambda content: b"\0" * 100 + content[100:],
    "cut in half": lambda content: content[: len(content) // 2],
    "text": lambda content: b"not a database at all, but long enough for a header".ljust(len(content), b"!"),
    "pages overwritten": lambda content: content[:4096] + b"\xa5" * (len(content) - 4096),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_file_is_put_aside_and_the_fleet_goes_on_above_all_numbers_given(name: str, fleet: Fleet) -> None:
    fleet.store.close()
    damaged = DAMAGE[name](fleet.path.read_bytes())
    fleet.path.write_bytes(damaged)
    fleet.begin()
    assert "was damaged" in fleet.store.damage
    (aside,) = fleet.path.parent.glob("*.damaged-*")
    assert aside.name in fleet.store.damage
    assert aside.read_bytes() == damaged
    assert fleet.store.events()[-1].kind is EventKind.DAMAGE
    with pytest.raises(FederationError) as caught:
        fleet.send(update(BOXES[0], seed=92, round=4))
    assert caught.value.code is Refusal.FUTURE_ROUND
    reply = fleet.hello()
    assert isinstance(reply, Welcome)
    assert reply.round == 3, "boxes know rounds up to 3"
    close_a_round(fleet, 3)
    assert [bank.version for bank in fleet.store.banks(POOL)] == [3], "version 2 is another bank, on the boxes"
    fleet.restart()
    assert fleet.store.damage == "", "no crash loop: the next start is an ordinary one"


def test_damaged_file_without_its_mark_begins_at_one(fleet: Fleet) -> None:
    """The control of the numbers above: they come from the mark."""
    fleet.store.close()
    fleet.path.write_bytes(DAMAGE["text"](fleet.path.read_bytes()))
    Path(f"{fleet.path}-mark").write_bytes(b"{]")
    fleet.begin()
    reply = fleet.hello()
    assert isinstance(reply, Welcome)
    assert reply.round == 1


def test_damage_met_while_serving_costs_the_request_and_not_the_service(fleet: Fleet) -> None:
    fleet.store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    fleet.store._db.execute("PRAGMA cache_size=0")
    with fleet.path.open("r+b", buffering=0) as file:
        size = fleet.path.stat().st_size
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    with pytest.raises(FederationError) as caught:
        fleet.send(update(BOXES[2], seed=93, round=3))
    assert caught.value.code is Refusal.BUSY
    assert "was damaged" in fleet.store.damage
    assert fleet.send(update(BOXES[2], seed=93, round=3)).counted_in_round == 3


def test_damaged_row_of_an_update_is_refused_and_the_others_count(fleet: Fleet) -> None:
    (waiting,) = fleet.store.uploads(state=UploadState.WAITING)
    payload = bytearray(fleet.store.payload(waiting) or b"")
    payload[-20] ^= 1  # of a mean: it still decodes
    fleet.store._db.execute("UPDATE uploads SET payload = ? WHERE id = ?", (bytes(payload), waiting.id))
    for number, box in enumerate(BOXES[1:]):
        fleet.send(update(box, seed=70 + number, round=3))
    fleet.settle()
    bank = fleet.fetch()
    assert bank is not None
    assert bank.members == BOXES, "what the box sent for the round before counts on"
    (refused,) = fleet.store.uploads(state=UploadState.REFUSED)
    assert "damaged" in refused.reasons[0]


def test_full_disk_gives_no_receipt_and_loses_nothing_that_has_one(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "aggregator.db")
    fleet.hello()
    pages = fleet.store._db.execute("PRAGMA page_count").fetchone()[0]
    fleet.store._db.execute(f"PRAGMA max_page_count={pages + 12}")
    receipts: dict[str, bytes] = {}
    refused: list[Refusal] = []
    for number in range(12):
        sent = update(f"north/{number}", seed=number, rows=64, columns=40)
        try:
            receipts[fleet.send(sent, size=2000).sha256] = encode_update(sent)
        except FederationError as error:
            refused.append(error.code)
    assert refused, "the disk was never full: this would show nothing"
    assert set(refused) == {Refusal.NO_SPACE}
    assert not Refusal.NO_SPACE.final, "the box keeps it"
    assert receipts
    there = {upload.sha256: fleet.store.payload(upload) for upload in fleet.store.uploads()}
    assert there == receipts
    assert fleet.store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    fleet.store._db.execute("PRAGMA max_page_count=100000")
    assert isinstance(fleet.send(update("north/99", seed=99)), Receipt), "space came back"


def test_disk_with_room_takes_them_all(tmp_path: Path) -> None:
    """The control of the full disk: the same updates, no limit."""
    fleet = Fleet(tmp_path / "aggregator.db")
    for number in range(12):
        assert isinstance(fleet.send(update(f"north/{number}", seed=number, rows=64, columns=40), size=2000), Receipt)


def test_full_disk_keeps_a_round_until_there_is_room_for_its_bank(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "aggregator.db", aggregate=AggregateSettings(rows=600))
    for number, box in enumerate(BOXES):
        fleet.send(update(box, seed=number, rows=200, columns=60), size=5000)
    pages = fleet.store._db.execute("PRAGMA page_count").fetchone()[0]
    fleet.store._db.execute(f"PRAGMA max_page_count={pages}")
    for _ in range(5):
        fleet.settle()
        fleet.clock.pass_s(6)
    assert fleet.store.bank(POOL) is None
    assert "disk is full" in fleet.rounds.trouble
    fleet.store._db.execute("PRAGMA max_page_count=100000")
    for _ in range(5):
        fleet.settle()
        fleet.clock.pass_s(6)
    assert fleet.store.last_version(POOL) == 1
    assert fleet.rounds.trouble == ""


def test_full_disk_error_is_typed(tmp_path: Path) -> None:
    with Store(tmp_path / "aggregator.db") as store:
        store._db.execute(f"PRAGMA max_page_count={store._db.execute('PRAGMA page_count').fetchone()[0]}")
        with pytest.raises(StoreFullError, match="disk is full"):
            store.add_bank(
                pool=POOL, version=1, round_=1, columns=1, payload=bytes(10**6), inputs=(), origin="", created=""
            )


def test_events_are_bounded_and_the_oldest_go(tmp_path: Path) -> None:
    with Store(tmp_path / "aggregator.db") as store:
        with store.transaction():
            for number in range(MAX_EVENTS + 20):
                store.add_event(EventKind.ROUND, f"{number} {'x' * 2000}")
        assert store._rows("SELECT count(*) FROM events") == [(MAX_EVENTS,)]
        last = store.events(limit=1)[0]
        following = store.events(after=last.id - 5, limit=3)
        assert [event.id - last.id for event in following] == [-4, -3, -2], "whoever follows misses none"
        assert (last.text[:6], len(last.text)) == ("10019 ", 1000)


def test_update_that_was_half_there_ends_with_its_round(fleet: Fleet) -> None:
    assert len(fleet.store._rows("SELECT 1 FROM partials")) == 1
    for round_ in (3, 4):
        for number, box in enumerate(("west/a", "west/b", "west/c")):
            fleet.send(update(box, seed=200 + 10 * round_ + number, round=round_))
        fleet.settle()
    assert fleet.store._rows("SELECT 1 FROM partials") == []
    assert fleet.store._rows("SELECT 1 FROM chunks") == [], "its bytes are gone with it"


def test_update_half_there_goes_on_after_a_kill(fleet: Fleet, tmp_path: Path) -> None:
    half = encode_update(update(BOXES[1], seed=91, round=3))
    again = Fleet(copied(fleet, tmp_path / "killed"), clock=fleet.clock)
    reply = again.offer(BOXES[1], half, 3)
    assert isinstance(reply, Resume)
    assert reply.offset == 321
    assert isinstance(again.send_bytes(half, by=BOXES[1], round_=3), Receipt)
