"""The durable outbox: a message is on disk before anybody tries to send it, and stays until it is safe to forget.

Rows are opaque bytes with a number. This module must not know what they say nor who sends them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path


class Priority(IntEnum):
    """What may go first when the outbox is full: the lowest priority, and of it the oldest."""

    LOW = 0
    NORMAL = 1
    HIGH = 2


class Draft(NamedTuple):
    """A message before it has its number: ``make(epoch, seq)`` gives the payload."""

    topic: str
    make: Callable[[str, int], bytes]
    priority: Priority = Priority.HIGH


@dataclass(frozen=True, slots=True)
class Row:
    """A message on its way."""

    seq: int
    epoch: str
    topic: str
    payload: bytes
    late: bool


class Outbox:
    """Work in progress: the signatures are final."""

    def __init__(
        self,
        path: Path,
        *,
        make_gap: GapMaker,
        max_bytes: int = 64 * 2**20,
        replay_rows: int = 10_000,
        replay_seconds: float = 300.0,
        clock: Callable[[], int] = boottime_ns,
    ) -> None: ...

    def append(self, topic: str, make: Callable[[str, int], bytes], *, priority: Priority = Priority.HIGH) -> int: ...
    def append_many(self, drafts: Sequence[Draft]) -> list[int]: ...
    def close(self) -> None: ...

    epoch: str
    depth: int
    bytes: int
    counters: dict[str, int]
    quarantined: Path | None  # where a damaged file was put aside at opening
