"""The aggregator's socket: lets enrolled boxes in, hands each of their requests on and sends the answer back.

It must not know what a round or a bank is.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import zmq
from zmq.auth.thread import ThreadAuthenticator

from edge.errors import FederationError, SettingsError
from edge.federation.messages import (
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Hello,
    encode_message,
    parse_request,
    refused,
    request_id,
)
from edge.federation.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from deploy.aggregator.identity import Boxes
    from edge.federation.keys import KeyPair
    from edge.federation.messages import Reply, Request

    Alarm = Callable[[Refusal, str, str], None]

LOG = logging.getLogger("lineward.aggregator")
_DOMAIN = b"lineward"
_HANDSHAKE_S = 10.0
_HEARTBEAT_S = 10.0
_HEARTBEAT_TIMEOUT_S = 30.0
# A box asks one thing at a time; what it sends beyond that waits in its own TCP connection.
_INBOUND = 2
# libzmq learns of what was read from a full pipe only now and then, so there must be room for some answers more.
_OUTBOUND = 16
_BACKLOG = 1024
_BURST_S = 2.0


class Handler(Protocol):
    """Answers the requests of boxes whose identity is settled."""

    def handle(self, box: str, request: Request, body: bytes) -> tuple[Reply, bytes]:
        """Return the reply and its body.

        Raises:
            FederationError: the request is refused.
        """


@dataclass(frozen=True, slots=True)
class RateLimits:
    """What one box may ask for in a second, on average over two; beyond it is told to wait."""

    requests: float = 100.0
    megabytes: float = 50.0


class _Allowance:
    """A token bucket."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._left = rate * _BURST_S
        self._at = time.monotonic()

    def take(self, amount: float) -> bool:
        now = time.monotonic()
        self._left = min(self._rate * _BURST_S, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < amount:
            return False
        self._left -= amount
        return True


class _Doorkeeper(ThreadAuthenticator):
    """ZAP (ZeroMQ RFC 27) from a registry. The user id of a message is the key that its sender has proved to hold."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], boxes: Callable[[], Boxes], alarm: Alarm) -> None:
        super().__init__(context)
        self._boxes = boxes
        self._alarm = alarm
        self.turned_away = 0
        self.configure_curve_callback(_DOMAIN.decode(), self)

    def stop(self) -> None:
        """End the thread; one that has ended by an error would let a farewell to it wait for ever."""
        if self.pipe and not self.is_alive():
            self.pipe.close(0)
            self.pipe = None  # type: ignore[assignment]  # as pyzmq does itself
        super().stop()

    def callback(self, _domain: str, key: bytes) -> bool:
        """Whether a key may connect; called by the authenticator's thread."""
        boxes = self._boxes()
        text = key.decode("ascii")
        if text in boxes.names:
            return True
        self.turned_away += 1
        if text in boxes.revoked:
            self._alarm(Refusal.REVOKED, boxes.revoked[text], "its revoked key was used to connect")
        return False


class Server:
    """A ROUTER with CURVE on one address.

    Args:
        address: to listen at, ``tcp://interface:port``; port 0 takes a free one.
        keys: the aggregator's pair.
        boxes: who is enrolled, asked at every handshake and every message, so that a revocation takes effect at once.
        handler: answers.
        alarm: told of a box that uses a revoked key or another's name; may come from another thread.
        rates: of each box.

    Raises:
        SettingsError: the address cannot be listened at.
    """

    def __init__(
        self,
        address: str,
        *,
        keys: KeyPair,
        boxes: Callable[[], Boxes],
        handler: Handler,
        alarm: Alarm,
        rates: RateLimits | None = None,
    ) -> None:
        self._boxes = boxes
        self._handler = handler
        self._alarm = alarm
        self._rates = rates or RateLimits()
        self._allowances: dict[str, tuple[_Allowance, _Allowance]] = {}
        self.counts: Counter[str] = Counter()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._doorkeeper = _Doorkeeper(self._context, boxes, alarm)
        self._doorkeeper.start()
        self._socket = self._context.socket(zmq.ROUTER)
        try:
            self._configure(keys)
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise SettingsError(f"listen: {address}: {error}; name an address of this machine that is free") from error
        self.poller = zmq.Poller()
        self.poller.register(self._socket, zmq.POLLIN)

    def _configure(self, keys: KeyPair) -> None:
        socket = self._socket
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode("ascii"))
        socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode("ascii"))
        socket.set(zmq.ZAP_DOMAIN, _DOMAIN)
        # A reply to a box that has gone is an error that is seen, not a message that vanishes.
        socket.set(zmq.ROUTER_MANDATORY, 1)
        # A box that comes back under its old routing id gets it. Who it is comes from its key alone.
        socket.set(zmq.ROUTER_HANDOVER, 1)
        socket.set(zmq.SNDTIMEO, 0)
        socket.set(zmq.MAXMSGSIZE, max(MAX_CHUNK_BYTES, MAX_MESSAGE_BYTES))
        socket.set(zmq.RCVHWM, _INBOUND)
        socket.set(zmq.SNDHWM, _OUTBOUND)
        socket.set(zmq.BACKLOG, _BACKLOG)
        socket.set(zmq.HANDSHAKE_IVL, round(_HANDSHAKE_S * 1000))
        socket.set(zmq.HEARTBEAT_IVL, round(_HEARTBEAT_S * 1000))
        socket.set(zmq.HEARTBEAT_TIMEOUT, round(_HEARTBEAT_TIMEOUT_S * 1000))

    @property
    def endpoint(self) -> str:
        """``tcp://interface:port`` that it listens at."""
        endpoint = self._socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return endpoint.rstrip(b"\0").decode()

    @property
    def turned_away(self) -> int:
        """Connections of unknown or revoked keys since the start."""
        return self._doorkeeper.turned_away

    @property
    def admits(self) -> bool:
        """Whether the thread that looks at keys is alive; without it nobody new gets in."""
        return bool(self._doorkeeper.is_alive())

    def close(self) -> None:
        """Stop listening and cut every connection."""
        self._socket.close(0)
        self._doorkeeper.stop()
        self._context.destroy(linger=0)

    def serve(self, most: int = 64) -> int:
        """Answer what has arrived, at most so many messages; returns how many there were."""
        for done in range(most):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return done
            route, *parts = frames
            # Every frame carries the user id of its connection; a message of the route alone has no other.
            key = (parts[0] if parts else route).get("User-Id")
            self._send(route.bytes, *self._answer(str(key), [frame.bytes for frame in parts]))
        return most

    def _answer(self, key: str, frames: Sequence[bytes]) -> tuple[Reply, bytes]:
        self.counts["requests"] += 1
        try:
            return self._handle(key, frames)
        except FederationError as error:
            self.counts["refused"] += 1
            self.counts[f"refused_{error.code.value}"] += 1
            return refused(error, request=request_id(frames)), b""

    def _handle(self, key: str, frames: Sequence[bytes]) -> tuple[Reply, bytes]:
        boxes = self._boxes()
        box = boxes.names.get(key)
        if box is None:
            # It was let in, so it was enrolled then.
            self._alarm(
                Refusal.REVOKED, boxes.revoked.get(key, "unknown"), "its revoked key was used in a live session"
            )
            raise FederationError(Refusal.REVOKED, "this box's key was revoked; enrol the box with a new key")
        self._ration(box, sum(map(len, frames)))
        request, body = parse_request(frames)
        if isinstance(request, Hello) and request.box != box:
            self._alarm(Refusal.STOLEN_NAME, box, f"claims to be {request.box!r}")
            raise FederationError(Refusal.STOLEN_NAME, f"box: {request.box!r} is not the name of the key that speaks")
        return self._handler.handle(box, request, body)

    def _ration(self, box: str, size: int) -> None:
        if box not in self._allowances:
            self._allowances[box] = (_Allowance(self._rates.requests), _Allowance(self._rates.megabytes * 1e6))
        requests, octets = self._allowances[box]
        if not (requests.take(1) and octets.take(size)):
            raise FederationError(Refusal.BUSY, "this box asks faster than is allowed; it waits and asks again")

    def _send(self, route: bytes, reply: Reply, body: bytes) -> None:
        frames = [route, *encode_message(reply, body)]
        if self._put(frames):
            return
        # Full, as far as it knows: asking for its events makes it look again. A box that does not read asks again.
        self._socket.get(zmq.EVENTS)
        if not self._put(frames):
            self.counts["unanswered"] += 1

    def _put(self, frames: list[bytes]) -> bool:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.counts["unanswered"] += 1
        return True
