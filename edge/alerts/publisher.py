"""The publisher: empties the outbox over a connection, and keeps the retained topics of a box true.

Nothing is sent that is not on disk first; the caller never waits for the network.
"""

from __future__ import annotations

import logging
import random
import time
from datetime import datetime, timezone
from queue import Empty
from typing import TYPE_CHECKING, Any

from edge.alerts.command_desk import CommandDesk
from edge.alerts.command_messages import DeadLettersCommand, ReplayCommand
from edge.alerts.commands import Commands
from edge.alerts.home_assistant import BIRTH, HomeAssistant
from edge.alerts.ledger import Ledger
from edge.alerts.message import Availability, CameraState, Status, build, encode
from edge.alerts.mqtt import (
    Acked,
    Connected,
    Inbox,
    Incoming,
    Link,
    LinkKind,
    LinkState,
    Lost,
    Subscribed,
    Will,
)
from edge.alerts.reconnector import Reconnector
from edge.alerts.refused import Refused
from edge.alerts.retained import Retained
from edge.alerts.session import Session
from edge.alerts.topics import DEAD_LETTERS_VERB, REPLAY_VERB, Identity, Kind, subscriptions
from edge.errors import MessageError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from edge.alerts.command_desk import CommandHandler
    from edge.alerts.commands import Clock
    from edge.alerts.message import AnyMessage
    from edge.alerts.outbox import Outbox
    from edge.alerts.settings import BrokerSettings

LOG = logging.getLogger("lineward.publisher")
_STOPPED_S = 2.0
# Many boxes hear Home Assistant start at the same moment; they shall not all answer at that moment.
_BIRTH_DELAY_S = 1.0


class Publisher:
    """Sends what the outbox holds, in the order live rows, then late ones, each by number.

    On every connection it says ``online``, sends the last status and states again, and repeats the rows of the replay
    window, flagged late: an acknowledgement does not mean that a broker has them on disk. ``offline`` is its will.

    Args:
        settings: the broker.
        identity: who the box is; its prefix must be that of the settings.
        outbox: the rows to send; what must be remembered of commands is kept in a file beside its own.
        clock: what the expiry of commands is judged by.

    Raises:
        MessageError: the prefixes differ.
    """

    def __init__(
        self, *, settings: BrokerSettings, identity: Identity, outbox: Outbox, clock: Clock | None = None
    ) -> None:
        if identity.prefix != settings.prefix:
            raise MessageError(
                f"prefix: {identity.prefix!r} of the box is not {settings.prefix!r} of the broker settings"
            )
        self._identity = identity
        self._outbox = outbox
        self._ledger = Ledger(outbox.path.with_name(f"{outbox.path.stem}-ledger.db"))
        self._retained = Retained(self._ledger)
        self._desk = CommandDesk(identity, Commands(self._ledger, clock=clock))
        self._refused = Refused()
        self._careful = 0
        self._wanted_window = settings.max_inflight
        self._session: Session | None = None
        self._replayed = False
        self._counters = dict.fromkeys(("published", "acknowledged", "refused"), 0)
        self._desk.on_command(REPLAY_VERB, self._replay)
        self._desk.on_command(DEAD_LETTERS_VERB, self._dead_letters)
        self._home_assistant: HomeAssistant | None = None
        self._birth_at: float | None = None
        self._deaf = ""
        if settings.home_assistant is not None:
            self._home_assistant = HomeAssistant(settings.home_assistant, identity)
            for topic, config in self._home_assistant.box_configs().items():
                self._retained.put(topic, config, passing=True)
            LOG.info("Home Assistant node %s", self._home_assistant.node)
        client_id = settings.client_id or f"lineward-{identity.site}-{identity.box}"
        self._reconnector = Reconnector(
            settings=settings,
            client_id=client_id,
            will=Will(identity.available, self._availability("offline")),
            serve=self._serve,
            acknowledges=True,
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
    def alive(self) -> bool:
        """Whether its thread runs; without it nothing leaves the box."""
        return self._reconnector.alive

    @property
    def counters(self) -> dict[str, int]:
        """Since the start: published (repeats included), acknowledged, refused, commands, connections, defects ..."""
        return {
            **self._counters,
            **self._desk.counters,
            "connections": self._reconnector.connections,
            "connection_defects": self._reconnector.defects,
        }

    def start(self) -> None:
        """Begin to connect, in a thread of its own."""
        self._reconnector.start()

    def stop(self, timeout: float = _STOPPED_S) -> None:
        """Say ``stopped`` and disconnect; rows that are left stay in the outbox."""
        self._reconnector.stop(timeout)
        self._ledger.close()

    def on_command(self, verb: str, handler: CommandHandler) -> None:
        """Have commands of a verb answered by ``handler`` from now on.

        It is called in the publisher's thread with the parsed command and must return at once: either the fields of
        :class:`~edge.alerts.command_messages.CommandResult`, or None where :meth:`answer` will be called later.
        """
        self._desk.on_command(verb, handler)

    def answer(self, verb: str, **values: Any) -> None:  # noqa: ANN401 (checked by the model)
        """Publish the result of a command. Any thread may.

        Args:
            verb: of the command.
            values: fields of :class:`~edge.alerts.command_messages.CommandResult`.

        Raises:
            MessageError: a field is unknown or has a wrong value.
        """
        self._desk.answer(verb, values)
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
            "dead": self._outbox.dead,
            "counters": counters | self.counters,
        }
        self._desk.commands.note_time()
        known = {"outbox": outbox, **self._signed(), **values}
        known["warnings"] = (*known.get("warnings", ()), *self.warnings())
        self._retain({self._identity.status: encode(build(Status, **known))})

    def publish_state(self, camera: str, values: dict[str, Any]) -> None:
        """Set the retained state of a camera: fields of :class:`~edge.alerts.message.CameraState`.

        Raises:
            MessageError: a field is unknown or has a wrong value, or the camera's name cannot be in a topic.
        """
        topic = self._identity.state(camera)
        payload = encode(build(CameraState, **{"camera": camera, **self._signed(), **values}))
        if self._home_assistant is not None and self._retained.current(topic) is None:
            self._retain(self._home_assistant.configs(camera), passing=True)
        self._retain({topic: payload}, passing=True)

    def keep_cameras(self, names: Iterable[str]) -> None:
        """Clear what is retained for all cameras and stations but these, those of earlier runs included."""
        topics = set() if self._home_assistant is None else set(self._home_assistant.box_configs())
        for name in names:
            topics.add(self._identity.state(name))
            if self._home_assistant is not None:
                topics |= self._home_assistant.configs(name).keys()
        self._retained.keep(topics)
        self._reconnector.wake()

    def warnings(self) -> list[str]:
        """What an operator should know of messages and commands; part of every status that is published."""
        found = []
        if self._outbox.dead:
            found.append(f"{self._outbox.dead} messages are dead letters: the broker refuses them; see the command"
                         f" {DEAD_LETTERS_VERB}")  # fmt: skip
        if self._deaf:
            found.append(f"commands do not reach this box: the broker refuses the subscription ({self._deaf}); let it"
                         f" read {self._identity.root}/cmd/+")  # fmt: skip
        if self._ledger.damage:
            found.append(f"the ledger of commands was damaged: {self._ledger.damage}")
        if trouble := self._desk.commands.set_back():
            found.append(trouble)
        return found

    def wait_until_connected(self, timeout: float) -> bool:
        """Wait for a connection; False when there is none after ``timeout`` seconds."""
        return self._reconnector.wait_for(lambda: self.state.kind is LinkKind.CONNECTED, timeout)

    def wait_until_drained(self, timeout: float) -> bool:
        """Wait until the broker has acknowledged all rows and retained topics; False after ``timeout`` seconds."""

        def drained() -> bool:
            # Connected is not enough: the rows of the replay window are pending again a moment later.
            if not self._replayed or self._outbox.depth or self._retained.waiting:
                return False
            return self._session is not None and self._session.unsent == 0

        return self._reconnector.wait_for(drained, timeout)

    def _signed(self) -> dict[str, Any]:
        return {"ts": datetime.now(timezone.utc), "site": self._identity.site, "box": self._identity.box}

    def _retain(self, payloads: dict[str, bytes], *, passing: bool = False) -> None:
        for topic, payload in payloads.items():
            self._retained.put(topic, payload, passing=passing)
        self._reconnector.wake()

    def _availability(self, value: str) -> bytes:
        return encode(build(Availability, site=self._identity.site, box=self._identity.box, value=value))

    def _serve(self, link: Link, inbox: Inbox, granted: Connected) -> Lost | None:
        self._outbox.release_sent()
        self._outbox.requeue_acknowledged()
        session = self._session = Session(
            link,
            granted,
            outbox=self._outbox,
            retained=self._retained,
            refused=self._refused,
            window=self._wanted_window,
            careful=self._careful,
            unproving=self._identity.available,
            counters=self._counters,
        )
        filters = subscriptions(self._identity.prefix, site=self._identity.site, box=self._identity.box,
                                kinds=frozenset({Kind.COMMAND}))  # fmt: skip
        if self._home_assistant is not None:
            filters.append(self._home_assistant.status_topic)
        link.subscribe(filters)
        self._retained.put(self._identity.available, self._availability("online"))
        # Whatever the broker has forgotten, an actuator must not act on: everything retained is said again.
        self._retained.again()
        self._replayed = True
        lost: Lost | None = None
        try:
            while not self._reconnector.stopping.is_set():
                self._send(session)
                lost = self._take(session, inbox, wait=session.wait_s())
                if lost is not None:
                    # mosquitto 2.0 hangs up after it has refused a message; the refusal is what a person must read.
                    self._careful = max(session.careful, session.blame(lost))
                    return Lost(session.trouble, refused=True) if session.refused_last else lost
            return self._say_stopped(session, inbox)
        finally:
            self._replayed = False
            session.settle()
            self._outbox.release_sent()

    def _take(self, session: Session, inbox: Inbox, *, wait: float | None = None) -> Lost | None:
        """Wait for one event and handle it with all that are there by then."""
        if self._birth_at is not None:
            left = max(0.0, self._birth_at - time.monotonic())
            wait = left if wait is None else min(wait, left)
        try:
            event = inbox.get(timeout=wait)
            while True:
                if isinstance(event, Lost):
                    return event
                if isinstance(event, Acked):
                    session.on_acked(event)
                elif isinstance(event, Subscribed):
                    self._hears(event.refusal)
                elif isinstance(event, Incoming):
                    self._on_message(session, event)
                event = inbox.get_nowait()
        except Empty:
            session.settle()
            self._reconnector.set_state(LinkState(LinkKind.CONNECTED, session.trouble))
            self._reconnector.notify()
        return None

    def _hears(self, refusal: str) -> None:
        if refusal and refusal != self._deaf:
            LOG.warning("the broker refuses the subscription to commands: %s", refusal)
        self._deaf = refusal

    def _send(self, session: Session) -> None:
        if self._birth_at is not None and time.monotonic() >= self._birth_at:
            self._birth_at = None
            self._retained.again()
        session.send_retained()
        while session.room > 0 and (result := self._desk.next_answer()) is not None:
            session.publish(self._identity.result(result.verb), encode(result))
        session.send_rows()

    def _say_stopped(self, session: Session, inbox: Inbox) -> Lost | None:
        payload = self._availability("stopped")
        self._retained.put(self._identity.available, payload)
        session.publish(self._identity.available, payload, retain=True)
        deadline = time.monotonic() + _STOPPED_S
        while session.unsent and time.monotonic() < deadline:
            lost = self._take(session, inbox, wait=max(0.0, deadline - time.monotonic()))
            if lost is not None:
                return lost
        return None

    def _on_message(self, session: Session, event: Incoming) -> None:
        try:
            if self._home_assistant is not None and event.topic == self._home_assistant.status_topic:
                if event.payload == BIRTH and not event.retained:
                    self._birth_at = time.monotonic() + random.uniform(0, _BIRTH_DELAY_S)  # noqa: S311 (no secret)
            elif not event.retained and not session.is_repeat(event):
                # A retained command would run again after each reconnect; commands are for now or never.
                self._desk.take(event)
        finally:
            # Only now (MQTT 5, clause 4.3.2): a command with a key is on disk, any other was handled.
            session.link.acknowledge(event)

    def _replay(self, command: AnyMessage) -> dict[str, Any]:
        assert isinstance(command, ReplayCommand)
        return {"ok": True, "count": self._outbox.requeue_range(command.epoch, command.first, command.last)}

    def _dead_letters(self, command: AnyMessage) -> dict[str, Any]:
        assert isinstance(command, DeadLettersCommand)
        if command.action == "requeue":
            if self._session is not None:
                self._session.forgive()
            return {"ok": True, "count": self._outbox.requeue_dead()}
        letters = [
            {"epoch": one.epoch, "seq": one.seq, "topic": one.topic, "reason": one.reason, "bytes": len(one.payload)}
            for one in self._outbox.dead_letters(command.limit)
        ]
        return {"ok": True, "count": self._outbox.dead, "detail": {"letters": letters}}
