"""A whole box whose clock jumps: by a year in both directions, and 1970 at boot. Its monotonic clocks go on, as the
kernel's do.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edge.alerts.message import Alert
from tests.faults.box_kills import wrong_phases
from tests.faults.history import Kind, Report, check, ids, read
from tests.faults.listener import Listener
from tests.faults.whole_box import log_of, make_line, running_box, write_settings

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

    from tests.mosquitto_process import Mosquitto

# `+365d`: an offset to the true time; `@...`: the clock starts there.
BOOT_1970 = "@1970-01-01 00:00:10"
STEPS = ("+0", "+365d", "+0", "-365d", "+0")
PATIENCE_S = 30.0
_LIBRARIES = [Path("/usr/lib"), Path("/usr/local/lib")]


def library() -> Path | None:
    """libfaketime for threads; None where it is not installed."""
    found = [file for folder in _LIBRARIES for file in folder.glob("**/libfaketimeMT.so.1")]
    return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Clocks:
    """What a box did under its clocks.

    Attributes:
        report: of the checker.
        wrong_phases: of events.
        years: of the alerts' times, in the order of their numbers, each once per run of equal ones.
        cpu: seconds of processor time per second of each step.
        stalled: steps in which no alert came.
    """

    report: Report
    wrong_phases: list[str]
    years: list[int]
    cpu: list[float]
    stalled: list[str]

    @property
    def storm(self) -> float:
        """The greatest processor time of any step after one of an ordinary clock, as a share of that."""
        return max(self.cpu[1:]) / self.cpu[0]


def step_clock(
    broker: Mosquitto, folder: Path, *, step_s: float, steps: Sequence[str] = STEPS, boot: str = BOOT_1970
) -> tuple[Path, Clocks]:
    """Start a box with its clock at ``boot``, set it to each of the steps in turn, end it in order.

    Returns:
        The history, and what the box did.
    """
    found = library()
    assert found is not None
    history, clock = folder / "history.jsonl", folder / "clock"
    clock.write_text(f"{boot}\n", encoding="ascii")
    bundle, images = make_line(folder)
    config = write_settings(folder, bundle, images, broker.url, fps=20)
    environment = {
        "LD_PRELOAD": str(found), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip
    cpu, stalled = [], []
    with Listener(broker.port, history) as listener:
        with running_box(config, history, environment=environment) as box:
            # What the start costs is not what an ordinary clock costs.
            assert listener.wait_for_count(30, 60), log_of(config)
            for step in steps:
                clock.write_text(f"{step}\n", encoding="ascii")
                before, began = _cpu_s(box), time.monotonic()
                if not _alerts_for(listener, step_s):
                    stalled.append(step)
                cpu.append((_cpu_s(box) - before) / (time.monotonic() - began))
            box.terminate()
            assert box.wait(30) == 0, log_of(config)
        listener.wait_for(set(ids(read(history), Kind.ENQUEUED)), quiet_s=3.0)
        alerts = sorted((m for m in listener.arrived.values() if isinstance(m, Alert)), key=lambda m: m.seq)
        years = [alert.ts.year for alert in alerts]
        runs = [year for index, year in enumerate(years) if index == 0 or year != years[index - 1]]
        return history, Clocks(check(read(history)), wrong_phases(alerts), runs, cpu, stalled)


def _alerts_for(listener: Listener, seconds: float) -> bool:
    """Watch for so long; whether an alert came in the second half, or late, as from a machine that is busy."""
    deadline = time.monotonic() + seconds
    listener.wait_for_count(2**62, seconds / 2)
    count = len(listener.arrived)
    listener.wait_for_count(2**62, deadline - time.monotonic())
    # A timer that waits for the old date would be silent for a year.
    return listener.wait_for_count(count + 1, PATIENCE_S)


def _cpu_s(box: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{box.pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
