"""What is kept of an event, what is promised, and what happens when queue or disk are full."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

from edge.alerts.command_messages import EvidenceCommand
from edge.alerts.message import build
from edge.evidence import collector as collecting
from edge.evidence.answers import answer
from edge.evidence.keeper import EvidenceKeeper, EvidenceState
from edge.evidence.pictures import decode_map
from edge.evidence.settings import EvidenceSettings
from edge.evidence.store import EvidenceStore
from edge.frames import Decision, EventPhase
from edge.health.metrics import Metrics
from edge.settings import Mode
from tests.edge.evidence_values import EVENT_ID, SIDE, anomaly_map, bundle, judged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edge.frames import JudgedFrame

SOON = 30.0
EVENT = f"cam/20300102/{EVENT_ID}"


@pytest.fixture
def make_keeper(tmp_path: Path) -> Iterator[Callable[..., EvidenceKeeper]]:
    keepers: list[EvidenceKeeper] = []

    def make(*, start: bool = True, **settings: Any) -> EvidenceKeeper:
        given = EvidenceSettings(**{"min_free_mb": 0, **settings})
        keeper = EvidenceKeeper(given, root=tmp_path / "evidence", metrics=Metrics())
        keepers.append(keeper)
        if start:
            keeper.start()
        return keeper

    yield make
    for keeper in keepers:
        keeper.stop(SOON)


def stream(keeper: EvidenceKeeper, frames: list[JudgedFrame]) -> list[JudgedFrame]:
    return [keeper.keep(frame, bundle(), Mode.STREAM) for frame in frames]


def event(*, good: int = 4, calm: int = 4) -> list[JudgedFrame]:
    """Good frames, the one that begins the event, and what follows."""
    first = judged(good, decision=Decision.NOK, phase=EventPhase.NEW)
    return [*map(judged, range(good)), first, *map(judged, range(good + 1, good + 1 + calm))]


def record(root: Path, reference: str = EVENT) -> dict[str, Any]:
    return json.loads((root / "evidence" / reference / "event.json").read_bytes())


def shown(root: Path, file: str, reference: str = EVENT) -> int:
    """The number of the frame that a picture shows."""
    return round(float(cv2.imread(str(root / "evidence" / reference / file)).mean()))


def test_an_event_is_kept_with_its_neighbours(make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path) -> None:
    keeper = make_keeper(before=2, after=2)
    found = stream(keeper, event())

    assert keeper.stop(SOON)
    assert [one.events[0].evidence for one in found if one.events] == [EVENT]
    files = {path.name for path in (tmp_path / "evidence" / EVENT).iterdir()}
    frames = {"frame.jpg": 4, "before-1.jpg": 3, "before-2.jpg": 2, "after-1.jpg": 5, "after-2.jpg": 6}
    assert files == {*frames, "map.png", "map.json", "overlay.jpg", "event.json"}
    assert {name: shown(tmp_path, name) for name in frames} == frames
    kept = record(tmp_path)
    assert [(one["file"], one["camera_seq"]) for one in kept["frames"]] == [
        ("before-2.jpg", 2), ("before-1.jpg", 3), ("frame.jpg", 4), ("after-1.jpg", 5), ("after-2.jpg", 6),
    ]  # fmt: skip
    assert kept["reference"] == EVENT
    assert (kept["event_id"], kept["part_id"], kept["decision"]) == (EVENT_ID, None, "NOK")
    assert kept["bundle"] == {"id": "ab" * 32, "method": "tiny"}
    assert kept["regions"] == [{"x": 8, "y": 16, "w": 16, "h": 24, "area": 300, "peak": 9.5}]
    assert (kept["memory_version"], kept["frames_left_out"]) == (0, 0)
    assert keeper.status()["written"] == 1


def test_the_map_comes_back_as_it_was(make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path) -> None:
    keeper = make_keeper()
    frames = event()
    stream(keeper, frames)
    # An engine writes its next map where this one was.
    frames[4].prediction.anomaly_map[:] = 0  # type: ignore[union-attr]
    keeper.stop(SOON)

    folder = tmp_path / "evidence" / EVENT
    scale = json.loads((folder / "map.json").read_bytes())
    found = decode_map((folder / "map.png").read_bytes(), scale)
    assert np.abs(found - anomaly_map(4)).max() <= scale["step"]
    assert scale["covers"] == {"x": 0.0, "y": 0.0, "w": float(SIDE), "h": float(SIDE)}
    assert scale["threshold"] == 4.0


def test_an_event_that_ends_is_complete(make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path) -> None:
    keeper = make_keeper(after=16)
    stream(keeper, [*event(calm=1), judged(6, phase=EventPhase.END), judged(7)])
    keeper.stop(SOON)

    assert [one["camera_seq"] for one in record(tmp_path)["frames"]] == [2, 3, 4, 5, 6]


def test_a_camera_that_gives_no_more_frames_costs_only_those(
    make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collecting, "AFTER_LIMIT_S", 0.0)
    keeper = make_keeper(after=16)
    stream(keeper, event(calm=0))
    wait_for(lambda: keeper.status()["written"] == 1)

    assert [one["camera_seq"] for one in record(tmp_path)["frames"]] == [2, 3, 4]


def test_stopping_keeps_what_there_is(make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path) -> None:
    keeper = make_keeper(after=16)
    stream(keeper, event(calm=1))
    keeper.request_stop()

    assert keeper.stop(SOON)
    assert len(record(tmp_path)["frames"]) == 4


@pytest.mark.parametrize(("not_judged", "kept"), [(False, [2]), (True, [1, 2])])
def test_of_parts_those_that_are_not_good_are_kept(
    make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path, *, not_judged: bool, kept: list[int]
) -> None:
    keeper = make_keeper(before=0, after=0, not_judged=not_judged)
    decisions = [Decision.OK, Decision.NOT_JUDGED, Decision.NOK]
    frames = [judged(seq, decision=decision, part_id=f"p{seq}") for seq, decision in enumerate(decisions)]
    found = [keeper.keep(frame, bundle(), Mode.TRIGGERED) for frame in frames]
    keeper.stop(SOON)

    references = {one.verdict.camera_seq: one.verdict.evidence for one in found if one.verdict.evidence}
    assert list(references) == kept
    for seq, reference in references.items():
        part = record(tmp_path, reference)
        assert (part["part_id"], part["camera_seq"], part["event_id"]) == (f"p{seq}", seq, None)
    assert len(list((tmp_path / "evidence" / "cam" / "20300102").iterdir())) == len(kept)


def test_a_part_without_a_frame_has_no_evidence(make_keeper: Callable[..., EvidenceKeeper]) -> None:
    frame = judged(1, decision=Decision.NOT_JUDGED, side=0)
    keeper = make_keeper(not_judged=True)

    assert keeper.keep(frame, bundle(), Mode.TRIGGERED) is frame


@pytest.mark.parametrize("phase", [EventPhase.UPDATE, EventPhase.END])
def test_only_the_beginning_of_an_event_is_kept(make_keeper: Callable[..., EvidenceKeeper], phase: EventPhase) -> None:
    later = judged(3, decision=Decision.NOK, phase=phase)
    assert make_keeper().keep(later, bundle(), Mode.STREAM) is later


def test_hits_outside_an_event_are_not_kept(make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path) -> None:
    keeper = make_keeper()
    frames = [judged(seq, decision=Decision.NOK) for seq in range(5)]

    assert stream(keeper, frames) == frames
    keeper.stop(SOON)
    assert keeper.status()["written"] == 0


def test_a_queue_that_is_full_costs_neighbours_first_then_evidence(
    make_keeper: Callable[..., EvidenceKeeper],
) -> None:
    side = 1500  # 6.4 MiB a frame, of 8 that may wait
    keeper = make_keeper(start=False, waiting_mb=8, before=2, after=1)
    keeper.keep(judged(0, side=side), bundle(), Mode.STREAM)
    first = judged(1, side=side, decision=Decision.NOK, phase=EventPhase.NEW)
    other = judged(0, camera="other", side=side, decision=Decision.NOK, phase=EventPhase.NEW, event_id="ff" * 16)

    assert keeper.keep(first, bundle(), Mode.STREAM).events[0].evidence == EVENT
    # Nothing is promised that will not be written.
    assert keeper.keep(other, bundle(), Mode.STREAM).events[0].evidence is None
    status = keeper.status()
    assert (status["dropped"], status["frames_left_out"]) == (1, 1)
    assert status["waiting_bytes"] == 3 * side * side


def test_so_many_events_at_once_are_dropped_and_counted(make_keeper: Callable[..., EvidenceKeeper]) -> None:
    keeper = make_keeper(start=False, before=0)
    found = [
        keeper.keep(
            judged(0, camera=f"cam{n}", decision=Decision.NOK, phase=EventPhase.NEW), bundle(), Mode.STREAM
        ).events[0].evidence
        for n in range(collecting.MAX_CASES + 3)
    ]  # fmt: skip
    assert found.count(None) == 3 == keeper.status()["dropped"]
    assert None not in found[: collecting.MAX_CASES]


def test_frames_are_let_go(make_keeper: Callable[..., EvidenceKeeper]) -> None:
    keeper = make_keeper(before=1, after=1)
    frames = event()
    watched = [weakref.ref(frame.frame.image) for frame in frames]
    stream(keeper, frames)
    wait_for(lambda: keeper.status()["written"] == 1)
    del frames
    gc.collect()

    # The last frame is held: it would be the one before the next event.
    assert [seq for seq, image in enumerate(watched) if image() is not None] == [8]


def test_a_folder_that_cannot_be_used_is_shown_and_tried_again(
    make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evidence").write_text("in the way")
    keeper = make_keeper(after=0)
    wait_for(lambda: keeper.status()["state"] == "refused")

    assert "make room" in keeper.warnings()[0]
    assert stream(keeper, event())[4].events[0].evidence is None
    assert keeper.status()["dropped"] == 1
    (tmp_path / "evidence").unlink()
    monkeypatch.setattr(keeper, "_retry_at", 0.0)
    assert stream(keeper, event())[4].events[0].evidence == EVENT
    wait_for(lambda: keeper.status()["written"] == 1)
    assert (keeper.status()["state"], keeper.warnings()) == ("keeping", [])


def test_a_disk_that_refuses_costs_evidence_and_comes_back(
    make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = EvidenceStore.write
    full = threading.Event()
    full.set()

    def refuse(store: EvidenceStore, reference: str, files: dict[str, bytes]) -> None:
        if full.is_set():
            raise OSError(28, "No space left on device")
        write(store, reference, files)

    monkeypatch.setattr(EvidenceStore, "write", refuse)
    keeper = make_keeper(after=0)
    assert stream(keeper, event())[4].events[0].evidence == EVENT
    wait_for(lambda: keeper.status()["state"] == EvidenceState.REFUSED.value)

    assert "No space left" in keeper.warnings()[0]
    assert stream(keeper, event())[4].events[0].evidence is None
    assert keeper.status()["dropped"] == 2
    full.clear()
    monkeypatch.setattr(keeper, "_retry_at", 0.0)
    stream(keeper, event())
    wait_for(lambda: keeper.status()["state"] == EvidenceState.KEEPING.value)
    assert keeper.status()["written"] == 1
    assert record(tmp_path)["reference"] == EVENT


def test_a_defect_costs_one_event(make_keeper: Callable[..., EvidenceKeeper], monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = make_keeper(after=0)
    broken = judged(0, camera="broken", decision=Decision.NOK, phase=EventPhase.NEW)
    without_shape = bundle()
    without_shape.manifest.preprocessing.crop = "no crop"  # type: ignore[assignment]
    keeper.keep(broken, without_shape, Mode.STREAM)
    stream(keeper, event())
    keeper.stop(SOON)

    status = keeper.status()
    assert (status["written"], status["dropped"], status["gathering"], status["waiting_bytes"]) == (1, 1, 0, 0)


def test_the_box_counts_what_was_dropped(make_keeper: Callable[..., EvidenceKeeper]) -> None:
    keeper = make_keeper(start=False, before=0, after=0)
    for n in range(collecting.MAX_CASES + 2):
        frame = judged(0, camera=f"cam{n}", decision=Decision.NOK, phase=EventPhase.NEW)
        keeper.keep(frame, bundle(), Mode.STREAM)
    keeper.start()
    keeper.stop(SOON)

    counts = keeper._metrics.counts()
    assert counts["evidence_dropped"] == 2
    assert counts["evidence_written"] == collecting.MAX_CASES


def test_stopping_before_a_start_and_twice_is_fine(make_keeper: Callable[..., EvidenceKeeper]) -> None:
    keeper = make_keeper(start=False)
    assert keeper.stop(1.0)
    assert keeper.stop(1.0)


def test_answers_say_what_there_is(make_keeper: Callable[..., EvidenceKeeper], tmp_path: Path) -> None:
    keeper = make_keeper()
    stream(keeper, event())
    keeper.stop(SOON)
    store = keeper._store

    listed = answer(store, build(EvidenceCommand))
    assert (listed["count"], listed["detail"]["evidence"][0]["reference"]) == (1, EVENT)
    files = answer(store, build(EvidenceCommand, reference=EVENT))
    assert files["detail"]["files"]["map.png"]["size"] == (tmp_path / "evidence" / EVENT / "map.png").stat().st_size
    chunk = answer(store, build(EvidenceCommand, reference=EVENT, file="frame.jpg", offset=100))
    assert chunk["detail"]["offset"] == 100
    assert chunk["count"] == chunk["detail"]["size"] - 100


def test_too_many_questions_are_refused_at_once(make_keeper: Callable[..., EvidenceKeeper]) -> None:
    keeper = make_keeper(start=False)
    answers = [keeper.command(build(EvidenceCommand, id=str(n))) for n in range(40)]
    refused = [one for one in answers if one is not None]
    assert len(refused) == 8
    assert refused[0]["id"] == "32"
    assert not refused[0]["ok"]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does to the disk."""
    reached = threading.Event()
    deadline = threading.Timer(SOON, reached.set)
    deadline.start()
    try:
        while not condition():
            assert not reached.wait(0.01), "waited in vain"
    finally:
        deadline.cancel()
