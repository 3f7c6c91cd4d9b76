"""Session: what is in flight over one connection, within its window, and what is held back since the broker refuses it.

Knows the outbox, the retained topics and the link; what they say and when they connect is the publisher's.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge.alerts.message import mark_late
from edge.errors import OutboxError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edge.alerts.mqtt import Acked, Connected, Incoming, Link, Lost
    from edge.alerts.outbox import Outbox, Row
    from edge.alerts.refused import Refused
    from edge.alerts.retained import Retained

LOG = logging.getLogger("lineward.publisher")
# Another try for acknowledgements that the disk has refused.
PAUSE_S = 5.0
# Fixed header, length of the topic, packet identifier and empty properties of a PUBLISH (MQTT 5, clause 3.3).
_PACKET_OVERHEAD = 16
_MESSAGE = "message "
# Held rows are few while a broker is well; these bound what is read past where it refuses a camera with a backlog.
_MAX_HELD = 5000
_READ_PAST = 500
_MAX_HANDLED = 256


@dataclass(slots=True)
class _Held:
    """What waits for another try under one key: rows, or a retained topic."""

    rows: dict[int, Row] = field(default_factory=dict)
    retained: bool = False


class Session:
    """One connection, used by one thread.

    Args:
        link: the connection.
        granted: what the broker allows.
        outbox: rows to send.
        retained: topics to keep said.
        refused: what the broker refuses; outlives the connection.
        window: messages in flight at most.
        careful: so many messages go one by one: the broker hung up because of one of them.
        unproving: a topic whose acceptance says nothing about others.
        counters: ``published``, ``acknowledged`` and ``refused`` are counted here.
    """

    def __init__(
        self,
        link: Link,
        granted: Connected,
        *,
        outbox: Outbox,
        retained: Retained,
        refused: Refused,
        window: int,
        careful: int,
        unproving: str,
        counters: dict[str, int],
    ) -> None:
        self.link = link
        self.careful = careful
        self.refused_last = False
        self._outbox = outbox
        self._retained = retained
        self._refused = refused
        self._window = min(window, granted.receive_maximum)
        self._packet_limit = granted.maximum_packet
        self._boundary = outbox.last_seq
        self._unproving = unproving
        self._counters = counters
        self._outstanding: dict[int, Row | str] = {}
        self._acknowledged: list[int] = []
        self._held: dict[str, _Held] = {}
        self._probing = False
        self._disk_error = ""
        self._disk_retry_at = 0.0
        self._handled: OrderedDict[int, int] = OrderedDict()

    @property
    def unsent(self) -> int:
        """Messages in flight."""
        return len(self._outstanding)

    @property
    def room(self) -> int:
        """Messages that may be sent now."""
        if self._probing:
            return 0
        return (1 if self.careful else self._window) - len(self._outstanding)

    @property
    def trouble(self) -> str:
        """Why not everything gets through, with the cure; empty where it does."""
        if self._disk_error:
            return self._disk_error
        for key, reason in self._refused.reasons.items():
            cure = "see the command dead_letters" if key.startswith(_MESSAGE) else "let this box publish there"
            return f"the broker refuses messages of this box ({reason}: {key}); {cure}"
        return ""

    def wait_s(self) -> float | None:
        """Seconds after which there is something to do without any event; None: nothing."""
        waits = [] if self._outstanding else [self._refused.wait_s(key) for key in self._held]
        if self._acknowledged and self._disk_error:
            waits.append(max(0.0, self._disk_retry_at - time.monotonic()))
        return min(waits, default=None)

    def send_retained(self) -> None:
        """Publish retained topics as far as there is room."""
        while self.room > 0 and (taken := self._retained.take()) is not None:
            topic, payload = taken
            if topic in self._refused:
                self._held.setdefault(topic, _Held()).retained = True
            elif self._too_large(topic, payload):
                self._counters["refused"] += 1
                LOG.error("%s: %d bytes are more than the broker takes; raise its limit", topic, len(payload))
            else:
                self.publish(topic, payload, retain=True)

    def send_rows(self) -> None:
        """Publish rows as far as there is room; then, alone, one message that the broker has refused before."""
        while self.room > 0 and sum(len(held.rows) for held in self._held.values()) < _MAX_HELD:
            rows = self._outbox.pending(_READ_PAST if len(self._refused) else self.room, boundary=self._boundary)
            if not rows:
                break
            rows = self._as_many_as_fit(rows)
            # Before they leave: a gap row must be known as seen even if the process dies in the next line.
            self._outbox.mark_sent(row.seq for row in rows)
            for row in rows:
                self._send_row(row)
        if not self._outstanding:
            self._probe()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, row: Row | None = None) -> None:
        """Send one message."""
        mid = self.link.publish(topic, payload, retain=retain)
        if mid is not None:
            self._counters["published"] += 1
            self._outstanding[mid] = topic if row is None else row
        # None: the connection is gone. Its Lost is in the inbox already; the next connection sends this again.

    def on_acked(self, event: Acked) -> None:
        """The broker has answered a message."""
        what = self._outstanding.pop(event.mid, None)
        if what is None:
            return
        self._probing = False
        self.careful = max(0, self.careful - 1)
        if event.refusal:
            self._refuse(what if isinstance(what, str) else what.topic, what, event.refusal)
            return
        self.refused_last = False
        if isinstance(what, str):
            self._retained.acknowledged(what)
            keys = [what]
        else:
            self._acknowledged.append(what.seq)
            keys = [what.topic, _key(what)]
        for key in keys:
            if key != self._unproving:
                self._accept(key)

    def settle(self) -> None:
        """Record acknowledgements; a disk that refuses gets another try later."""
        if not self._acknowledged or (self._disk_error and time.monotonic() < self._disk_retry_at):
            return
        try:
            self._counters["acknowledged"] += self._outbox.acknowledge(self._acknowledged)
        except OutboxError as error:
            # They stay in flight, so nothing is sent twice; a disk with space again takes them then.
            self._disk_error, self._disk_retry_at = str(error), time.monotonic() + PAUSE_S
        else:
            self._acknowledged.clear()
            self._disk_error = ""

    def blame(self, lost: Lost) -> int:
        """Find what the broker hung up about; how many messages the next session must send one by one to learn it."""
        if not lost.disliked or self.refused_last:
            return 0
        if len(self._outstanding) != 1:
            return len(self._outstanding)
        what = next(iter(self._outstanding.values()))
        self._refuse(what if isinstance(what, str) else _key(what), what, lost.reason)
        return 0

    def is_repeat(self, message: Incoming) -> bool:
        """Whether this message was handled in this connection (MQTT 5, clause 4.3.2: same identifier, DUP set)."""
        if not message.mid:
            return False
        digest = hash((message.topic, message.payload))
        repeat = message.repeated and self._handled.get(message.mid) == digest
        self._handled[message.mid] = digest
        self._handled.move_to_end(message.mid)
        if len(self._handled) > _MAX_HANDLED:
            self._handled.popitem(last=False)
        return repeat

    def forgive(self) -> None:
        """Send everything that is held back as if it had never been refused."""
        self._refused.forget()
        for key in list(self._held):
            self._release(key)

    def _as_many_as_fit(self, rows: list[Row]) -> list[Row]:
        """The first of these rows, up to the one for which there is no room; held ones need none."""
        room = self.room
        for index, row in enumerate(rows):
            room -= self._key_refused(row) is None
            if room < 0:
                return rows[:index]
        return rows

    def _key_refused(self, row: Row) -> str | None:
        return next((key for key in (row.topic, _key(row)) if key in self._refused), None)

    def _send_row(self, row: Row) -> None:
        key = self._key_refused(row)
        if self._too_large(row.topic, row.payload):
            self._counters["refused"] += 1
            self._set_aside([row], f"larger than the {self._packet_limit} bytes that the broker takes")
        elif key is None:
            self._publish_row(row)
        elif self._refused.given_up(key) and self._refused.wait_s(key) > 0:
            self._set_aside([row], self._refused.reasons[key])
        else:
            self._held.setdefault(key, _Held()).rows[row.seq] = row

    def _publish_row(self, row: Row) -> None:
        self.publish(row.topic, mark_late(row.payload) if row.late else row.payload, row=row)

    def _probe(self) -> None:
        """Alone in the window: a broker that hangs up about it takes nothing else with it."""
        key = next((key for key in self._held if self._refused.wait_s(key) == 0), None)
        if key is None:
            return
        held = self._held[key]
        payload = self._retained.current(key) if held.retained else None
        if payload is not None:
            self._probing = True
            self.publish(key, payload, retain=True)
        elif held.rows:
            self._probing = True
            self._publish_row(held.rows[min(held.rows)])
        else:
            del self._held[key]

    def _refuse(self, key: str, what: Row | str, reason: str) -> None:
        self._counters["refused"] += 1
        self.refused_last = True
        held = self._held.setdefault(key, _Held())
        if isinstance(what, str):
            held.retained = self._retained.current(what) is not None
        else:
            held.rows[what.seq] = what
        if self._refused.note(key, reason) and held.rows:
            rows, held.rows = held.rows, {}
            self._set_aside(rows.values(), reason)

    def _accept(self, key: str) -> None:
        given_up = self._refused.given_up(key)
        if not self._refused.accept(key):
            return
        LOG.info("the broker takes %s again", key)
        self._release(key)
        if given_up:
            self._outbox.requeue_dead()

    def _release(self, key: str) -> None:
        held = self._held.pop(key, _Held())
        busy = {what.seq for what in self._outstanding.values() if not isinstance(what, str)} | set(self._acknowledged)
        self._outbox.release_sent(held.rows.keys() - busy)
        if held.retained:
            self._retained.again([key])

    def _set_aside(self, rows: Iterable[Row], reason: str) -> None:
        rows = list(rows)
        try:
            done = self._outbox.set_aside([row.seq for row in rows], reason)
        except OutboxError as error:
            # They stay in flight until the next connection, and are looked at again then.
            LOG.warning("%d messages that the broker refuses cannot be set aside: %s", len(rows), error)
            return
        if done:
            LOG.error("%d messages of %s are dead letters now: %s", len(done), rows[0].topic, reason)

    def _too_large(self, topic: str, payload: bytes) -> bool:
        return len(topic.encode()) + len(payload) + _PACKET_OVERHEAD > self._packet_limit


def _key(row: Row) -> str:
    return f"{_MESSAGE}{row.seq}"
