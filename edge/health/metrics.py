"""Counters and latency percentiles of a running box. Knows nothing of who reads them."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

WINDOW = 2048
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}
# From a head on a small canvas to a frame that waits behind others; a stage that takes 5 s is stuck.
BUCKETS_MS = (1, 2.5, 5, 10, 15, 20, 30, 40, 50, 75, 100, 150, 250, 500, 1000, 2500, 5000)
MS_PER_S = 1e3


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latencies of one stage since the start.

    Attributes:
        buckets: (upper bound in seconds, observations up to it), growing; the last bound is infinite.
        sum_s: of all observations, in seconds.
    """

    buckets: tuple[tuple[float, int], ...]
    sum_s: float

    @property
    def count(self) -> int:
        """All observations."""
        return self.buckets[-1][1]


class Metrics:
    """Thread-safe counters and a window of recent latencies per stage.

    Args:
        window: latencies kept per stage; percentiles speak of these.
    """

    def __init__(self, *, window: int = WINDOW) -> None:
        self._lock = threading.Lock()
        self._window = window
        self._counts: Counter[str] = Counter()
        self._latencies: dict[str, deque[float]] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums_ms: defaultdict[str, float] = defaultdict(float)

    def count(self, name: str, by: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += by

    def value(self, name: str) -> int:
        """Return a counter, 0 where nothing was counted."""
        with self._lock:
            return self._counts[name]

    def observe(self, latency_ms: dict[str, float]) -> None:
        """Take the latencies of one frame, in milliseconds per stage."""
        with self._lock:
            for stage, value in latency_ms.items():
                if stage not in self._latencies:
                    self._latencies[stage] = deque(maxlen=self._window)
                    self._buckets[stage] = [0] * (len(BUCKETS_MS) + 1)
                self._latencies[stage].append(value)
                self._buckets[stage][bisect_left(BUCKETS_MS, value)] += 1
                self._sums_ms[stage] += value

    def counts(self) -> dict[str, int]:
        """Return a copy of all counters, sorted by name."""
        with self._lock:
            return dict(sorted(self._counts.items()))

    def percentiles(self) -> dict[str, dict[str, float]]:
        """Return stage -> p50, p90, p99 and max in milliseconds, of the window; nothing for an unseen stage."""
        with self._lock:
            values = {stage: np.array(window) for stage, window in self._latencies.items()}
        result = {}
        for stage, window in values.items():
            figures = np.percentile(window, list(PERCENTILES.values()))
            result[stage] = {name: round(float(x), 3) for name, x in zip(PERCENTILES, figures, strict=True)}
            result[stage]["max"] = round(float(window.max()), 3)
        return result

    def histograms(self) -> dict[str, Histogram]:
        """Return the histogram of each stage that was seen."""
        with self._lock:
            found = {stage: (tuple(counts), self._sums_ms[stage]) for stage, counts in self._buckets.items()}
        bounds = (*(bound / MS_PER_S for bound in BUCKETS_MS), float("inf"))
        return {
            stage: Histogram(tuple(zip(bounds, accumulate(counts), strict=True)), total / MS_PER_S)
            for stage, (counts, total) in found.items()
        }
