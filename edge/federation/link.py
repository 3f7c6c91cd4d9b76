"""FleetLink: what the memory of a box asks of its link to the fleet. It must not know sockets or how a bank is tried."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from edge.federation.update import FleetBank, MemoryUpdate


class LinkKind(str, Enum):
    """Where the link to the aggregator stands.

    ``idle``: nothing is tried at the moment. ``connecting``: tried, with back-off. ``connected``: the aggregator
    answers. ``refused``: it answers, or its socket does, that it will not have us; a person is needed.
    """

    IDLE = "idle"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    REFUSED = "refused"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class LinkReport:
    """The link in figures.

    Attributes:
        kind: where it stands.
        reason: why it is refused or not connected; empty where it is well.
        round: that the aggregator collects for, as it said last; 0 before it said anything.
        waiting: updates that have no receipt yet.
        receipts: updates received by the aggregator since the start.
        bank_version: newest fleet memory that was fetched, 0 for none.
    """

    kind: LinkKind
    reason: str = ""
    round: int = 0
    waiting: int = 0
    receipts: int = 0
    bank_version: int = 0


class FleetLink(Protocol):
    """A link that keeps what it was given until the aggregator has it. No call waits for the network."""

    def start(self) -> None:
        """Begin, in a thread of its own."""

    def stop(self, timeout: float) -> None:
        """End within ``timeout`` seconds; what is not delivered is kept."""

    def submit(self, update: MemoryUpdate) -> None:
        """Keep an update, on disk when this returns, and send it until its receipt comes.

        Raises:
            FederationError: the update cannot be encoded.
            OSError: it cannot be stored.
        """

    def poll_bank(self) -> FleetBank | None:
        """Return the newest fleet memory where it was not returned before by this object, else None.

        After a restart the newest one that is known is returned again: whoever asks compares versions.
        """

    def report(self) -> LinkReport:
        """Say how it stands."""
