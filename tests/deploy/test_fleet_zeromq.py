"""The contract of transports over ZeroMQ: a service, and boxes that speak to it through CURVE."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest
import zmq

from deploy.aggregator.identity import enrol
from deploy.aggregator.service import Service
from deploy.aggregator.settings import load_settings
from edge.errors import FederationError
from edge.federation.connection import Connection
from edge.federation.keys import make_keys, write_keys
from edge.federation.pace import Pace
from edge.federation.session import Member, Session
from edge.federation.spool import Spool, Upload
from edge.federation.wire import Limits, encode_bank
from tests.deploy.fleet_contract import (
    BOXES,
    EMBEDDING,
    FLEET,
    PRODUCT,
    FleetContract,
    Given,
    Ledger,
    Verdict,
    keep_books,
    settings_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


class ZeroMq:
    """A service in a thread; each box opens a connection of its own for everything it says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "boxes").mkdir()
        self.server = make_keys()
        write_keys(folder, self.server, name="aggregator")
        self.keys = {box: make_keys() for box in BOXES}
        for box, keys in self.keys.items():
            enrol(folder / "boxes", box, keys.public)
        (folder / "aggregator.yaml").write_text(settings_text(folder, period_s=3600))
        self.service = Service(load_settings(folder / "aggregator.yaml"))
        self.thread = threading.Thread(target=self.service.run, daemon=True)
        self.thread.start()
        assert self.service.started.wait(10)

    @contextlib.contextmanager
    def session(self, box: str) -> Iterator[Session]:
        never, context = os.eventfd(0), zmq.Context()
        spool = Spool(self.folder / f"{box.replace('/', '-')}.db")
        try:
            with Connection(
                context,
                self.service.endpoint,
                server_key=self.server.public,
                keys=self.keys[box],
                stop=never,
                wake=never,
                connect_s=5.0,
                reply_s=10.0,
            ) as connection:
                connection.open()
                member = Member(FLEET, box, PRODUCT, "", EMBEDDING)
                yield Session(
                    connection, member=member, spool=spool, limits=Limits(), pace=Pace(), count=lambda *_: None
                )
        finally:
            spool.close()
            context.term()
            os.close(never)

    def hand_over(self, given: Mapping[str, Given]) -> dict[str, Verdict]:
        verdicts = {}
        for box, one in given.items():
            update, digest = one.update, hashlib.sha256(one.payload).hexdigest()
            upload = Upload(1, digest, update.embedding_id, update.product, update.round, one.payload)
            with self.session(box) as session:
                welcome = session.hello(0)
                try:
                    verdicts[box] = Verdict(session.send(upload, welcome).counted_in_round)
                except FederationError as error:
                    verdicts[box] = Verdict(0, error.code)
        return verdicts

    def bank(self, box: str, version: int) -> bytes:
        deadline = time.monotonic() + 20
        with self.session(box) as session:
            while session.hello(0).bank_version < version:
                assert time.monotonic() < deadline
                time.sleep(0.05)  # a box can only ask
            return encode_bank(session.fetch(version))

    def close(self) -> None:
        self.service.request_stop()
        self.thread.join(10)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ledger]:
    transport = ZeroMq(tmp_path_factory.mktemp("zeromq"))
    try:
        yield keep_books(transport)
    finally:
        transport.close()


class TestZeroMq(FleetContract):
    """All of the contract."""
