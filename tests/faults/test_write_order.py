"""No alert leaves the box before the sync of its row has come back, as the kernel saw it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.faults.write_order import Order, read_order, trace_alert_box

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

ROWS = 40
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="no strace: apt-get install strace")


@needs_strace
@pytest.mark.broker
def test_no_alert_is_sent_before_its_row_is_synced(mosquitto: Mosquitto, tmp_path: Path) -> None:
    order = trace_alert_box(mosquitto, tmp_path, rows=ROWS)
    assert len(order.sent) >= ROWS, "the trace does not show all that was sent"
    assert order.early == set()
    assert order.syncs > 0


@needs_strace
@pytest.mark.broker
def test_alerts_of_an_outbox_that_is_not_synced_are_found(mosquitto: Mosquitto, tmp_path: Path) -> None:
    """The control: the same box, synchronous=NORMAL."""
    order = trace_alert_box(mosquitto, tmp_path, rows=ROWS, synced=False)
    assert len(order.sent) >= ROWS
    # Not all of them: the log is synced for other reasons too, and a row that waited by then is safe.
    assert len(order.early) >= ROWS // 2


A, B = "a" * 32, "b" * 32
WAL, SOCKET = "5</x/o.db-wal>", "7<" + "".join(f"\\x{byte:02x}" for byte in b"socket:[1]") + ">"


def quoted(content: bytes) -> str:
    return '"' + "".join(f"\\x{byte:02x}" for byte in content) + '"'


def frame(*names: str, commits: bool = True) -> list[str]:
    """A frame of the log as two calls of one thread."""
    header = bytes(4) + (b"\0\0\0\7" if commits else bytes(4)) + bytes(16)
    page = b"".join(b'"event_id":"%s"' % name.encode() for name in names)
    return [f"1 pwrite64({WAL}, {quoted(header)}, 24, 0) = 24", f"1 pwrite64({WAL}, {quoted(page)}, 4096, 24) = 4096"]


def send(name: str, socket: str = SOCKET) -> str:
    content = b'\x32\x80{"event_id":"%s"}' % name.encode()
    return f"2 sendto({socket}, {quoted(content)}, 9, 0, NULL, 0) = 9"


SYNC = f"1 fdatasync({WAL}) = 0"


@pytest.mark.parametrize(
    ("lines", "early"),
    [
        ([*frame(A), SYNC, send(A)], set()),
        ([*frame(A), *frame(B), SYNC, send(B), send(A)], set()),
        ([*frame(A), send(A), SYNC], {A}),
        ([*frame(A, commits=False), SYNC, *frame(), send(A)], {A}),
        ([*frame(A, commits=False), *frame(), SYNC, send(A)], set()),
        ([SYNC, *frame(A), send(A)], {A}),
        ([*frame(A), f"1 fdatasync({WAL}) = -1 EIO (Input/output error)", send(A)], {A}),
        ([*frame(A), "1 fdatasync(4</x/o.db>) = 0", send(A)], {A}),
        ([*frame(A), "1 fdatasync(4</x/o-ledger.db-wal>) = 0", send(A)], {A}),
        ([*frame(A), f"1 fdatasync({WAL} <unfinished ...>", send(A), "1 <... fdatasync resumed>) = 0"], {A}),
        ([*frame(A), f"1 fdatasync({WAL} <unfinished ...>", "1 <... fdatasync resumed>) = 0", send(A)], set()),
        (
            [f"1 fdatasync({WAL} <unfinished ...>", *(line.replace("1 p", "3 p") for line in frame(A)),
             "1 <... fdatasync resumed>) = 0", send(A)],
            {A},
        ),
        ([*frame(A), send(A, "9</x/history.jsonl>"), SYNC, send(A)], set()),
        ([*frame(A), send(A).replace(" = 9", " <unfinished ...>").replace("NULL, 0)", "NULL, 0"), SYNC], {A}),
    ],
)  # fmt: skip
def test_order_is_read_from_a_trace(lines: list[str], early: set[str]) -> None:
    order: Order = read_order(lines)
    assert order.sent
    assert order.early == early
