"""Whether samples come at the rate that a bundle was trained for: as the sender says, and as a clock measures."""

from __future__ import annotations

from collections import deque

TOLERANCE = 0.01
"""Share by which a rate may be off."""
MEASURED_S = 10.0
"""Shortest time that a rate is measured over: chunks that come in bursts of 50 ms shift it by half a percent."""
_KEPT_S = 30.0
_NS = 1e9


class RateCheck:
    """Compares rates with the layout's.

    Args:
        rate_hz: of the layout.
        paced: whether samples come in real time, so that measuring them says something.
    """

    def __init__(self, rate_hz: float, *, paced: bool = True) -> None:
        self._rate, self._paced = rate_hz, paced
        self._seen: deque[tuple[int, int]] = deque()
        self._measured: float | None = None

    def declared(self, rate_hz: float | None) -> str:
        """Return why windows must not be judged where the sender says that its rate is another; else empty."""
        if rate_hz is None or self._near(rate_hz):
            return ""
        return (
            f"the stream has {rate_hz:g} samples per second, the bundle judges {self._rate:g}; set the sensor to that "
            "rate, or train for its own"
        )

    def saw(self, number: int, at_ns: int) -> None:
        """Hear that samples up to a number had come at a monotonic time."""
        if not self._paced:
            return
        if self._seen and number <= self._seen[-1][0]:
            self.forget()
        # A few points per second are enough.
        if not self._seen or at_ns - self._seen[-1][1] >= _NS / 4:
            self._seen.append((number, at_ns))
        while at_ns - self._seen[0][1] > _KEPT_S * _NS:
            self._seen.popleft()
        first, since = self._seen[0]
        last, until = self._seen[-1]
        self._measured = (last - first) * _NS / (until - since) if until - since >= MEASURED_S * _NS else None

    def forget(self) -> None:
        """Measure anew: a connection was made, or numbers began anew."""
        self._seen.clear()
        self._measured = None

    @property
    def remark(self) -> str:
        """What an operator should know of the measured rate; empty where it is as it should be, or not known yet."""
        if self._measured is None or self._near(self._measured):
            return ""
        return (
            f"samples come at {self._measured:.5g} per second, the bundle judges {self._rate:g}; the sensor's clock or "
            "setting is off, or samples are numbered wrongly"
        )

    def _near(self, rate_hz: float) -> bool:
        return abs(rate_hz - self._rate) <= TOLERANCE * self._rate
