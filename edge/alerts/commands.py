"""Whether a command is done: once per key, ever; never after its expiry; never by a clock that cannot be trusted.

Must not know what commands do, nor the broker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from edge.alerts.message import MAX_PAYLOAD_BYTES
from edge.alerts.wire import MAX_ID, format_utc
from edge.errors import StoreError
from edge.health.watchdog import clock_synchronised

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.alerts.command_messages import CommandMessage
    from edge.alerts.ledger import Ledger

LOG = logging.getLogger("lineward.commands")
# First words of the refusals, for programs that ask.
EXPIRED = "expired"
CLOCK = "clock"
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# A time server may set a clock back by less; a person or an empty battery sets it back by more.
_STEP_BACK = timedelta(seconds=2)
_NOTE_EVERY_S = 60.0
_MAX_RUNNING = 1024
_MAX_ASKERS = 16
# A longer answer (a file's bytes) is not kept: it can be asked for again, and the ledger stays small.
_MAX_ANSWER = 8192
_TOO_LONG = "it was done; the answer was too long to be kept, ask again with a new key"
_INTERRUPTED = "interrupted: the box ended while it did this; see whether it was done, and ask again with a new key"


def _now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(frozen=True, slots=True)
class Clock:
    """The box's UTC, and whether the kernel says that it follows a time server (None: it cannot say)."""

    now: Callable[[], datetime] = _now
    synchronised: Callable[[], bool | None] = clock_synchronised


@dataclass(frozen=True, slots=True)
class Admission:
    """What is to be done about a command: handed on as ``command``, answered with ``answer``, or nothing yet."""

    command: CommandMessage | None = None
    answer: dict[str, Any] | None = None


@dataclass(slots=True)
class _Running:
    key: str
    askers: list[str | None] = field(default_factory=list)


class Commands:
    """Stands between the broker and the handlers of commands. Any thread may call any method.

    A command with a key is handed on under an ``id`` of our own, by which its answer, at once or later, is known again.

    Args:
        ledger: where keys, answers and the latest time are kept.
        clock: the box's.
    """

    def __init__(self, ledger: Ledger, *, clock: Clock | None = None) -> None:
        self._ledger = ledger
        self._clock = clock or Clock()
        self._lock = threading.Lock()
        self._running: OrderedDict[str, _Running] = OrderedDict()
        self._noted = float("-inf")
        self._note_failed = False

    def admit(self, verb: str, command: CommandMessage) -> Admission:
        """Decide about a command; what it gives to hand on is noted on disk, where it has a key.

        A key that is known gets its first answer, also after the expiry: giving it changes nothing.
        """
        with self._lock:
            try:
                return self._admit(verb, command)
            except StoreError as error:
                return _refuse(command, f"it cannot be noted, so it was not done: {error}")

    def settle(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        """Note an answer; what to publish, for everybody who asked with its key.

        Args:
            values: fields of :class:`~edge.alerts.command_messages.CommandResult`; ``id`` as the handler got it.
        """
        with self._lock:
            running = self._running.pop(str(values.get("id")), None)
            if running is None:
                return [values]
            try:
                self._ledger.finish(running.key, _kept(values))
            except StoreError as error:
                # Who asked is told all the same; a repeated key hears after a restart that it was interrupted.
                LOG.warning("an answer cannot be noted: %s", error)
            return [values | {"id": asker} for asker in running.askers]

    def note_time(self) -> None:
        """Note the time now and then, so that a clock that is set back later is known to be wrong."""
        now = time.monotonic()
        if now - self._noted < _NOTE_EVERY_S:
            return
        self._noted = now
        if self._clock.synchronised() is not False:
            try:
                self._ledger.note_seen(_microseconds(self._clock.now()))
            except StoreError as error:
                if not self._note_failed:
                    LOG.warning("the time cannot be noted: %s", error)
                self._note_failed = True
            else:
                self._note_failed = False

    def trouble(self) -> str:
        """Why no expiry can be judged now, with the cure; empty where it can be.

        Raises:
            StoreError: the latest time cannot be read.
        """
        if self._clock.synchronised() is False:
            return (
                f"{CLOCK}: this box's clock follows no time server, so it cannot judge an expiry; let it follow one, or"
                " send the command without an expiry"
            )
        now, seen = self._clock.now(), _EPOCH + timedelta(microseconds=self._ledger.seen_us())
        if now < seen - _STEP_BACK:
            return (
                f"{CLOCK}: this box's clock says {format_utc(now)}, and has said {format_utc(seen)} before, so it"
                f" cannot judge an expiry; correct it. Was it the later time that was wrong, stop the box and remove"
                f" {self._ledger.path.name}"
            )
        return ""

    def set_back(self) -> str:
        """Why a clock that follows a time server cannot be trusted all the same; empty where it can be."""
        try:
            return "" if self._clock.synchronised() is False else self.trouble()
        except StoreError as error:
            return f"commands with a key or an expiry are refused: {error}"

    def _admit(self, verb: str, command: CommandMessage) -> Admission:
        digest = _digest(verb, command)
        known = None if command.key is None else self._ledger.find(command.key)
        if known is not None:
            return self._again(command, digest, known)
        if command.expires_at is not None and (refusal := self._expiry(command.expires_at)):
            return _refuse(command, refusal)
        if command.key is None:
            return Admission(command=command)
        self._ledger.begin(command.key, digest)
        token = secrets.token_hex(8)
        self._running[token] = _Running(command.key, [command.id])
        if len(self._running) > _MAX_RUNNING:
            self._running.popitem(last=False)
        return Admission(command=command.model_copy(update={"id": token}))

    def _again(self, command: CommandMessage, digest: str, known: tuple[str, str | None]) -> Admission:
        if known[0] != digest:
            return _refuse(command, "key: it was used for another command; draw a new one for each")
        if known[1] is not None:
            return Admission(answer=_read(known[1]) | {"id": command.id})
        running = next((one for one in self._running.values() if one.key == command.key), None)
        if running is None:
            return _refuse(command, _INTERRUPTED)
        if command.id not in running.askers and len(running.askers) < _MAX_ASKERS:
            running.askers.append(command.id)
        return Admission()

    def _expiry(self, moment: datetime) -> str:
        if trouble := self.trouble():
            return trouble
        now = self._clock.now()
        if now < moment:
            return ""
        return f"{EXPIRED}: it was to be done before {format_utc(moment)}, and this box's clock says {format_utc(now)}"


def id_of(payload: bytes) -> str | None:
    """The id of a command that is refused unread, so that whoever sent it knows the answer for its own."""
    try:
        found = json.loads(payload).get("id") if len(payload) <= MAX_PAYLOAD_BYTES else None
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) and len(found) <= MAX_ID else None


def _refuse(command: CommandMessage, reason: str) -> Admission:
    return Admission(answer={"ok": False, "id": command.id, "reason": reason[:500]})


def _read(answer: str) -> dict[str, Any]:
    found = json.loads(answer)
    return found if isinstance(found, dict) else {"ok": False, "reason": "the answer that was noted cannot be read"}


def _kept(values: dict[str, Any]) -> str:
    answer = json.dumps(values | {"id": None}, default=str)
    if len(answer) <= _MAX_ANSWER:
        return answer
    return json.dumps({"ok": bool(values.get("ok")), "reason": _TOO_LONG})


def _digest(verb: str, command: CommandMessage) -> str:
    fields = command.model_dump_json(by_alias=True, exclude={"id", "key", "expires_at"})
    return hashlib.sha256(f"{verb} {fields}".encode()).hexdigest()


def _microseconds(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)
