"""The aggregator as a service: socket, rounds, boxes' keys and notices in one loop; merging in a thread beside it.

Knows the parts and their order; what each does is theirs.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from deploy.aggregator.closing import Merger
from deploy.aggregator.examiner import CanaryFolder, Examiner, read_references
from deploy.aggregator.identity import Registry
from deploy.aggregator.notices import Notices
from deploy.aggregator.records import EventKind
from deploy.aggregator.rounds import Rounds
from deploy.aggregator.server import RateLimits, Server
from deploy.aggregator.store import Store
from edge.errors import SettingsError, StoreError
from edge.federation.keys import read_key_pair
from edge.health.signals import stopped_by_signals
from edge.health.watchdog import notify_systemd

if TYPE_CHECKING:
    from collections.abc import Callable

    from deploy.aggregator.closing import Closing, Gate
    from deploy.aggregator.settings import AggregatorSettings
    from edge.federation.refusals import Refusal

LOG = logging.getLogger("lineward.aggregator")
# A revocation, and a wish to stop, are in force within this and the time of one request.
_REFRESH_S = 0.5
_LOOK_S = 1.0
_WATCHDOG_S = 5.0


def _beside(work: Callable[[], Closing]) -> Future[Closing]:
    """Run work in a thread that does not keep the process from ending: a merge that is cut off is begun again."""
    future: Future[Closing] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (whoever takes the future in gets it)
            future.set_exception(error)

    threading.Thread(target=run, name="merge", daemon=True).start()
    return future


class Service:
    """One aggregator. Use :meth:`run`, or :meth:`start`, :meth:`step` again and again, and :meth:`stop`.

    Args:
        settings: what the YAML file says.
        gate: what examines updates; the gates and canaries of the settings by default.
    """

    def __init__(self, settings: AggregatorSettings, *, gate: Gate | None = None) -> None:
        self.settings = settings
        self._gate = gate
        self._stopping = threading.Event()
        self._alarms: SimpleQueue[tuple[Refusal, str, str]] = SimpleQueue()
        self._problems: tuple[str, ...] = ()
        self._due = dict.fromkeys(("refresh", "look", "watchdog"), 0.0)
        self._cleanup = contextlib.ExitStack()
        self.started = threading.Event()
        self.server: Server | None = None

    @property
    def endpoint(self) -> str:
        """``tcp://interface:port`` that it listens at, once started."""
        return "" if self.server is None else self.server.endpoint

    @property
    def merging(self) -> bool:
        """Whether a round is being merged now."""
        return self.server is not None and self._rounds.merging

    def start(self) -> None:
        """Open everything and begin to listen.

        Raises:
            SettingsError: a key file or the folder of boxes cannot be read, two boxes have one key, or the address
                cannot be listened at.
            DataError: canaries or references cannot be read.
            BundleError: a reference is damaged.
            StoreError: the store cannot be opened, or another aggregator serves it.
            OutboxError: the outbox of the notices cannot be opened.
        """
        settings = self.settings
        keys = read_key_pair(settings.key_file)
        self._registry = Registry(settings.boxes)
        problems = self._registry.boxes.problems
        if problems:
            raise SettingsError(problems[0])
        gate = self._gate or Examiner(settings.gates, CanaryFolder(settings.canaries), self._registry.enrolled)
        references = read_references(settings.references)
        with contextlib.ExitStack() as stack:
            self._store = stack.enter_context(Store(settings.store))
            if self._store.damage:
                LOG.error("%s: %s", settings.store, self._store.damage)
            self._notices = Notices(settings, self._store)
            stack.callback(self._notices.close)
            merger = Merger(
                gate=gate,
                settings=settings.merge,
                min_boxes=settings.rounds.min_boxes,
                limits=settings.rounds.limits,
                carry_rounds=settings.rounds.carry_rounds,
                references=references,
                seed=settings.seed,
                threads=settings.threads,
            )
            self._rounds = Rounds(self._store, settings=settings.rounds, merge=merger, submit=_beside)
            self.server = Server(
                settings.listen,
                keys=keys,
                boxes=lambda: self._registry.boxes,
                handler=self._rounds,
                alarm=lambda *alarm: self._alarms.put(alarm),
                rates=RateLimits(settings.requests_per_s, settings.megabytes_per_s),
            )
            stack.callback(self.server.close)
            self._cleanup = stack.pop_all()
        LOG.info("listening at %s, %d boxes enrolled", self.endpoint, len(self._registry.boxes.names))
        notify_systemd("READY=1")
        self.started.set()

    def step(self) -> None:
        """Wait for something to do, at most half a second, and do it.

        Raises:
            StoreError: the events of a store that is broken for good cannot be read.
        """
        assert self.server is not None
        wait = self._rounds.tick()
        now = time.monotonic()
        wait = min(wait, *(max(0.0, due - now) for due in self._due.values()))
        self.server.poller.poll(round(wait * 1000))
        self.server.serve()
        self._drain_alarms()
        if self._is_due("refresh", _REFRESH_S):
            self._refresh()
        if self._is_due("look", _LOOK_S):
            self._look()
        if self._is_due("watchdog", _WATCHDOG_S):
            if not self.server.admits:
                # Nobody can connect any more; systemd starts us again.
                raise StoreError("the thread that admits boxes has ended; start the aggregator again")
            notify_systemd("WATCHDOG=1")

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or :meth:`request_stop`; then stop.

        Raises:
            LinewardError: as :meth:`start`.
        """
        with stopped_by_signals(self.request_stop, LOG):
            self.start()
            try:
                while not self._stopping.is_set():
                    self.step()
            finally:
                self.stop()

    def request_stop(self) -> None:
        """Ask :meth:`run` to stop; may be called from a signal handler or another thread."""
        self._stopping.set()

    def stop(self) -> None:
        """Close everything; what is stored stays, and a merge that runs is begun again at the next start."""
        notify_systemd("STOPPING=1")
        self._stopping.set()
        self._cleanup.close()
        LOG.info("stopped")

    def _is_due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        if now < self._due[what]:
            return False
        self._due[what] = now + every
        return True

    def _refresh(self) -> None:
        try:
            changed = self._registry.refresh()
        except SettingsError as error:
            problems: tuple[str, ...] = (str(error),)
            changed = problems != self._problems
        else:
            problems = self._registry.boxes.problems
        if changed:
            for text in set(problems) - set(self._problems):
                with contextlib.suppress(StoreError):
                    self._store.add_event(EventKind.SECURITY, text, code="boxes")
            self._problems = problems
            LOG.info("%d boxes enrolled", len(self._registry.boxes.names))

    def _look(self) -> None:
        try:
            self._notices.look()
        except StoreError as error:
            LOG.warning("%s", error)

    def _drain_alarms(self) -> None:
        """Note what the door saw; it has a thread of its own, and the rounds have not."""
        with contextlib.suppress(Empty):
            while True:
                self._rounds.alarm(*self._alarms.get_nowait())
