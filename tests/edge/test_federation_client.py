"""The box's link: what it is given arrives once, what it fetches is whole, and nothing blocks for ever."""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from deploy.aggregator.identity import enrol
from edge.errors import FederationError, StoreError
from edge.federation.connection import Connection, LinkDownError, LinkKind
from edge.federation.keys import make_keys
from edge.federation.messages import Chunk, Fetch, Hello, Offer
from edge.federation.pace import LEAST_BYTES, Pace
from edge.federation.refusals import Refusal
from edge.federation.spool import Download, Spool
from edge.federation.wire import Limits, decode_update, encode_bank, encode_update
from tests.federation_link import Listener, make_bank, make_client, make_update

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge.federation.client import FederationClient


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    with Listener(tmp_path) as opened:
        yield opened


def receipts(client: FederationClient, number: int = 1) -> bool:
    return client.wait_for(lambda: client.counters["receipts"] >= number, 5)


def test_update_arrives_as_it_was_and_leaves_the_spool(listener: Listener) -> None:
    update = make_update(rows=2000, width=40)
    with listener.client(listener.enrol()) as client:
        client.submit(update)
        assert receipts(client)
        assert client.waiting == 0
        assert client.state.kind is LinkKind.CONNECTED
    assert listener.handler.received == [("plant/a", encode_update(update))]
    sizes = [request for _, request in listener.handler.requests if isinstance(request, Chunk)]
    assert len(sizes) > 3, "it goes in chunks"


def test_submit_waits_for_no_aggregator(tmp_path: Path) -> None:
    """The update is on disk when submit returns; a later process with the same folder sends it."""
    with Listener(tmp_path) as listener:
        keys = listener.enrol()
        port = listener.port
        listener.stop()
        client = listener.client(keys)
        client.start()
        began = time.monotonic()
        client.submit(make_update())
        assert time.monotonic() - began < 1
        assert client.wait_for(lambda: client.state.kind is LinkKind.UNREACHABLE, 5)
        assert client.waiting == 1
        assert "nobody listens" in client.last_error
        client.stop()
        listener.start(port)
        with listener.client(keys) as again:
            assert receipts(again)
        assert len(listener.handler.received) == 1


def test_spool_never_sends_an_update_twice(listener: Listener) -> None:
    keys = listener.enrol()
    with listener.client(keys) as client:
        client.submit(make_update())
        assert receipts(client)
    with listener.client(keys) as client:
        client.submit(make_update(seed=1))
        assert receipts(client)
    offers = [request for _, request in listener.handler.requests if isinstance(request, Offer)]
    assert len(offers) == 2


def test_lost_receipt_is_asked_for_again_and_counts_once(listener: Listener) -> None:
    """The aggregator has stored the update and the connection ends before the box reads so."""
    script = listener.handler
    stored = script.handle

    def handle(box: str, request: object, body: bytes) -> object:
        answer = stored(box, request, body)
        if isinstance(request, Chunk) and len(script.received) == 1 and not lost.is_set():
            lost.set()
            raise FederationError(Refusal.BUSY, "the receipt is lost")
        return answer

    lost = threading.Event()
    script.handle = handle
    with listener.client(listener.enrol()) as client:
        client.submit(make_update())
        assert receipts(client)
    assert lost.is_set()
    assert len(script.received) == 1


@pytest.mark.parametrize("code", [Refusal.NOT_FINITE, Refusal.STALE_ROUND, Refusal.SUPPORT_TOO_SMALL])
def test_final_refusal_drops_the_update_and_says_so(listener: Listener, code: Refusal) -> None:
    bad, good = make_update(seed=1), make_update(seed=2)
    listener.handler.refuse = lambda _box, request: (
        FederationError(code, "row 3") if isinstance(request, Offer) and not refused.is_set() else None
    )
    refused = threading.Event()
    client = listener.client(listener.enrol())
    client.submit(bad)
    with client:
        assert client.wait_for(lambda: client.counters["refused"].get(code.value) == 1, 5)
        refused.set()
        assert client.last_error == f"{code.value}: row 3"
        assert client.waiting == 0
        client.submit(good)
        assert receipts(client)
    assert listener.handler.received == [("plant/a", encode_update(good))]


@pytest.mark.parametrize("code", [Refusal.NO_SPACE, Refusal.BUSY, Refusal.BAD_HASH, Refusal.FUTURE_ROUND])
def test_passing_refusal_keeps_the_update(listener: Listener, code: Refusal) -> None:
    times = iter(range(2))
    listener.handler.refuse = lambda _box, request: (
        FederationError(code, "now") if isinstance(request, Offer) and next(times, None) is not None else None
    )
    with listener.client(listener.enrol()) as client:
        client.submit(make_update())
        assert receipts(client)
        assert client.counters["refused"] == {code.value: 2}


def test_busy_aggregator_is_left_in_peace_and_not_left(listener: Listener) -> None:
    """A hello that is refused for a while costs no connection: what was said last is as good."""
    times = iter(range(3))
    listener.handler.refuse = lambda _box, request: (
        FederationError(Refusal.BUSY, "later")
        if isinstance(request, Hello) and len(listener.handler.requests) > 1 and next(times, None) is not None
        else None
    )
    with listener.client(listener.enrol()) as client:
        assert client.wait_for(lambda: client.counters["refused"] == {"busy": 3}, 5)
        client.submit(make_update())
        assert receipts(client)
        assert client.counters["connections"] == 1


def test_bank_is_fetched_once_and_offered_once(listener: Listener) -> None:
    bank = make_bank(3, rows=3000, width=20)
    keys = listener.enrol()
    with listener.client(keys) as client:
        assert client.wait_for(lambda: client.state.kind is LinkKind.CONNECTED, 5)
        assert client.poll_bank() is None
        listener.handler.give(bank)
        assert client.wait_for(lambda: client.counters["banks"] == 1, 5)
        found = client.poll_bank()
        assert found is not None
        assert found.version == 3
        np.testing.assert_array_equal(found.rows, bank.rows)
        assert client.poll_bank() is None
    fetches = sum(isinstance(request, Fetch) for _, request in listener.handler.requests)
    with listener.client(keys) as client:
        found = client.poll_bank()
        assert found is not None, "after a restart the newest one that is known is there without the network"
        assert found.version == 3
        assert client.wait_for(lambda: client.state.kind is LinkKind.CONNECTED, 5)
        seen = len(listener.handler.requests)
        assert listener.handler.wait_for(lambda: len(listener.handler.requests) > seen + 1, 5)
    hellos = [request for _, request in listener.handler.requests if isinstance(request, Hello)]
    assert hellos[-1].have_version == 3
    assert sum(isinstance(request, Fetch) for _, request in listener.handler.requests) == fetches


def test_newer_bank_replaces_the_older(listener: Listener) -> None:
    listener.handler.give(make_bank(1))
    with listener.client(listener.enrol()) as client:
        assert client.wait_for(lambda: client.counters["banks"] == 1, 5)
        listener.handler.give(make_bank(2, seed=1))
        assert client.wait_for(lambda: client.counters["banks"] == 2, 5)
        found = client.poll_bank()
        assert found is not None
        assert found.version == 2


def test_download_goes_on_after_a_restart(listener: Listener) -> None:
    """A box that is stopped in the middle asks for the rest only."""
    script = listener.handler
    script.max_chunk = 4096
    payload = script.give(make_bank(2, rows=2000, width=20))
    fetched: list[int] = []

    def refuse(_box: str, request: object) -> FederationError | None:
        if isinstance(request, Fetch):
            fetched.append(request.offset)
            if request.offset >= 5 * 4096 and not more.is_set():
                return FederationError(Refusal.BUSY, "later")
        return None

    more = threading.Event()
    script.refuse = refuse
    keys = listener.enrol()
    with listener.client(keys) as client:
        assert client.wait_for(lambda: client.counters["refused"].get("busy"), 5)
    more.set()
    before = len(fetched)
    with listener.client(keys) as client:
        assert client.wait_for(lambda: client.counters["banks"] == 1, 5)
        assert client.counters["bytes_received"] == len(payload) - 5 * 4096
    assert fetched[before] == 5 * 4096


OTHER = "cd" * 32
WRONG = {
    "fleet": lambda: encode_bank(replace(make_bank(3), fleet="others")),
    "embedding": lambda: encode_bank(replace(make_bank(3), embedding_id=OTHER, pool=OTHER)),
    "version": lambda: encode_bank(make_bank(4)),
    "bytes": lambda: encode_bank(make_bank(3))[:-10],
}


@pytest.mark.parametrize("fault", list(WRONG))
def test_wrong_bank_is_never_offered(listener: Listener, fault: str) -> None:
    script = listener.handler
    script.give(make_bank(2))
    with listener.client(listener.enrol()) as client:
        assert client.wait_for(lambda: client.counters["banks"] == 1, 5)
        assert client.poll_bank() is not None
        script.bank = (3, WRONG[fault]())
        assert client.wait_for(lambda: sum(client.counters["refused"].values()) >= 2, 5), "it is tried again"
        assert client.poll_bank() is None
        assert client.counters["bank_version"] == 2
        script.give(make_bank(9, seed=4))
        assert client.wait_for(lambda: client.counters["banks"] == 2, 5)


def test_bank_changed_on_its_way_is_refused(listener: Listener) -> None:
    """Its parts do not have the hash that was announced, as when a bank is replaced under its version."""
    script = listener.handler
    script.max_chunk = 1000
    first = script.give(make_bank(1, rows=200))
    answer = script.handle

    def handle(box: str, request: object, body: bytes) -> object:
        reply, part = answer(box, request, body)
        if isinstance(request, Fetch) and request.offset == 1000 and not altered.is_set():
            altered.set()
            part = bytes([part[0] ^ 1]) + part[1:]
        return reply, part

    altered = threading.Event()
    script.handle = handle
    with listener.client(listener.enrol()) as client:
        assert client.wait_for(lambda: client.counters["banks"] == 1, 5), "fetched anew"
        assert client.counters["refused"] == {"bad_hash": 1}
        assert client.counters["bytes_received"] == 2 * len(first)


def test_unknown_key_is_a_state_and_not_a_hang(listener: Listener) -> None:
    client = listener.client(make_keys())
    client.submit(make_update())
    with client:
        began = time.monotonic()
        assert client.wait_for(lambda: client.state.kind is LinkKind.REFUSED, 5)
        assert "enrol" in client.state.reason
        began = time.monotonic()
        client.stop(2)
    assert time.monotonic() - began < 1
    assert not listener.handler.requests


def test_enrolled_later_is_taken_without_a_restart(listener: Listener) -> None:
    keys = make_keys()
    with listener.client(keys) as client:
        client.submit(make_update())
        assert client.wait_for(lambda: client.state.kind is LinkKind.REFUSED, 5)
        enrol(listener.boxes, "plant/a", keys.public)
        assert receipts(client)
        assert client.state.kind is LinkKind.CONNECTED


def test_wrong_server_key_is_told_apart_from_nobody(listener: Listener) -> None:
    keys = listener.enrol()
    wrong = make_client(listener.folder, keys, "plant/a", listener.address, server_key=make_keys().public)
    with wrong as client:
        assert client.wait_for(lambda: client.state.kind is LinkKind.WRONG_SERVER_KEY, 5)
        assert "aggregator_key_file" in client.state.reason


def test_stolen_name_is_refused_and_reported(listener: Listener) -> None:
    keys = listener.enrol("plant/a")
    listener.enrol("plant/b")
    with listener.client(keys, "plant/b") as client:
        assert client.wait_for(lambda: client.state.kind is LinkKind.REFUSED, 5)
        assert client.state.reason.startswith("stolen_name")
    assert (Refusal.STOLEN_NAME, "plant/a") in [alarm[:2] for alarm in listener.alarms]
    assert not listener.handler.requests


def test_silent_host_is_unreachable_and_stopping_does_not_wait_for_it(tmp_path: Path) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(5)
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        options = {"server_key": make_keys().public, "connect_s": 0.3}
        with make_client(tmp_path, make_keys(), "plant/a", address, **options) as client:
            assert client.wait_for(lambda: client.state.kind is LinkKind.UNREACHABLE, 5)
            assert "says nothing" in client.state.reason
        options["connect_s"] = 60.0
        client = make_client(tmp_path, make_keys(), "plant/a", address, **options)
        client.start()
        assert client.wait_for(lambda: client.state.kind is LinkKind.CONNECTING, 5)
        began = time.monotonic()
        client.stop(5)
        assert time.monotonic() - began < 1


def test_aggregator_that_returns_is_found_again(listener: Listener) -> None:
    with listener.client(listener.enrol()) as client:
        assert client.wait_for(lambda: client.state.kind is LinkKind.CONNECTED, 5)
        port = listener.port
        listener.stop()
        assert client.wait_for(lambda: client.state.kind is LinkKind.UNREACHABLE, 5)
        client.submit(make_update())
        listener.start(port)
        assert receipts(client)


def test_no_socket_is_left_behind(listener: Listener) -> None:
    """A monitor that is not closed keeps its context from ending; the control shows that this would be seen."""

    def ends(context: zmq.Context) -> bool:
        thread = threading.Thread(target=context.term, daemon=True)
        thread.start()
        thread.join(0.5)
        return not thread.is_alive()

    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    monitor = dealer.get_monitor_socket()
    dealer.close()
    assert not ends(context)
    monitor.close(0)

    context = zmq.Context()
    bell = os.eventfd(0)
    for keys, fits in ((listener.enrol(), True), (make_keys(), False)):
        connection = Connection(
            context, listener.address, server_key=listener.keys.public, keys=keys, stop=bell, wake=bell, connect_s=2,
            reply_s=2,
        )  # fmt: skip
        with connection, nullcontext() if fits else pytest.raises(LinkDownError):
            connection.open()
    os.close(bell)
    assert ends(context)


def test_round_is_remembered(listener: Listener) -> None:
    keys = listener.enrol()
    client = listener.client(keys)
    assert client.round == 1
    listener.handler.round = 7
    with client:
        assert client.wait_for(lambda: client.round == 7, 5)
    client = listener.client(keys)
    assert client.round == 7
    client.stop()


def test_spool_keeps_the_newest(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db", max_waiting=3)
    for seed in range(5):
        spool.put(make_update(seed=seed))
    spool.put(make_update(seed=4))
    assert (spool.waiting, spool.given_up) == (3, 2)
    first = spool.first()
    assert first is not None
    assert first.payload == encode_update(make_update(seed=2))
    spool.close()


def test_spool_is_one_process_s(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    spool.put(make_update())
    with pytest.raises(StoreError, match="in use"):
        Spool(tmp_path / "spool.db")
    spool.close()


def test_spool_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE other(x)")
    db.close()
    with pytest.raises(StoreError, match="another program"):
        Spool(path)
    assert path.exists()


def test_damaged_spool_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "spool.db"
    spool = Spool(path)
    spool.put(make_update())
    spool.close()
    path.write_bytes(b"\0" * 100 + path.read_bytes()[100:])
    spool = Spool(path)
    assert spool.damage
    assert spool.waiting == 0
    assert list(tmp_path.glob("spool.db.damaged-*"))
    spool.put(make_update())
    assert spool.waiting == 1
    spool.close()


def test_full_disk_is_an_error_and_nothing_is_lost(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    spool.put(make_update(seed=0))
    pages = spool._file._opened().execute("PRAGMA page_count").fetchone()[0]
    spool._file._opened().execute(f"PRAGMA max_page_count={pages + 1}")
    with pytest.raises(StoreError, match="disk is full"):
        spool.put(make_update(seed=1, rows=2000))
    assert spool.waiting == 1
    spool._file._opened().execute("PRAGMA max_page_count=100000")
    spool.put(make_update(seed=1, rows=2000))
    assert spool.waiting == 2
    spool.close()


def test_damaged_upload_is_never_sent(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    spool.put(make_update(seed=0))
    spool.put(make_update(seed=1))
    spool._file._opened().execute("UPDATE uploads SET payload = zeroblob(10) WHERE id = 1")
    first = spool.first()
    assert first is not None
    assert decode_update(first.payload, Limits()) is not None
    assert (first.id, spool.waiting, spool.given_up) == (2, 1, 1)
    spool.close()


def test_part_of_another_bank_begins_anew(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool.db")
    half = spool.take_part("pool", Download(1, "aa", 10), b"12345")
    assert spool.download("pool") == half
    assert spool.download("other") is None
    spool.take_part("pool", Download(2, "bb", 10), b"abc")
    assert spool.arrived() == b"abc"
    assert spool.download("pool") == Download(2, "bb", 10, 3)
    spool.close()


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e4))), st.integers(1, 2**18))
def test_pace_stays_within_its_bounds(history: list[tuple[bool, float]], most: int) -> None:
    pace = Pace()
    for arrived, seconds in history:
        if arrived:
            pace.arrived(pace.within(most), seconds)
        else:
            pace.lost()
    assert min(LEAST_BYTES, most) <= pace.within(2**18) <= 2**18
    assert 1 <= pace.within(most) <= most


@pytest.mark.parametrize("rate", [4_000, 30_000, 1e9])
def test_pace_follows_the_line(rate: float) -> None:
    pace = Pace()
    for _ in range(12):
        size = pace.within(2**18)
        pace.arrived(size, size / rate)
    assert pace.within(2**18) == pytest.approx(min(2 * rate, 2**18), rel=0.01)
    pace.arrived(100, 1.0)
    assert pace.within(2**18) == pytest.approx(min(2 * rate, 2**18), rel=0.01), "the last chunk says nothing"
