"""What the aggregator's store holds, as values: rounds, uploads, banks, events."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RoundState(str, Enum):
    """``open``: takes updates. ``closing``: its updates are fixed and being merged. The others have ended.

    ``closed``: made a bank. ``void``: too few updates passed the gates. ``failed``: its updates cannot be merged.
    """

    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"
    VOID = "void"
    FAILED = "failed"


class UploadState(str, Enum):
    """What became of an update.

    ``waiting``: for its round to close. ``accepted``: it is in a bank. ``quarantined``: an operator decides.
    ``refused``: an operator dismissed it, or its round failed.
    """

    WAITING = "waiting"
    ACCEPTED = "accepted"
    QUARANTINED = "quarantined"
    REFUSED = "refused"


class EventKind(str, Enum):
    """What an event is about."""

    SECURITY = "security"
    REFUSAL = "refusal"
    QUARANTINE = "quarantine"
    ROUND = "round"
    OPERATOR = "operator"
    DAMAGE = "damage"


@dataclass(frozen=True, slots=True)
class Round:
    """A round of a pool.

    ``deadline_ns`` counts nanoseconds since the boot that ``boot`` names, ``remaining_ns`` is what was left of it when
    that was last noted, ``attempts`` counts how often merging it was begun. ``opened`` and ``closed`` are UTC.
    """

    pool: str
    round: int
    state: RoundState
    opened: str
    closed: str | None
    boot: str
    deadline_ns: int
    remaining_ns: int
    attempts: int
    note: str


@dataclass(frozen=True, slots=True)
class Partial:
    """An update of which ``stored`` of ``size`` bytes have arrived."""

    id: int
    box: str
    sha256: str
    pool: str
    round: int
    size: int
    stored: int


@dataclass(frozen=True, slots=True)
class Upload:
    """A whole update without its bytes; ``reasons`` say why it is not accepted."""

    id: int
    pool: str
    box: str
    product: str
    subclass: str
    round_sent: int
    round_counted: int
    sha256: str
    nonce: str
    size: int
    state: UploadState
    reasons: tuple[str, ...]
    released: bool
    received: str


@dataclass(frozen=True, slots=True)
class Bank:
    """A fleet memory without its bytes; ``columns``: D, ``inputs``: sha256 of its updates, ``origin``: what made it."""

    pool: str
    version: int
    round: int
    columns: int
    sha256: str
    size: int
    inputs: tuple[str, ...]
    origin: str
    created: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something that an operator may want to know later; ``ts`` is UTC."""

    id: int
    ts: str
    kind: EventKind
    pool: str
    box: str
    code: str
    text: str
