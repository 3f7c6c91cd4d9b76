"""A box killed with SIGKILL while it sends: what it had accepted arrives, once, and goes on where it was."""

from __future__ import annotations

import random
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from deploy.aggregator.identity import enrol
from edge.federation.keys import make_keys, read_key_pair, write_keys
from edge.federation.messages import Chunk
from edge.federation.wire import encode_update
from tests.faults.fault_proxy import FaultProxy, Faults
from tests.federation_link import Listener, make_client, make_update

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = len(encode_update(make_update(rows=800, width=64)))


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    with Listener(tmp_path) as opened:
        opened.handler.max_chunk = 4096
        yield opened


def bytes_of(listener: Listener) -> int:
    return sum(len(have) for _, have in listener.handler.partial.values())


def killed_box(listener: Listener, folder: Path, lives: int, *, keep: bool) -> int:
    """Kill a box so often in the middle of its update, then let it finish; returns the chunks that were taken."""
    keys = make_keys()
    _, secret = write_keys(folder, keys, name="box")
    enrol(listener.boxes, "plant/a", keys.public)
    numbers = random.Random(7)
    with FaultProxy(listener.port, Faults(bytes_per_s=200_000)) as proxy:
        for life in range(lives):
            home = folder / ("home" if keep else f"home-{life}")
            home.mkdir(exist_ok=True)
            seed = 1 if life == 0 else 0
            words = [proxy.address, listener.keys.public, str(secret), str(seed)]
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.federation_box", str(home), *words],
                stdout=subprocess.PIPE,
                text=True,
            )
            try:
                assert child.stdout is not None
                assert child.stdout.readline() == "submitted\n"
                # Somewhere within the next eighth of the update; at once where nothing is sent any more.
                goal = bytes_of(listener) + numbers.randrange(1, SIZE // 8)
                listener.handler.wait_for(lambda goal=goal: bytes_of(listener) >= goal, 10 if keep else 1)
            finally:
                child.kill()
                child.wait(5)
    last = make_client(
        folder / ("home" if keep else f"home-{lives}"), read_key_pair(secret), "plant/a", listener.address,
        server_key=listener.keys.public,
    )  # fmt: skip
    with last:
        last.wait_for(lambda: last.counters["receipts"] == 1, 10 if keep else 1)
    return sum(isinstance(request, Chunk) for _, request in listener.handler.requests)


def test_killed_box_delivers_once_and_goes_on_where_it_was(listener: Listener, tmp_path: Path) -> None:
    lives = 3
    chunks = killed_box(listener, tmp_path, lives, keep=True)
    assert listener.handler.received == [("plant/a", encode_update(make_update(rows=800, width=64, seed=1)))]
    # Each life may send one chunk for which it never saw the answer, and two that were cut small.
    assert chunks <= SIZE / 4096 + 1 + 4 * lives


def test_killed_box_that_keeps_nothing_delivers_nothing(listener: Listener, tmp_path: Path) -> None:
    """The control: each life with an empty folder."""
    killed_box(listener, tmp_path, 1, keep=False)
    assert not listener.handler.received
