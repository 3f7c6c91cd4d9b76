"""A box whose line to the broker is cut for a while, in three ways, while it alerts; what its history says of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from tests.faults.fault_proxy import FaultProxy
from tests.faults.history import Fact, Id, Kind, Report, check, ids, read
from tests.faults.listener import Listener

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.mosquitto_process import Mosquitto

ROOT = Path(__file__).parents[2]


class Cut(str, Enum):
    """``reset``: connections are reset, new ones too. ``black hole``: nothing comes through, nobody is told, and what
    was on its way arrives afterwards. ``half-open``: the broker's end is gone and the box's end hears of it never.
    """

    RESET = "reset"
    BLACK_HOLE = "black hole"
    HALF_OPEN = "half-open"


@dataclass(frozen=True, slots=True)
class Recovery:
    """What a history shows of a cut.

    Attributes:
        report: of the checker.
        resumed_s: from the return of the line to the first alert at the subscriber; infinite where none came.
        drained_s: from there to the last alert of the backlog.
        backlog: alerts that waited at the return and had not been delivered before.
        live: alerts that were made after the first had arrived and before the backlog was drained.
        live_wait_s: the longest that one of those took from append to the subscriber.
        overtaking: of them, those that arrived before the last of the backlog.
    """

    report: Report
    resumed_s: float
    drained_s: float
    backlog: int
    live: int
    live_wait_s: float
    overtaking: int


def cut_network(
    broker: Mosquitto, folder: Path, how: Cut, *, cut_s: float, backlog: int, patience_s: float = 90.0,
    bytes_per_s: float | None = None, options: tuple[str, ...] = (),
) -> tuple[Path, Recovery]:  # fmt: skip
    """Let a box alert 20 times a second, cut its line for ``cut_s`` in which ``backlog`` more alerts come, go on.

    Args:
        broker: that runs.
        folder: for outbox and history.
        how: the line is cut.
        cut_s: for so long.
        backlog: alerts in a burst while it is cut.
        patience_s: how long after the return everything has to have arrived.
        bytes_per_s: of the line, so that a backlog takes its time; None for a fast one.
        options: more of the box.

    Returns:
        The history, and what it shows.
    """
    history = folder / "history.jsonl"
    with Listener(broker.port, history) as listener, FaultProxy(broker.port) as proxy:
        url = f"mqtt://127.0.0.1:{proxy.port}"
        with running_alert_box(folder, history, url, *options) as box:
            assert listener.wait_for_count(5, 20), "the box does not alert"
            began = time.monotonic()
            _cut(proxy, how)
            command(box, f"burst {backlog}")
            # The cut itself is what takes time.
            threading.Event().wait(max(0.0, began + cut_s - time.monotonic()))
            proxy.faults.bytes_per_s = bytes_per_s
            proxy.faults.hold = proxy.faults.refuse = False
            returned_ns = time.monotonic_ns()
            waiting = set(ids(read(history), Kind.ENQUEUED))
            listener.wait_for(waiting, quiet_s=patience_s)
            with contextlib.suppress(subprocess.TimeoutExpired):
                end(box, patience_s)
        listener.wait_for(set(ids(read(history), Kind.ENQUEUED)), quiet_s=min(2.0, patience_s / 4))
    facts = read(history)
    return history, _recovery(facts, returned_ns)


def _cut(proxy: FaultProxy, how: Cut) -> None:
    if how is Cut.BLACK_HOLE:
        proxy.faults.hold = True
        return
    proxy.faults.refuse = True
    if how is Cut.RESET:
        proxy.reset()
    else:
        proxy.sever()


def _recovery(facts: list[Fact], returned_ns: int) -> Recovery:
    made = {fact.id: fact.at_ns for fact in facts if fact.kind is Kind.ENQUEUED}
    arrived: dict[Id, int] = {}
    for fact in facts:
        if fact.kind is Kind.DELIVERED:
            arrived.setdefault(fact.id, fact.at_ns)
    after = [at for at in arrived.values() if at > returned_ns]
    resumed_ns = min(after, default=None)
    backlog = {
        found for found, at in made.items() if at <= returned_ns and arrived.get(found, returned_ns) >= returned_ns
    }
    if resumed_ns is None or not backlog <= arrived.keys():
        return Recovery(check(facts), float("inf"), float("inf"), len(backlog), 0, float("inf"), 0)
    drained_ns = max((arrived[found] for found in backlog), default=resumed_ns)
    live = [found for found, at in made.items() if resumed_ns < at < drained_ns]
    waits = [(arrived.get(found, 2**63) - made[found]) / 1e9 for found in live]
    return Recovery(
        report=check(facts),
        resumed_s=(resumed_ns - returned_ns) / 1e9,
        drained_s=(drained_ns - resumed_ns) / 1e9,
        backlog=len(backlog),
        live=len(live),
        live_wait_s=max(waits, default=0.0),
        overtaking=sum(arrived.get(found, 2**63) < drained_ns for found in live),
    )


@contextmanager
def running_alert_box(
    folder: Path, history: Path, url: str, *options: str, before: Sequence[str] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A box of :mod:`tests.faults.alert_box` that takes commands; killed at the end where it has not ended."""
    program = [*before, sys.executable, "-m", "tests.faults.alert_box", "--outbox", str(folder / "outbox.db")]
    program += ["--history", str(history), "--url", url, "--commands", *options]
    with subprocess.Popen(program, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as box:
        assert box.stdout is not None
        try:
            assert box.stdout.readline() == "ready\n", "the box did not start"
            yield box
        finally:
            box.kill()


def end(box: subprocess.Popen[str], timeout: float) -> None:
    """Let a box make no more alerts, send what it has, and end."""
    assert box.stdin is not None
    box.stdin.write("end\n")
    box.stdin.flush()
    box.wait(timeout)


def command(box: subprocess.Popen[str], line: str) -> int:
    """Have a box do something and wait until it is done; returns how much of it was refused."""
    assert box.stdin is not None
    assert box.stdout is not None
    box.stdin.write(f"{line}\n")
    box.stdin.flush()
    word, _, refused = box.stdout.readline().partition(" ")
    assert word == "done", f"the box did not do {line!r}"
    return int(refused)
