"""Discovery as Home Assistant reads it, over a real broker: said again on every connect, cleared when it is over."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import cv2
import pytest
import yaml
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from edge.alerts.home_assistant import HomeAssistant
from edge.alerts.message import gap_maker
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings, HomeAssistantSettings
from edge.alerts.topics import Identity
from edge.errors import SettingsError
from tests.alert_values import IDENTITY
from tests.edge.tiny_bundle import good_frame, make_tiny_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
ROOT = IDENTITY.root
# What a broker that came back must have heard by then.
AGAIN_S = 5.0


class House:
    """Reads what Home Assistant reads, retained or not, and says what it says. Connects again by itself."""

    def __init__(self, broker: Mosquitto) -> None:
        self.heard: SimpleQueue[tuple[str, bytes, bool]] = SimpleQueue()
        self._client = Client(CallbackAPIVersion.VERSION2)
        self._client.reconnect_delay_set(0.05, 0.1)
        self._client.on_connect = lambda client, *_: client.subscribe([("#", 1)])
        self._client.on_message = lambda _, __, m: self.heard.put((m.topic, bytes(m.payload), m.retain))
        subscribed = threading.Event()
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect("127.0.0.1", broker.port)
        self._client.loop_start()
        assert subscribed.wait(10)

    def say(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self._client.publish(topic, payload, qos=1, retain=retain)

    def hear(self, wanted: set[str], timeout: float = 10.0) -> dict[str, bytes]:
        """The last payload of each topic, once all that are wanted were heard."""
        found: dict[str, bytes] = {}
        deadline = time.monotonic() + timeout
        while not wanted <= found.keys():
            try:
                topic, payload, _ = self.heard.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                pytest.fail(f"not heard within {timeout:g} s: {sorted(wanted - found.keys())}")
            found[topic] = payload
        return found

    def forget(self) -> None:
        """Drop all that was heard so far."""
        with contextlib.suppress(Empty):
            while True:
                self.heard.get_nowait()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


@pytest.fixture
def make_publisher(tmp_path: Path) -> Iterator[Callable[..., Publisher]]:
    """Publishers of one box, one after the other, each with the same state folder."""
    opened: list[tuple[Publisher, Outbox]] = []

    def make(broker: Mosquitto, **values: Any) -> Publisher:
        end()
        values = {"home_assistant": HomeAssistantSettings(), "backoff_min_s": 0.1, "backoff_max_s": 1.0} | values
        outbox = Outbox(tmp_path / "outbox.db", make_gap=gap_maker(IDENTITY))
        settings = BrokerSettings(url=broker.url, keepalive_s=2, **values)
        publisher = Publisher(settings=settings, identity=IDENTITY, outbox=outbox)
        publisher.start()
        opened.append((publisher, outbox))
        return publisher

    def end() -> None:
        for publisher, outbox in opened:
            publisher.stop()
            outbox.close()
        opened.clear()

    yield make
    end()


def announced(*names: str) -> set[str]:
    """Topics that discovery must use for these cameras."""
    discovery = HomeAssistant(HomeAssistantSettings(), IDENTITY)
    return {topic for name in names for topic in discovery.configs(name)} | discovery.box_configs().keys()


def retained(broker: Mosquitto) -> dict[str, bytes]:
    """What a client that comes now is told of the past."""
    house = House(broker)
    mark = f"mark/{time.monotonic_ns()}"
    try:
        house.say(mark, b"x")
        found: dict[str, bytes] = {}
        while True:
            topic, payload, old = house.heard.get(timeout=10)
            if topic == mark:
                return found
            if old:
                found[topic] = payload
    finally:
        house.close()


def config_of(broker: Mosquitto, component: str, what: str) -> dict[str, Any]:
    topics = retained(broker)
    (topic,) = [t for t in topics if t.startswith(f"homeassistant/{component}/") and t.endswith(f"{what}/config")]
    return json.loads(topics[topic])


@pytest.fixture
def shown(mosquitto: Mosquitto, make_publisher: Callable[..., Publisher]) -> Mosquitto:
    """A broker that a box with one camera has announced itself to."""
    publisher = make_publisher(mosquitto)
    publisher.publish_state("cam", {"state": "ok", "score": 0.5})
    assert publisher.wait_until_drained(10)
    return mosquitto


def render(template: str, payload: str) -> str:
    jinja2 = pytest.importorskip("jinja2", reason="pip install jinja2 to render templates as Home Assistant does")
    try:
        values = {"value": payload, "value_json": json.loads(payload)}
    except ValueError:
        values = {"value": payload}
    return str(jinja2.Template(template).render(values))


def test_every_config_is_retained_and_complete(shown: Mosquitto) -> None:
    topics = retained(shown)
    configs = {topic: json.loads(payload) for topic, payload in topics.items() if topic.startswith("homeassistant/")}
    assert configs.keys() == announced("cam")
    unique = [config["unique_id"] for config in configs.values()]
    assert len(set(unique)) == len(unique)
    for topic, config in configs.items():
        _, component, node, thing, last = topic.split("/")
        assert (component in {"binary_sensor", "sensor"}, last) == (True, "config")
        assert all(c.isalnum() or c in "_-" for c in node + thing), topic
        assert config["state_topic"] in topics, "what it points at is there"
        assert config["device"]["identifiers"]
        assert config["origin"]["name"] == "lineward"


def test_problem_follows_the_state(shown: Mosquitto) -> None:
    config = config_of(shown, "binary_sensor", "problem")
    assert (config["device_class"], config["state_topic"]) == ("problem", f"{ROOT}/cam/state")
    said = {"ok": "OFF", "nok": "ON", "not_judged": "None"}  # None is Home Assistant's word for unknown
    for state, word in said.items():
        assert render(config["value_template"], json.dumps({"state": state})) == word


def test_score_is_a_figure_or_unknown(shown: Mosquitto) -> None:
    config = config_of(shown, "sensor", "score")
    assert config["state_class"] == "measurement"
    assert render(config["value_template"], json.dumps({"score": 0.5})) == "0.5"
    assert render(config["value_template"], json.dumps({"score": None})) == "None"


def test_state_is_one_of_three_words(shown: Mosquitto) -> None:
    config = config_of(shown, "sensor", "state")
    assert (config["device_class"], config["options"]) == ("enum", ["ok", "nok", "not_judged"])
    assert render(config["value_template"], json.dumps({"state": "nok"})) == "nok"


def test_entities_are_unavailable_unless_the_box_is_online(shown: Mosquitto) -> None:
    for component, what in (("binary_sensor", "problem"), ("sensor", "score"), ("sensor", "state")):
        (availability,) = config_of(shown, component, what)["availability"]
        assert availability["topic"] == f"{ROOT}/available"
        for word, expected in (("online", "online"), ("stopped", "offline"), ("offline", "offline")):
            assert render(availability["value_template"], word) == expected
    box = config_of(shown, "binary_sensor", "connection")
    assert box["state_topic"] == f"{ROOT}/available"
    assert render(box["value_template"], "offline") == "OFF"


def test_camera_is_a_device_behind_its_box(shown: Mosquitto) -> None:
    box = config_of(shown, "binary_sensor", "connection")["device"]
    camera = config_of(shown, "sensor", "score")["device"]
    assert camera["via_device"] in box["identifiers"]
    assert camera["identifiers"] != box["identifiers"]
    assert (camera["name"], camera["suggested_area"]) == ("plant box1 cam", "plant")


def test_birth_of_home_assistant_brings_everything_again(
    mosquitto: Mosquitto, make_publisher: Callable[..., Publisher]
) -> None:
    publisher = make_publisher(mosquitto)
    publisher.publish_state("cam", {"state": "ok"})
    assert publisher.wait_until_drained(10)
    house = House(mosquitto)
    wanted = announced("cam") | {f"{ROOT}/cam/state", f"{ROOT}/available"}
    house.hear(wanted)
    house.forget()
    house.say("homeassistant/status", b"offline")
    house.say("homeassistant/status", b"online")
    house.hear(wanted, AGAIN_S)
    house.close()


@pytest.mark.parametrize("restarts", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_restart_of_the_broker_brings_everything_again(
    make_mosquitto: Callable[..., Mosquitto], make_publisher: Callable[..., Publisher], restarts: int
) -> None:
    broker = make_mosquitto()  # without persistence: it has forgotten all that was retained
    publisher = make_publisher(broker)
    for name in ("cam", "gate 2"):
        publisher.publish_state(name, {"state": "nok", "event_id": "e"})
    wanted = announced("cam", "gate 2") | {f"{ROOT}/{name}" for name in ("cam/state", "gate 2/state", "available")}
    house = House(broker)
    house.hear(wanted)
    for number in range(restarts):
        broker.kill()
        house.forget()
        broker.start()
        heard = house.hear(wanted, AGAIN_S)
        assert heard[f"{ROOT}/available"] == b"online", number
        assert json.loads(heard[f"{ROOT}/cam/state"])["state"] == "nok"
        assert publisher.wait_until_drained(10)
    house.close()


def test_camera_that_is_gone_is_cleared_also_by_the_next_run(
    mosquitto: Mosquitto, make_publisher: Callable[..., Publisher]
) -> None:
    publisher = make_publisher(mosquitto)
    for name in ("cam", "old", "older"):
        publisher.publish_state(name, {"state": "ok"})
    assert publisher.wait_until_drained(10)
    publisher.keep_cameras(["cam", "old"])
    assert publisher.wait_until_drained(10)
    left = retained(mosquitto)
    assert f"{ROOT}/older/state" not in left
    assert {t for t in left if t.startswith("homeassistant/")} == announced("cam", "old")

    publisher = make_publisher(mosquitto)
    publisher.keep_cameras(["cam"])
    publisher.publish_state("cam", {"state": "ok"})
    assert publisher.wait_until_drained(10)
    left = retained(mosquitto)
    assert f"{ROOT}/old/state" not in left
    assert {t for t in left if t.startswith("homeassistant/")} == announced("cam")


def test_camera_that_comes_back_is_announced_again(
    mosquitto: Mosquitto, make_publisher: Callable[..., Publisher]
) -> None:
    publisher = make_publisher(mosquitto)
    for names in ([], ["cam"]):
        publisher.publish_state("cam", {"state": "ok"})
        publisher.keep_cameras(names)
        assert publisher.wait_until_drained(10)
    publisher.publish_state("cam", {"state": "nok"})
    assert publisher.wait_until_drained(10)
    assert announced("cam") <= retained(mosquitto).keys()


def test_switched_off_it_clears_what_it_announced(
    mosquitto: Mosquitto, make_publisher: Callable[..., Publisher]
) -> None:
    publisher = make_publisher(mosquitto)
    publisher.publish_state("cam", {"state": "ok"})
    assert publisher.wait_until_drained(10)
    publisher = make_publisher(mosquitto, home_assistant=None)
    publisher.keep_cameras(["cam"])
    publisher.publish_state("cam", {"state": "ok"})
    assert publisher.wait_until_drained(10)
    left = retained(mosquitto)
    assert not [topic for topic in left if topic.startswith("homeassistant/")]
    assert f"{ROOT}/cam/state" in left


def test_off_by_default(mosquitto: Mosquitto, make_publisher: Callable[..., Publisher]) -> None:
    publisher = make_publisher(mosquitto, home_assistant=None)
    publisher.publish_state("cam", {"state": "ok"})
    assert publisher.wait_until_drained(10)
    assert not [topic for topic in retained(mosquitto) if topic.startswith("homeassistant/")]
    assert BrokerSettings().home_assistant is None


def test_names_that_differ_in_signs_only_stay_apart() -> None:
    discovery = HomeAssistant(HomeAssistantSettings(prefix="ha/own"), Identity("plânt", "böx"))
    topics = [topic for name in ("cam 1", "cam_1", "cam.1", "摄像头", "相机") for topic in discovery.configs(name)]
    assert len(set(topics)) == len(topics)
    assert all(topic.isascii() and topic.startswith("ha/own/") for topic in topics)


def test_prefix_must_be_a_topic() -> None:
    with pytest.raises((ValueError, SettingsError), match="prefix"):
        HomeAssistantSettings(prefix="home/#")


def test_whole_box_announces_clears_and_announces_again_on_reload(mosquitto: Mosquitto, tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    (tmp_path / "frames").mkdir()
    cv2.imwrite(str(tmp_path / "frames" / "0.png"), good_frame(1))
    source = {"kind": "folder", "path": "frames", "loop": True, "fps": 20}
    content: dict[str, Any] = {
        "site": IDENTITY.site, "box": IDENTITY.box, "state_dir": "state", "bundle": str(bundle.path), "threads": 1,
        "engine": "onnxruntime", "broker": {"url": mosquitto.url, "home_assistant": {}},
        "cameras": [{"name": name, "source": source} for name in ("cam", "second")],
    }  # fmt: skip
    config = tmp_path / "box.yaml"

    def write(cameras: list[dict[str, Any]]) -> None:
        config.write_text(yaml.safe_dump(content | {"cameras": cameras}))

    house = House(mosquitto)
    write(content["cameras"])
    box = subprocess.Popen([str(Path(sys.executable).parent / "lineward"), "run", "--config", str(config)])
    try:
        second = f"{ROOT}/second/state"
        house.hear(announced("cam", "second") | {f"{ROOT}/cam/state", second}, 60)
        write(content["cameras"][:1])
        box.send_signal(signal.SIGHUP)
        gone = announced("second") - announced() | {second}
        last: dict[str, bytes] = {}
        deadline = time.monotonic() + 30
        while any(last.get(topic) != b"" for topic in gone):
            topic, payload, _ = house.heard.get(timeout=max(0.0, deadline - time.monotonic()))
            last[topic] = payload
        # Its last "not judged" may be overtaken by the clearing; what must not be left is a verdict.
        left = retained(mosquitto)
        assert not left.keys() & gone, "nobody vouches for what is gone"
        assert announced("cam") <= left.keys()
        write(content["cameras"])
        box.send_signal(signal.SIGHUP)
        heard = house.hear(announced("second") - announced() | {second}, 30)
        assert json.loads(heard[second])["state"] in {"ok", "not_judged"}
    finally:
        box.terminate()
        box.wait(15)
        house.close()
