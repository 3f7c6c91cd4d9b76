"""A broker that saves by time, killed with SIGKILL again and again, and a subscriber that was away meanwhile."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING

from edge.alerts.publisher import Publisher
from tests.alert_values import IDENTITY
from tests.faults.alert_box import RecordingOutbox, settings_for
from tests.faults.history import Kind, Report, check, ids, read
from tests.faults.listener import Listener

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

ROWS_PER_LIFE = 150
# A broker has no word for "that was all", and mosquitto sends a new message ahead of what it has kept.
QUIET_S = 3.0


def kill_broker(
    broker: Mosquitto, folder: Path, *, kills: int, seed: int, replay_seconds: float = 300.0, quiet_s: float = QUIET_S
) -> tuple[Path, Report]:
    """Let a box alert, wait until the broker has acknowledged all, kill it at a random moment; then ask for all.

    Args:
        broker: with ``autosave_s=1``.
        folder: for outbox and history.
        kills: of the broker.
        seed: of the moments.
        replay_seconds: of the outbox; 0 in a control run.
        quiet_s: without a message, after which none is waited for.

    Returns:
        The history, and what it shows. The broker keeps no order for a client that was away.
    """
    rng = random.Random(seed)
    history = folder / "history.jsonl"
    subscriber = Listener(broker.port, history, session="integrator")
    subscriber.come()
    subscriber.leave()
    broker.save()
    with (
        RecordingOutbox(folder / "outbox.db", history, replay_seconds=replay_seconds) as outbox,
        Publisher(settings=settings_for(broker.url), identity=IDENTITY, outbox=outbox) as publisher,
    ):
        for life in range(1, kills + 1):
            for _ in range(ROWS_PER_LIFE // 10):
                outbox.alert(count=10)
            assert publisher.wait_until_drained(30), "the broker does not acknowledge"
            # Anywhere in the second between two saves.
            threading.Event().wait(rng.uniform(0, 1))
            broker.restart()
            # The broker that dies next need not have taken the replay; the last one does.
            connected = publisher._reconnector.wait_for(lambda n=life: publisher._reconnector.connections > n, 15)
            assert connected, "the box does not come back"
        assert publisher.wait_until_drained(60), "the replay does not end"
    subscriber.come()
    subscriber.wait_for(set(ids(read(history), Kind.ENQUEUED)), quiet_s=quiet_s)
    subscriber.leave()
    return history, check(read(history), lanes_ordered=False, whole=False)
