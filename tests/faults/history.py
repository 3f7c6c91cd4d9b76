"""What happened to every message, as the processes themselves noted it, and a checker that knows what may not happen.

Each process appends one JSON line per fact with O_APPEND; a SIGKILL takes no line that was written.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# So many numbers are named in a finding; the file has the others.
_NAMED = 8


class Kind(str, Enum):
    """A fact. ``attempted`` is noted inside the transaction, ``enqueued`` after append has returned."""

    ATTEMPTED = "attempted"
    ENQUEUED = "enqueued"
    SESSION = "session"
    PUBLISHED = "published"
    ACKNOWLEDGED = "acknowledged"
    DELIVERED = "delivered"
    GAP = "gap"


class Id(NamedTuple):
    """A message: unique over all boxes and lives."""

    box: str
    epoch: str
    seq: int


@dataclass(frozen=True, slots=True)
class Fact:
    """One line.

    Attributes:
        kind: what happened.
        box: to a message of which box.
        epoch: empty for a session.
        seq: 0 for a session; the number of the gap message itself for a gap.
        content: what tells the message's content from that of any other; empty where it is not known.
        late: the message said so.
        first: of a gap: the numbers ``first`` .. ``last``, of which ``dropped`` are gone.
        last: see ``first``.
        dropped: see ``first``.
        pid: who noted it.
        at_ns: monotonic, the same clock in all processes of a machine.
    """

    kind: Kind
    box: str
    epoch: str = ""
    seq: int = 0
    content: str = ""
    late: bool = False
    first: int = 0
    last: int = 0
    dropped: int = 0
    pid: int = 0
    at_ns: int = 0

    @property
    def id(self) -> Id:
        return Id(self.box, self.epoch, self.seq)


class Recorder:
    """Appends facts to a file that other processes append to as well."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def note(self, kind: Kind, box: str, **values: str | int | bool) -> None:
        """Write a fact in one system call: it is in the file, whole, when this returns."""
        line = {"kind": kind.value, "box": box, **values, "pid": os.getpid(), "at_ns": time.monotonic_ns()}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> list[Fact]:
    """The facts in the order in which they were written.

    Raises:
        ValueError: a line is not a fact; a history with a hole proves nothing.
    """
    with path.open(encoding="utf-8") as file:
        return [_parse(line, f"{path}, line {number}") for number, line in enumerate(file, 1)]


def _parse(line: str, where: str) -> Fact:
    try:
        values = json.loads(line)
        return Fact(**values | {"kind": Kind(values["kind"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where}: {error}") from error


@dataclass
class Report:
    """What a history shows. It is sound when there are no findings."""

    findings: list[str] = field(default_factory=list)
    enqueued: int = 0
    delivered: int = 0
    duplicates: int = 0
    lost: list[Id] = field(default_factory=list)
    given_up: list[Id] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        said = f"{self.enqueued} enqueued, {self.delivered} delivered, {self.duplicates} duplicates"
        return "; ".join([said, *self.findings])


def check(facts: Iterable[Fact], *, lanes_ordered: bool = True, whole: bool = True) -> Report:
    """Look for everything that may not happen once all is quiet.

    - What append has accepted is delivered, or a gap message counts it.
    - What is delivered was once made, with that content, and a repeat says the same.
    - What is published was made, what is acknowledged was published.
    - After de-duplication live messages of an epoch come in the order of their numbers; each connection sends each of
      its two lanes in that order.

    Args:
        facts: all of them, in the order in which they were noted.
        lanes_ordered: whether the broker keeps the order; mosquitto sends a new message ahead of what it has kept for
            a client that was away.
        whole: whether numbers without a message, which no gap counts, are a finding.
    """
    facts = list(facts)
    report = Report()
    _check_content(facts, report)
    _check_loss(facts, report, whole=whole)
    _check_sender(facts, report)
    if lanes_ordered:
        _check_live_order(facts, report)
    return report


def _check_loss(facts: list[Fact], report: Report, *, whole: bool) -> None:
    enqueued = {fact.id for fact in facts if fact.kind is Kind.ENQUEUED}
    delivered = {fact.id for fact in facts if fact.kind is Kind.DELIVERED}
    gaps = {fact.id: fact for fact in facts if fact.kind is Kind.GAP}.values()
    absent = sorted(enqueued - delivered)
    report.enqueued, report.delivered = len(enqueued), len(delivered)
    report.duplicates = sum(fact.kind is Kind.DELIVERED for fact in facts) - len(delivered)
    for message in absent:
        explained = any((gap.box, gap.epoch) == message[:2] and gap.first <= message.seq <= gap.last for gap in gaps)
        (report.given_up if explained else report.lost).append(message)
    if report.lost:
        report.findings.append(f"{len(report.lost)} lost: {_named(report.lost)}")
    counted = sum(gap.dropped for gap in gaps)
    silent = sum(1 for fact in {f.id: f for f in facts if f.kind is Kind.ATTEMPTED}.values()
                 if fact.id not in enqueued and fact.id not in delivered)  # fmt: skip
    # A row that was stored and whose box died before it could say so may be among the dropped ones.
    if not len(report.given_up) <= counted <= len(report.given_up) + silent:
        report.findings.append(f"gaps count {counted} dropped messages, {len(report.given_up)} are missing")
    if whole:
        _check_holes(delivered, gaps, report)


def _check_holes(delivered: set[Id], gaps: Iterable[Fact], report: Report) -> None:
    for stream in sorted({message[:2] for message in delivered}):
        seqs = {message.seq for message in delivered if message[:2] == stream}
        own = [gap for gap in gaps if (gap.box, gap.epoch) == stream]
        known = seqs.union(*(range(gap.first, gap.last + 1) for gap in own), (gap.seq for gap in own))
        holes = [Id(*stream, seq) for seq in range(min(known), max(known) + 1) if seq not in known]
        if holes:
            report.findings.append(f"{len(holes)} numbers without a message: {_named(holes)}")


def _check_content(facts: list[Fact], report: Report) -> None:
    made: dict[Id, set[str]] = defaultdict(set)
    stored: dict[Id, str] = {}
    seen: dict[Id, str] = {}
    invented, changed = set(), set()
    for fact in facts:
        if fact.kind is Kind.ATTEMPTED:
            made[fact.id].add(fact.content)
        elif fact.kind is Kind.ENQUEUED:
            if stored.setdefault(fact.id, fact.content) != fact.content:
                report.findings.append(f"number given twice: {_named([fact.id])}")
        elif fact.kind is Kind.DELIVERED:
            if fact.id not in made:
                invented.add(fact.id)
            elif fact.content not in made[fact.id] or seen.setdefault(fact.id, fact.content) != fact.content:
                changed.add(fact.id)
    changed |= {message for message, content in seen.items() if stored.get(message, content) != content}
    for word, found in (("invented", invented), ("delivered with another content", changed)):
        if found:
            report.findings.append(f"{len(found)} {word}: {_named(sorted(found))}")


def _check_sender(facts: list[Fact], report: Report) -> None:
    made = {fact.id for fact in facts if fact.kind is Kind.ATTEMPTED}
    published: set[Id] = set()
    last: dict[tuple[str, int, bool], Fact] = {}
    for fact in facts:
        if fact.kind is Kind.SESSION:
            last = {key: value for key, value in last.items() if key[:2] != (fact.box, fact.pid)}
        elif fact.kind is Kind.PUBLISHED:
            # Numbers go on from one epoch of a file to the next.
            lane = (fact.box, fact.pid, fact.late)
            if lane in last and fact.seq <= last[lane].seq:
                report.findings.append(f"sent out of order: {_named([fact.id])} after {_named([last[lane].id])}")
            last[lane] = fact
            published.add(fact.id)
        elif fact.kind is Kind.ACKNOWLEDGED and fact.id not in published:
            report.findings.append(f"acknowledged but never sent: {_named([fact.id])}")
    unmade = sorted(published - made - {fact.id for fact in facts if fact.kind is Kind.GAP})
    if unmade and made:
        report.findings.append(f"{len(unmade)} sent but never made: {_named(unmade)}")


def _check_live_order(facts: list[Fact], report: Report) -> None:
    seen: set[Id] = set()
    last: dict[tuple[str, str], int] = {}
    for fact in facts:
        if fact.kind is not Kind.DELIVERED or fact.id in seen:
            continue
        seen.add(fact.id)
        stream = (fact.box, fact.epoch)
        if fact.late:
            continue
        if fact.seq < last.get(stream, 0):
            report.findings.append(f"live out of order: {_named([fact.id])} after {last[stream]}")
        last[stream] = fact.seq


def _named(messages: Iterable[Id]) -> str:
    names = [f"{message.box}/{message.epoch}/{message.seq}" for message in messages]
    return ", ".join(names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


def require_sound(path: Path, *, seed: int, **options: bool) -> Report:
    """Check a history file; where something is found the file is kept, and named with the seed.

    Raises:
        AssertionError: something that may not happen has happened.
    """
    report = check(read(path), **options)
    if not report.sound:
        raise AssertionError(f"{report}; seed {seed}, history kept as {keep(path, seed=seed)}")
    return report


def keep(path: Path, *, seed: int) -> Path:
    """Copy a history to where no test cleans up; returns where."""
    folder = Path(tempfile.gettempdir()) / "lineward-histories"
    folder.mkdir(exist_ok=True)
    target = folder / f"{path.stem}-seed{seed}-{os.getpid()}-{time.monotonic_ns()}.jsonl"
    shutil.copy(path, target)
    return target


def ids(facts: Iterable[Fact], kind: Kind) -> Iterator[Id]:
    """The messages of one kind of fact, repeats included."""
    return (fact.id for fact in facts if fact.kind is kind)
