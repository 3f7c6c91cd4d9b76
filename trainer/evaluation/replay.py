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
        found: defects during which an event began.
        missed: the others.
        false_alarms: events that began without one.
    """

    found: tuple[Span, ...]
    missed: tuple[Span, ...]
    false_alarms: tuple[Span, ...]


def score_replay(defects: Sequence[Span], events: Sequence[Span], *, delay: int = 0) -> ReplayScore:
    """Match events with defects.

    An event belongs to a defect if it begins while the defect is in view, or up to ``delay`` frames later, since a box
    needs some frames before it begins one. An alarm that was already on when the defect came has told nobody of it:
    it is a false alarm, and the defect is missed.

    Args:
        defects: frames on which each defect is in view.
        events: frames from ``new`` to ``end`` of each event.
        delay: frames, >= 0.
    """
    if delay < 0:
        raise ValueError(f"delay {delay} is negative")

    def belongs(event: Span, defect: Span) -> bool:
        return defect.first <= event.first <= defect.last + delay

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
