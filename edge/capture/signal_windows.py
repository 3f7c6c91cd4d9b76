"""From samples in order, with gaps, to overlapping windows: a bounded ring that accounts for every sample.

Knows numbers of samples only; not time, channels' names, or where samples come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Window:
    """One window.

    Attributes:
        first: number of its first sample.
        values: float32 [K, Q], NaN where samples were lost.
        more: windows behind it that it stands for, since the same gap took too much of them, too.
    """

    first: int
    values: npt.NDArray[np.float32]
    more: int = 0


@dataclass(slots=True)
class SampleCounts:
    """Every number of a sample is in one of these: received + lost = windowed + unwindowed + skipped + pending.

    Attributes:
        received: samples that came.
        lost: samples that never came, by the gaps in their numbers.
        windowed: samples, lost ones included, that are in one window at least.
        unwindowed: samples that are in no window: the rest of a stream that ended or began anew.
        skipped: lost samples that are in no window: of gaps longer than a window.
        repeated: samples that came again, or out of order, and were left out; not among those received.
        restarts: times that the numbers began anew.
    """

    received: int = 0
    lost: int = 0
    windowed: int = 0
    unwindowed: int = 0
    skipped: int = 0
    repeated: int = 0
    restarts: int = 0


class Windows:
    """Cuts a stream of samples into windows of ``window`` samples, one every ``hop``.

    Holds one window's samples and no more. Where a gap is longer than a window, the windows that began before it are
    completed with NaN and the grid of windows begins anew behind the gap. Of the windows that one gap completes, those
    that lost more than ``max_lost`` are one entry, since they could be as many as a window has samples. Where the
    numbers fall back by a window or more, or at all behind a new connection, the sender began anew: the end of what
    came before is judged in a window of its own where a whole one is there, and the grid begins anew.

    Args:
        channels: K.
        window: samples of a window, Q.
        hop: samples from one window's begin to the next's, 1 .. Q.
        max_lost: share of a window's values that may be lost for it to be judged.
    """

    def __init__(self, *, channels: int, window: int, hop: int, max_lost: float) -> None:
        self._window, self._hop, self._max_lost = window, hop, max_lost
        self._ring = np.full((channels, window), np.nan, np.float32)
        self._begin: int | None = None
        self._start = self._next = self._covered = 0
        self._reconnected = False
        self.counts = SampleCounts()

    @property
    def pending(self) -> int:
        """Samples that are in no window yet."""
        return self._next - self._covered

    def push(self, first: int, samples: npt.NDArray[np.float32], *, chunk_end: int | None = None) -> list[Window]:
        """Take consecutive samples in.

        Args:
            first: number of the first.
            samples: float32 [T, K].
            chunk_end: number behind the last one of the chunk that they are a part of; they are the whole where None.

        Returns:
            The windows that they complete, in order.
        """
        found: list[Window] = []
        if self._begin is None:
            self._begin_at(first)
        anew = self._reconnected and first < self._next
        self._reconnected = False
        if anew or (first + len(samples) if chunk_end is None else chunk_end) <= self._next - self._window:
            found += self.finish()
            self.counts.restarts += 1
            self._begin_at(first)
        behind = min(max(0, self._next - first), len(samples))
        self.counts.repeated += behind
        first, samples = first + behind, samples[behind:]
        if not len(samples):
            return found
        gap = first - self._next
        if gap > 0:
            self.counts.lost += gap
            found += self._lose(gap)
        self.counts.received += len(samples)
        found += self._append(samples)
        return found

    def reconnected(self) -> None:
        """Hear of a new connection: numbers that are behind the next one are then those of a sender begun anew."""
        self._reconnected = self._begin is not None

    def finish(self) -> list[Window]:
        """End the stream: the last samples get a window that overlaps more, where a whole one is there.

        Returns:
            One window or none. What comes next begins a new grid.
        """
        if self._begin is None:
            return []
        found: list[Window] = []
        if self.pending and self._next - self._begin >= self._window:
            self._start = self._next - self._window
            found.append(self._cut())
        self.counts.unwindowed += self.pending
        self._begin = None
        self._start = self._covered = self._next
        return found

    def _begin_at(self, first: int) -> None:
        self._begin = self._start = self._next = self._covered = first
        self._ring.fill(np.nan)

    def _lose(self, gap: int) -> list[Window]:
        """Fill a gap with NaN; of one longer than a window only as much as completes what was begun."""
        if gap <= self._window:
            return self._append(None, gap)
        found = self._append(None, self._window)
        rest = gap - self._window
        self.counts.skipped += rest + self.pending
        self._begin_at(self._next + rest)
        return found

    def _append(self, samples: npt.NDArray[np.float32] | None, count: int = 0) -> list[Window]:
        found: list[Window] = []
        left, done = count if samples is None else len(samples), 0
        while left:
            room = self._start + self._window - self._next
            taken = min(room, left)
            self._write(None if samples is None else samples[done : done + taken], taken)
            done, left = done + taken, left - taken
            if taken < room:
                continue
            # The further windows of a gap lost no less than the one before.
            if samples is None and found and self._spoilt(found[-1]):
                found[-1] = replace(found[-1], more=found[-1].more + 1)
                self._step()
            else:
                found.append(self._cut())
        return found

    def _spoilt(self, window: Window) -> bool:
        return window.more > 0 or float(np.isnan(window.values).mean()) > self._max_lost

    def _write(self, samples: npt.NDArray[np.float32] | None, count: int) -> None:
        place = self._next % self._window
        head = min(count, self._window - place)
        if samples is None:
            self._ring[:, place : place + head] = np.nan
            self._ring[:, : count - head] = np.nan
        else:
            self._ring[:, place : place + head] = samples[:head].T
            self._ring[:, : count - head] = samples[head:].T
        self._next += count

    def _cut(self) -> Window:
        """The window that is complete: the whole ring, from its oldest sample on."""
        place = self._next % self._window
        values = np.concatenate([self._ring[:, place:], self._ring[:, :place]], axis=1)
        window = Window(self._start, values)
        self._step()
        return window

    def _step(self) -> None:
        self.counts.windowed += self._next - self._covered
        self._covered = self._next
        self._start += self._hop
