"""Commands to a box over a real broker: an answer, a refusal, and nobody there."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edge.alerts.commander import Commander
from edge.alerts.message import gap_maker
from edge.alerts.outbox import Draft, Outbox, Priority
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings
from edge.alerts.topics import Identity
from edge.errors import BrokerError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
LINEWARD = [str(Path(sys.executable).parent / "lineward")]


@pytest.fixture
def box(mosquitto: Mosquitto, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The publisher of a box with three messages in its outbox; gives the box's name and the outbox's epoch."""
    name = uuid.uuid4().hex
    identity = Identity(site="plant", box=name)
    with Outbox(tmp_path / "outbox.db", make_gap=gap_maker(identity)) as outbox:
        drafts = [Draft(identity.alert("cam"), lambda _epoch, _seq: b"{}", Priority.HIGH) for _ in range(3)]
        outbox.append_many(drafts)
        publisher = Publisher(settings=BrokerSettings(url=mosquitto.url), identity=identity, outbox=outbox)
        publisher.start()
        assert publisher.wait_until_drained(10)
        yield name, outbox.epoch
        publisher.stop(2)


def test_commander_answer(mosquitto: Mosquitto, box: tuple[str, str]) -> None:
    name, epoch = box
    with Commander(BrokerSettings(url=mosquitto.url), site="plant", box=name) as commander:
        for first, last, count in ((1, 1, 1), ("2", "3", 2)):  # numbers may be text, as a command line gives them
            result = commander.ask("replay", {"epoch": epoch, "from": first, "to": last})
            assert (result.ok, result.count) == (True, count)


@pytest.mark.parametrize(
    ("verb", "fields", "word"),
    [("reboot", {}, "known are accept, .*replay, .*ship"), ("accept", {"camera": "cam"}, "camera_seq or part_id"),
     ("ship", {"now": True}, "unknown key")],
)  # fmt: skip
def test_commander_refuses_before_it_connects(verb: str, fields: dict[str, object], word: str) -> None:
    with (
        Commander(BrokerSettings(url="mqtt://127.0.0.1:1"), site="plant", box="box") as commander,
        pytest.raises(UsageError, match=word),
    ):
        commander.ask(verb, fields)


def test_commander_nobody_answers(mosquitto: Mosquitto) -> None:
    with (
        Commander(BrokerSettings(url=mosquitto.url), site="plant", box="nobody") as commander,
        pytest.raises(BrokerError, match="no answer to ship"),
    ):
        commander.ask("ship", {}, timeout=0.5)


def test_command_line(mosquitto: Mosquitto, box: tuple[str, str]) -> None:
    name, epoch = box
    base = [*LINEWARD, "command", "--broker", mosquitto.url, "--site", "plant", "--box", name]
    done = subprocess.run(
        [*base, "replay", "--set", f"epoch={epoch}", "--set", "from=1", "--set", "to=3"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, "count 3" in done.stdout) == (0, True), done.stderr
    refused = subprocess.run([*base, "ship"], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 3
    assert "unknown command" in refused.stderr
