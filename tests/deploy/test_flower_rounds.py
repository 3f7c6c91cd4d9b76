"""Rounds under a scale-out engine, without the engine: who is asked, what counts, who is told, what a crash leaves."""

from __future__ import annotations

import hashlib
from collections import deque
from pathlib import Path

import pytest

from deploy.flower.exchange import BANK, INVITATION, OUTCOME, UPDATE, FolderExchange, Invitation, Outcome
from deploy.flower.quiet import QUIET, require_quiet
from deploy.flower.rounds import Answered, Conductor, Failed, Kept
from edge.errors import DataError, FederationError, SettingsError
from edge.federation.refusals import Refusal
from edge.federation.wire import Limits, encode_bank, encode_update
from tests.edge.federation_values import bank, update

ROOT = Path(__file__).resolve().parents[2]


class FakeBook:
    """Closes at ``enough`` boxes or when its time is over; counts what it takes."""

    def __init__(self, enough=2):
        self.enough, self.round, self.late = enough, 1, False
        self.taken: dict[int, dict[str, bytes]] = {1: {}}
        self.closed: list[list[str]] = []

    def begin(self):
        self.begun = self.round
        return Invitation("plant", {"pool": self.round}, 1000)

    def take(self, box, data):
        digest = hashlib.sha256(data).hexdigest()
        if data == b"bad":
            return Outcome(digest, refused=Refusal.MALFORMED, reason="bad")
        self.taken[self.round][box] = data
        return Outcome(digest, counted_in_round=self.round)

    def tick(self):
        if self.round == self.begun and (self.late or len(self.taken[self.round]) >= self.enough):
            self.closed.append(sorted(self.taken[self.round]))
            self.round, self.late = self.round + 1, False
            self.taken[self.round] = {}
        return self.round != self.begun

    def bank_for(self, box):
        return b"bank of round %d" % (self.round - 1) if box != "north/stranger" else None


class FakeFleet:
    """Boxes that answer what they are given to answer, and store every bank."""

    def __init__(self, answers):
        self.answers = {box: deque(items) for box, items in answers.items()}
        self.here = set(answers)
        self.events, self.asked, self.told = [], [], []
        self.stores = True

    def online(self):
        return self.here

    def ask(self, box, invitation):
        self.asked.append((invitation.rounds["pool"], box))
        if self.answers[box]:
            item = self.answers[box].popleft()
            self.events.append(item if isinstance(item, Failed) else Answered(box, item))

    def tell(self, box, outcome, data):
        self.told.append((box, outcome, data))
        if self.stores:
            self.events.append(Kept(box, 1 if data else 0))

    def poll(self):
        events, self.events = self.events, []
        return events


def conductor(fleet, book, *, wait=None, tell_s=5.0):
    ticks = iter(range(10**6))
    return Conductor(fleet, book, wait=wait or (lambda: None), clock=lambda: float(next(ticks)), tell_s=tell_s)


def test_round_closes_when_enough_boxes_answered_and_every_box_is_told():
    book, fleet = FakeBook(2), FakeFleet({"north/a": [b"x"], "north/b": [b"y"], "north/c": []})

    report = conductor(fleet, book).run()

    assert book.closed == [["north/a", "north/b"]]
    assert report.rounds == {"pool": 1}
    assert report.kept == {"north/a": 1, "north/b": 1, "north/c": 1}
    assert {box: data for box, _, data in fleet.told} == dict.fromkeys(fleet.here, b"bank of round 1")


def test_round_ends_at_its_deadline_where_too_few_answer():
    book, fleet = FakeBook(3), FakeFleet({"north/a": [b"x"], "north/b": [None], "north/c": []})

    conductor(fleet, book, wait=lambda: setattr(book, "late", True)).run()

    assert book.closed == [["north/a"]]


def test_box_that_comes_online_while_the_round_is_open_is_asked_once():
    book, fleet = FakeBook(2), FakeFleet({"north/a": [b"x"], "north/b": [b"y"]})
    fleet.here = {"north/a"}

    conductor(fleet, book, wait=lambda: fleet.here.add("north/b")).run()

    assert sorted(fleet.asked) == [(1, "north/a"), (1, "north/b")]


def test_refused_box_is_told_why_and_does_not_count():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [b"bad"], "north/b": [b"y"]})

    report = conductor(fleet, book).run()

    assert book.closed == [["north/b"]]
    assert report.outcomes["north/a"].refused is Refusal.MALFORMED
    assert {box: outcome.refused for box, outcome, _ in fleet.told}["north/a"] is Refusal.MALFORMED


def test_answer_after_the_close_is_taken_for_the_next_round_and_told_then():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [b"x"]})
    runs = conductor(fleet, book)
    fleet.tell = lambda *told: (fleet.told.append(told), fleet.events.append(Answered("north/b", b"late")))
    first = runs.run()

    fleet.here = {"north/b"}
    second = runs.run()

    assert first.unreached == {"north/a"}
    assert first.outcomes["north/b"].counted_in_round == 2
    assert (second.rounds, book.closed) == ({"pool": 2}, [["north/a"], ["north/b"]])
    assert [(box, outcome.counted_in_round) for box, outcome, _ in fleet.told][-1] == ("north/b", 2)


def test_boxes_that_do_not_store_the_bank_hold_nobody_up():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [b"x"], "north/b": [Failed("north/b", "app raised")]})
    fleet.stores = False

    report = conductor(fleet, book, tell_s=3).run()

    assert report.unreached == {"north/a", "north/b"}


def test_box_without_bank_and_outcome_is_left_alone():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [b"x"], "north/stranger": [None]})

    conductor(fleet, book).run()

    assert [box for box, _, _ in fleet.told] == ["north/a"]


def test_exchange_gives_the_update_and_says_what_is_asked(tmp_path):
    exchange, invitation = FolderExchange(tmp_path), Invitation("plant", {"ab" * 32: 7}, 10_000)
    assert exchange.update(invitation) is None

    data = encode_update(update())
    (tmp_path / UPDATE).write_bytes(data)

    assert exchange.update(invitation) == data
    assert ": 7}" in (tmp_path / INVITATION).read_text()


def test_exchange_reads_no_update_that_is_too_large(tmp_path):
    (tmp_path / UPDATE).write_bytes(bytes(11))

    with pytest.raises(FederationError, match="11 bytes, the aggregator takes 10") as caught:
        FolderExchange(tmp_path).update(Invitation("plant", {}, 10))

    assert caught.value.code is Refusal.TOO_LARGE


def test_exchange_keeps_the_newest_bank_of_a_pool(tmp_path):
    exchange = FolderExchange(tmp_path)
    new, old = encode_bank(bank(version=5)), encode_bank(bank(version=4))

    assert [exchange.store(new), exchange.store(old), exchange.store(new)] == [5, 5, 5]
    assert (tmp_path / BANK).read_bytes() == new


def test_exchange_takes_a_lower_version_of_another_pool(tmp_path):
    exchange = FolderExchange(tmp_path)
    exchange.store(encode_bank(bank(version=5)))

    assert exchange.store(encode_bank(bank(version=1, embedding_id="cd" * 32, pool="cd" * 32))) == 1


@pytest.mark.parametrize("data", [b"", b"LNWB", encode_bank(bank())[:-1]])
def test_exchange_keeps_its_bank_where_the_new_one_is_damaged(tmp_path, data):
    exchange, good = FolderExchange(tmp_path), encode_bank(bank())
    exchange.store(good)

    with pytest.raises(FederationError):
        exchange.store(data)

    assert (tmp_path / BANK).read_bytes() == good
    assert sorted(path.name for path in tmp_path.iterdir()) == [BANK]


def test_exchange_replaces_a_bank_that_the_disk_has_damaged(tmp_path):
    (tmp_path / BANK).write_bytes(b"LNWB and rubbish")

    assert FolderExchange(tmp_path).store(encode_bank(bank(version=3))) == 3


def test_exchange_refuses_a_bank_over_its_limits(tmp_path):
    with pytest.raises(FederationError):
        FolderExchange(tmp_path, Limits(max_rows=2)).store(encode_bank(bank(rows=3)))


def test_exchange_writes_what_became_of_the_update(tmp_path):
    FolderExchange(tmp_path).settle(Outcome("ab" * 32, refused=Refusal.STALE_ROUND, reason="round 3 closed"))

    assert '"refused": "stale_round"' in (tmp_path / OUTCOME).read_text()


def test_exchange_needs_its_folder(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        FolderExchange(tmp_path / "missing")


QUIET_HOME = {**QUIET, "FLWR_HOME": "/var/lib/lineward/flower"}


@pytest.mark.parametrize("name", QUIET_HOME)
def test_no_app_runs_where_flower_may_call_home(name):
    require_quiet(QUIET_HOME)

    with pytest.raises(SettingsError, match=name):
        require_quiet({**QUIET_HOME, name: ""})


def test_environment_file_for_services_has_every_switch():
    lines = (ROOT / "deploy" / "flower" / "flower.env").read_text().splitlines()

    assert {line for line in lines if not line.startswith("#")} == {f"{name}={value}" for name, value in QUIET.items()}
