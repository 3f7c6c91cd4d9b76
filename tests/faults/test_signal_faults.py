"""What goes wrong with a signal is said in its state and counted, and nothing of it is judged; each with a control."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from edge.alerts.message import Alert, CameraState, Status
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.box import Box
from edge.capture.signal_wire import pack, to_text
from edge.settings import BoxSettings
from tests.edge.tiny_senses import bearing, make_signal_bundle, signal_layout
from tests.signal_sender import SignalSender

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 40.0
EVENTS = {"enter_hits": 1, "enter_window": 1, "leave_calm": 1}
GOOD = bearing(60)


@dataclass
class Line:
    """A box that watches one spindle, and what a subscriber has seen of it."""

    subscriber: Subscriber
    box: Box
    states: list[tuple[str, str]] = field(default_factory=list)
    alerts: list[Alert] = field(default_factory=list)
    shown: dict[str, Any] = field(default_factory=dict)

    def until(self, met: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SOON
        while not met():
            assert time.monotonic() < deadline, (self.states, self.shown)
            self.box.supervise()
            received = self.subscriber.receive(0.1)
            message = None if received is None else received.message
            if isinstance(message, CameraState):
                self.states.append((message.state, message.reason))
            elif isinstance(message, Alert):
                self.alerts.append(message)
            elif isinstance(message, Status):
                self.shown = dict(message.cameras.get("spindle") or {})

    def says(self, state: str, reason: str = "") -> bool:
        return bool(self.states) and self.states[-1][0] == state and reason in self.states[-1][1]

    def counts(self, name: str) -> int:
        return int({**self.shown.get("counters", {}), **self.shown.get("samples", {})}.get(name, 0))


@contextmanager
def watched(
    tmp_path: Path, mosquitto: Mosquitto, sender: SignalSender, *, stall_seconds: float = 60.0
) -> Iterator[Line]:
    bundle = make_signal_bundle(tmp_path / "bundle", signal_layout())
    source: dict[str, Any] = {"kind": "signal_tcp", "url": sender.url, "capacity": 64, "reconnect_seconds": 0.5}
    source["stall_seconds"] = stall_seconds
    settings = BoxSettings.model_validate(
        {
            "site": "plant", "box": "box1", "state_dir": tmp_path / "state", "bundle": bundle.path, "threads": 1,
            "status_every_s": 0.1, "broker": {"url": mosquitto.url},
            "signals": [{"name": "spindle", "source": source, "events": EVENTS}],
        }
    )  # fmt: skip
    with Subscriber(BrokerSettings(url=mosquitto.url), kinds=EVERYTHING) as subscriber:
        subscriber.wait_until_ready(SOON)
        box = Box(settings)
        box.start()
        try:
            line = Line(subscriber, box)
            sender.send(GOOD[:400])
            line.until(lambda: line.says("ok") and line.counts("judged") >= 3)
            yield line
        finally:
            box.request_stop()
            box.stop()


@pytest.mark.parametrize(("lost", "judged"), [(10, True), (60, False)], ids=["control", "too many"])
def test_window_that_lost_too_many_samples_is_not_judged(
    tmp_path: Path,
    mosquitto: Mosquitto,
    lost: int,
    judged: bool,  # noqa: FBT001
) -> None:
    with SignalSender(rate_hz=400) as sender, watched(tmp_path, mosquitto, sender) as line:
        line.states.clear()
        sender.lose(lost)
        at = sender.number
        sender.send(GOOD[at : at + 1000])
        line.until(lambda: line.counts("received") == 1400 and line.counts("judged") + line.counts("not_judged") >= 12)
        told = [reason for state, reason in line.states if state == "not_judged"]
        assert line.counts("lost") == lost
        assert (line.counts("not_judged") == 0) is judged
        assert bool(told) is not judged
        if not judged:
            assert "of the window's samples were lost, 5 % may be" in told[0]
            # Those behind the gap are judged again.
            assert line.says("ok")
        received, gone = line.counts("received"), line.counts("lost")
        assert received + gone == line.counts("windowed") + line.counts("pending") + line.counts("skipped")
        assert line.counts("captured") == sum(line.counts(name) for name in ("judged", "not_judged", "dropped"))


def test_silent_stream_is_not_judged_until_it_streams_again(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with SignalSender(rate_hz=400) as sender, watched(tmp_path, mosquitto, sender, stall_seconds=0.5) as line:
        line.until(lambda: line.says("not_judged", "no frame for"))
        line.until(lambda: line.shown["state"] == "stalled")
        sender.send(GOOD[400:800])
        line.until(lambda: line.says("ok"))
        line.until(lambda: line.counts("judged") >= 6)
        assert line.counts("lost") == 0


def test_stream_of_another_rate_is_not_judged_and_says_so(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with SignalSender(rate_hz=400) as sender, watched(tmp_path, mosquitto, sender) as line:
        sender.rate_hz = 403.0  # control: three quarters of a percent
        sender.send(GOOD[400:800])
        line.until(lambda: line.counts("judged") >= 6)
        assert line.counts("not_judged") == 0
        sender.rate_hz = 500.0
        sender.send(bearing(1, fault_at=0.0, fault_s=1.0))
        line.until(lambda: line.counts("not_judged") >= 3)
        assert line.says("not_judged", "the stream has 500 samples per second, the bundle judges 400")
        assert not line.alerts
        sender.rate_hz = 400.0
        sender.send(GOOD[1200:2000])
        line.until(lambda: line.says("ok"))


@pytest.mark.parametrize("form", [to_text, pack])
def test_broken_bytes_cost_their_samples_or_their_connection_and_no_more(
    tmp_path: Path, mosquitto: Mosquitto, form: Any
) -> None:
    with SignalSender(form=form) as sender, watched(tmp_path, mosquitto, sender) as line:
        data = bytearray(form_of(sender, GOOD[400:420]))
        # In a value; a broken newline would cost two lines.
        data[max(len(data) // 2, data.find(b".", len(data) // 2))] ^= 0x80
        sender.send_raw(bytes(data))
        if form is pack:
            # Nobody knows where the next message begins: a new connection, and what it brings has later numbers.
            line.until(lambda: line.says("not_judged", "a packed message is damaged"))
            sender.hang_up()
            sender.wait_for_listener()
        sender.send(GOOD[420:1400])
        line.until(lambda: line.counts("received") >= 1360 and line.says("ok"))
        assert line.counts("lost") == (20 if form is pack else 1)
        assert line.counts("broken") == (0 if form is pack else 1)
        assert not line.alerts


def form_of(sender: SignalSender, samples: Any) -> bytes:
    """The bytes of the samples that follow, which then count as sent."""
    from edge.capture.signal_wire import Chunk

    first = sender.number
    sender.number += len(samples)
    return sender.form(Chunk(first, samples, sender.rate_hz))


def test_fault_of_a_bearing_is_alerted_in_seconds_and_by_its_channel(tmp_path: Path, mosquitto: Mosquitto) -> None:
    with SignalSender(rate_hz=400) as sender, watched(tmp_path, mosquitto, sender) as line:
        sender.send(bearing(2, fault_at=1.0, fault_s=0.2)[:800])
        line.until(lambda: bool(line.alerts))
        alert = line.alerts[0]
        assert alert.channels == ("drive end",)
        assert alert.span is not None
        assert 0 <= alert.span.from_s < alert.span.to_s <= 0.5
        assert alert.span.rate_hz == 400
