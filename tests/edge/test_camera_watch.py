"""Camera health beside the judging: looks are few and irregular, nothing waits or raises, and changes are told."""

from __future__ import annotations

import threading
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import edge.health.camera_watch as watching
from edge.alerts.message import NoticeKind, Severity
from edge.frames import Decision, Frame, JudgedFrame, Verdict
from edge.health.camera_health import CameraHealth, Change
from edge.health.camera_watch import CameraWatch, CameraWatches
from edge.health.settings import CameraFault
from edge.settings import CameraSettings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MS = 1_000_000
SOON = 20
BRIGHT = np.random.default_rng(0).integers(60, 200, (96, 128, 3), np.uint8)


def camera(**changes: Any) -> CameraSettings:
    health = changes.pop("health", {})
    content = {"name": "cam", "source": {"kind": "folder", "path": "."}, "health": health, **changes}
    return CameraSettings.model_validate(content)


def frame(at_ms: int, image: np.ndarray = BRIGHT) -> Frame:
    return Frame(image, "cam", 0, at_ms * MS, datetime(2026, 1, 1, tzinfo=timezone.utc))


def judged(at_ms: int, image: np.ndarray = BRIGHT, decision: Decision = Decision.OK) -> JudgedFrame:
    one = frame(at_ms, image)
    verdict = Verdict(decision, 0.0, 1.0, 1.0, "cam", 0, one.captured_ns, one.captured_at)
    return JudgedFrame(one, None, verdict, alarmed=decision is Decision.NOK)


class Taken:
    """Stands for the thread that looks."""

    def __init__(self) -> None:
        self.looks: list[tuple[int, bool]] = []
        self.told: list[Change] = []

    def hand_over(self, _watch: CameraWatch, _sample: Any, captured_ns: int, good: bool) -> bool:  # noqa: FBT001
        self.looks.append((captured_ns // MS, good))
        return True

    def tell(self, _watch: CameraWatch, changes: list[Change]) -> None:
        self.told += changes

    def watch(self, settings: CameraSettings) -> CameraWatch:
        return CameraWatch(settings, baseline=None, hand_over=self.hand_over, tell=self.tell, seed=1)


def test_few_frames_are_looked_at_and_at_irregular_moments() -> None:
    taken = Taken()
    watch = taken.watch(camera(health={"looks_per_second": 2}))
    for at_ms in range(0, 60_000, 20):
        watch.observe(judged(at_ms))

    gaps = np.diff([at for at, _ in taken.looks])

    assert 100 <= len(taken.looks) <= 145
    assert gaps.min() >= 250
    assert gaps.max() <= 770
    assert gaps.std() > 80


def test_only_frames_found_good_may_teach() -> None:
    taken = Taken()
    watch = taken.watch(camera())
    for index, decision in enumerate((Decision.OK, Decision.NOK, Decision.NOT_JUDGED)):
        watch.observe(judged(index * 10_000, decision=decision))

    assert [good for _, good in taken.looks] == [True, False, False]


def test_frame_that_cannot_be_looked_at_stops_nobody() -> None:
    taken = Taken()
    watch = taken.watch(camera())

    watch.observe(judged(0, np.zeros((5, 5), np.uint8)))
    watch.observe(judged(10_000, np.empty((0, 0, 3), np.uint8)))

    assert taken.looks == []
    assert watch.status()["failed"] == 1


def test_part_that_cannot_be_looked_at_is_not_judged() -> None:
    watch = Taken().watch(camera(mode="triggered", health={"not_judged_when": ["dark"]}))

    assert watch.veto(frame(0), Decision.OK) == ""
    assert "could not be looked at" in watch.veto(frame(1, np.zeros((5, 5), np.uint8)), Decision.OK)


def test_veto_is_for_named_faults_only() -> None:
    dark = np.zeros_like(BRIGHT)
    taken = Taken()
    vetoes = taken.watch(camera(mode="triggered", health={"not_judged_when": ["dark"], "enter_s": 0}))
    watches = taken.watch(camera(mode="triggered", health={"not_judged_when": ["frozen"], "enter_s": 0}))
    silent = taken.watch(camera(mode="triggered", health={"enter_s": 0}))

    assert vetoes.veto(frame(0, dark), Decision.OK) == "camera dark"
    assert watches.veto(frame(0, dark), Decision.OK) == ""
    assert silent.veto(frame(0, dark), Decision.OK) == ""
    assert [change.fault for change in taken.told] == [CameraFault.DARK, CameraFault.DARK]
    assert vetoes.warnings() == watches.warnings() == ["camera dark"]


def test_rate_is_that_of_frames_delivered_while_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(watching.time, "monotonic", lambda: now)
    watch = Taken().watch(camera(health={"frame_rate": 20, "slow_s": 10}))
    told: list[tuple[float, bool]] = []
    captured = 0.0
    for second in range(90):
        now = float(second)
        state = "reconnecting" if 30 <= second < 45 else "streaming"
        captured += {"reconnecting": 0}.get(state, 9 if second >= 60 else 20)
        told += [(now, change.lasting) for change in watch.look_at_rate(state, int(captured), 1.0)]

    # Away is another state; half the rate is told of after ten seconds, by windows of five.
    ((when, lasting),) = told
    assert lasting
    assert 68 <= when <= 76
    assert watch.status()["measured"]["frame_rate"] == pytest.approx(9, abs=1)


def test_rate_of_parts_is_nobodys_business() -> None:
    watch = Taken().watch(camera(mode="triggered", frame_rate=20))

    assert watch._asked is None
    assert Taken().watch(camera(frame_rate=20))._asked == 20
    assert Taken().watch(camera())._asked is None


@pytest.fixture
def watches(tmp_path: Path) -> Iterator[tuple[CameraWatches, list[Any], threading.Condition]]:
    notices: list[Any] = []
    heard = threading.Condition()

    def notify(kind: NoticeKind, severity: Severity, text: str, **detail: Any) -> None:
        with heard:
            notices.append((kind, severity, text, detail))
            heard.notify_all()

    made = CameraWatches(tmp_path / "health", cameras=(), notify=notify)
    made.start()
    yield made, notices, heard
    assert made.stop(SOON)


def wait(notices: list[Any], heard: threading.Condition, count: int) -> None:
    with heard:
        assert heard.wait_for(lambda: len(notices) >= count, SOON), notices


def test_changes_are_told_as_notices(watches: tuple[CameraWatches, list[Any], threading.Condition]) -> None:
    made, notices, heard = watches
    watch = made.watch(camera(health={"enter_s": 0, "leave_s": 0}))
    assert watch is not None
    dark = np.zeros_like(BRIGHT)

    watch.observe(judged(0, dark))
    wait(notices, heard, 1)
    watch.observe(judged(10_000))
    wait(notices, heard, 2)

    (kind, severity, text, detail), (_, end_severity, end_text, end_detail) = notices
    assert (kind, severity) == (NoticeKind.CAMERA_DARK, Severity.WARNING)
    assert text.startswith("camera cam: dark: the mean luma is 0")
    assert (detail["camera"], detail["lasting"]) == ("cam", True)
    assert (end_severity, end_detail["lasting"]) == (Severity.INFO, False)
    assert end_text.startswith("camera cam: no longer dark")


def test_look_that_fails_ends_nothing(
    watches: tuple[CameraWatches, list[Any], threading.Condition], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, notices, heard = watches
    watch = made.watch(camera(health={"enter_s": 0, "leave_s": 0}))
    assert watch is not None
    honest = CameraHealth.take
    monkeypatch.setattr(CameraHealth, "take", lambda *_, **__: 1 / 0)
    watch.observe(judged(0))
    deadline = time.monotonic() + SOON
    while made.status() != {"failed": 1}:
        assert time.monotonic() < deadline
        time.sleep(0.005)  # a counter: it tells nobody
    monkeypatch.setattr(CameraHealth, "take", honest)

    watch.observe(judged(10_000, np.zeros_like(BRIGHT)))
    wait(notices, heard, 1)

    assert made.status() == {"failed": 1}


def test_thread_that_is_behind_skips_looks(tmp_path: Path) -> None:
    made = CameraWatches(tmp_path, cameras=(), notify=lambda *_, **__: None)
    watch = made.watch(camera())
    assert watch is not None
    for index in range(5):
        watch.observe(judged(index * 10_000))

    assert watch.status()["skipped"] == 4
    assert made.watch(camera(health=None)) is None
