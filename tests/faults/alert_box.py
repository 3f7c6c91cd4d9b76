"""A box that does nothing but alert, to be killed: it notes in a history what it does with every message."""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge.alerts.message import alert_from_event, encode, gap_maker
from edge.alerts.outbox import Draft, Outbox, Priority
from edge.alerts.publisher import Publisher
from edge.alerts.settings import BrokerSettings
from edge.errors import OutboxError
from tests.alert_values import IDENTITY, JUDGE, event
from tests.faults.history import Kind, Recorder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edge.alerts.outbox import Row


_BURST = 100


class RecordingOutbox(Outbox):
    """An outbox of alerts that notes every step of them. ``synced``: False for one that leaves syncing to the disk."""

    def __init__(self, path: Path, history: Path, *, synced: bool = True, **options: Any) -> None:
        self._recorder = Recorder(history)
        self._synced = synced
        self._contents: dict[int, tuple[str, str]] = {}
        self._given: dict[int, Row] = {}
        super().__init__(path, make_gap=gap_maker(IDENTITY), **options)

    def alert(self, priority: Priority = Priority.HIGH, *, count: int = 1) -> list[int]:
        """Append alerts that are like no others."""
        return self.append_many([self._draft(priority) for _ in range(count)])

    def append_many(self, drafts: Sequence[Draft]) -> list[int]:
        seqs = super().append_many(drafts)
        for seq in seqs:
            epoch, content = self._contents.pop(seq)
            self._recorder.note(Kind.ENQUEUED, IDENTITY.box, epoch=epoch, seq=seq, content=content)
        return seqs

    def pending(self, limit: int, *, boundary: int = 0) -> list[Row]:
        rows = super().pending(limit, boundary=boundary)
        self._given.update((row.seq, row) for row in rows)
        return rows

    def mark_sent(self, seqs: Iterable[int]) -> None:
        numbers = list(seqs)
        super().mark_sent(numbers)
        for seq in numbers:
            row = self._given[seq]
            self._recorder.note(Kind.PUBLISHED, IDENTITY.box, epoch=row.epoch, seq=seq, late=row.late)

    def acknowledge(self, seqs: Iterable[int]) -> int:
        numbers = list(seqs)
        for seq in numbers:
            self._recorder.note(Kind.ACKNOWLEDGED, IDENTITY.box, epoch=self._given.pop(seq).epoch, seq=seq)
        return super().acknowledge(numbers)

    def release_sent(self, seqs: Iterable[int] | None = None) -> None:
        if seqs is None:
            self._recorder.note(Kind.SESSION, IDENTITY.box)
        super().release_sent(seqs)

    def _draft(self, priority: Priority) -> Draft:
        name = secrets.token_hex(16)

        def make(epoch: str, seq: int) -> bytes:
            content = f"{name} new"
            self._recorder.note(Kind.ATTEMPTED, IDENTITY.box, epoch=epoch, seq=seq, content=content)
            self._contents[seq] = (epoch, content)
            found = event(event_id=name)
            return encode(alert_from_event(found, identity=IDENTITY, judge=JUDGE, epoch=epoch, seq=seq))

        return Draft(IDENTITY.alert("cam"), make, priority)

    def _write(self, work: Any, *, durable: bool = True, shed: bool = False) -> Any:
        return super()._write(work, durable=durable and self._synced, shed=shed)


class OneLane(RecordingOutbox):
    """For control runs: rows go by their number, live ones behind all that have waited."""

    def pending(self, limit: int, *, boundary: int = 0) -> list[Row]:
        return super().pending(limit, boundary=max(boundary, 2**62))


def settings_for(url: str, *, keepalive_s: int = 5, patient: bool = False) -> BrokerSettings:
    """Short waits, since it is the faults that shall take time; ``patient``: those of a box that nobody has set up."""
    waits = {} if patient else {"backoff_min_s": 0.05, "backoff_max_s": 0.2}
    return BrokerSettings(url=url, keepalive_s=keepalive_s, **waits)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outbox", type=Path, required=True)
    parser.add_argument("--history", type=Path, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--rate", type=float, default=20.0, help="alerts per second of each thread")
    parser.add_argument("--threads", type=int, default=1, help="that alert")
    parser.add_argument("--rows", type=int, help="end after so many and once the broker has them")
    parser.add_argument("--keepalive", type=int, default=5, help="seconds")
    parser.add_argument("--patient", action="store_true", help="wait between attempts as a box does by default")
    parser.add_argument("--one-lane", action="store_true", help="send live rows behind all that wait")
    parser.add_argument("--commands", action="store_true", help="take commands from stdin, see obey()")
    parser.add_argument("--unowned", action="store_true", help="let files grow as SQLite likes")
    parser.add_argument("--unsynced", action="store_true", help="leave syncing to the disk")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = parse_options(arguments)
    if options.unowned:
        del os.posix_fallocate
    kind = OneLane if options.one_lane else RecordingOutbox
    outbox = kind(options.outbox, options.history, synced=not options.unsynced)
    settings = settings_for(options.url, keepalive_s=options.keepalive, patient=options.patient)
    publisher = Publisher(settings=settings, identity=IDENTITY, outbox=outbox)
    publisher.start()
    say("ready")
    ended = threading.Event()

    def alert() -> None:
        while not ended.is_set() and (options.rows is None or outbox.counters["appended"] < options.rows):
            with contextlib.suppress(OutboxError):
                outbox.alert()
            ended.wait(1 / options.rate)

    threads = [threading.Thread(target=alert, daemon=True) for _ in range(options.threads)]
    for thread in threads:
        thread.start()
    if options.commands:
        obey(outbox)
        ended.set()
    for thread in threads:
        thread.join()
    publisher.wait_until_drained(30)
    publisher.stop()
    outbox.close()


def obey(outbox: RecordingOutbox) -> None:
    """Do what stdin says, until it says ``end``: ``burst COUNT`` appends, and says how many were refused."""
    for line in sys.stdin:
        verb, *values = line.split()
        if verb == "end":
            return
        refused = 0
        for left in range(int(values[0]), 0, -_BURST):
            count = min(left, _BURST)
            try:
                outbox.alert(count=count)
            except OutboxError:
                refused += count
        say(f"done {refused}")


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
