"""Whatever an enrolled box sends that it should not: refused with a code of its own, and the bank stays as it was."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zmq

from edge.federation.messages import Chunk, Hello, Offer, Receipt, Refused, encode_message, parse_reply
from edge.federation.wire import encode_update
from tests.federation_link import EMBEDDING, FLEET, PRODUCT, make_update
from tests.fleet_service import Aggregator, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge.federation.keys import KeyPair
    from edge.federation.messages import Reply, Request
    from edge.federation.update import MemoryUpdate

CHUNK = 32 * 1024


class BadBox:
    """An enrolled box that sends what it likes."""

    def __init__(self, aggregator: Aggregator, keys: KeyPair) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.CURVE_SERVERKEY, aggregator.keys.public.encode())
        self._socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode())
        self._socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode())
        self._socket.connect(aggregator.service.endpoint)
        self._ids = itertools.count(1)

    def close(self) -> None:
        self._context.destroy(0)

    def ask(self, request: type[Request], body: bytes = b"", **values: object) -> Reply:
        self._socket.send_multipart(encode_message(request(id=next(self._ids), **values), body))
        assert self._socket.poll(5000), "every request is answered"
        return parse_reply(self._socket.recv_multipart())[0]

    def hello(self, **values: object) -> Reply:
        who = {"fleet": FLEET, "box": "plant/bad", "product": PRODUCT, "subclass": "", "embedding_id": EMBEDDING}
        return self.ask(Hello, **(who | {"have_version": 0} | values))

    def send(self, payload: bytes, **announced: object) -> Reply:
        """Offer and send bytes; returns the last answer."""
        values = {"embedding_id": EMBEDDING, "product": PRODUCT, "round": 2, "size": len(payload)}
        values = values | {"sha256": hashlib.sha256(payload).hexdigest()} | announced
        reply = self.ask(Offer, **values)
        for offset in range(0, len(payload), CHUNK):
            if isinstance(reply, Refused | Receipt):
                break
            reply = self.ask(Chunk, payload[offset : offset + CHUNK], sha256=values["sha256"], offset=offset)
        return reply


@pytest.fixture
def aggregator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aggregator]:
    """One round is over: there is a bank to be spoiled."""
    rounds = {"fleet": FLEET, "close_at": 2, "min_boxes": 1, "period_s": 600.0, "min_frames": 8.0}
    rounds |= {"max_update_bytes": 65536, "embedding_ids": [EMBEDDING], "products": [PRODUCT]}
    with Aggregator(tmp_path_factory.mktemp("aggregator"), rounds=rounds) as opened:
        clients = [opened.client(opened.enrol(box), box) for box in ("plant/a", "plant/b")]
        for number, client in enumerate(clients):
            client.start()
            client.submit(make_update(("plant/a", "plant/b")[number], rows=40, seed=number))
        for client in clients:
            wait_for(client, lambda client=client: client.counters["banks"] == 1)
            client.stop()
        yield opened


@pytest.fixture
def bad(aggregator: Aggregator) -> Iterator[BadBox]:
    box = BadBox(aggregator, aggregator.enrol("plant/bad"))
    # The folder is read twice a second; the socket knocks until it is let in.
    assert box.hello().kind == "welcome"
    yield box
    box.close()


def banks(aggregator: Aggregator) -> object:
    shown = json.loads(aggregator.command("status", "--json"))
    return [pool["banks"] for pool in shown["pools"]]


def update(**fields: object) -> MemoryUpdate:
    return make_update(**({"box": "plant/bad", "rows": 40, "seed": 5, "round": 2} | fields))


def altered(payload: bytes) -> bytes:
    return payload[:-1] + bytes([payload[-1] ^ 1])


def with_nan(payload: bytes, value: float = float("nan")) -> bytes:
    """The same message with a number in its rows that none of ours would write."""
    start = payload.index(b"}") + 1
    return payload[:start] + np.float16(value).tobytes() + payload[start + 2 :]


CASES = {
    "stolen_name": lambda: (encode_update(update(box="plant/a")), {}),
    "wrong_fleet": lambda: (encode_update(update(fleet="others")), {}),
    "future_round": lambda: (encode_update(update(round=9)), {"round": 9}),
    "bad_hash": lambda: (altered(encode_update(update())), {"sha256": hashlib.sha256(b"other").hexdigest()}),
    "not_finite": lambda: (with_nan(encode_update(update())), {}),
    "bad_shape": lambda: (encode_update(update(width=9)), {}),
    "wrong_embedding": lambda: (encode_update(update(embedding_id="cd" * 32)), {"embedding_id": "cd" * 32}),
    "wrong_product": lambda: (encode_update(update(product="other")), {"product": "other"}),
    "too_large": lambda: (encode_update(update(rows=4000, width=40)), {}),
    "support_too_small": lambda: (encode_update(update(frames=np.full(40, 2, np.float32))), {}),
    "bad_support": lambda: (encode_update(update(n_frames=10)), {}),
    "malformed": lambda: (encode_update(update()) + b"more", {}),
    "bad_version": lambda: (encode_update(update())[:4] + b"\x09\x00" + encode_update(update())[6:], {}),
}  # fmt: skip


@pytest.mark.timeout(120)
def test_each_fault_has_a_code_of_its_own_and_the_bank_stays(aggregator: Aggregator, bad: BadBox) -> None:
    before = banks(aggregator)
    found = {}
    for code, case in CASES.items():
        payload, announced = case()
        reply = bad.send(payload, **announced)
        found[code] = reply.code if isinstance(reply, Refused) else reply.kind
    assert found == {code: code for code in CASES}
    assert banks(aggregator) == before
    assert bad.send(encode_update(update())).kind == "receipt", "the control: what is right is taken"


def test_old_round_is_refused(aggregator: Aggregator, bad: BadBox) -> None:
    assert bad.send(encode_update(update(seed=3))).kind == "receipt"
    with aggregator.client(aggregator.enrol("plant/c"), "plant/c") as other:
        other.submit(make_update("plant/c", rows=40, seed=8, round=2))
        wait_for(other, lambda: other.counters["banks"] == 1)
        wait_for(other, lambda: other.round == 3)
    before = banks(aggregator)
    reply = bad.send(encode_update(update(seed=4, round=1)), round=1)
    assert isinstance(reply, Refused)
    assert reply.code == "stale_round"
    assert banks(aggregator) == before
    assert bad.send(encode_update(update(seed=5, round=3)), round=3).kind == "receipt"


def test_replayed_nonce_and_second_update_are_refused(aggregator: Aggregator, bad: BadBox) -> None:
    before = banks(aggregator)
    first = update()
    assert bad.send(encode_update(first)).kind == "receipt"
    replayed = bad.send(encode_update(make_update("plant/bad", rows=40, seed=6, round=2, nonce=first.nonce)))
    second = bad.send(encode_update(make_update("plant/bad", rows=40, seed=7, round=2)))
    assert [reply.code for reply in (replayed, second)] == ["replayed_nonce", "already_counted"]
    assert bad.send(encode_update(first)).kind == "receipt", "the same update again is no fault: its receipt was lost"
    assert banks(aggregator) == before
    assert "1 boxes have sent" in aggregator.command("status")


def test_stolen_name_is_an_alarm(aggregator: Aggregator, bad: BadBox) -> None:
    reply = bad.hello(box="plant/a")
    assert isinstance(reply, Refused)
    assert reply.code == "stolen_name"
    event = aggregator.wait_for_event(lambda event: event["code"] == "stolen_name")
    assert (event["kind"], event["box"]) == ("security", "plant/bad")
