"""How well a replay went: anomaly events as a subscriber received them, against defects at known frames.

Pure: it knows frame numbers, not images, boxes or brokers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Span:
    """Frames ``first`` to ``last``, both included, 0 <= first <= last; ``label`` says what is there."""

    first: int
    last: int
    label: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            raise ValueError(f"frames {self.first} to {self.last} are no span")


@dataclass(frozen=True, slots=True)
class ReplayScore:
    """What became of every defect and every event.

    Attributes:
        found: defects during which an event began or lasted.
        missed: the others.
        false_alarms: events that overlap no defect.
    """

    found: tuple[Span, ...]
    missed: tuple[Span, ...]
    false_alarms: tuple[Span, ...]


def score_replay(
    defects: Sequence[Span], events: Sequence[Span], *, delay: int = 0, lasting: bool = True
) -> ReplayScore:
    """Match events with defects.

    A box needs some frames before it begins an event, so one that begins up to ``delay`` frames after a defect has
    left still belongs to it.

    Args:
        defects: frames on which each defect is in view.
        events: frames from ``new`` to ``end`` of each event.
        delay: frames, >= 0.
        lasting: whether an event that began earlier and lasts into a defect belongs to it as well. Not where each
            frame is another part: there an event that begins on a good part is a false alarm, whatever follows.
    """
    if delay < 0:
        raise ValueError(f"delay {delay} is negative")

    def belongs(event: Span, defect: Span) -> bool:
        reaches = event.last if lasting else event.first
        return event.first <= defect.last + delay and reaches >= defect.first

    found = tuple(defect for defect in defects if any(belongs(event, defect) for event in events))
    return ReplayScore(
        found=found,
        missed=tuple(defect for defect in defects if defect not in found),
        false_alarms=tuple(event for event in events if not any(belongs(event, defect) for defect in defects)),
    )


def runs(flags: Sequence[str]) -> tuple[Span, ...]:
    """Return the spans of equal, non-empty labels in a sequence with one label per frame."""
    spans: list[Span] = []
    for frame, label in enumerate(flags):
        if not label:
            continue
        if spans and spans[-1].last == frame - 1 and spans[-1].label == label:
            spans[-1] = Span(spans[-1].first, frame, label)
        else:
            spans.append(Span(frame, frame, label))
    return tuple(spans)
