"""One encrypted connection to the aggregator, from the first packet to the last, none of which may block for ever.

A new attempt is a new socket, so no late answer of an old one is ever read. It must not know what messages say.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import zmq
from zmq.utils.monitor import parse_monitor_message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from edge.federation.keys import KeyPair

# Larger than any reply: 256 KiB of a bank and a header. libzmq drops a connection that sends more.
MAX_REPLY_BYTES = 512 * 1024
_HEARTBEAT_S = 5.0
_SEND_S = 5.0


class LinkKind(str, Enum):
    """Where the link to the aggregator stands.

    ``refused``: the aggregator does not take this box; a person has to enrol it or correct its settings.
    ``unreachable``: nobody answers; tried again with growing pauses. ``wrong_server_key``: somebody answers who
    cannot prove to be the aggregator that the settings name.
    """

    DISABLED = "disabled"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    WRONG_SERVER_KEY = "wrong_server_key"


@dataclass(frozen=True, slots=True)
class LinkState:
    """Where the link stands, and in words what to do where a person is needed."""

    kind: LinkKind
    reason: str = ""


class LinkDownError(Exception):
    """The connection is not there or is gone; internal to the client, which tries again."""

    def __init__(self, kind: LinkKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class StoppedError(Exception):
    """The client was told to stop while it waited; internal."""


class Connection:
    """A DEALER with CURVE and its monitor; use as a context manager, or the monitor keeps the context from ending.

    Args:
        context: whose sockets these are.
        address: ``tcp://host:port``.
        server_key: the aggregator's public key, Z85.
        keys: the box's pair.
        stop: file descriptor that becomes readable when the client is told to stop.
        wake: file descriptor that becomes readable when there is something new to send.
        connect_s: seconds until a connection must be there, handshake included.
        reply_s: seconds without an answer after which a connection counts as dead.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        *,
        server_key: str,
        keys: KeyPair,
        stop: int,
        wake: int,
        connect_s: float,
        reply_s: float,
    ) -> None:
        self._address = address
        self._wake = wake
        self._stop = stop
        self._connect_s = connect_s
        self._reply_s = reply_s
        self._tcp = False
        self._socket = context.socket(zmq.DEALER)
        self._socket.set(zmq.LINGER, 0)
        # A DEALER whose key is refused blocks for ever in send() without these two (libzmq issue 2329).
        self._socket.set(zmq.SNDTIMEO, round(_SEND_S * 1000))
        self._socket.set(zmq.IMMEDIATE, 1)
        # No reconnect behind our back: one socket is one connection, and its events tell why it ended.
        self._socket.set(zmq.RECONNECT_IVL, -1)
        self._socket.set(zmq.HANDSHAKE_IVL, round(connect_s * 1000))
        # A heartbeat waits behind the chunk that is being sent, so it is given as long as an answer.
        self._socket.set(zmq.HEARTBEAT_IVL, round(_HEARTBEAT_S * 1000))
        self._socket.set(zmq.HEARTBEAT_TIMEOUT, round(reply_s * 1000))
        self._socket.set(zmq.MAXMSGSIZE, MAX_REPLY_BYTES)
        self._socket.set(zmq.CURVE_SERVERKEY, server_key.encode("ascii"))
        self._socket.set(zmq.CURVE_PUBLICKEY, keys.public.encode("ascii"))
        self._socket.set(zmq.CURVE_SECRETKEY, keys.secret.encode("ascii"))
        self._monitor = self._socket.get_monitor_socket()
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, stop):
            self._poller.register(source, zmq.POLLIN)

    def __enter__(self) -> Connection:  # noqa: PYI034 (Self needs Python 3.11)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; what is not sent by now is not sent."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)

    def open(self) -> None:
        """Connect and prove each other's keys.

        Raises:
            LinkDownError: it cannot be done; the kind says why as far as that can be told apart.
            StoppedError: the client stops.
        """
        try:
            self._socket.connect(self._address)
        except zmq.ZMQError as error:
            raise LinkDownError(
                LinkKind.UNREACHABLE, f"{self._address}: {error}; correct federation.aggregator: tcp://host:port"
            ) from error
        deadline = time.monotonic() + self._connect_s
        while not self._follow(self._poll(deadline)):
            if time.monotonic() >= deadline:
                raise self._silent()

    def request(self, frames: Sequence[bytes]) -> list[bytes]:
        """Send a message and wait for the next that comes back.

        Raises:
            LinkDownError: the connection ends, or nothing comes for ``reply_s``.
            StoppedError: the client stops.
        """
        try:
            self._socket.send_multipart(frames)
        except zmq.Again as error:
            raise LinkDownError(LinkKind.UNREACHABLE, f"{self._address}: takes nothing for {_SEND_S:g} s") from error
        return self.receive()

    def receive(self) -> list[bytes]:
        """Wait for a message.

        Raises:
            LinkDownError: the connection ends, or nothing comes for ``reply_s``.
            StoppedError: the client stops.
        """
        deadline = time.monotonic() + self._reply_s
        while True:
            ready = self._poll(deadline)
            if self._socket in ready:
                return self._socket.recv_multipart()
            self._follow(ready)
            if time.monotonic() >= deadline:
                raise LinkDownError(LinkKind.UNREACHABLE, f"{self._address}: no answer for {self._reply_s:g} s")

    def idle(self, seconds: float) -> None:
        """Wait until somebody wants attention, at most so long.

        Raises:
            LinkDownError: the connection ends.
            StoppedError: the client stops.
        """
        self._poller.register(self._wake, zmq.POLLIN)
        try:
            ready = self._poll(time.monotonic() + seconds)
        finally:
            self._poller.unregister(self._wake)
        if self._socket in ready:
            # Nothing was asked; what comes late belongs to nothing.
            self._socket.recv_multipart()
        self._follow(ready)

    def _poll(self, deadline: float) -> dict[object, int]:
        left = max(0.0, deadline - time.monotonic())
        ready = dict(self._poller.poll(round(left * 1000)))
        if self._stop in ready:
            raise StoppedError
        return ready

    def _follow(self, ready: dict[object, int]) -> bool:
        """Read what the monitor says; returns whether the handshake has succeeded now."""
        if self._monitor not in ready:
            return False
        event = parse_monitor_message(self._monitor.recv_multipart())
        kind = event["event"]
        if kind == zmq.EVENT_CONNECTED:
            self._tcp = True
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            raise LinkDownError(
                LinkKind.REFUSED,
                f"{self._address}: the aggregator does not take this box's key; enrol it: lineward aggregate enrol",
            )
        elif kind in (zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL):
            # libzmq gives EAGAIN where the handshake ran out of time, and EPIPE or a reset where it was broken off.
            if event["value"] == zmq.EAGAIN:
                raise self._silent()
            raise LinkDownError(
                LinkKind.WRONG_SERVER_KEY,
                f"{self._address}: breaks the handshake off; federation.aggregator_key_file is not its key, "
                "or something else listens there",
            )
        elif kind in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
            why = "the connection was cut" if self._tcp else "nobody listens"
            raise LinkDownError(LinkKind.UNREACHABLE, f"{self._address}: {why}")
        return bool(kind == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def _silent(self) -> LinkDownError:
        what = "accepts the connection and says nothing" if self._tcp else "cannot be reached"
        return LinkDownError(LinkKind.UNREACHABLE, f"{self._address}: {what} for {self._connect_s:g} s")
