"""The shipped systemd units are accepted by systemd itself, and agree with the code about time and exit codes."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edge.box import STOP_S, TICK_S
from edge.box_contents import WATCHDOG_LIMIT_S
from edge.cli import RESTART_EXIT

UNITS = sorted((Path(__file__).resolve().parent.parent / "deploy").rglob("*.service"))
BOX = next(unit for unit in UNITS if unit.name == "lineward-box.service")


def value(key: str) -> str:
    found = re.findall(rf"^{key}=(.*)$", BOX.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(found) == 1, key
    return str(found[0])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze: apt-get install systemd")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    for one in UNITS:
        # It looks for the programs of a unit, which are not installed here, and for the units that a unit needs.
        text = re.sub(r"^(Exec\w+=)/opt/\S+", r"\1/bin/true", one.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (tmp_path / one.name).write_text(text, encoding="utf-8")

    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (result.returncode, [line for line in result.stderr.splitlines() if unit.name in line]) == (0, [])


def test_unit_agrees_with_the_box() -> None:
    assert int(value("TimeoutStopSec")) > STOP_S
    assert int(value("WatchdogSec")) > WATCHDOG_LIMIT_S > 10 * TICK_S
    assert int(value("SuccessExitStatus")) == RESTART_EXIT
    assert value("Restart") == "always"
    assert value("ExecReload") == "/bin/kill -HUP $MAINPID"
