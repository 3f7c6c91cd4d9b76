"""Rounds under a scale-out engine, without the engine: who is asked, what counts, who is told, what a crash leaves."""

from __future__ import annotations

import hashlib
from collections import deque
from pathlib import Path

import pytest

from deploy.flower.exchange import FolderExchange, Invitation, Outcome
from deploy.flower.quiet import QUIET, require_quiet
from deploy.flower.rounds import Answered, Conductor, Failed, Kept
from edge.errors import DataError, FederationError, SettingsError
from edge.federation.folder_link import BANK, INVITATION, OUTCOME, UPDATE
from edge.federation.refusals import Refusal
from edge.federation.wire import Limits, encode_bank, encode_update
from tests.edge.federation_values import bank, update

ROOT = Path(__file__).resolve().parents[2]


class FakeBook:
    """Closes at ``enough`` boxes or when its time is over; one pool."""

    def __init__(self, enough=2):
        self.enough, self.round, self.late = enough, 1, False
        self.taken: dict[int, dict[str, bytes]] = {1: {}}
        self.closed: list[list[str]] = []

    def invitation(self):
        return Invitation("plant", {"pool": self.round}, 1000)

    def take(self, box, data):
        digest = hashlib.sha256(data).hexdigest()
        if data == b"bad":
            return Outcome(digest, refused=Refusal.MALFORMED, reason="bad")
        self.taken[self.round][box] = data
        return Outcome(digest, counted_in_round=self.round)

    def tick(self):
        if not self.late and len(self.taken[self.round]) < self.enough:
            return 0
        self.closed.append(sorted(self.taken[self.round]))
        self.round, self.late = self.round + 1, False
        self.taken[self.round] = {}
        return 1

    def newest(self, box):
        return 0 if box == "north/stranger" else self.round - 1

    def bank(self, box):
        return b"bank %d" % self.newest(box) if self.newest(box) else None


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
            self.events.append(Kept(box, int(data.split()[1]) if data else 0))

    def poll(self):
        events, self.events = self.events, []
        return events


class Time:
    """A clock that :meth:`wait` moves on by a second; ``then`` is called each time."""

    def __init__(self, then=lambda: None):
        self.now, self.then = 0.0, then

    def wait(self):
        self.now += 1
        assert self.now < 1000, "the run does not end"
        self.then()


def conductor(fleet, book, *, then=lambda: None, ask_s=100.0, tell_s=5.0):
    time = Time(then)
    return Conductor(fleet, book, wait=time.wait, clock=lambda: time.now, ask_s=ask_s, tell_s=tell_s)


def test_round_closes_when_enough_boxes_answered_and_every_box_is_told():
    book, fleet = FakeBook(2), FakeFleet({"north/a": [b"x"], "north/b": [b"y"]})

    report = conductor(fleet, book).run(1)

    assert book.closed == [["north/a", "north/b"]]
    assert report.kept == {"north/a": 1, "north/b": 1}
    assert [(box, outcome.counted_in_round, data) for box, outcome, data in fleet.told] == [
        ("north/a", 1, b"bank 1"),
        ("north/b", 1, b"bank 1"),
    ]


def test_round_ends_at_its_deadline_where_too_few_answer():
    book, fleet = FakeBook(3), FakeFleet({"north/a": [b"x"], "north/b": [None], "north/c": []})

    conductor(fleet, book, then=lambda: setattr(book, "late", True)).run(1)

    assert book.closed == [["north/a"]]


def test_box_that_comes_online_while_the_round_is_open_is_asked_once():
    book, fleet = FakeBook(2), FakeFleet({"north/a": [b"x"], "north/b": [b"y"]})
    fleet.here = {"north/a"}

    conductor(fleet, book, then=lambda: fleet.here.add("north/b")).run(1)

    assert sorted(fleet.asked) == [(1, "north/a"), (1, "north/b")]


def test_box_that_had_nothing_is_asked_again_after_a_while():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [None, None, b"x"]})

    conductor(fleet, book, ask_s=10).run(1)

    assert fleet.asked == [(1, "north/a")] * 3


def test_box_has_one_message_under_way_at_a_time():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [], "north/b": [None] * 5 + [b"y"]})

    conductor(fleet, book, ask_s=10).run(1)

    assert fleet.asked.count((1, "north/a")) == 1
    assert [box for box, _, _ in fleet.told] == ["north/b"]


def test_refused_box_is_told_why_at_once_and_does_not_count():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [b"bad"], "north/b": [None, b"y"]})

    report = conductor(fleet, book, ask_s=10).run(1)

    assert book.closed == [["north/b"]]
    assert report.outcomes["north/a"].refused is Refusal.MALFORMED
    assert fleet.told[0] == ("north/a", report.outcomes["north/a"], None)


def test_answer_after_the_close_counts_for_the_next_round_and_is_told():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [b"x"], "north/b": []})
    tell, late = fleet.tell, [Answered("north/b", b"late")]
    fleet.tell = lambda *told: (tell(*told), fleet.events.extend(late), late.clear())

    report = conductor(fleet, book).run(1)

    assert book.taken[2] == {"north/b": b"late"}
    assert report.outcomes["north/b"].counted_in_round == 2
    assert [box for box, _, _ in fleet.told] == ["north/a", "north/b"]


def test_message_that_failed_is_tried_again():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [Failed("north/a", "app raised"), b"x"]})

    report = conductor(fleet, book, ask_s=10).run(1)

    assert report.kept == {"north/a": 1}


def test_boxes_that_do_not_store_the_bank_hold_nobody_up(caplog):
    book, fleet = FakeBook(1), FakeFleet({"north/a": [b"x"]})
    fleet.stores = False

    report = conductor(fleet, book).run(1)

    assert report.kept == {}
    assert "north/a has not said that it stored the newest bank" in caplog.text


def test_box_without_bank_and_outcome_is_left_alone():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [b"x"], "north/stranger": [None]})

    conductor(fleet, book).run(1)

    assert [box for box, _, _ in fleet.told] == ["north/a"]


def test_run_goes_on_until_as_many_rounds_have_ended():
    book, fleet = FakeBook(1), FakeFleet({"north/a": [b"x", b"y", b"z"]})

    report = conductor(fleet, book, ask_s=10).run(3)

    assert (report.ended, book.closed, report.kept) == (3, [["north/a"]] * 3, {"north/a": 3})


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


@pytest.mark.parametrize("name", ["superlink", "supernode", "round"])
def test_services_start_what_calls_nobody_and_installs_nothing(name):
    unit = (ROOT / "deploy" / "flower" / f"lineward-{name}.service").read_text()
    command = unit.replace("\\\n", " ").partition("ExecStart=")[2].partition("\n")[0]

    assert "\nEnvironmentFile=/opt/lineward/flower.env\n" in unit
    assert "FLWR_HOME=/var/lib/" in unit
    assert "PATH=/opt/lineward/venv-flower/bin:" in unit
    assert "--insecure" not in command
    assert "--allow-runtime-dependency-installation" not in command
    assert ("--disable-runtime-dependency-installation" in command) == (name == "superlink")
    assert ("--enable-supernode-auth" in command) == (name == "superlink")
