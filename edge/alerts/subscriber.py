"""A subscriber as an integrator wants it: it reconnects, drops duplicates, and knows what is missing.

Messages come in the order of their arrival; the order of the box is that of their numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
import threading
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from edge.alerts.message import Alert, AnyMessage, Gap, Notice, VerdictMessage, parse
from edge.alerts.mqtt import Acked, Connected, Inbox, Incoming, Link, LinkKind, LinkState, Lost, Subscribed, Wake
from edge.alerts.reconnector import Reconnector
from edge.alerts.sequence import Deduplicator
from edge.alerts.topics import Kind, subscriptions
from edge.errors import BrokerError, MessageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from types import TracebackType

    from edge.alerts.settings import BrokerSettings

LOG = logging.getLogger("lineward.subscriber")
EVENTS = frozenset({Kind.ALERT, Kind.VERDICT, Kind.GAP, Kind.NOTICE})
EVERYTHING = frozenset(Kind) - {Kind.COMMAND}
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class Received:
    """A message that was not there before.

    Attributes:
        topic: where it was published.
        message: what it says.
        payload: as it came, for whoever passes it on.
        received_ns: ``time.monotonic_ns()`` when it was taken from the network.
    """

    topic: str
    message: AnyMessage
    payload: bytes
    received_ns: int


class Subscriber:
    """Alerts, verdicts, notices and gaps of boxes, each once; a context manager.

    Messages are taken by iterating, ``async for`` included, by :meth:`receive`, or by a callback.

    Args:
        settings: the broker.
        site: only this plant; any by default.
        box: only this box; any by default.
        kinds: what to listen to, by default :data:`EVENTS`.
        holes: missing ranges remembered per box.
        on_received: called with each message in the subscriber's thread, one at a time, in place of all other ways.
            What it raises is logged and counted (``failed``), and ends nothing.
        max_waiting: messages kept for whoever takes them. More are dropped and counted (``overrun``), and are missing
            (:attr:`missing`), to be asked for again.

    Raises:
        MessageError: a name cannot be part of a topic.
    """

    def __init__(
        self,
        settings: BrokerSettings,
        *,
        site: str = "+",
        box: str = "+",
        kinds: frozenset[Kind] = EVENTS,
        holes: int = 10_000,
        on_received: Callable[[Received], None] | None = None,
        max_waiting: int = 100_000,
    ) -> None:
        self._on_received = on_received
        self._max_waiting = max_waiting
        self._filters = subscriptions(settings.prefix, site=site, box=box, kinds=kinds)
        self._prefix = settings.prefix
        self._received: SimpleQueue[Received] = SimpleQueue()
        self._outgoing: SimpleQueue[tuple[str, bytes]] = SimpleQueue()
        self._refusals: dict[str, str] = {}
        self._seen = Deduplicator(holes=holes)
        self._lock = threading.Lock()
        self._ready = False
        self._arrived: Callable[[], object] = _nobody_waits
        self._counters = dict.fromkeys(("received", "duplicates", "junk", "overrun", "failed"), 0)
        self._reconnector = Reconnector(
            settings=settings,
            client_id=settings.client_id or f"lineward-watch-{secrets.token_hex(6)}",
            will=None,
            serve=self._serve,
        )

    def __enter__(self) -> Subscriber:  # noqa: PYI034 (Self needs Python 3.11)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __iter__(self) -> Iterator[Received]:
        """Messages as they come, until :meth:`stop`.

        Raises:
            BrokerError: the broker refuses us.
        """
        while not self._reconnector.stopping.is_set():
            received = self.receive(timeout=_LOOK_S)
            if received is not None:
                yield received

    async def __aiter__(self) -> AsyncIterator[Received]:
        """Messages as they come, in an event loop that is never blocked, until :meth:`stop`.

        Raises:
            BrokerError: the broker refuses us.
        """
        while not self._reconnector.stopping.is_set():
            received = self._take_one()
            if received is not None:
                yield received
                continue
            loop = asyncio.get_running_loop()
            arrived = asyncio.Event()
            self._arrived = functools.partial(loop.call_soon_threadsafe, arrived.set)
            # Looked at once more: it may have come before the line above.
            if self._received.empty():
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(arrived.wait(), _LOOK_S)

    @property
    def state(self) -> LinkState:
        """Where the connection stands."""
        return self._reconnector.state

    @property
    def counters(self) -> dict[str, int]:
        """Since the start: received, dropped as duplicates, junk or overrun, failed callbacks, connections."""
        with self._lock:
            return {**self._counters, "connections": self._reconnector.connections}

    @property
    def missing(self) -> dict[tuple[str, str, str], list[tuple[int, int]]]:
        """Ranges of numbers per (site, box, epoch) that have not come and that no gap message explains."""
        with self._lock:
            return self._seen.missing()

    def start(self) -> None:
        """Begin to connect, in a thread of its own."""
        self._reconnector.start()

    def stop(self) -> None:
        """Disconnect; iterations end."""
        self._reconnector.stop(timeout=1.0)

    def wait_until_ready(self, timeout: float) -> None:
        """Wait until the broker has taken the subscriptions: whatever is published from then on is seen.

        Raises:
            BrokerError: it refuses us, or is not there after ``timeout`` seconds.
        """
        done = self._reconnector.wait_for(lambda: self._ready or self.state.kind is LinkKind.REFUSED, timeout)
        if not done or not self._ready:
            raise BrokerError(f"broker: {self.state}")

    def send(self, topic: str, payload: bytes) -> None:
        """Publish something, such as a command, once there is a connection; lost where this process ends first."""
        self._outgoing.put((topic, payload))
        self._reconnector.wake()

    def take_refusal(self, topic: str) -> str:
        """Why the broker did not take what was sent there last, once; empty where it has not said so.

        Only a broker of MQTT 5 says it (clause 3.4.2.1); an older one acknowledges what it then throws away.
        """
        with self._lock:
            return self._refusals.pop(topic, "")

    def receive(self, timeout: float | None = None) -> Received | None:
        """The next message that is not a duplicate; None when none came within ``timeout`` seconds.

        Raises:
            BrokerError: the broker refuses us and nothing is left to hand out.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = _LOOK_S if deadline is None else min(_LOOK_S, deadline - time.monotonic())
            try:
                return self._received.get(timeout=max(0.0, left))
            except Empty:
                self._raise_refusal()
                stopped = self._reconnector.stopping.is_set()
                if stopped or (deadline is not None and time.monotonic() >= deadline):
                    return None

    def _take_one(self) -> Received | None:
        try:
            return self._received.get_nowait()
        except Empty:
            self._raise_refusal()
            return None

    def _raise_refusal(self) -> None:
        if self.state.kind is LinkKind.REFUSED:
            raise BrokerError(f"broker: {self.state.reason}")

    def _serve(self, link: Link, inbox: Inbox, _granted: Connected) -> Lost | None:
        link.subscribe(self._filters)
        sent: dict[int, str] = {}
        try:
            while True:
                event = inbox.get()
                if isinstance(event, Lost):
                    return event
                if isinstance(event, Subscribed):
                    if event.refusal:
                        return Lost(f"subscription refused: {event.refusal}; let this user read it", refused=True)
                    self._ready = True
                    self._send_all(link, sent)
                    self._reconnector.notify()
                elif isinstance(event, Incoming):
                    self._take(event)
                elif isinstance(event, Acked):
                    self._note_refusal(sent.pop(event.mid, ""), event.refusal)
                elif isinstance(event, Wake):
                    if self._reconnector.stopping.is_set():
                        return None
                    if self._ready:  # not before an answer to it would be seen
                        self._send_all(link, sent)
        finally:
            self._ready = False

    def _send_all(self, link: Link, sent: dict[int, str]) -> None:
        with contextlib.suppress(Empty):
            while True:
                topic, payload = self._outgoing.get_nowait()
                number = link.publish(topic, payload)
                if number is not None:
                    sent[number] = topic

    def _note_refusal(self, topic: str, refusal: str) -> None:
        if topic and refusal:
            with self._lock:
                self._refusals[topic] = refusal

    def _take(self, event: Incoming) -> None:
        if not event.payload:
            return  # a retained topic is cleared; what it said last was that nobody vouches for it
        now = time.monotonic_ns()
        try:
            message = parse(event.topic, event.payload, prefix=self._prefix)
        except MessageError as error:
            with self._lock:
                self._counters["junk"] += 1
            LOG.debug("dropped: %s", error)
            return
        with self._lock:
            if self._received.qsize() >= self._max_waiting:
                # Not noted as seen: a numbered one is missing from now on, and can be asked for again.
                self._counters["overrun"] += 1
                return
            if isinstance(message, (Alert, VerdictMessage, Gap, Notice)):
                if not self._seen.is_new(message.site, message.box, message.epoch, message.seq):
                    self._counters["duplicates"] += 1
                    return
                if isinstance(message, Gap):
                    self._seen.explain(message.site, message.box, message.epoch, message.first, message.last)
            self._counters["received"] += 1
        self._hand_out(Received(event.topic, message, event.payload, now))

    def _hand_out(self, received: Received) -> None:
        if self._on_received is None:
            self._received.put(received)
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                self._arrived()
            return
        try:
            self._on_received(received)
        except Exception:
            # Somebody else's code: it must not end the subscription.
            with self._lock:
                self._counters["failed"] += 1
            LOG.exception("the callback failed on %s", received.topic)


def _nobody_waits() -> None:
    """In place of an event loop that waits."""
