"""A box as its own process, and what a subscriber receives from it.

It knows the published messages and the command line, nothing from inside the box.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from edge.alerts.message import Alert, Availability, Status
from edge.alerts.settings import parse_broker_url
from edge.alerts.subscriber import Subscriber
from edge.alerts.topics import Kind
from edge.errors import LinewardError
from edge.frames import EventPhase
from trainer.evaluation.replay import Span

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy.typing as npt

    from edge.alerts.subscriber import Received

STOP_SECONDS = 15.0
"""How long a box may take to stop when it is asked to."""

CONNECT_SECONDS = 15.0
"""How long the broker may take to accept the subscriber."""


class BoxFailedError(LinewardError):
    """The box ended before its source did; the message has its last words."""


@dataclass
class Replay:
    """What a subscriber received while a box judged one source.

    Attributes:
        alerts: in order of arrival, duplicates dropped.
        status: the last one of the box; None if there was none.
        received_ms: per alert, milliseconds from capture of the frame to its receipt here (one clock, one machine).
    """

    alerts: list[Alert] = field(default_factory=list)
    status: Status | None = None
    received_ms: list[float] = field(default_factory=list)

    def events(self, last_frame: int) -> tuple[Span, ...]:
        """Return the frames of each event; one that has no end lasts until ``last_frame``."""
        first: dict[str, int] = {}
        last: dict[str, int] = {}
        for alert in self.alerts:
            first.setdefault(alert.event_id, alert.camera_seq)
            last[alert.event_id] = alert.camera_seq if alert.phase is EventPhase.END else last_frame
        return tuple(Span(start, max(start, last[event])) for event, start in first.items())

    def latency_ms(self) -> npt.NDArray[np.float64]:
        """Return the milliseconds from capture to receipt of the alerts that began an event."""
        began = [alert.phase is EventPhase.NEW for alert in self.alerts]
        return np.array(self.received_ms, np.float64)[np.array(began, bool)] if began else np.zeros(0)


def replay(config: Path, *, broker: str, log: Path, on_alert: Callable[[Alert], None], timeout: float) -> Replay:
    """Run a box on a source that ends, and collect what it publishes.

    Args:
        config: its settings file.
        broker: address of the broker, as in the settings.
        log: file for what the box prints.
        on_alert: called for each alert as it arrives.
        timeout: seconds after which a box that is still running is stopped.

    Raises:
        BoxFailedError: the box ended with an error, or did not end in time.
        BrokerError: the broker cannot be reached.
    """
    collected = Replay()
    kinds = frozenset({Kind.ALERT, Kind.STATUS, Kind.AVAILABLE})
    with Subscriber(parse_broker_url(broker), kinds=kinds) as subscriber:
        subscriber.wait_until_ready(CONNECT_SECONDS)
        with lineward_process("run", "--config", str(config), log=log) as box:
            deadline = time.monotonic() + timeout
            while True:
                received = subscriber.receive(timeout=0.5)
                if received is not None and _collect(collected, received, on_alert):
                    break
                if received is None and box.poll() is not None:
                    break
                if time.monotonic() > deadline:
                    raise BoxFailedError(f"the box did not come to an end within {timeout:.0f} s; see {log}")
            if box.wait(STOP_SECONDS) != 0:
                words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
                raise BoxFailedError(f"the box ended with code {box.returncode}: {words[-1]}; see {log}")
    return collected


def _collect(collected: Replay, received: Received, on_alert: Callable[[Alert], None]) -> bool:
    """Take one message; return whether it is the box's last one."""
    message = received.message
    if isinstance(message, Status):
        collected.status = message
    elif isinstance(message, Alert):
        collected.alerts.append(message)
        # Both clocks are this machine's monotonic one; the message has whole milliseconds.
        collected.received_ms.append(received.received_ns / 1e6 - message.uptime_ms)
        on_alert(message)
    return isinstance(message, Availability) and message.value == "stopped"


@contextlib.contextmanager
def lineward_process(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `lineward` with arguments as a process of its own and stop it at the end, whatever happens.

    Args:
        arguments: the verb and its options.
        log: file for what it prints.
    """
    with log.open("wb") as output:
        command = [sys.executable, "-c", "from edge.cli import main; main()", *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)  # noqa: S603 (our own command)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
