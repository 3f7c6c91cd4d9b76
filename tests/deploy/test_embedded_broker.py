"""The demo's broker, with the publisher and the subscriber of the box at its two ends."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from deploy import embedded_broker
from deploy.embedded_broker import EmbeddedBroker
from edge.alerts.message import Alert, gap_maker
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings, parse_broker_url
from edge.alerts.subscriber import Subscriber
from edge.errors import BrokerError, MissingExtraError
from tests.alert_values import IDENTITY, draft

if TYPE_CHECKING:
    from pathlib import Path


def settings_of(broker: EmbeddedBroker) -> BrokerSettings:
    """Of one who waits not long: amqtt leaves a CONNECT of MQTT 5 unanswered, and is then asked in 3.1.1."""
    return parse_broker_url(broker.url).model_copy(update={"connect_timeout_s": 1.0})


@pytest.mark.parametrize("program", [pytest.param("mosquitto", marks=pytest.mark.broker), "amqtt"])
def test_embedded_broker_carries_alerts(program: str, tmp_path: Path) -> None:
    with (
        EmbeddedBroker(program) as broker,
        Outbox(tmp_path / "outbox.db", make_gap=gap_maker(IDENTITY)) as outbox,
        Subscriber(settings_of(broker)) as subscriber,
    ):
        subscriber.wait_until_ready(20)
        with Publisher(settings=settings_of(broker), identity=IDENTITY, outbox=outbox) as publisher:
            outbox.append_many([draft()] * 50)
            assert publisher.wait_until_drained(20)
        seqs = set()
        while len(seqs) < 50:
            received = subscriber.receive(10)
            assert received is not None
            assert isinstance(received.message, Alert)
            seqs.add(received.message.seq)
    assert seqs == set(range(1, 51))


def test_embedded_broker_prefers_mosquitto_and_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"mosquitto", "amqtt"}
    monkeypatch.setattr(embedded_broker, "_is_installed", lambda program: program in installed)
    assert EmbeddedBroker().program == "mosquitto"
    installed.remove("mosquitto")
    assert EmbeddedBroker().program == "amqtt"
    installed.remove("amqtt")
    with pytest.raises(MissingExtraError, match="apt-get install mosquitto"):
        EmbeddedBroker()
    with pytest.raises(BrokerError, match="unknown"):
        EmbeddedBroker("emqx")


def test_embedded_broker_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    false = shutil.which("false")
    assert false is not None
    monkeypatch.setattr(embedded_broker.shutil, "which", lambda _name: false)
    with pytest.raises(BrokerError, match="does not start"), EmbeddedBroker("mosquitto"):
        pass
