"""What merging a fleet's updates costs, from 10 boxes to 1,000: seconds, peak memory, error, and equal bits.

Every line is a process of its own, so that its peak memory is its own, the updates included. Beside it stand Lloyd's
iterations on all rows (what the sample is to come near to) and scikit-learn's k-means with the same number of
iterations. Run: ``python -m benchmarks.aggregate [--boxes 10 100 ...] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._updates import make_update
from deploy.aggregator.aggregate import AggregateSettings, aggregate, update_mass
from deploy.aggregator.lloyd import assign, single_threaded_blas

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.federation.update import MemoryUpdate

ROWS, WIDTH = 512, 152
MERGED = 1024
SECONDS, MEBIBYTES = 60.0, 1024.0
OURS, FULL, PEER = "sample, then all rows", "all rows", "scikit-learn"
_PRODUCTS, _MODES, _RANK = 7, 400, 40


def make_updates(boxes: int, seed: int = 0) -> list[MemoryUpdate]:
    """Draw updates: each product has modes of its own in a low-dimensional sheet, each box its share of them."""
    rng = np.random.default_rng(seed)
    sheet = 0.15 * rng.standard_normal((_RANK, WIDTH)).astype(np.float32)
    modes = rng.standard_normal((_PRODUCTS, _MODES, _RANK)).astype(np.float32)
    made = []
    for number in range(boxes):
        product = number % _PRODUCTS
        near = modes[product, rng.integers(0, _MODES, ROWS)]
        inside = (near + 0.3 * rng.standard_normal((ROWS, _RANK), dtype=np.float32)) @ sheet
        rows = inside + 0.1 * rng.standard_normal((ROWS, WIDTH), dtype=np.float32)
        support = np.exp(5 + rng.standard_normal(ROWS)).astype(np.float32)
        made.append(make_update(rows, support, number=number, product=f"product {product}"))
    return made


def settings_of(how: str) -> AggregateSettings:
    """Return the settings of a line: the default search, or a sample that holds all rows."""
    if how == OURS:
        return AggregateSettings(rows=MERGED)
    return AggregateSettings(rows=MERGED, sample_factor=1024)


def measure(how: str, boxes: int, threads: int) -> dict[str, Any]:
    """Merge in this process."""
    updates = make_updates(boxes)
    chosen = settings_of(how)
    started, burnt = time.perf_counter(), time.process_time()
    digest = ""
    if how == PEER:
        rows = _peer(updates, chosen, threads)
    else:
        bank = aggregate(updates, settings=chosen, seed=0, threads=threads)
        rows = bank.rows
        digest = hashlib.sha256(bank.rows.tobytes() + bank.mass.tobytes() + bank.boxes.tobytes()).hexdigest()
    seconds, processor = time.perf_counter() - started, time.process_time() - burnt
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if digest and boxes <= 100:
        turned = aggregate(updates[::-1], settings=chosen, seed=0, threads=threads)
        assert turned.rows.tobytes() == bank.rows.tobytes(), "the order of the updates changed the result"
    mass = np.concatenate(update_mass(updates, chosen))
    points = np.concatenate([update.rows for update in updates]).astype(np.float16)
    with single_threaded_blas(threads) as workers:
        error = assign(points, mass, rows.astype(np.float64), workers=workers).inertia(mass)
    line = {"how": how, "boxes": boxes, "threads": threads, "s": seconds, "cpu": processor}
    return line | {"mib": peak, "error": error, "sha256": digest}


def _peer(updates: Sequence[MemoryUpdate], chosen: AggregateSettings, threads: int) -> np.ndarray:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    rows = np.concatenate([update.rows for update in updates])
    mass = np.concatenate(update_mass(updates, chosen))
    search = KMeans(chosen.rows, n_init=1, max_iter=chosen.iterations, tol=1e-8, random_state=0)
    with threadpool_limits(threads):
        return search.fit(rows, sample_weight=mass).cluster_centers_


def in_process(how: str, boxes: int, threads: int) -> dict[str, Any]:
    """Merge in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.aggregate", "--child", how, str(boxes), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure and print; return the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, nargs="+", default=[10, 30, 100, 300, 1000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compare", type=int, nargs="*", default=[100], help="boxes beside full and peer's k-means")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        how, boxes, threads = options.child
        found = measure(how, int(boxes), int(threads))
        print(json.dumps(found))
        return [found]
    # Imported here: a child's memory is not to hold what only prints.
    from benchmarks._setting import Goal, heading, print_goals

    heading("aggregate")
    wanted = [(OURS, boxes, threads) for boxes in options.boxes for threads in options.threads]
    wanted += [(how, boxes, max(options.threads)) for boxes in options.compare for how in (FULL, PEER)]
    lines = []
    print(f"| boxes | threads | k-means of | s | processor s | peak MiB | mean squared error | bits |\n|{'---|' * 8}")
    for one in wanted:
        line = in_process(*one)
        lines.append(line)
        print(
            f"| {line['boxes']} | {line['threads']} | {line['how']} | {line['s']:.1f} | {line['cpu']:.1f} "
            f"| {line['mib']:.0f} | {line['error']:.4f} | {line['sha256'][:8]} |",
            flush=True,
        )
    ours = [line for line in lines if line["how"] == OURS]
    for boxes in options.boxes:
        bits = {line["sha256"] for line in ours if line["boxes"] == boxes}
        assert len(bits) == 1, f"{boxes} boxes: other bits with other threads"
    most, least = max(options.boxes), min(options.boxes)
    at = {boxes: min(line["s"] for line in ours if line["boxes"] == boxes) for boxes in options.boxes}
    peak = max(line["mib"] for line in ours)
    slope = at[most] / at[least] / (most / least)
    print()
    goals = [
        Goal(f"{most} updates merged in", at[most], SECONDS if most == 1000 else np.nan, False, "", "s"),
        Goal("peak memory", peak, MEBIBYTES, False, "updates included", "MiB"),
        Goal("time against linear in boxes", slope, 1.0, False, f"{least} to {most} boxes"),
    ]
    for boxes in options.compare:
        full = [line["error"] for line in lines if line["boxes"] == boxes and line["how"] == FULL]
        near = [line["error"] for line in ours if line["boxes"] == boxes]
        if full and near:
            goals.append(Goal(f"error against all rows, {boxes} boxes", near[0] / full[0], np.nan, False, ""))
    print_goals(goals)
    if options.json:
        options.json.write_text(json.dumps(lines), encoding="utf-8")
    return lines


if __name__ == "__main__":
    main()
