"""Banks: the rows of a memory in force, and the head's state that they make. It must not know how rows are learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.memory.reduce import coreset
from edge.memory.search import pad_bank

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt

    from edge.bundle import MemoryLayout

    Rows = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Banks:
    """The rows of a memory: the box's own float32 [R, D], and the fleet's float32 [R', D] or None."""

    local: Rows
    fleet: Rows | None

    @property
    def rows(self) -> list[Rows]:
        """The banks that a patch is compared with."""
        return [self.local] if self.fleet is None else [self.local, self.fleet]

    @classmethod
    def with_fleet(cls, local: Rows, fleet: Rows, room: int) -> Banks:
        """Put a fleet's rows beside the box's own, reduced to what the bundle has room for.

        A fleet may have bundles of several sizes. Every box of one size chooses the same rows: those that are
        farthest from each other, so that rare looks stay in.

        Args:
            local: float32 [R, D].
            fleet: float32 [R', D], in the order in which it came.
            room: rows of the bundle's bank.
        """
        return cls(local, fleet if len(fleet) <= room else fleet[coreset(fleet, room, seed=0)])

    def fill(self, packed: Mapping[str, npt.NDArray[Any]], layout: MemoryLayout) -> dict[str, npt.NDArray[Any]]:
        """Return the head's whole state with these banks in it, repeated until they are full.

        Raises:
            DataError: a bank has more rows than the bundle's.
        """
        size = len(packed[layout.fleet])
        # The local rows are in the other bank already: any of them fills this one without changing a distance.
        fleet = self.local[:size] if self.fleet is None else self.fleet
        banks = {layout.local: pad_bank(self.local, len(packed[layout.local])), layout.fleet: pad_bank(fleet, size)}
        return {**packed, **banks}


def packed_banks(packed: Mapping[str, npt.NDArray[Any]], layout: MemoryLayout) -> Banks:
    """Return the banks that a bundle was packed with; a fleet bank that only repeats local rows counts as none."""
    local, fleet = (np.unique(packed[name], axis=0) for name in (layout.local, layout.fleet))
    known = {row.tobytes() for row in local}
    return Banks(local, None if all(row.tobytes() in known for row in fleet) else fleet)
