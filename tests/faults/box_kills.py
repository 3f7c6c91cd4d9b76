"""Boxes killed with SIGKILL again and again while they alert; what their history says afterwards."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from edge.alerts.message import Alert
from edge.alerts.publisher import Publisher
from edge.frames import EventPhase
from tests.alert_values import IDENTITY
from tests.faults.alert_box import RecordingOutbox, settings_for
from tests.faults.history import Kind, check, ids, read
from tests.faults.listener import Listener
from tests.faults.whole_box import log_of, make_line, running_box, write_settings
from tests.mosquitto_process import free_port

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edge.alerts.message import Notice
    from tests.faults.history import Report
    from tests.mosquitto_process import Mosquitto

ROOT = Path(__file__).parents[2]
QUIET_S = 3.0


def kill_alert_boxes(
    broker: Mosquitto,
    folder: Path,
    *,
    kills: int,
    rate: float,
    seed: int,
    durable: bool = True,
    life_s: float = 1.0,
    quiet_s: float = QUIET_S,
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
        quiet_s: without a message, after which none is waited for.

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
        listener.wait_for(set(ids(read(history), Kind.ENQUEUED)), quiet_s=quiet_s)
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


def kill_whole_boxes(
    broker: Mosquitto, folder: Path, *, kills: int, fps: float, seed: int
) -> tuple[Path, Report, list[str]]:
    """Kill a whole box, which captures, judges and alerts, so many times; then end one in order.

    Returns:
        The history, what it shows, and what is wrong with the phases of events.
    """
    rng = random.Random(seed)
    history = folder / "history.jsonl"
    bundle, images = make_line(folder)
    config = write_settings(folder, bundle, images, broker.url, fps=fps, cameras=2)
    with Listener(broker.port, history) as listener:
        for life in range(kills):
            with running_box(config, history) as box:
                # One in four is killed while it starts.
                if life % 4:
                    assert listener.wait_for_count(len(listener.arrived) + 1, 30), log_of(config)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    box.wait(rng.uniform(0, 1))
                    raise AssertionError(f"the box has ended by itself: {log_of(config)}")
        with running_box(config, history) as box:
            assert listener.wait_for_count(len(listener.arrived) + 10, 30), log_of(config)
            box.terminate()
            assert box.wait(30) == 0, log_of(config)
        listener.wait_for(set(ids(read(history), Kind.ENQUEUED)), quiet_s=QUIET_S)
        return history, check(read(history)), wrong_phases(listener.arrived.values())


def wrong_phases(messages: Iterable[Alert | Notice]) -> list[str]:
    """Events that do not begin with ``new``, go on after ``end``, or change camera; an event may lack its end."""
    events: dict[str, list[Alert]] = defaultdict(list)
    for message in messages:
        if isinstance(message, Alert):
            events[message.event_id].append(message)
    found = []
    for name, alerts in events.items():
        alerts.sort(key=lambda alert: alert.seq)
        phases = [alert.phase for alert in alerts]
        inner = set(phases[1:-1])
        whole = phases[0] is EventPhase.NEW and inner <= {EventPhase.UPDATE} and EventPhase.NEW not in phases[1:]
        cameras = {alert.camera for alert in alerts}
        if not whole or len(cameras) != 1:
            found.append(f"event {name} of {', '.join(sorted(cameras))}: {' '.join(phase.value for phase in phases)}")
    return found
