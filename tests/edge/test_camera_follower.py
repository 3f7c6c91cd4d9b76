"""A camera whose frames are seen as a follower says: rerouted once, and refused where the product is unknown."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edge.adaptation.follower import Follower
from edge.adaptation.guided import GuidedDetector, Seen
from edge.adaptation.look import Look
from edge.adaptation.moments import Moments, Reference
from edge.adaptation.settings import AdaptationSettings
from edge.bundle import Bundle, CalibrationScores, Engine, Pooling, Precision
from edge.camera import CameraWorker
from edge.frames import Decision, Frame, JudgedFrame, Prediction, Verdict
from edge.health.metrics import Metrics
from edge.health.watchdog import Watchdog
from edge.inference.detector import Detector
from edge.inspection.parts import Reason
from edge.judgement.verdicts import Judge
from edge.settings import CameraSettings, Mode
from tests.edge.inspection_values import box_settings, inspect
from tests.edge.routed_bundle import BRIGHT, BRIGHTER, DARK, SUBCLASSES, bright_frame, dark_frame, make_routed_bundle
from tests.edge.test_camera import SOON, Recorder, folder_of, judge

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edge.inspection.inspection import Inspection

FIRST, SECOND, NONE = 10, 50, 90
_BEGUN: list[Inspection] = []


@pytest.fixture(autouse=True)
def _end_inspections() -> Iterator[None]:
    yield
    while _BEGUN:
        assert _BEGUN.pop().stop(SOON)


class Routed:
    """A detector whose route and map are the image's brightness; it notes what each frame was seen as."""

    bundle = SimpleNamespace(id="0" * 64, manifest=SimpleNamespace(product="grey", method="brightness", signal=None))

    def __init__(self) -> None:
        self.looks: list[tuple[int, int]] = []

    def begin(self, frame: Frame, look: Look) -> SimpleNamespace:
        return SimpleNamespace(frame=frame, result=lambda: self.predict(frame, look))

    def predict(self, frame: Frame, look: Look) -> Prediction:
        self.looks.append((frame.camera_seq, look.expert))
        value = int(frame.image[0, 0, 0])
        route = {FIRST: [1, -1], SECOND: [-1, 1], NONE: [-1, -1]}[value]
        return Prediction(
            np.zeros((4, 4), np.float32), frame, 10, 100,
            moments_version=look.version, route=np.array(route, np.float32),
        )  # fmt: skip


class Heard:
    """Keeps what an observer is given."""

    def __init__(self) -> None:
        self.frames: list[JudgedFrame] = []

    def __call__(self, judged: JudgedFrame) -> None:
        self.frames.append(judged)


def two_experts() -> Reference:
    one = Moments({"image": np.full(3, 100, np.float32)}, {"image": np.full(3, 20, np.float32)})
    return Reference((one, one), (1.0, 1.0), SUBCLASSES)


def follow(**settings: Any) -> Follower:
    return Follower(two_experts(), AdaptationSettings(**settings))


def work(
    folder: Path, follower: Follower, *, mode: Mode, detector: Any = None
) -> tuple[CameraWorker, Recorder, list[JudgedFrame], list[Reason]]:
    recorder, metrics, heard, reasons = Recorder(), Metrics(), Heard(), []
    camera = {"name": "cam", "source": {"kind": "folder", "path": str(folder)}, "mode": mode.value}
    station = None
    if mode is Mode.TRIGGERED:
        inspection = inspect(box_settings([camera]), reporter=recorder, metrics=metrics)
        _BEGUN.append(inspection)
        station = inspection.station_of("cam")
    worker = CameraWorker(
        settings=CameraSettings.model_validate(camera), station=station, detector=detector or Routed(),
        judge=judge(0.05), reporter=recorder, metrics=metrics, watchdog=Watchdog(limit_s=SOON),
        stop=SimpleNamespace(is_set=lambda: False, wait=lambda _: False),
        observers=[heard, follower.take], follower=follower,
    )  # fmt: skip
    told = worker._parts.tell

    def tell(verdict: Any, code: Reason) -> None:
        reasons.append(code)
        told(verdict, code)

    worker._parts.tell = tell  # type: ignore[method-assign] (to see the codes that a PLC reads)
    worker.start()
    assert worker.join(SOON)
    return worker, recorder, heard.frames, reasons


@pytest.mark.parametrize("mode", list(Mode))
def test_unknown_product_is_not_judged(tmp_path: Path, mode: Mode) -> None:
    values = [FIRST, NONE, NONE, FIRST]
    worker, recorder, heard, reasons = work(folder_of(tmp_path / "in", values), follow(), mode=mode)

    assert [one.verdict.decision.value for one in heard] == ["OK", "NOT_JUDGED", "NOT_JUDGED", "OK"]
    assert "unknown product: like none of dark, bright" in heard[1].verdict.reason
    assert reasons[:4] == [Reason.NONE, Reason.UNKNOWN_PRODUCT, Reason.UNKNOWN_PRODUCT, Reason.NONE]
    assert heard[1].prediction is not None
    assert not heard[1].alarmed
    assert worker.status()["counters"]["not_judged"] == 2
    assert worker.status()["counters"]["failed"] == 0
    assert worker.failure == ""
    if mode is Mode.STREAM:
        assert [state for state, _ in recorder.states] == ["not_judged", "ok", "not_judged", "ok", "not_judged"]
        assert recorder.states[2][1].startswith("unknown product")
    else:
        assert [verdict.decision for verdict in recorder.verdicts] == [one.verdict.decision for one in heard]


@pytest.mark.parametrize("mode", list(Mode))
def test_another_product_than_the_recipes_is_not_judged(tmp_path: Path, mode: Mode) -> None:
    follower = follow()
    follower.reset(BRIGHT)
    _, _, heard, _ = work(folder_of(tmp_path / "in", [SECOND, FIRST]), follower, mode=mode)
    assert [one.verdict.decision for one in heard] == [Decision.OK, Decision.NOT_JUDGED]
    assert heard[1].verdict.reason == "it shows dark, the recipe is bright"


@pytest.mark.parametrize("mode", list(Mode))
def test_frame_of_another_subclass_is_judged_again_once(tmp_path: Path, mode: Mode) -> None:
    detector = Routed()
    values = [FIRST, SECOND, FIRST, SECOND, SECOND, SECOND, SECOND]
    _, _, heard, _ = work(folder_of(tmp_path / "in", values), follow(switch_frames=3), mode=mode, detector=detector)

    assert all(one.verdict.decision is Decision.OK for one in heard)
    # What each frame was judged as in the end is what it shows.
    final = dict(detector.looks)
    assert [final[seq] for seq in range(len(values))] == [0, 1, 0, 1, 1, 1, 1]
    seen = [[expert for seq, expert in detector.looks if seq == index] for index in range(len(values))]
    assert all(looks in ([0], [1], [0, 1]) for looks in seen)
    assert seen[1] == [0, 1]
    # Times of both looks are told.
    assert heard[1].prediction is not None
    assert (heard[1].prediction.preprocess_ns, heard[1].prediction.inference_ns) == (20, 200)
    assert heard[0].prediction is not None
    assert (heard[0].prediction.preprocess_ns, heard[0].prediction.inference_ns) == (10, 100)


def frame_at(value: int) -> Frame:
    return Frame(np.full((4, 4, 3), value, np.uint8), "cam", 0, 0, datetime.now(timezone.utc))


def test_frame_begun_before_a_change_over_is_judged_as_what_it_shows() -> None:
    follower, detector = follow(switch_frames=1), Routed()
    sight = GuidedDetector(detector, follower)  # type: ignore[arg-type]
    ahead = sight.begin(frame_at(SECOND))
    assert ahead is not None
    seen = sight.predict(frame_at(SECOND))
    verdict = judge(0.05).judge(seen.prediction)
    follower.take(JudgedFrame(seen.prediction.frame, seen.prediction, verdict))
    assert follower.look().expert == 1
    detector.looks.clear()
    assert ahead.result().refusal == ""
    assert [expert for _, expert in detector.looks] == [0, 1]


class Undecided(Routed):
    """Says of every frame that it is the other one."""

    def predict(self, frame: Frame, look: Look) -> Prediction:
        self.looks.append((frame.camera_seq, look.expert))
        route = [-1, 1] if look.expert == 0 else [1, -1]
        return Prediction(np.zeros((4, 4), np.float32), frame, 10, 100, route=np.array(route, np.float32))


def test_frame_whose_subclass_changes_with_how_it_is_seen_is_refused() -> None:
    detector = Undecided()
    seen = GuidedDetector(detector, follow()).predict(frame_at(FIRST))  # type: ignore[arg-type]
    assert "unknown product" in seen.refusal
    assert len(detector.looks) == 2


def test_without_a_follower_the_detector_is_asked_as_ever() -> None:
    prediction = Prediction(np.zeros((4, 4), np.float32), frame_at(0), 1, 1)
    plain = SimpleNamespace(predict=lambda _: prediction, begin=lambda _: SimpleNamespace(result=lambda: prediction))
    sight = GuidedDetector(plain)  # type: ignore[arg-type]
    pending = sight.begin(prediction.frame)
    assert pending is not None
    assert sight.predict(prediction.frame) == pending.result() == Seen(prediction)
    for route, refused in (([-0.1, -0.2], True), ([np.nan, 1.0], True), ([-0.1, 0.2], False), ([-0.1], True)):
        prediction = replace(prediction, route=np.float32(route))
        pending = sight.begin(prediction.frame)
        assert pending is not None
        assert sight.predict(prediction.frame).refusal == pending.result().refusal
        assert bool(sight.predict(prediction.frame).refusal) == refused
    nothing_free = GuidedDetector(SimpleNamespace(begin=lambda _: None))  # type: ignore[arg-type]
    assert nothing_free.begin(prediction.frame) is None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_routed_bundle(tmp_path_factory.mktemp("routed") / "bundle")


@pytest.mark.parametrize("engine", list(Engine))
def test_a_real_router_leads_each_frame_to_its_expert(bundle: Bundle, engine: Engine) -> None:
    detector = Detector.open(bundle, engine=engine, precision=Precision.FLOAT32, threads=1)
    measured = [
        [detector.predict(_frame(make(seed)), Look(measure=True)).moments for seed in range(3)]
        for make in (dark_frame, bright_frame)
    ]
    assert all(one is not None for group in measured for one in group)
    reference = Reference(tuple(group[0] for group in measured), (1.0, 1.0), SUBCLASSES)  # type: ignore[misc]
    follower = Follower(reference, AdaptationSettings(switch_frames=3))
    sight = GuidedDetector(detector, follower)
    for image, name in ((dark_frame(5), DARK), (bright_frame(5), BRIGHT), (dark_frame(6), DARK)):
        seen = sight.predict(_frame(image))
        assert seen.refusal == ""
        assert seen.prediction.subclass == name
        assert judge_of(seen.prediction).subclass == name
        assert seen.prediction.moments is not None
    assert "unknown product" in sight.predict(_frame(bright_frame(7, BRIGHTER // 2))).refusal


def _frame(image: np.ndarray) -> Frame:
    return Frame(image, "cam", 0, 0, datetime.now(timezone.utc))


def judge_of(prediction: Prediction) -> Verdict:
    maps = np.zeros((50, *prediction.anomaly_map.shape), np.float16)
    scores = CalibrationScores(np.linspace(0, 10, 50, dtype=np.float32), maps, np.arange(50).astype(np.str_))
    return Judge(calibration=scores, pooling=Pooling(), crop=None, alpha=0.05).judge(prediction)
