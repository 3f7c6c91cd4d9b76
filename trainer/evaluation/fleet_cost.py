"""What a round costs the aggregator as the fleet grows: seconds, memory and bytes, measured in a process of its own.

It must not know images: boxes beyond the drawn ones are made of their rows. Imports no torch, whose memory would count.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from deploy.aggregator.aggregate import AggregateSettings, aggregate
from edge.federation.update import FleetBank
from edge.federation.wire import Limits, decode_update, encode_bank, encode_update
from edge.federation.wire_rows import on_wire

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.federation.update import MemoryUpdate

FIRST_SIZES = (10, 30, 100, 300, 1000)
"""Fleets that are measured, as far as the one asked for; that one comes last."""

EXTRAPOLATED = 10_000
"""Boxes that the measured curve is continued to."""

_MIXED = 4  # raw rows in one row of a made box


@dataclass(frozen=True, slots=True)
class Cost:
    """One round of one fleet.

    Attributes:
        boxes: updates merged.
        decode_s: seconds to read and decode all updates.
        aggregate_s: seconds to merge them, on one thread.
        cpu_s: processor seconds of that; other programs on the machine do not lengthen it.
        peak_mb: largest resident memory of the process, in MB of 10**6 bytes.
        idle_mb: resident memory of the process before it read an update.
        bytes_up: of all updates.
        bytes_down: of the bank, times the boxes.
    """

    boxes: int
    decode_s: float
    aggregate_s: float
    cpu_s: float
    peak_mb: float
    idle_mb: float
    bytes_up: int
    bytes_down: int


def made_updates(
    updates: Sequence[MemoryUpdate], rows: Sequence[npt.NDArray[np.float16]], *, seed: int, count: int
) -> Iterator[MemoryUpdate]:
    """Yield ``count`` updates: the given ones, then ones of made boxes.

    A made box has the product of a given one and rows that are means of four raw rows of that one's frames, as a
    reduced memory's are means of patches; so that no two boxes send the same.

    Args:
        updates: at least one.
        rows: float16 [N, L, D], the frames behind each of them.
        seed: of the made rows.
        count: updates to yield.
    """
    yield from updates[:count]
    for number in range(len(updates), count):
        source = number % len(updates)
        rng = np.random.default_rng((seed, number))
        update, raw = updates[source], rows[source].reshape(-1, rows[source].shape[-1])
        picked = raw[rng.integers(len(raw), size=(_MIXED, len(update.rows)))].astype(np.float32).mean(0)
        support = rng.permutation(update.support)
        yield replace(
            update,
            box=f"made{number // 100}/box{number}",
            subclass=f"condition {number}",
            rows=on_wire(picked.astype(np.float32), update.wire),
            support=support,
            frames=np.minimum(update.frames, support),
            nonce=rng.bytes(16).hex(),
        )


def sizes(boxes: int) -> tuple[int, ...]:
    """Return the fleets to measure for a fleet of ``boxes``: 10, 30, 100 ... and that one."""
    return (*(size for size in FIRST_SIZES if size < boxes), boxes)


def measure(
    updates: Sequence[MemoryUpdate],
    rows: Sequence[npt.NDArray[np.float16]],
    boxes: int,
    settings: AggregateSettings,
    *,
    seed: int,
    progress: Progress,
) -> list[Cost]:
    """Merge fleets of growing size, each in a fresh process; see :func:`made_updates` for the arguments."""
    found = []
    with TemporaryDirectory(prefix="lineward-fleet-") as folder:
        for number, update in enumerate(made_updates(updates, rows, seed=seed, count=boxes)):
            (Path(folder) / f"{number:06d}").write_bytes(encode_update(update))
        wanted = sizes(boxes)
        for size in wanted:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found.append(pool.apply(_merge, (folder, size, settings, seed)))
            progress("fleets merged", len(found), len(wanted))
    return found


def _merge(folder: str, boxes: int, settings: AggregateSettings, seed: int) -> Cost:
    idle = _peak_mb()
    started = time.perf_counter()
    messages = [path.read_bytes() for path in sorted(Path(folder).iterdir())[:boxes]]
    total = sum(map(len, messages))
    updates = [decode_update(message, Limits()) for message in messages]
    del messages
    decoded, worked = time.perf_counter(), time.process_time()
    merged = aggregate(updates, settings=settings, seed=seed)
    done, worked = time.perf_counter(), time.process_time() - worked
    peak = _peak_mb()
    first = updates[0]
    bank = FleetBank(
        fleet=first.fleet,
        pool=first.embedding_id,
        embedding_id=first.embedding_id,
        version=1,
        round=first.round,
        rows=merged.rows,
        mass=merged.mass,
        boxes=merged.boxes,
        members=tuple(sorted(update.box for update in updates)),
        created=datetime(2026, 1, 1, tzinfo=timezone.utc),
    )
    down = len(encode_bank(bank)) * boxes
    return Cost(boxes, decoded - started, done - decoded, worked, peak, idle, total, down)


def _peak_mb() -> float:
    """Return the most resident memory of this process; ru_maxrss would begin with that of the process it came from."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
        return int(text.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):  # no Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def growth(costs: Sequence[Cost], what: str) -> float:
    """Return the power with which a figure grew over the last factor of ten in boxes; 1 is linear.

    NaN where fewer than two fleets were measured.
    """
    last = costs[-1]
    before = [cost for cost in costs if cost.boxes * 10 <= last.boxes] or list(costs[:-1])
    if not before:
        return float("nan")
    ratio = getattr(last, what) / max(getattr(before[-1], what), 1e-9)
    return float(np.log(ratio) / np.log(last.boxes / before[-1].boxes))


def extrapolated(costs: Sequence[Cost], what: str, boxes: int = EXTRAPOLATED) -> float:
    """Continue a figure to a larger fleet by the straight line through the two largest fleets measured.

    NaN where fewer than two were measured. No smaller than the last measured.
    """
    if len(costs) < 2:  # noqa: PLR2004 (a line)
        return float("nan")
    (x0, y0), (x1, y1) = ((cost.boxes, getattr(cost, what)) for cost in costs[-2:])
    return max(y1, y1 + (y1 - y0) / (x1 - x0) * (boxes - x1))
