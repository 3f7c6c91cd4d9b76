"""The subscriber as a library: the documented programs run, holes are filled, and nobody else's code ends it."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edge.alerts.commander import ask_for_missing
from edge.alerts.message import Alert, gap_maker
from edge.alerts.mqtt import Incoming
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import Received, Subscriber
from edge.errors import BrokerError, CommandError
from tests.alert_values import IDENTITY, draft

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
PAGE = Path(__file__).parents[2] / "docs" / "subscribing.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
FAST = {"backoff_min_s": 0.05, "backoff_max_s": 0.2}


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with Outbox(tmp_path / "outbox.db", make_gap=gap_maker(IDENTITY)) as box:
        yield box


@pytest.fixture
def box(mosquitto: Mosquitto, outbox: Outbox) -> Iterator[Publisher]:
    with Publisher(settings=settings_for(mosquitto), identity=IDENTITY, outbox=outbox) as publisher:
        assert publisher.wait_until_drained(10)
        yield publisher


def settings_for(broker: Mosquitto) -> BrokerSettings:
    return BrokerSettings(url=broker.url, **FAST)  # type: ignore[arg-type]


def give(subscriber: Subscriber, outbox: Outbox, seq: int) -> None:
    """Have a subscriber receive a message that no broker was needed for."""
    subscriber._take(Incoming(IDENTITY.alert("cam"), draft().make(outbox.epoch, seq), retained=False))


def test_page_has_three_programs() -> None:
    assert len(PROGRAMS) == 3


@pytest.mark.parametrize("number", [0, 1, 2])
def test_program_of_the_page_runs(mosquitto: Mosquitto, box: Publisher, outbox: Outbox, number: int) -> None:
    program = PROGRAMS[number].replace("mqtt://broker.example:1883", mosquitto.url).replace("plant-1", IDENTITY.site)
    assert mosquitto.url in program
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    lines: list[str] = []
    said = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "cam" in line:
                said.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for _ in range(300):  # one until it listens
            outbox.append_many([draft()])
            if said.wait(0.1):
                break
        assert process.poll() is None
        assert said.is_set(), lines
    finally:
        process.kill()
        process.communicate()
        reader.join(5)


def test_holes_are_known_and_filled(mosquitto: Mosquitto, box: Publisher, outbox: Outbox) -> None:
    outbox.append_many([draft()] * 10)
    assert box.wait_until_drained(10)
    with Subscriber(settings_for(mosquitto)) as subscriber:
        subscriber.wait_until_ready(10)
        for seq in (1, 5):
            give(subscriber, outbox, seq)
        hole = {("plant", "box1", outbox.epoch): [(2, 4)]}
        assert subscriber.missing == hole
        assert ask_for_missing(settings_for(mosquitto), subscriber.missing) == 3
        seqs = set()
        while not {1, 2, 3, 4, 5} <= seqs:
            received = subscriber.receive(10)
            assert received is not None, seqs
            assert isinstance(received.message, Alert)
            seqs.add(received.message.seq)
        assert subscriber.missing == {}


def test_hole_of_another_epoch_is_nobodys(mosquitto: Mosquitto, box: Publisher) -> None:
    assert ask_for_missing(settings_for(mosquitto), {("plant", "box1", "0" * 16): [(1, 5)]}) == 0


def test_box_that_refuses_a_replay_is_an_error(mosquitto: Mosquitto, box: Publisher, outbox: Outbox) -> None:
    box.on_command("replay", lambda _: {"ok": False, "reason": "not now"})
    with pytest.raises(CommandError, match="not now"):
        ask_for_missing(settings_for(mosquitto), {("plant", "box1", outbox.epoch): [(1, 5)]})


def test_callback_gets_each_message_once_and_may_fail(outbox: Outbox, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []

    def act(received: Received) -> None:
        assert isinstance(received.message, Alert)
        seen.append(received.message.seq)
        if received.message.seq == 1:
            raise ZeroDivisionError

    subscriber = Subscriber(BrokerSettings(), on_received=act)
    for seq in (1, 1, 2):
        give(subscriber, outbox, seq)
    assert seen == [1, 2]
    assert (subscriber.counters["failed"], subscriber.counters["duplicates"]) == (1, 1)
    assert "ZeroDivisionError" in caplog.text


def test_messages_that_nobody_takes_are_dropped_and_missing(outbox: Outbox) -> None:
    subscriber = Subscriber(BrokerSettings(), max_waiting=2)
    for seq in (1, 2, 3, 4):
        give(subscriber, outbox, seq)
    assert subscriber.counters["overrun"] == 2
    assert subscriber.receive(0) is not None
    give(subscriber, outbox, 5)
    assert subscriber.missing == {("plant", "box1", outbox.epoch): [(3, 4)]}
    assert subscriber.receive(0) is not None
    give(subscriber, outbox, 3)
    assert subscriber.missing == {("plant", "box1", outbox.epoch): [(4, 4)]}, "a replay fills it"


def test_async_iteration_neither_blocks_nor_loses_when_cancelled(
    mosquitto: Mosquitto, box: Publisher, outbox: Outbox
) -> None:
    async def take(subscriber: Subscriber, count: int) -> list[int]:
        found: list[int] = []
        async for received in subscriber:
            assert isinstance(received.message, Alert)
            found.append(received.message.seq)
            if len(found) == count:
                break
        return found

    async def main() -> list[int]:
        with Subscriber(settings_for(mosquitto)) as subscriber:
            await asyncio.to_thread(subscriber.wait_until_ready, 10)
            idle = asyncio.create_task(take(subscriber, 1))
            await asyncio.sleep(0)
            idle.cancel()
            outbox.append_many([draft()] * 3)
            return await asyncio.wait_for(take(subscriber, 3), 10)

    assert asyncio.run(main()) == [1, 2, 3]


def test_async_iteration_ends_with_the_subscriber_and_raises_a_refusal(
    mosquitto: Mosquitto, make_mosquitto: Callable[..., Mosquitto]
) -> None:
    async def main(settings: BrokerSettings, *, stop: bool) -> None:
        with Subscriber(settings) as subscriber:
            if stop:
                asyncio.get_running_loop().call_later(0.05, subscriber._reconnector.stopping.set)
            async for _ in subscriber:
                pytest.fail("nobody published")

    asyncio.run(asyncio.wait_for(main(settings_for(mosquitto), stop=True), 10))
    locked = make_mosquitto(users={"anna": "right-password"})
    with pytest.raises(BrokerError, match="username"):
        asyncio.run(asyncio.wait_for(main(settings_for(locked), stop=False), 20))
