"""The publisher: empties the outbox over a connection, and keeps the retained topics of a box true.

Nothing is sent that is not on disk first; the caller never waits for the network.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timezone
from queue import Empty
from typing import TYPE_CHECKING, Any

from edge.alerts.message import (
    MAX_ID,
    MAX_PAYLOAD_BYTES,
    Availability,
    CameraState,
    CommandResult,
    Message,
    ReplayCommand,
    Status,
    build,
    encode,
    mark_late,
    parse,
)
from edge.alerts.mqtt import (
    Acked,
    Connected,
    Inbox,
    Incoming,
    Link,
    LinkKind,
    LinkState,
    Lost,
    Reconnector,
    Subscribed,
    Will,
)
from edge.alerts.topics import REPLAY_VERB, Identity, Kind, parse_topic, subscriptions
from edge.errors import MessageError, OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import TypeAlias

    from edge.alerts.message import AnyMessage
    from edge.alerts.outbox import Outbox
    from edge.alerts.settings import BrokerSettings

    CommandHandler: TypeAlias = Callable[[AnyMessage], dict[str, Any] | None]

LOG = logging.getLogger("lineward.publisher")
# Another try for a message that the broker has refused, and for acknowledgements that the disk has refused.
_RETRY_S = 5.0
_STOPPED_S = 2.0
# Answers that wait for room in flight; whoever floods a box with commands loses the oldest.
_MAX_RESULTS = 64


@dataclass(slots=True)
class _Session:
    """What is true of one connection only."""

    link: Link
    window: int
    boundary: int
    outstanding: dict[int, int | str] = field(default_factory=dict)
    refused: set[int | str] = field(default_factory=set)
    acknowledged: list[int] = field(default_factory=list)
    retry_at: float | None = None


class Publisher:
    """Sends what the outbox holds, in the order live rows, then late ones, each by number.

    On every connection it says ``online``, sends the last status and states again, and repeats the rows of the replay
    window, flagged late: an acknowledgement does not mean that a broker has them on disk. ``offline`` is its will.

    Args:
        settings: the broker.
        identity: who the box is; its prefix must be that of the settings.
        outbox: the rows to send.

    Raises:
        MessageError: the prefixes differ.
    """

    def __init__(self, *, settings: BrokerSettings, identity: Identity, outbox: Outbox) -> None:
        if identity.prefix != settings.prefix:
            raise MessageError(
                f"prefix: {identity.prefix!r} of the box is not {settings.prefix!r} of the broker settings"
            )
        self._identity = identity
        self._outbox = outbox
        self._retained: dict[str, bytes] = {}
        self._dirty: set[str] = set()
        self._wanted_window = settings.max_inflight
        self._unsent = 0
        self._replayed = False
        self._counters = dict.fromkeys(("published", "acknowledged", "refused", "commands"), 0)
        self._answers: deque[CommandResult] = deque(maxlen=_MAX_RESULTS)
        self._handlers: dict[str, CommandHandler] = {REPLAY_VERB: self._replay}
        client_id = settings.client_id or f"lineward-{identity.site}-{identity.box}"
        self._reconnector = Reconnector(
            settings=settings,
            client_id=client_id,
            will=Will(identity.available, self._availability("offline")),
            serve=self._serve,
        )
        outbox.add_listener(self._reconnector.wake)

    def __enter__(self) -> Publisher:  # noqa: PYI034 (Self needs Python 3.11)
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def state(self) -> LinkState:
        """Where the connection stands; ``reason`` names the cure where a person is needed."""
        return self._reconnector.state

    @property
    def counters(self) -> dict[str, int]:
        """Since the start: published (repeats included), acknowledged, refused, commands, connections."""
        return {**self._counters, "connections": self._reconnector.connections}

    def start(self) -> None:
        """Begin to connect, in a thread of its own."""
        self._reconnector.start()

    def stop(self, timeout: float = _STOPPED_S) -> None:
        """Say ``stopped`` and disconnect; rows that are left stay in the outbox."""
        self._reconnector.stop(timeout)

    def on_command(self, verb: str, handler: CommandHandler) -> None:
        """Have commands of a verb answered by ``handler`` from now on.

        It is called in the publisher's thread with the parsed command and must return at once: either the fields of
        :class:`~edge.alerts.message.CommandResult`, or None where :meth:`answer` will be called later.
        """
        self._handlers[verb] = handler

    def answer(self, verb: str, **values: Any) -> None:  # noqa: ANN401 (checked by the model)
        """Publish the result of a command: fields of :class:`~edge.alerts.message.CommandResult`. Any thread may.

        Raises:
            MessageError: a field is unknown or has a wrong value.
        """
        self._answers.append(self._result(verb, **values))
        self._reconnector.wake()

    def publish_status(self, values: dict[str, Any]) -> None:
        """Set the retained status: fields of :class:`~edge.alerts.message.Status`; ts, site, box, outbox are given.

        Raises:
            MessageError: a field is unknown or has a wrong value.
        """
        counters = self._outbox.counters
        outbox = {
            "epoch": self._outbox.epoch,
            "depth": self._outbox.depth,
            "bytes": self._outbox.bytes,
            "dropped": counters["dropped"],
            "counters": counters | self.counters,
        }
        self._retain(self._identity.status, build(Status, **{"outbox": outbox, **self._signed(), **values}))

    def publish_state(self, camera: str, values: dict[str, Any]) -> None:
        """Set the retained state of a camera: fields of :class:`~edge.alerts.message.CameraState`.

        Raises:
            MessageError: a field is unknown or has a wrong value, or the camera's name cannot be in a topic.
        """
        topic = self._identity.state(camera)
        self._retain(topic, build(CameraState, **{"camera": camera, **self._signed(), **values}))

    def wait_until_connected(self, timeout: float) -> bool:
        """Wait for a connection; False when there is none after ``timeout`` seconds."""
        return self._reconnector.wait_for(lambda: self.state.kind is LinkKind.CONNECTED, timeout)

    def wait_until_drained(self, timeout: float) -> bool:
        """Wait until the broker has acknowledged all rows and retained topics; False after ``timeout`` seconds."""

        def drained() -> bool:
            # Connected is not enough: the rows of the replay window are pending again a moment later.
            return self._replayed and self._outbox.depth == 0 and not self._dirty and self._unsent == 0

        return self._reconnector.wait_for(drained, timeout)

    def _signed(self) -> dict[str, Any]:
        return {"ts": datetime.now(timezone.utc), "site": self._identity.site, "box": self._identity.box}

    def _retain(self, topic: str, message: Message) -> None:
        self._retained[topic] = encode(message)
        self._dirty.add(topic)
        self._reconnector.wake()

    def _availability(self, value: str) -> bytes:
        return encode(build(Availability, site=self._identity.site, box=self._identity.box, value=value))

    def _serve(self, link: Link, inbox: Inbox, granted: Connected) -> Lost | None:
        self._outbox.release_sent()
        self._outbox.requeue_acknowledged()
        session = _Session(link, min(self._wanted_window, granted.receive_maximum), self._outbox.last_seq)
        link.subscribe(subscriptions(self._identity.prefix, site=self._identity.site, box=self._identity.box,
                                     kinds=frozenset({Kind.COMMAND})))  # fmt: skip
        self._retained[self._identity.available] = self._availability("online")
        # Whatever the broker has forgotten, an actuator must not act on: everything retained is said again.
        self._dirty.update(self._retained)
        self._replayed = True
        try:
            while not self._reconnector.stopping.is_set():
                self._send(session)
                lost = self._take(session, inbox)
                if lost is not None:
                    # mosquitto 2.0 hangs up after it has refused a message; the refusal is what a person must read.
                    return Lost(self.state.reason, refused=True) if session.refused else lost
            return self._say_stopped(session, inbox)
        finally:
            self._replayed = False
            self._settle(session)
            self._outbox.release_sent()

    def _take(self, session: _Session, inbox: Inbox, *, wait: float | None = None) -> Lost | None:
        """Wait for one event and handle it with all that are there by then."""
        if session.retry_at is not None:
            left = max(0.0, session.retry_at - time.monotonic())
            wait = left if wait is None else min(wait, left)
        try:
            event = inbox.get(timeout=wait)
            while True:
                if isinstance(event, Lost):
                    return event
                if isinstance(event, Acked):
                    self._on_acked(session, event)
                elif isinstance(event, Subscribed) and event.refusal:
                    LOG.warning("the broker refuses the subscription to commands: %s", event.refusal)
                elif isinstance(event, Incoming) and not event.retained:
                    # A retained command would run again after each reconnect; commands are for now or never.
                    self._on_command(event)
                event = inbox.get_nowait()
        except Empty:
            self._settle(session)
        return None

    def _send(self, session: _Session) -> None:
        for topic in sorted(self._dirty):
            if len(session.outstanding) >= session.window:
                return
            self._dirty.discard(topic)
            self._publish(session, topic, self._retained[topic], retain=True, what=topic)
        while self._answers and len(session.outstanding) < session.window:
            result = self._answers.popleft()
            self._publish(session, self._identity.result(result.verb), encode(result), retain=False, what="result")
        room = session.window - len(session.outstanding)
        if room <= 0:
            return
        rows = self._outbox.pending(room, boundary=session.boundary)
        if rows:
            # Before they leave: a gap row must be known as seen even if the process dies in the next line.
            self._outbox.mark_sent(row.seq for row in rows)
        for row in rows:
            payload = mark_late(row.payload) if row.late else row.payload
            self._publish(session, row.topic, payload, retain=False, what=row.seq)

    def _publish(self, session: _Session, topic: str, payload: bytes, *, retain: bool, what: int | str) -> None:
        mid = session.link.publish(topic, payload, retain=retain)
        if mid is not None:
            self._counters["published"] += 1
            session.outstanding[mid] = what
            self._unsent = len(session.outstanding)
        # None: the connection is gone. Its Lost is in the inbox already; the next connection sends this again.

    def _on_acked(self, session: _Session, event: Acked) -> None:
        what = session.outstanding.pop(event.mid, None)
        self._unsent = len(session.outstanding)
        if what is None:
            return
        if not event.refusal:
            if isinstance(what, int):
                session.acknowledged.append(what)
            if what in session.refused:
                session.refused.discard(what)
                self._show(session)
            return
        self._counters["refused"] += 1
        session.refused.add(what)
        if session.retry_at is None:
            session.retry_at = time.monotonic() + _RETRY_S
        self._show(session, f"the broker refuses messages of this box ({event.refusal}); let it publish under"
                   f" {self._identity.root}/")  # fmt: skip

    def _show(self, session: _Session, trouble: str = "") -> None:
        if trouble or not session.refused:
            self._reconnector.set_state(LinkState(LinkKind.CONNECTED, trouble))

    def _settle(self, session: _Session) -> None:
        """Record acknowledgements, and give refused messages another try when their time has come."""
        due = session.retry_at is not None and time.monotonic() >= session.retry_at
        if due:
            session.retry_at = None
            self._outbox.release_sent(seq for seq in session.refused if isinstance(seq, int))
            self._dirty.update(topic for topic in session.refused if topic in self._retained)
        if session.acknowledged and (due or session.retry_at is None or session.refused):
            try:
                self._counters["acknowledged"] += self._outbox.acknowledge(session.acknowledged)
            except OutboxError as error:
                # They stay in flight, so nothing is sent twice; a disk with space again takes them then.
                session.retry_at = time.monotonic() + _RETRY_S
                self._show(session, str(error))
            else:
                session.acknowledged.clear()
                if due:
                    self._show(session)
        self._reconnector.notify()

    def _say_stopped(self, session: _Session, inbox: Inbox) -> Lost | None:
        self._retained[self._identity.available] = self._availability("stopped")
        self._publish(
            session, self._identity.available, self._retained[self._identity.available], retain=True, what="stopped"
        )
        deadline = time.monotonic() + _STOPPED_S
        while session.outstanding and time.monotonic() < deadline:
            lost = self._take(session, inbox, wait=max(0.0, deadline - time.monotonic()))
            if lost is not None:
                return lost
        return None

    def _on_command(self, event: Incoming) -> None:
        self._counters["commands"] += 1
        verb = REPLAY_VERB
        try:
            verb = parse_topic(event.topic).leaf
            values: dict[str, Any] | None
            if verb in self._handlers:
                values = self._handlers[verb](parse(event.topic, event.payload, prefix=self._identity.prefix))
            else:
                known = ", ".join(sorted(self._handlers))
                values = {"ok": False, "id": _id_of(event.payload), "reason": f"unknown command; known are: {known}"}
        except (MessageError, OutboxError) as error:
            values = {"ok": False, "id": _id_of(event.payload), "reason": str(error)[:500]}
        if values is not None:
            self._answers.append(self._result(verb, **values))

    def _replay(self, command: AnyMessage) -> dict[str, Any]:
        assert isinstance(command, ReplayCommand)
        count = self._outbox.requeue_range(command.epoch, command.first, command.last)
        return {"ok": True, "id": command.id, "count": count}

    def _result(self, verb: str, **values: Any) -> CommandResult:  # noqa: ANN401 (checked by the model)
        return build(CommandResult, site=self._identity.site, box=self._identity.box, verb=verb, **values)


def _id_of(payload: bytes) -> str | None:
    """The id of a command that is refused, so that whoever sent it knows the answer for its own."""
    try:
        found = json.loads(payload).get("id") if len(payload) <= MAX_PAYLOAD_BYTES else None
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, str) and len(found) <= MAX_ID else None
