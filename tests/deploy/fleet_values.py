"""Updates and banks for tests of the aggregator: small, seeded, with modes that a memory has to cover."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.federation.update import MemoryUpdate, Order

if TYPE_CHECKING:
    import numpy.typing as npt

EMBEDDING_ID = "ab" * 32


def update(values: npt.ArrayLike, /, *, box: str = "site/box", **changes: Any) -> MemoryUpdate:
    rows = np.asarray(values, np.float32).astype(np.float16).astype(np.float32)
    count, width = rows.shape
    made = MemoryUpdate(
        fleet="fleet",
        box=box,
        product="part",
        subclass="",
        embedding_id=EMBEDDING_ID,
        round=1,
        order=Order.ANCHOR,
        rows=rows,
        support=np.full(count, 20, np.float32),
        frames=np.full(count, 10, np.float32),
        n_frames=40,
        mean=rows.mean(0) if count else np.zeros(width, np.float32),
        std=rows.std(0) if count else np.zeros(width, np.float32),
        base_version=0,
        created=datetime(2026, 1, 1, tzinfo=timezone.utc),
        nonce="0" * 32,
    )
    return replace(made, **changes)


def fleet(boxes: int, *, rows: int = 40, width: int = 6, seed: int = 0, products: int = 1) -> list[MemoryUpdate]:
    """Boxes whose rows lie around shared modes, each with a share of its own and supports that differ."""
    rng = np.random.default_rng(seed)
    modes = 4 * rng.standard_normal((products, 12, width))
    made = []
    for number in range(boxes):
        product = number % products
        mode = modes[product, rng.integers(0, 12, rows)]
        made.append(
            update(
                mode + 0.2 * rng.standard_normal((rows, width)),
                box=f"site/box{number}",
                product=f"part{product}",
                support=rng.uniform(5, 200, rows).astype(np.float32),
                nonce=f"{number:032x}",
            )
        )
    return made
