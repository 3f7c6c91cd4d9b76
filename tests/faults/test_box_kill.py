"""A box killed with SIGKILL again and again while it alerts: what it accepted arrives, in order, without a hole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.box_kills import kill_alert_boxes
from tests.faults.history import Kind, ids, read, require_sound

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SEED = 20


def check_nothing_lost(broker: Mosquitto, folder: Path, **options: float) -> None:
    history, report = kill_alert_boxes(broker, folder, seed=SEED, **options)  # type: ignore[arg-type]
    require_sound(history, seed=SEED)
    facts = read(history)
    assert report.enqueued > 10
    assert len({message.epoch for message in ids(facts, Kind.ENQUEUED)}) == 1, "no power was cut"
    delivered = set(ids(facts, Kind.DELIVERED))
    assert sorted(message.seq for message in delivered) == list(range(1, len(delivered) + 1))


def test_box_killed_loses_nothing(mosquitto: Mosquitto, tmp_path: Path) -> None:
    check_nothing_lost(mosquitto, tmp_path, kills=8, rate=200, life_s=0.3)


def test_box_killed_without_a_durable_outbox_loses_rows(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """The control: with a new file in each life the same check finds losses."""
    _, report = kill_alert_boxes(mosquitto, tmp_path, kills=4, rate=200, seed=SEED, durable=False, life_s=0.3)
    assert report.lost
    assert "lost" in str(report)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_box_killed_two_hundred_times_loses_nothing(mosquitto: Mosquitto, tmp_path: Path) -> None:
    check_nothing_lost(mosquitto, tmp_path, kills=200, rate=20)
