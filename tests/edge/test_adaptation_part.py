"""Who may learn when, what is told once, and what commands do: the owner of drift and the part of the box around it."""

from __future__ import annotations

import dataclasses
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edge.adaptation.follower import Follower, Phase
from edge.adaptation.moments import IMAGE, Moments, Reference
from edge.adaptation.owner import UNKNOWN_WINDOW, DriftOwner, FollowedCamera
from edge.adaptation.part import LOOK_S, SAVE_EVERY_S, Adaptation
from edge.adaptation.settings import AdaptationSettings
from edge.adaptation.store import AdaptationStore
from edge.alerts.command_messages import RecipeCommand, ResetCommand
from edge.alerts.message import NoticeKind, Severity
from edge.bundle import Precision
from edge.frames import Decision, Frame, JudgedFrame, Prediction, Verdict
from edge.inference.detector import Detector
from edge.judgement.threshold_versions import ThresholdVersions
from tests.edge.tiny_bundle import make_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle

NOW = datetime(2030, 1, 1, tzinfo=timezone.utc)
QUICK = AdaptationSettings(
    half_life=2, every_frames=1, least=0.001, settle_frames=3, window=4, freeze_rate=0.5, thaw_rate=0.1, drift=2.0,
    bound=4.0,
)  # fmt: skip
NAMES = ("blue", "red")


def moments(level: float) -> Moments:
    return Moments({IMAGE: np.full(3, level, np.float32)}, {IMAGE: np.full(3, 10, np.float32)})


REFERENCE = Reference((moments(100),), (1.0,), ("",))
ROUTED = Reference((moments(100), moments(160)), (1.0, 1.0), NAMES)


def judged(
    follower: Follower, level: float = 100, *, nok: bool = False, route: list[float] | None = None, name: str = "cam"
) -> JudgedFrame:
    """A frame that shows a grey level, seen as its follower wants it."""
    frame = Frame(np.zeros((4, 4, 3), np.uint8), name, 0, time.monotonic_ns(), NOW)
    rows = None if route is None else np.array(route, np.float32)
    look = (None if rows is None else follower.rerouted(rows)) or follower.look()
    prediction = Prediction(
        np.zeros((1, 1), np.float32), frame, 0, 0, moments_version=look.version, moments=moments(level), route=rows
    )
    refusal = follower.refusal(rows)
    decision = Decision.NOT_JUDGED if refusal else Decision.NOK if nok else Decision.OK
    verdict = Verdict(decision, 0.0, 1.0, 0.5, name, 0, 0, NOW, moments_version=look.version)
    return JudgedFrame(frame, prediction, verdict, (), alarmed=nok)


def a_camera(reference: Reference = REFERENCE, name: str = "cam") -> FollowedCamera:
    follower = Follower(reference, QUICK)
    return FollowedCamera(name, follower, bundle="ab/float32", subclasses=reference.subclasses)


def show(camera: FollowedCamera, count: int, level: float = 100, **how: Any) -> None:
    for _ in range(count):
        camera.observe(judged(camera.follower, level, **how))


def kinds(camera: FollowedCamera) -> list[tuple[str, Severity]]:
    return [(one.kind.value, one.severity) for one in camera.changes()]


def test_freezing_is_told_once_with_its_figures_and_so_is_thawing() -> None:
    camera = a_camera()
    show(camera, 4)
    assert kinds(camera) == []
    show(camera, 2, nok=True)
    (frozen,) = camera.changes()
    assert (frozen.kind, frozen.severity) == (NoticeKind.ADAPTATION_FROZEN, Severity.ALARM)
    assert frozen.figures["alarm_rate"] == 0.5
    assert frozen.figures["camera"] == "cam"
    assert kinds(camera) == []
    assert any("frozen" in text for text in camera.warnings())
    show(camera, 4)
    assert kinds(camera) == [("adaptation.thawed", Severity.INFO)]
    assert camera.warnings() == []


def test_drift_and_bound_are_told_when_they_begin_and_when_they_end() -> None:
    camera = a_camera()
    for level in range(100, 131):
        show(camera, 3, level)
    assert kinds(camera) == [("adaptation.drift", Severity.WARNING)]
    for level in range(131, 150):
        show(camera, 3, level)
    assert kinds(camera) == [("adaptation.bound", Severity.ALARM)]
    assert kinds(camera) == []
    for level in range(138, 100, -1):
        show(camera, 3, level)
    assert kinds(camera) == [("adaptation.drift", Severity.INFO), ("adaptation.bound", Severity.INFO)]


def test_reset_ends_freezing_without_a_word_of_thawing() -> None:
    camera = a_camera()
    show(camera, 4, nok=True)
    assert kinds(camera) == [("adaptation.frozen", Severity.ALARM)]
    camera.follower.reset()
    assert kinds(camera) == []


def test_unknown_product_is_told_when_it_lasts_not_for_one_frame() -> None:
    camera = a_camera(ROUTED)
    for _ in range(5):
        show(camera, UNKNOWN_WINDOW - 1, route=[0.5, -0.5])
        show(camera, 1, route=[-0.5, -0.5])
    assert kinds(camera) == []
    assert not camera.unknown
    show(camera, 5, route=[-0.5, -0.5])
    (change,) = camera.changes()
    assert (change.kind, change.severity) == (NoticeKind.PRODUCT_UNKNOWN, Severity.ALARM)
    assert "like none of blue, red" in change.text
    assert camera.hold == "it shows an unknown product"
    show(camera, UNKNOWN_WINDOW, route=[0.5, -0.5])
    assert kinds(camera) == [("product.unknown", Severity.INFO)]
    assert not camera.hold


def test_memory_learns_from_a_camera_only_while_its_moments_follow() -> None:
    owner, camera = DriftOwner(), a_camera()
    other = judged(camera.follower, name="other")
    frame = judged(camera.follower)
    assert owner.look_at(other) is not None, "a camera that does not follow teaches as ever"
    owner.put(camera)
    assert owner.look_at(frame) is camera.follower.look()
    show(camera, 4, nok=True)
    assert camera.follower.phase is Phase.FROZEN
    assert owner.look_at(judged(camera.follower)) is None
    assert owner.hold("cam") == "its moments are frozen"
    assert not owner.hold_switch()
    camera.follower.reset()
    assert owner.look_at(judged(camera.follower)) is None
    assert owner.hold_switch() == "moments of cam settle"
    show(camera, 3)
    assert owner.look_at(judged(camera.follower)) is camera.follower.look()
    assert not owner.hold_switch()


def test_frame_seen_by_former_moments_teaches_nobody() -> None:
    owner, camera = DriftOwner(), a_camera()
    owner.put(camera)
    before = judged(camera.follower, 105)
    camera.observe(before)
    assert camera.follower.version == 1
    assert owner.look_at(before) is None
    unjudged = judged(camera.follower)
    verdict = dataclasses.replace(unjudged.verdict, decision=Decision.NOT_JUDGED)
    assert owner.look_at(dataclasses.replace(unjudged, verdict=verdict)) is None


class Bench:
    """An adaptation part without threads: looks and commands are called."""

    def __init__(self, folder: Path) -> None:
        self.notices: list[tuple[str, dict[str, Any]]] = []
        self.now = 0.0
        self.store = AdaptationStore(folder / "adaptation.db")
        self.part = Adaptation(
            self.store,
            versions=ThresholdVersions(folder / "versions.json"),
            notify=lambda kind, _severity, _text, **figures: self.notices.append((kind.value, figures)),
            clock=lambda: self.now,
        )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "plain": make_tiny_bundle(folder / "plain"),
        "moments": make_tiny_bundle(folder / "moments", moments=True),
    }


@pytest.fixture(scope="module")
def detectors(bundles: dict[str, Bundle]) -> dict[str, Detector]:
    return {name: Detector.open(bundle, precision=Precision.FLOAT32, threads=1) for name, bundle in bundles.items()}


def of_bundle(detector: Detector, follower: Follower) -> JudgedFrame:
    """A frame of the bundle, through its real detector."""
    canvas = np.full((96, 96, 3), 110, np.uint8)
    canvas[::2] += 20
    prediction = detector.predict(Frame(canvas, "cam", 0, 0, NOW), follower.look())
    verdict = Verdict(Decision.OK, 0.0, 1.0, 0.5, "cam", 0, 0, NOW, moments_version=prediction.moments_version)
    return JudgedFrame(prediction.frame, prediction, verdict)


FAR = QUICK.model_copy(update={"bound": 1000.0, "drift": 900.0})


def test_camera_goes_on_after_a_restart_where_it_was(tmp_path: Path, detectors: dict[str, Detector]) -> None:
    bench = Bench(tmp_path)
    camera = bench.part.follow("cam", FAR, detectors["moments"])
    assert camera is not None
    for _ in range(6):
        bench.part.observe(of_bundle(detectors["moments"], camera.follower))
    version, shift = camera.follower.version, camera.follower.shift
    assert version > 1
    bench.part.look()
    for number in range(1, version + 1):
        assert bench.store.moments("cam", number) is not None
    bench.part.start()
    assert bench.part.stop(10)

    again = Bench(tmp_path).part.follow("cam", FAR, detectors["moments"])
    assert again is not None
    assert again.follower.version == version
    assert again.follower.shift == pytest.approx(shift)
    assert again.follower.look().version == version


def test_what_was_learned_since_the_last_snapshot_is_kept_now_and_then(
    tmp_path: Path, detectors: dict[str, Detector]
) -> None:
    bench = Bench(tmp_path)
    camera = bench.part.follow("cam", FAR.model_copy(update={"every_frames": 1000}), detectors["moments"])
    assert camera is not None
    bench.part.look()
    bench.part.observe(of_bundle(detectors["moments"], camera.follower))
    saved = bench.part.status()["counters"]["saved"]
    bench.part.look()
    assert bench.part.status()["counters"]["saved"] == saved
    bench.now += SAVE_EVERY_S + LOOK_S
    bench.part.look()
    assert bench.part.status()["counters"]["saved"] == saved + 1


def test_changed_camera_of_the_same_bundle_keeps_what_it_learned(
    tmp_path: Path, detectors: dict[str, Detector]
) -> None:
    bench = Bench(tmp_path)
    first = bench.part.follow("cam", FAR, detectors["moments"])
    assert first is not None
    for _ in range(3):
        bench.part.observe(of_bundle(detectors["moments"], first.follower))
    second = bench.part.follow("cam", FAR.model_copy(update={"drift": 800.0}), detectors["moments"])
    assert second is not None
    assert second.follower.version == first.follower.version > 0
    first.observe(of_bundle(detectors["moments"], first.follower))
    assert first.accepted == second.accepted, "the worker that ends has no say any more"
    assert bench.part.follow("cam", None, detectors["moments"]) is None
    assert bench.part.status() == {}


def test_bundle_without_moments_is_judged_as_it_is_and_that_is_said(
    tmp_path: Path, detectors: dict[str, Detector]
) -> None:
    bench = Bench(tmp_path)
    assert bench.part.follow("cam", QUICK, detectors["plain"]) is None
    assert bench.part.warnings() == ["cam: adaptation is off: its bundle was packed without moments; export it again"]
    refused = bench.part.obey(ResetCommand(camera="cam"))
    assert not refused["ok"]
    assert "packed without moments" in refused["reason"]
    bench.part.keep_only([])
    assert bench.part.warnings() == []


def test_commands_settle_all_that_are_meant_or_none(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    one, routed = a_camera(), a_camera(ROUTED, "routed")
    bench.part.owner.put(one)
    bench.part.owner.put(routed)
    refused = bench.part.obey(RecipeCommand(recipe="green"))
    assert refused["reason"] == "camera routed: its bundle has no sub-class 'green'; it has: blue, red"
    assert one.follower.phase is Phase.FOLLOWING, "nothing is changed"
    assert not bench.part.obey(ResetCommand(camera="nobody"))["ok"]

    done = bench.part.obey(RecipeCommand(recipe="red"))
    assert (done["ok"], done["count"]) == (True, 2)
    assert (one.follower.recipe, routed.follower.recipe) == ("red", "red")
    assert one.follower.phase is routed.follower.phase is Phase.SETTLING
    assert routed.follower.refusal(np.array([0.9, 0.1], np.float32)) == "it shows blue, the recipe is red"
    assert [(kind, figures["camera"]) for kind, figures in bench.notices] == [
        ("adaptation.reset", "cam"), ("adaptation.reset", "routed"),
    ]  # fmt: skip
    # On disk when it is answered: a box that is killed now settles after its start.
    kept = bench.store.read("routed", "ab/float32").state
    assert Follower(ROUTED, QUICK, kept).phase is Phase.SETTLING

    assert bench.part.obey(ResetCommand(camera="routed"))["ok"]
    assert routed.follower.recipe == "red"
    assert bench.part.obey(RecipeCommand(camera="routed", recipe=None))["ok"]
    assert routed.follower.recipe == ""
    assert routed.follower.refusal(np.array([0.9, 0.1], np.float32)) == ""


def test_disk_that_refuses_is_told_and_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    bench = Bench(tmp_path / "file")
    camera = a_camera()
    bench.part.owner.put(camera)
    answer = bench.part.obey(ResetCommand())
    assert not answer["ok"]
    assert "a restart would undo it" in answer["reason"]
    show(camera, 5)
    bench.part.look()
    assert camera.follower.phase is Phase.FOLLOWING
    assert any("cannot be kept" in text for text in bench.part.warnings())


def test_state_of_another_kind_is_told_and_begun_again(tmp_path: Path, detectors: dict[str, Detector]) -> None:
    bench = Bench(tmp_path)
    bundle = f"{detectors['moments'].bundle.id}/float32"
    bench.store.write("cam", bundle, b"no state", 4, last=True)
    camera = bench.part.follow("cam", QUICK, detectors["moments"])
    assert camera is not None
    assert camera.follower.version == 4
    assert camera.follower.look().version == 0
    assert [kind for kind, _ in bench.notices] == ["adaptation.damaged"]


def test_reset_of_several_sub_classes_notes_a_snapshot_of_each() -> None:
    camera = a_camera(ROUTED)
    camera.follower.reset()
    camera.note_snapshot()
    assert [(one.snapshot.version, one.subclass) for one in camera.made()] == [(1, "blue"), (2, "red")]


def test_frames_of_the_bundle_before_teach_nothing_until_the_switch(
    tmp_path: Path, detectors: dict[str, Detector], tmp_path_factory: pytest.TempPathFactory
) -> None:
    bench = Bench(tmp_path)
    bundle = make_tiny_bundle(tmp_path_factory.mktemp("newer") / "newer", moments=True, product="newer")
    newer = Detector.open(bundle, precision=Precision.FLOAT32, threads=1)
    first = bench.part.follow("cam", FAR, detectors["moments"])
    assert first is not None
    late = of_bundle(detectors["moments"], first.follower)
    assert late.verdict.moments_version == 0
    second = bench.part.follow("cam", FAR, newer)
    assert second is not None
    bench.part.observe(late)
    assert second.accepted == 0
    bench.part.observe(of_bundle(newer, second.follower))
    assert second.accepted == 1
