"""Several products at one camera: a judge each, events that end with their product, thresholds that stay with it."""

from __future__ import annotations

import math
import threading
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edge.adaptation.look import Look
from edge.alerts.command_messages import ThresholdCommand
from edge.alerts.message import NoticeKind, build
from edge.bundle import Bundle, CalibrationScores, Engine, Pooling, Precision
from edge.camera import CameraWorker
from edge.errors import DataError
from edge.frames import Decision, EventPhase, Frame, Prediction, Verdict
from edge.health.metrics import Metrics
from edge.health.watchdog import Watchdog
from edge.inference.detector import Detector
from edge.judgement.given_thresholds import GivenThresholds
from edge.judgement.judges import Judges
from edge.judgement.threshold import ExternalThreshold, RunTimeThreshold
from edge.judgement.threshold_commands import ThresholdCommands
from edge.judgement.threshold_versions import ThresholdVersions
from edge.judgement.verdicts import Judge
from edge.products.files import add_products
from edge.products.guide import ProductGuide
from edge.products.judging import product_judges
from edge.products.recipes import CameraProducts, RecipeHistory
from edge.settings import CameraSettings
from tests.edge.routed_bundle import BRIGHT, DARK, bright_frame, dark_frame
from tests.edge.test_camera import SOON, Recorder, folder_of
from tests.edge.unified_bundle import COUNT, PRODUCTS, broken, make_product_file, make_unified_bundle

if TYPE_CHECKING:
    from pathlib import Path

ONE = "a" * 64
LOW, HIGH = "low", "high"
TOP = {LOW: 10.0, HIGH: 100.0}


def judge_of(product: str, **more: Any) -> Judge:
    scores = np.linspace(0, TOP.get(product, 10), 50, dtype=np.float32)
    calibration = CalibrationScores(scores, np.zeros((50, 4, 4), np.float16), np.arange(50).astype(np.str_))
    return Judge(
        **{"bundle_id": ONE, **more}, calibration=calibration, pooling=Pooling(), crop=None, alpha=0.05, product=product
    )


def prediction(product: str, score: float = 0.0, version: int = 0) -> Prediction:
    frame = Frame(np.zeros((8, 8, 3), np.uint8), "cam", 0, 0, datetime(2026, 1, 1, tzinfo=timezone.utc))
    return Prediction(np.full((4, 4), score, np.float32), frame, 1, 1, memory_version=version, subclass=product)


def test_each_product_meets_its_own_threshold_and_p_value() -> None:
    judges = Judges([judge_of(LOW), judge_of(HIGH)])
    low, high = (judges.meet(0, name).judge(prediction(name, 50.0)) for name in (LOW, HIGH))
    assert (low.decision, high.decision) == (Decision.NOK, Decision.OK)
    assert low.p_value == pytest.approx(1 / 51)
    assert high.p_value == pytest.approx(26 / 51)
    assert (low.subclass, judges.met.product) == (LOW, HIGH)
    with pytest.raises(DataError, match="'other'"):
        judges.meet(0, "other")


def test_a_bundle_of_one_product_has_one_judge_whatever_sub_class_is_seen() -> None:
    judges = Judges([judge_of("")])
    assert judges.meet(0, "any") is judges.meet(0, "") is judges.met
    judges.install(judge_of("", memory_version=1))
    assert judges.meet(1, "any").memory_version == 1
    with pytest.raises(DataError, match="memory version 7"):
        judges.meet(7, "")
    assert [one.memory_version for one in judges.all] == [1]


def test_a_threshold_given_for_one_product_is_no_others(tmp_path: Path) -> None:
    judges = Judges([judge_of(LOW), judge_of(HIGH)])
    scope = judges.met.scope
    judges.meet(0, HIGH)
    given = RunTimeThreshold(value=3.0, bundle_id=ONE, product=LOW, scope=scope)
    assert judges.set_threshold(given, LOW).threshold.value == 3
    assert judges.met.product == HIGH
    assert [one.threshold_source for one in judges.all] == ["run time", "budget"]
    assert [one.run_time for one in judges.all] == [given, None]
    # Even handed to the wrong one it does not hold there.
    other = judge_of(HIGH, run_time=given)
    assert other.threshold_source == "budget"
    assert "set for low, not high" in other.notice
    assert judge_of(HIGH, external=ExternalThreshold(value=3, bundle_id=ONE)).threshold_source == "budget"
    assert judge_of("", run_time=given).threshold_source == "budget"
    with pytest.raises(DataError, match="'other'"):
        judges.set_threshold(given, "other")


class Worker:
    """A camera's worker as far as thresholds go."""

    name = "cam"

    def __init__(self, *judges: Judge) -> None:
        self._judges = Judges(judges)

    @property
    def judge(self) -> Judge:
        return self._judges.met

    @property
    def judges(self) -> tuple[Judge, ...]:
        return self._judges.all

    def set_threshold(self, given: RunTimeThreshold | None, product: str = "") -> Judge:
        return self._judges.set_threshold(given, product)


def test_thresholds_are_given_and_kept_by_product(tmp_path: Path) -> None:
    path, notices = tmp_path / "thresholds.json", list[str]()

    def begin(worker: Worker) -> ThresholdCommands:
        return ThresholdCommands(
            GivenThresholds(path), cameras=[worker], notify=lambda _k, _s, text, **_: notices.append(text)
        )

    def give(commands: ThresholdCommands, product: str | None) -> dict[str, Any]:
        fields = {"camera": "cam", "value": 3.0, "bundle_id": ONE, "memory_version": 0, "product": product}
        return commands.obey(build(ThresholdCommand, **fields))

    worker = Worker(judge_of(LOW), judge_of(HIGH))
    commands = begin(worker)
    assert "name one of them, its bundle has: low, high" in give(commands, None)["reason"]
    assert "no product 'other'" in give(commands, "other")["reason"]
    answer = give(commands, HIGH)
    assert (answer["ok"], answer["detail"]["product"]) == (True, HIGH)
    assert [one.threshold_source for one in worker.judges] == ["budget", "run time"]
    assert commands.status()["cameras"]["cam/high"]["in_force"] is True
    assert (
        notices == ["camera cam/high: threshold 3 by run time in place of 98.6301"] or "camera cam/high" in notices[0]
    )

    after = Worker(judge_of(LOW), judge_of(HIGH))
    begin(after).look()
    assert [one.threshold_source for one in after.judges] == ["budget", "run time"]
    single = Worker(judge_of(""))
    assert "for one product; leave the product out" in give(begin(single), HIGH)["reason"]


def test_a_change_of_product_is_no_change_of_threshold(tmp_path: Path) -> None:
    versions, low, high = ThresholdVersions(tmp_path / "v.json"), judge_of(LOW), judge_of(HIGH)
    assert [versions.number("cam", one) for one in (low, high, low, high)] == [0, 0, 0, 0]
    scope = low.scope
    given = low.with_threshold(RunTimeThreshold(value=3.0, bundle_id=ONE, product=LOW, scope=scope))
    assert [versions.number("cam", one) for one in (given, high)] == [1, 0]
    assert (versions.of("cam", LOW), versions.of("cam", HIGH)) == (1, 0)


class Brightness:
    """A detector whose map is the image's brightness, seen as the product that the look says."""

    bundle = SimpleNamespace(id=ONE, manifest=SimpleNamespace(product="grey", method="brightness", signal=None))

    def predict(self, frame: Frame, look: Look) -> Prediction:
        score = float(frame.image[0, 0, 0])
        return Prediction(np.full((4, 4), score, np.float32), frame, 1, 1, subclass=(LOW, HIGH)[look.expert])

    def begin(self, frame: Frame, look: Look) -> SimpleNamespace:
        return SimpleNamespace(frame=frame, result=lambda: self.predict(frame, look))


class BySeq:
    """A guide that changes the product with a frame's number."""

    def __init__(self, *products: int) -> None:
        self._products = products

    def look(self, frame: Frame) -> Look:
        return Look(self._products[frame.camera_seq])

    def rerouted(self, _route: Any, _frame: Frame) -> Look | None:
        return None

    def refusal(self, _route: Any, frame: Frame) -> str:
        return "no recipe" if self._products[frame.camera_seq] < 0 else ""


def test_an_event_ends_where_the_product_changes(tmp_path: Path) -> None:
    recorder, seen = Recorder(), list[Verdict]()
    products = [0, 0, 0, 1, 1, 0, 0]
    camera = {
        "name": "cam", "source": {"kind": "folder", "path": str(folder_of(tmp_path / "in", [200] * len(products)))},
        "mode": "stream", "events": {"enter_hits": 2, "enter_window": 2},
    }  # fmt: skip
    worker = CameraWorker(
        settings=CameraSettings.model_validate(camera), detector=Brightness(),  # type: ignore[arg-type] (no engine)
        judge=(judge_of(LOW), judge_of(HIGH)), reporter=recorder,  # type: ignore[arg-type] (keeps what it is given)
        metrics=Metrics(), watchdog=Watchdog(limit_s=SOON), stop=threading.Event(), follower=BySeq(*products),
        on_verdict=lambda _, verdict: seen.append(verdict),
    )  # fmt: skip
    worker.start()
    assert worker.join(SOON)

    assert [one.subclass for one in seen] == [(LOW, HIGH)[index] for index in products]
    phases = [(one.phase, one.subclass, one.camera_seq) for one in recorder.events]
    new, end = EventPhase.NEW, EventPhase.END
    assert phases == [(new, LOW, 1), (end, LOW, 2), (new, HIGH, 4), (end, HIGH, 4), (new, LOW, 6), (end, LOW, 6)]
    assert len({one.event_id for one in recorder.events}) == 3
    status = worker.status()
    assert status["judged_as"] == LOW
    assert {name: one["threshold"]["value"] > 50 for name, one in status["products"].items()} == {
        LOW: False,
        HIGH: True,
    }


def test_products_that_take_turns_have_events_too(tmp_path: Path) -> None:
    recorder = Recorder()
    products = [0, 1] * 3
    source = {"kind": "folder", "path": str(folder_of(tmp_path / "in", [200] * len(products)))}
    worker = CameraWorker(
        settings=CameraSettings.model_validate({"name": "cam", "source": source, "mode": "stream"}),
        detector=Brightness(), judge=(judge_of(LOW), judge_of(HIGH)), reporter=recorder,  # type: ignore[arg-type]  # as above
        metrics=Metrics(), watchdog=Watchdog(limit_s=SOON), stop=threading.Event(), follower=BySeq(*products),
    )  # fmt: skip
    worker.start()
    assert worker.join(SOON)
    # Three of five frames are hits, whichever product they show; each event ends with its product all the same.
    new, end = EventPhase.NEW, EventPhase.END
    assert [(one.phase, one.subclass, one.camera_seq) for one in recorder.events] == [
        (new, LOW, 2), (end, LOW, 2), (new, HIGH, 5), (end, HIGH, 5),
    ]  # fmt: skip


def test_a_product_added_while_another_detector_is_to_come_is_judged_by_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(recorder, "judged_by", lambda *_: None, raising=False)
    source = {"kind": "folder", "path": str(folder_of(tmp_path / "in", [1]))}
    worker = CameraWorker(
        settings=CameraSettings.model_validate({"name": "cam", "source": source, "mode": "stream"}),
        detector=Brightness(), judge=judge_of(LOW), reporter=recorder,  # type: ignore[arg-type]  # as above
        metrics=Metrics(), watchdog=Watchdog(limit_s=SOON), stop=threading.Event(),
    )  # fmt: skip
    other = "b" * 64
    worker.replace_detector(Brightness(), judge_of(LOW, bundle_id=other))  # type: ignore[arg-type]  # as above
    worker.install_judge(judge_of(HIGH, bundle_id=other))
    assert [one.product for one in worker.judges] == [LOW]
    worker._succeed()
    assert [one.product for one in worker.judges] == [LOW, HIGH]


def test_a_frame_of_no_recipe_is_not_judged(tmp_path: Path) -> None:
    recorder, seen = Recorder(), list[Verdict]()
    source = {"kind": "folder", "path": str(folder_of(tmp_path / "in", [1, 2]))}
    products = CameraProducts(lambda: (LOW, HIGH), RecipeHistory(), routed=2)
    worker = CameraWorker(
        settings=CameraSettings.model_validate({"name": "cam", "source": source, "mode": "stream"}),
        detector=Brightness(), judge=(judge_of(LOW), judge_of(HIGH)), reporter=recorder,  # type: ignore[arg-type]  # as above
        metrics=Metrics(), watchdog=Watchdog(limit_s=SOON), stop=threading.Event(), follower=ProductGuide(products),
        on_verdict=lambda _, verdict: seen.append(verdict),
    )  # fmt: skip
    worker.start()
    assert worker.join(SOON)
    assert [one.decision for one in seen] == [Decision.NOT_JUDGED] * 2
    assert "send cmd/recipe" in seen[0].reason
    assert worker.status()["counters"]["failed"] == 0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_unified_bundle(tmp_path_factory.mktemp("unified") / "bundle")


def camera_settings(**more: Any) -> CameraSettings:
    return CameraSettings.model_validate(
        {
            "name": "cam",
            "source": {"kind": "folder", "path": "/nowhere"},
            "budget": {"false_events_per_hour": 5000},
            **more,
        }
    )


def middle_frame(seed: int) -> np.ndarray:
    return bright_frame(seed, 30)


def nothing_given(_camera: str, _product: str) -> None:
    return None


def open_detector(bundle: Bundle) -> Detector:
    return Detector.open(bundle, engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32, threads=1)


def test_good_parts_of_each_product_are_ok_and_broken_ones_nok(bundle: Bundle) -> None:
    detector = open_detector(bundle)
    judges = Judges(product_judges(camera_settings(), detector, nothing_given))
    assert [one.product for one in judges.all] == list(PRODUCTS)
    assert [one.calibration_count for one in judges.all] == [COUNT, COUNT]
    dark, bright = (one.threshold.value for one in judges.all)
    assert dark > 1.2 * bright
    for index, (name, make) in enumerate(((DARK, dark_frame), (BRIGHT, bright_frame))):
        for image, decision in ((make(700), Decision.OK), (broken(make(701)), Decision.NOK)):
            frame = Frame(image, "cam", 0, 0, datetime.now(timezone.utc))
            verdict = judges.meet(0, name).judge(detector.predict(frame, Look(index)))
            assert (verdict.decision, verdict.subclass) == (decision, name)


def test_an_added_product_without_scores_borrows_the_highest_threshold_and_says_so(
    bundle: Bundle, tmp_path: Path
) -> None:
    detector, path = open_detector(bundle), tmp_path / "middle.safetensors"
    make_product_file(path, bundle, middle_frame, name="middle")
    assert add_products([path], [detector]) == ()
    dark, _, middle = product_judges(camera_settings(), detector, nothing_given)
    assert (middle.product, middle.threshold) == ("middle", dark.threshold)
    assert (
        "its thresholds are those of dark, the highest of the bundle's products: its file has no scores"
        in middle.warnings[0]
    )
    assert dark.warnings == ()
    # With another threshold given it is its own all the same.
    given = RunTimeThreshold(
        value=1.5, bundle_id=bundle.id, product="middle", scope=middle.scope, product_file=middle.product_file
    )
    assert middle.with_threshold(given).threshold.value == 1.5
    assert middle.with_threshold(given).warnings == middle.warnings

    make_product_file(path, bundle, middle_frame, name="middle", scores=True)
    again = open_detector(bundle)
    assert add_products([path], [again]) == ()
    own = product_judges(camera_settings(), again, nothing_given)[2]
    assert own.threshold.value != dark.threshold.value
    assert own.warnings == ()


def test_a_threshold_holds_for_the_file_that_it_was_given_for_and_no_other(bundle: Bundle, tmp_path: Path) -> None:
    path, notices = tmp_path / "middle.safetensors", list[NoticeKind]()
    make_product_file(path, bundle, middle_frame, name="middle")
    detector = open_detector(bundle)
    assert add_products([path], [detector]) == ()
    kept = GivenThresholds(tmp_path / "thresholds.json")
    cameras = [Worker(*product_judges(camera_settings(), detector, kept.of))]
    commands = ThresholdCommands(kept, cameras=cameras, notify=lambda kind, *_, **__: notices.append(kind))
    asked = {"camera": "cam", "value": 1.5, "bundle_id": bundle.id, "memory_version": 0, "product": "middle"}
    assert commands.obey(build(ThresholdCommand, **asked))["ok"]
    # After a restart, too.
    held = product_judges(camera_settings(), detector, GivenThresholds(tmp_path / "thresholds.json").of)[2]
    assert (held.threshold.value, held.threshold_source, held.notice) == (1.5, "run time", "")

    make_product_file(path, bundle, middle_frame, name="middle", rows=8)
    assert add_products([path], [detector]) == ()
    anew = product_judges(camera_settings(), detector, kept.of)[2]
    assert anew.threshold_source == "budget"
    assert anew.warnings[-1] == "threshold given at run time ignored: it was set for another file of product middle"
    cameras[:] = [Worker(anew)]
    commands.look()
    assert notices == [NoticeKind.THRESHOLD_SET, NoticeKind.THRESHOLD_IGNORED]
    assert not commands.status()["cameras"]["cam/middle"]["in_force"]
    assert commands.obey(build(ThresholdCommand, **asked))["ok"]
    assert cameras[0].judge.threshold_source == "run time"


def test_scores_of_another_engine_are_not_taken(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "middle.safetensors"
    make_product_file(path, bundle, middle_frame, scores=True)
    detector = Detector.open(bundle, engine=Engine.OPENVINO, threads=1)
    assert add_products([path], [detector]) == ()
    borrowed = product_judges(camera_settings(), detector, nothing_given)[2]
    assert "of onnxruntime float32, and openvino float32 judges" in borrowed.warnings[0]
    few = open_detector(bundle)
    assert add_products([path], [few]) == ()
    strict = camera_settings(budget={"false_events_per_hour": 0.01})
    assert math.isfinite(product_judges(strict, few, nothing_given)[2].threshold.value)


def test_files_of_another_bundle_damaged_or_doubled_are_refused_and_leave_the_rest_alone(
    bundle: Bundle, tmp_path: Path
) -> None:
    other = make_unified_bundle(tmp_path / "other", seed=5)
    assert other.id != bundle.id
    paths = {name: tmp_path / f"{name}.safetensors" for name in ("fits", "foreign", "torn", "double", "missing", "own")}
    make_product_file(paths["fits"], bundle, middle_frame, name="middle")
    make_product_file(paths["double"], bundle, dark_frame, name="middle")
    make_product_file(paths["foreign"], other, middle_frame)
    make_product_file(paths["own"], bundle, middle_frame, name=DARK)
    paths["torn"].write_bytes(paths["fits"].read_bytes()[:-100])
    detector = open_detector(bundle)

    refused = add_products(list(paths.values()), [detector])

    assert detector.products == (*PRODUCTS, "middle")
    assert len(refused) == 5
    for name, text in (("foreign", "made for bundle"), ("torn", "safetensors"), ("double", "another file"),
                       ("missing", "cannot be read"), ("own", "of the bundle itself")):  # fmt: skip
        (told,) = [one for one in refused if str(paths[name]) in one]
        assert text in told
    head = detector._in_force.head
    assert len(add_products([paths["fits"]], [detector])) == 0
    assert detector._in_force.head is head, "a file that has not changed costs nothing"


def test_settings_threshold_is_for_the_product_that_it_names(bundle: Bundle) -> None:
    outside = {"value": 1.25, "bundle_id": bundle.id, "product": BRIGHT}
    dark, bright = product_judges(camera_settings(threshold=outside), open_detector(bundle), nothing_given)
    assert (bright.threshold.value, bright.threshold_source) == (1.25, "settings")
    assert (dark.threshold_source, dark.warnings) == ("budget", ())
    nobodys = camera_settings(threshold={"value": 1.25, "bundle_id": bundle.id})
    for judge in product_judges(nobodys, open_detector(bundle), nothing_given):
        assert judge.threshold_source == "budget"
        assert "no product" in judge.warnings[0]
