"""A cut line: nothing is lost, the box publishes again soon, and live alerts go before what has waited."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.history import require_sound
from tests.faults.network_cut import Cut, cut_network

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
# 300 alerts of 0.7 kB take about a second then: time for live ones to come in between.
SLOW_LINE = 200_000.0
BACKLOG = 300
RESUMED_S, DRAINED_S, LIVE_S = 10.0, 60.0, 2.0


@pytest.mark.parametrize("how", [Cut.BLACK_HOLE, Cut.HALF_OPEN])
def test_cut_line_loses_nothing_and_live_alerts_overtake(mosquitto: Mosquitto, tmp_path: Path, how: Cut) -> None:
    history, found = cut_network(
        mosquitto, tmp_path, how, cut_s=1, backlog=BACKLOG, bytes_per_s=SLOW_LINE, options=("--keepalive", "1")
    )
    require_sound(history, seed=0)
    assert found.backlog >= BACKLOG
    assert found.resumed_s <= RESUMED_S
    assert found.live > 0
    assert found.overtaking > found.live / 2


def test_one_lane_lets_live_alerts_wait_behind_the_backlog(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """The control of the lanes; and a line that is cut by a reset."""
    history, found = cut_network(
        mosquitto, tmp_path, Cut.RESET, cut_s=1, backlog=BACKLOG, bytes_per_s=SLOW_LINE, options=("--one-lane",)
    )
    assert found.live > 0
    assert found.overtaking == 0
    require_sound(history, seed=0)
    assert found.resumed_s <= RESUMED_S


def test_half_open_line_is_not_noticed_without_a_keep_alive(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """The control of the return: the same box with a keep-alive of ten minutes does not come back."""
    _, found = cut_network(
        mosquitto, tmp_path, Cut.HALF_OPEN, cut_s=1, backlog=10, patience_s=2, options=("--keepalive", "600")
    )
    assert found.resumed_s > RESUMED_S
    assert "lost" in str(found.report)


@pytest.mark.slow
@pytest.mark.parametrize("how", list(Cut))
def test_minute_without_a_line(mosquitto: Mosquitto, tmp_path: Path, how: Cut) -> None:
    history, found = cut_network(
        mosquitto, tmp_path, how, cut_s=60, backlog=10_000, options=("--keepalive", "10", "--patient")
    )
    require_sound(history, seed=0)
    assert found.backlog >= 10_000
    assert found.resumed_s <= RESUMED_S
    assert found.drained_s <= DRAINED_S
    assert found.live_wait_s < LIVE_S
