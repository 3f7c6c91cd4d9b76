"""Thresholds given at run time: kept whole or not at all, chosen in a fixed order, and given to whoever judges."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.alerts.command_messages import ThresholdCommand
from edge.alerts.message import NoticeKind, build
from edge.bundle import CalibrationScores
from edge.errors import StoreError
from edge.judgement.given_thresholds import GivenThresholds
from edge.judgement.threshold import ExternalThreshold, RunTimeThreshold, choose_threshold
from edge.judgement.threshold_commands import MAX_WAITING, ThresholdCommands
from tests.edge.test_verdicts import H, W, calibration, judge, prediction

if TYPE_CHECKING:
    from pathlib import Path

    from edge.judgement.verdicts import Judge

ONE, OTHER = "a" * 64, "b" * 64


class Camera:
    """A camera's worker as far as thresholds go."""

    def __init__(self, name: str = "cam", **judging: Any) -> None:
        self.name = name
        self.judge: Judge = judge(bundle_id=ONE, **judging)

    @property
    def judges(self) -> tuple[Judge, ...]:
        return (self.judge,)

    def set_threshold(self, given: RunTimeThreshold | None, product: str = "") -> Judge:
        assert product == self.judge.product
        self.judge = self.judge.with_threshold(given)
        return self.judge


class Bench:
    def __init__(self, path: Path, *cameras: Camera) -> None:
        self.path = path
        self.cameras = list(cameras)
        self.notices: list[tuple[NoticeKind, str]] = []
        self.kept = GivenThresholds(path)
        self.commands = ThresholdCommands(
            self.kept, cameras=self.cameras, notify=lambda kind, _s, text, **_: self.notices.append((kind, text))
        )

    def give(self, value: float | None, **changes: Any) -> dict[str, Any]:
        fields = {"camera": "cam", "value": value, "bundle_id": ONE, "memory_version": 0, **changes}
        return self.commands.obey(build(ThresholdCommand, **fields))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "thresholds.json", Camera())


def test_given_threshold_is_kept_before_it_holds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Camera, "set_threshold", lambda self, _, __: seen.append(bench.path.read_text()) or self.judge)

    bench.give(7.5)

    (text,) = seen
    assert json.loads(text)["cameras"]["cam"]["value"] == 7.5


def test_threshold_that_cannot_be_kept_does_not_hold(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    bench = Bench(tmp_path / "file" / "thresholds.json", Camera())
    before = bench.cameras[0].judge

    answer = bench.give(7.5)

    assert not answer["ok"]
    assert "cannot be kept" in answer["reason"]
    assert bench.cameras[0].judge is before
    with pytest.raises(StoreError):
        bench.kept.put("cam", RunTimeThreshold(value=1, bundle_id=ONE))
    assert bench.kept.of("cam") is None


def test_kept_thresholds_are_read_again(bench: Bench) -> None:
    bench.give(7.5)
    bench.give(None)

    again = GivenThresholds(bench.path)

    assert again.damage == ""
    assert again.of("cam") == bench.kept.of("cam")
    found = again.of("cam")
    assert found is not None
    assert found.value is None
    assert found.scope == bench.cameras[0].judge.scope
    assert again.of("other") is None


@given(content=st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_file_is_read_or_put_aside(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("state") / "thresholds.json"
    path.write_bytes(content)

    found = GivenThresholds(path)

    assert found.all() == {}
    assert str(path) in found.damage
    assert not path.exists()
    (aside,) = path.parent.iterdir()
    assert aside.read_bytes() == content
    found.put("cam", RunTimeThreshold(value=1, bundle_id=ONE))
    assert GivenThresholds(path).all() == found.all()


def test_look_gives_a_new_judge_what_was_given_and_tells_once_what_does_not_hold(bench: Bench) -> None:
    (camera,) = bench.cameras
    bench.give(7.5)
    bench.notices.clear()
    camera.judge = judge(bundle_id=ONE)  # as after a reload

    bench.commands.look()
    assert camera.judge.threshold.value == 7.5
    assert bench.notices == []

    camera.judge = judge(bundle_id=OTHER)  # another bundle
    for _ in range(3):
        bench.commands.look()
    ((kind, text),) = bench.notices
    assert kind is NoticeKind.THRESHOLD_IGNORED
    assert text.startswith("camera cam: threshold given at run time ignored: it was set for bundle aaaaaaaaaaaa")
    assert bench.commands.status()["cameras"]["cam"]["in_force"] is False

    camera.judge = judge(bundle_id=ONE)  # taken back
    bench.commands.look()
    assert camera.judge.threshold.value == 7.5
    assert bench.commands.status()["cameras"]["cam"]["in_force"] is True


def test_flood_of_commands_is_refused_not_queued(bench: Bench) -> None:
    command = build(ThresholdCommand, camera="cam", value=1.0, bundle_id=ONE, memory_version=0, id="x")

    answers = [bench.commands.command(command) for _ in range(MAX_WAITING + 1)]

    assert answers[:-1] == [None] * MAX_WAITING
    assert answers[-1] is not None
    assert (answers[-1]["ok"], answers[-1]["id"]) == (False, "x")


RUN_TIMES = st.none() | st.builds(
    RunTimeThreshold,
    value=st.none() | st.floats(-5, 5),
    bundle_id=st.sampled_from([ONE, OTHER]),
    memory_version=st.integers(0, 2),
    scope=st.sampled_from(["", "s"]),
)
EXTERNALS = st.none() | st.builds(
    ExternalThreshold,
    value=st.floats(-5, 5),
    bundle_id=st.sampled_from([ONE, OTHER]),
    memory_version=st.integers(0, 2),
)


@given(run_time=RUN_TIMES, external=EXTERNALS, version=st.integers(0, 2), scope=st.sampled_from(["", "s"]))
def test_threshold_is_never_used_where_it_was_not_chosen_for(
    run_time: RunTimeThreshold | None, external: ExternalThreshold | None, version: int, scope: str
) -> None:
    chosen = choose_threshold(run_time=run_time, external=external, bundle_id=ONE, memory_version=version, scope=scope)

    fits = run_time is not None and (run_time.bundle_id, run_time.memory_version, run_time.scope) == (
        ONE, version, scope
    )  # fmt: skip
    falls = external is not None and (external.bundle_id, external.memory_version) == (ONE, version)
    sets = run_time is not None and run_time.value is not None
    wanted = ("run time" if sets else "budget") if fits else "settings" if falls else "budget"
    assert chosen.source == wanted
    assert chosen.value == (run_time.value if fits and run_time else external.value if falls and external else None)
    given_but_unused = (sets and not fits) or (external is not None and not falls and not fits)
    assert bool(chosen.notice) == given_but_unused


def test_judge_keeps_its_good_scores_and_view_under_another_threshold() -> None:
    mask = np.zeros((H, W), bool)
    mask[:, :5] = True
    first = judge(mask=mask, bundle_id=ONE, enter_quantile=0.5)
    first.judge(prediction(np.zeros((H, W))))
    given = RunTimeThreshold(value=0.25, bundle_id=ONE, scope=first.scope)

    second = first.with_threshold(given)

    assert second.good_scores is first.good_scores
    assert second.mask is first.mask
    assert second.threshold.value == 0.25
    # Levels keep their order around whatever is given.
    assert second.leave_level <= second.threshold.value <= second.enter_level
    assert second.judge(prediction(np.full((H, W), 0.25))).regions != ()
    assert second.with_threshold(None).threshold == first.threshold
    recalibrated = second.recalibrated(calibration(seed=2), memory_version=1)
    assert "set for memory version 0, not 1" in recalibrated.notice
    assert recalibrated.threshold_source == "budget"


def test_thresholds_set_while_frames_are_judged_are_met_whole() -> None:
    """Each verdict has one of the thresholds given, and levels around it, whoever sets them meanwhile."""
    one = judge(
        bundle_id=ONE,
        calibration=CalibrationScores(
            np.linspace(0, 1, 50, dtype=np.float32), np.zeros((50, H, W), np.float16), np.arange(50).astype(str)
        ),
    )
    holder = [one]
    done = threading.Event()

    def set_many() -> None:
        for index in range(200):
            given = RunTimeThreshold(value=float(index % 7 + 1), bundle_id=ONE, scope=one.scope)
            holder[0] = holder[0].with_threshold(given)
        done.set()

    setter = threading.Thread(target=set_many)
    setter.start()
    while not done.is_set():
        present = holder[0]
        verdict = present.judge(prediction(np.full((H, W), 3.5)))
        assert (verdict.decision.value == "NOK") == (verdict.threshold <= 3.5)
        assert present.leave_level <= verdict.threshold <= present.enter_level
    setter.join()
