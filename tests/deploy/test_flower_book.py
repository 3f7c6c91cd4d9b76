"""The aggregator's rounds as a scale-out engine uses them: whole updates in, ends counted, nothing lost by a kill."""

from __future__ import annotations

import contextlib
import hashlib
import time

import pytest

from deploy.aggregator.records import EventKind
from deploy.flower.book import RoundsBook, open_book
from edge.errors import StoreError
from edge.federation.refusals import Refusal
from edge.federation.wire import Limits, decode_bank, encode_update
from tests.deploy.fleet_contract import settings_text
from tests.deploy.round_values import POOL, SETTINGS, Fleet, memory_folder
from tests.edge.federation_values import update

SMALL_CHUNKS = SETTINGS.model_copy(update={"max_chunk": 1024})


def book_of(fleet, *, answer_s=0.0, **options):
    return RoundsBook(
        fleet.store, fleet.rounds, fleet.settings, answer_s=answer_s, clock=fleet.clock.clock(), **options
    )


@pytest.fixture
def fleet():
    with memory_folder() as folder:
        made = Fleet(folder / "aggregator.db", settings=SMALL_CHUNKS)
        yield made
        made.store.close()


@pytest.fixture
def book(fleet):
    return book_of(fleet)


def give(book, *numbers, round_=1):
    """Boxes of these numbers give an update, each in several chunks."""
    made = [encode_update(update(f"north/{n}", seed=n + 100 * round_, rows=200, round=round_)) for n in numbers]
    return [book.take(f"north/{n}", data) for n, data in zip(numbers, made, strict=True)]


def test_update_is_stored_chunk_by_chunk_and_counts_once(fleet, book):
    first, again = give(book, 1), give(book, 1)

    assert first == again
    assert [(one.counted_in_round, one.refused) for one in first] == [(1, None)]
    assert fleet.store.waiting_boxes(POOL, 1) == 1


def test_outcome_names_the_bytes(book):
    assert book.take("north/1", b"x").sha256 == hashlib.sha256(b"x").hexdigest()


def test_refusal_before_the_rounds_is_noted_as_one_by_them_is(fleet, book):
    outcome = book.take("north/1", b"rubbish")

    assert (outcome.refused, outcome.counted_in_round) == (Refusal.MALFORMED, 0)
    assert [(event.kind, event.box) for event in fleet.store.events()] == [(EventKind.REFUSAL, "north/1")]


def test_stolen_name_is_refused(book):
    assert book.take("north/2", encode_update(update("north/1"))).refused is Refusal.STOLEN_NAME


def test_round_that_closes_is_counted_and_its_bank_is_the_newest(book):
    give(book, 1, 2, 3)

    assert [book.tick() + book.tick(), book.tick()] == [1, 0]
    assert book.newest("north/1") == 1
    bank = decode_bank(book.bank("north/1"), Limits())
    assert bank.members == ("north/1", "north/2", "north/3")
    assert book.invitation().rounds == {POOL: 2}


def test_box_that_never_gave_anything_has_no_bank(book):
    give(book, 1, 2, 3)
    book.tick()
    book.tick()

    assert (book.newest("north/9"), book.bank("north/9")) == (0, None)


def test_round_that_must_be_extended_is_counted(fleet, book):
    give(book, 1)
    assert book.tick() == 0
    fleet.clock.pass_s(61)

    assert book.tick() == 1
    assert book.tick() == 0


def test_period_without_any_round_is_counted(fleet, book):
    fleet.clock.pass_s(59)
    assert book.tick() == 0
    fleet.clock.pass_s(2)

    assert [book.tick(), book.tick()] == [1, 0]


def test_deadline_that_passed_while_nothing_ran_is_put_off(fleet, book):
    give(book, 1, 2)
    fleet.clock.pass_s(3600)
    fleet.restart()
    later = book_of(fleet, answer_s=30)

    assert later.tick() == 0
    fleet.clock.pass_s(29)
    assert later.tick() == 0
    fleet.clock.pass_s(2)
    assert later.tick() + later.tick() == 1
    assert later.newest("north/1") == 1


def test_deadline_far_ahead_is_left_alone(fleet, book):
    give(book, 1, 2)
    fleet.restart()
    before = fleet.store.current_round(POOL).deadline_ns

    book_of(fleet, answer_s=30)

    assert fleet.store.current_round(POOL).deadline_ns == before


def test_updates_and_pools_of_boxes_survive_a_restart(fleet, book):
    give(book, 1, 2)
    fleet.restart()
    later = book_of(fleet)
    give(later, 3)

    assert later.tick() + later.tick() == 1
    assert [later.newest(f"north/{n}") for n in (1, 2, 3)] == [1, 1, 1]


def test_round_that_was_being_merged_at_a_kill_is_counted_by_the_next_run(fleet, book):
    give(book, 1, 2, 3)
    fleet.rounds.tick()  # closed and merged, not yet taken in
    fleet.restart()

    later = book_of(fleet)

    assert later.tick() + later.tick() + later.tick() == 1
    assert later.newest("north/1") == 1


def test_store_that_cannot_be_read_now_ends_nothing(fleet, caplog):
    def fail():
        raise StoreError("disk on fire")

    book = book_of(fleet, notices=fail)

    assert book.tick() == 0
    assert "disk on fire" in caplog.text


@pytest.fixture
def settings_file(tmp_path):
    (tmp_path / "aggregator.yaml").write_text(settings_text(tmp_path, period_s=60))
    return tmp_path / "aggregator.yaml"


def test_second_run_on_one_store_is_refused(settings_file):
    with open_book(settings_file, answer_s=1), pytest.raises(StoreError, match="another aggregator"):  # noqa: SIM117 (order)
        with open_book(settings_file, answer_s=1, patience_s=0.1):
            pytest.fail("two runs serve one store")


def test_run_waits_for_the_store_of_one_that_is_ending(settings_file, monkeypatch):
    first = contextlib.ExitStack()
    first.enter_context(open_book(settings_file, answer_s=1))
    monkeypatch.setattr(time, "sleep", lambda _: first.close())

    with open_book(settings_file, answer_s=1, patience_s=30) as book:
        assert book.invitation().fleet == "plant"
