"""The files of a box that died, damaged at random places of its write-ahead log, and opened again."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from edge.alerts.message import Alert, Gap, gap_maker, parse
from edge.alerts.outbox import Outbox
from tests.alert_values import IDENTITY, draft

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 40


class Damage(str, Enum):
    """What happens at a place of the log: it ends there, a bit flips, the rest is zeros."""

    TRUNCATE = "truncate"
    FLIP = "flip"
    ZERO = "zero"


@dataclass
class Damaged:
    """What was found in so many cases.

    Attributes:
        cases: looked at.
        findings: what may not be.
        lost: cases in which a row after the damage was gone, and a gap counted it.
        slowest_s: the longest that opening took.
    """

    cases: int = 0
    findings: list[str] = field(default_factory=list)
    lost: int = 0
    slowest_s: float = 0.0


def open_outbox(path: Path) -> Outbox:
    return Outbox(path, make_gap=gap_maker(IDENTITY))


def leave_crashed(folder: Path, copy: Path) -> list[int]:
    """Write the files of a box that died after 40 rows, all of them in the log; returns its length after each."""
    outbox = open_outbox(folder / "outbox.db")
    outbox._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # type: ignore[union-attr]
    outbox._db.execute("PRAGMA wal_autocheckpoint=0")  # type: ignore[union-attr]
    lengths = []
    for _ in range(ROWS):
        outbox.append_many([draft()])
        lengths.append(_written(folder / "outbox.db-wal"))
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        shutil.copy(file, copy / file.name)
    outbox.close()
    return lengths


def _written(log: Path) -> int:
    """Bytes of the log that are in use: it owns more. Frames of a page carry the salts of the log's header."""
    content = log.read_bytes()
    end, frame = 32, 24 + int.from_bytes(content[8:12], "big")
    while content[end + 8 : end + 16] == content[16:24]:
        end += frame
    return end


def contents(outbox: Outbox) -> tuple[list[int], list[Gap]]:
    """The numbers of the alerts that would be sent, sorted, and the gaps."""
    messages = [parse(row.topic, row.payload) for row in outbox.pending(1000)]
    return sorted(m.seq for m in messages if isinstance(m, Alert)), [m for m in messages if isinstance(m, Gap)]


def damage_log(source: Path, lengths: list[int], folder: Path, *, cases: int, seed: int) -> Damaged:
    """Damage a copy of the files at a random place, open it, look at what is there, append; so many times."""
    rng = random.Random(seed)
    found = Damaged()
    kinds = list(Damage)
    for case in range(cases):
        copy = folder / "case"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        log = copy / "outbox.db-wal"
        at, kind = rng.randrange(32, lengths[-1]), kinds[case % len(kinds)]
        log.write_bytes(_damaged(log.read_bytes(), kind, at, 1 << rng.randrange(8)))
        safe = sum(length <= at for length in lengths)
        before = len(found.findings)
        _look(copy / "outbox.db", safe, found)
        found.findings[before:] = [f"case {case} ({kind.value} at {at}): {text}" for text in found.findings[before:]]
        found.cases += 1
    return found


def _damaged(content: bytes, kind: Damage, at: int, bit: int) -> bytes:
    if kind is Damage.TRUNCATE:
        return content[:at]
    if kind is Damage.FLIP:
        return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
    return content[:at] + bytes(len(content) - at)


def _look(path: Path, safe: int, found: Damaged) -> None:
    began = time.monotonic()
    with open_outbox(path) as outbox:
        found.slowest_s = max(found.slowest_s, time.monotonic() - began)
        seqs, gaps = contents(outbox)
        lost = ROWS - len(seqs)
        found.lost += lost > 0
        counted = [(gap.first, gap.last, gap.dropped) for gap in gaps]
        truths = {
            "a row that was committed before the damage is gone": seqs[:safe] == list(range(1, safe + 1)),
            "there is a hole": seqs == list(range(1, len(seqs) + 1)),
            f"gaps count {counted}": counted == ([(len(seqs) + 1, ROWS, lost)] if lost else []),
            "the damage is not told": (outbox.damage is not None) == (lost > 0),
            "a number that may have been seen is given again": outbox.append(*draft()[:2]) == ROWS + 1,
            "a file that is whole was put aside": outbox.quarantined is None,
        }
        found.findings += [text for text, holds in truths.items() if not holds]
