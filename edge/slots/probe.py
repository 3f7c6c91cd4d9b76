"""Tries a bundle in a process of its own: golden frames and latency. What crashes or hangs there harms nobody.

``python -m edge.slots.probe BUNDLE`` prints one JSON object; :func:`examine` runs it and judges what it says.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from edge.bundle import Bundle, Engine, Precision, load_arrays
from edge.errors import LinewardError, SlotError

if TYPE_CHECKING:
    from collections.abc import Sequence

TIMEOUT_S = 120.0
_ROUNDS = 20
_REFUSED = 3


@dataclass(frozen=True, slots=True)
class Probe:
    """What a bundle did on this machine.

    Attributes:
        engine: that judged.
        precision: that judged.
        fallback_reason: why not what was asked for; empty where it was.
        golden_max_error: largest difference from the promised golden scores.
        latency_ms: median time of a canvas, graphs only.
    """

    engine: str
    precision: str
    fallback_reason: str
    golden_max_error: float
    latency_ms: float


@dataclass(frozen=True, slots=True)
class Limits:
    """What a bundle must keep to.

    Attributes:
        max_slowdown: median latency beside that of the bundle which serves.
        allow_fallback: whether another engine or precision than asked for will do.
        timeout_s: for loading, golden frames and timing together.
    """

    max_slowdown: float = 3.0
    allow_fallback: bool = False
    timeout_s: float = TIMEOUT_S


def run_probe(
    bundle: Path,
    *,
    engine: Engine | None = None,
    precision: Precision | None = None,
    threads: int = 0,
    timeout_s: float = TIMEOUT_S,
    python: Sequence[str] = (sys.executable, "-m", "edge.slots.probe"),
) -> Probe:
    """Try a bundle in a child process.

    Args:
        bundle: its folder.
        engine: as in the box's settings.
        precision: as in the box's settings.
        threads: as in the box's settings.
        timeout_s: after which the child is killed.
        python: the command that runs this module.

    Raises:
        SlotError: the child refuses it, crashes, hangs or says nothing sensible.
    """
    command = [*python, str(bundle), "--threads", str(threads)]
    command += [] if engine is None else ["--engine", engine.value]
    command += [] if precision is None else ["--precision", precision.value]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)  # noqa: S603 (our own module)
    except subprocess.TimeoutExpired as error:
        raise SlotError(f"{bundle}: did not load and judge its golden frames within {timeout_s:g} s") from error
    if done.returncode == _REFUSED:
        raise SlotError((done.stderr.strip().splitlines() or ["refused without a word"])[-1])
    if done.returncode != 0:
        raise SlotError(
            f"{bundle}: the process that tried it ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        )
    try:
        return Probe(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (ValueError, TypeError, IndexError) as error:
        raise SlotError(f"{bundle}: the process that tried it said nothing sensible: {done.stdout[-200:]!r}") from error


def examine(
    new: Path,
    serving: Path | None,
    *,
    engine: Engine | None = None,
    precision: Precision | None = None,
    threads: int = 0,
    limits: Limits = Limits(),
) -> Probe:
    """Try a new bundle beside the one that serves, each in a child process of its own.

    Both are timed by turns on the same machine, so that other work on it does not decide.

    Args:
        new: folder of the new bundle.
        serving: folder of the one that serves; None where there is none.
        engine: as in the box's settings.
        precision: as in the box's settings.
        threads: as in the box's settings.
        limits: what it must keep to.

    Raises:
        SlotError: it cannot be loaded, misses its golden scores, falls back, or is too slow.
    """

    def probe(path: Path) -> Probe:
        return run_probe(path, engine=engine, precision=precision, threads=threads, timeout_s=limits.timeout_s)

    found = probe(new)
    if found.fallback_reason and not limits.allow_fallback:
        raise SlotError(f"{new}: would run on {found.engine} {found.precision} only: {found.fallback_reason}")
    if serving is None:
        return found
    before = probe(serving).latency_ms
    latency = found.latency_ms
    if latency > limits.max_slowdown * before:
        # Once more: one busy moment must not refuse a good bundle.
        latency, before = min(latency, probe(new).latency_ms), max(before, probe(serving).latency_ms)
    if latency > limits.max_slowdown * before:
        raise SlotError(
            f"{new}: a frame takes {latency:.1f} ms, and {before:.1f} ms with the bundle that serves; at most "
            f"{limits.max_slowdown:g} times as much is allowed"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Try one bundle in this process and print what it did."""
    parser = argparse.ArgumentParser(prog="edge.slots.probe")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", type=Engine)
    parser.add_argument("--precision", type=Precision)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)
    try:
        result = _probe(options.bundle, options.engine, options.precision, options.threads)
    except LinewardError as error:
        sys.stderr.write(f"{error}\n")
        return _REFUSED
    sys.stdout.write(json.dumps(asdict(result)) + "\n")
    return 0


def _probe(path: Path, engine: Engine | None, precision: Precision | None, threads: int) -> Probe:
    from edge.inference.detector import Detector  # noqa: PLC0415 (the parent needs no engine)

    bundle = Bundle.open(path)
    detector = Detector.open(bundle, engine=engine, precision=precision, threads=threads)
    canvases = load_arrays(bundle.file(bundle.manifest.golden.file))["canvas"]
    times = []
    for index in range(_ROUNDS):
        start = time.perf_counter()
        detector.map_of_canvas(canvases[index % len(canvases)])
        times.append(1000 * (time.perf_counter() - start))
    status = detector.status
    return Probe(
        engine=status.engine.value,
        precision=status.precision.value,
        fallback_reason=status.fallback_reason,
        golden_max_error=status.golden_max_error,
        latency_ms=median(times),
    )


if __name__ == "__main__":
    sys.exit(main())
