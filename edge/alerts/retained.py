"""What a box keeps said: the last payload of each retained topic, and which are to be said again or cleared.

Must not know what they say, nor the broker.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from edge.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edge.alerts.ledger import Ledger

LOG = logging.getLogger("lineward.publisher")


class Retained:
    """Retained topics of a box; any thread may call any method.

    Args:
        ledger: remembers topics that have to be cleared once nobody speaks for them, across restarts.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._lock = threading.Lock()
        self._payloads: dict[str, bytes] = {}
        self._dirty: set[str] = set()
        self._unnoted: set[str] = set()
        self._noted: set[str] = set()

    @property
    def waiting(self) -> int:
        """Topics to be published."""
        return len(self._dirty)

    def put(self, topic: str, payload: bytes, *, passing: bool = False) -> None:
        """Set what a topic says. ``passing``: it is cleared when :meth:`keep` does not name it any more."""
        with self._lock:
            self._payloads[topic] = payload
            self._dirty.add(topic)
            if passing and topic not in self._noted:
                self._unnoted.add(topic)

    def keep(self, topics: Iterable[str]) -> None:
        """Clear all passing topics but these: with the empty payload that makes a broker forget (MQTT 5, 3.3.1.3)."""
        try:
            known = self._ledger.topics()
        except StoreError as error:
            LOG.warning("retained topics of cameras that are gone cannot be looked up: %s", error)
            known = frozenset()
        with self._lock:
            self._noted |= known
            for topic in (known | self._noted | self._unnoted) - set(topics):
                self._payloads[topic] = b""
                self._dirty.add(topic)

    def again(self, topics: Iterable[str] | None = None) -> None:
        """Say these topics again, or all."""
        with self._lock:
            self._dirty |= set(self._payloads) if topics is None else self._payloads.keys() & set(topics)

    def take(self) -> tuple[str, bytes] | None:
        """The next topic to publish with its payload, noted where it is a passing one."""
        with self._lock:
            if not self._dirty:
                return None
            unnoted, self._unnoted = self._unnoted, set()
        if unnoted:
            try:
                self._ledger.add_topics(unnoted)
            except StoreError as error:
                LOG.warning("retained topics cannot be noted, and will not be cleared one day: %s", error)
        with self._lock:
            self._noted |= unnoted
            topic = min(self._dirty)
            self._dirty.discard(topic)
            return topic, self._payloads[topic]

    def current(self, topic: str) -> bytes | None:
        """What a topic says; None where it is no retained one."""
        return self._payloads.get(topic)

    def acknowledged(self, topic: str) -> None:
        """The broker has it; a topic that was cleared is forgotten here, too."""
        with self._lock:
            if self._payloads.get(topic) != b"" or topic in self._dirty:
                return
            del self._payloads[topic]
            self._noted.discard(topic)
        try:
            self._ledger.remove_topic(topic)
        except StoreError as error:
            LOG.warning("a cleared topic cannot be forgotten: %s", error)
