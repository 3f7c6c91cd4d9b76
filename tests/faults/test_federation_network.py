"""The link on a bad line and among strangers; each fault beside a control that shows the check can fail."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
import zmq

from deploy.aggregator.server import RateLimits
from edge.errors import FederationError
from edge.federation.connection import LinkKind
from edge.federation.keys import KeyPair, make_keys
from edge.federation.messages import Chunk, Hello, Offer, encode_message, parse_reply
from edge.federation.refusals import Refusal
from edge.federation.wire import encode_update
from tests.faults.fault_proxy import FaultProxy, Faults
from tests.federation_link import EMBEDDING, FLEET, PRODUCT, Listener, Script, make_update

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ACCEPTED_S = 5.0


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    with Listener(tmp_path) as opened:
        yield opened


class Forgetful(Script):
    """Forgets what has arrived of an update when the box asks where to go on."""

    def handle(self, box: str, request: object, body: bytes) -> object:
        if isinstance(request, Offer):
            self.partial.clear()
        return super().handle(box, request, body)


def overhead(listener: Listener, *, rows: int, rate: float, chunk: int, seconds: float, seed: int = 1) -> float:
    """Send one update over a line that is slow and cut; returns bytes on the line for each byte of the update."""
    listener.handler.max_chunk = chunk
    update = make_update(rows=rows, width=128)
    size = len(encode_update(update))
    with FaultProxy(listener.port, Faults(bytes_per_s=rate, cut=0.05), seed=seed) as proxy:
        client = listener.client(listener.enrol(), address=proxy.address, poll_s=60.0, reply_s=30.0, connect_s=10.0)
        with client:
            client.submit(update)
            # A line that is cut so often lets no transfer through that begins anew each time: twice the bytes tell.
            done = lambda: client.counters["receipts"] == 1 or proxy.sent > 2 * size  # noqa: E731 (both in one wait)
            assert client.wait_for(done, seconds)
        assert proxy.cuts >= 2, "the line was cut"
        if proxy.sent <= 2 * size:
            assert listener.handler.received == [("plant/a", encode_update(update))]
        return proxy.sent / size


def test_cut_line_costs_little_more_than_the_update(listener: Listener) -> None:
    assert overhead(listener, rows=1500, rate=250_000, chunk=4096, seconds=30) <= 1.2


def test_cut_line_costs_more_where_nothing_is_resumed(tmp_path: Path) -> None:
    """The control: the same line, and each connection begins anew."""
    with Listener(tmp_path, Forgetful()) as listener:
        assert overhead(listener, rows=1500, rate=250_000, chunk=4096, seconds=30) > 1.2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_megabytes_cross_a_slow_line_with_cuts(listener: Listener) -> None:
    """64 kbit/s, and 5 % of the chunks end the connection."""
    assert overhead(listener, rows=7800, rate=8000, chunk=32 * 1024, seconds=800) <= 1.2


def rejoin(listener: Listener, keys: KeyPair, seed: int) -> float | None:
    """Start a box and let it send an update; returns the seconds until the receipt, None where none came in time."""
    client = listener.client(keys)
    client.submit(make_update(seed=seed))
    began = time.monotonic()
    with client:
        if not client.wait_for(lambda: client.counters["receipts"] == 1, ACCEPTED_S):
            return None
        return time.monotonic() - began


@pytest.mark.parametrize("times", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_box_stopped_and_started_is_taken_every_time(listener: Listener, times: int) -> None:
    keys = listener.enrol()
    taken = [rejoin(listener, keys, seed) for seed in range(times)]
    assert all(seconds is not None and seconds <= ACCEPTED_S for seconds in taken), taken
    assert len(listener.handler.received) == times


def test_box_whose_key_was_revoked_is_not_taken_again(listener: Listener) -> None:
    """The control of the above: a box that may not come back does not."""
    keys = listener.enrol()
    assert rejoin(listener, keys, 0) is not None
    listener.revoke(keys)
    client = listener.client(keys)
    client.submit(make_update(seed=1))
    with client:
        assert client.wait_for(lambda: client.state.kind is LinkKind.REFUSED, 2)
        assert client.counters["receipts"] == 0
    assert len(listener.handler.received) == 1
    assert (Refusal.REVOKED, "plant/a", "its revoked key was used to connect") in listener.alarms


def test_revocation_reaches_a_live_session(listener: Listener) -> None:
    keys = listener.enrol()
    with listener.client(keys) as client:
        assert client.wait_for(lambda: client.state.kind is LinkKind.CONNECTED, 5)
        began = time.monotonic()
        listener.revoke(keys)
        client.submit(make_update())
        assert client.wait_for(lambda: client.state.kind is LinkKind.REFUSED, 5)
        assert time.monotonic() - began <= 2
        assert client.counters["refused"].get("revoked") or "enrol" in client.state.reason
        assert client.waiting == 1
    assert not listener.handler.received
    assert (Refusal.REVOKED, "plant/a") in [alarm[:2] for alarm in listener.alarms]


def test_half_open_connection_is_noticed_and_left(listener: Listener) -> None:
    with FaultProxy(listener.port) as proxy:
        client = listener.client(listener.enrol(), address=proxy.address, reply_s=0.5, connect_s=0.5)
        with client:
            assert client.wait_for(lambda: client.state.kind is LinkKind.CONNECTED, 5)
            proxy.faults.swallow = True
            client.submit(make_update())
            assert client.wait_for(lambda: client.state.kind is LinkKind.UNREACHABLE, 3)
            assert client.waiting == 1
            proxy.faults.swallow = False
            assert client.wait_for(lambda: client.counters["receipts"] == 1, 5)


def test_half_open_connection_is_not_noticed_without_a_deadline(listener: Listener) -> None:
    """The control: a line that swallows everything tells nobody."""
    with FaultProxy(listener.port) as proxy:
        client = listener.client(listener.enrol(), address=proxy.address, reply_s=60.0)
        with client:
            assert client.wait_for(lambda: client.state.kind is LinkKind.CONNECTED, 5)
            proxy.faults.swallow = True
            client.submit(make_update())
            assert not client.wait_for(lambda: client.state.kind is not LinkKind.CONNECTED, 1.5)


def test_reset_line_is_taken_up_again(listener: Listener) -> None:
    listener.handler.max_chunk = 2048
    with FaultProxy(listener.port, Faults(bytes_per_s=100_000)) as proxy:
        with listener.client(listener.enrol(), address=proxy.address) as client:
            client.submit(make_update(rows=600, width=64))
            assert client.wait_for(lambda: client.counters["bytes_sent"] > 20_000, 10)
            proxy.reset()
            assert client.wait_for(lambda: client.counters["receipts"] == 1, 20)
            assert client.counters["connections"] == 2
        offsets = [request.offset for _, request in listener.handler.requests if isinstance(request, Chunk)]
        assert offsets.count(0) == 1, "what had arrived was not sent again"


class Dealer:
    """A box that does as it likes: a bare socket with a key."""

    def __init__(self, listener: Listener, keys: KeyPair, *, routing_id: bytes = b"") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDTIMEO, 1000)
        if routing_id:
            self._socket.set(zmq.ROUTING_ID, routing_id)
        self._socket.set(zmq.CURVE_SERVERKEY, listener.keys.public.encode())
        self._socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
        self._socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
        self._socket.connect(listener.address)

    def __enter__(self) -> Dealer:  # noqa: PYI034 (Self needs Python 3.11)
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(0)

    def ask(self, frames: list[bytes], timeout: float = 5.0) -> object:
        """The reply, or None where none comes in time."""
        self._socket.send_multipart(frames)
        return self.read(timeout)

    def read(self, timeout: float = 5.0) -> object:
        return parse_reply(self._socket.recv_multipart())[0] if self._socket.poll(timeout * 1000) else None


def hello(box: str, number: int = 1) -> list[bytes]:
    return encode_message(
        Hello(
            id=number, fleet=FLEET, box=box, product=PRODUCT, subclass="", embedding_id=EMBEDDING, have_version=0
        )
    )  # fmt: skip


def test_refused_key_is_a_state_within_seconds_and_a_bare_socket_hears_nothing(listener: Listener) -> None:
    keys = make_keys()
    began = time.monotonic()
    with listener.client(keys) as client:
        assert client.wait_for(lambda: client.state.kind is LinkKind.REFUSED, 5)
        assert time.monotonic() - began <= 5
        client.submit(make_update())
    with Dealer(listener, keys) as dealer:
        assert dealer.ask(hello("plant/a"), 1.0) is None
    assert listener.server.counts["requests"] == 0


def test_stolen_routing_id_gives_no_name(listener: Listener) -> None:
    """Who comes under the routing id of another takes its place, is heard under its own name, and is told so."""
    first, second = listener.enrol("plant/a"), listener.enrol("plant/b")
    with Dealer(listener, first, routing_id=b"seat") as a:
        assert a.ask(hello("plant/a")).kind == "welcome"
        with Dealer(listener, second, routing_id=b"seat") as b:
            reply = b.ask(hello("plant/a"))
            assert (reply.kind, reply.code) == ("refused", "stolen_name")
            assert b.ask(hello("plant/b", 2)).kind == "welcome"
        # The first lost its connection to the second, and comes back by itself: it is disturbed, not robbed.
        assert listener.handler.requests[-1][0] == "plant/b"
    with Dealer(listener, first, routing_id=b"seat") as a:
        assert a.ask(hello("plant/a")).kind == "welcome"
    assert [box for box, _ in listener.handler.requests] == ["plant/a", "plant/b", "plant/a"]
    assert [alarm[:2] for alarm in listener.alarms] == [(Refusal.STOLEN_NAME, "plant/b")]


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b""], "malformed"),
        ([b"{}"], "malformed"),
        ([b"\xff\xfe"], "malformed"),
        ([b'{"id":5,"kind":"hello","v":2}'], "bad_version"),
        ([b"x" * 10_000], "too_large"),
        ([b"{}", b"", b""], "malformed"),
        ([*hello("plant/a"), b"body"], "malformed"),
    ],
)
def test_nonsense_is_refused_with_a_code_and_harms_nobody(listener: Listener, frames: list[bytes], code: str) -> None:
    keys = listener.enrol()
    with Dealer(listener, keys) as dealer:
        reply = dealer.ask(frames)
        assert (reply.kind, reply.code) == ("refused", code)
        assert dealer.ask(hello("plant/a")).kind == "welcome"


def test_oversized_frame_ends_its_connection_only(listener: Listener) -> None:
    """libzmq refuses it before it is read into memory; the others notice nothing."""
    big, good = listener.enrol("plant/big"), listener.enrol("plant/a")
    with listener.client(good) as client:
        assert client.wait_for(lambda: client.state.kind is LinkKind.CONNECTED, 5)
        connections = client.counters["connections"]
        with Dealer(listener, big) as dealer:
            assert dealer.ask(hello("plant/big")).kind == "welcome"
            assert dealer.ask([b"x" * (2**20)], 0.5) is None
        client.submit(make_update())
        assert client.wait_for(lambda: client.counters["receipts"] == 1, 5)
        assert client.counters["connections"] == connections


def test_greedy_box_is_told_to_wait(tmp_path: Path) -> None:
    with Listener(tmp_path, rates=RateLimits(requests=5.0)) as listener:
        greedy, good = listener.enrol("plant/greedy"), listener.enrol("plant/a")
        with Dealer(listener, greedy) as dealer:
            replies = [dealer.ask(hello("plant/greedy", number)) for number in range(1, 16)]
            codes = [getattr(reply, "code", reply.kind) for reply in replies]
            assert codes[:10] == ["welcome"] * 10
            assert codes[-1] == "busy"
            with Dealer(listener, good) as other:
                assert other.ask(hello("plant/a")).kind == "welcome"


def test_quick_answers_are_all_sent(listener: Listener) -> None:
    """A full pipe is looked at again before an answer is given up."""
    with Dealer(listener, listener.enrol()) as dealer:
        for number in range(1, 150):
            assert dealer.ask(hello("plant/a", number), 2.0) is not None
    assert listener.server.counts["unanswered"] == 0


@contextlib.contextmanager
def strangers(listener: Listener, per_second: float) -> Iterator[None]:
    """Connections with keys that nobody enrolled, from a process of their own."""
    words = [sys.executable, "-m", "tests.faults.strangers", listener.address, listener.keys.public, str(per_second)]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield
    finally:
        child.kill()
        child.wait(5)


def deliveries(listener: Listener, keys: KeyPair, seconds: float, first: int) -> int:
    """How many updates a box that is connected delivers, one after the other."""
    with listener.client(keys) as client:
        assert client.wait_for(lambda: client.state.kind is LinkKind.CONNECTED, 5)
        done, ends = 0, time.monotonic() + seconds
        while time.monotonic() < ends:
            client.submit(make_update(seed=first + done))
            done += 1
            assert client.wait_for(lambda want=done: client.counters["receipts"] == want, 5)
        return done


@pytest.mark.slow
def test_strangers_at_the_door_do_not_stop_those_inside(listener: Listener) -> None:
    """A hundred a second take less than a fifth of one core; in processor time, whatever else this machine does."""
    door = listener.server
    with strangers(listener, 100):
        before, spent = door.turned_away, time.process_time()
        threading.Event().wait(5)
        came, spent = door.turned_away - before, time.process_time() - spent
        assert came >= 200, "they did come"
        assert deliveries(listener, listener.enrol(), 3, 0) >= 10, "each delivered within 5 s of its turn"
    assert 100 * spent / came < 0.2


def test_refusal_in_the_middle_leaves_the_rest_of_the_fleet_alone(listener: Listener) -> None:
    bad, good = listener.enrol("plant/bad"), listener.enrol("plant/a")
    listener.handler.refuse = lambda box, request: (
        FederationError(Refusal.NOT_FINITE, "row 1") if box == "plant/bad" and isinstance(request, Offer) else None
    )
    with listener.client(bad, "plant/bad") as first, listener.client(good) as second:
        first.submit(make_update("plant/bad"))
        second.submit(make_update("plant/a", seed=1))
        assert first.wait_for(lambda: first.counters["refused"] == {"not_finite": 1}, 5)
        assert second.wait_for(lambda: second.counters["receipts"] == 1, 5)
        assert first.state.kind is LinkKind.CONNECTED
