"""Tells operators of the store's events: a log line each, and an MQTT notice for those that a person should act on."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import TYPE_CHECKING

from deploy.aggregator.records import EventKind
from edge.alerts.message import Severity, encode, gap_maker, notice_message
from edge.alerts.outbox import Draft, Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.topics import Identity
from edge.errors import OutboxError

if TYPE_CHECKING:
    from pathlib import Path

    from deploy.aggregator.records import Event
    from deploy.aggregator.settings import AggregatorSettings
    from deploy.aggregator.store import Store

LOG = logging.getLogger("lineward.aggregator")
OUTBOX_FILE = "outbox.db"
TOLD_FILE = "told.json"
_SEVERITY = {
    EventKind.SECURITY: Severity.ALARM,
    EventKind.DAMAGE: Severity.ALARM,
    EventKind.QUARANTINE: Severity.WARNING,
}
_LEVEL = {Severity.ALARM: logging.ERROR, Severity.WARNING: logging.WARNING}
_STOP_S = 1.0


class Notices:
    """Follows the events of a store. What was told is remembered, so that a restart neither skips nor repeats.

    Args:
        settings: names the broker, if any.
        store: whose events.

    Raises:
        OutboxError: the outbox of the notices cannot be opened.
    """

    def __init__(self, settings: AggregatorSettings, store: Store) -> None:
        self._store = store
        self._told_file: Path = settings.state_dir / TOLD_FILE
        self._told = self._read_told()
        self._outbox: Outbox | None = None
        self._publisher: Publisher | None = None
        if settings.broker is not None:
            identity = Identity(site=settings.site, box=settings.name, prefix=settings.broker.prefix)
            self._identity = identity
            self._outbox = Outbox(settings.state_dir / OUTBOX_FILE, make_gap=gap_maker(identity))
            self._publisher = Publisher(settings=settings.broker, identity=identity, outbox=self._outbox)
            self._publisher.start()

    def look(self) -> int:
        """Tell what is new; returns how many events there were.

        Raises:
            StoreError: the events cannot be read.
        """
        newest = self._store.events(limit=1)
        if newest and newest[-1].id < self._told:
            self._told = 0  # the store was begun anew
        count = 0
        for event in self._store.events(after=self._told):
            if not self._tell(event):
                break
            self._told = event.id
            count += 1
        if count:
            self._write_told()
        return count

    def close(self) -> None:
        """Stop; what the broker has not taken is sent after the next start."""
        if self._publisher is not None:
            self._publisher.stop(_STOP_S)
        if self._outbox is not None:
            self._outbox.close()

    def _tell(self, event: Event) -> bool:
        """Log an event and store its notice; returns whether it is told."""
        severity = _SEVERITY.get(event.kind)
        where = " ".join(filter(None, (event.pool and f"pool {event.pool}:", event.box and f"box {event.box}:")))
        text = f"{where} {event.text}".strip()
        LOG.log(_LEVEL.get(severity, logging.INFO) if severity else logging.INFO, "%s: %s", event.kind.value, text)
        if self._outbox is None or severity is None:
            return True

        def make(epoch: str, seq: int) -> bytes:
            detail = {"event": event.id, "ts": event.ts, "pool": event.pool, "box": event.box, "code": event.code}
            notice = notice_message(
                identity=self._identity, epoch=epoch, seq=seq, kind=f"federation.{event.kind.value}",
                severity=severity, text=text, detail={name: value for name, value in detail.items() if value},
            )  # fmt: skip
            return encode(notice)

        try:
            self._outbox.append_many([Draft(self._identity.notice, make)])
        except OutboxError as error:
            LOG.warning("%s", error)
            return False
        return True

    def _read_told(self) -> int:
        try:
            told = json.loads(self._told_file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0
        return told if isinstance(told, int) and told >= 0 else 0

    def _write_told(self) -> None:
        beside = self._told_file.with_suffix(".new")
        # What cannot be written is told once more after a restart.
        with contextlib.suppress(OSError):
            beside.write_text(json.dumps(self._told), encoding="ascii")
            beside.replace(self._told_file)
