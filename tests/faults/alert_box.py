"""A box that does nothing but alert, to be killed: prints ``epoch seq`` once a row is accepted, as fast as it can."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from edge.alerts.message import gap_maker
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings
from tests.alert_values import IDENTITY, draft


def main(path: str, url: str, interval_s: str) -> None:
    outbox = Outbox(Path(path), make_gap=gap_maker(IDENTITY))
    settings = BrokerSettings(url=url, backoff_min_s=0.05, backoff_max_s=0.2, keepalive_s=5)
    Publisher(settings=settings, identity=IDENTITY, outbox=outbox).start()
    topic, make, priority = draft()
    pause = threading.Event()
    while True:
        seq = outbox.append(topic, make, priority=priority)
        sys.stdout.write(f"{outbox.epoch} {seq}\n")
        sys.stdout.flush()
        pause.wait(float(interval_s))


if __name__ == "__main__":
    main(*sys.argv[1:])
