"""FleetLink: what the memory of a box asks of its link to the fleet. It must not know sockets nor how banks are tried.

:mod:`edge.federation.client` is the one that speaks to an aggregator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from edge.federation.connection import LinkState
    from edge.federation.update import FleetBank, MemoryUpdate


class FleetLink(Protocol):
    """A link that keeps what it was given until the aggregator has it. No call waits for the network."""

    def start(self) -> None:
        """Begin, in a thread of its own."""

    def stop(self, timeout: float) -> None:
        """End within ``timeout`` seconds; what is not delivered is kept."""

    def submit(self, update: MemoryUpdate) -> None:
        """Keep an update, on disk when this returns, and send it until its receipt comes.

        Raises:
            LinewardError: the update cannot be encoded or stored.
            OSError: it cannot be stored.
        """

    def poll_bank(self) -> FleetBank | None:
        """Return the newest fleet memory where this object has not returned it before, else None.

        After a restart the newest one that is known is returned again: whoever asks compares versions.
        """

    @property
    def round(self) -> int:
        """The round that the aggregator collects for, as it said last; 1 before it said anything."""

    @property
    def state(self) -> LinkState:
        """Where the link stands, and what to do where a person is needed."""

    @property
    def counters(self) -> dict[str, Any]:
        """What was sent and received since the start, for the status; JSON values."""
