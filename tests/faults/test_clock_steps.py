"""A box whose clock is set by a year in both directions, and starts in 1970: no id is lost or doubled, no timer runs
wild, and the order is that of the numbers.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest

from tests.faults.clock_steps import STEPS, library, step_clock
from tests.faults.history import require_sound

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(library() is None, reason="no libfaketime: apt-get install faketime"),
]
STORM = 2.0


def check_clock(broker: Mosquitto, folder: Path, *, step_s: float, storm: float, steps: Sequence[str] = STEPS) -> None:
    history, found = step_clock(broker, folder, step_s=step_s, steps=steps)
    require_sound(history, seed=0)
    assert found.wrong_phases == []
    assert found.stalled == []
    now = datetime.now(timezone.utc).year
    assert found.years[0] == 1970, "the clock was not set: this test would show nothing"
    assert [year for year in found.years[1:] if year != now] == [now + 1, now - 1]
    assert found.storm <= storm


def test_clock_steps_lose_and_double_nothing(mosquitto: Mosquitto, tmp_path: Path) -> None:
    # In steps this short one burst of other work on the machine counts; a timer that runs wild takes a whole core.
    check_clock(mosquitto, tmp_path, step_s=1.0, storm=4 * STORM, steps=("+0", "+365d", "-365d"))


@pytest.mark.slow
def test_clock_steps_cause_no_timer_storm(mosquitto: Mosquitto, tmp_path: Path) -> None:
    check_clock(mosquitto, tmp_path, step_s=10.0, storm=STORM)
