"""The gate: noise, scaled rows and inflated counts are refused, defect rows too, honest boxes however skewed pass."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.aggregator.canaries import Canaries
from deploy.aggregator.gates import Examination, GateLimits, examine, examine_all
from deploy.aggregator.influence import Trial
from edge.errors import DataError
from edge.memory.bank import MemoryBank
from tests.deploy.fleet_values import EMBEDDING_ID, update

if TYPE_CHECKING:
    from edge.federation.update import MemoryUpdate

WIDTH, RANK = 24, 4
THRESHOLD = 2.0


class World:
    """Good patches lie in a low-dimensional sheet for each product; defects stick out of it, each type its own way."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self._sheets = {name: self.rng.standard_normal((RANK, WIDTH)) for name in ("part", "other")}
        self._places = {"part": np.zeros(WIDTH), "other": 6 * self.rng.standard_normal(WIDTH) / np.sqrt(WIDTH)}
        self._ways = self.rng.standard_normal((5, WIDTH)) / np.sqrt(WIDTH)

    def good(self, count: int, product: str = "part", light: float = 0.0) -> np.ndarray:
        inside = self.rng.standard_normal((count, RANK)) @ self._sheets[product]
        noise = 0.1 * self.rng.standard_normal((count, WIDTH))
        return (self._places[product] + inside + noise + light * np.eye(WIDTH)[0]).astype(np.float32)

    def defects(self, count: int, types: tuple[int, ...], size: float = 5.0) -> np.ndarray:
        way = self._ways[self.rng.choice(types, count)]
        return (self.good(count) + size * way + 0.05 * self.rng.standard_normal((count, WIDTH))).astype(np.float32)

    def honest(self, number: int, product: str = "part", light: float = 0.0) -> MemoryUpdate:
        rows = self.good(200, product, light)
        return update(rows, box=f"site/box{number}", product=product, nonce=f"{number:032x}")

    def poison(self, number: int, types: tuple[int, ...] = (3, 4), share: float = 1.0) -> MemoryUpdate:
        rows = np.concatenate([self.defects(round(200 * share), types), self.good(200 - round(200 * share))])
        return update(rows, box=f"site/box{number}", nonce=f"{number:032x}")

    def reference(self) -> MemoryBank:
        rows = self.good(1500)
        return MemoryBank(rows, np.ones(1500, np.float32), np.ones(1500, np.float32))

    def canaries(self, **changes: Any) -> Canaries:
        types = changes.pop("types", (0, 1, 2))
        made = Canaries(EMBEDDING_ID, "part", self.defects(300, types), self.good(500), THRESHOLD)
        return replace(made, **changes)


def examined(one: MemoryUpdate, world: World, *, peers: int = 5, **changes: Any) -> Examination:
    others = changes.pop("others", [world.honest(100 + number) for number in range(peers)])
    given_ = {"reference": world.reference(), "canaries": world.canaries(), **changes}
    return examine(one, peers=others, **given_)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("product", "light"), [("part", 0.0), ("part", 1.2), ("other", 0.0), ("other", 1.0)])
def test_honest_boxes_pass_however_skewed(seed: int, product: str, light: float) -> None:
    world = World(seed)
    found = examined(world.honest(0, product, light), world)
    assert found.reasons == ()
    assert found.accepted
    assert found.figures["canaries"] > 200


def scaled(one: MemoryUpdate, _rng: np.random.Generator) -> MemoryUpdate:
    return replace(one, rows=one.rows * 100)


def noise(one: MemoryUpdate, rng: np.random.Generator) -> MemoryUpdate:
    return replace(one, rows=(10 * rng.standard_normal(one.rows.shape)).astype(np.float32))


def counted(one: MemoryUpdate, _rng: np.random.Generator) -> MemoryUpdate:
    return replace(one, support=one.support * 1e4)


def infinite(one: MemoryUpdate, _rng: np.random.Generator) -> MemoryUpdate:
    return replace(one, rows=np.where(np.eye(*one.rows.shape) > 0, np.float32(np.inf), one.rows))


def shifted(one: MemoryUpdate, _rng: np.random.Generator) -> MemoryUpdate:
    return replace(one, rows=one.rows + np.float32(30))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (scaled, "spread is"),
        (scaled, "distance is"),
        (scaled, "spread_to_peers is"),
        (noise, "spread is"),
        (counted, "per_frame_to_peers is"),
        (infinite, "not finite"),
        (shifted, "distance is"),
    ],
)
def test_spoilt_updates_are_refused(spoil: Any, reason: str) -> None:
    world = World()
    found = examined(spoil(world.honest(0), world.rng), world)
    assert not found.accepted
    assert any(reason in sentence for sentence in found.reasons)
    assert all(np.isfinite(value) for value in found.figures.values())


def test_noise_of_the_right_scale_is_refused_by_its_grain() -> None:
    rng = np.random.default_rng(0)
    surface = (rng.standard_normal((200, 8)) @ rng.standard_normal((8, 150))).astype(np.float32)
    drawn = (surface.mean(0) + surface.std(0) * rng.standard_normal(surface.shape)).astype(np.float32)
    bank = MemoryBank(surface, np.ones(200, np.float32), np.ones(200, np.float32))
    assert examine(update(surface), reference=bank, canaries=None, peers=[]).accepted
    (reason,) = examine(update(drawn), reference=bank, canaries=None, peers=[]).reasons
    assert "grain is" in reason


@pytest.mark.parametrize("spoil", [scaled, noise, counted])
def test_spoilt_updates_are_refused_by_peers_alone_even_if_two_of_seven_collude(spoil: Any) -> None:
    world = World()
    pool = [world.honest(number) for number in range(7)]
    pool[:2] = [spoil(one, world.rng) for one in pool[:2]]
    found = examine_all(pool, reference=None, canaries=None)
    assert [one.accepted for one in found] == [False, False, True, True, True, True, True]


def test_too_few_peers_say_nothing() -> None:
    world = World()
    one = counted(world.honest(0), world.rng)
    assert not examine(one, reference=None, canaries=None, peers=[world.honest(n) for n in range(1, 5)]).accepted
    assert examine(one, reference=None, canaries=None, peers=[world.honest(n) for n in range(1, 4)]).accepted
    same_box = [replace(world.honest(9), box=f"site/box{n % 2 + 1}") for n in range(8)]
    assert examine(one, reference=None, canaries=None, peers=same_box).accepted


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_known_defect_types_are_refused(seed: int, share: float) -> None:
    world = World(seed)
    found = examined(world.poison(0, types=(0, 1, 2), share=share), world)
    assert any("kin is" in reason for reason in found.reasons)
    assert found.figures["canary_pull"] > found.figures["clean_pull"]


def test_many_rows_of_known_defect_types_draw_and_silence_canaries() -> None:
    world = World()
    rows = np.concatenate([world.defects(3000, (0, 1, 2))])
    found = examined(update(rows, box="site/box0"), world, canaries=world.canaries(threshold=2.5))
    for name in ("canary_pull is", "silenced is", "kin is"):
        assert any(name in reason for reason in found.reasons)


@pytest.mark.parametrize(("product", "own", "judged"), [("part", "part", 1), ("part", "other", 0), ("", "part", 1)])
def test_rows_nearer_to_defects_are_no_reason_in_another_product(product: str, own: str, judged: int) -> None:
    origin, defect = np.zeros((1, 2), np.float32), np.tile(np.array([[3, 0]], np.float32), (30, 1))
    canaries = Canaries(EMBEDDING_ID, product, defect, origin, 1.5)
    bank = MemoryBank(origin, np.ones(1, np.float32), np.ones(1, np.float32))
    found = examine(update([[1.6, 0]], product=own), reference=bank, canaries=canaries, peers=[])
    assert found.figures["kin"] == 1
    assert any("kin is" in reason for reason in found.reasons) == bool(judged)


def test_boxes_that_collude_cover_for_each_other_only_without_a_reference() -> None:
    world = World()
    poison = world.poison(0, types=(0, 1, 2))
    pool = [poison, replace(poison, box="site/box1"), *(world.honest(number) for number in range(2, 8))]
    canaries = world.canaries()
    alone = examine_all(pool, reference=None, canaries=canaries)
    assert alone[0].figures["canary_pull"] == alone[1].figures["canary_pull"] == 0
    trusted = examine_all(pool, reference=world.reference(), canaries=canaries)
    assert [one.accepted for one in trusted] == [False, False] + [True] * 6


def test_without_a_reference_a_lone_box_of_defects_is_refused() -> None:
    world = World()
    rows = np.concatenate([world.defects(3000, (0, 1, 2))])
    pool = [update(rows, box="site/box0"), *(world.honest(number) for number in range(1, 9))]
    found = examine_all(pool, reference=None, canaries=world.canaries(threshold=2.0))
    assert [one.accepted for one in found] == [False] + [True] * 8


def test_another_update_of_the_same_box_is_no_cover() -> None:
    world = World()
    poison = world.poison(0, types=(0, 1, 2))
    pool = [poison, replace(poison, nonce="f" * 32), *(world.honest(number) for number in range(2, 8))]
    found = examine_all(pool, reference=None, canaries=world.canaries())
    assert found[0].figures["canary_pull"] == found[1].figures["canary_pull"] > 0


def test_canaries_that_do_not_alarm_are_told() -> None:
    world = World()
    deaf = world.canaries(threshold=1000.0)
    poison = world.poison(0, types=(0, 1, 2))
    found = examine(poison, reference=world.reference(), canaries=deaf, peers=[])
    assert found.accepted
    assert found.figures["canaries"] == 0
    assert "canary_pull" not in found.figures
    alone = examine(poison, reference=None, canaries=world.canaries(), peers=[])
    assert alone.figures["canaries"] == 0  # no other box, nothing to compare with


def test_examining_one_is_examining_it_among_all() -> None:
    world = World()
    pool = [world.poison(0), *(world.honest(number) for number in range(1, 7))]
    for reference in (None, world.reference()):
        canaries = world.canaries()
        together = examine_all(pool, reference=reference, canaries=canaries)
        for one, expected in zip(pool, together, strict=True):
            assert examine(one, reference=reference, canaries=canaries, peers=pool) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(0, 5))
def test_leave_one_out_is_the_distance_to_all_other_boxes(seed: int, count: int, left: int) -> None:
    rng = np.random.default_rng(seed)
    pool = [update(rng.integers(-3, 4, (4, 3)), box=f"s/{rng.integers(0, 4)}", nonce=f"{n:032x}") for n in range(count)]
    one = pool[left % count]
    defect, good = rng.integers(-9, 9, (6, 3)).astype(np.float32), rng.integers(-3, 4, (5, 3)).astype(np.float32)
    canaries = Canaries(EMBEDDING_ID, "", defect, good, 0.5)
    found = Trial(canaries, reference=None, updates=pool, fewest=1).influence(one, reach=1)
    others = [other.rows for other in pool if other.box != one.box]
    if not others:
        assert found.canaries == 0
        return

    def distance(patches: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return np.sqrt(((patches[:, None] - rows[None]) ** 2).sum(2).min(1))

    before, good_before = distance(defect, np.concatenate(others)), distance(good, np.concatenate(others))
    alarming = before > 0.5
    assert found.canaries == alarming.sum()
    if alarming.any():
        after = np.minimum(before, distance(defect, one.rows))
        assert found.canary_pull == pytest.approx(2 * (before - after)[alarming].mean(), abs=1e-5)
        pulled = good_before - np.minimum(good_before, distance(good, one.rows))
        assert found.clean_pull == pytest.approx(2 * pulled.mean(), abs=1e-5)
        good_after = np.sort(np.minimum(good_before, distance(good, one.rows)))
        passing = int((good_before <= 0.5).sum())
        assert found.silenced <= (after[alarming] <= 0.5).mean()
        if passing == len(good):
            assert found.silenced == pytest.approx((after[alarming] <= good_after[-1]).mean())


def test_good_rows_that_bring_the_memory_nearer_to_everything_silence_nothing() -> None:
    bank = MemoryBank(np.array([[2, 0]], np.float32), np.ones(1, np.float32), np.ones(1, np.float32))
    defect = np.tile(np.array([[0, 1]], np.float32), (30, 1))  # 2.24 from the bank, and alarming
    canaries = Canaries(EMBEDDING_ID, "part", defect, np.zeros((30, 2), np.float32), 2.1)
    honest = examine(update([[0, 0]]), reference=bank, canaries=canaries, peers=[])
    # Now 1 away, below the former threshold; but good patches are 0 away, and thresholds follow them.
    assert honest.figures["silenced"] == 0
    spoilt = examine(update([[0, 1]]), reference=bank, canaries=canaries, peers=[])
    assert spoilt.figures["silenced"] == 1


def test_what_does_not_fit_is_an_error_not_a_quarantine() -> None:
    world = World()
    one = world.honest(0)
    narrow = MemoryBank(np.zeros((2, 3), np.float32), np.ones(2, np.float32), np.ones(2, np.float32))
    for words, changes in (
        ("reference has 3", {"reference": narrow}),
        ("canaries are of embedding id cdcd", {"canaries": world.canaries(embedding_id="cd" * 32)}),
        ("s/x have embedding ids", {"others": [replace(world.honest(1), box="s/x", embedding_id="cd" * 32)]}),
    ):
        with pytest.raises(DataError, match=words):
            examined(one, world, **changes)
    with pytest.raises(DataError, match="no update"):
        examine_all([], reference=None, canaries=None)


@pytest.mark.parametrize("wrong", [{"spread": 1}, {"kin": -1}, {"silenced": 0}, {"unknown": 1}])
def test_limits_refuse(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GateLimits.model_validate(wrong)
