"""A box reports to nobody: what its libraries would send home stays unsent."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

IMPORT = """
import sys
{first}
import openvino.tools.ovc.telemetry_utils as utils
print(utils.tm.__name__)
"""


def imported(first: str, home: Path) -> str:
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"HOME": str(home)}
    result = subprocess.run(
        [sys.executable, "-c", IMPORT.format(first=first)],
        capture_output=True, text=True, timeout=60, check=True, env=environment,
    )  # fmt: skip
    return result.stdout.strip()


def test_openvino_is_loaded_without_its_telemetry(tmp_path: Path) -> None:
    ours = imported("from edge.inference.openvino_session import core; core()", tmp_path / "ours")

    assert ours == "openvino.tools.ovc.telemetry_stub"
    assert list((tmp_path / "ours").iterdir()) == []
