"""A station on a bench: a clock that is set by hand, triggers, frames and views by call, verdicts in a list."""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from edge.frames import Decision, Verdict
from edge.inspection.parts import Part, PartVerdict, Reason
from edge.inspection.plan import StationPlan
from edge.inspection.settings import TriggerSource
from edge.inspection.station import Shots, Station

if TYPE_CHECKING:
    from collections.abc import Callable

MS = 1_000_000
UTC = timezone.utc
EPOCH = datetime(2030, 1, 1, tzinfo=UTC)


class Timer:
    """Stands for the thread of deadlines: keeps what was set."""

    def __init__(self) -> None:
        self.due: dict[Station, int] = {}

    def set(self, station: Station, due_ns: int | None) -> None:
        if due_ns is None:
            self.due.pop(station, None)
        else:
            self.due[station] = due_ns


class AtOnce(Shots):
    """Fires in the thread that triggers."""

    def put(self, shot: Callable[[], None]) -> None:
        shot()


def plan(
    cameras: tuple[str, ...] = ("a",), *, trigger: str = "frame", deadline_ms: float | None = 100, **changes: Any
) -> StationPlan:
    """A station's plan: live cameras, any NOK view makes NOK, room for four parts."""
    values: dict[str, Any] = {
        "name": "station", "own": False, "cameras": cameras, "disabled": frozenset(), "trigger": TriggerSource(trigger),
        "nok_views": 1, "deadline_ns": None if deadline_ms is None else round(deadline_ms * MS), "match_ns": 10 * MS,
        "delay_ns": 0, "capacity": 4, "live": True, "fired": frozenset(), "free": frozenset(),
        "named_by_file": frozenset(),
    }  # fmt: skip
    return StationPlan(**values | changes)


class Bench:
    """One station and everything around it."""

    def __init__(self, what: StationPlan, *, fire: Callable[[str], None] | None = None) -> None:
        self.now = 0
        self.timer = Timer()
        self.verdicts: list[PartVerdict] = []
        self.counts: dict[str, int] = {}
        self.station = Station(
            what,
            deadlines=self.timer,  # type: ignore[arg-type]  # only set() is called
            sink=lambda _, verdict: self.verdicts.append(verdict),
            count=lambda name: self.counts.update({name: self.counts.get(name, 0) + 1}),
            new_shots=AtOnce,
            clock=lambda: self.now,
        )
        self.posts = {
            camera: self.station.attach(camera, fire=lambda camera=camera: fire(camera) if fire else None)
            for camera in what.cameras
            if camera not in what.disabled
        }
        self._seq = 0

    @property
    def decisions(self) -> list[str]:
        return [verdict.decision.value for verdict in self.verdicts]

    def at(self, ms: float, *, tick: bool = True) -> Bench:
        """Set the clock, with the timer's help or without it."""
        self.now = max(self.now, round(ms * MS))
        if tick:
            self.station.tick()
        return self

    def frame(self, camera: str, *, name: str = "", at_ns: int | None = None) -> int | None:
        """Capture a frame now; its number where a part waits for it."""
        self._seq += 1
        at = self.now if at_ns is None else at_ns
        wanted = self.posts[camera].frame(self._seq, at_ns=at, at=EPOCH, name=name)
        return self._seq if wanted else None

    def part(self, camera: str, seq: int) -> Part:
        found = self.posts[camera].part(seq)
        assert found is not None
        return found

    def tell(self, camera: str, seq: int | None, decision: str = "OK", code: Reason = Reason.FAILED) -> bool:
        """Judge a frame; whether that counts."""
        assert seq is not None
        verdict = view_verdict(camera, seq, Decision(decision))
        return self.posts[camera].tell(seq, verdict, Reason.NONE if decision != "NOT_JUDGED" else code, 50)


def view_verdict(camera: str, seq: int, decision: Decision) -> Verdict:
    """What a camera's judge says."""
    judged = decision is not Decision.NOT_JUDGED
    found = Verdict(
        decision=decision, score=float(seq) if judged else math.nan, threshold=10.0,
        p_value=0.5 if judged else math.nan, camera=camera, camera_seq=seq, captured_ns=0, captured_at=EPOCH,
        reason="" if judged else "no answer",
    )  # fmt: skip
    return dataclasses.replace(found, p_value=0.01) if decision is Decision.NOK else found
