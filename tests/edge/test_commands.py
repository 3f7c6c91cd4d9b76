"""Commands: once per key, also after a restart; not after their expiry; not by a clock that cannot be trusted."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.alerts import commands as commands_module
from edge.alerts.command_messages import COMMANDS, CommandMessage, ReplayCommand, ShipCommand
from edge.alerts.commands import Clock, Commands
from edge.alerts.ledger import Ledger
from edge.alerts.message import build
from edge.errors import StoreError

if TYPE_CHECKING:
    from pathlib import Path

NOON = datetime(2030, 1, 2, 12, tzinfo=timezone.utc)


@dataclass
class Time:
    """A clock that can be set."""

    now: datetime = NOON
    synchronised: bool | None = True

    def clock(self) -> Clock:
        return Clock(now=lambda: self.now, synchronised=lambda: self.synchronised)


@dataclass
class Desk:
    """What a publisher does with commands: hands them on and publishes answers."""

    path: Path
    time: Time = field(default_factory=Time)
    done: list[CommandMessage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
        self.ledger = Ledger(self.path, max_keys=8)
        self.commands = Commands(self.ledger, clock=self.time.clock())

    def ask(self, verb: str = "ship", *, later: bool = False, **fields: Any) -> list[dict[str, Any]]:
        """The answers that follow at once; the command is done where it is handed on."""
        command = build(COMMANDS[verb], **fields)
        admission = self.commands.admit(verb, command)
        answers = [] if admission.answer is None else [admission.answer]
        if admission.command is not None:
            self.done.append(admission.command)
            if not later:
                answers += self.finish(admission.command)
        return answers

    def finish(self, command: CommandMessage) -> list[dict[str, Any]]:
        return self.commands.settle({"ok": True, "count": len(self.done), "id": command.id})


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path / "ledger.db")


def test_key_is_done_once_and_gets_the_first_answer_for_each_asker(desk: Desk) -> None:
    assert desk.ask(key="k", id="a") == [{"ok": True, "count": 1, "id": "a"}]
    assert desk.ask(key="k", id="b") == [{"ok": True, "count": 1, "id": "b"}]
    assert len(desk.done) == 1


def test_key_is_remembered_after_a_restart(desk: Desk) -> None:
    desk.ask(key="k", id="a")
    desk.restart()
    assert desk.ask(key="k", id="b") == [{"ok": True, "count": 1, "id": "b"}]
    assert len(desk.done) == 1


def test_command_without_key_is_done_each_time_under_its_own_id(desk: Desk) -> None:
    assert desk.ask(id="a") == [{"ok": True, "count": 1, "id": "a"}]
    assert desk.ask(id="a") == [{"ok": True, "count": 2, "id": "a"}]


def test_late_answer_goes_to_everybody_who_asked_meanwhile(desk: Desk) -> None:
    assert desk.ask(key="k", id="a", later=True) == []
    assert desk.ask(key="k", id="b", later=True) == []
    assert len(desk.done) == 1
    assert [one["id"] for one in desk.finish(desk.done[0])] == ["a", "b"]
    assert desk.ask(key="k", id="c")[0]["count"] == 1


def test_command_that_a_kill_interrupted_says_so_and_is_not_done_again(desk: Desk) -> None:
    desk.ask(key="k", id="a", later=True)
    desk.restart()
    (answer,) = desk.ask(key="k", id="b")
    assert (answer["ok"], answer["id"]) == (False, "b")
    assert answer["reason"].startswith("interrupted")
    assert len(desk.done) == 1


def test_key_of_another_command_is_refused(desk: Desk) -> None:
    epoch = "0" * 16
    desk.ask("replay", key="k", epoch=epoch, first=1, last=2)
    (answer,) = desk.ask("replay", key="k", epoch=epoch, first=1, last=3)
    assert (answer["ok"], "another command" in answer["reason"]) == (False, True)
    (answer,) = desk.ask("ship", key="k")
    assert "another command" in answer["reason"]
    assert len(desk.done) == 1


def test_same_key_with_another_expiry_is_the_same_command(desk: Desk) -> None:
    desk.ask(key="k", expires_at=NOON + timedelta(seconds=5))
    assert desk.ask(key="k", expires_at=NOON + timedelta(hours=5))[0]["ok"]
    assert len(desk.done) == 1


def test_expired_command_is_not_done_and_its_key_stays_free(desk: Desk) -> None:
    (answer,) = desk.ask(key="k", id="a", expires_at=NOON)
    assert (answer["ok"], answer["id"], answer["reason"].split(":")[0]) == (False, "a", "expired")
    assert desk.done == []
    assert desk.ask(key="k", expires_at=NOON + timedelta(seconds=1))[0]["ok"]


def test_answered_key_is_answered_after_its_expiry(desk: Desk) -> None:
    desk.ask(key="k", expires_at=NOON + timedelta(seconds=1))
    desk.time.now += timedelta(hours=1)
    assert desk.ask(key="k", expires_at=NOON + timedelta(seconds=1)) == [{"ok": True, "count": 1, "id": None}]


def test_expiry_in_another_zone_is_the_same_moment(desk: Desk) -> None:
    east = timezone(timedelta(hours=9))
    assert desk.ask(expires_at=(NOON + timedelta(seconds=1)).astimezone(east))[0]["ok"]
    assert not desk.ask(expires_at=(NOON - timedelta(seconds=1)).astimezone(east))[0]["ok"]


@pytest.mark.parametrize("key", [None, "k"])
def test_clock_without_a_time_server_refuses_commands_with_an_expiry_only(desk: Desk, key: str | None) -> None:
    desk.time.synchronised = False
    (answer,) = desk.ask(key=key, expires_at=NOON + timedelta(hours=1))
    assert (answer["ok"], answer["reason"].split(":")[0]) == (False, "clock")
    assert desk.ask(key=key)[0]["ok"]


def test_clock_set_back_refuses_an_expiry_also_after_a_restart_and_heals(desk: Desk) -> None:
    desk.commands.note_time()
    desk.time.now -= timedelta(days=365)
    desk.restart()
    (answer,) = desk.ask(expires_at=desk.time.now + timedelta(hours=1))
    assert (answer["ok"], answer["reason"].split(":")[0]) == (False, "clock")
    assert "2030-01-02" in answer["reason"]
    assert "clock" in desk.commands.set_back()
    desk.time.now = NOON + timedelta(seconds=1)
    assert desk.ask(expires_at=NOON + timedelta(hours=1))[0]["ok"]
    assert desk.commands.set_back() == ""


def test_time_of_a_clock_without_time_server_is_not_noted(desk: Desk) -> None:
    desk.time.synchronised = False
    desk.time.now += timedelta(days=365)
    desk.commands.note_time()
    desk.time.synchronised, desk.time.now = True, NOON
    assert desk.ask(expires_at=NOON + timedelta(seconds=1))[0]["ok"]


def test_time_is_noted_once_a_minute_only(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    monkeypatch.setattr(desk.ledger, "note_seen", noted.append)
    now = [1000.0]
    monkeypatch.setattr(commands_module.time, "monotonic", lambda: now[0])
    for step in (0, 1, 58, 2):
        now[0] += step
        desk.commands.note_time()
    assert len(noted) == 2


def test_command_that_cannot_be_noted_is_not_done(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StoreError("the disk is full; free space")

    monkeypatch.setattr(desk.ledger, "begin", full)
    (answer,) = desk.ask(key="k", id="a")
    assert (answer["ok"], answer["id"], "disk is full" in answer["reason"]) == (False, "a", True)
    assert desk.done == []
    assert desk.ask(id="b")[0]["ok"], "a command without a key needs no disk"


def test_answer_that_cannot_be_noted_is_given(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StoreError("the disk is full; free space")

    monkeypatch.setattr(desk.ledger, "finish", full)
    assert desk.ask(key="k", id="a")[0]["ok"]
    assert desk.ask(key="k", id="b")[0]["reason"].startswith("interrupted"), "but never done twice"
    assert len(desk.done) == 1


def test_answer_that_is_long_is_given_and_not_kept(desk: Desk) -> None:
    admission = desk.commands.admit("ship", build(ShipCommand, key="k", id="a"))
    assert admission.command is not None
    long = {"ok": True, "id": admission.command.id, "detail": {"bytes": "x" * 100_000}}
    assert desk.commands.settle(long)[0]["detail"] == long["detail"]
    (answer,) = desk.ask(key="k", id="b")
    assert (answer["ok"], "too long" in answer["reason"]) == (True, True)
    assert desk.path.stat().st_size < 100_000


def test_ledger_keeps_the_newest_keys(desk: Desk) -> None:
    for number in range(20):
        desk.ask(key=f"k{number}")
    assert len(desk.done) == 20
    desk.ask(key="k19")
    assert len(desk.done) == 20
    desk.ask(key="k0")
    assert len(desk.done) == 21, "so long ago that it is forgotten"


def test_damaged_ledger_is_put_aside_and_said(desk: Desk) -> None:
    desk.ask(key="k")
    desk.ledger.close()
    desk.path.write_bytes(b"no database" * 1000)
    for suffix in ("-wal", "-shm"):
        desk.path.with_name(desk.path.name + suffix).unlink(missing_ok=True)
    desk.restart()
    assert desk.ask(key="k")[0]["ok"]
    assert "kept as ledger.db.damaged" in desk.ledger.damage


def test_ledger_of_another_process_is_a_refusal_that_heals(desk: Desk) -> None:
    other = sqlite3.connect(desk.path, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    (answer,) = desk.ask(key="k")
    assert (answer["ok"], "in use" in answer["reason"]) == (False, True)
    other.execute("ROLLBACK")
    other.close()
    assert desk.ask(key="k")[0]["ok"]


def test_every_command_can_carry_key_and_expiry() -> None:
    for verb, model in COMMANDS.items():
        assert issubclass(model, CommandMessage), verb
        assert {"id", "key", "expires_at"} <= model.model_fields.keys()


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["ask", "ask later", "finish", "restart"]), st.sampled_from("abc")), max_size=30
    )
)
def test_no_history_does_a_key_twice(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]) -> None:
    desk = Desk(tmp_path_factory.mktemp("ledger") / "ledger.db")
    done: list[str] = []
    first: dict[str, dict[str, Any]] = {}
    running: dict[str, CommandMessage] = {}
    for step, key in steps:
        if step == "restart":
            desk.restart()
            running.clear()
        elif step == "finish":
            if key in running:
                desk.finish(running.pop(key))
        else:
            before = len(desk.done)
            for answer in desk.ask(key=key, later=step == "ask later"):
                assert first.setdefault(key, answer) == answer or answer["reason"].startswith("interrupted")
            if len(desk.done) > before:
                done.append(key)
                if step == "ask later":
                    running[key] = desk.done[-1]
    desk.ledger.close()
    assert len(done) == len(set(done))


def test_replay_keeps_its_own_fields() -> None:
    command = build(ReplayCommand, epoch="0" * 16, first=1, last=2, key="k", expires_at=NOON)
    assert json.loads(command.model_dump_json(by_alias=True))["expires_at"].endswith("Z")
