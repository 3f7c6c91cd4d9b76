"""Boxes killed with SIGKILL again and again while they alert; what their history says afterwards."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from edge.alerts.publisher import Publisher
from tests.alert_values import IDENTITY
from tests.faults.alert_box import RecordingOutbox, settings_for
from tests.faults.history import Kind, check, ids, read
from tests.faults.listener import Listener
from tests.mosquitto_process import free_port

if TYPE_CHECKING:
    from tests.faults.history import Report
    from tests.mosquitto_process import Mosquitto

ROOT = Path(__file__).parents[2]
QUIET_S = 3.0


def kill_alert_boxes(
    broker: Mosquitto, folder: Path, *, kills: int, rate: float, seed: int, durable: bool = True, life_s: float = 1.0
) -> tuple[Path, Report]:
    """Kill a box so many times at a random moment; then let one live until the broker has everything.

    Every other life is without a broker, every fourth is killed before it is sure to have started.

    Args:
        broker: that runs.
        folder: for the outbox and the history.
        kills: how many lives end so.
        rate: alerts per second.
        seed: of the moments.
        durable: whether one outbox outlives the boxes; the control has a new one in each life.
        life_s: longest time until the kill.

    Returns:
        The history, and what it shows.
    """
    rng = random.Random(seed)
    history = folder / "history.jsonl"
    dead = f"mqtt://127.0.0.1:{free_port()}"
    outbox = folder / "outbox.db"
    with Listener(broker.port, history) as listener:
        for life in range(kills):
            outbox = folder / ("outbox.db" if durable else f"outbox-{life}.db")
            url = dead if life % 2 else broker.url
            _live_and_die(outbox, history, url, rate, rng.uniform(0, life_s), wait=life % 4 != 0)
        with (
            RecordingOutbox(outbox, history) as last,
            Publisher(settings=settings_for(broker.url), identity=IDENTITY, outbox=last) as publisher,
        ):
            assert publisher.wait_until_drained(60), "what is left does not leave"
        listener.wait_for(set(ids(read(history), Kind.ENQUEUED)), quiet_s=QUIET_S)
    return history, check(read(history))


def _live_and_die(outbox: Path, history: Path, url: str, rate: float, seconds: float, *, wait: bool) -> None:
    command = [sys.executable, "-m", "tests.faults.alert_box", "--outbox", str(outbox), "--history", str(history)]
    command += ["--url", url, "--rate", str(rate)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as box:
        assert box.stdout is not None
        if wait:
            assert box.stdout.readline() == "ready\n", "the box did not start"
        try:
            code = box.wait(seconds)
        except subprocess.TimeoutExpired:
            box.kill()
        else:
            raise AssertionError(f"the box has ended by itself, with code {code}")
