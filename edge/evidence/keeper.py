"""EvidenceKeeper: keeps pictures of what a box found, off the hot path, and answers for them on command.

A queue or disk that is full costs evidence, which is counted; it never holds up a verdict.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING, Any

from edge.alerts.command_messages import EvidenceCommand
from edge.alerts.topics import EVIDENCE_VERB
from edge.errors import EvidenceError, MessageError
from edge.evidence.answers import answer
from edge.evidence.collector import Begin, Close, Collector
from edge.evidence.store import EvidenceStore
from edge.frames import EventPhase

if TYPE_CHECKING:
    from pathlib import Path

    from edge.alerts.message import AnyMessage
    from edge.alerts.publisher import Publisher
    from edge.bundle import Bundle
    from edge.evidence.case import Case
    from edge.evidence.collector import Work
    from edge.evidence.settings import EvidenceSettings
    from edge.frames import JudgedFrame
    from edge.health.metrics import Metrics
    from edge.settings import Mode

_LOG = logging.getLogger(__name__)
EVIDENCE_FOLDER = "evidence"
FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 60.0
# Asked for at one time; whoever asks for more is told so.
_MAX_QUESTIONS = 32
# nice(2): compressing gives way to judging where both want the same core.
_NICENESS = 10


class EvidenceState(str, Enum):
    """``refused``: the disk takes nothing now; tried again after 5 s, then later and later, up to 60 s."""

    STARTING = "starting"
    KEEPING = "keeping"
    REFUSED = "refused"
    STOPPED = "stopped"


class EvidenceKeeper:
    """A part of the box. :meth:`keep` is called by the cameras.

    Args:
        settings: what is kept.
        root: its folder.
        metrics: counts ``evidence_written``, ``evidence_dropped`` and ``evidence_frames_left_out``.
    """

    name = "evidence"

    def __init__(self, settings: EvidenceSettings, *, root: Path, metrics: Metrics) -> None:
        self._settings, self._root, self._metrics = settings, root, metrics
        self._store = EvidenceStore(root, max_bytes=settings.max_mb * 2**20, min_free=settings.min_free_mb * 2**20)
        self._collector = Collector(settings)
        self._publisher: Publisher | None = None
        self._questions: queue.Queue[EvidenceCommand | None] = queue.Queue(_MAX_QUESTIONS)
        self._state, self._reason = EvidenceState.STARTING, ""
        self._retry_s, self._retry_at = FIRST_RETRY_S, 0.0
        self._written = 0
        self._counted = {"evidence_dropped": 0, "evidence_frames_left_out": 0}
        self._threads = [
            threading.Thread(target=self._write_all, name="evidence", daemon=True),
            threading.Thread(target=self._answer_all, name="evidence-answers", daemon=True),
        ]

    def attach(self, publisher: Publisher) -> None:
        """Answer ``cmd/evidence`` from now on."""
        self._publisher = publisher
        publisher.on_command(EVIDENCE_VERB, self.command)

    def keep(self, judged: JudgedFrame, bundle: Bundle, mode: Mode) -> JudgedFrame:
        """Take what belongs to an event; never waits and never raises.

        Returns:
            The same frame, with the reference in its verdict (triggered) or in the event that begins with it.
        """
        refusing = self._state is EvidenceState.REFUSED and time.monotonic() < self._retry_at
        reference = self._collector.take(judged, bundle, mode, refusing=refusing)
        if reference is None:
            return judged
        if not judged.events:
            return dataclasses.replace(judged, verdict=dataclasses.replace(judged.verdict, evidence=reference))
        events = tuple(
            dataclasses.replace(event, evidence=reference) if event.phase is EventPhase.NEW else event
            for event in judged.events
        )
        return dataclasses.replace(judged, events=events)

    def command(self, command: AnyMessage) -> dict[str, Any] | None:
        """Take a question; the answer follows from a thread of its own, since a disk may be slow."""
        assert isinstance(command, EvidenceCommand)
        try:
            self._questions.put_nowait(command)
        except queue.Full:
            return {"ok": False, "id": command.id, "reason": "too many questions at a time; ask again"}
        return None

    def start(self) -> None:
        """Begin; a folder that cannot be used is tried again and shown, and stops nothing."""
        for thread in self._threads:
            thread.start()

    def request_stop(self) -> None:
        """Write what there is; frames of the last moments still count."""
        self._collector.close_all()

    def stop(self, timeout: float) -> bool:
        """Write what is left and end; False where that takes longer than ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        self._collector.end()
        with contextlib.suppress(queue.Full):
            self._questions.put_nowait(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def status(self) -> dict[str, Any]:
        """What the box's status says of it."""
        collector = self._collector
        return {
            "state": self._state.value,
            "reason": self._reason,
            "kept": len(self._store),
            "bytes": self._store.occupied,
            "waiting_bytes": collector.waiting_bytes,
            "gathering": collector.cases,
            "written": self._written,
            "removed": self._store.removed,
            "dropped": collector.dropped,
            "frames_left_out": collector.frames_left_out,
        }

    def warnings(self) -> list[str]:
        """Says that nothing is kept, and why."""
        return [f"no evidence is kept: {self._reason}"] if self._state is EvidenceState.REFUSED else []

    def _write_all(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        if self._opened():
            self._enter(EvidenceState.KEEPING)
        while (work := self._collector.next()) is not None:
            self._do(work)
            self._collector.done(work)
            self._count()
        self._enter(EvidenceState.STOPPED)

    def _do(self, work: Work) -> None:
        case = work.case
        if case.failed:
            return
        try:
            if isinstance(work, Begin):
                case.show(quality=self._settings.quality)
            elif isinstance(work, Close):
                self._write(case)
            else:
                case.add(work.picture, work.place, quality=self._settings.quality)
        except Exception as error:  # noqa: BLE001 (one event's evidence is isolated: the next may be kept again)
            case.failed = True
            self._collector.drop()
            _LOG.error("evidence %s is not kept: %s: %s", case.reference, type(error).__name__, error, exc_info=error)

    def _write(self, case: Case) -> None:
        if self._state is not EvidenceState.KEEPING and not self._opened():
            self._collector.drop()
            return
        try:
            self._store.write(case.reference, case.complete())
        except (OSError, EvidenceError) as error:
            self._collector.drop()
            self._refuse(error)
        else:
            self._written += 1
            self._metrics.count("evidence_written")
            self._retry_s = FIRST_RETRY_S
            self._enter(EvidenceState.KEEPING)

    def _opened(self) -> bool:
        """Whether the folder can be used; it is looked through again, since what was there may be gone."""
        if time.monotonic() < self._retry_at:
            return False
        try:
            self._store.open()
        except (OSError, EvidenceError) as error:
            self._refuse(error)
            return False
        return True

    def _refuse(self, error: Exception) -> None:
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)
        told = f"{self._root}: {error.strerror}" if isinstance(error, OSError) else str(error)
        self._enter(EvidenceState.REFUSED, f"{told}; make room on this disk, or lower max_mb")

    def _enter(self, state: EvidenceState, reason: str = "") -> None:
        before, self._state, self._reason = self._state, state, reason
        if before is not state:
            level = logging.WARNING if state is EvidenceState.REFUSED else logging.INFO
            _LOG.log(level, "evidence: %s -> %s%s", before.value, state.value, f": {reason}" if reason else "")

    def _count(self) -> None:
        """Bring the box's counters up to what the cameras' threads have counted."""
        for name, value in (
            ("evidence_dropped", self._collector.dropped),
            ("evidence_frames_left_out", self._collector.frames_left_out),
        ):
            if value > self._counted[name]:
                self._metrics.count(name, value - self._counted[name])
                self._counted[name] = value

    def _answer_all(self) -> None:
        while (command := self._questions.get()) is not None:
            try:
                said = answer(self._store, command)
            except EvidenceError as error:
                said = {"ok": False, "reason": str(error)[:500]}
            except Exception as error:  # noqa: BLE001 (one question is isolated: the next may be answered)
                _LOG.error("evidence: a question cannot be answered: %s", error, exc_info=error)
                said = {"ok": False, "reason": "the evidence cannot be read, see the box's log"}
            assert self._publisher is not None
            try:
                self._publisher.answer(EVIDENCE_VERB, **{"id": command.id, **said})
            except MessageError as error:
                _LOG.error("evidence: an answer cannot be sent: %s", error)
