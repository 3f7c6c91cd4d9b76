"""What the memory's keeper remembers over a restart beside the memory itself; it must not know files."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_REFUSED = 64


@dataclass(slots=True)
class Progress:
    """How far shipping and trying had come.

    Attributes:
        since_ship_s: running seconds since the last update was due; time in which the box was off does not count.
        shipped_feeds: frames that had fed the memory when it was shipped last.
        proposed_feeds: frames that had fed it when it was tried last.
        refused_fleet: versions of the fleet's memory that this box has refused.
    """

    since_ship_s: float = 0.0
    shipped_feeds: int = 0
    proposed_feeds: int = 0
    refused_fleet: set[int] = field(default_factory=set)

    @classmethod
    def read(cls, notes: Mapping[str, Any]) -> Progress:
        """Return what :meth:`notes` wrote; a value that makes no sense counts as none."""
        since = notes.get("since_ship_s")
        refused = notes.get("refused_fleet")
        return cls(
            since_ship_s=float(since) if isinstance(since, (int, float)) and since >= 0 else 0.0,
            shipped_feeds=_count(notes.get("shipped_feeds")),
            proposed_feeds=_count(notes.get("proposed_feeds")),
            refused_fleet={_count(version) for version in refused} - {0} if isinstance(refused, list) else set(),
        )

    def notes(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "since_ship_s": self.since_ship_s,
            "shipped_feeds": self.shipped_feeds,
            "proposed_feeds": self.proposed_feeds,
            "refused_fleet": sorted(self.refused_fleet)[-MAX_REFUSED:],
        }


def _count(value: object) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
