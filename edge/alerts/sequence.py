"""Which numbers of a stream of messages have been seen: drops duplicates and finds holes in bounded memory.

Pure: no broker, no clock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(slots=True)
class SequenceSet:
    """A set of numbers as sorted, disjoint, never touching ranges.

    Args:
        limit: ranges that are kept; beyond it the hole between the two lowest is forgotten and its numbers count
            as seen (:attr:`forgotten`), so that memory is bounded whatever arrives.
    """

    limit: int
    forgotten: int = 0
    _starts: list[int] = field(default_factory=list)
    _ends: list[int] = field(default_factory=list)

    def __contains__(self, seq: int) -> bool:
        at = bisect_right(self._starts, seq) - 1
        return at >= 0 and seq <= self._ends[at]

    def add(self, seq: int) -> bool:
        """Add a number; False when it was there."""
        at = bisect_right(self._starts, seq)
        if at > 0 and seq <= self._ends[at - 1]:
            return False
        joins_left = at > 0 and self._ends[at - 1] == seq - 1
        joins_right = at < len(self._starts) and self._starts[at] == seq + 1
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends[at]
            del self._starts[at], self._ends[at]
        elif joins_left:
            self._ends[at - 1] = seq
        elif joins_right:
            self._starts[at] = seq
        else:
            self._starts.insert(at, seq)
            self._ends.insert(at, seq)
            if len(self._starts) > self.limit:
                self.forgotten += self._starts[1] - self._ends[0] - 1
                del self._starts[1], self._ends[0]
        return True

    def add_range(self, first: int, last: int) -> None:
        """Add all numbers ``first`` .. ``last``; the work depends on the ranges, not on how many numbers those are."""
        low = bisect_right(self._ends, first - 2)
        high = bisect_right(self._starts, last + 1)
        if low < high:
            first, last = min(first, self._starts[low]), max(last, self._ends[high - 1])
        self._starts[low:high] = [first]
        self._ends[low:high] = [last]

    def holes(self) -> list[tuple[int, int]]:
        """Ranges (first, last) between the lowest and the highest number that are not in the set."""
        return [(end + 1, start - 1) for end, start in zip(self._ends, self._starts[1:], strict=False)]


class Deduplicator:
    """Drops repeats by (site, box, epoch, seq), and knows what is missing.

    Args:
        holes: holes remembered per stream.
        streams: streams remembered; the one unheard of for longest goes first.
    """

    def __init__(self, *, holes: int = 10_000, streams: int = 10_000) -> None:
        self._holes = holes
        self._streams = streams
        self._seen: OrderedDict[tuple[str, str, str], SequenceSet] = OrderedDict()
        self._dropped: dict[tuple[str, str, str], SequenceSet] = {}

    def is_new(self, site: str, box: str, epoch: str, seq: int) -> bool:
        """Remember a message; False when it has been seen before."""
        stream = (site, box, epoch)
        if stream not in self._seen:
            self._seen[stream] = SequenceSet(self._holes + 1)
            if len(self._seen) > self._streams:
                oldest, _ = self._seen.popitem(last=False)
                self._dropped.pop(oldest, None)
        self._seen.move_to_end(stream)
        return self._seen[stream].add(seq)

    def explain(self, site: str, box: str, epoch: str, first: int, last: int) -> None:
        """A gap message says that numbers ``first`` .. ``last`` may never come: they are not missing any more."""
        stream = (site, box, epoch)
        if stream in self._seen:
            explained = self._dropped.setdefault(stream, SequenceSet(self._holes + 1))
            explained.add_range(first, last)

    def missing(self) -> dict[tuple[str, str, str], list[tuple[int, int]]]:
        """Holes per (site, box, epoch) that no gap message explains; late messages may still fill them."""
        found = {}
        for stream, seen in self._seen.items():
            explained = self._dropped.get(stream)
            holes = seen.holes() if explained is None else _subtract(seen.holes(), explained)
            if holes:
                found[stream] = holes
        return found


def _subtract(holes: list[tuple[int, int]], explained: SequenceSet) -> list[tuple[int, int]]:
    left = []
    for first, last in holes:
        at = first
        for start, end in zip(explained._starts, explained._ends, strict=True):  # noqa: SLF001 (same module)
            if end < at or start > last:
                continue
            if start > at:
                left.append((at, start - 1))
            at = end + 1
        if at <= last:
            left.append((at, last))
    return left
