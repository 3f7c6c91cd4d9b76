"""What a broker refuses: tried again in peace, given up in the end, set aside, and brought back once it is taken."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from edge.alerts import refused as refused_module
from edge.alerts.commander import Commander
from edge.alerts.ledger import Ledger
from edge.alerts.message import Alert, Status, gap_maker
from edge.alerts.mqtt import Acked, Connected, Lost
from edge.alerts.outbox import Draft, Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.refused import Refused
from edge.alerts.retained import Retained
from edge.alerts.session import Session
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from tests.alert_values import IDENTITY, draft

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

FAST = {"backoff_min_s": 0.05, "backoff_max_s": 0.1}
# Of two cameras the broker takes one only.
ONE_CAMERA = "\n".join([
    "topic read #", *(f"topic write {IDENTITY.root}/{name}" for name in ("available", "status", "gap", "cam/#")),
    f"topic write {IDENTITY.root}/cmd/#",
])  # fmt: skip
ALL = "topic readwrite #\n"


@dataclass
class Patience:
    """A clock that is set, and what waits by it."""

    now: float = 100.0

    def refused(self) -> Refused:
        return Refused(retry_s=5, patience_s=30, rarely_s=600, clock=lambda: self.now)


def test_refusal_is_given_up_after_so_many_tries_over_so_long_a_time() -> None:
    patience = Patience()
    refused = patience.refused()
    found = []
    for _ in range(9):
        found.append(refused.note("a", "no"))
        refused.accept("other")
        patience.now += 5
    assert found == [False] * 6 + [True] * 3
    assert refused.given_up("a")


def test_quick_refusals_are_not_given_up() -> None:
    refused = Patience().refused()
    refused.note("a", "no")
    refused.accept("other")
    assert not any(refused.note("a", "no") for _ in range(100))


def test_refusal_of_everything_is_not_given_up() -> None:
    patience = Patience()
    refused = patience.refused()
    for _ in range(100):
        assert not refused.note("a", "no")
        patience.now += 60
    assert refused.wait_s("a") == 0


def test_next_try_is_soon_and_rare_once_given_up() -> None:
    patience = Patience()
    refused = patience.refused()
    refused.note("a", "no")
    assert refused.wait_s("a") == 5
    refused.accept("other")
    patience.now += 31
    refused.note("a", "no")
    refused.note("a", "no")
    assert refused.wait_s("a") == 600
    assert refused.accept("a")
    assert refused.wait_s("a") == 0
    assert "a" not in refused


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.db", make_gap=gap_maker(IDENTITY)) as box:
        yield box


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused_module, "RETRY_S", 0.05)
    monkeypatch.setattr(refused_module, "PATIENCE_S", 0.3)
    monkeypatch.setattr(refused_module, "RARELY_S", 1.0)


def publisher_for(broker: Mosquitto, outbox: Outbox) -> Publisher:
    settings = BrokerSettings(url=broker.url, replay_seconds=0, **FAST)  # type: ignore[arg-type]
    return Publisher(settings=settings, identity=IDENTITY, outbox=outbox)


def until(condition: Callable[[], Any], timeout: float = 20.0) -> None:
    """Wait for what another thread or process does on its own."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def live(outbox: Outbox, condition: Callable[[], Any]) -> None:
    """Alerts that the broker takes, until something holds: without them nothing would show that others pass."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, outbox.counters
        outbox.append_many([draft()])
        time.sleep(0.05)


@pytest.mark.broker
def test_forbidden_camera_is_set_aside_and_the_others_get_through(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox
) -> None:
    broker = make_mosquitto(acl=ONE_CAMERA)
    outbox.append_many([draft(camera="forbidden")] * 30 + [draft()] * 5)
    with (
        publisher_for(broker, outbox) as publisher,
        Subscriber(BrokerSettings(url=broker.url, **FAST), kinds=EVERYTHING) as subscriber,  # type: ignore[arg-type]
        Commander(BrokerSettings(url=broker.url), site="plant", box="box1") as commander,
    ):
        live(outbox, lambda: outbox.dead == 30 and outbox.depth == 0)
        reason = publisher.state.reason
        assert f"{IDENTITY.root}/forbidden/alert" in reason
        publisher.publish_status({})
        arrived, dead, warned = set(), 0, ""
        while not warned:
            received = subscriber.receive(10)
            assert received is not None
            if isinstance(received.message, Alert):
                arrived.add(received.message.seq)
                assert received.message.camera == "cam"
            elif isinstance(received.message, Status) and received.message.outbox and received.message.outbox.dead:
                dead, warned = received.message.outbox.dead, " ".join(received.message.warnings)
        assert set(range(31, 36)) <= arrived
        assert (dead, "dead letters" in warned) == (30, True)
        listed = commander.ask("dead_letters", {"limit": 3})
        assert (listed.ok, listed.count, len(listed.detail["letters"])) == (True, 30, 3)  # type: ignore[arg-type]
        assert listed.detail["letters"][0]["topic"].endswith("forbidden/alert")  # type: ignore[index,call-overload]

        (broker.folder / "acl").write_text(ALL)
        broker.reload()
        assert commander.ask("dead_letters", {"action": "requeue"}).count == 30
        wanted = set(range(1, 31))
        while wanted:
            received = subscriber.receive(10)
            assert received is not None, wanted
            wanted -= {getattr(received.message, "seq", 0)}
        until(lambda: outbox.dead == 0 and publisher.state.reason == "")


@pytest.mark.broker
def test_dead_letters_come_back_by_themselves_once_the_topic_is_taken(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox
) -> None:
    broker = make_mosquitto(acl=ONE_CAMERA)
    outbox.append_many([draft(camera="forbidden")] * 3)
    with publisher_for(broker, outbox) as publisher:
        live(outbox, lambda: outbox.dead == 3)
        (broker.folder / "acl").write_text(ALL)
        broker.reload()

        def taken() -> bool:
            outbox.append_many([draft(camera="forbidden")])
            time.sleep(0.1)
            return outbox.dead == 0 and not publisher.state.reason

        until(taken)
        assert publisher.wait_until_drained(10)


@pytest.mark.broker
def test_few_refusals_are_provoked(make_mosquitto: Callable[..., Mosquitto], outbox: Outbox) -> None:
    """mosquitto 2.0 ends the connection after each refusal: a row each would keep the box away for hours."""
    broker = make_mosquitto(acl=ONE_CAMERA)
    outbox.append_many([draft(camera="forbidden")] * 3000)
    with publisher_for(broker, outbox) as publisher:
        live(outbox, lambda: outbox.dead == 3000)
        assert publisher.counters["refused"] < 40


@pytest.mark.broker
@pytest.mark.parametrize("limit", ["max_packet_size 4000", "message_size_limit 4000"])
def test_message_that_is_too_large_is_set_aside_and_those_behind_it_get_through(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox, limit: str
) -> None:
    broker = make_mosquitto(extra=limit)
    large = Draft(IDENTITY.alert("cam"), lambda epoch, seq: draft().make(epoch, seq) + b" " * 5000)
    outbox.append_many([draft(), large, draft(), draft()])
    with publisher_for(broker, outbox) as publisher:
        live(outbox, lambda: outbox.dead == 1)
        assert [letter.seq for letter in outbox.dead_letters(10)] == [2]
        assert publisher.wait_until_drained(10)
        assert outbox.dead_letters(10)[0].reason


@pytest.mark.broker
def test_box_that_may_publish_nothing_sets_nothing_aside(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox
) -> None:
    broker = make_mosquitto(acl=f"topic read #\ntopic write {IDENTITY.available}\n")
    outbox.append_many([draft()] * 20)
    with publisher_for(broker, outbox) as publisher:
        until(lambda: publisher.counters["refused"] >= 6)
        assert outbox.dead == 0
        (broker.folder / "acl").write_text(ALL)
        broker.reload()
        assert publisher.wait_until_drained(10)


@pytest.mark.broker
def test_retained_topic_that_is_refused_holds_up_nothing(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox
) -> None:
    broker = make_mosquitto(acl=ONE_CAMERA)
    with publisher_for(broker, outbox) as publisher:
        publisher.publish_state("forbidden", {"state": "ok"})
        publisher.publish_state("cam", {"state": "ok"})
        until(lambda: "forbidden/state" in publisher.state.reason)
        outbox.append_many([draft()] * 50)
        until(lambda: outbox.depth == 0)
        (broker.folder / "acl").write_text(ALL)
        broker.reload()
        until(lambda: publisher.state.reason == "")


class Wire:
    """A link that notes what is published; a broker of a test's own answers."""

    def __init__(self) -> None:
        self.published: list[bytes] = []

    def publish(self, _topic: str, payload: bytes, *, retain: bool = False) -> int:  # noqa: ARG002 (as a link has it)
        self.published.append(payload)
        return len(self.published)


def session_for(wire: Wire, outbox: Outbox, refused: Refused, **values: Any) -> Session:
    values = {"careful": 0, "counters": dict.fromkeys(("published", "acknowledged", "refused"), 0)} | values
    retained = Retained(Ledger(outbox.path.with_name("ledger.db")))
    return Session(
        wire, Connected(20), outbox=outbox, retained=retained, refused=refused, window=20, unproving="", **values  # type: ignore[arg-type]
    )  # fmt: skip


def test_window_holds_where_a_refused_backlog_is_read_past(outbox: Outbox) -> None:
    refused, wire = Patience().refused(), Wire()
    refused.note(IDENTITY.alert("forbidden"), "no")
    outbox.append_many(([draft(camera="forbidden")] * 5 + [draft()]) * 50)
    session = session_for(wire, outbox, refused)
    session.send_rows()
    assert (len(wire.published), session.unsent) == (20, 20)
    for mid in range(1, 11):
        session.on_acked(Acked(mid))
    session.send_rows()
    assert (len(wire.published), session.unsent) == (30, 20)
    assert not any(b'"camera":"forbidden"' in payload for payload in wire.published)


def test_message_that_a_broker_hangs_up_about_unnamed_is_found_by_going_one_by_one(outbox: Outbox) -> None:
    outbox.append_many([draft()] * 8)
    patience, careful, delivered = Patience(), 0, 0
    refused, counters = patience.refused(), dict.fromkeys(("published", "acknowledged", "refused"), 0)
    for _ in range(30):
        wire = Wire()
        outbox.release_sent()
        session = session_for(wire, outbox, refused, careful=careful, counters=counters)
        refused.accept("other")
        lost = None
        while lost is None and outbox.depth:
            before = len(wire.published)
            session.send_rows()
            if len(wire.published) == before:
                break
            for mid, payload in enumerate(wire.published[before:], start=before + 1):
                if b'"seq":4,' in payload:
                    assert careful == 0 or len(wire.published) - before == 1, "alone"
                    lost = Lost("Payload format invalid", refused=True, disliked=True)
                    break
                session.on_acked(Acked(mid))
                delivered += 1
        session.settle()
        if lost is None:
            break
        careful = session.blame(lost)
        patience.now += 6
    assert ([letter.seq for letter in outbox.dead_letters(9)], delivered, outbox.depth) == ([4], 7, 0)
