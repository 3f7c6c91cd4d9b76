"""BoxPart: what the box starts, shows and stops beside its cameras. Knows no part."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class BoxPart(Protocol):
    """A service inside the box. What fails inside it is its own to count and show; it never ends the judging."""

    name: str
    """Key of its section in the status."""

    def start(self) -> None:
        """Begin, after the outbox is open and before the cameras start.

        Raises:
            LinewardError: the box cannot do what its settings ask, and trying again will not help.
        """

    def request_stop(self) -> None:
        """Begin to end; returns at once."""

    def stop(self, timeout: float) -> bool:
        """End within ``timeout`` seconds; False where that takes longer. May be called without a start, and twice."""

    def status(self) -> dict[str, Any]:
        """What the box's status says of it, as JSON values; empty where there is nothing to say."""

    def warnings(self) -> Sequence[str]:
        """What an operator should know now."""
