"""A subscriber that notes in a history whatever reaches it, repeats included, and comes back after each loss."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from edge.alerts.message import Alert, Gap, Notice, parse
from edge.alerts.topics import Kind as TopicKind
from edge.alerts.topics import subscriptions
from tests.faults.history import Id, Kind, Recorder

if TYPE_CHECKING:
    from pathlib import Path

    from edge.alerts.message import AnyMessage

_KINDS = frozenset({TopicKind.ALERT, TopicKind.GAP, TopicKind.NOTICE})


class Listener:
    """Alerts and gaps of all boxes; a context manager that is connected inside, or :meth:`leave` and :meth:`come`.

    Args:
        port: of the broker on 127.0.0.1.
        history: file of the facts.
        session: name of a session that the broker keeps while this client is away; none by default.
    """

    def __init__(self, port: int, history: Path, *, session: str | None = None) -> None:
        self._port = port
        self._session = session
        self._recorder = Recorder(history)
        self._changed = threading.Condition()
        self._subscribed = False
        self._client: Client | None = None
        self.arrived: dict[Id, Alert | Notice] = {}
        self.gaps: dict[Id, Gap] = {}

    def __enter__(self) -> Listener:  # noqa: PYI034 (Self needs Python 3.11)
        self.come()
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def come(self) -> None:
        """Connect, and wait until the subscription stands."""
        self._subscribed = False
        self._client = Client(
            CallbackAPIVersion.VERSION2, client_id=self._session or "", clean_session=self._session is None
        )
        self._client.reconnect_delay_set(0.05, 0.2)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", self._port)
        self._client.loop_start()
        with self._changed:
            assert self._changed.wait_for(lambda: self._subscribed, 15), "the broker takes no subscription"

    def leave(self) -> None:
        """Disconnect in order."""
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None

    def wait_for(self, wanted: set[Id], *, quiet_s: float) -> set[Id]:
        """Wait until all that is wanted has arrived, or nothing new has for ``quiet_s``; returns what has not.

        A broker has no word for "that was all".
        """
        with self._changed:
            while not wanted <= self.arrived.keys():
                before = len(self.arrived)
                if not self._changed.wait_for(lambda n=before: len(self.arrived) > n, quiet_s):  # type: ignore[misc]
                    break
            return wanted - self.arrived.keys()

    def wait_for_count(self, count: int, timeout: float) -> bool:
        """Wait until so many different messages have arrived; False where they have not."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.arrived) >= count, timeout)

    def wait_for_gap(self, timeout: float) -> Gap:
        """The first gap message."""
        with self._changed:
            assert self._changed.wait_for(lambda: bool(self.gaps), timeout), "no gap message came"
            return next(iter(self.gaps.values()))

    def _on_connect(self, client: Client, *_: object) -> None:
        client.subscribe([(name, 1) for name in subscriptions("lineward", kinds=_KINDS)])

    def _on_subscribe(self, *_: object) -> None:
        with self._changed:
            self._subscribed = True
            self._changed.notify_all()

    def _on_message(self, _client: Client, _data: object, message: MQTTMessage) -> None:
        parsed = parse(message.topic, message.payload)
        assert isinstance(parsed, Alert | Gap | Notice)
        found = Id(parsed.box, parsed.epoch, parsed.seq)
        if isinstance(parsed, Gap):
            self._recorder.note(Kind.GAP, *found[:1], epoch=parsed.epoch, seq=parsed.seq, late=parsed.late,
                                first=parsed.first, last=parsed.last, dropped=parsed.dropped)  # fmt: skip
            with self._changed:
                self.gaps[found] = parsed
                self._changed.notify_all()
            return
        content = content_of(parsed)
        self._recorder.note(
            Kind.DELIVERED, parsed.box, epoch=parsed.epoch, seq=parsed.seq, content=content, late=parsed.late
        )
        with self._changed:
            if found not in self.arrived:
                self.arrived[found] = parsed
                self._changed.notify_all()


def content_of(message: AnyMessage) -> str:
    """What no other message of any box has; of notices and verdicts, what tells most of them apart."""
    if isinstance(message, Alert):
        return f"{message.event_id} {message.phase.value}"
    return message.text if isinstance(message, Notice) else f"{message.schema_} {getattr(message, 'part_id', '')}"
