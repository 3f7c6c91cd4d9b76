"""The aggregator killed with SIGKILL at eight points of a round: it ends with the bank of an undisturbed run."""

from __future__ import annotations

import contextlib
import random
import time
from typing import TYPE_CHECKING

import pytest

from deploy.aggregator.records import RoundState, UploadState
from edge.federation.wire import encode_bank, encode_update
from tests.deploy.round_values import POOL
from tests.edge.federation_values import update
from tests.faults.aggregator_process import CHUNK, Death, Plant, Point

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edge.federation.client import FederationClient
    from edge.federation.update import FleetBank, MemoryUpdate

BOXES = ("north/one", "north/two", "south/three")
COMPLETE_S = 15.0
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Callable[..., Plant]]:
    with contextlib.ExitStack() as stack:

        def make(name: str = "plant", boxes: tuple[str, ...] = BOXES, **settings: object) -> Plant:
            (tmp_path / name).mkdir()
            made = Plant(tmp_path / name, boxes, **settings)
            stack.callback(made.stop)
            return made

        yield make


def updates(seed: int) -> list[MemoryUpdate]:
    return [update(box, seed=1000 * seed + number, rows=64, columns=24) for number, box in enumerate(BOXES)]


@contextlib.contextmanager
def sending(plant: Plant, seed: int) -> Iterator[list[FederationClient]]:
    """Boxes that each have one update to send, in an order that the seed says."""
    sent = updates(seed)
    random.Random(seed).shuffle(sent)
    with contextlib.ExitStack() as stack:
        clients = []
        for item in sent:
            client = plant.client(item.box)
            client.submit(item)
            stack.callback(client.stop, 5.0)
            clients.append(client)
        for client in clients:
            client.start()
        yield clients


def banks_within(clients: Sequence[FederationClient], seconds: float) -> list[FleetBank | None]:
    """What each box has after all have a bank, or after so many seconds."""
    deadline = time.monotonic() + seconds
    for client in clients:
        client.wait_for(lambda c=client: c.counters["bank_version"], max(0.0, deadline - time.monotonic()))
    return [client.poll_bank() for client in clients]


_undisturbed: dict[int, bytes] = {}


def undisturbed(make: Callable[..., Plant], seed: int) -> bytes:
    """The bank's bytes of a run in which nobody dies."""
    if seed not in _undisturbed:
        plant = make("undisturbed")
        plant.start()
        with sending(plant, seed) as clients:
            found = banks_within(clients, COMPLETE_S)
        assert found[0] is not None
        _undisturbed[seed] = encode_bank(found[0])
    return _undisturbed[seed]


def chance(point: Point, seed: int) -> int:
    """At which of its occurrences in a round a point kills."""
    chunks = len(encode_update(updates(seed)[0])) // CHUNK
    most = {Point.CHUNK_STORED: len(BOXES) * chunks}.get(point, len(BOXES))
    if point in (Point.ROUND_CLOSING, Point.BANK_NOT_COMMITTED, Point.BANK_COMMITTED):
        return 1
    return random.Random(f"{point} {seed}").randint(1, most)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("point", Point, ids=lambda point: point.value)
def test_round_survives_its_aggregator(point: Point, seed: int, plant: Callable[..., Plant]) -> None:
    expected = undisturbed(plant, seed)
    killed = plant()
    killed.start(Death(point, chance(point, seed)))
    with sending(killed, seed) as clients:
        killed.wait_for_death(COMPLETE_S)
        began = time.monotonic()
        killed.start()
        found = banks_within(clients, COMPLETE_S)
        took = time.monotonic() - began
        assert [bank is not None and encode_bank(bank) == expected for bank in found] == [True] * len(BOXES)
        assert took <= COMPLETE_S
        assert [client.counters["receipts"] for client in clients] == [1] * len(BOXES)
        assert [client.waiting for client in clients] == [0] * len(BOXES)
        assert [client.counters["refused"] for client in clients] == [{}] * len(BOXES)
    print(f"{point.value}, seed {seed}: the round was complete {took:.2f} s after the restart")  # noqa: T201 (the figure)
    with killed.store() as store:
        uploads = store.uploads()
        assert sorted(item.box for item in uploads) == sorted(BOXES), "every upload counted exactly once"
        assert {(item.state, item.round_counted) for item in uploads} == {(UploadState.ACCEPTED, 1)}
        (bank,) = store.banks(POOL)
        assert bank.inputs == tuple(sorted(item.sha256 for item in uploads))
        assert [item.round for item in store.rounds(state=RoundState.OPEN)] == [2]


@pytest.mark.parametrize("durable", [True, False])
def test_receipts_outlive_the_aggregator_only_where_its_store_is_durable(
    durable: bool,  # noqa: FBT001 (a parameter of the test)
    plant: Callable[..., Plant],
) -> None:
    """The control: with a store that does not last, boxes were told that all is safe, and nothing ever comes of it."""
    killed = plant(durable=durable, close_at=len(BOXES) + 1, period_s=6.0)
    killed.start()
    with sending(killed, 0) as clients:
        for client in clients:
            assert client.wait_for(lambda c=client: c.counters["receipts"], COMPLETE_S)
        killed.stop()
        killed.start()
        assert all(client.wait_for(lambda c=client: c.counters["connections"] > 1, COMPLETE_S) for client in clients)
        found = banks_within(clients, COMPLETE_S if durable else 9.0)
    assert [bank is not None for bank in found] == [durable] * len(BOXES)


def test_three_of_five_answer_one_never_one_is_late_by_a_round(plant: Callable[..., Plant]) -> None:
    """With close_at 5 the deadline closes the round; nobody is waited for, and nothing that came late is lost."""
    names = (*BOXES, "west/never", "west/late")
    period = 2.5
    going = plant("going", names, close_at=5, period_s=period)
    going.start()
    with contextlib.ExitStack() as stack:
        clients = {name: stack.enter_context(going.client(name)) for name in (*BOXES, "west/late")}
        assert all(client.wait_for(lambda c=client: c.counters["connections"], 15) for client in clients.values())
        (first,) = going.open_rounds()
        opened = time.monotonic() - (period - (first.deadline_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) / 1e9)
        for item in updates(0):
            clients[item.box].submit(item)
        (bank, *_) = banks_within([clients[BOXES[0]]], 3 * period)
        closed = time.monotonic() - opened
        assert bank is not None
        assert bank.members == BOXES
        print(f"closed {closed:.2f} s after it opened, its deadline was {period} s")  # noqa: T201 (the figure)
        assert abs(closed - period) <= 1.0
        clients["west/late"].submit(update("west/late", seed=7, rows=64, columns=24, round=1))
        clients[BOXES[0]].submit(update(BOXES[0], seed=8, rows=64, columns=24, round=2))
        assert clients[BOXES[1]].wait_for(lambda: clients[BOXES[1]].counters["bank_version"] == 2, 3 * period)
        second = clients[BOXES[1]].poll_bank()
        assert second is not None
        # The two that sent nothing new for round 2 count on with what they sent for round 1.
        assert (second.round, second.members) == (2, (*BOXES, "west/late"))
