"""A broker killed with SIGKILL between two saves has acknowledged what it then forgets: the replay brings it back."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from edge.alerts.message import Alert, gap_maker, parse
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings
from edge.alerts.topics import Kind, subscriptions
from tests.alert_values import IDENTITY, draft

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
ROWS_PER_LIFE = 150
# A broker has no word for "that was all", and mosquitto sends a new message ahead of what it has kept.
QUIET_S = 3.0


class OfflineSubscriber:
    """A session that the broker keeps while its client is away."""

    def __init__(self, broker: Mosquitto) -> None:
        self._port = broker.port
        self.seqs: list[int] = []
        self._subscribed = threading.Event()
        self._arrived = threading.Event()

    def register(self) -> None:
        client = self._connect()
        assert self._subscribed.wait(10)
        self._leave(client)

    def collect(self, wanted: set[int]) -> None:
        """Come back and take what was kept, until all that is wanted is there or nothing comes any more."""
        client = self._connect()
        while not wanted <= set(self.seqs) and self._arrived.wait(QUIET_S):
            self._arrived.clear()
        self._leave(client)

    def _connect(self) -> Client:
        client = Client(CallbackAPIVersion.VERSION2, client_id="integrator", clean_session=False)
        client.on_connect = lambda c, *_: c.subscribe([(f, 1) for f in subscriptions("lineward", kinds={Kind.ALERT})])
        client.on_subscribe = lambda *_: self._subscribed.set()
        client.on_message = self._on_message
        client.connect("127.0.0.1", self._port)
        client.loop_start()
        return client

    @staticmethod
    def _leave(client: Client) -> None:
        client.disconnect()
        client.loop_stop()

    def _on_message(self, _client: Client, _data: object, message: object) -> None:
        parsed = parse(message.topic, message.payload)  # type: ignore[attr-defined]
        assert isinstance(parsed, Alert)
        self.seqs.append(parsed.seq)
        self._arrived.set()


def lost_after_kills(make: Callable[..., Mosquitto], folder: Path, kills: int, *, replay_seconds: float) -> set[int]:
    """Numbers that a subscriber who was away never got, though the broker had acknowledged every one."""
    broker = make(autosave_s=1)
    subscriber = OfflineSubscriber(broker)
    subscriber.register()
    broker.save()
    settings = BrokerSettings(url=broker.url, backoff_min_s=0.05, backoff_max_s=0.2)
    outbox = Outbox(folder / "outbox.db", make_gap=gap_maker(IDENTITY), replay_seconds=replay_seconds)
    with outbox, Publisher(settings=settings, identity=IDENTITY, outbox=outbox) as publisher:
        for life in range(1, kills + 1):
            for _ in range(ROWS_PER_LIFE // 10):
                outbox.append_many([draft()] * 10)
            assert publisher.wait_until_drained(10), "the broker acknowledges"
            broker.restart()
            # The broker that dies next need not have taken the replay; the last one does.
            connected = publisher._reconnector.wait_for(lambda n=life: publisher._reconnector.connections > n, 15)
            assert connected
        assert publisher.wait_until_drained(20)
    accepted = set(range(1, outbox.last_seq + 1))
    subscriber.collect(accepted)
    return accepted - set(subscriber.seqs)


def test_broker_killed_loses_nothing_with_replay(make_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    assert lost_after_kills(make_mosquitto, tmp_path, 5, replay_seconds=300) == set()


def test_broker_killed_loses_rows_without_replay(make_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    """The control: the same broker, and nothing is sent again."""
    assert lost_after_kills(make_mosquitto, tmp_path, 3, replay_seconds=0)


@pytest.mark.slow
def test_broker_killed_thirty_times_loses_nothing(make_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    assert lost_after_kills(make_mosquitto, tmp_path, 30, replay_seconds=300) == set()
