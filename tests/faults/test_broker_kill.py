"""A broker killed with SIGKILL between two saves has acknowledged what it then forgets: the replay brings it back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.broker_kills import ROWS_PER_LIFE, kill_broker
from tests.faults.history import require_sound

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SEED = 30


def check_nothing_lost(broker: Mosquitto, folder: Path, *, kills: int) -> None:
    history, report = kill_broker(broker, folder, kills=kills, seed=SEED)
    require_sound(history, seed=SEED, lanes_ordered=False)
    assert report.enqueued == kills * ROWS_PER_LIFE


def test_broker_killed_loses_nothing_with_replay(make_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    check_nothing_lost(make_mosquitto(autosave_s=1), tmp_path, kills=3)


def test_broker_killed_loses_rows_without_replay(make_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    """The control: the same broker, and nothing is sent again."""
    _, report = kill_broker(make_mosquitto(autosave_s=1), tmp_path, kills=2, seed=SEED, replay_seconds=0, quiet_s=1.0)
    assert report.lost


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_broker_killed_thirty_times_loses_nothing(make_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> None:
    check_nothing_lost(make_mosquitto(autosave_s=1), tmp_path, kills=30)
