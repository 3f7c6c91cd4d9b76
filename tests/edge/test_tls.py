"""TLS to a real broker: what is right gets through, and each thing that is wrong is a state that names its cure."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from edge.alerts.message import gap_maker
from edge.alerts.mqtt import LinkKind
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings
from edge.alerts.tls import tls_context
from edge.errors import SettingsError
from tests.alert_values import IDENTITY, draft
from tests.certificates import Authority, Pair
from tests.mosquitto_process import Mosquitto, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.broker
FAST = {"backoff_min_s": 0.05, "backoff_max_s": 0.2}


@dataclass(frozen=True)
class Plant:
    """Two authorities, and brokers that ask for a client certificate or do not."""

    ours: Authority
    theirs: Authority
    client: Pair
    ports: dict[str, int]

    def url(self, listener: str, host: str = "localhost", scheme: str = "mqtts") -> str:
        return f"{scheme}://{host}:{self.ports[listener]}"

    def ours_with(self, pair: Pair) -> dict[str, Path]:
        return {"ca_file": self.ours.cert, "cert_file": pair.cert, "key_file": pair.key}


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    folder = tmp_path_factory.mktemp("plant")
    ours, theirs = Authority(folder / "ours"), Authority(folder / "theirs", "another authority")
    ports = {name: free_port() for name in ("tls", "mutual", "expired")}
    lines = []
    for name, port in ports.items():
        server = ours.issue(f"broker-{name}", days=-1 if name == "expired" else 30)
        lines += [f"listener {port} 127.0.0.1", f"certfile {server.cert}", f"keyfile {server.key}"]
        if name == "mutual":
            lines += [f"cafile {ours.cert}", "require_certificate true", "use_identity_as_username true"]
    broker = Mosquitto(tmp_path_factory.mktemp("mosquitto"), extra="\n".join(lines))
    broker.start()
    ports["plain"] = broker.port
    yield Plant(ours, theirs, ours.issue("plant/box1"), ports)
    broker.stop()


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.db", make_gap=gap_maker(IDENTITY)) as box:
        box.append_many([draft()])
        yield box


def publisher_for(outbox: Outbox, url: str, **values: Any) -> Publisher:
    settings = BrokerSettings(url=url, connect_timeout_s=2, **FAST, **values)
    return Publisher(settings=settings, identity=IDENTITY, outbox=outbox)


def trouble(outbox: Outbox, url: str, word: str, **values: Any) -> str:
    """The first state whose reason has the word; there must be no connection by then."""
    with publisher_for(outbox, url, **values) as publisher:
        found = publisher._reconnector.wait_for(lambda: word in publisher.state.reason, 10)
        assert found, publisher.state
        assert publisher.counters["connections"] == 0
        return publisher.state.reason


def test_right_authority_gets_through(plant: Plant, outbox: Outbox) -> None:
    with publisher_for(outbox, plant.url("tls"), ca_file=plant.ours.cert) as publisher:
        assert publisher.wait_until_drained(10)


def test_right_client_certificate_gets_through(plant: Plant, outbox: Outbox) -> None:
    with publisher_for(outbox, plant.url("mutual"), **plant.ours_with(plant.client)) as publisher:
        assert publisher.wait_until_drained(10)


@pytest.mark.parametrize("files", ["theirs", "system"])
def test_unknown_authority(plant: Plant, outbox: Outbox, files: str) -> None:
    values = {"ca_file": plant.theirs.cert} if files == "theirs" else {}
    reason = trouble(outbox, plant.url("tls"), "not signed by an authority of ca_file", **values)
    assert "TLS" in reason


def test_expired_broker(plant: Plant, outbox: Outbox) -> None:
    reason = trouble(outbox, plant.url("expired"), "has expired", ca_file=plant.ours.cert)
    assert "renew it" in reason
    assert "clock" in reason


def test_wrong_host_name(plant: Plant, outbox: Outbox) -> None:
    reason = trouble(outbox, plant.url("tls", host="127.0.0.1"), "not for 127.0.0.1", ca_file=plant.ours.cert)
    assert "use the name that is in it" in reason


def test_missing_client_certificate(plant: Plant, outbox: Outbox) -> None:
    reason = trouble(outbox, plant.url("mutual"), "client certificate", ca_file=plant.ours.cert)
    assert "cert_file and key_file" in reason


def test_client_certificate_of_another_authority(plant: Plant, outbox: Outbox) -> None:
    stranger = plant.theirs.issue("plant/box1")
    reason = trouble(outbox, plant.url("mutual"), "cert", **plant.ours_with(stranger))
    assert "TLS" in reason or "hung up" in reason


def test_expired_client_certificate(plant: Plant, outbox: Outbox) -> None:
    old = plant.ours.issue("plant/old", days=-1)
    reason = trouble(outbox, plant.url("mutual"), "cert", **plant.ours_with(old))
    assert "expired" in reason or "hung up" in reason


def test_plain_client_at_a_tls_port(plant: Plant, outbox: Outbox) -> None:
    assert "mqtts://" in trouble(outbox, plant.url("tls", scheme="mqtt"), "does this port want TLS")


def test_tls_client_at_a_plain_port(plant: Plant, outbox: Outbox) -> None:
    reason = trouble(outbox, plant.url("plain"), "TLS", ca_file=plant.ours.cert)
    assert "mqtt://" in reason or "speak TLS" in reason


def test_certificate_that_is_renewed_is_taken_at_the_next_connect(plant: Plant, outbox: Outbox, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    old, new = plant.ours.issue("plant/late", days=-1), plant.client
    cert.write_bytes(old.cert.read_bytes())
    key.touch(mode=0o600)
    key.write_bytes(old.key.read_bytes())
    with publisher_for(outbox, plant.url("mutual"), **plant.ours_with(Pair(cert, key))) as publisher:
        assert publisher._reconnector.wait_for(lambda: "cert" in publisher.state.reason, 10)
        cert.write_bytes(new.cert.read_bytes())
        key.write_bytes(new.key.read_bytes())
        assert publisher.wait_until_drained(10)


def test_key_that_others_can_read_is_refused(plant: Plant, outbox: Outbox, tmp_path: Path) -> None:
    key = tmp_path / "open.key"
    key.write_bytes(plant.client.key.read_bytes())
    key.chmod(0o644)
    pair = Pair(plant.client.cert, key)
    assert "chmod 600" in trouble(outbox, plant.url("mutual"), "open to every user", **plant.ours_with(pair))


@pytest.mark.parametrize("key", ["ca_file", "cert_file", "key_file"])
def test_file_that_is_missing_or_no_certificate_is_named(plant: Plant, tmp_path: Path, key: str) -> None:
    files = plant.ours_with(plant.client)
    with pytest.raises(SettingsError, match=f"^{key} {tmp_path}/none: No such file"):
        tls_context(BrokerSettings(url="mqtts://localhost", **{**files, key: tmp_path / "none"}))  # type: ignore[arg-type]
    text = tmp_path / "text.pem"
    text.touch(mode=0o600)
    text.write_text("no certificate\n")
    with pytest.raises(SettingsError, match=f"{key} {text}.*PEM file"):
        tls_context(BrokerSettings(url="mqtts://localhost", **{**files, key: text}))  # type: ignore[arg-type]


def test_key_with_a_password_is_refused_without_asking_for_it(plant: Plant, outbox: Outbox, tmp_path: Path) -> None:
    from tests.certificates import openssl

    key = tmp_path / "locked.key"
    openssl("ec", "-in", str(plant.client.key), "-aes256", "-passout", "pass:secret", "-out", str(key))
    key.chmod(0o600)
    began = time.monotonic()
    reason = trouble(outbox, plant.url("mutual"), "PEM", **plant.ours_with(Pair(plant.client.cert, key)))
    assert "without a password" in reason
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("tls", [False, True])
def test_password_is_read_again_at_each_connect(
    plant: Plant, outbox: Outbox, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, *, tls: bool
) -> None:
    server, port = plant.ours.issue("broker-login"), free_port()
    extra = f"listener {port} 127.0.0.1\ncertfile {server.cert}\nkeyfile {server.key}" if tls else ""
    folder = tmp_path_factory.mktemp("login")
    secret = tmp_path / "password"
    secret.touch(mode=0o600)
    secret.write_text("first-word\n")
    broker = Mosquitto(folder, users={"plant/box1": "first-word"}, extra=extra)
    broker.start()
    url = f"mqtts://localhost:{port}" if tls else broker.url
    values = {"ca_file": plant.ours.cert} if tls else {}
    try:
        with publisher_for(outbox, url, username="plant/box1", password_file=secret, **values) as publisher:
            assert publisher.wait_until_drained(10)
            assert publisher.state.kind is LinkKind.CONNECTED
            broker.set_password("plant/box1", "second-word")
            broker.restart()
            assert publisher._reconnector.wait_for(lambda: publisher.state.kind is LinkKind.REFUSED, 10)
            assert "password_file" in publisher.state.reason
            secret.write_text("second-word\n")
            assert publisher.wait_until_drained(10)
    finally:
        broker.stop()
