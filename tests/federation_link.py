"""What tests of the link between box and aggregator share: updates and banks, keys, and a socket with a script."""

from __future__ import annotations

import hashlib
import threading
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.aggregator.identity import Registry, enrol, revoke
from deploy.aggregator.server import Server
from edge.errors import FederationError
from edge.federation.client import FederationClient
from edge.federation.keys import KeyPair, make_keys
from edge.federation.messages import (
    Chunk,
    Fetch,
    Hello,
    Nothing,
    Offer,
    Part,
    Progress,
    Receipt,
    Resume,
    Welcome,
)
from edge.federation.refusals import Refusal
from edge.federation.update import FleetBank, MemoryUpdate, Order
from edge.federation.wire import encode_bank

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from deploy.aggregator.server import RateLimits
    from edge.federation.messages import Reply, Request

EMBEDDING = "ab" * 32
FLEET = "plants"
PRODUCT = "tile"
CREATED = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def make_update(box: str = "plant/a", *, rows: int = 16, width: int = 8, seed: int = 0, **fields: Any) -> MemoryUpdate:
    random = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "fleet": FLEET,
        "box": box,
        "product": PRODUCT,
        "subclass": "",
        "embedding_id": EMBEDDING,
        "round": 1,
        "order": Order.ANCHOR,
        "rows": random.standard_normal((rows, width)).astype(np.float16).astype(np.float32),
        "support": np.full(rows, 100, np.float32),
        "frames": np.full(rows, 20, np.float32),
        "n_frames": 50,
        "mean": np.zeros(width, np.float32),
        "std": np.ones(width, np.float32),
        "base_version": 0,
        "created": CREATED,
        "nonce": random.bytes(16).hex(),
    }
    return MemoryUpdate(**(values | fields))


def make_bank(version: int = 1, *, rows: int = 32, width: int = 8, seed: int = 0) -> FleetBank:
    random = np.random.default_rng(seed)
    return FleetBank(
        fleet=FLEET,
        pool=EMBEDDING,
        embedding_id=EMBEDDING,
        version=version,
        round=version,
        rows=random.standard_normal((rows, width)).astype(np.float16).astype(np.float32),
        mass=np.full(rows, 1 / rows, np.float32),
        boxes=np.ones(rows, np.uint16),
        members=("plant/a",),
        created=CREATED,
    )


class Script:
    """A handler without a store: takes updates in memory, hands one bank out, and can be told to misbehave."""

    def __init__(self) -> None:
        self.round = 1
        self.bank: tuple[int, bytes] | None = None
        self.max_chunk = 32 * 1024
        self.partial: dict[tuple[str, str], tuple[int, bytearray]] = {}
        self.received: list[tuple[str, bytes]] = []
        self.requests: list[tuple[str, Request]] = []
        self.refuse: Callable[[str, Request], FederationError | None] = lambda _box, _request: None
        self.changed = threading.Condition()

    def give(self, bank: FleetBank) -> bytes:
        self.bank = bank.version, encode_bank(bank)
        return self.bank[1]

    def wait_for(self, what: Callable[[], object], timeout: float) -> bool:
        with self.changed:
            return bool(self.changed.wait_for(what, timeout))

    def handle(self, box: str, request: Request, body: bytes) -> tuple[Reply, bytes]:
        with self.changed:
            self.requests.append((box, request))
            self.changed.notify_all()
            error = self.refuse(box, request)
            if error is not None:
                raise error
            return self._answer(box, request, body)

    def _answer(self, box: str, request: Request, body: bytes) -> tuple[Reply, bytes]:
        number = request.id
        if isinstance(request, Hello):
            version = 0 if self.bank is None else self.bank[0]
            return Welcome(
                id=number,
                round=self.round,
                closes_in_ms=1000,
                bank_version=version,
                max_chunk=self.max_chunk,
                max_update_bytes=2**22,
            ), b""
        if isinstance(request, Offer | Chunk):
            return self._take(box, request, body), b""
        assert isinstance(request, Fetch)
        if self.bank is None or request.version != self.bank[0]:
            return Nothing(id=number, bank_version=0 if self.bank is None else self.bank[0]), b""
        version, payload = self.bank
        sha256 = hashlib.sha256(payload).hexdigest()
        part = payload[request.offset : request.offset + self.max_chunk]
        return Part(id=number, version=version, size=len(payload), sha256=sha256, offset=request.offset), part

    def _take(self, box: str, request: Offer | Chunk, body: bytes) -> Reply:
        number, sha256 = request.id, request.sha256
        receipt = Receipt(id=number, sha256=sha256, counted_in_round=self.round)
        if isinstance(request, Offer):
            if any(hashlib.sha256(payload).hexdigest() == sha256 for _, payload in self.received):
                return receipt
            _, have = self.partial.setdefault((box, sha256), (request.size, bytearray()))
            return Resume(id=number, sha256=sha256, offset=len(have))
        size, have = self.partial[box, sha256]
        if request.offset != len(have):
            raise FederationError(Refusal.BAD_OFFSET, "not there")
        have += body
        if len(have) < size:
            return Progress(id=number, sha256=sha256, offset=len(have))
        if hashlib.sha256(have).hexdigest() != sha256:
            del self.partial[box, sha256]
            raise FederationError(Refusal.BAD_HASH, "altered")
        self.received.append((box, bytes(have)))
        return receipt


class Listener:
    """A server with a handler, in a thread of its own; boxes are enrolled in a folder that is read all the time."""

    def __init__(self, folder: Path, handler: Any = None, *, rates: RateLimits | None = None, port: int = 0) -> None:
        self.folder = folder
        self.handler = handler or Script()
        self.keys = make_keys()
        self.alarms: list[tuple[Refusal, str, str]] = []
        self.boxes = folder / "boxes"
        self.boxes.mkdir(exist_ok=True)
        self.registry = Registry(self.boxes)
        self._rates = rates
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.server: Server | None = None
        self.start(port)

    @property
    def address(self) -> str:
        return self._address

    @property
    def port(self) -> int:
        return int(self._address.rpartition(":")[2])

    def start(self, port: int = 0) -> None:
        self._stop.clear()
        self.server = Server(
            f"tcp://127.0.0.1:{port}",
            keys=self.keys,
            boxes=lambda: self.registry.boxes,
            handler=self.handler,
            alarm=lambda *values: self.alarms.append(values),
            rates=self._rates,
        )
        self._address = self.server.endpoint
        self._thread = threading.Thread(target=self._run, args=(self.server,), daemon=True)
        self._thread.start()

    def _run(self, server: Server) -> None:
        while not self._stop.is_set():
            server.poller.poll(20)
            server.serve()
            self.registry.refresh()
        server.close()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)
            assert not self._thread.is_alive()

    def __enter__(self) -> Listener:  # noqa: PYI034 (Self needs Python 3.11)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def enrol(self, box: str = "plant/a") -> KeyPair:
        keys = make_keys()
        enrol(self.boxes, box, keys.public)
        deadline = time.monotonic() + 5
        while keys.public not in self.registry.boxes.names:
            assert time.monotonic() < deadline
            self.registry.refresh()
        return keys

    def revoke(self, keys: KeyPair, box: str = "plant/a") -> None:
        """Take a key back, and wait until the aggregator has read it."""
        revoke(self.boxes, box)
        deadline = time.monotonic() + 5
        while keys.public in self.registry.boxes.names:
            assert time.monotonic() < deadline
            self.registry.refresh()

    def client(
        self, keys: KeyPair, box: str = "plant/a", *, address: str | None = None, **options: Any
    ) -> FederationClient:
        return make_client(self.folder, keys, box, address or self.address, server_key=self.keys.public, **options)


def make_client(folder: Path, keys: KeyPair, box: str, address: str, **options: Any) -> FederationClient:
    """A client whose pauses suit a test."""
    usual: dict[str, Any] = {
        "path": folder / f"{box.replace('/', '-')}.db",
        "fleet": FLEET,
        "product": PRODUCT,
        "embedding_id": EMBEDDING,
        "poll_s": 0.1,
        "connect_s": 2.0,
        "reply_s": 5.0,
        "backoff_min_s": 0.02,
        "backoff_max_s": 0.1,
    }
    return FederationClient(address=address, keys=keys, box=box, **(usual | options))
