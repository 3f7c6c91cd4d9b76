"""One camera's worker: every frame judged or counted, failures isolated, never a wrong OK."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import cv2
import numpy as np
import pytest

import edge.camera
from edge.bundle import CalibrationScores, Pooling
from edge.camera import CameraWorker
from edge.capture.capture import CameraState, Counters
from edge.errors import CaptureError, EngineError
from edge.frames import AnomalyEvent, Frame, Prediction, Verdict
from edge.health.metrics import Metrics
from edge.health.watchdog import Watchdog
from edge.judgement.verdicts import Judge
from edge.settings import CameraSettings
from tests.edge.inspection_values import box_settings, inspect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from edge.inspection.inspection import Inspection

HOT, CALM = 255, 0
SOON = 20
_BEGUN: list[Inspection] = []


@pytest.fixture(autouse=True)
def _end_inspections() -> Iterator[None]:
    yield
    while _BEGUN:
        assert _BEGUN.pop().stop(SOON)


class Recorder:
    """Stands for the reporter: keeps what it is given."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.events: list[AnomalyEvent] = []
        self.states: list[tuple[str, str]] = []
        self.seen = threading.Condition()

    def verdict(self, verdict: Verdict, **_: Any) -> None:
        with self.seen:
            self.verdicts.append(verdict)
            self.seen.notify_all()

    def event(self, event: AnomalyEvent, **_: Any) -> None:
        with self.seen:
            self.events.append(event)
            self.seen.notify_all()

    def state(self, _camera: str, state: str, *, reason: str = "", **_: Any) -> None:
        if not self.states or self.states[-1] != (state, reason):
            self.states.append((state, reason))


class Brightness:
    """A detector whose map is the image's own brightness; ``fail_on`` names values that break it."""

    bundle = SimpleNamespace(id="0" * 64, manifest=SimpleNamespace(product="grey", method="brightness", signal=None))

    def __init__(self, fail_on: int | None = None, nan_on: int | None = None) -> None:
        self.fail_on = fail_on
        self.nan_on = nan_on
        self.gate = threading.Event()
        self.gate.set()

    def begin(self, frame: Frame) -> SimpleNamespace:
        return SimpleNamespace(frame=frame, result=lambda: self.predict(frame))

    def predict(self, frame: Frame) -> Prediction:
        assert self.gate.wait(SOON)
        value = int(frame.image[0, 0, 0])
        if value == self.fail_on:
            raise EngineError("the engine gave up")
        score = math.nan if value == self.nan_on else float(value)
        return Prediction(np.full((4, 4), score, np.float32), frame, 1, 1)


def calibration(highest: float) -> CalibrationScores:
    scores = np.linspace(0, highest, 50, dtype=np.float32)
    return CalibrationScores(scores, np.zeros((50, 4, 4), np.float16), np.arange(50).astype(np.str_))


def judge(alpha: float) -> Judge:
    return Judge(calibration=calibration(10), pooling=Pooling(), crop=None, alpha=alpha)


def folder_of(path: Path, values: list[int | None]) -> Path:
    path.mkdir()
    for index, value in enumerate(values):
        file = path / f"part{index:03d}.png"
        if value is None:
            file.write_bytes(b"no image")
        else:
            cv2.imwrite(str(file), np.full((8, 8, 3), value, np.uint8))
    return path


def work(
    folder: Path,
    *,
    detector: Any = None,
    stop: threading.Event | None = None,
    alpha: float = 0.05,
    observers: Any = (),
    **settings: Any,
) -> tuple[CameraWorker, Recorder, Metrics]:
    recorder, metrics = Recorder(), Metrics()
    camera = {"name": "cam", "source": {"kind": "folder", "path": str(folder)}, "mode": "triggered", **settings}
    inspection = inspect(box_settings([camera]), reporter=recorder, metrics=metrics)
    _BEGUN.append(inspection)
    worker = CameraWorker(
        settings=CameraSettings.model_validate(camera),
        station=inspection.station_of("cam"),
        detector=detector or Brightness(),
        judge=judge(alpha),
        reporter=recorder,
        metrics=metrics,
        watchdog=Watchdog(limit_s=SOON),
        stop=stop or threading.Event(),
        observers=observers,
    )
    return worker, recorder, metrics


def finish(worker: CameraWorker) -> None:
    worker.start()
    assert worker.join(SOON)
    assert worker.done


def wait_for_captured(worker: CameraWorker, count: int) -> None:
    deadline = time.monotonic() + SOON
    while worker.status()["counters"]["captured"] < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)  # the capture's own counter: it tells nobody


def decisions(recorder: Recorder) -> dict[str | None, str]:
    return {verdict.part_id: verdict.decision.value for verdict in recorder.verdicts}


def test_every_file_is_one_part_with_one_verdict(tmp_path: Path) -> None:
    worker, recorder, _ = work(folder_of(tmp_path / "in", [CALM, HOT, CALM]))

    finish(worker)

    assert decisions(recorder) == {"part000": "OK", "part001": "NOK", "part002": "OK"}
    assert len(recorder.verdicts) == 3
    assert recorder.states[-1] == ("not_judged", "the source has ended")


def test_unreadable_part_is_not_judged(tmp_path: Path) -> None:
    worker, recorder, metrics = work(folder_of(tmp_path / "in", [CALM, None, HOT]))

    finish(worker)

    assert decisions(recorder) == {"part000": "OK", "part001": "NOT_JUDGED", "part002": "NOK"}
    assert sorted(verdict.camera_seq for verdict in recorder.verdicts) == [0, 1, 2]
    assert metrics.value("frames_corrupt") == 1
    assert worker.status()["counters"]["corrupt"] == 1


def test_part_whose_inference_fails_is_not_judged_and_the_next_one_is(tmp_path: Path) -> None:
    detector = Brightness(fail_on=7)
    worker, recorder, metrics = work(folder_of(tmp_path / "in", [CALM, 7, CALM]), detector=detector)

    finish(worker)

    assert decisions(recorder) == {"part000": "OK", "part001": "NOT_JUDGED", "part002": "OK"}
    assert "the engine gave up" in recorder.verdicts[1].reason
    assert metrics.value("frames_failed") == 1
    assert worker.failure == ""


def test_lasting_failure_is_a_warning(tmp_path: Path) -> None:
    worker, _, metrics = work(folder_of(tmp_path / "in", [7, 7]), detector=Brightness(fail_on=7))

    finish(worker)

    assert metrics.value("frames_failed") == 2
    assert "the engine gave up" in worker.warnings()[-1]


def test_part_with_a_nan_map_is_not_judged(tmp_path: Path) -> None:
    worker, recorder, _ = work(folder_of(tmp_path / "in", [CALM, 7]), detector=Brightness(nan_on=7))

    finish(worker)

    assert decisions(recorder) == {"part000": "OK", "part001": "NOT_JUDGED"}


def test_part_judged_too_late_is_not_judged(tmp_path: Path) -> None:
    detector = Brightness()
    detector.gate.clear()
    worker, recorder, metrics = work(folder_of(tmp_path / "in", [CALM]), detector=detector, timeout_ms=5)

    worker.start()
    with recorder.seen:
        # At its deadline, not when the engine is done with it.
        assert recorder.seen.wait_for(lambda: recorder.verdicts, SOON)
    detector.gate.set()
    assert worker.join(SOON)

    assert decisions(recorder) == {"part000": "NOT_JUDGED"}
    assert recorder.verdicts[0].reason == "not judged within 5 ms"
    assert metrics.value("frames_late") == 1
    assert worker.status()["counters"]["not_judged"] == 1
    assert worker.status()["counters"]["ok"] == 0


def test_parts_whose_time_is_over_are_not_judged_any_more(tmp_path: Path) -> None:
    detector = Brightness()
    detector.gate.clear()
    worker, recorder, metrics = work(folder_of(tmp_path / "in", [CALM] * 4), detector=detector, timeout_ms=5)
    seen: list[int] = []
    predict = detector.predict
    detector.predict = lambda frame: seen.append(frame.camera_seq) or predict(frame)  # type: ignore[method-assign,func-returns-value]

    worker.start()
    with recorder.seen:
        assert recorder.seen.wait_for(lambda: len(recorder.verdicts) == 4, SOON)
    detector.gate.set()
    assert worker.join(SOON)

    # The one that the engine hangs in; none where even the first came too late, as on a busy machine.
    assert len(seen) <= 1
    assert metrics.value("frames_late") == 4


def test_parts_dropped_by_policy_are_not_judged(tmp_path: Path) -> None:
    detector = Brightness()
    detector.gate.clear()
    source = {"kind": "folder", "path": str(folder_of(tmp_path / "in", [CALM] * 10)), "policy": "drop_oldest",
              "capacity": 1}  # fmt: skip
    worker, recorder, _ = work(tmp_path, detector=detector, source=source)

    worker.start()
    wait_for_captured(worker, 10)
    detector.gate.set()
    assert worker.join(SOON)

    found = decisions(recorder)
    assert len(found) == len(recorder.verdicts) == 10
    assert set(found.values()) == {"OK", "NOT_JUDGED"}
    assert {v.reason for v in recorder.verdicts if v.decision.value == "NOT_JUDGED"} == {"frame dropped"}


def test_parts_in_the_queue_at_stop_are_not_judged(tmp_path: Path) -> None:
    detector, stop = Brightness(), threading.Event()
    detector.gate.clear()
    worker, recorder, _ = work(folder_of(tmp_path / "in", [CALM] * 4), detector=detector, stop=stop)

    worker.start()
    wait_for_captured(worker, 4)
    stop.set()
    detector.gate.set()
    assert worker.join(SOON)

    assert list(decisions(recorder).values()) == ["OK", "NOT_JUDGED", "NOT_JUDGED", "NOT_JUDGED"]
    assert recorder.states[-1] == ("not_judged", "stopped")


def test_stream_gives_events_and_states(tmp_path: Path) -> None:
    events = {"enter_hits": 2, "enter_window": 3, "leave_calm": 2}
    values = [CALM, HOT, HOT, HOT, CALM, CALM, CALM]
    worker, recorder, metrics = work(folder_of(tmp_path / "in", values), mode="stream", events=events)

    finish(worker)

    assert [(e.phase.value, e.camera_seq) for e in recorder.events] == [("new", 2), ("end", 5)]
    assert [state for state, _ in recorder.states] == ["not_judged", "ok", "nok", "ok", "not_judged"]
    assert recorder.verdicts == []
    assert metrics.value("judged") == 7


def test_event_ends_with_its_source(tmp_path: Path) -> None:
    events = {"enter_hits": 1, "enter_window": 1}
    worker, recorder, _ = work(folder_of(tmp_path / "in", [CALM, HOT, HOT]), mode="stream", events=events)

    finish(worker)

    assert [e.phase.value for e in recorder.events] == ["new", "end"]


def test_event_ends_when_the_box_stops(tmp_path: Path) -> None:
    detector, stop = Brightness(), threading.Event()
    detector.gate.clear()
    worker, recorder, _ = work(
        folder_of(tmp_path / "in", [HOT] * 4), detector=detector, stop=stop, mode="stream",
        events={"enter_hits": 1, "enter_window": 1},
    )  # fmt: skip

    worker.start()
    wait_for_captured(worker, 4)
    stop.set()
    detector.gate.set()
    assert worker.join(SOON)

    assert [e.phase.value for e in recorder.events] == ["new", "end"]


def test_stream_frame_that_fails_shows_not_judged(tmp_path: Path) -> None:
    worker, recorder, _ = work(
        folder_of(tmp_path / "in", [CALM, 7, CALM]), detector=Brightness(fail_on=7), mode="stream"
    )

    finish(worker)

    assert [state for state, _ in recorder.states] == ["not_judged", "ok", "not_judged", "ok", "not_judged"]


def test_budget_beyond_the_calibration_is_a_warning(tmp_path: Path) -> None:
    worker, _, _ = work(folder_of(tmp_path / "in", [CALM]), alpha=0.001)

    (warning,) = worker.warnings()
    assert "budget of 1 false NOK per 1,000 is not supported: 50 calibration scores in 50 groups" in warning
    assert "19.6 false NOK per 1,000 at best" in warning


def test_missing_folder_is_refused_and_shown(tmp_path: Path) -> None:
    worker, recorder, _ = work(tmp_path / "none")

    with pytest.raises(CaptureError, match="none"):
        worker.start()

    assert worker.done
    assert recorder.states[-1][0] == "not_judged"


def test_defect_of_the_worker_is_seen_and_no_part_waits_for_it(tmp_path: Path) -> None:
    worker, recorder, metrics = work(
        folder_of(tmp_path / "in", [CALM, CALM]), observers=[lambda _: 1 / 0], timeout_ms=60_000
    )

    finish(worker)

    # Every frame was a part, those that nobody judges any more too.
    assert [verdict.decision.value for verdict in recorder.verdicts] == ["NOT_JUDGED", "NOT_JUDGED"]

    assert metrics.value("workers_failed") == 1
    assert "its worker failed" in worker.failure
    assert recorder.states[-1] == ("not_judged", "its worker failed, see the log")


class Switching(Brightness):
    """A detector whose memory changes before the third frame and again before the sixth."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = 0

    def predict(self, frame: Frame) -> Prediction:
        self.frames += 1
        version = (self.frames > 2) + (self.frames > 5)
        return dataclasses.replace(super().predict(frame), memory_version=int(version))


def test_frames_meet_the_thresholds_of_the_memory_that_scored_them(tmp_path: Path) -> None:
    worker, recorder, _ = work(folder_of(tmp_path / "in", [20] * 8), detector=Switching())
    # Both are there before the first frame: having a judge must not mean using it.
    for version, highest in ((1, 100), (2, 10)):
        worker.install_judge(worker.judge.recalibrated(calibration(highest), memory_version=version))

    finish(worker)

    found = [(verdict.memory_version, verdict.decision.value) for verdict in recorder.verdicts]
    assert found == [(0, "NOK")] * 2 + [(1, "OK")] * 3 + [(2, "NOK")] * 3


class InSteps(Brightness):
    """A detector that notes what is begun, finished and predicted at once, by frame."""

    def __init__(self, *, requests: bool = True) -> None:
        super().__init__()
        self.steps: list[tuple[str, int]] = []
        self.requests = requests

    def begin(self, frame: Frame) -> SimpleNamespace | None:
        if int(frame.image[0, 0, 0]) == self.fail_on:
            raise EngineError("cannot begin")
        if not self.requests:
            return None
        self.steps.append(("begin", frame.camera_seq))
        return SimpleNamespace(frame=frame, result=lambda: self._result("finish", frame))

    def predict(self, frame: Frame) -> Prediction:
        return self._result("predict", frame)

    def _result(self, step: str, frame: Frame) -> Prediction:
        self.steps.append((step, frame.camera_seq))
        return super().predict(frame)


def stream_with_a_backlog(folder: Path, detector: InSteps, values: list[int | None]) -> Recorder:
    """Judge a stream whose frames all wait before the first one is judged."""
    worker, recorder, _ = work(folder_of(folder / "in", values), detector=detector, mode="stream")
    detector.gate.clear()
    worker._capture.start()
    wait_for_captured(worker, len(values))
    detector.gate.set()
    worker._capture.start = lambda: None  # type: ignore[method-assign] (it runs already)
    worker.start()
    assert worker.join(SOON)
    return recorder


def test_next_frame_of_a_stream_is_begun_before_the_one_before_is_finished(tmp_path: Path) -> None:
    detector = InSteps()
    recorder = stream_with_a_backlog(tmp_path, detector, [CALM] * 3)
    assert detector.steps == [("begin", 0), ("begin", 1), ("finish", 0), ("begin", 2), ("finish", 1), ("finish", 2)]
    assert [state for state, _ in recorder.states] == ["not_judged", "ok", "not_judged"]


def test_frame_that_cannot_be_begun_is_told_in_its_turn(tmp_path: Path) -> None:
    detector = InSteps()
    detector.fail_on = 77
    recorder = stream_with_a_backlog(tmp_path, detector, [CALM, 77, CALM])
    assert detector.steps == [("begin", 0), ("finish", 0), ("predict", 1), ("predict", 2)]
    assert [state for state, _ in recorder.states] == ["not_judged", "ok", "not_judged", "ok", "not_judged"]


def test_stream_is_judged_frame_by_frame_where_no_request_is_free(tmp_path: Path) -> None:
    detector = InSteps(requests=False)
    stream_with_a_backlog(tmp_path, detector, [CALM] * 3)
    assert detector.steps == [("predict", 0), ("predict", 1), ("predict", 2)]


def test_memory_without_thresholds_judges_nothing(tmp_path: Path) -> None:
    worker, recorder, _ = work(folder_of(tmp_path / "in", [20] * 4), detector=Switching())

    finish(worker)

    assert [verdict.decision.value for verdict in recorder.verdicts] == ["NOK", "NOK", "NOT_JUDGED", "NOT_JUDGED"]
    assert "memory version 1 judges, but no thresholds were made" in recorder.verdicts[2].reason


def test_judged_frames_are_handed_on_with_whether_they_are_part_of_an_alert(tmp_path: Path) -> None:
    events = {"enter_hits": 1, "enter_window": 1, "leave_calm": 2}
    handed: list[tuple[int, bool, bool]] = []
    worker, _, _ = work(
        folder_of(tmp_path / "in", [CALM, HOT, CALM, CALM, 7]), mode="stream", events=events,
        detector=Brightness(fail_on=7),
        observers=[lambda done: handed.append((done.frame.camera_seq, done.alarmed, done.prediction is not None))],
    )  # fmt: skip

    finish(worker)

    assert handed == [(0, False, True), (1, True, True), (2, True, True), (3, False, True), (4, False, False)]


class BreakingCapture:
    """A live capture: the first one breaks down after two frames, the second one gives two more and goes on."""

    made: ClassVar[list[BreakingCapture]] = []

    def __init__(self, *, wanted: Callable[[Frame], bool], **_: object) -> None:
        BreakingCapture.made.append(self)
        self.wanted = wanted
        self.first = len(BreakingCapture.made) == 1
        self.given = 0

    @property
    def state(self) -> CameraState:
        broken = self.first and self.given == 2
        return CameraState.FAILED if broken else CameraState.STREAMING

    error = "the driver broke"
    queued = 0
    source_counts: ClassVar[dict[str, int]] = {}

    @property
    def finished(self) -> bool:
        return self.state is CameraState.FAILED

    @property
    def counters(self) -> Counters:
        return Counters(captured=self.given, delivered=self.given)

    def start(self) -> None: ...

    def stop(self, _timeout: float) -> None: ...

    def get(self, _timeout: float) -> Frame | None:
        if self.given == 2:
            return None
        frame = Frame(np.zeros((8, 8, 3), np.uint8), "cam", self.given, 0, datetime.now(timezone.utc))
        self.given += 1
        assert self.wanted(frame)
        return frame


def test_camera_that_breaks_down_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BreakingCapture.made.clear()
    monkeypatch.setattr(edge.camera, "Capture", BreakingCapture)
    monkeypatch.setattr(edge.camera, "FIRST_RESTART_S", 0.01)
    stop = threading.Event()
    worker, recorder, metrics = work(tmp_path, source={"kind": "camera", "device": 0}, stop=stop)

    worker.start()
    with recorder.seen:
        assert recorder.seen.wait_for(lambda: len(recorder.verdicts) == 4, SOON)
    # A driver that comes back to the capture that was left behind brings no part.
    left = Frame(np.zeros((8, 8, 3), np.uint8), "cam", 2, 0, datetime.now(timezone.utc))
    assert not BreakingCapture.made[0].wanted(left)
    stop.set()
    assert worker.join(SOON)
    assert not BreakingCapture.made[1].wanted(left)

    assert [verdict.camera_seq for verdict in recorder.verdicts] == [0, 1, 2, 3]
    assert ("not_judged", "the driver broke") in recorder.states
    assert metrics.value("captures_restarted") == 1
    assert worker.status()["counters"]["captured"] == 4
