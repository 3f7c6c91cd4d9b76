"""The benchmark of a drifting line: its streams are what it says, and it would show a budget that breaks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks import _line_box, line_drift
from benchmarks._drifting_line import GROWING, Lamp, Light, Pool, growing, growth, stream
from edge.adaptation.look import PLAIN, Look
from edge.adaptation.measure import joined, measure_canvas
from edge.adaptation.moments import Reference
from edge.adaptation.settings import AdaptationSettings
from edge.bundle import Pooling
from edge.frames import Prediction
from trainer.data.texture_factory import TextureSubclass

if TYPE_CHECKING:
    from edge.frames import Frame

SIDE = 48


def flat(level: int, count: int) -> np.ndarray:
    """Pictures of noise about a level."""
    rng = np.random.default_rng(level)
    return np.clip(rng.normal(level, 12, (count, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def marked(level: int, count: int) -> np.ndarray:
    pictures = flat(level, count)
    pictures[:, 4:12, 4:12] = 255
    return pictures


@pytest.fixture
def pools() -> list[Pool]:
    return [Pool(flat(at, 8), flat(at, 200), flat(at, 60), marked(at, 10)) for at in (110, 130)]


def test_a_stream_is_the_same_for_the_same_seed_and_shows_what_it_says(pools: list[Pool]) -> None:
    first, again, other = (list(stream(pools, seed, frames=400, defects=0.1)) for seed in (3, 3, 4))
    assert all((a.image == b.image).all() for a, b in zip(first, again, strict=True))
    assert any((a.image != b.image).any() for a, b in zip(first, other, strict=True))
    products = [one.product for one in first]
    assert products == sorted(products)
    assert 160 <= products.index(1) <= 240
    assert 20 <= sum(one.defect is not None for one in first) <= 65
    assert (first[0].age, first[-1].age) == (0, 1)
    assert first[-1].image.mean() < 0.85 * first[0].image.mean() + 15
    # Light and noise are of each frame alone, though pictures come again.
    assert len({one.image.tobytes() for one in first}) == 400


def test_the_light_of_age_0_is_that_of_the_calibration() -> None:
    gains, offset = Lamp().at(0)
    assert gains.tolist() == [1, 1, 1]
    assert offset == 0
    light = Light(np.random.default_rng(0))
    shown = np.mean([light.show(flat(110, 1)[0], gains, offset).mean() for _ in range(50)])
    assert shown == pytest.approx(110, abs=1)
    blue, green, red = Lamp(left=0.6, cooling=0.1, stray=5).at(1)[0]
    assert (blue < green < red, green) == (True, pytest.approx(0.6))


@pytest.mark.parametrize("name", GROWING)
def test_a_defect_grows_from_nothing(name: str) -> None:
    picture = flat(120, 1)[0]
    assert (growing(name, picture, 0) == picture).all()
    change = [np.abs(growing(name, picture, strength).astype(int) - picture).sum() for strength in (0.1, 0.5, 1.0)]
    assert 0 < change[0] < change[1] < change[2]


def test_a_pool_has_no_picture_twice() -> None:
    pool = Pool.draw(TextureSubclass("metal", 1, 5, 64), train=3, calibration=3, good=3, defective=3)
    every = [one.tobytes() for part in (pool.train, pool.calibration, pool.good, pool.defective) for one in part]
    assert len(set(every)) == 12


class Brightness:
    """A detector of bright squares, which other light fools: the brightest patch beyond a level of its own."""

    def __init__(self, level: int) -> None:
        canvas = flat(level, 1)[0][None]
        self.reference = Reference((measure_canvas(canvas),), (0.3,), ("",))
        self.bundle = SimpleNamespace(manifest=SimpleNamespace(pooling=Pooling(cells=1)), path=None)
        self.status = SimpleNamespace(precision=None)
        self.level = level

    def predict(self, frame: Frame, look: Look = PLAIN) -> Prediction:
        tiles = np.ascontiguousarray(frame.image[None])
        moments = joined([measure_canvas(tiles)]) if look.measure else None
        if look.correction is not None:
            look.correction.canvas(tiles)
        patches = tiles[0].reshape(SIDE // 8, 8, SIDE // 8, 8, 3).mean((1, 3, 4), dtype=np.float32)
        return Prediction(np.abs(patches - self.level), frame, 0, 0, moments_version=look.version, moments=moments)


@pytest.fixture
def product(pools: list[Pool], monkeypatch: pytest.MonkeyPatch) -> line_drift.Product:
    detectors: list[Any] = [Brightness(110), Brightness(130)]
    monkeypatch.setattr(_line_box, "read_reference", lambda bundle, _: next(
        one.reference for one in detectors if one.bundle is bundle
    ))  # fmt: skip
    monkeypatch.setattr(
        line_drift, "make_bundle", lambda _method, trains, _folder: detectors[int(trains[0].mean() > 120)]
    )
    monkeypatch.setattr(line_drift, "open_detector", lambda bundle: bundle)
    return line_drift.prepare("memory", pools, Path(), 0)


def test_a_line_that_is_followed_keeps_its_budget_and_one_that_is_not_breaks_it(
    product: line_drift.Product, pools: list[Pool]
) -> None:
    # As fast for its frames as the benchmark's own half-life is for its longer streams.
    quick = AdaptationSettings(half_life=5, every_frames=3, bound=30)
    with_it = [line_drift.play(product, pools, 1, frames=900, adaptation=quick)]
    without = [line_drift.play(product, pools, 1, frames=900, adaptation=None)]
    figures = {goal.name.removeprefix("memory: "): goal for goal in line_drift.goals_of("memory", with_it, without)}
    kept = figures["false alarms per frame, with adaptation"]
    broken = figures["false alarms per frame, without"]
    assert kept.value < 0.05
    assert broken.value > 0.5
    assert broken.met
    assert with_it[0].good > 850
    assert 150 < without[0].good < 190
    assert figures["defects found in the lab's light"].value == 1
    assert figures["points of defects found in the lab's light and lost on the line, with adaptation"].value == 0


def test_goals_would_be_missed(pools: list[Pool]) -> None:
    bad = line_drift.Tally(good=1000, false=50, defects=100, found=60, lab=90)
    calm = line_drift.Tally(good=1000, false=5, defects=100, found=90, lab=90)
    assert [goal.met for goal in line_drift.goals_of("memory", [bad], [calm])[:3]] == [False, False, False]
    assert [goal.met for goal in line_drift.goals_of("memory", [calm], [bad])[:3]] == [True, True, True]


def test_a_growing_defect_is_found_and_drift_is_told(product: line_drift.Product, pools: list[Pool]) -> None:
    settings = AdaptationSettings(half_life=3, every_frames=2, drift=1, bound=3)
    plain, adapted = (
        line_drift.grow(product, pools[0], "tint", 0, frames=600, adaptation=one) for one in (None, settings)
    )
    assert plain.found_at < 0.7
    assert plain.told_at == plain.bound_at > 1
    assert adapted.found_at > plain.found_at
    assert adapted.told_at < adapted.found_at
    assert adapted.shift <= 3


def test_the_interval_holds_the_mean_and_narrows_with_streams() -> None:
    low, high = line_drift.interval([0.0, 0.02] * 4)
    assert low < 0.01 < high
    narrow = line_drift.interval([0.0, 0.02] * 40)
    assert low < narrow[0] < 0.01 < narrow[1] < high


def test_stream_of_growth_begins_with_nothing(pools: list[Pool]) -> None:
    shown = list(growth(pools[0], "stain", 0, frames=50))
    assert shown[0].image[SIDE // 2, SIDE // 2].mean() > shown[-1].image[SIDE // 2, SIDE // 2].mean() + 20
