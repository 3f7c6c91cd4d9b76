"""A box killed with SIGKILL again and again while it alerts: what it accepted arrives, in order, without a hole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edge.alerts.message import alert_from_event
from edge.frames import EventPhase
from tests.alert_values import IDENTITY, JUDGE, event
from tests.faults.box_kills import kill_alert_boxes, kill_whole_boxes, wrong_phases
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
    check_nothing_lost(mosquitto, tmp_path, kills=6, rate=200, life_s=0.3)


def test_box_killed_without_a_durable_outbox_loses_rows(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """The control: with a new file in each life the same check finds losses."""
    _, report = kill_alert_boxes(
        mosquitto, tmp_path, kills=4, rate=200, seed=SEED, durable=False, life_s=0.3, quiet_s=1.0
    )
    assert report.lost
    assert "lost" in str(report)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_box_killed_two_hundred_times_loses_nothing(mosquitto: Mosquitto, tmp_path: Path) -> None:
    check_nothing_lost(mosquitto, tmp_path, kills=200, rate=20)


def check_whole_box(broker: Mosquitto, folder: Path, *, kills: int) -> None:
    history, report, wrong = kill_whole_boxes(broker, folder, kills=kills, fps=10, seed=SEED)
    require_sound(history, seed=SEED)
    assert wrong == []
    assert report.enqueued > 10


def test_whole_box_killed_loses_nothing_and_its_events_are_consistent(mosquitto: Mosquitto, tmp_path: Path) -> None:
    check_whole_box(mosquitto, tmp_path, kills=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whole_box_killed_fifty_times(mosquitto: Mosquitto, tmp_path: Path) -> None:
    check_whole_box(mosquitto, tmp_path, kills=50)


@pytest.mark.parametrize(
    ("phases", "wrong"),
    [("new end", 0), ("new", 0), ("new update update", 0), ("new update end", 0), ("end", 1), ("update end", 1),
     ("new new", 1), ("new end update", 1), ("new end end", 1)],
)  # fmt: skip
def test_phases_of_an_event_that_do_not_fit_are_found(phases: str, wrong: int) -> None:
    alerts = [
        alert_from_event(event(phase=EventPhase(phase)), identity=IDENTITY, judge=JUDGE, epoch="a" * 16, seq=seq)
        for seq, phase in enumerate(phases.split(), 1)
    ]
    assert len(wrong_phases(alerts)) == wrong
