"""Rounds as a scale-out engine runs them: ask, take, close, tell. It must not know Flower, files or how banks are made.

Whatever counts is decided and stored by the book; this module only keeps messages going until the book is content.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

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
    """A message to a box came to nothing; it is tried again in the next round.

    Attributes:
        box: its name.
        reason: for people.
        told: whether it was the message with the bank; else the question for an update.
    """

    box: str
    reason: str
    told: bool = False


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

    def begin(self) -> Invitation:
        """The rounds that are open now, which the boxes are asked for."""

    def take(self, box: str, update: bytes) -> Outcome:
        """Check and store an update; when this returns, what it says is on disk. The same update may come twice."""

    def tick(self) -> bool:
        """Close what is due; True once every round that the last :meth:`begin` saw has ended."""

    def bank_for(self, box: str) -> bytes | None:
        """The newest bank of the pool that this box belongs to; None where there is none, or the box is unknown."""


@dataclass(slots=True)
class RoundReport:
    """What one round was.

    Attributes:
        rounds: its number, by pool.
        asked: boxes that were asked.
        outcomes: by box, of the updates that arrived while it ran, late ones of earlier rounds too.
        kept: by box, the version of the bank that it has stored.
        unreached: boxes that were sent the bank and have not said that they stored it; they get the newest next time.
    """

    rounds: Mapping[str, int]
    asked: set[str] = field(default_factory=set)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    unreached: set[str] = field(default_factory=set)


class Conductor:
    """Runs rounds one after the other.

    Args:
        fleet: messages.
        book: the durable side.
        wait: called between two looks at the fleet; returns after a while.
        clock: monotonic, in seconds.
        tell_s: how long to wait, once a round's bank is sent, for boxes to say that they have it.
    """

    def __init__(
        self, fleet: Fleet, book: Book, *, wait: Callable[[], None], clock: Callable[[], float], tell_s: float
    ) -> None:
        self._fleet = fleet
        self._book = book
        self._wait = wait
        self._clock = clock
        self._tell_s = tell_s
        self._untold: dict[str, Outcome] = {}

    def run(self) -> RoundReport:
        """Bring the open rounds to their end and their banks to the boxes.

        A box that comes online while they are open is asked too. Rounds that a killed process left open go on with
        what is stored: boxes are asked again, and the book knows what it has.
        """
        invitation = self._book.begin()
        report = RoundReport(invitation.rounds)
        while not self._book.tick():
            for box in sorted(set(self._fleet.online()) - report.asked):
                report.asked.add(box)
                self._fleet.ask(box, invitation)
            if not self._take(report):
                self._wait()
        self._tell(report)
        return report

    def _tell(self, report: RoundReport) -> None:
        waiting = set()
        for box in sorted(self._fleet.online()):
            outcome, bank = self._untold.pop(box, None), self._book.bank_for(box)
            if outcome is not None or bank is not None:
                waiting.add(box)
                self._fleet.tell(box, outcome, bank)
        deadline = self._clock() + self._tell_s
        while (left := waiting - set(report.kept) - report.unreached) and self._clock() < deadline:
            if not self._take(report):
                self._wait()
        for box in sorted(left):
            report.unreached.add(box)
            LOG.warning("%s has not said that it stored the bank", box)

    def _take(self, report: RoundReport) -> bool:
        """Take what has arrived; says whether anything had."""
        events = self._fleet.poll()
        for event in events:
            if isinstance(event, Kept):
                report.kept[event.box] = event.version
            elif isinstance(event, Failed):
                if event.told:
                    report.unreached.add(event.box)
                LOG.warning("%s: %s", event.box, event.reason)
            elif event.update is None:
                LOG.info("%s has no update to share", event.box)
            else:
                outcome = self._book.take(event.box, event.update)
                report.outcomes[event.box] = self._untold[event.box] = outcome
                if outcome.refused is not None:
                    LOG.warning("%s refused (%s): %s", event.box, outcome.refused.value, outcome.reason)
        return bool(events)
