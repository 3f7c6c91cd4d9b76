"""An aggregator in a process of its own that can be told where to die, and boxes that live through it."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import TYPE_CHECKING, Any

from deploy.aggregator import rounds, service
from deploy.aggregator.aggregate import AggregateSettings
from deploy.aggregator.identity import enrol
from deploy.aggregator.records import RoundState
from deploy.aggregator.round_settings import Clock, RoundSettings
from deploy.aggregator.service import Service
from deploy.aggregator.settings import AggregatorSettings
from deploy.aggregator.store import Store
from edge.federation.client import FederationClient
from edge.federation.keys import KeyPair, make_keys, write_keys
from tests.deploy.round_values import PRODUCT, accept_all
from tests.edge.federation_values import EMBEDDING
from tests.mosquitto_process import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from deploy.aggregator.records import Partial, Round, Upload

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
CHUNK = 1024


class Point(str, Enum):
    """Where the aggregator dies, in the order of a round."""

    OFFER_STORED = "offer stored, not answered"
    CHUNK_STORED = "chunk stored, not answered"
    UPDATE_NOT_COMMITTED = "whole update written, not committed"
    UPDATE_COMMITTED = "whole update on disk, no receipt sent"
    ROUND_CLOSING = "round closing, nothing merged"
    MERGING = "in the middle of merging"
    BANK_NOT_COMMITTED = "bank written, not committed"
    BANK_COMMITTED = "bank on disk, nobody told"


@dataclass(frozen=True)
class Death:
    """Die when ``point`` is reached for the ``times``-th time."""

    point: Point
    times: int = 1


class MortalStore(Store):
    """The store, with a process that dies at a named point of its use."""

    death: Death | None = None

    def __init__(self, path: Path, *, serve: bool = True) -> None:
        self._seen = 0
        self._done: list[Point] = []
        self._outer = True
        super().__init__(path, serve=serve)

    def reach(self, point: Point) -> None:
        if self.death is not None and self.death.point is point:
            self._seen += 1
            if self._seen == self.death.times:
                os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        with self._mutex:
            outer, self._outer = self._outer, False
            if not outer:
                with super().transaction():
                    yield
                return
            self._done = []
            try:
                with super().transaction():
                    yield
                    for point in self._done:
                        if point is Point.UPDATE_COMMITTED:
                            self.reach(Point.UPDATE_NOT_COMMITTED)
                        if point is Point.BANK_COMMITTED:
                            self.reach(Point.BANK_NOT_COMMITTED)
            finally:
                self._outer = True
            for point in self._done:
                self.reach(point)

    def begin_partial(self, **values: Any) -> None:
        with self.transaction():
            super().begin_partial(**values)
            self._done.append(Point.OFFER_STORED)

    def append_chunk(self, partial: Partial, body: bytes) -> None:
        with self.transaction():
            super().append_chunk(partial, body)
            self._done.append(Point.CHUNK_STORED)

    def add_upload(self, **values: Any) -> None:
        with self.transaction():
            super().add_upload(**values)
            self._done.append(Point.UPDATE_COMMITTED)

    def set_round_state(self, pool: str, number: int, state: RoundState, **values: Any) -> None:
        with self.transaction():
            super().set_round_state(pool, number, state, **values)
            if state is RoundState.CLOSING:
                self._done.append(Point.ROUND_CLOSING)

    def payload(self, upload: Upload) -> bytes | None:
        found = super().payload(upload)
        self.reach(Point.MERGING)
        return found

    def add_bank(self, **values: Any) -> None:
        with self.transaction():
            super().add_bank(**values)
            self._done.append(Point.BANK_COMMITTED)


def serve(settings: AggregatorSettings, death: Death | None) -> None:
    """What the process does. UTC stands still, so that two runs can be compared byte for byte."""
    MortalStore.death = death
    service.Store = MortalStore  # type: ignore[misc,attr-defined]
    rounds.Clock = functools.partial(Clock, utc=lambda: NOW)  # type: ignore[misc,assignment]
    Service(settings, gate=accept_all).run()


def forks() -> Any:
    """Where processes come from: one that has imported everything, so that each start takes milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


class Plant:
    """An aggregator that is started and killed, and boxes that know its address.

    Args:
        folder: for keys, state and spools.
        boxes: names of the boxes.
        durable: whether the aggregator finds its state again; without, every start has a folder of its own.
        settings: of the rounds.
    """

    def __init__(self, folder: Path, boxes: tuple[str, ...], *, durable: bool = True, **settings: Any) -> None:
        self.folder = folder
        self.durable = durable
        self._starts = 0
        self.port = free_port()
        self._server_keys = make_keys()
        self._keys: dict[str, KeyPair] = {}
        self.process: BaseProcess | None = None
        write_keys(folder, self._server_keys, name="aggregator")
        for box in boxes:
            self._keys[box] = make_keys()
            enrol(folder / "boxes", box, self._keys[box].public)
        values = {"fleet": "plant", "close_at": len(boxes), "min_boxes": 2, "period_s": 600, "max_chunk": CHUNK}
        self._rounds = RoundSettings(**(values | settings))

    def settings(self) -> AggregatorSettings:
        name = "state" if self.durable else f"state-{self._starts}"
        return AggregatorSettings(
            listen=f"tcp://127.0.0.1:{self.port}",
            key_file=self.folder / "aggregator.key_secret",
            boxes=self.folder / "boxes",
            state_dir=self.folder / name,
            rounds=self._rounds,
            merge=AggregateSettings(rows=64),
        )

    def start(self, death: Death | None = None) -> None:
        self._starts += 1
        self.process = forks().Process(target=serve, args=(self.settings(), death), daemon=True)
        self.process.start()

    def wait_for_death(self, seconds: float) -> None:
        assert self.process is not None
        self.process.join(seconds)
        assert self.process.exitcode == -signal.SIGKILL, f"the point was not reached: {self.process.exitcode}"

    def stop(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.kill()
            self.process.join(10)

    def client(self, box: str, **options: Any) -> FederationClient:
        values = {"poll_s": 0.1, "backoff_min_s": 0.05, "backoff_max_s": 0.3, "reply_s": 5.0, "connect_s": 2.0}
        return FederationClient(
            address=f"tcp://127.0.0.1:{self.port}",
            server_key=self._server_keys.public,
            keys=self._keys[box],
            fleet="plant",
            box=box,
            product=PRODUCT,
            embedding_id=EMBEDDING,
            path=self.folder / f"{box.replace('/', '-')}.db",
            **(values | options),
        )

    def store(self) -> Store:
        return Store(self.settings().store, serve=False)

    def open_rounds(self) -> list[Round]:
        with self.store() as store:
            return store.rounds(state=RoundState.OPEN)
