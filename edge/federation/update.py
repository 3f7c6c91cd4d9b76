"""What travels between box and aggregator: MemoryUpdate up, FleetBank down. It must not know bytes or sockets."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 (a field type of public values)
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]


class Order(str, Enum):
    """What the rows of an update stand for.

    ``anchor``: cells around anchors, in no order; for textures and parts that are not aligned. ``positional``: row i is
    patch position i; for aligned parts; it shows the layout of the part.
    """

    ANCHOR = "anchor"
    POSITIONAL = "positional"


class WireRows(str, Enum):
    """Numbers that rows travel in: float16, or uint8 with a float32 offset and scale for each column."""

    FLOAT16 = "float16"
    UINT8 = "uint8"


@dataclass(frozen=True, slots=True)
class MemoryUpdate:
    """A reduced memory on its way from a box to the aggregator.

    Attributes:
        fleet: name of the fleet.
        box: name of the box, ``<site>/<box>`` as in its topics; bound to its key.
        product: what it judges.
        subclass: variant or condition of the product; may be empty.
        embedding_id: 64 hex digits; rows of two ids are never mixed.
        round: number of the round that the box means, >= 1.
        order: what a row stands for.
        rows: float32 [R, D], exactly representable in ``wire`` numbers.
        support: float32 [R] > 0, patches behind each row (decayed).
        frames: float32 [R], distinct frames behind each row, >= the box's minimum.
        n_frames: frames that fed the memory since it was begun.
        mean: float32 [D], of all patches that fed the memory.
        std: float32 [D] >= 0, likewise.
        base_version: fleet memory that the box had when it made the update; 0 for none.
        created: UTC.
        nonce: 32 hex digits, drawn for this update.
        wire: numbers that ``rows`` travel in.
    """

    fleet: str
    box: str
    product: str
    subclass: str
    embedding_id: str
    round: int
    order: Order
    rows: Floats
    support: Floats
    frames: Floats
    n_frames: int
    mean: Floats
    std: Floats
    base_version: int
    created: datetime
    nonce: str
    wire: WireRows = WireRows.FLOAT16


@dataclass(frozen=True, slots=True)
class FleetBank:
    """The memory that the aggregator made of a round's updates.

    Attributes:
        fleet: name of the fleet.
        pool: what was merged: ``<embedding_id>`` or ``<embedding_id>/<product>``, by the aggregator's scope.
        embedding_id: 64 hex digits.
        version: counts the banks of a pool, >= 1; a rollback makes a new version with an old bank's rows.
        round: whose updates it holds.
        rows: float32 [R, D], exactly representable in float16, in canonical order.
        mass: float32 [R] > 0, share of the fleet behind each row; sums to 1.
        boxes: uint16 [R], boxes behind each row.
        members: names of the boxes whose updates it holds, sorted.
        created: UTC.
    """

    fleet: str
    pool: str
    embedding_id: str
    version: int
    round: int
    rows: Floats
    mass: Floats
    boxes: npt.NDArray[np.uint16]
    members: tuple[str, ...]
    created: datetime
