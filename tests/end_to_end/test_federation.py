"""Boxes, sockets, rounds and the merged memory together, as an operator runs them."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.aggregator.aggregate import aggregate
from edge.errors import StoreError
from edge.federation.connection import LinkKind
from edge.federation.wire import encode_bank
from tests.federation_link import EMBEDDING, PRODUCT, make_client, make_update
from tests.fleet_service import Aggregator, Suspicious, wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from edge.federation.update import FleetBank

POOL = f"{EMBEDDING}/{PRODUCT}"
BOXES = ("plant/a", "plant/b")


def digest(bank: FleetBank | None) -> str:
    assert bank is not None
    return hashlib.sha256(encode_bank(bank)).hexdigest()


def test_two_boxes_make_a_memory_and_both_get_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with Aggregator(tmp_path) as aggregator:
        updates = [make_update(box, rows=40, seed=number) for number, box in enumerate(BOXES)]
        keys = [aggregator.enrol(box) for box in BOXES]
        clients = [aggregator.client(key, box) for key, box in zip(keys, BOXES, strict=True)]
        with clients[0] as first, clients[1] as second:
            first.submit(updates[0])
            second.submit(updates[1])
            wait_for(first, lambda: first.counters["banks"] == 1)
            wait_for(second, lambda: second.counters["banks"] == 1)
            banks = [first.poll_bank(), second.poll_bank()]
            wait_for(first, lambda: first.round == 2)
    assert digest(banks[0]) == digest(banks[1])
    bank = banks[0]
    assert bank is not None
    assert (bank.version, bank.round, bank.members, bank.pool) == (1, 1, BOXES, POOL)
    merged = aggregate(updates, settings=aggregator.settings.merge, seed=0)
    np.testing.assert_array_equal(bank.rows, merged.rows)
    assert caplog.text, "something was logged"
    assert not any(secret in caplog.text for secret in (aggregator.keys.secret, *(key.secret for key in keys)))


def test_second_round_builds_on_the_first_after_a_restart(tmp_path: Path) -> None:
    aggregator = Aggregator(tmp_path)
    with aggregator:
        keys = {box: aggregator.enrol(box) for box in BOXES}
    clients = {}
    for box in BOXES:
        clients[box] = make_client(
            tmp_path, keys[box], box, aggregator.settings.listen, server_key=aggregator.keys.public
        )  # fmt: skip
        clients[box].start()
        # The aggregator is away: what is submitted now waits on the box.
        clients[box].submit(make_update(box, rows=40, seed=BOXES.index(box)))
    try:
        for number in (1, 2):
            with aggregator:
                for client in clients.values():
                    wait_for(client, lambda client=client, number=number: client.counters["banks"] == number)
                    bank = client.poll_bank()
                    assert bank is not None
                    assert (bank.version, bank.round) == (number, number)
                    wait_for(client, lambda client=client, number=number: client.round == number + 1)
            for box, client in clients.items():
                client.submit(make_update(box, rows=40, seed=10 + BOXES.index(box), round=2, base_version=1))
    finally:
        for client in clients.values():
            client.stop()


def test_poisoner_is_held_back_and_an_operator_decides(tmp_path: Path) -> None:
    boxes = (*BOXES, "plant/c")
    rounds = {"fleet": "plants", "close_at": 3, "min_boxes": 2, "period_s": 60.0}
    with Aggregator(tmp_path, gate=Suspicious("plant/c"), rounds=rounds) as aggregator:
        clients = {box: aggregator.client(aggregator.enrol(box), box) for box in boxes}
        for number, (box, client) in enumerate(clients.items()):
            client.start()
            client.submit(make_update(box, rows=40, seed=number))
        try:
            first = clients["plant/a"]
            wait_for(first, lambda: first.counters["banks"] == 1)
            bank = first.poll_bank()
            assert bank is not None
            assert bank.members == BOXES
            held = aggregator.command("quarantine", "list")
            assert "plant/c" in held
            assert "it pulls canaries" in held
            number = held.split()[0]
            assert "round 2" in aggregator.command("quarantine", "release", number)
            assert aggregator.command("quarantine", "list").strip() == "none"
            for number, box in enumerate(BOXES):
                clients[box].submit(make_update(box, rows=40, seed=20 + number, round=2))
            wait_for(first, lambda: first.counters["banks"] == 2)
            bank = first.poll_bank()
            assert bank is not None
            assert bank.members == boxes
        finally:
            for client in clients.values():
                client.stop()


def test_rollback_reaches_the_boxes_while_the_service_runs(tmp_path: Path) -> None:
    rounds = {"fleet": "plants", "close_at": 1, "min_boxes": 1, "period_s": 60.0}
    with Aggregator(tmp_path, rounds=rounds) as aggregator:
        keys = aggregator.enrol("plant/a")
        with aggregator.client(keys, "plant/a") as client:
            rows = {}
            for number in (1, 2):
                client.submit(make_update(rows=40, seed=number, round=number))
                wait_for(client, lambda number=number: client.counters["banks"] == number)
                bank = client.poll_bank()
                assert bank is not None
                rows[bank.version] = bank.rows
            assert not np.array_equal(rows[1], rows[2])
            assert "bank 3" in aggregator.command("rollback", POOL, "1")
            wait_for(client, lambda: client.counters["banks"] == 3)
            bank = client.poll_bank()
            assert bank is not None
            assert bank.version == 3
            np.testing.assert_array_equal(bank.rows, rows[1])


def test_revoked_box_is_out_within_two_seconds_and_the_others_stay(tmp_path: Path) -> None:
    with Aggregator(tmp_path) as aggregator:
        keys = {box: aggregator.enrol(box) for box in BOXES}
        with (
            aggregator.client(keys["plant/a"], "plant/a") as out,
            aggregator.client(keys["plant/b"], "plant/b") as good,
        ):
            for client in (out, good):
                wait_for(client, lambda client=client: client.state.kind is LinkKind.CONNECTED)
            aggregator.command("revoke", "plant/a")
            began = time.monotonic()
            wait_for(out, lambda: out.state.kind is LinkKind.REFUSED)
            assert time.monotonic() - began <= 2
            good.submit(make_update("plant/b"))
            wait_for(good, lambda: good.counters["receipts"] == 1)
            assert out.state.kind is LinkKind.REFUSED
        shown = aggregator.command("status")
        assert "1 boxes enrolled, 1 keys revoked" in shown
        event = aggregator.wait_for_event(lambda event: "revoked key" in event["text"])
        assert (event["kind"], event["box"]) == ("security", "plant/a")


@pytest.fixture
def process(tmp_path: Path) -> Aggregator:
    """An aggregator that is started as a process of its own."""
    aggregator = Aggregator(tmp_path)
    with aggregator:
        pass  # it finds its port, and makes its store
    return aggregator


def spawn(aggregator: Aggregator) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", "from edge.cli import main; main()", "aggregate", "run"]
    child = subprocess.Popen(
        [*words, "--config", str(aggregator.config)], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )  # fmt: skip
    assert child.stderr is not None
    for line in child.stderr:
        if "listening" in line:
            return child
    raise AssertionError(f"it ended with {child.wait()}")


def test_command_serves_until_sigterm_and_ends_within_three_seconds(process: Aggregator) -> None:
    child = spawn(process)
    keys = process.enrol("plant/a")
    with make_client(
        process.folder, keys, "plant/a", process.settings.listen, server_key=process.keys.public
    ) as client:  # fmt: skip
        client.submit(make_update())
        wait_for(client, lambda: client.counters["receipts"] == 1)
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(5) == 0
        assert time.monotonic() - began <= 3
    assert process.command("status").count("1 boxes have sent") == 1


def test_sigterm_does_not_wait_for_a_merge_and_the_next_start_takes_it_up(process: Aggregator) -> None:
    # Seconds of work: every row of the memory is looked for among thousands.
    process.values["merge"] = {"rows": 2000, "iterations": 200, "passes": 200, "tolerance": 0}
    process.values["threads"] = 2
    process.values["gates"] = {"spread": 1e6, "distance": 1e6, "grain": 1e6}
    process.write()
    keys = {box: process.enrol(box) for box in BOXES}
    child = spawn(process)
    clients = []
    try:
        for number, box in enumerate(BOXES):
            client = make_client(
                process.folder, keys[box], box, process.settings.listen, server_key=process.keys.public
            )  # fmt: skip
            clients.append(client)
            client.start()
            client.submit(make_update(box, rows=4000, width=100, seed=number))
        assert child.stderr is not None
        assert any("closes with 2 boxes" in line for line in child.stderr)
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
        assert time.monotonic() - began <= 3
        assert clients[0].counters["banks"] == 0, "it was in the middle"
        process.values["merge"] = {"rows": 32}
        process.write()
        with process:
            wait_for(clients[0], lambda: clients[0].counters["banks"] == 1)
    finally:
        child.kill()
        for client in clients:
            client.stop()


def test_second_aggregator_on_one_store_is_refused(process: Aggregator) -> None:
    child = spawn(process)
    try:
        process.values["listen"] = "tcp://127.0.0.1:0"
        process.write()
        from deploy.aggregator.service import Service

        with pytest.raises(StoreError, match="another aggregator"):
            Service(process.settings, gate=process.gate).start()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(5)
