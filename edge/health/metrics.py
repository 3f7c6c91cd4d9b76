"""Counters and latency percentiles of a running box. Knows nothing of who reads them."""

from __future__ import annotations

import threading
from collections import Counter, deque

import numpy as np

WINDOW = 2048
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0}


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
                self._latencies.setdefault(stage, deque(maxlen=self._window)).append(value)

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
