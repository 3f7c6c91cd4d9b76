"""Camera health: a live camera over a running, stopped or shaking line is well; each fault is told, once, and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks._scene import Conditions, Scene
from edge.errors import DataError
from edge.health.baseline import Baseline, Learner, read_baseline, write_baseline
from edge.health.camera_health import CameraHealth, Lasting
from edge.health.camera_measures import share_changed, sharpness, take_sample
from edge.health.settings import CameraFault, CameraHealthSettings
from edge.health.static_view import RunningEdges, StaticView

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge.health.camera_measures import Sample

STEP_S = 0.5


class Watched:
    """A camera over a generated line, looked at twice a second."""

    def __init__(self, scene: Scene, **settings: Any) -> None:
        self.scene = scene
        self.health = CameraHealth(CameraHealthSettings(baseline_frames=20, **settings))
        self.told: list[tuple[str, bool]] = []
        self.now = 0.0
        self._rng = np.random.default_rng(3)
        self._last: Sample | None = None

    def watch(self, seconds: float, *, freeze: bool = False, good: bool = True, **fault: float) -> Watched:
        end = self.now + seconds
        while self.now < end:
            self.now += STEP_S * self._rng.uniform(0.5, 1.5)
            if not freeze or self._last is None:
                self._last = take_sample(self.scene.frame(self.now, rng=self._rng, **fault))
            changes = self.health.take(self._last, round(self.now * 1e9), good=good)
            self.told += [(change.fault.value, change.lasting) for change in changes]
        return self

    @property
    def learnt(self) -> bool:
        return self.health.baseline is not None


def line(texture: str = "grain", seed: int = 21, **conditions: Any) -> Watched:
    return Watched(Scene(seed, Conditions(texture=texture, **conditions)))


@pytest.mark.parametrize(
    "conditions",
    [{"texture": "parts"}, {"stop_at": 15.0}, {"speed": 0.0, "noise": 0.6}, {"texture": "plain", "fixtures": False}],
    ids=["runs", "stops", "stands with little noise", "nothing to see"],
)
def test_live_camera_is_well(conditions: dict[str, Any]) -> None:
    one = line(**conditions).watch(40)

    assert one.learnt
    assert one.told == []


@pytest.mark.parametrize(
    ("fault", "injected"),
    [
        ("frozen", {"freeze": True}),
        ("dark", {"gain": 0.2}),
        ("overexposed", {"gain": 5.0}),
        ("blurred", {"blur": 2.5}),
        ("moved", {"shift_x": 24.0, "shift_y": 18.0}),
        ("moved", {"turn": 6.0}),
    ],
)
def test_fault_is_told_once_and_its_end_too(fault: str, injected: dict[str, Any]) -> None:
    one = line("parts").watch(15)
    assert one.learnt

    one.watch(25, **injected)
    assert one.told == [(fault, True)]
    assert one.health.faults == (CameraFault(fault),)
    one.watch(20)

    assert one.told == [(fault, True), (fault, False)]
    assert one.health.faults == ()
    assert one.health.status()["counters"][fault] == 1


def test_short_disturbance_is_not_told() -> None:
    one = (
        line("parts").watch(15).watch(2, gain=0.1).watch(4).watch(2, blur=5.0).watch(5).watch(5, freeze=True).watch(10)
    )

    assert one.told == []


def test_belt_that_stood_while_it_was_learnt_may_start() -> None:
    one = line(start_at=15.0).watch(60)

    assert one.told == []
    assert one.health.status()["unobservable"] == []


def test_camera_without_light_learns_nothing_and_says_so() -> None:
    one = line().watch(20, gain=0.0)

    assert one.told == [("dark", True)]
    assert not one.learnt


def test_backlight_is_learnt_and_what_comes_on_top_is_told() -> None:
    one = line("parts")
    bright = {"lift": 70.0, "gain": 1.2}

    one.watch(15, **bright)
    assert one.learnt
    assert one.told == []
    assert one.health.status()["normal"]["clipped"] > 0.3
    one.watch(8, lift=240.0)

    assert one.told == [("overexposed", True)]


def test_frames_that_were_not_good_teach_nothing() -> None:
    assert not line().watch(20, good=False).learnt


def test_another_resolution_is_learnt_anew() -> None:
    one = line().watch(15)
    small = cv2.resize(one.scene.frame(20.0, rng=np.random.default_rng(0)), (480, 270))

    one.health.take(take_sample(small), 21_000_000_000, good=True)

    assert not one.learnt
    assert one.health.status()["baseline"] == "learning, 1 of 20 frames"


def test_given_figures_stand_for_learnt_ones() -> None:
    one = Watched(Scene(21, Conditions(texture="parts")), brightness=250.0, sharpness=3.0, dark_ratio=0.9)

    one.watch(8)

    assert one.told == [("dark", True)]  # in the dark, sharpness is not looked at
    lit = Watched(Scene(21, Conditions(texture="parts")), sharpness=3.0).watch(8)
    assert lit.told == [("blurred", True)]


def test_check_that_is_not_wanted_is_not_made() -> None:
    one = Watched(Scene(21, Conditions(texture="parts")), checks=["dark"]).watch(15).watch(15, blur=5.0, shift_x=50.0)

    assert one.told == []
    assert one.health.status()["unobservable"] == []


def test_buffers_repeated_in_turn_are_frozen() -> None:
    one = line().watch(15)
    rng = np.random.default_rng(0)
    ring = [take_sample(one.scene.frame(20 + index, rng=rng)) for index in range(3)]
    told = []
    for index in range(40):
        told += one.health.take(ring[index % 3], round((20 + index * STEP_S) * 1e9), good=False)

    assert [change.fault.value for change in told if change.lasting] == ["frozen"]


def test_running_clock_in_a_frozen_picture_does_not_hide_it() -> None:
    one = line().watch(15)
    frozen = one.scene.frame(20.0, rng=np.random.default_rng(0))
    told = []
    for index in range(40):
        cv2.putText(frozen, f"{index:04d}", (20, 40), cv2.FONT_HERSHEY_SIMPLEX, 1, (255, 255, 255), 2)
        told += one.health.take(take_sample(frozen), round((20 + index * STEP_S) * 1e9), good=False)

    assert [change.fault.value for change in told if change.lasting] == ["frozen"]


def test_gap_in_the_frames_counts_for_no_more_than_a_moment() -> None:
    one = line().watch(15)
    frame = take_sample(one.scene.frame(20.0, rng=np.random.default_rng(0), gain=0.1))

    assert one.health.take(frame, round((one.now + 0.1) * 1e9), good=False) == []
    # An hour without frames is no hour in the dark.
    assert one.health.take(frame, 3_620_000_000_000, good=False) == []
    told = one.health.take(frame, 3_621_000_000_000, good=False)
    assert [(change.fault.value, change.lasting) for change in told] == [("dark", True)]


def rates(values: list[float | None], asked: float | None = 25.0) -> list[bool]:
    health = CameraHealth(CameraHealthSettings())
    return [change.lasting for value in values for change in health.rate(value, asked, 5.0)]


def test_low_frame_rate_is_told_and_its_end() -> None:
    assert rates([25, 24.9, 12, 12, 12, 25, 25]) == [True, False]
    assert rates([25, 12, 25, 12, 25]) == []
    assert rates([12] * 9, asked=None) == []
    assert rates([12, None, None, None, None]) == []


@given(
    observed=st.lists(st.tuples(st.sampled_from([True, False, None]), st.floats(0.01, 2)), max_size=60),
    enter_s=st.sampled_from([0.0, 1.0, 5.0]),
    leave_s=st.sampled_from([0.0, 3.0]),
)
def test_condition_lasts_only_after_its_time(
    observed: list[tuple[bool | None, float]], enter_s: float, leave_s: float
) -> None:
    lasting = Lasting(enter_s, leave_s)
    run = 0.0
    for bad, seconds in observed:
        before = lasting.active
        if bad is not None:
            run = run + seconds if bad is not before else 0.0
        changed = lasting.step(bad, seconds)
        assert changed == (lasting.active is not before)
        if changed:
            assert bad is lasting.active
            assert run >= (enter_s if lasting.active else leave_s)
            run = 0.0
        elif bad is not None and bad is not before:
            assert run < (leave_s if before else enter_s)


def test_sharpness_is_of_the_lens_not_of_the_noise_or_the_light() -> None:
    scene = Scene(21, Conditions(texture="parts"))

    def of(**fault: float) -> float:
        found = sharpness(take_sample(scene.frame(3.0, rng=np.random.default_rng(0), **fault)))
        assert found is not None
        return found

    noisy = scene.with_conditions(noise=6.0).frame(3.0, rng=np.random.default_rng(0))
    assert of(gain=0.6) == pytest.approx(of(), rel=0.1)
    assert sharpness(take_sample(noisy)) == pytest.approx(of(), rel=0.2)
    assert of(blur=1.0) > of(blur=2.0) > of(blur=4.0)
    assert of(blur=2.0) < 0.6 * of()
    assert sharpness(take_sample(np.full((200, 300, 3), 99, np.uint8))) is None
    assert sharpness(take_sample(np.zeros((4, 4, 3), np.uint8))) is None


def test_clipped_pixels_do_not_look_frozen() -> None:
    black, white = np.zeros(1000, np.uint8), np.full(1000, 255, np.uint8)
    half = np.where(np.arange(1000) % 2, black, 100).astype(np.uint8)

    assert share_changed(black, black) is None
    assert share_changed(white, white) is None
    assert share_changed(half, half) == 0
    assert share_changed(half, np.where(half == 100, 101, half).astype(np.uint8)) == 1


@given(dx=st.integers(-30, 30), dy=st.integers(-15, 15))
def test_shift_of_still_edges_is_found_to_a_fraction(dx: int, dy: int) -> None:
    rng = np.random.default_rng(0)
    big = cv2.GaussianBlur(rng.random((200, 320), dtype=np.float32), (0, 0), 3)
    big = ((big - big.min()) / (big.max() - big.min()) * 255).astype(np.uint8)

    def still(x: int, y: int) -> np.ndarray:
        edges = RunningEdges()
        for _ in range(3):
            edges.take(big[30 - y : 165 - y, 40 - x : 280 - x])
        return edges.still()

    found = StaticView(still(0, 0)).locate(still(dx, dy))

    assert (found.x, found.y) == (pytest.approx(dx, abs=0.3), pytest.approx(dy, abs=0.3))
    assert found.found > 0.5


def baseline() -> Baseline:
    learner, made = Learner(20), None
    scene, rng = Scene(21, Conditions()), np.random.default_rng(0)
    for index in range(20):
        made = learner.take(take_sample(scene.frame(index, rng=rng)))
    assert made is not None
    return made


def test_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = baseline()
    path = tmp_path / "health" / "cam.npz"
    assert read_baseline(path) is None

    write_baseline(path, made)

    found = read_baseline(path)
    assert found is not None
    np.testing.assert_array_equal(found.still, made.still)
    assert (found.frame_shape, found.brightness, found.clipped) == (made.frame_shape, made.brightness, made.clipped)
    assert (found.sharpness, found.edges_always) == (made.sharpness, made.edges_always)
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", lambda content: content[:200], lambda _: b"x" * 500, lambda content: content[:-30]],
)
def test_damaged_baseline_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "cam.npz"
    write_baseline(path, baseline())
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(DataError, match=r"cam\.npz: the camera's baseline is damaged"):
        read_baseline(path)


def test_veto_of_a_check_that_is_not_made_is_refused() -> None:
    with pytest.raises(ValidationError, match="not_judged_when names frozen"):
        CameraHealthSettings(checks=("dark",), not_judged_when=("frozen",))  # type: ignore[arg-type]  # as in a file
