"""A camera names the evidence of an event in all its phases, and of no other event."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from edge.settings import Mode
from tests.edge.test_camera import CALM, HOT, Brightness, finish, folder_of, work

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle
    from edge.frames import JudgedFrame


class Keeper:
    """Promises evidence of the first thing that it is shown, and of nothing after it."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Mode]] = []
        self.bundles: set[str] = set()
        self.promised = False

    def keep(self, judged: JudgedFrame, bundle: Bundle, mode: Mode) -> JudgedFrame:
        self.asked.append((judged.frame.camera_seq, mode))
        self.bundles.add(bundle.id)
        if self.promised:
            return judged
        if mode is Mode.TRIGGERED:
            self.promised = True
            return dataclasses.replace(judged, verdict=dataclasses.replace(judged.verdict, evidence="first"))
        self.promised = bool(judged.events)
        events = tuple(dataclasses.replace(event, evidence="first") for event in judged.events)
        return dataclasses.replace(judged, events=events)


def test_every_phase_of_an_event_names_its_evidence_and_no_other(tmp_path: Path) -> None:
    events = {"enter_hits": 1, "enter_window": 1, "leave_calm": 1}
    values = [CALM, HOT, HOT, CALM, HOT, HOT]
    keeper, seen = Keeper(), list[str | None]()
    worker, recorder, _ = work(
        folder_of(tmp_path / "in", values),
        mode="stream",
        events=events,
        observers=[lambda judged: seen.extend(event.evidence for event in judged.events)],
    )
    worker._keep_evidence = keeper.keep

    finish(worker)

    # The second event is ended by its source, not by a frame.
    assert [(one.phase.value, one.evidence) for one in recorder.events] == [
        ("new", "first"), ("end", "first"), ("new", None), ("end", None),
    ]  # fmt: skip
    assert seen[0] == "first"
    assert keeper.asked == [(seq, Mode.STREAM) for seq in range(6)]
    assert keeper.bundles == {Brightness.bundle.id}


def test_an_event_that_its_source_ends_names_its_evidence(tmp_path: Path) -> None:
    events = {"enter_hits": 1, "enter_window": 1}
    worker, recorder, _ = work(folder_of(tmp_path / "in", [CALM, HOT, HOT]), mode="stream", events=events)
    worker._keep_evidence = Keeper().keep

    finish(worker)

    assert [(one.phase.value, one.evidence) for one in recorder.events] == [("new", "first"), ("end", "first")]


def test_a_parts_verdict_names_its_evidence(tmp_path: Path) -> None:
    worker, recorder, _ = work(folder_of(tmp_path / "in", [HOT, HOT]))
    worker._keep_evidence = Keeper().keep

    finish(worker)

    assert {one.camera_seq: one.evidence for one in recorder.verdicts} == {0: "first", 1: None}
