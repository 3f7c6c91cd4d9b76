"""The publisher against a real broker: births, wills, replay, refusals, and nothing lost or doubled without a mark."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import pytest

from edge.alerts import refused as refused_module
from edge.alerts import session as session_module
from edge.alerts.command_messages import CommandResult
from edge.alerts.message import Alert, Availability, CameraState, Status, gap_maker
from edge.alerts.mqtt import LinkKind
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings, Protocol
from edge.alerts.subscriber import EVERYTHING, Received, Subscriber
from edge.alerts.topics import Identity
from edge.errors import BrokerError, MessageError, OutboxError
from tests.alert_values import IDENTITY, draft
from tests.mosquitto_process import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
FAST = {"backoff_min_s": 0.05, "backoff_max_s": 0.2}


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.db", make_gap=gap_maker(IDENTITY)) as box:
        yield box


def settings_for(broker: Mosquitto, **values: object) -> BrokerSettings:
    return BrokerSettings(url=broker.url, **(FAST | values))  # type: ignore[arg-type]


def publisher_for(broker: Mosquitto, outbox: Outbox, **values: object) -> Publisher:
    return Publisher(settings=settings_for(broker, **values), identity=IDENTITY, outbox=outbox)


def listen(broker: Mosquitto, **values: object) -> Subscriber:
    subscriber = Subscriber(settings_for(broker, **values), kinds=EVERYTHING)
    subscriber.start()
    subscriber.wait_until_ready(10)
    return subscriber


def until(subscriber: Subscriber, wanted: Callable[[Received], bool], timeout: float = 10.0) -> list[Received]:
    """Everything received up to the first message that is wanted."""
    found: list[Received] = []
    deadline = time.monotonic() + timeout
    while not (found and wanted(found[-1])):
        received = subscriber.receive(deadline - time.monotonic())
        assert received is not None, f"it never came; there were {[r.topic for r in found]}"
        found.append(received)
    return found


def is_available(value: str) -> Callable[[Received], bool]:
    return lambda r: isinstance(r.message, Availability) and r.message.value == value


def numbers(found: list[Received], *, late: bool | None = None) -> list[int]:
    alerts = [r.message for r in found if isinstance(r.message, Alert)]
    return [alert.seq for alert in alerts if late is None or alert.late is late]


@pytest.mark.parametrize("protocol", [Protocol.V5, Protocol.V311, Protocol.AUTO])
def test_publisher_says_online_sends_rows_and_says_stopped(
    mosquitto: Mosquitto, outbox: Outbox, protocol: Protocol
) -> None:
    subscriber = listen(mosquitto)
    with publisher_for(mosquitto, outbox, protocol=protocol) as publisher:
        publisher.publish_state("cam", {"state": "nok", "event_id": "e"})
        publisher.publish_status({"versions": {"lineward": "1"}, "clock_synced": True})
        assert publisher.wait_until_connected(10)
        outbox.append_many([draft()] * 100)
        assert publisher.wait_until_drained(10)
    found = until(subscriber, is_available("stopped"))
    subscriber.stop()
    assert numbers(found, late=False) == list(range(1, 101))
    assert any(is_available("online")(r) for r in found)
    states = [r.message for r in found if isinstance(r.message, CameraState)]
    assert [state.state for state in states] == ["nok"]
    statuses = [r.message for r in found if isinstance(r.message, Status)]
    assert statuses[0].outbox is not None
    assert statuses[0].outbox.epoch == outbox.epoch
    assert publisher.state.kind is LinkKind.STOPPED
    assert outbox.counters["acknowledged"] == 100


def test_publisher_refuses_unknown_status_fields(mosquitto: Mosquitto, outbox: Outbox) -> None:
    publisher = publisher_for(mosquitto, outbox)
    with pytest.raises(MessageError, match="colour"):
        publisher.publish_status({"colour": "red"})
    with pytest.raises(MessageError, match="state"):
        publisher.publish_state("cam", {"state": "perhaps"})
    with pytest.raises(MessageError, match="prefix"):
        Publisher(settings=settings_for(mosquitto), identity=Identity("s", "b", prefix="other"), outbox=outbox)


def test_broker_says_offline_when_the_box_dies(mosquitto: Mosquitto, tmp_path: Path) -> None:
    subscriber = listen(mosquitto)
    script = (
        "import sys, time; from pathlib import Path\n"
        "from edge.alerts.message import gap_maker; from edge.alerts.outbox import Outbox\n"
        "from edge.alerts.publisher import Publisher; from edge.alerts.settings import BrokerSettings\n"
        "from tests.alert_values import IDENTITY\n"
        "box = Outbox(Path(sys.argv[1]), make_gap=gap_maker(IDENTITY))\n"
        "Publisher(settings=BrokerSettings(url=sys.argv[2]), identity=IDENTITY, outbox=box).start()\n"
        "time.sleep(60)\n"
    )
    box = subprocess.Popen([os.sys.executable, "-c", script, str(tmp_path / "o.db"), mosquitto.url])  # type: ignore[attr-defined]
    until(subscriber, is_available("online"), timeout=30)
    box.kill()
    box.wait()
    until(subscriber, is_available("offline"))
    subscriber.stop()


def test_rows_made_while_the_broker_is_down_arrive_late_when_it_starts(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox
) -> None:
    broker = make_mosquitto()
    broker.kill()
    with publisher_for(broker, outbox) as publisher:
        outbox.append_many([draft()] * 30)
        assert not publisher.wait_until_connected(0.3)
        assert publisher.state.kind is LinkKind.CONNECTING
        assert "running" in publisher.state.reason
        with Subscriber(settings_for(broker)) as subscriber:
            broker.start()
            assert publisher.wait_until_drained(10)
            subscriber.wait_until_ready(10)
            outbox.append_many([draft()])
            found = until(subscriber, lambda r: isinstance(r.message, Alert) and r.message.seq == 31)
            assert numbers(found, late=False) == [31]
    assert outbox.counters["acknowledged"] >= 31


def test_reconnect_says_everything_again_and_replays_behind_live_rows(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox
) -> None:
    broker = make_mosquitto()
    with publisher_for(broker, outbox) as publisher:
        publisher.publish_state("cam", {"state": "ok"})
        publisher.publish_status({})
        outbox.append_many([draft()] * 20)
        assert publisher.wait_until_drained(10)
        broker.kill()
        assert publisher._reconnector.wait_for(lambda: publisher.state.kind is LinkKind.CONNECTING, 10)
        broker.start()
        subscriber = listen(broker)
        assert publisher._reconnector.wait_for(lambda: publisher._reconnector.connections == 2, 10)
        assert publisher.wait_until_drained(10)
        broker.kill()
        broker.start()
        found = until(subscriber, lambda r: numbers([r]) == [20], timeout=15)
        subscriber.stop()
    assert numbers(found, late=True) == list(range(1, 21))
    kinds = {type(r.message) for r in found}
    assert {Availability, Status, CameraState} <= kinds, "retained topics are said again to a broker that forgot them"


def test_replay_window_of_zero_repeats_nothing(make_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    broker = make_mosquitto()
    with (
        Outbox(tmp_path / "o.db", make_gap=gap_maker(IDENTITY), replay_rows=0) as outbox,
        publisher_for(broker, outbox) as publisher,
    ):
        outbox.append_many([draft()] * 5)
        assert publisher.wait_until_drained(10)
        broker.restart()
        assert publisher._reconnector.wait_for(lambda: publisher._reconnector.connections == 2, 10)
        assert publisher.wait_until_drained(10)
        assert outbox.counters["requeued"] == 0


def test_live_rows_overtake_a_long_backlog(mosquitto: Mosquitto, outbox: Outbox) -> None:
    outbox.append_many([draft()] * 3000)
    subscriber = listen(mosquitto)
    with publisher_for(mosquitto, outbox) as publisher:
        assert publisher.wait_until_connected(10)
        live = outbox.append("lineward/plant/box1/cam/alert", draft().make)
        found = until(subscriber, lambda r: numbers([r]) == [live])
        assert len(numbers(found)) < 2500
        assert publisher.wait_until_drained(30)
    subscriber.stop()


def test_command_replays_a_range_and_answers(mosquitto: Mosquitto, outbox: Outbox) -> None:
    with publisher_for(mosquitto, outbox) as publisher:
        outbox.append_many([draft()] * 10)
        assert publisher.wait_until_drained(10)
        subscriber = listen(mosquitto)
        asked = {"epoch": outbox.epoch, "from": 3, "to": 5, "id": "q1"}
        send(mosquitto, IDENTITY.command("replay"), json.dumps(asked))
        found = until(subscriber, lambda r: numbers([r]) == [5])
        result = next(r.message for r in found if isinstance(r.message, CommandResult))
        assert (result.ok, result.id, result.count) == (True, "q1", 3)
        assert numbers(found, late=True) == [3, 4, 5]
        for topic, payload, word in [
            (IDENTITY.command("replay"), "junk", "JSON"),
            (IDENTITY.command("dance"), "{}", "unknown command"),
        ]:
            send(mosquitto, topic, payload)
            found = until(subscriber, lambda r: isinstance(r.message, CommandResult))
            answer = found[-1].message
            assert isinstance(answer, CommandResult)
            assert not answer.ok
            assert word in answer.reason
        subscriber.stop()


def send(broker: Mosquitto, topic: str, payload: str) -> None:
    from paho.mqtt import publish

    publish.single(topic, payload, qos=1, hostname="127.0.0.1", port=broker.port)


def test_wrong_password_is_a_named_state_and_heals_when_the_file_is_right(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broker = make_mosquitto(users={"anna": "right-password"})
    secret = tmp_path / "password"
    secret.touch(mode=0o600)
    secret.write_text("wrong-password")
    outbox.append_many([draft()])
    with (
        caplog.at_level(logging.INFO),
        publisher_for(broker, outbox, username="anna", password_file=secret) as publisher,
    ):
        assert publisher._reconnector.wait_for(lambda: publisher.state.kind is LinkKind.REFUSED, 10)
        assert "password_file" in publisher.state.reason
        secret.write_text("right-password")
        assert publisher.wait_until_drained(10)
    lines = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(lines) == 1, "one line per change of state"
    assert "-password" not in caplog.text.replace("password_file", "")


def test_missing_login_is_refused(make_mosquitto: Callable[..., Mosquitto]) -> None:
    broker = make_mosquitto(users={"anna": "right-password"})
    for protocol in (Protocol.V5, Protocol.V311):
        with Subscriber(settings_for(broker, protocol=protocol)) as subscriber:
            with pytest.raises(BrokerError, match="username"):
                subscriber.wait_until_ready(10)
            with pytest.raises(BrokerError, match=r"refused|uthori"):
                subscriber.receive(5)


def test_forbidden_topic_keeps_the_row_and_says_what_to_allow(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refused_module, "RETRY_S", 0.5)
    broker = make_mosquitto(acl="topic read #\ntopic write lineward/plant/box1/available\n")
    with publisher_for(broker, outbox) as publisher:
        outbox.append_many([draft()])
        assert publisher._reconnector.wait_for(lambda: "refuses" in publisher.state.reason, 10)
        assert "lineward/plant/box1/" in publisher.state.reason
        assert outbox.depth == 1
        assert publisher.counters["published"] < 10, "not a hot loop"
        (broker.folder / "acl").write_text("topic readwrite #\n")
        broker.reload()
        assert publisher.wait_until_drained(10)
        assert publisher._reconnector.wait_for(lambda: not publisher.state.reason, 10), "the trouble is over"


def test_acknowledgements_wait_for_a_full_disk(
    mosquitto: Mosquitto, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PAUSE_S", 0.2)
    real, full = outbox.acknowledge, threading.Event()

    def acknowledge(seqs: Iterable[int]) -> int:
        if not full.is_set():
            raise OutboxError("the disk is full")
        return real(seqs)

    monkeypatch.setattr(outbox, "acknowledge", acknowledge)
    with publisher_for(mosquitto, outbox) as publisher:
        assert publisher.wait_until_connected(10)
        outbox.append_many([draft()] * 5)
        assert publisher._reconnector.wait_for(lambda: "full" in publisher.state.reason, 10)
        full.set()
        assert publisher.wait_until_drained(10)
        assert publisher._reconnector.wait_for(lambda: not publisher.state.reason, 10)
        assert publisher._reconnector.connections == 1
        assert publisher.counters["published"] == 6, "online and five rows, none twice"


def test_two_boxes_of_one_name_do_not_fight_in_a_hot_loop(mosquitto: Mosquitto, outbox: Outbox, tmp_path: Path) -> None:
    with (
        Outbox(tmp_path / "second.db", make_gap=gap_maker(IDENTITY)) as other,
        publisher_for(mosquitto, outbox, protocol=Protocol.V5) as first,
    ):
        assert first.wait_until_connected(10)
        with publisher_for(mosquitto, other, protocol=Protocol.V5):
            assert first._reconnector.wait_for(lambda: "own name" in first.state.reason, 20)


def test_port_that_is_no_broker_is_not_a_hang(outbox: Outbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = BrokerSettings(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}", connect_timeout_s=0.2, **FAST)
        with Publisher(settings=settings, identity=IDENTITY, outbox=outbox) as publisher:
            assert publisher._reconnector.wait_for(lambda: "MQTT broker?" in publisher.state.reason, 10)


def test_broker_that_hung_up_while_it_started_is_spoken_to_in_version_5(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox
) -> None:
    broker = make_mosquitto()
    broker.kill()
    with publisher_for(broker, outbox) as publisher:
        with socket.create_server(("127.0.0.1", broker.port)) as server:
            for _ in range(3):
                server.accept()[0].close()
        broker.start()
        assert publisher.wait_until_connected(10)
        broker.restart()
        assert publisher._reconnector.wait_for(lambda: publisher._reconnector.connections >= 2, 10)
        assert publisher.wait_until_drained(10)
        assert publisher._reconnector._protocol is Protocol.V5


def test_tls_to_a_plain_port_is_refused_with_a_cure(mosquitto: Mosquitto, outbox: Outbox) -> None:
    settings = BrokerSettings(url=mosquitto.url.replace("mqtt:", "mqtts:"), connect_timeout_s=1, **FAST)
    with Publisher(settings=settings, identity=IDENTITY, outbox=outbox) as publisher:
        assert publisher._reconnector.wait_for(lambda: "TLS" in publisher.state.reason, 10)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate of localhost, signed by itself, in cert.pem beside key.pem."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl on the path to make a certificate with")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    key = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run([program, "req", *key, *subject, *files], check=True, capture_output=True)
    return tmp_path / "cert.pem"


def test_tls_works_with_the_right_authority_and_is_refused_without(
    make_mosquitto: Callable[..., Mosquitto], outbox: Outbox, certificate: Path
) -> None:
    port = free_port()
    key = certificate.with_name("key.pem")
    make_mosquitto(extra=f"listener {port} 127.0.0.1\ncertfile {certificate}\nkeyfile {key}")
    url = f"mqtts://localhost:{port}"
    outbox.append_many([draft()])
    with Publisher(settings=BrokerSettings(url=url, **FAST), identity=IDENTITY, outbox=outbox) as publisher:
        assert publisher._reconnector.wait_for(lambda: publisher.state.kind is LinkKind.REFUSED, 10)
        assert "ca_file" in publisher.state.reason
    right = BrokerSettings(url=url, ca_file=certificate, **FAST)
    with Publisher(settings=right, identity=IDENTITY, outbox=outbox) as publisher:
        assert publisher.wait_until_drained(10)
    missing = BrokerSettings(url=url, ca_file=certificate.with_name("none.pem"), **FAST)
    with Publisher(settings=missing, identity=IDENTITY, outbox=outbox) as publisher:
        assert publisher._reconnector.wait_for(lambda: publisher.state.kind is LinkKind.REFUSED, 10)
        assert "none.pem" in publisher.state.reason


def test_stop_is_quick_without_a_broker(outbox: Outbox) -> None:
    settings = BrokerSettings(url=f"mqtt://127.0.0.1:{free_port()}")
    publisher = Publisher(settings=settings, identity=IDENTITY, outbox=outbox)
    publisher.start()
    began = time.monotonic()
    publisher.stop()
    assert time.monotonic() - began < 3


def test_subscriber_drops_junk_and_counts_it(mosquitto: Mosquitto, outbox: Outbox) -> None:
    subscriber = listen(mosquitto)
    send(mosquitto, IDENTITY.alert("cam"), "not an alert")
    with publisher_for(mosquitto, outbox):
        outbox.append_many([draft()])
        until(subscriber, lambda r: numbers([r]) == [1])
    subscriber.stop()
    assert subscriber.counters["junk"] == 1


def test_subscriber_iterates_until_stopped(mosquitto: Mosquitto, outbox: Outbox) -> None:
    with Subscriber(settings_for(mosquitto)) as subscriber, publisher_for(mosquitto, outbox):
        subscriber.wait_until_ready(10)
        outbox.append_many([draft()] * 3)
        found = []
        for received in subscriber:
            found.append(received)
            if len(found) == 3:
                subscriber.stop()
        assert numbers(found) == [1, 2, 3]
