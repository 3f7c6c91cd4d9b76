"""A full disk: judging goes on, what is lost is counted to the message, and storing goes on once there is space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.full_disk import fill_under_box, fill_under_outbox, refused_while_full, restart_on_full_disk
from tests.faults.history import require_sound
from tests.faults.whole_box import SmallDisk

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

MISSING = SmallDisk.missing()
pytestmark = [pytest.mark.broker, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
RATIO, RECOVERED_S = 0.95, 5.0


def test_full_disk_loses_what_it_counts_and_recovers(mosquitto: Mosquitto, tmp_path: Path) -> None:
    found = fill_under_outbox(mosquitto, tmp_path, rows=2500)
    assert found.report.findings == []
    assert found.counted > 0, "the disk was never full: this test would show nothing"
    assert found.exact
    assert found.recovered_s <= RECOVERED_S


def test_full_disk_refuses_nothing_while_the_broker_takes_it(mosquitto: Mosquitto, tmp_path: Path) -> None:
    assert refused_while_full(mosquitto, tmp_path, rows=300) == 0


def test_files_that_own_no_space_refuse_at_once(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """The control of the space that the outbox owns."""
    assert refused_while_full(mosquitto, tmp_path, rows=300, options=("--unowned",)) > 0


def test_box_starts_on_a_full_disk_and_stores(mosquitto: Mosquitto, tmp_path: Path) -> None:
    history, code = restart_on_full_disk(mosquitto, tmp_path, rows=50)
    assert code == 0
    assert require_sound(history, seed=0).enqueued == 100


def test_box_whose_files_own_no_space_does_not_start_on_a_full_disk(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """The control of the space that is kept from one start to the next."""
    _, code = restart_on_full_disk(mosquitto, tmp_path, rows=50, options=("--unowned",))
    assert code != 0


@pytest.mark.slow
def test_box_judges_on_while_its_disk_is_full(mosquitto: Mosquitto, tmp_path: Path) -> None:
    found = fill_under_box(mosquitto, tmp_path, rounds=3, phase_s=8)
    assert found.report.findings == []
    assert found.counted > 0
    assert found.exact
    assert found.ratio >= RATIO
    assert found.recovered_s <= RECOVERED_S
