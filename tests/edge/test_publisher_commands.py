"""Commands through a publisher: acknowledged once handled, done once, answered whatever they hold."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge.alerts.command_messages import COMMANDS, CommandResult, ShipCommand
from edge.alerts.commander import Commander
from edge.alerts.commands import Clock
from edge.alerts.message import gap_maker, parse
from edge.alerts.mqtt import LinkKind
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings, Protocol
from edge.alerts.subscriber import Subscriber
from edge.alerts.topics import Identity, Kind
from edge.errors import CommandError
from tests.alert_values import IDENTITY
from tests.raw_broker import PUBACK, PUBLISH, RawBroker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.mosquitto_process import Mosquitto

FAST = {"backoff_min_s": 0.05, "backoff_max_s": 0.2}
SURE = Clock(synchronised=lambda: True)


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.db", make_gap=gap_maker(IDENTITY)) as box:
        yield box


def raw_publisher(broker: RawBroker, outbox: Outbox) -> Publisher:
    url = BrokerSettings(url=broker.url, protocol=Protocol.V311, **FAST)  # type: ignore[arg-type]
    return Publisher(settings=url, identity=IDENTITY, outbox=outbox, clock=SURE)


def test_command_is_acknowledged_only_once_it_was_handled(outbox: Outbox) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def ship(_: object) -> dict[str, Any]:
        begun.set()
        assert may_end.wait(10)
        return {"ok": True}

    with RawBroker() as broker, raw_publisher(broker, outbox) as publisher:
        publisher.on_command("ship", ship)
        assert broker.subscribed.wait(10)
        broker.publish(IDENTITY.command("ship"), b"{}", mid=7)
        assert begun.wait(10)
        while not broker.packets.empty():
            assert broker.packets.get()[0] != PUBACK, "before it was handled"
        may_end.set()
        assert broker.wait_for(PUBACK) == b"\0\7"


def test_command_that_the_broker_repeats_is_done_once_and_acknowledged_twice(outbox: Outbox) -> None:
    done: SimpleQueue[object] = SimpleQueue()
    with RawBroker() as broker, raw_publisher(broker, outbox) as publisher:
        publisher.on_command("ship", lambda command: done.put(command) or {"ok": True})
        assert broker.subscribed.wait(10)
        topic = IDENTITY.command("ship")
        broker.publish(topic, b'{"id": "a"}', mid=7)
        broker.publish(topic, b'{"id": "a"}', mid=7, repeated=True)
        assert [broker.wait_for(PUBACK), broker.wait_for(PUBACK)] == [b"\0\7", b"\0\7"]
        assert done.qsize() == 1
        broker.publish(topic, b'{"id": "a"}', mid=7)
        assert broker.wait_for(PUBACK) == b"\0\7"
        assert done.qsize() == 2, "a number is used again for another message, which has no DUP"


def test_command_whose_handler_fails_is_answered_and_acknowledged(
    outbox: Outbox, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[object] = []

    def ship(command: object) -> dict[str, Any]:
        seen.append(command)
        if len(seen) == 1:
            raise ZeroDivisionError
        if len(seen) == 2:
            return {"ok": True, "colour": "red"}
        raise CommandError("not today")

    with RawBroker() as broker, raw_publisher(broker, outbox) as publisher:
        publisher.on_command("ship", ship)
        assert broker.subscribed.wait(10)
        for mid, name in enumerate(("defect", "wrong answer", "refused"), start=1):
            broker.publish(IDENTITY.command("ship"), json.dumps({"id": name, "key": name}).encode(), mid=mid)
            answer = json.loads(answer_of(broker))
            assert (answer["ok"], answer["id"]) == (False, name)
        assert "not today" in answer["reason"]
        assert publisher.counters["commands_failed"] == 1
        assert publisher.state.kind is LinkKind.CONNECTED
    assert "ZeroDivisionError" in caplog.text


def answer_of(broker: RawBroker) -> bytes:
    topic = IDENTITY.result("ship").encode()
    while True:
        body = broker.wait_for(PUBLISH)
        size = int.from_bytes(body[:2], "big")
        if body[2 : 2 + size] == topic:
            return body[4 + size :]


@pytest.mark.parametrize("topic", [b"cmd/\xff\xfe", b"cmd/", b"cmd//", b"cmd/\0", b"cmd/a\n", b"cmd/+", b"cmd/$x"])
def test_topic_that_is_no_command_is_acknowledged_and_forgotten(outbox: Outbox, topic: bytes) -> None:
    with RawBroker() as broker, raw_publisher(broker, outbox) as publisher:
        assert broker.subscribed.wait(10)
        broker.publish(f"{IDENTITY.root}/".encode() + topic, b"{}", mid=9)
        assert broker.wait_for(PUBACK) == b"\0\t"
        publisher.on_command("ship", lambda _: {"ok": True})
        broker.publish(IDENTITY.command("ship"), b"{}", mid=10)
        assert json.loads(answer_of(broker))["ok"]
        assert publisher.counters["connections"] == 1
        assert publisher.counters["connection_defects"] == 0


def test_defect_is_counted_and_the_next_connection_begins_anew(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, failed = outbox.requeue_acknowledged, threading.Event()

    def requeue() -> int:
        if not failed.is_set():
            failed.set()
            raise ZeroDivisionError
        return real()

    monkeypatch.setattr(outbox, "requeue_acknowledged", requeue)
    with RawBroker() as broker, raw_publisher(broker, outbox) as publisher:
        assert publisher.wait_until_drained(10)
        assert (publisher.counters["connections"], publisher.counters["connection_defects"]) == (2, 1)
    assert "ZeroDivisionError" in caplog.text


def test_refused_subscription_is_a_warning(outbox: Outbox) -> None:
    with RawBroker(grants=False) as broker, raw_publisher(broker, outbox) as publisher:
        assert publisher.wait_until_drained(10)
        assert publisher._reconnector.wait_for(lambda: any("cmd/+" in text for text in publisher.warnings()), 10)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["id", "key", "expires_at", "epoch", "from", "to", "camera", "part_id", "action", "limit"])
        | st.text(max_size=5), inner, max_size=6),
    max_leaves=10,
).map(lambda value: json.dumps(value).encode())  # fmt: skip
VERBS = st.sampled_from(sorted(COMMANDS)) | st.text(
    st.characters(exclude_characters="+#/$\0", exclude_categories=["C", "Z"]), min_size=1, max_size=12
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(VERBS, st.binary(max_size=300) | JSON), min_size=1, max_size=5))
@pytest.mark.broker
def test_publisher_survives_any_command(
    fuzzed: tuple[Publisher, Commander, str], some: list[tuple[str, bytes]]
) -> None:
    publisher, commander, box = fuzzed
    for verb, payload in some:
        commander._subscriber.send(Identity("plant", box).command(verb), payload)
    # An answer to a command behind them proves that all of them were taken, and that the thread lives.
    result = commander.ask("replay", {"epoch": "0" * 16, "from": 1, "to": 1})
    assert (result.ok, result.count) == (True, 0)
    assert publisher.counters["commands_failed"] == 0
    assert commander._subscriber.counters["junk"] == 0, "every answer is well-formed"


@pytest.fixture
def fuzzed(mosquitto: Mosquitto, tmp_path: Path) -> Iterator[tuple[Publisher, Commander, str]]:
    name = uuid.uuid4().hex
    identity = Identity("plant", name)
    url = BrokerSettings(url=mosquitto.url)
    with (
        Outbox(tmp_path / "fuzzed.db", make_gap=gap_maker(identity)) as outbox,
        Publisher(settings=url, identity=identity, outbox=outbox) as publisher,
        Commander(url, site="plant", box=name) as commander,
    ):
        assert publisher.wait_until_drained(10)
        yield publisher, commander, name


@pytest.mark.broker
def test_commander_repeats_a_key_and_reads_the_first_answer(mosquitto: Mosquitto, outbox: Outbox) -> None:
    done: list[object] = []
    url = BrokerSettings(url=mosquitto.url, **FAST)  # type: ignore[arg-type]

    def ship(command: object) -> dict[str, Any]:
        done.append(command)
        return {"ok": True, "count": len(done)}

    def ask(**options: Any) -> CommandResult:
        with Publisher(settings=url, identity=IDENTITY, outbox=outbox, clock=SURE) as publisher:
            publisher.on_command("ship", ship)
            assert publisher.wait_until_drained(10)
            return commander.ask("ship", {}, **options)

    with Commander(url, site="plant", box="box1") as commander:
        first, second = ask(key="k", expires_s=60), ask(key="k", expires_s=60)
        assert (first.count, second.count, len(done)) == (1, 1, 1), "also by another process of the box"
        assert not ask(expires_s=-1).ok
        assert len(done) == 1


@pytest.mark.broker
def test_commander_asks_without_expiry_where_the_box_has_no_time(mosquitto: Mosquitto, outbox: Outbox) -> None:
    url = BrokerSettings(url=mosquitto.url, **FAST)  # type: ignore[arg-type]
    unsure = Clock(synchronised=lambda: False)
    with (
        Publisher(settings=url, identity=IDENTITY, outbox=outbox, clock=unsure) as publisher,
        Commander(url, site="plant", box="box1") as commander,
    ):
        publisher.on_command("ship", lambda _: {"ok": True})
        assert publisher.wait_until_drained(10)
        result = commander.ask("ship", {}, expires_s=60)
        assert (result.ok, "time server" in result.reason) == (False, True)
        result, judged = commander.ask_fresh("ship", {})
        assert (result.ok, judged) == (True, False)


@pytest.mark.broker
def test_retained_command_is_not_done(mosquitto: Mosquitto, outbox: Outbox) -> None:
    from paho.mqtt import publish

    done: list[object] = []
    topic, late = IDENTITY.command("ship"), datetime.now(timezone.utc) + timedelta(hours=1)
    publish.single(topic, json.dumps({"expires_at": late.isoformat()}), qos=1, retain=True, port=mosquitto.port)
    url = BrokerSettings(url=mosquitto.url, **FAST)  # type: ignore[arg-type]
    publisher = Publisher(settings=url, identity=IDENTITY, outbox=outbox, clock=SURE)
    publisher.on_command("ship", lambda command: done.append(command) or {"ok": True})
    with publisher, Commander(url, site="plant", box="box1") as commander:
        assert publisher.wait_until_drained(10)
        assert commander.ask("ship", {}).ok
    assert len(done) == 1


@pytest.mark.broker
def test_answers_of_other_threads_find_their_askers(mosquitto: Mosquitto, outbox: Outbox) -> None:
    url = BrokerSettings(url=mosquitto.url, **FAST)  # type: ignore[arg-type]
    with (
        Publisher(settings=url, identity=IDENTITY, outbox=outbox, clock=SURE) as publisher,
        Subscriber(url, site="plant", box="box1", kinds=frozenset({Kind.RESULT})) as subscriber,
    ):

        def later(command: object) -> None:
            assert isinstance(command, ShipCommand)
            threading.Thread(target=publisher.answer, args=("ship",), kwargs={"id": command.id, "ok": True}).start()

        publisher.on_command("ship", later)
        subscriber.wait_until_ready(10)
        assert publisher.wait_until_drained(10)
        for name in ("a", "b"):
            subscriber.send(IDENTITY.command("ship"), json.dumps({"id": name, "key": "k"}).encode())
            received = subscriber.receive(10)
            assert received is not None
            answer = parse(received.topic, received.payload)
            assert isinstance(answer, CommandResult)
            assert (answer.id, answer.ok) == (name, True)


@pytest.mark.broker
def test_command_line_sends_a_key_and_an_expiry(mosquitto: Mosquitto, outbox: Outbox) -> None:
    seen: list[object] = []
    url = BrokerSettings(url=mosquitto.url, **FAST)  # type: ignore[arg-type]
    command = [str(Path(sys.executable).parent / "lineward"), "command", "ship", "--broker", mosquitto.url]
    command += ["--site", "plant", "--box", "box1"]
    with Publisher(settings=url, identity=IDENTITY, outbox=outbox, clock=SURE) as publisher:
        publisher.on_command("ship", lambda one: seen.append(one) or {"ok": True, "count": len(seen)})
        assert publisher.wait_until_drained(10)
        repeated = ["--key", "k", "--expires", "60"]
        for options, said in (([], "count 1"), (["--key", "k"], "count 2"), (repeated, "count 2")):
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
            assert (done.returncode, said in done.stdout) == (0, True), done.stderr
    assert all(isinstance(one, ShipCommand) and one.key and one.expires_at for one in seen)
    assert len({one.key for one in seen if isinstance(one, ShipCommand)}) == 2
