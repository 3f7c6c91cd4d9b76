"""Connects with keys that nobody enrolled, at a steady rate, until it is killed: ADDRESS SERVER_KEY PER_SECOND."""

from __future__ import annotations

import sys
import threading
import time

import zmq


def main(address: str, server_key: str, per_second: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    public, secret = zmq.curve_keypair()
    sockets: list[zmq.Socket[bytes]] = []
    due, pause = time.monotonic(), threading.Event()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        pause.wait(max(0.0, due - time.monotonic()))
        due += 1 / float(per_second)
        dealer = context.socket(zmq.DEALER)
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.RECONNECT_IVL, -1)
        dealer.set(zmq.CURVE_SERVERKEY, server_key.encode())
        dealer.set(zmq.CURVE_PUBLICKEY, public)
        dealer.set(zmq.CURVE_SECRETKEY, secret)
        dealer.connect(address)
        sockets.append(dealer)
        if len(sockets) > 50:
            sockets.pop(0).close(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
