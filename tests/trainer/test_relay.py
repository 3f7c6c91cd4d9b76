"""The relay: bytes go both ways, a cut ends what is there and what comes, and a mended line leads on."""

from __future__ import annotations

import socket
import socketserver
import threading
from typing import TYPE_CHECKING

import pytest

from trainer.evaluation.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1024):
            self.request.sendall(data.upper())


@pytest.fixture
def relay() -> Iterator[Relay]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Relay(server.server_address[1]) as relay:
            yield relay
        server.shutdown()


def _said(line: socket.socket, text: bytes) -> bytes:
    try:
        line.sendall(text)
        return line.recv(1024)
    except OSError:
        return b""


def test_relay_cut_and_mended(relay: Relay) -> None:
    with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as before:
        assert _said(before, b"good") == b"GOOD"
        relay.cut()
        assert _said(before, b"lost") == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", relay.port), timeout=5)
    relay.mend()
    with socket.create_connection(("127.0.0.1", relay.port), timeout=5) as after:
        assert _said(after, b"back") == b"BACK"
