"""MemoryKeeper: the box's memory in one thread off the hot path: it learns, ships, tries and switches.

It drives the parts beside it; it must not know MQTT nor sockets.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from edge.adaptation.look import PLAIN
from edge.alerts.command_messages import AcceptCommand, ShipCommand
from edge.alerts.message import NoticeKind, Severity
from edge.alerts.topics import ACCEPT_VERB, SHIP_VERB
from edge.errors import DataError, LinewardError
from edge.inference.preprocessing import to_canvas
from edge.memory.banks import Banks
from edge.memory.camera_gates import CameraGates
from edge.memory.changeover import NO_COMMISSIONING
from edge.memory.commissioning import commissioning_of
from edge.memory.link_watch import LinkWatch
from edge.memory.recent import RecentFrame, RecentFrames
from edge.memory.sampling import Sampler

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edge.adaptation.look import Look
    from edge.adaptation.owner import DriftOwner
    from edge.alerts.wire import Message
    from edge.federation.link import FleetLink
    from edge.federation.update import FleetBank
    from edge.frames import Frame, Verdict
    from edge.health.metrics import Metrics
    from edge.inference.detector import Detector
    from edge.memory.changeover import Changeover, JudgedCamera, Notify
    from edge.memory.learner import Learner, Sender
    from edge.memory.progress import Progress
    from edge.memory.sampling import Sample
    from edge.memory.settings import MemorySettings
    from edge.memory.store import MemoryStore

    Answer = Callable[..., None]

_LOG = logging.getLogger(__name__)
MAX_COMMANDS = 64
TICK_S = 0.5
SAVE_EVERY_S = 300.0
NOTICE_EVERY_S = 3600.0
# Below the threads that judge, where the system allows it.
_NICENESS = 10


class MemoryKeeper:
    """Keeps the memory of one box.

    Args:
        settings: of the memory.
        detector: gives embeddings.
        cameras: by name; their judges say what is good.
        changeover: tries new memories and switches to them.
        learner: follows the line.
        store: keeps what was learned.
        progress: what was kept beside it.
        sender: names the box in its updates; without a fleet None.
        link: to the fleet, if any.
        notify: raises a notice: kind, severity, text and figures.
        answer: answers a command: verb and the fields of a result.
        metrics: counts ``memory_dropped`` and ``memory_failed``.
        remember: names of the cameras whose every frame can be declared good later (one part each).
        drift: says when the memory must not be switched, nor taught by a camera; without one nothing is held back.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        settings: MemorySettings,
        detector: Detector,
        cameras: Mapping[str, JudgedCamera],
        changeover: Changeover,
        learner: Learner,
        store: MemoryStore,
        progress: Progress,
        sender: Sender | None,
        link: FleetLink | None,
        notify: Notify,
        answer: Answer,
        metrics: Metrics,
        remember: frozenset[str] = frozenset(),
        drift: DriftOwner | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._detector, self._cameras = settings, detector, cameras
        self._changeover, self._learner, self._store = changeover, learner, store
        self._sender, self._link = sender, link
        self._watch = None if link is None else LinkWatch(link, notify, clock)
        self._notify, self._answer, self._metrics, self._clock = notify, answer, metrics, clock
        self._sampler = Sampler(every_s=settings.every_s, remember=remember, metrics=metrics, clock=clock)
        self._commands: queue.Queue[Message] = queue.Queue(MAX_COMMANDS)
        self._drift, self._recalibrate = drift, False
        self._recent = RecentFrames()
        self._gates = CameraGates(cameras, settings)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        now = clock()
        self._progress = progress
        self._ship_at = now + max(0.0, settings.ship_every_s - progress.since_ship_s)
        self._save_at = now + SAVE_EVERY_S
        self._saved_feeds = learner.feeds
        changeover.refused_fleet |= progress.refused_fleet
        self._commissioned = False
        self._trouble: dict[str, str] = {}
        self._noticed_at: dict[str, float] = {}
        self._last_ship = ""

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Finish the step in hand, keep what was learned and end."""
        self._stop.set()

    def join(self, timeout: float) -> bool:
        """Wait for the end; False where it takes longer than ``timeout`` seconds."""
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def offer(self, frame: Frame, verdict: Verdict, alarmed: bool, look: Look = PLAIN) -> None:  # noqa: FBT001 (a fact)
        """Take a judged frame, or leave it; never waits. Called in the thread of its camera.

        Args:
            frame: as captured.
            verdict: on it.
            alarmed: NOK, or part of an anomaly event.
            look: how it was seen when it was judged.
        """
        self._sampler.offer(frame, verdict, alarmed, look)

    def command(self, command: Message) -> dict[str, Any] | None:
        """Take a command; never waits. None: its answer comes through ``answer``."""
        try:
            self._commands.put_nowait(command)
        except queue.Full:
            return {
                "ok": False,
                "id": getattr(command, "id", None),
                "reason": "too many commands wait; ask again later",
            }
        return None

    def turn(self, wait_s: float) -> None:
        """Do one round of the thread's work: a frame, the commands that wait, and whatever is due.

        Args:
            wait_s: for a frame.
        """
        if not self._commissioned:
            self._commissioned = True
            self._isolated("commissioning", self._commission)
        self._isolated("commissioning", self._recalibrate_first)
        sample = self._sampler.take(wait_s)
        if sample is not None:
            self._isolated("frame", lambda: self._take(sample))
        with contextlib.suppress(queue.Empty):
            while True:
                self._obey(self._commands.get_nowait())
        self._isolated("fleet", self._poll)
        self._isolated("ship", self._ship_when_due)
        self._isolated("switch", self._step)
        self._isolated("save", self._save_when_due)

    def memory_ref(self) -> dict[str, int]:
        """Version of the memory in force, and of the fleet's memory inside it."""
        return {"version": self._changeover.version, "fleet": self._changeover.fleet_version}

    def status(self) -> dict[str, Any]:
        """Say how the memory is, as JSON values for the box's status."""
        return self._changeover.status() | {
            "held": self._held(),
            "learn": self._settings.learn.value,
            "frames_fed": self._learner.feeds,
            "fed_since_start": self._learner.fed,
            "turned_away_since_start": self._learner.turned_away,
            "dropped_since_start": self._metrics.value("memory_dropped"),
            "next_ship_s": round(max(0.0, self._ship_at - self._clock()), 1),
            "link": None if self._watch is None else self._watch.status(),
            "last_ship": self._last_ship,
            "trouble": self._troubles(),
        }

    def warnings(self) -> list[str]:
        """What an operator should know of the memory."""
        found = [f"memory: {what}: {text}" for what, text in sorted(self._troubles().items())]
        if self._changeover.trying and self._changeover.commissioning is None and "commissioning" not in self._trouble:
            found.append(f"memory: a new memory {NO_COMMISSIONING}")
        return found + ([] if self._watch is None else self._watch.warnings())

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while not self._stop.is_set():
            self.turn(TICK_S)
        self._isolated("save", self._save)

    def _troubles(self) -> dict[str, str]:
        return self._trouble | ({"learning": self._gates.trouble} if self._gates.trouble else {})

    def _isolated(self, name: str, work: Callable[[], bool]) -> None:
        """Do one thing; what goes wrong is counted, shown, and never ends the thread nor the judging.

        ``work`` returns whether there was something to do: only then does its success end a trouble.
        """
        try:
            done = work()
        except (LinewardError, OSError) as error:
            self._fail(name, str(error))
        except Exception as error:  # noqa: BLE001 (a defect in one step must not end the others)
            self._fail(name, f"{type(error).__name__}: {error}", error)
        else:
            if done and self._trouble.pop(name, None) is not None:
                _LOG.info("memory: %s works again", name)

    def _fail(self, name: str, reason: str, defect: Exception | None = None) -> None:
        self._metrics.count("memory_failed")
        if self._trouble.get(name) == reason:
            return
        self._trouble[name] = reason
        _LOG.warning("memory: %s: %s", name, reason, exc_info=defect)
        # What fails and works by turns must not fill the outbox.
        now = self._clock()
        if now >= self._noticed_at.get(name, now):
            self._noticed_at[name] = now + NOTICE_EVERY_S
            self._notify(NoticeKind.MEMORY_FAILED, Severity.WARNING, f"{name}: {reason}", step=name)

    def _commission(self) -> bool:
        folder = self._settings.commissioning
        self._changeover.commissioning = commissioning_of(self._detector, folder, stop=self._stop.is_set)
        self._recalibrate = folder is not None and self._changeover.version == 0
        return True

    def _held(self) -> str:
        return "" if self._drift is None else self._drift.hold_switch()

    def _recalibrate_first(self) -> bool:
        if not self._recalibrate or self._held():
            return False
        self._recalibrate = False
        self._changeover.recalibrate(self._stop.is_set)
        return True

    def _take(self, sample: Sample) -> bool:
        frame, verdict = sample.frame, sample.verdict
        canvas = to_canvas(frame.image, self._detector.bundle.manifest.preprocessing)
        recent = RecentFrame(canvas, verdict.score, frame.part_id, look=sample.look)
        self._recent.add(frame.camera, frame.camera_seq, recent)
        if not sample.embedded:
            return False
        embedding = self._detector.embeddings_of_canvas(canvas, sample.look)
        self._changeover.observe(frame, verdict, embedding, alarmed=sample.alarmed)
        version = self._changeover.version
        gate = self._gates.by_score(frame.camera, memory_version=version)
        if gate is not None and verdict.memory_version == version:
            inside = self._gates.inside(frame.camera, self._detector.bundle.manifest)
            self._learner.take(embedding, verdict.score, gate, inside=inside, alarmed=sample.alarmed)
        return True

    def _obey(self, command: Message) -> None:
        verb = ACCEPT_VERB if isinstance(command, AcceptCommand) else SHIP_VERB
        values: dict[str, Any]
        try:
            if isinstance(command, AcceptCommand):
                values = {"ok": True, "count": self._accept(command)}
            elif isinstance(command, ShipCommand):
                values = {"ok": True, "count": self._ship()}
            else:
                values = {"ok": False, "reason": "unknown command"}
        except (LinewardError, OSError) as error:
            values = {"ok": False, "reason": str(error)[:500]}
        except Exception as error:  # noqa: BLE001 (a command must not end the thread)
            _LOG.exception("memory: %s failed", verb)
            values = {"ok": False, "reason": f"{type(error).__name__}, see the log"}
        self._answer(verb, id=getattr(command, "id", None), **values)

    def _accept(self, command: AcceptCommand) -> int:
        found = self._recent.find(command.camera, camera_seq=command.camera_seq, part_id=command.part_id)
        if found is None:
            raise DataError("that frame is not kept here any more, or was not sampled; declare a part good soon after")
        if found.accepted:
            raise DataError("that frame was declared good before; it counts once")
        hold = "" if self._drift is None else self._drift.hold(command.camera)
        if hold:
            raise DataError(f"camera {command.camera} teaches nothing now: {hold}; see to that first")
        gate = self._gates.declared(command.camera)
        embedding = self._detector.embeddings_of_canvas(found.canvas, found.look)
        inside = self._gates.inside(command.camera, self._detector.bundle.manifest)
        if not self._learner.take(embedding, found.score, gate, inside=inside, alarmed=True, declared=True):
            raise DataError("memory.learn is off; set it to score or declared")
        found.accepted = True
        return 1

    def _poll(self) -> bool:
        if self._link is None or self._watch is None:
            return False
        self._watch.look()
        bank = self._link.poll_bank()
        if bank is None:
            return False
        self._try_fleet(bank)
        return True

    def _try_fleet(self, bank: FleetBank) -> None:
        changeover = self._changeover
        known = {changeover.fleet_version, changeover.trying_fleet} | changeover.refused_fleet
        if bank.version in known:
            return
        expected = self._detector.bundle.manifest.embedding_id[self._detector.status.precision]
        if bank.embedding_id != expected:
            changeover.refuse(
                "fleet",
                f"it is of the embedding {bank.embedding_id[:12]}, this bundle's is {expected[:12]}",
                fleet_version=bank.version,
            )
            return
        if bank.rows.shape[1] != changeover.banks.local.shape[1]:
            reason = f"its rows have {bank.rows.shape[1]} columns, this bundle's {changeover.banks.local.shape[1]}"
            changeover.refuse("fleet", reason, fleet_version=bank.version)
            return
        banks = Banks.with_fleet(changeover.banks.local, bank.rows, changeover.fleet_room)
        changeover.propose("fleet", banks, fleet_version=bank.version, stop=self._stop.is_set)

    def _ship_when_due(self) -> bool:
        if self._clock() < self._ship_at:
            return False
        self._ship_at = self._clock() + self._settings.ship_every_s
        if self._learner.feeds > self._progress.proposed_feeds and not self._changeover.trying:
            self._progress.proposed_feeds = self._learner.feeds
            banks = Banks(self._learner.rows, self._changeover.banks.fleet)
            self._changeover.propose(
                "local", banks, fleet_version=self._changeover.fleet_version, stop=self._stop.is_set
            )
        if self._link is not None:
            try:
                self._ship()
            except DataError as error:
                # Too little was learned yet: nothing is wrong.
                self._last_ship = str(error)
        return True

    def _ship(self) -> int:
        """Hand what was learned to the link; returns the rows that go out.

        Raises:
            LinewardError: there is no fleet, nothing new, or too little behind every row.
            OSError: the link cannot store it.
        """
        if self._link is None or self._sender is None:
            raise DataError("this box is in no fleet; add a federation section to its settings")
        if self._learner.feeds <= self._progress.shipped_feeds:
            raise DataError("nothing was learned since the last update")
        update = self._learner.update(
            self._sender, round_number=max(1, self._link.round), base_version=self._changeover.fleet_version
        )
        self._link.submit(update)
        self._progress.shipped_feeds = self._learner.feeds
        self._last_ship = f"{len(update.rows)} rows for round {update.round}"
        self._ship_at = self._clock() + self._settings.ship_every_s
        self._save()
        return len(update.rows)

    def _step(self) -> bool:
        # Thresholds were tried on frames of moments that stood still.
        return not self._held() and self._changeover.step() and self._save()

    def _save_when_due(self) -> bool:
        due = self._clock() >= self._save_at and self._learner.feeds != self._saved_feeds
        return due and self._save()

    def _save(self) -> bool:
        now = self._clock()
        self._save_at = now + SAVE_EVERY_S
        self._progress.since_ship_s = max(0.0, self._settings.ship_every_s - (self._ship_at - now))
        self._progress.refused_fleet = set(self._changeover.refused_fleet)
        self._store.write_learned(self._progress.notes(), self._learner.state())
        self._saved_feeds = self._learner.feeds
        return True
