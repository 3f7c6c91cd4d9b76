"""Rounds as a scale-out engine runs them: ask, take, close, tell. It must not know Flower, files or how banks are made.

Whatever counts is decided and stored by the book; this module keeps messages going, one at a time for each box.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from deploy.flower.exchange import Invitation, Outcome

LOG = logging.getLogger("lineward.flower")


@dataclass(frozen=True, slots=True)
class Answered:
    """A box gave its update, or none.

    Attributes:
        box: name of the box, bound to its key.
        update: bytes, unchecked; None for none.
    """

    box: str
    update: bytes | None


@dataclass(frozen=True, slots=True)
class Kept:
    """A box has stored the bank of this version; 0 for none."""

    box: str
    version: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A message to a box came to nothing, for a reason in words; it is tried again."""

    box: str
    reason: str


class Fleet(Protocol):
    """Messages to and from the boxes that are online."""

    def online(self) -> Iterable[str]:
        """Names of the boxes that can be asked now."""

    def ask(self, box: str, invitation: Invitation) -> None:
        """Ask one box for its update; the answer comes by :meth:`poll`."""

    def tell(self, box: str, outcome: Outcome | None, bank: bytes | None) -> None:
        """Tell one box what became of its update and give it the newest bank, where there is one."""

    def poll(self) -> Sequence[Answered | Kept | Failed]:
        """What has arrived since the last call, without waiting."""


class Book(Protocol):
    """Rounds that survive the end of this process."""

    def invitation(self) -> Invitation:
        """The rounds that are open now."""

    def take(self, box: str, update: bytes) -> Outcome:
        """Check and store an update; when this returns, what it says is on disk. The same update may come twice."""

    def tick(self) -> int:
        """Close what is due; says how many rounds have ended, or had to be extended, since the last call."""

    def newest(self, box: str) -> int:
        """Version of the newest bank of the pool that a box has sent updates for; 0 for none."""

    def bank(self, box: str) -> bytes | None:
        """That bank."""


@dataclass(slots=True)
class RunReport:
    """What a run came to.

    Attributes:
        ended: rounds that ended or were extended, of all pools.
        outcomes: by box, of the last update that it gave.
        kept: by box, the version of the bank that it has said to have stored.
    """

    ended: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Box:
    """A box as this run knows it; times are the clock's."""

    asked_at: float = -math.inf
    told_at: float = -math.inf
    told_version: int = 0
    untold: Outcome | None = None
    waits: bool = False  # a message to it is under way


class Conductor:
    """Runs rounds: asks every box that is online, takes what it gives, tells it what came of it.

    Args:
        fleet: messages.
        book: the durable side.
        wait: called between two looks at the fleet; returns after a while.
        clock: monotonic, in seconds.
        ask_s: how long after its last message a box is asked again, or told again what it did not confirm.
        tell_s: how long to wait, once all rounds have ended, for boxes to say that they have the bank.
    """

    def __init__(
        self,
        fleet: Fleet,
        book: Book,
        *,
        wait: Callable[[], None],
        clock: Callable[[], float],
        ask_s: float,
        tell_s: float,
    ) -> None:
        self._fleet = fleet
        self._book = book
        self._wait = wait
        self._clock = clock
        self._ask_s = ask_s
        self._tell_s = tell_s
        self._boxes: dict[str, _Box] = {}

    def run(self, rounds: int) -> RunReport:
        """Go on until so many rounds have ended, and the boxes that are online have what came of them.

        Rounds that a killed process left open go on with what is stored: boxes are asked again, and the book knows
        what it has.
        """
        report = RunReport()
        while report.ended < rounds:
            self._tell(everything=False)
            self._ask()
            idle = not self._take(report)
            report.ended += self._book.tick()
            if idle and report.ended < rounds:
                self._wait()
        deadline = self._clock() + self._tell_s
        while self._clock() < deadline:
            # First what is under way: a box has one message at a time.
            self._tell(everything=True)
            if not any(box.waits for box in self._boxes.values()):
                break
            if not self._take(report):
                self._wait()
        for name, box in sorted(self._boxes.items()):
            if box.untold is not None or report.kept.get(name, 0) < self._book.newest(name):
                LOG.warning("%s has not said that it stored the newest bank; it gets it in the next run", name)
        return report

    def _online(self) -> list[tuple[str, _Box]]:
        return [(name, self._boxes.setdefault(name, _Box())) for name in sorted(self._fleet.online())]

    def _ask(self) -> None:
        now = self._clock()
        for name, box in self._online():
            if not box.waits and now - box.asked_at >= self._ask_s:
                box.asked_at, box.waits = now, True
                self._fleet.ask(name, self._book.invitation())

    def _tell(self, *, everything: bool) -> None:
        """Send each box its bank and its refusal; that an update was taken is told with the bank, or at the end.

        Each message costs a box the start of a process.
        """
        now = self._clock()
        for name, box in self._online():
            newest = self._book.newest(name)
            bank = self._book.bank(name) if newest > box.told_version else None
            urgent = bank is not None or (box.untold is not None and (everything or box.untold.refused is not None))
            if urgent and not box.waits and now - box.told_at >= self._ask_s:
                box.told_at, box.waits = now, True
                self._fleet.tell(name, box.untold, bank)

    def _take(self, report: RunReport) -> bool:
        """Take what has arrived; says whether anything had."""
        events = self._fleet.poll()
        for event in events:
            box = self._boxes.setdefault(event.box, _Box())
            box.waits = False
            if isinstance(event, Failed):
                LOG.warning("%s: %s", event.box, event.reason)
            elif isinstance(event, Kept):
                box.untold, box.told_at = None, -math.inf
                box.told_version = report.kept[event.box] = max(event.version, box.told_version)
            elif event.update is None:
                LOG.info("%s has no update to share", event.box)
            else:
                outcome = self._book.take(event.box, event.update)
                report.outcomes[event.box] = box.untold = outcome
                if outcome.refused is not None:
                    LOG.warning("%s refused (%s): %s", event.box, outcome.refused.value, outcome.reason)
        return bool(events)
