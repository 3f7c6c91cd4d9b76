"""A box killed with SIGKILL again and again while it alerts: what it accepted arrives, once, without a hole."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edge.alerts.message import Alert, gap_maker
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import Subscriber
from tests.alert_values import IDENTITY
from tests.mosquitto_process import free_port

if TYPE_CHECKING:
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
ROOT = Path(__file__).parents[2]
Id = tuple[str, int]


def run_and_kill(outbox: Path, url: str, rows: int) -> set[Id]:
    """Let a box accept about ``rows`` rows, kill it, and return all that it said it had accepted."""
    command = [sys.executable, "-m", "tests.faults.alert_box", str(outbox), url, "0.002"]
    box = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert box.stdout is not None
    accepted = [line for _, line in zip(range(rows), box.stdout, strict=False)]
    box.kill()
    # The pipe still holds what was printed before the kill; a line that was cut off was not accepted for sure.
    accepted += [line for line in box.stdout if line.endswith("\n")]
    box.wait()
    assert accepted, "the box did not start"
    return {(epoch, int(seq)) for epoch, seq in (line.split() for line in accepted)}


def lost_after_kills(broker: Mosquitto, folder: Path, kills: int, *, durable: bool) -> tuple[set[Id], list[Id], dict]:
    """Accepted rows that never arrived, all that arrived, and the holes. Every other life is without a broker."""
    rng = random.Random(20)
    accepted: set[Id] = set()
    settings = BrokerSettings(url=broker.url)
    dead = f"mqtt://127.0.0.1:{free_port()}"
    with Subscriber(settings) as subscriber:
        subscriber.wait_until_ready(10)
        for life in range(kills):
            name = "outbox.db" if durable else f"outbox-{life}.db"
            accepted |= run_and_kill(folder / name, dead if life % 2 else broker.url, rng.randint(1, 60))
        outbox = Outbox(folder / name, make_gap=gap_maker(IDENTITY))
        with outbox, Publisher(settings=settings, identity=IDENTITY, outbox=outbox) as publisher:
            assert publisher.wait_until_drained(30)
        arrived = []
        while (received := subscriber.receive(0.3)) is not None:
            assert isinstance(received.message, Alert)
            arrived.append((received.message.epoch, received.message.seq))
        return accepted - set(arrived), arrived, subscriber.missing


def check_nothing_lost(broker: Mosquitto, folder: Path, kills: int) -> None:
    lost, arrived, missing = lost_after_kills(broker, folder, kills, durable=True)
    assert lost == set()
    assert len(arrived) == len(set(arrived)), "a duplicate passed"
    assert missing == {}
    assert sorted(seq for _, seq in arrived) == list(range(1, len(arrived) + 1))
    assert len({epoch for epoch, _ in arrived}) == 1


def test_box_killed_loses_nothing(mosquitto: Mosquitto, tmp_path: Path) -> None:
    check_nothing_lost(mosquitto, tmp_path, kills=12)


def test_box_killed_without_a_durable_outbox_loses_rows(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """The control: with a new file in each life the same check finds losses."""
    lost, _, _ = lost_after_kills(mosquitto, tmp_path, kills=3, durable=False)
    assert lost


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_box_killed_two_hundred_times_loses_nothing(mosquitto: Mosquitto, tmp_path: Path) -> None:
    check_nothing_lost(mosquitto, tmp_path, kills=200)
