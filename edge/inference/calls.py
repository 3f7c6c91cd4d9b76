"""Calls into engines that have not come back, with the monotonic time of their start. Knows no engine and no cure."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Call:
    """One call.

    Attributes:
        what: file of the graph, for people.
        started_ns: monotonic nanoseconds.
        first: whether the graph has not given a result yet: engines build kernels, some for minutes, in that call.
        done: whether the engine has ended although nobody has fetched the result; None where it cannot be asked.
    """

    what: str
    started_ns: int
    first: bool
    done: Callable[[], bool] | None = None


class Calls:
    """The calls in progress of a process. Safe to use from several threads.

    Args:
        clock_ns: monotonic nanoseconds.
    """

    def __init__(self, *, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock_ns = clock_ns
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._calls: dict[int, Call] = {}

    def begin(self, what: str, *, first: bool, done: Callable[[], bool] | None = None) -> int:
        """Enter a call; returns its number."""
        call = Call(what, self._clock_ns(), first, done)
        with self._lock:
            number = next(self._numbers)
            self._calls[number] = call
        return number

    def end(self, number: int) -> None:
        """Take out a call that has come back."""
        with self._lock:
            self._calls.pop(number, None)

    @contextmanager
    def during(self, what: str, *, first: bool) -> Iterator[None]:
        """Enter a call for as long as the block lasts."""
        number = self.begin(what, first=first)
        try:
            yield
        finally:
            self.end(number)

    def stalled(self, *, limit_s: float, first_limit_s: float) -> tuple[Call, float] | None:
        """Find the call that is in the engine for too long.

        Args:
            limit_s: seconds that a call may take.
            first_limit_s: seconds that the first call of a graph may take.

        Returns:
            The oldest call over its limit and its age in seconds; None where there is none.
        """
        with self._lock:
            calls = sorted(self._calls.values(), key=lambda call: call.started_ns)
        now = self._clock_ns()
        for call in calls:
            age = (now - call.started_ns) / NS_PER_S
            over = age > (first_limit_s if call.first else limit_s)
            # What has ended and waits to be fetched is late by the box's fault, not by the engine's.
            if over and not (call.done is not None and call.done()):
                return call, age
        return None

    def oldest_s(self) -> float:
        """Age in seconds of the oldest call; 0 where none is in progress."""
        with self._lock:
            started = min((call.started_ns for call in self._calls.values()), default=None)
        return 0.0 if started is None else (self._clock_ns() - started) / NS_PER_S


IN_PROGRESS = Calls()
"""Of this process: whichever graph hangs, the process is what a supervisor can start again."""
