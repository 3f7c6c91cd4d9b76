"""Boxes whose disk is full for a while, a real file system of a few megabytes, filled to the last byte."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge.alerts.message import Status
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import Subscriber
from edge.alerts.topics import Kind as TopicKind
from tests.faults.fault_proxy import FaultProxy
from tests.faults.history import Kind, Report, check, ids, read
from tests.faults.listener import Listener
from tests.faults.network_cut import command, end, running_alert_box
from tests.faults.whole_box import ROOT, SmallDisk, log_of, make_line, running_box, write_settings
from tests.mosquitto_process import free_port

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

_DISK_MB = 24
_FEW, _DRAIN_S = 100, 30.0
_NAMES = "lineward_up_seconds|lineward_frames_judged_total|lineward_outbox_depth"
_SAMPLE = re.compile(rf"^({_NAMES})(?:\{{[^}}]*\}})? ([0-9.e+]+)$", re.MULTILINE)
# The box makes the page of its figures again after a second at the latest.
_PAGE_S = 1.2


@dataclass
class Disk:
    """What became of the messages of a box.

    Attributes:
        report: of the checker.
        produced: messages that the box has made, accepted or not.
        present: of them, those that arrived.
        counted: how many the box says it has lost.
        ratios: frames judged per second with the disk full, as a share of those before, one per round.
        recovered_s: from the return of space to the next message that was stored, the longest.
        pictures: of evidence that lie on the disk at the end.
    """

    report: Report
    produced: int
    present: int
    counted: int
    ratios: list[float] = field(default_factory=list)
    recovered_s: float = 0.0
    pictures: int = 0

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def exact(self) -> bool:
        return self.produced - self.present == self.counted


def fill_under_outbox(broker: Mosquitto, folder: Path, *, rows: int) -> Disk:
    """Fill the disk under a box that only alerts, append more than it has room for, free it, append again."""
    history = folder / "history.jsonl"
    disk = SmallDisk(folder / "disk", size_mb=_DISK_MB)
    with Listener(broker.port, history) as listener, FaultProxy(broker.port) as proxy:
        url = f"mqtt://127.0.0.1:{proxy.port}"
        with running_alert_box(folder / "disk", history, url, before=disk.before) as box:
            assert command(box, "burst 100") == 0
            proxy.faults.refuse = True
            proxy.reset()
            disk.fill(box.pid)
            refused = command(box, f"burst {rows}")
            disk.free(box.pid)
            freed_ns = time.monotonic_ns()
            assert command(box, f"burst {rows}") == 0, "space is back, and messages are refused"
            proxy.faults.refuse = False
            # Its files go with it: it must have sent everything.
            end(box, 60.0)
        listener.wait_for(set(ids(read(history), Kind.ENQUEUED)), quiet_s=5.0)
    return _found(history, refused, [], [freed_ns])


def refused_while_full(broker: Mosquitto, folder: Path, *, rows: int, options: tuple[str, ...] = ()) -> int:
    """How many of ``rows`` messages a box refuses whose disk is full and whose broker takes everything."""
    history = folder / "history.jsonl"
    disk = SmallDisk(folder / "disk", size_mb=_DISK_MB)
    with running_alert_box(folder / "disk", history, broker.url, *options, before=disk.before) as box:
        assert command(box, "burst 100") == 0
        disk.fill(box.pid)
        return command(box, f"burst {rows}")


def restart_on_full_disk(
    broker: Mosquitto, folder: Path, *, rows: int, options: tuple[str, ...] = ()
) -> tuple[Path, int]:
    """Let a box alert and end in order, fill the disk, and start it again to do the same.

    Returns:
        The history, and how the second box has ended: 0, or as Python ends on an error.
    """
    history = folder / "history.jsonl"
    disk = SmallDisk(folder / "disk", size_mb=_DISK_MB)
    program = [sys.executable, "-m", "tests.faults.alert_box", "--outbox", str(folder / "disk" / "outbox.db")]
    program += ["--history", str(history), "--url", broker.url, "--rows", str(rows), "--rate", "200", *options]
    with (
        Listener(broker.port, history) as listener,
        subprocess.Popen([*disk.before, "sh", "-c", "echo mounted; exec sleep 300"], stdout=subprocess.PIPE) as holder,
    ):
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"mounted\n"
            enter = ["nsenter", "--target", str(holder.pid), "--user", "--mount", "--preserve-credentials"]
            ended = []
            for _ in range(2):
                found = subprocess.run([*enter, *program], cwd=ROOT, timeout=60, check=False, capture_output=True)
                ended.append(found.returncode)
                disk.fill(holder.pid)
        finally:
            holder.kill()
        assert ended[0] == 0, "the first box has not ended in order"
        listener.wait_for(set(ids(read(history), Kind.ENQUEUED)), quiet_s=5.0)
    return history, ended[1]


def fill_under_box(broker: Mosquitto, folder: Path, *, rounds: int, phase_s: float, **settings: object) -> Disk:
    """Fill the disk under a whole box that judges as fast as it can, and free it, in turns.

    In both phases the box has no broker: what it has no room for can go nowhere, and sending costs neither its pace.
    Between rounds it has one, until little is left to send.

    Args:
        broker: that runs.
        folder: for everything but the box's state.
        rounds: of a phase with space and one without.
        phase_s: how long each lasts.
        settings: more of the box.

    Returns:
        What became of its messages, and of its pace.
    """
    history = folder / "history.jsonl"
    disk = SmallDisk(folder / "disk", size_mb=_DISK_MB)
    bundle, images = make_line(folder)
    port, freed, ratios, status = free_port(), [], [], []
    with (
        Subscriber(BrokerSettings(url=broker.url), kinds=frozenset({TopicKind.STATUS})) as statuses,
        Listener(broker.port, history) as listener,
        FaultProxy(broker.port) as proxy,
    ):
        statuses.wait_until_ready(10)
        config = write_settings(
            folder, bundle, images, f"mqtt://127.0.0.1:{proxy.port}", fps=None, state_dir=folder / "disk" / "state",
            metrics={"port": port}, **settings,
        )  # fmt: skip
        with running_box(config, history, before=disk.before) as box:
            assert listener.wait_for_count(20, 60), log_of(config)
            for _ in range(rounds):
                proxy.faults.refuse = True
                proxy.reset()
                with_space = _rate(port, phase_s)
                disk.fill(box.pid)
                ratios.append(_rate(port, phase_s) / with_space)
                disk.free(box.pid)
                freed.append(time.monotonic_ns())
                proxy.faults.refuse = False
                _drain(port)
            # Not by a glob: folders go while it looks.
            folders = os.walk(disk.inside(box.pid))
            pictures = sum(name.endswith(".jpg") for _, _, names in folders for name in names)
            _end(box, config)
        listener.wait_for(set(ids(read(history), Kind.ENQUEUED)), quiet_s=5.0)
        while (received := statuses.receive(1.0)) is not None:
            if isinstance(received.message, Status):
                status.append(received.message)
    found = _found(history, status[-1].drops.get("messages_lost", 0), ratios, freed)
    found.pictures = pictures
    return found


def _drain(port: int) -> None:
    """Wait until few messages wait, or for half a minute: the box makes new ones meanwhile."""
    deadline = time.monotonic() + _DRAIN_S
    while _sample(port)["lineward_outbox_depth"] > _FEW and time.monotonic() < deadline:
        pass


def _end(box: subprocess.Popen[bytes], config: Path) -> None:
    threading.Event().wait(_PAGE_S)  # time to alert once more
    box.terminate()
    assert box.wait(30) == 0, log_of(config)


def _rate(port: int, seconds: float) -> float:
    """Frames judged per second of the box's own time, over about so many seconds."""
    began = _sample(port)
    threading.Event().wait(seconds)
    ended = _sample(port)
    judged, up = (ended[name] - began[name] for name in ("lineward_frames_judged_total", "lineward_up_seconds"))
    return judged / up


def _sample(port: int) -> dict[str, float]:
    threading.Event().wait(_PAGE_S)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return {name: float(value) for name, value in _SAMPLE.findall(answer.read().decode())}


def _found(history: Path, counted: int, ratios: list[float], freed: list[int]) -> Disk:
    facts = read(history)
    # A message that is made again after the file has grown is still one.
    produced = {fact.content for fact in facts if fact.kind is Kind.ATTEMPTED}
    present = {fact.content for fact in facts if fact.kind is Kind.DELIVERED}
    stored = [fact.at_ns for fact in facts if fact.kind is Kind.ENQUEUED]
    waits = [min((at for at in stored if at > moment), default=2**63) - moment for moment in freed]
    return Disk(check(facts), len(produced), len(present), counted, ratios, max(waits) / 1e9)
