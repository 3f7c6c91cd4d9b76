"""A round engine without sockets: a clock that is set by hand, merging in place, a box that sends as told."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.aggregator.aggregate import AggregateSettings
from deploy.aggregator.closing import Merger
from deploy.aggregator.round_settings import Clock, RoundSettings
from deploy.aggregator.rounds import Rounds
from deploy.aggregator.store import Store
from edge.federation.messages import Chunk, Fetch, Hello, Offer, Part, Progress, Receipt, Resume
from edge.federation.wire import Limits, decode_bank, encode_update
from tests.edge.federation_values import EMBEDDING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from deploy.aggregator.closing import Closing, Gate
    from edge.federation.messages import Reply
    from edge.federation.update import FleetBank, MemoryUpdate

PRODUCT = "ball screw"
POOL = f"{EMBEDDING}/{PRODUCT}"
SETTINGS = RoundSettings(fleet="plant", close_at=3, min_boxes=2, period_s=60)


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where that is a file system: a sync takes milliseconds on disk, and a test makes hundreds."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@dataclass
class HandClock:
    """Time that passes only when told to."""

    ns: int = 10**12
    boot_name: str = "boot-1"
    wall: datetime = datetime(2030, 1, 1, tzinfo=timezone.utc)

    def clock(self) -> Clock:
        return Clock(now_ns=lambda: self.ns, boot=lambda: self.boot_name, utc=lambda: self.wall)

    def pass_s(self, seconds: float) -> None:
        self.ns += int(seconds * 1e9)
        self.wall += timedelta(seconds=seconds)


@dataclass
class Examination:
    accepted: bool = True
    reasons: tuple[str, ...] = ()


def accept_all(update: MemoryUpdate, **_: Any) -> Examination:
    return Examination()


def in_place(work: Callable[[], Closing]) -> Future[Closing]:
    """An executor's submit that has done the work when it returns."""
    future: Future[Closing] = Future()
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 (as an executor does)
        future.set_exception(error)
    return future


@dataclass
class Fleet:
    """An engine on a store, that can be ended and begun again."""

    path: Path
    settings: RoundSettings = SETTINGS
    gate: Gate = accept_all
    clock: HandClock = field(default_factory=HandClock)
    submit: Callable[[Callable[[], Closing]], Future[Closing]] = in_place
    references: dict[str, Any] = field(default_factory=dict)
    aggregate: AggregateSettings = field(default_factory=lambda: AggregateSettings(rows=8))

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self.store = Store(self.path)
        merge = Merger(
            gate=self.gate,
            settings=self.aggregate,
            min_boxes=self.settings.min_boxes,
            limits=self.settings.limits,
            references=self.references,
            carry_rounds=self.settings.carry_rounds,
        )
        self.rounds = Rounds(
            self.store,
            settings=self.settings,
            merge=merge,
            submit=self.submit,
            clock=self.clock.clock(),
        )

    def restart(self) -> None:
        self.store.close()
        self.begin()

    def ask(self, box: str, request: Any, body: bytes = b"") -> Reply:
        return self.rounds.handle(box, request, body)[0]

    def hello(self, by: str = "north/one", **changes: Any) -> Reply:
        values = {"fleet": "plant", "box": by, "product": PRODUCT, "embedding_id": EMBEDDING, "have_version": 0}
        return self.ask(by, Hello(id=1, **(values | changes)))

    def offer(self, box: str, payload: bytes, round_: int, **changes: Any) -> Reply:
        digest = hashlib.sha256(payload).hexdigest()
        values = {"embedding_id": EMBEDDING, "product": PRODUCT, "sha256": digest, "size": len(payload)}
        return self.ask(box, Offer(id=2, round=round_, **(values | changes)))

    def send(self, update: MemoryUpdate, *, by: str = "", size: int = 100, **changes: Any) -> Receipt:
        """Deliver an update as a box does; ``by`` is who holds the key."""
        payload = encode_update(update)
        return self.send_bytes(payload, by=by or update.box, round_=update.round, size=size, **changes)

    def send_bytes(self, payload: bytes, *, by: str, round_: int = 1, size: int = 200, **changes: Any) -> Receipt:
        digest = changes.get("sha256") or hashlib.sha256(payload).hexdigest()
        reply = self.offer(by, payload, round_, **changes)
        while not isinstance(reply, Receipt):
            assert isinstance(reply, (Resume, Progress))
            body = payload[reply.offset : reply.offset + size]
            reply = self.ask(by, Chunk(id=3, sha256=digest, offset=reply.offset), body)
        return reply

    def settle(self, ticks: int = 4) -> None:
        for _ in range(ticks):
            self.rounds.tick()

    def fetch(self, version: int = 0, box: str = "north/one") -> FleetBank | None:
        """The bank as a box gets it."""
        payload = b""
        while True:
            request = Fetch(id=4, embedding_id=EMBEDDING, product=PRODUCT, version=version, offset=len(payload))
            reply, body = self.rounds.handle(box, request, b"")
            if not isinstance(reply, Part):
                return None
            payload += body
            if len(payload) == reply.size:
                assert hashlib.sha256(payload).hexdigest() == reply.sha256
                return decode_bank(payload, Limits())
