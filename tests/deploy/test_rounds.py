"""Rounds: when they close, what counts in them, what is refused, and that a restart or a clock changes none of it."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from deploy.aggregator import operators
from deploy.aggregator.records import EventKind, RoundState, UploadState
from deploy.aggregator.round_settings import RoundSettings, Scope
from edge.errors import DataError, FederationError, UsageError
from edge.federation.messages import Chunk, Fetch, Nothing, Progress, Receipt, Resume, Welcome
from edge.federation.refusals import Refusal
from edge.federation.update import WireRows
from edge.federation.wire import encode_update
from edge.memory.bank import MemoryBank
from tests.deploy.round_values import POOL, PRODUCT, SETTINGS, Examination, Fleet, HandClock, in_place, memory_folder
from tests.edge.federation_values import EMBEDDING, update

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edge.federation.update import MemoryUpdate

BOXES = ("north/one", "north/two", "south/three", "south/four", "south/five")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with memory_folder() as folder:
        yield folder


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "rounds.db")


def made(box: str, round_: int = 1, **changes: Any) -> MemoryUpdate:
    """What a box sends for a round: other boxes and rounds give other rows."""
    seed = changes.pop("seed", 100 * BOXES.index(box) + round_)
    return update(box, seed=seed, round=round_, **changes)


def refusal(work: Callable[[], object]) -> Refusal:
    with pytest.raises(FederationError) as caught:
        work()
    return caught.value.code


def welcome(fleet: Fleet) -> Welcome:
    reply = fleet.hello()
    assert isinstance(reply, Welcome)
    return reply


def test_round_closes_as_soon_as_k_boxes_have_sent(fleet: Fleet) -> None:
    assert (welcome(fleet).round, welcome(fleet).bank_version) == (1, 0)
    for box in BOXES[:2]:
        assert fleet.send(made(box)).counted_in_round == 1
        fleet.settle()
    assert welcome(fleet).round == 1
    fleet.send(made(BOXES[2]))
    fleet.settle()
    assert (welcome(fleet).round, welcome(fleet).bank_version) == (2, 1)
    bank = fleet.fetch()
    assert bank is not None
    assert (bank.version, bank.round, bank.members) == (1, 1, tuple(sorted(BOXES[:3])))
    assert {upload.state for upload in fleet.store.uploads()} == {UploadState.ACCEPTED}
    assert bank.created == fleet.clock.wall, "the moment the round closed"


def test_round_closes_at_its_deadline_with_those_that_came(fleet: Fleet) -> None:
    for box in BOXES[:2]:
        fleet.send(made(box))
    fleet.clock.pass_s(59.9)
    fleet.settle()
    assert welcome(fleet).round == 1
    fleet.clock.pass_s(0.2)
    fleet.settle()
    assert (welcome(fleet).round, welcome(fleet).bank_version) == (2, 1)


def test_round_with_nothing_or_too_little_stays_open_and_keeps_what_it_has(fleet: Fleet) -> None:
    welcome(fleet)
    fleet.clock.pass_s(61)
    fleet.settle()
    assert welcome(fleet).round == 1
    assert welcome(fleet).closes_in_ms == 60_000
    assert fleet.store.events() == []
    fleet.send(made(BOXES[0]))
    fleet.clock.pass_s(61)
    fleet.settle()
    assert (welcome(fleet).round, welcome(fleet).bank_version) == (1, 0)
    assert "extended: 1 of at least 2" in fleet.store.events()[-1].text
    fleet.send(made(BOXES[1]))
    fleet.clock.pass_s(61)
    fleet.settle()
    assert welcome(fleet).bank_version == 1


def test_late_update_counts_in_the_next_round_and_an_older_one_is_stale(fleet: Fleet) -> None:
    for box in BOXES[:3]:
        fleet.send(made(box))
    fleet.settle()
    late = fleet.send(made(BOXES[3], round_=1))
    assert late.counted_in_round == 2
    for box in BOXES[:2]:
        fleet.send(made(box, round_=2))
    fleet.settle()
    bank = fleet.fetch()
    assert bank is not None
    assert (bank.round, BOXES[3] in bank.members) == (2, True)
    assert refusal(lambda: fleet.send(made(BOXES[4], round_=1))) is Refusal.STALE_ROUND
    assert refusal(lambda: fleet.send(made(BOXES[4], round_=4))) is Refusal.FUTURE_ROUND


def test_three_of_five_answer_one_never_one_late(fleet: Fleet) -> None:
    fleet.settings = SETTINGS.model_copy(update={"close_at": 5, "carry_rounds": 0})
    fleet.restart()
    for box in BOXES[:3]:
        fleet.send(made(box))
    closed_at = None
    for tenth in range(700):
        fleet.rounds.tick()
        if fleet.store.bank(POOL) is not None:
            closed_at = tenth / 10
            break
        fleet.clock.pass_s(0.1)
    assert closed_at == pytest.approx(60, abs=1)
    assert fleet.send(made(BOXES[3], round_=1)).counted_in_round == 2
    fleet.send(made(BOXES[0], round_=2))
    fleet.clock.pass_s(61)
    fleet.settle()
    bank = fleet.fetch()
    assert bank is not None
    assert bank.members == tuple(sorted((BOXES[0], BOXES[3])))


def test_every_request_may_come_again(fleet: Fleet) -> None:
    sent = made(BOXES[0])
    payload = encode_update(sent)
    half = len(payload) // 2
    digest_of = fleet.send(sent).sha256
    for _ in range(2):
        again = fleet.send(sent)
        assert (again.sha256, again.counted_in_round) == (digest_of, 1)
        reply = fleet.ask(BOXES[0], Chunk(id=9, sha256=digest_of, offset=half), payload[half:])
        assert isinstance(reply, Receipt), "the last chunk, its receipt lost on the way"
    assert len(fleet.store.uploads()) == 1
    fleet.send(made(BOXES[1]))
    fleet.send(made(BOXES[2]))
    fleet.settle()
    first = fleet.fetch()
    assert fleet.send(sent).counted_in_round == 1, "still known after its round was closed"
    fleet.settle()
    assert first is not None
    assert fleet.store.last_version(POOL) == 1


def test_upload_goes_on_where_it_ended_also_after_a_restart(fleet: Fleet) -> None:
    payload = encode_update(made(BOXES[0]))
    reply = fleet.offer(BOXES[0], payload, 1)
    assert isinstance(reply, Resume)
    assert reply.offset == 0
    chunk = Chunk(id=3, sha256=reply.sha256, offset=0)
    assert fleet.ask(BOXES[0], chunk, payload[:300]) == Progress(id=3, sha256=reply.sha256, offset=300)
    assert fleet.ask(BOXES[0], chunk, payload[:300]) == Progress(id=3, sha256=reply.sha256, offset=300), "sent twice"
    ahead = Chunk(id=4, sha256=reply.sha256, offset=500)
    assert fleet.ask(BOXES[0], ahead, payload[500:600]) == Progress(id=4, sha256=reply.sha256, offset=300), "a gap"
    fleet.restart()
    resumed = fleet.offer(BOXES[0], payload, 1)
    assert isinstance(resumed, Resume)
    assert resumed.offset == 300
    assert isinstance(fleet.ask(BOXES[0], Chunk(id=5, sha256=reply.sha256, offset=300), payload[300:]), Receipt)
    assert fleet.store.partial(BOXES[0], reply.sha256) is None
    other = fleet.offer(BOXES[1], payload, 1)
    assert isinstance(other, Resume)
    assert other.offset == 0, "what one box has sent is nothing to another"


def close_one_round(fleet: Fleet, round_: int = 1) -> None:
    for box in BOXES[:3]:
        fleet.send(made(box, round_=round_))
    fleet.settle()


REFUSED: dict[str, tuple[Callable[[Fleet], object], Refusal]] = {
    "other box in the greeting": (lambda f: f.hello(BOXES[0], box=BOXES[1]), Refusal.STOLEN_NAME),
    "other fleet in the greeting": (lambda f: f.hello(fleet="mine"), Refusal.WRONG_FLEET),
    "other box in the update": (lambda f: f.send(made(BOXES[3], 2), by=BOXES[4]), Refusal.STOLEN_NAME),
    "other fleet": (lambda f: f.send(made(BOXES[3], 2, fleet="mine")), Refusal.WRONG_FLEET),
    "embedding not announced": (
        lambda f: f.send(made(BOXES[3], 2, embedding_id="cd" * 32)),
        Refusal.WRONG_EMBEDDING,
    ),
    "embedding not served": (
        lambda f: f.send(made(BOXES[3], 2, embedding_id="cd" * 32), embedding_id="cd" * 32),
        Refusal.WRONG_EMBEDDING,
    ),
    "product not announced": (lambda f: f.send(made(BOXES[3], 2, product="other")), Refusal.WRONG_PRODUCT),
    "product not served": (lambda f: f.hello(product="other"), Refusal.WRONG_PRODUCT),
    "round not announced": (
        lambda f: f.send_bytes(encode_update(made(BOXES[3], 1)), by=BOXES[3], round_=2),
        Refusal.MALFORMED,
    ),
    "old round": (lambda f: f.send(made(BOXES[3], 1)), Refusal.STALE_ROUND),
    "round to come": (lambda f: f.send(made(BOXES[3], 9)), Refusal.FUTURE_ROUND),
    "replayed nonce": (
        lambda f: f.send(made(BOXES[3], 3, nonce=made(BOXES[0], 2).nonce)),
        Refusal.REPLAYED_NONCE,
    ),
    "second update for a round": (lambda f: f.send(made(BOXES[0], 2, seed=77)), Refusal.ALREADY_COUNTED),
    "altered hash": (
        lambda f: f.send_bytes(encode_update(made(BOXES[3], 3)), by=BOXES[3], round_=3, sha256="ef" * 32),
        Refusal.BAD_HASH,
    ),
    "other columns": (lambda f: f.send(made(BOXES[3], 3, columns=5)), Refusal.BAD_SHAPE),
    "too few frames": (
        lambda f: f.send(made(BOXES[3], 3, frames=np.asarray([9, 9, 7], np.float32))),
        Refusal.SUPPORT_TOO_SMALL,
    ),
    "more frames than all": (lambda f: f.send(made(BOXES[3], 3, n_frames=8)), Refusal.BAD_SUPPORT),
    "oversize": (lambda f: f.offer(BOXES[3], b"x", 3, size=SETTINGS.max_update_bytes + 1), Refusal.TOO_LARGE),
    "not a number": (lambda f: f.send_bytes(_with_nan(made(BOXES[3], 3)), by=BOXES[3], round_=3), Refusal.NOT_FINITE),
    "junk": (lambda f: f.send_bytes(b"junk" * 50, by=BOXES[3], round_=3), Refusal.MALFORMED),
    "later schema": (
        lambda f: f.send_bytes(b"LNWU\x02\x00" + bytes(50), by=BOXES[3], round_=3),
        Refusal.BAD_VERSION,
    ),
    "chunk without an offer": (
        lambda f: f.ask(BOXES[3], Chunk(id=1, sha256="12" * 32, offset=0), b"x"),
        Refusal.BAD_OFFSET,
    ),
    "part beyond the end": (
        lambda f: f.ask(BOXES[3], Fetch(id=1, embedding_id=EMBEDDING, product=PRODUCT, version=0, offset=2**40)),
        Refusal.BAD_OFFSET,
    ),
}


def _with_nan(sent: MemoryUpdate) -> bytes:
    payload = encode_update(sent)
    return payload.replace(sent.rows.astype("<f2").tobytes(), b"\x00\x7e" * sent.rows.size)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_is_refused_by_its_own_code_and_changes_no_bank(case: str, tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"embedding_ids": (EMBEDDING,), "products": (PRODUCT,)})
    fleet = Fleet(tmp_path / "rounds.db", settings=settings)
    close_one_round(fleet, 1)
    close_one_round(fleet, 2)
    before = [bank.sha256 for bank in fleet.store.banks(POOL)]
    uploads = fleet.store.uploads()
    work, code = REFUSED[case]
    assert refusal(lambda: work(fleet)) is code
    fleet.settle()
    assert [bank.sha256 for bank in fleet.store.banks(POOL)] == before
    assert len(before) == 2
    assert fleet.store.uploads() == uploads
    assert fleet.store.promised_bytes() == 0 or code is Refusal.BAD_OFFSET, "a refused update leaves nothing behind"
    event = fleet.store.events()[-1]
    assert event.code == code.value
    stolen = code in (Refusal.STOLEN_NAME, Refusal.REPLAYED_NONCE, Refusal.WRONG_FLEET)
    assert event.kind is (EventKind.SECURITY if stolen else EventKind.REFUSAL)
    close_one_round(fleet, 3)
    assert fleet.store.last_version(POOL) == 3, "the fleet goes on"


def test_refused_cases_cover_the_codes_that_an_update_can_meet() -> None:
    own = {Refusal.REVOKED, Refusal.UNKNOWN_BOX, Refusal.BUSY, Refusal.NO_SPACE, Refusal.OTHER}
    assert {code for _, code in REFUSED.values()} == set(Refusal) - own


def test_box_in_a_loop_does_not_fill_the_events(fleet: Fleet) -> None:
    welcome(fleet)
    for _ in range(50):
        refusal(lambda: fleet.hello(BOXES[0], box=BOXES[1]))
    assert len(fleet.store.events()) == 1
    fleet.clock.pass_s(11)
    refusal(lambda: fleet.hello(BOXES[0], box=BOXES[1]))
    assert len(fleet.store.events()) == 2


def test_order_and_repeats_of_updates_do_not_change_the_bank(tmp_path: Path) -> None:
    digests = set()
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        fleet = Fleet(tmp_path / f"{order}.db")
        for index in order:
            fleet.send(made(BOXES[index], rows=12))
            fleet.send(made(BOXES[index], rows=12))
        fleet.settle()
        digests.add(fleet.store.banks(POOL)[0].sha256)
    assert len(digests) == 1


def test_both_wire_formats_meet_in_one_bank(fleet: Fleet) -> None:
    for box, wire in zip(BOXES, (WireRows.FLOAT16, WireRows.UINT8, WireRows.FLOAT16), strict=False):
        fleet.send(made(box, wire=wire))
    fleet.settle()
    assert fleet.fetch() is not None


def test_restart_resumes_the_deadline_however_long_the_engine_was_away(fleet: Fleet) -> None:
    fleet.send(made(BOXES[0]))
    fleet.send(made(BOXES[1]))
    fleet.clock.pass_s(20)
    fleet.restart()
    assert welcome(fleet).closes_in_ms == 40_000
    fleet.clock.pass_s(30)
    fleet.restart()
    assert welcome(fleet).closes_in_ms == 10_000
    fleet.clock.pass_s(500)
    fleet.restart()
    fleet.settle()
    assert welcome(fleet).bank_version == 1


@pytest.mark.parametrize("jump", [timedelta(days=366), timedelta(days=-366), timedelta(days=-20_000)])
def test_clock_that_jumps_closes_nothing_early_and_nothing_never(fleet: Fleet, jump: timedelta) -> None:
    fleet.send(made(BOXES[0]))
    fleet.send(made(BOXES[1]))
    fleet.clock.wall += jump
    fleet.settle()
    assert welcome(fleet).closes_in_ms == 60_000
    fleet.restart()
    fleet.settle()
    assert welcome(fleet).closes_in_ms == 60_000
    fleet.clock.pass_s(61)
    fleet.settle()
    assert welcome(fleet).bank_version == 1


def test_reboot_leaves_what_was_left_when_last_noted(fleet: Fleet) -> None:
    fleet.send(made(BOXES[0]))
    fleet.send(made(BOXES[1]))
    fleet.clock.pass_s(31)
    fleet.rounds.tick()
    fleet.clock.pass_s(5)
    fleet.clock.boot_name, fleet.clock.ns = "boot-2", 10**9
    fleet.restart()
    assert welcome(fleet).closes_in_ms == 29_000
    fleet.clock.pass_s(29.1)
    fleet.settle()
    assert welcome(fleet).bank_version == 1


def test_shorter_period_takes_effect_at_the_next_start(fleet: Fleet) -> None:
    welcome(fleet)
    fleet.settings = SETTINGS.model_copy(update={"period_s": 5.0})
    fleet.restart()
    assert welcome(fleet).closes_in_ms == 5000


class Worker:
    """An executor whose work waits to be let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self._pool = ThreadPoolExecutor(1)

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        def wait_and_work() -> Any:
            assert self.go.wait(20)
            return work()

        return self._pool.submit(wait_and_work)


def test_boxes_are_answered_while_a_round_is_merged(tmp_path: Path) -> None:
    worker = Worker()
    fleet = Fleet(tmp_path / "rounds.db", submit=worker.submit)
    close_one_round(fleet)
    assert fleet.rounds.merging
    assert (welcome(fleet).round, welcome(fleet).bank_version) == (2, 0)
    assert fleet.send(made(BOXES[3], round_=2)).counted_in_round == 2
    assert fleet.send(made(BOXES[4], round_=1)).counted_in_round == 2, "what the round is made of is fixed"
    assert fleet.rounds.tick() <= 0.05
    _, future = fleet.rounds._job  # type: ignore[misc]
    worker.go.set()
    future.result(20)
    fleet.settle()
    bank = fleet.fetch()
    assert bank is not None
    assert bank.members == tuple(sorted(BOXES[:3]))


def test_engine_ended_while_merging_makes_the_same_bank_when_it_is_back(tmp_path: Path) -> None:
    undisturbed = Fleet(tmp_path / "undisturbed.db")
    close_one_round(undisturbed)
    lost = Fleet(tmp_path / "lost.db", submit=lambda _: Future())
    close_one_round(lost)
    assert lost.store.bank(POOL) is None
    assert lost.send(made(BOXES[3], round_=1)).counted_in_round == 2
    lost.submit = in_place
    lost.clock.pass_s(3)
    lost.restart()
    lost.settle()
    assert lost.store.banks(POOL)[0].sha256 == undisturbed.store.banks(POOL)[0].sha256


def test_quarantined_updates_do_not_count_and_the_operator_is_told(tmp_path: Path) -> None:
    def gate(update: MemoryUpdate, **_: Any) -> Examination:
        return Examination(update.box != BOXES[1], ("canaries: it blinds the fleet",))

    fleet = Fleet(tmp_path / "rounds.db", gate=gate)
    close_one_round(fleet)
    bank = fleet.fetch()
    assert bank is not None
    assert bank.members == (BOXES[0], BOXES[2])
    (held,) = fleet.store.uploads(state=UploadState.QUARANTINED)
    assert (held.box, held.reasons) == (BOXES[1], ("canaries: it blinds the fleet",))
    event = fleet.store.events()[-1]
    assert (event.kind, event.box) == (EventKind.QUARANTINE, BOXES[1])
    assert "canaries" in event.text


def test_released_update_counts_in_the_open_round_without_another_examination(tmp_path: Path) -> None:
    def gate(update: MemoryUpdate, **_: Any) -> Examination:
        return Examination(update.box != BOXES[1], ("no",))

    fleet = Fleet(tmp_path / "rounds.db", gate=gate)
    close_one_round(fleet)
    (held,) = fleet.store.uploads(state=UploadState.QUARANTINED)
    assert operators.release(fleet.store, held.id) == 2
    with pytest.raises(UsageError, match="not quarantined"):
        operators.release(fleet.store, held.id)
    for box in (BOXES[0], BOXES[2]):
        fleet.send(made(box, round_=2))
    fleet.settle()
    bank = fleet.fetch()
    assert bank is not None
    assert (bank.round, bank.members) == (2, (BOXES[0], BOXES[1], BOXES[2]))


def test_dismissed_update_never_counts(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "rounds.db", gate=lambda update, **_: Examination(update.box != BOXES[1], ("no",)))
    close_one_round(fleet)
    (held,) = fleet.store.uploads(state=UploadState.QUARANTINED)
    operators.dismiss(fleet.store, held.id)
    again = fleet.store.upload_by_id(held.id)
    assert again is not None
    assert again.state is UploadState.REFUSED
    assert again.reasons == ("no", "dismissed by an operator")
    with pytest.raises(UsageError, match="not quarantined"):
        operators.release(fleet.store, held.id)
    assert operators.status(fleet.store)[0].quarantined == ()


def test_round_whose_updates_fail_the_gates_makes_no_bank_and_the_good_ones_wait_on(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "rounds.db", gate=lambda update, **_: Examination(update.box == BOXES[0], ("no",)))
    close_one_round(fleet)
    assert (welcome(fleet).round, welcome(fleet).bank_version) == (2, 0)
    assert [r.round for r in fleet.store.rounds(state=RoundState.VOID)] == [1]
    (waiting,) = fleet.store.uploads(state=UploadState.WAITING)
    assert (waiting.box, waiting.round_counted) == (BOXES[0], 2)
    assert len(fleet.store.uploads(state=UploadState.QUARANTINED)) == 2


@pytest.mark.parametrize("trained", [True, False])
def test_gate_sees_the_trainer_s_reference_or_the_last_bank_and_the_others(tmp_path: Path, *, trained: bool) -> None:
    seen: list[tuple[MemoryBank | None, int]] = []

    def gate(update: MemoryUpdate, *, reference: MemoryBank | None, peers: Any) -> Examination:
        assert all(peer is not update for peer in peers)
        seen.append((reference, len(peers)))
        return Examination()

    rows = np.ones((2, 4), np.float32)
    trainer = MemoryBank(rows, np.ones(2, np.float32), np.ones(2, np.float32))
    fleet = Fleet(tmp_path / "rounds.db", gate=gate, references={EMBEDDING: trainer} if trained else {})
    if trained:
        assert refusal(lambda: fleet.send(made(BOXES[0], columns=5))) is Refusal.BAD_SHAPE, "the reference has 4"
    close_one_round(fleet)
    assert [(reference is not None, peers) for reference, peers in seen] == [(trained, 2)] * 3
    first = fleet.fetch()
    assert first is not None
    close_one_round(fleet, 2)
    reference = seen[-1][0]
    assert reference is not None
    # What came in a little at a time would hide behind itself in a bank, so the trainer's goes before it.
    assert (reference is trainer) is trained
    assert trained or reference.rows.tobytes() == first.rows.tobytes()


@pytest.mark.parametrize("carried", [0, 1, 2])
def test_update_of_an_absent_box_counts_on_for_some_rounds(tmp_path: Path, carried: int) -> None:
    settings = SETTINGS.model_copy(update={"close_at": 2, "min_boxes": 2, "carry_rounds": carried})
    fleet = Fleet(tmp_path / "rounds.db", settings=settings)
    members = []
    for number in (1, 2, 3, 4):
        for box in (BOXES[0], BOXES[1] if number > 1 else BOXES[2]):
            fleet.send(made(box, number))
        fleet.rounds.tick()
        fleet.rounds.tick()
        bank = fleet.fetch()
        assert bank is not None
        assert bank.round == number
        members.append(BOXES[2] in bank.members)
    assert members == [True, *(number - 1 <= carried for number in (2, 3, 4))]


def test_carried_update_is_examined_again_and_its_fate_stays(tmp_path: Path) -> None:
    revoked: set[str] = set()

    def gate(update: MemoryUpdate, **_: Any) -> Examination:
        return Examination(update.box not in revoked, ("its key was taken back",))

    settings = SETTINGS.model_copy(update={"close_at": 1, "min_boxes": 1})
    fleet = Fleet(tmp_path / "rounds.db", settings=settings, gate=gate)
    for number, box in ((1, BOXES[0]), (2, BOXES[1])):
        fleet.send(made(box, number))
        fleet.rounds.tick()
        fleet.rounds.tick()
        revoked.add(BOXES[0])
    bank = fleet.fetch()
    assert bank is not None
    assert bank.members == (BOXES[1],)
    assert {item.state for item in fleet.store.uploads()} == {UploadState.ACCEPTED}


class Together:
    """A gate that is asked once for a round."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[str], int]] = []

    def __call__(self, *_: Any, **__: Any) -> Examination:
        raise AssertionError("a round's updates are examined together")

    def examine_all(self, updates: Any, *, first: int, **_: Any) -> list[Examination]:
        self.asked.append(([item.box for item in updates], first))
        return [Examination(item.box != BOXES[1], ("no",)) for item in updates[:first]]


def test_gate_that_can_is_asked_once_for_a_round_and_released_updates_are_only_peers(tmp_path: Path) -> None:
    gate = Together()
    fleet = Fleet(tmp_path / "rounds.db", gate=gate)
    close_one_round(fleet)
    (held,) = fleet.store.uploads(state=UploadState.QUARANTINED)
    assert held.box == BOXES[1]
    operators.release(fleet.store, held.id)
    for box in (BOXES[0], BOXES[2]):
        fleet.send(made(box, round_=2))
    fleet.settle()
    assert gate.asked == [(list(BOXES[:3]), 3), ([BOXES[0], BOXES[2], BOXES[1]], 2)]
    bank = fleet.fetch()
    assert bank is not None
    assert bank.members == BOXES[:3]


def test_rows_of_another_width_are_held_back_where_no_bank_tells_it_yet(fleet: Fleet) -> None:
    fleet.send(made(BOXES[0], columns=9))
    fleet.send(made(BOXES[1]))
    fleet.send(made(BOXES[2]))
    fleet.settle()
    bank = fleet.fetch()
    assert bank is not None
    assert bank.members == (BOXES[1], BOXES[2])
    (held,) = fleet.store.uploads(state=UploadState.QUARANTINED)
    assert "columns" in held.reasons[0]


def test_merging_that_cannot_work_ends_the_round_and_keeps_its_updates_for_an_operator(tmp_path: Path) -> None:
    def broken(work: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(DataError("cannot be merged"))
        return future

    fleet = Fleet(tmp_path / "rounds.db", submit=broken)
    close_one_round(fleet)
    assert [r.round for r in fleet.store.rounds(state=RoundState.FAILED)] == [1]
    assert len(fleet.store.uploads(state=UploadState.QUARANTINED)) == 3
    fleet.submit = in_place
    fleet.restart()
    close_one_round(fleet, 2)
    assert welcome(fleet).bank_version == 1


def test_merging_that_breaks_is_tried_again(tmp_path: Path) -> None:
    tries: list[int] = []

    def sometimes(work: Any) -> Future[Any]:
        tries.append(1)
        if len(tries) > 2:
            return in_place(work)
        future: Future[Any] = Future()
        future.set_exception(MemoryError())
        return future

    fleet = Fleet(tmp_path / "rounds.db", submit=sometimes)
    close_one_round(fleet)
    for _ in range(5):
        fleet.settle()
        fleet.clock.pass_s(6)
    assert (len(tries), welcome(fleet).bank_version) == (3, 1)


def test_merging_that_kills_the_process_is_given_up_in_the_end(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "rounds.db", submit=lambda _: Future())
    close_one_round(fleet)
    for _ in range(12):
        fleet.restart()
        fleet.settle()
    assert [r.round for r in fleet.store.rounds(state=RoundState.FAILED)] == [1]


def test_rollback_is_a_new_version_with_the_old_rows(fleet: Fleet) -> None:
    for round_ in (1, 2):
        close_one_round(fleet, round_)
    first, second = fleet.fetch(1), fleet.fetch(2)
    assert operators.roll_back(fleet.store, POOL, 1, now=fleet.clock.wall) == 3
    assert welcome(fleet).bank_version == 3
    newest = fleet.fetch()
    assert newest is not None
    assert first is not None
    assert second is not None
    assert newest.rows.tobytes() == first.rows.tobytes() != second.rows.tobytes()
    assert (newest.version, newest.round) == (3, 1)
    with pytest.raises(UsageError, match="kept are: 3, 2, 1"):
        operators.roll_back(fleet.store, POOL, 9, now=fleet.clock.wall)
    with pytest.raises(UsageError, match="newest"):
        operators.roll_back(fleet.store, POOL, 3, now=fleet.clock.wall)
    close_one_round(fleet, 3)
    assert welcome(fleet).bank_version == 4


def test_old_banks_and_updates_are_forgotten_and_a_fetch_of_one_says_what_there_is(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"keep_banks": 2, "keep_rounds": 2})
    fleet = Fleet(tmp_path / "rounds.db", settings=settings)
    for round_ in range(1, 6):
        close_one_round(fleet, round_)
    assert [bank.version for bank in fleet.store.banks(POOL)] == [5, 4]
    assert {upload.round_counted for upload in fleet.store.uploads()} == {4, 5}
    request = Fetch(id=7, embedding_id=EMBEDDING, product=PRODUCT, version=1, offset=0)
    assert fleet.ask(BOXES[0], request) == Nothing(id=7, bank_version=5)


def test_scope_embedding_merges_all_products_of_an_embedding(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"scope": Scope.EMBEDDING})
    fleet = Fleet(tmp_path / "rounds.db", settings=settings)
    for box, product in zip(BOXES[:3], ("a", "b", "c"), strict=True):
        fleet.send(made(box, product=product), product=product)
    fleet.settle()
    assert fleet.store.pools() == [EMBEDDING]
    bank = fleet.fetch()
    assert bank is not None
    assert (bank.pool, len(bank.members)) == (EMBEDDING, 3)


def test_pools_and_what_is_on_its_way_are_bounded(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"max_pools": 2, "max_incoming_bytes": 3000})
    fleet = Fleet(tmp_path / "rounds.db", settings=settings)
    fleet.hello()
    fleet.hello(product="other")
    assert refusal(lambda: fleet.hello(product="third")) is Refusal.BUSY
    fleet.offer(BOXES[0], b"a", 1, size=2000)
    assert refusal(lambda: fleet.offer(BOXES[1], b"b", 1, size=2000)) is Refusal.BUSY
    fleet.offer(BOXES[0], b"c", 1, size=1000)
    assert isinstance(fleet.offer(BOXES[1], b"b", 1, size=2000), Resume), "a box's first offer is gone with its second"


def test_settings_that_could_never_close_are_refused() -> None:
    with pytest.raises(ValueError, match="min_boxes"):
        RoundSettings(fleet="plant", close_at=2, min_boxes=3)


def test_hand_clock_is_the_only_clock_of_a_deadline(tmp_path: Path) -> None:
    """The control of the clock tests: time that does pass closes the round."""
    clock = HandClock()
    fleet = Fleet(tmp_path / "rounds.db", clock=clock)
    fleet.send(replace(made(BOXES[0])))
    fleet.send(made(BOXES[1]))
    clock.ns += 61 * 10**9
    fleet.settle()
    assert welcome(fleet).bank_version == 1
