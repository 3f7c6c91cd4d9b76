"""How fast threads append to an outbox: as they come, or one after the other, each with a disk sync of its own."""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from edge.alerts.message import gap_maker
from edge.alerts.outbox import Outbox
from tests.alert_values import IDENTITY, draft

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]


def append_rate(folder: Path, *, threads: int, rows: int, grouped: bool) -> dict[str, float]:
    """Rows per second of so many threads together, each appending ``rows`` alerts, and the rows per commit.

    Args:
        folder: for the outbox.
        threads: that append.
        rows: of each.
        grouped: False for one append at a time, as if there were no group commit.
    """
    turn = contextlib.nullcontext() if grouped else threading.Lock()
    topic, make, priority = draft()
    with Outbox(folder / "outbox.db", make_gap=gap_maker(IDENTITY)) as outbox:

        def append() -> None:
            for _ in range(rows):
                with turn:
                    outbox.append(topic, make, priority=priority)

        workers = [threading.Thread(target=append) for _ in range(threads)]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.perf_counter() - began
        counters = outbox.counters
    return {"rows_per_s": threads * rows / seconds, "rows_per_commit": counters["appended"] / counters["commits"]}


def append_rate_with_slow_disk(*, threads: int, rows: int, grouped: bool, sync_ms: float) -> dict[str, float]:
    """The same in a process of its own whose disk syncs take longer by ``sync_ms``: those of a memory card, say."""
    calls = "fdatasync,fsync"
    command = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", f"trace={calls}"]
    command += ["-e", f"inject={calls}:delay_exit={round(1000 * sync_ms)}"]
    command += [sys.executable, "-m", "tests.faults.append_rate", str(threads), str(rows)]
    command += ["--grouped"] if grouped else []
    found = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    rates: dict[str, float] = json.loads(found.stdout)
    return rates


def can_slow_disks() -> bool:
    """Whether strace is installed."""
    return shutil.which("strace") is not None


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("threads", type=int)
    parser.add_argument("rows", type=int)
    parser.add_argument("--grouped", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = append_rate(Path(folder), threads=options.threads, rows=options.rows, grouped=options.grouped)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
