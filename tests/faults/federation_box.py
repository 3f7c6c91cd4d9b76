"""A box that submits one update and sends it until it is killed: FOLDER ADDRESS SERVER_KEY KEY_FILE SEED (0: none)."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from edge.federation.keys import read_key_pair
from tests.federation_link import make_client, make_update


def main(folder: str, address: str, server_key: str, key_file: str, seed: str) -> None:
    client = make_client(Path(folder), read_key_pair(Path(key_file)), "plant/a", address, server_key=server_key)
    if int(seed):
        client.submit(make_update(rows=800, width=64, seed=int(seed)))
    sys.stdout.write("submitted\n")
    sys.stdout.flush()
    client.start()
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
