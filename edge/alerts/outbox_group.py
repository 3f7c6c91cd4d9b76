"""Group commit: calls that come while one is being committed are committed together, by one of their threads.

Knows nothing of what is committed. A call that comes alone is done at once, in its own thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_W = TypeVar("_W")
_R = TypeVar("_R")


class Call(Generic[_W, _R]):
    """One thread's work in a group; whoever commits it sets ``result`` or ``error``."""

    __slots__ = ("error", "result", "turn", "work")

    def __init__(self, work: Sequence[_W]) -> None:
        self.work = work
        self.result: _R | None = None
        self.error: Exception | None = None
        # Held until the call is done, or is the one to lead the next group. A bare lock is the cheapest to wait for.
        self.turn = threading.Lock()
        self.turn.acquire()

    @property
    def done(self) -> bool:
        """Whether it was committed, or refused."""
        return self.result is not None or self.error is not None


class GroupCommit(Generic[_W, _R]):
    """Gathers calls of several threads into commits, in the order in which they came.

    Args:
        commit: gives each call of a group its result or its error; called by one thread at a time.
        lock: held while a group is gathered and committed, so that a thread which waits for it leads a larger group.
        limit: pieces of work in one commit; a single call may have more.
    """

    def __init__(
        self,
        commit: Callable[[list[Call[_W, _R]]], None],
        *,
        lock: threading.RLock,
        limit: int = 256,
    ) -> None:
        self._commit = commit
        self._lock = lock
        self._limit = limit
        self._mutex = threading.Lock()
        self._waiting: deque[Call[_W, _R]] = deque()
        # Who leads, or is woken to do so; None when nobody is at work.
        self._leader: Call[_W, _R] | None = None

    def submit(self, work: Sequence[_W]) -> _R:
        """Do a piece of work, with that of other threads where some wait; returns when it is committed.

        Raises:
            Exception: whatever ``commit`` has set as the error of this call.
        """
        call: Call[_W, _R] = Call(work)
        with self._mutex:
            self._waiting.append(call)
            if self._leader is None:
                self._leader = call
        if self._leader is not call:
            self._await_turn(call)
        if not call.done:
            self._lead(call)
        if call.error is not None:
            raise call.error
        assert call.result is not None
        return call.result

    def _await_turn(self, call: Call[_W, _R]) -> None:
        try:
            call.turn.acquire()
        except BaseException:
            # A signal's exception: nobody waits here any more, so the call must neither lead nor be left in the queue.
            with self._mutex:
                with contextlib.suppress(ValueError):
                    self._waiting.remove(call)
                if self._leader is call:
                    self._hand_over()
            raise

    def _lead(self, call: Call[_W, _R]) -> None:
        group: list[Call[_W, _R]] = []
        try:
            with self._lock:
                with self._mutex:
                    group = self._gather()
                self._commit(group)
        finally:
            with self._mutex:
                # An interrupt of this thread is no reason to refuse the others: the next leader takes them.
                self._waiting.extendleft(other for other in reversed(group) if other is not call and not other.done)
                with contextlib.suppress(ValueError):
                    self._waiting.remove(call)
                self._hand_over()
            for other in group:
                if other is not call and other.done:
                    other.turn.release()

    def _gather(self) -> list[Call[_W, _R]]:
        group = [self._waiting.popleft()]
        size = len(group[0].work)
        while self._waiting and size + len(self._waiting[0].work) <= self._limit:
            group.append(self._waiting.popleft())
            size += len(group[-1].work)
        return group

    def _hand_over(self) -> None:
        self._leader = self._waiting[0] if self._waiting else None
        if self._leader is not None:
            self._leader.turn.release()
