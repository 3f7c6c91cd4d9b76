"""Memory updates as benchmarks need them: rows and counts that count, the rest filled in. It must not know figures."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np

from edge.federation.update import MemoryUpdate, Order

if TYPE_CHECKING:
    import numpy.typing as npt

    Single = npt.NDArray[np.float32]


def make_update(
    rows: Single,
    support: Single,
    *,
    number: int,
    product: str,
    subclass: str = "",
    embedding_id: str = "0" * 64,
    n_frames: int = 100,
) -> MemoryUpdate:
    """Return the update of box ``number``.

    Args:
        rows: float32 [R, D]; rounded to float16, as on the wire.
        support: float32 [R] > 0.
        number: of the box.
        product: what it judges.
        subclass: its condition.
        embedding_id: 64 hex digits.
        n_frames: that fed it.
    """
    rounded = rows.astype(np.float16).astype(np.float32)
    return MemoryUpdate(
        fleet="fleet",
        box=f"bench/{number}",
        product=product,
        subclass=subclass,
        embedding_id=embedding_id,
        round=1,
        order=Order.ANCHOR,
        rows=rounded,
        support=support,
        frames=np.minimum(support, n_frames).astype(np.float32),
        n_frames=n_frames,
        mean=rounded.mean(0),
        std=rounded.std(0),
        base_version=0,
        created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        nonce=f"{number:032x}",
    )
