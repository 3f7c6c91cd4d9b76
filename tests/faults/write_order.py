"""Does any alert leave the box before its row is on disk? Read from the system calls of a box under strace."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.mosquitto_process import Mosquitto

ROOT = Path(__file__).parents[2]
_CALLS = "fdatasync,fsync,sync_file_range,sendto,send,sendmsg,write,writev,pwrite64"
# `12451 pwrite64(5</tmp/o.db-wal>, "\x00..."..., 24, 135992) = 24`, in two lines where another thread comes between.
_LINE = re.compile(
    r"(?P<pid>\d+) +(?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<call>\w+)\(\d+<(?P<file>[^>]*)>)(?P<rest>.*)"
)
_BYTES = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_DONE = re.compile(r"= (-?\d+)")
_NAME = re.compile(rb'"event_id":"([0-9a-f]{32})"')
_FRAME_HEADER = 24  # of the write-ahead log: page number, size of the database after a commit (else 0), salts, checksum
_SYNCS = frozenset({"fdatasync", "fsync"})


@dataclass
class Order:
    """What a trace shows.

    Attributes:
        sent: event ids that went to a socket.
        early: of them, those whose row was not on disk then.
        syncs: of the write-ahead log, that came back without an error.
        written: by log, ids in its pages that no commit frame has followed.
        committed: by log, ids that a commit frame has followed.
        durable: ids whose commit frame was written before a sync began that has come back.
    """

    sent: set[str] = field(default_factory=set)
    early: set[str] = field(default_factory=set)
    syncs: int = 0
    written: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    committed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    durable: set[str] = field(default_factory=set)
    _commits_next: dict[str, bool] = field(default_factory=dict)
    _syncing: dict[str, set[str]] = field(default_factory=dict)

    def begin(self, pid: str, call: str, file: str, content: bytes) -> None:
        """A call has begun: what it sends may be gone from now on, and what it syncs is what was written before."""
        names = {name.decode() for name in _NAME.findall(content)}
        if call in _SYNCS:
            if file.endswith("-wal"):
                self._syncing[pid] = set(self.committed[file])
        elif not file.startswith("/"):
            self.sent |= names
            self.early |= names - self.durable

    def end(self, pid: str, call: str, file: str, content: bytes, *, ok: bool) -> None:
        """A call has come back: what it wrote is in the page cache, what it synced on disk."""
        if call in _SYNCS:
            found = self._syncing.pop(pid, None)
            if found is not None and ok:
                self.syncs += 1
                self.durable |= found
        elif call == "pwrite64" and file.endswith("-wal") and ok:
            if len(content) == _FRAME_HEADER:
                self._commits_next[file] = content[4:8] != bytes(4)
                return
            self.written[file] |= {name.decode() for name in _NAME.findall(content)}
            if self._commits_next.get(file, False):
                self.committed[file] |= self.written.pop(file)


def read_order(lines: Iterable[str]) -> Order:
    """Follow a trace made with ``-f -y -xx``: a line stands where a call begins, its end there or where it resumes."""
    order = Order()
    begun: dict[str, tuple[str, str, bytes]] = {}
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        pid = found["pid"]
        if found["resumed"] is None:
            content = b"".join(_plain(part) for part in _BYTES.findall(found["rest"]))
            begun[pid] = (found["call"], _plain(found["file"]).decode(), content)
            order.begin(pid, *begun[pid])
        done = _DONE.search(found["rest"].rsplit(")", 1)[-1])
        if done is not None and pid in begun:
            order.end(pid, *begun.pop(pid), ok=int(done[1]) >= 0)
    return order


def _plain(text: str) -> bytes:
    r"""What strace wrote as ``\xab`` throughout; names of files too."""
    return bytes.fromhex(text.replace("\\x", "")) if "\\x" in text or not text else text.encode()


def trace_alert_box(broker: Mosquitto, folder: Path, *, rows: int, threads: int = 4, synced: bool = True) -> Order:
    """Run a box that sends ``rows`` alerts, made by several threads at once, under strace."""
    trace = folder / "trace"
    strace = ["strace", "-f", "-y", "-xx", "-s", "200000", "-qq", "-e", f"trace={_CALLS}", "-e", "signal=none"]
    box = [sys.executable, "-m", "tests.faults.alert_box", "--outbox", str(folder / "outbox.db"), "--url", broker.url]
    box += ["--history", str(folder / "history.jsonl"), "--rate", "100", "--rows", str(rows), "--threads", str(threads)]
    command = [*strace, "-o", str(trace), *box, *([] if synced else ["--unsynced"])]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, stdout=subprocess.DEVNULL)
    with trace.open(encoding="ascii", errors="replace") as lines:
        return read_order(lines)
