"""The shipped mosquitto configuration with a real mosquitto: a box speaks for itself alone, a reader only reads."""

from __future__ import annotations

import json
import re
import select
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from typer.testing import CliRunner

from edge.alerts.commander import Commander
from edge.alerts.home_assistant import HomeAssistant
from edge.alerts.message import MAX_PAYLOAD_BYTES, gap_maker
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings, HomeAssistantSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.alerts.topics import BOX_KINDS, CAMERA_KINDS, Identity, Kind
from edge.errors import BrokerError
from edge.evidence.cli import app as evidence
from tests.alert_values import draft
from tests.certificates import Authority
from tests.mosquitto_process import Mosquitto, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge.alerts.mqtt import LinkState

pytestmark = pytest.mark.broker
SHIPPED = Path(__file__).parents[2] / "deploy" / "mosquitto"
A, B = Identity("plant", "a"), Identity("plant", "b")
# Users of the password file, with boxes and with names that are almost a box's.
PASSWORDS = {
    "lineward-watch": "watch-word",
    "lineward-operator": "operator-word",
    "plant/b": "box-b-word",
    "plant": "site-word",
    "plant/+": "plus-word",
    "plant/a/cam": "long-word",
    "stranger": "stranger-word",
}


@dataclass
class Plant:
    """The shipped broker, its authority, and the two listeners."""

    broker: Mosquitto
    authority: Authority
    certificates: int
    passwords: int
    folder: Path

    def by_certificate(self, name: str) -> BrokerSettings:
        pair = self.authority.issue(name)
        return BrokerSettings(
            url=f"mqtts://localhost:{self.certificates}", ca_file=self.authority.cert, cert_file=pair.cert,
            key_file=pair.key, backoff_min_s=0.05, backoff_max_s=0.2,
        )  # fmt: skip

    def by_password(self, name: str, password: str | None = None) -> BrokerSettings:
        secret = self.folder / f"{name.replace('/', '_')}.password"
        secret.touch(mode=0o600)
        secret.write_text(PASSWORDS[name] if password is None else password)
        return BrokerSettings(
            url=f"mqtts://localhost:{self.passwords}", ca_file=self.authority.cert, username=name,
            password_file=secret, backoff_min_s=0.05, backoff_max_s=0.2,
        )  # fmt: skip


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """The shipped files, with other paths and ports and nothing else changed."""
    folder = tmp_path_factory.mktemp("broker")
    authority = Authority(folder / "ca")
    server = authority.issue("broker")
    ports = {"8883": free_port(), "8884": free_port()}
    files = {
        "/etc/mosquitto/certs/ca.pem": authority.cert, "/etc/mosquitto/certs/broker.pem": server.cert,
        "/etc/mosquitto/certs/broker.key": server.key, "/etc/mosquitto/lineward.acl": folder / "lineward.acl",
        "/etc/mosquitto/lineward.passwords": folder / "passwords",
    }  # fmt: skip
    config = (SHIPPED / "lineward.conf").read_text()
    for path, ours in files.items():
        assert path in config, path
        config = config.replace(path, str(ours))
    for port, ours in ports.items():
        config, count = re.subn(rf"^listener {port}$", f"listener {ours} 127.0.0.1", config, flags=re.MULTILINE)
        assert count == 1
    broker = Mosquitto(folder)
    own = [line for line in broker.config.read_text().splitlines() if line.startswith("user ")]
    # Debian's mosquitto.conf, which includes ours, has these two; mosquitto refuses some keys that stand twice.
    debian = ["persistence true", f"persistence_location {folder}/"]
    broker.config.write_text("\n".join([*own, *debian, config]))
    broker.port = ports["8884"]
    identity = Identity("plant", "house")
    node = HomeAssistant(HomeAssistantSettings(), identity).node
    acl = (SHIPPED / "lineward.acl").read_text()
    house = acl[acl.index("#   user plant-1/line-3") :].replace("plant-1/line-3", "plant/house")
    house = house.replace("lineward_plant-1_line-3_0123abcd", node)
    acl = acl[: acl.index("#   user plant-1/line-3")] + "\n".join(line.removeprefix("#") for line in house.splitlines())
    (folder / "lineward.acl").write_text(acl + "\n")
    (folder / "lineward.acl").chmod(0o600)
    (folder / "passwords").touch(mode=0o600)
    for name, password in PASSWORDS.items():
        broker.set_password(name, password)
    broker.start()
    yield Plant(broker, authority, ports["8883"], ports["8884"], tmp_path_factory.mktemp("passwords"))
    broker.stop()


@pytest.fixture
def auditor(plant: Plant) -> Iterator[Subscriber]:
    """Sees all that the broker lets through."""
    everything = frozenset(EVERYTHING | {Kind.COMMAND})
    with Subscriber(plant.by_password("lineward-watch"), kinds=everything) as subscriber:
        subscriber.wait_until_ready(10)
        yield subscriber


class Intruder:
    """A client that says whatever it is told to over one connection, and notes the broker's answers."""

    def __init__(self, settings: BrokerSettings) -> None:
        self.events: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._client = Client(
            CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5, reconnect_on_failure=False
        )
        context = ssl.create_default_context(cafile=str(settings.ca_file))
        if settings.cert_file is not None:
            context.load_cert_chain(str(settings.cert_file), str(settings.key_file))
        self._client.tls_set_context(context)
        if settings.username is not None:
            self._client.username_pw_set(settings.username, settings.read_password())
        self._client.on_connect = lambda *found: self.events.put(("connect", found[3]))
        self._client.on_publish = lambda *found: self.events.put(("publish", found[3]))
        self._client.on_subscribe = lambda *found: self.events.put(("subscribe", found[3][0]))
        self._client.on_disconnect = lambda *found: self.events.put(("disconnect", found[3]))
        self._client.on_message = lambda *found: self.events.put(("message", found[2].topic))
        self._client.connect(settings.host, settings.port)
        self._client.loop_start()
        assert not self.wait_for("connect").is_failure

    def wait_for(self, kind: str) -> Any:
        while True:
            found, value = self.events.get(timeout=10)
            if found == kind or (found == "disconnect" and kind == "publish"):
                return value

    def publish(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> bool:
        """Whether the broker took it."""
        self._client.publish(topic, payload, qos=1, retain=retain)
        return not self.wait_for("publish").is_failure

    def subscribe(self, topic: str) -> bool:
        self._client.subscribe(topic, qos=1)
        return not self.wait_for("subscribe").is_failure

    def messages(self) -> list[str]:
        found = []
        try:
            while True:
                kind, value = self.events.get_nowait()
                found += [value] * (kind == "message")
        except Empty:
            return found

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def topics_of(box: Identity) -> dict[Kind, str]:
    found = {kind: f"{box.root}/{kind.value}" for kind in BOX_KINDS}
    found |= {kind: f"{box.root}/cam/{kind.value}" for kind in CAMERA_KINDS}
    return found | {Kind.RESULT: box.result("ship")}


def taken(settings: BrokerSettings, topic: str, payload: bytes = b"x") -> bool:
    """Whether the broker takes a message of a fresh connection: mosquitto 2.0 ends one after a refusal."""
    intruder = Intruder(settings)
    try:
        return intruder.publish(topic, payload)
    finally:
        intruder.close()


def publish_all(box: Identity, settings: BrokerSettings, tmp_path: Path) -> LinkState:
    """Run the publisher of a box until all that it has to say is acknowledged."""
    with (
        Outbox(tmp_path / f"{box.box}.db", make_gap=gap_maker(box)) as outbox,
        Publisher(settings=settings, identity=box, outbox=outbox) as publisher,
    ):
        publisher.publish_state("cam", {"state": "ok"})
        publisher.publish_status({})
        outbox.append_many([draft(box)])
        assert publisher.wait_until_drained(10), publisher.state
        return publisher.state


@pytest.mark.parametrize("by", ["certificate", "password"])
def test_box_does_its_work(plant: Plant, tmp_path: Path, auditor: Subscriber, by: str) -> None:
    box = A if by == "certificate" else B
    settings = plant.by_certificate("plant/a") if by == "certificate" else plant.by_password("plant/b")
    assert publish_all(box, settings, tmp_path).reason == ""
    seen = set()
    while f"{box.root}/cam/alert" not in seen or f"{box.root}/cam/state" not in seen:
        received = auditor.receive(10)
        assert received is not None, seen
        seen.add(received.topic)


def test_box_says_everything_of_its_own_and_nothing_of_another(plant: Plant) -> None:
    settings = plant.by_certificate("plant/a")
    for kind, topic in topics_of(A).items():
        assert taken(settings, topic, b""), f"{kind}: its own"
    for kind, topic in topics_of(B).items():
        assert not taken(settings, topic, b""), f"{kind}: of another box"
    others = ["lineward/other/a/status", "lineward/plant/status", "lineward/status", A.command("ship"),
              B.command("ship"), "lineward", "lineward/plant/a", "homeassistant/sensor/n/o/config"]  # fmt: skip
    for topic in others:
        assert not taken(settings, topic, b""), topic


@pytest.mark.parametrize("name", ["plant", "plant/a/cam", "plant/+", "stranger"])
def test_name_that_is_no_box_says_nothing(plant: Plant, name: str) -> None:
    settings = plant.by_password(name)
    for topic in [*topics_of(A).values(), A.command("ship")]:
        assert not taken(settings, topic, b""), topic


def test_box_reads_its_own_commands_and_no_others(plant: Plant) -> None:
    operator = Intruder(plant.by_password("lineward-operator"))
    box = Intruder(plant.by_certificate("plant/a"))
    greedy = ["lineward/#", "lineward/+/+/cmd/+", f"{B.root}/cmd/+", B.alert("cam"), "#", "lineward/plant/+/cmd/ship"]
    for one in [*greedy, "lineward/plant/a/cmd/+"]:
        box.subscribe(one)
    for topic in (B.command("ship"), "lineward/other/a/cmd/ship", A.command("ship")):
        assert operator.publish(topic, b"{}")
    # The last of them has come, so the others would have, too: a broker keeps the order of a connection.
    assert box.wait_for("message") == A.command("ship")
    assert set(box.messages()) <= {A.command("ship")}
    box.close()
    operator.close()


def test_watcher_reads_all_and_says_nothing(plant: Plant, tmp_path: Path, auditor: Subscriber) -> None:
    publish_all(B, plant.by_password("plant/b"), tmp_path)
    while (received := auditor.receive(10)) is not None and received.topic != B.alert("cam"):
        pass
    assert received is not None
    settings = plant.by_password("lineward-watch")
    for topic in [*topics_of(A).values(), A.command("ship"), "lineward/x", "other"]:
        assert not taken(settings, topic, b""), topic


def test_operator_asks_and_is_answered_and_cannot_answer(plant: Plant, tmp_path: Path) -> None:
    with (
        Outbox(tmp_path / "a.db", make_gap=gap_maker(A)) as outbox,
        Publisher(settings=plant.by_certificate("plant/a"), identity=A, outbox=outbox) as publisher,
        Commander(plant.by_password("lineward-operator"), site="plant", box="a") as commander,
    ):
        publisher.on_command("ship", lambda _: {"ok": True, "count": 3})
        assert publisher.wait_until_drained(10)
        assert commander.ask("ship", {}, key="k").count == 3
    settings = plant.by_password("lineward-operator")
    for topic in topics_of(A).values():
        assert not taken(settings, topic, b""), topic


def test_reader_that_commands_is_told_that_its_login_may_not(plant: Plant) -> None:
    settings = plant.by_password("lineward-watch")
    shared = ["--site", "plant", "--box", "a", "--broker", settings.url.replace("//", f"//{settings.username}@")]
    shared += ["--ca-file", str(settings.ca_file), "--password-file", str(settings.password_file), "--timeout", "100"]
    result = CliRunner().invoke(evidence, ["list", *shared])
    assert isinstance(result.exception, BrokerError)
    assert "the broker does not take lineward/plant/a/cmd/evidence: Not authorized" in str(result.exception)
    assert "this login may not send commands" in str(result.exception)


@pytest.mark.parametrize("listener", ["certificates", "passwords"])
def test_nobody_gets_in_without_a_name(plant: Plant, listener: str) -> None:
    url = f"mqtts://localhost:{getattr(plant, listener)}"
    settings = BrokerSettings(url=url, ca_file=plant.authority.cert, connect_timeout_s=2, backoff_max_s=0.5)
    with Subscriber(settings) as subscriber, pytest.raises(BrokerError):
        subscriber.wait_until_ready(3)


def test_wrong_password_and_plain_text_are_refused(plant: Plant) -> None:
    for settings in (
        plant.by_password("lineward-watch", "guess"),
        BrokerSettings(url=f"mqtt://localhost:{plant.passwords}", connect_timeout_s=2),
    ):
        with Subscriber(settings) as subscriber, pytest.raises(BrokerError):
            subscriber.wait_until_ready(1)
    plant.by_password("lineward-watch")


def test_certificate_of_another_authority_with_a_box_name_is_refused(plant: Plant, tmp_path: Path) -> None:
    pair = Authority(tmp_path / "other").issue("plant/a")
    settings = plant.by_certificate("plant/a").model_copy(update={"cert_file": pair.cert, "key_file": pair.key})
    with Subscriber(settings) as subscriber, pytest.raises(BrokerError):
        subscriber.wait_until_ready(3)


def test_largest_message_of_a_box_passes_and_a_larger_packet_does_not(plant: Plant) -> None:
    settings = plant.by_certificate("plant/a")
    assert taken(settings, A.alert("cam"), b"x" * MAX_PAYLOAD_BYTES)
    assert not taken(settings, A.alert("cam"), b"x" * (MAX_PAYLOAD_BYTES + 10_000))


def test_box_announces_itself_to_home_assistant_and_no_other_box(plant: Plant, tmp_path: Path) -> None:
    house = Identity("plant", "house")
    settings = plant.by_certificate("plant/house").model_copy(update={"home_assistant": HomeAssistantSettings()})
    assert publish_all(house, settings, tmp_path).reason == ""
    other = HomeAssistant(HomeAssistantSettings(), A)
    for topic in other.configs("cam"):
        assert not taken(plant.by_certificate("plant/house"), topic, b""), topic


def test_access_list_names_every_kind_of_message() -> None:
    acl = (SHIPPED / "lineward.acl").read_text()
    for topic in topics_of(Identity("site", "box")).values():
        pattern = topic.replace("site/box", "%u").replace("/cam/", "/+/").replace("/ship/", "/+/")
        assert f"pattern write {pattern}\n" in acl
    assert {*BOX_KINDS, *CAMERA_KINDS, Kind.COMMAND, Kind.RESULT} == set(Kind), "a new kind needs its lines"


def test_command_line_proves_itself_with_certificates(plant: Plant, tmp_path: Path) -> None:
    def lineward(verb: str, name: str, *options: str) -> list[str]:
        settings = plant.by_certificate(name)
        files = ["--ca-file", str(settings.ca_file), "--cert-file", str(settings.cert_file)]
        access = ["--broker", settings.url, *files, "--key-file", str(settings.key_file)]
        return [str(Path(sys.executable).parent / "lineward"), *verb.split(), *access, *options]

    box = ["--site", "plant", "--box", "a"]
    with (
        Outbox(tmp_path / "a.db", make_gap=gap_maker(A)) as outbox,
        Publisher(settings=plant.by_certificate("plant/a"), identity=A, outbox=outbox) as publisher,
    ):
        publisher.on_command("ship", lambda _: {"ok": True, "count": 3})
        assert publisher.wait_until_drained(10)
        asked = subprocess.run(
            lineward("command ship", "lineward-operator", *box), capture_output=True, text=True, timeout=60, check=False
        )
        assert (asked.returncode, "count 3" in asked.stdout) == (0, True), asked.stderr
        refused = subprocess.run(
            lineward("command ship", "plant/b", *box, "--timeout", "100"),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert refused.returncode == 3, "another box asks in vain"
        with subprocess.Popen(
            lineward("watch", "lineward-watch", "--json", "--count", "1"), stdout=subprocess.PIPE, text=True
        ) as watch:
            assert watch.stdout is not None
            line = ""
            while not line and watch.poll() is None:
                outbox.append_many([draft(A)])
                if select.select([watch.stdout], [], [], 0.2)[0]:
                    line = watch.stdout.readline()
            assert json.loads(line)["box"] == "a"
