"""The contract of transports under Flower: a SuperLink and three SuperNodes as processes, and what a kill leaves."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from typing import TYPE_CHECKING

import pytest

from edge.federation.refusals import Refusal
from tests.deploy.fleet_contract import (
    BOXES,
    A,
    B,
    FleetContract,
    Given,
    Ledger,
    Verdict,
    decoded,
    expected,
    given,
    keep_books,
    settings_text,
    updates_of,
)
from tests.deploy.flower_processes import Federation, can_isolate, can_trace, missing, outside_connects

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

NODES = {box: box.rpartition("/")[2] for box in BOXES}
ROUND_LIMIT_S = 90


class Flower:
    """Boxes share a folder with their SuperNode; each step is one submitted run."""

    def __init__(self, folder: Path, *, period_s: float, traced: bool) -> None:
        self.federation = Federation(folder, NODES, traced=traced)
        self.settings = folder / "aggregator.yaml"
        self.settings.write_text(settings_text(folder, period_s=period_s))
        self.seconds: list[float] = []

    def start(self) -> None:
        self.federation.start_superlink()
        self.federation.register()
        for node in NODES.values():
            self.federation.start_node(node)

    def place(self, box: str, one: Given | None) -> None:
        path = self.federation.exchange(NODES[box]) / "update.bin"
        path.unlink(missing_ok=True)
        if one is not None:
            path.write_bytes(one.payload)

    def verdict(self, box: str) -> Verdict:
        outcome = json.loads((self.federation.exchange(NODES[box]) / "outcome.json").read_text())
        return Verdict(outcome["counted_in_round"], Refusal(outcome["refused"]) if outcome["refused"] else None)

    def hand_over(self, given: Mapping[str, Given]) -> dict[str, Verdict]:
        for box in BOXES:
            self.place(box, given.get(box))
        began = time.monotonic()
        assert self.federation.submit(self.settings) == 0, self.federation.log("flwr")
        self.seconds.append(time.monotonic() - began)
        return {box: self.verdict(box) for box in given}

    def bank(self, box: str, version: int) -> bytes:
        data = (self.federation.exchange(NODES[box]) / "bank.bin").read_bytes()
        assert decoded(data).version == version
        return data


@pytest.fixture(scope="module")
def flower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    transport = Flower(tmp_path_factory.mktemp("flower"), period_s=30, traced=False)
    try:
        transport.start()
        yield transport
    finally:
        transport.federation.stop()


@pytest.fixture(scope="module")
def ledger(flower: Flower) -> Ledger:
    return keep_books(flower)


class TestFlower(FleetContract):
    """All of the contract, and what only processes can show."""

    @pytest.mark.usefixtures("ledger")
    def test_round_takes_no_longer_than_its_limit(self, flower: Flower) -> None:
        assert flower.seconds[0] <= ROUND_LIMIT_S


def test_trace_of_another_machine_is_seen() -> None:
    assert outside_connects('connect(3, {sin_addr=inet_addr("10.0.0.53")}, 16) = 0')
    assert outside_connects('connect(3, {inet_pton(AF_INET6, "2600:1900::1", &sin6_addr)}, 28) = -1')
    assert not outside_connects('connect(3, {sin_addr=inet_addr("127.0.0.1")}, 16) = 0\nconnect(3, {AF_UNIX}, 9) = 0')


@pytest.mark.skipif(not can_trace(), reason="strace is not on the path: apt-get install strace")
def test_killed_run_goes_on_when_it_is_submitted_again_and_nobody_speaks_to_another_machine(tmp_path: Path) -> None:
    transport = Flower(tmp_path, period_s=600, traced=True)
    federation, updates = transport.federation, {box: updates_of(box, 1, 1) for box in (A, B)}
    try:
        superlink = federation.start_superlink()
        federation.register()
        transport.place(A, given(updates[A]))
        federation.start_node(NODES[A])
        federation.submit(transport.settings, wait=False)
        federation.wait_for(lambda: uploads(tmp_path) == 1)
        federation.kill_superlink(superlink)
        transport.place(A, None)  # what has a receipt may be gone from the box
        federation.start_superlink()
        transport.place(B, given(updates[B]))
        federation.start_node(NODES[B])

        assert federation.submit(transport.settings) == 0, federation.log("flwr")

        bank = decoded(transport.bank(B, 1))
        assert bank.members == (A, B)
        assert bank.rows.tobytes() == expected(list(updates.values())).rows.tobytes()
    finally:
        federation.stop()
    trace = federation.trace()
    assert 'inet_addr("127.0.0.1")' in trace
    assert outside_connects(trace) == []


@pytest.mark.skipif(not can_trace(), reason="strace is not on the path: apt-get install strace")
@pytest.mark.skipif(not can_isolate(), reason="no network namespace can be made here (unshare -rn)")
def test_control_telemetry_that_is_on_is_seen(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {}, traced=True, isolated=True)
    try:
        federation.start_superlink(FLWR_TELEMETRY_ENABLED="1")
        federation.wait_for(lambda: bool(outside_connects(federation.trace())))
    finally:
        federation.stop()


def uploads(folder: Path) -> int:
    """Whole updates in the store, looked at without a hand in it."""
    try:
        with contextlib.closing(
            sqlite3.connect(f"file:{folder / 'state' / 'aggregator.db'}?mode=ro", uri=True)
        ) as store:
            return int(store.execute("SELECT count(*) FROM uploads").fetchone()[0])
    except sqlite3.OperationalError:  # not yet made
        return 0
