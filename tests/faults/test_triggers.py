"""Triggers faster than the box can judge, and cameras that lose frames: every part has a verdict, none a wrong OK.

Each has a control run without the guard, which must show a wrong OK.
"""

from __future__ import annotations

import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import edge.inspection.station
from edge.inspection.matching import AfterTrigger, ByOrder
from edge.inspection.parts import NS_PER_MS
from edge.inspection.registers import RING
from tests.faults.belt import Belt, FreeCamera, Line, LineCamera, line
from tests.plc import Plc

if TYPE_CHECKING:
    import pytest

    from edge.inspection.parts import Part, Parts
    from edge.inspection.plan import StationPlan

DEADLINE_MS = 250
BURST = 150
SLOW = 6


class WithoutNext(AfterTrigger):
    """The control: a frame may show a part though a later one was triggered since."""

    def triggered(self, part: Part, now_ns: int) -> list[str]:
        found = list(super().triggered(part, now_ns))
        for one in self._parts:
            one.until_ns = None
        return found


def free(belt: Belt, name: str) -> FreeCamera:
    return FreeCamera(belt, name, 0.004)


def bring(running: Line, part: int) -> None:
    running.belt.bring(part, lambda: running.station.trigger(str(part)))


def overload(running: Line) -> None:
    """A burst of parts, each there for 3 ms only, and then some at a pace that the box can follow."""
    for part in range(BURST):
        bring(running, part)
        time.sleep(0.003)  # the pace of the belt is the fault
    running.verdicts.wait_for(BURST)
    for part in range(BURST, BURST + SLOW):
        bring(running, part)
        running.verdicts.wait_for(part + 1)


def test_triggers_faster_than_the_box_give_each_part_a_verdict_and_none_a_wrong_ok(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with line(monkeypatch, free, think_s=0.02, trigger="mqtt", deadline_ms=DEADLINE_MS) as running:
        overload(running)

    found = running.verdicts.found
    assert [verdict.part_id for verdict in found] == [str(part) for part in range(BURST + SLOW)]
    assert running.wrong_oks() == []
    reasons = Counter(verdict.reason for verdict in found)
    assert reasons["too many parts: 16 are not judged yet"] > 0
    # Not blocked by the burst: a part that comes alone is judged.
    assert {verdict.decision.value for verdict in found[BURST:]} >= {"OK"}
    late_ms = max(verdict.latency_ms["part"] for verdict in found) - DEADLINE_MS
    assert late_ms < 200, "the timer is no deadline"


def test_control_without_the_rule_of_the_next_part_there_are_wrong_oks(monkeypatch: pytest.MonkeyPatch) -> None:
    def unguarded(plan: StationPlan, parts: Parts) -> AfterTrigger:
        assert plan.deadline_ns is not None
        return WithoutNext(parts, fired=plan.fired, deadline_ns=plan.deadline_ns, delay_ns=plan.delay_ns)

    monkeypatch.setattr(edge.inspection.station, "_matcher", unguarded)
    with line(monkeypatch, free, think_s=0.005, trigger="mqtt", deadline_ms=DEADLINE_MS, max_parts=64) as running:
        for part in range(BURST):
            bring(running, part)
            time.sleep(0.003)  # the pace of the belt is the fault
        running.verdicts.wait_for(BURST)

    assert running.wrong_oks()


def test_plc_that_keeps_to_the_handshake_reads_every_verdict_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with line(monkeypatch, free, think_s=0.02, trigger="modbus", deadline_ms=DEADLINE_MS) as running:
        running.inspection.follow(lambda: True)
        plc = Plc(running.inspection.status()["modbus"]["port"])
        plc.wait_until_running()
        read = []
        for part in range(BURST):
            while plc.under_way == RING or plc.has_verdict():
                read.append(plc.verdict())
            running.belt.bring(part, partial(plc.trigger, part))
        while plc.under_way:
            read.append(plc.verdict())
        running.verdicts.wait_for(BURST)

    assert [one["number"] for one in read] == list(range(BURST))
    assert [one["trigger"] for one in read] == list(range(1, BURST + 1))
    assert [one["decision"] for one in read] == [one.decision.value for one in running.verdicts.found]
    assert running.wrong_oks() == []


PARTS = 24
APART_S = 0.08
MATCH_MS = 30
LOST = {5, 6, 13}


def pulse(running: Line) -> None:
    """Both cameras see each part, but one loses some without a trace."""
    for part in range(PARTS):
        for camera in ("a", "b"):
            if not (camera == "b" and part in LOST):
                running.belt.pulses[camera].put(part)
        time.sleep(APART_S)  # the pace of the belt


def test_camera_that_loses_frames_costs_those_parts_only_and_mixes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with line(monkeypatch, LineCamera, think_s=0.005, deadline_ms=DEADLINE_MS, match_ms=MATCH_MS) as running:
        pulse(running)
        running.verdicts.wait_for(PARTS)

    found = running.verdicts.found
    numbers = [verdict.camera_seq for verdict in found]
    assert numbers == list(range(len(found)))
    assert running.wrong_oks() == []
    shown = {part for verdict in found for part in running.detector.seen[verdict.part_id]}
    assert shown == set(range(PARTS))
    # In step again after each loss: a good part behind the last one is OK.
    assert any(
        verdict.decision.value == "OK" and min(running.detector.seen[verdict.part_id]) > max(LOST) for verdict in found
    )


def test_control_matched_by_order_alone_a_lost_frame_makes_wrong_oks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.inspection.station, "_matcher", lambda _, parts: ByOrder(parts))
    with line(monkeypatch, LineCamera, think_s=0.005, deadline_ms=2_000, match_ms=MATCH_MS) as running:
        pulse(running)
        running.verdicts.wait_for(PARTS - len(LOST))

    assert running.wrong_oks()


def test_deadline_is_kept_while_the_engine_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    with line(monkeypatch, free, think_s=1.5, trigger="mqtt", deadline_ms=DEADLINE_MS) as running:
        began = time.monotonic_ns()
        bring(running, 0)
        running.verdicts.wait_for(1)
        took_ms = (time.monotonic_ns() - began) / NS_PER_MS

        assert running.verdicts.found[0].decision.value == "NOT_JUDGED"
        assert took_ms < 1_500, "the verdict waited for the engine"
