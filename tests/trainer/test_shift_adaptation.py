"""A box's adaptation under the sub-class shift protocol: whose moments it takes, and who has no say in them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
import torch

from edge.adaptation.measure import measure_canvas
from edge.adaptation.moments import DETAIL, IMAGE
from edge.bundle import Preprocessing
from trainer import fit
from trainer.backbones.registry import build_trunk
from trainer.data.subclass_shift import subclass_shift_splits
from trainer.data.subclasses import Material, Subclass, SubclassImage, digests
from trainer.data.texture_factory import TextureFactory
from trainer.evaluation import shift_features, shift_stage, shift_variants
from trainer.evaluation.shift import ShiftSettings, evaluate_material
from trainer.evaluation.shift_features import FeatureStore, SharedExtract, groups_of
from trainer.evaluation.shift_moments import ALL, MomentsOfTraining
from trainer.features import extract, extract_tiles
from trainer.methods.base import Features, FitContext, Head, Method, MethodConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

VIEW = Preprocessing(height=64, width=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cloth() -> Material:
    return TextureFactory(seed=1, side=64, train=8, good=3, defective=2, subclasses={"cloth": 4}).material("cloth")


def brighter(image: SubclassImage, grey: int) -> SubclassImage:
    pixels = np.clip(image.load().astype(np.int16) + grey, 0, 255).astype(np.uint8)
    return replace(image, load=lambda: pixels)


class LightHead(Head):
    """How far an image's mean is from that of training; with sub-classes, the toy router chooses the last."""

    tap_names = ("s8",)
    map_stride = 8
    subclasses: tuple[str, ...] = ()
    nearness = 1.0

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        away = (taps[0].mean((2, 3)) - self.mean).square().mean(1).sqrt()
        anomaly_map = away[:, None, None].expand(-1, *taps[0].shape[2:])
        if not self.subclasses:
            return (anomaly_map,)
        route = torch.full((len(taps[0]), len(self.subclasses)), -2.0)
        route[:, -1] = self.nearness
        return anomaly_map, taps[0].flatten(2).transpose(1, 2), route


class LightMethod(Method):
    name: ClassVar[str] = "light"
    tap_names: ClassVar[tuple[str, ...]] = ("s8",)
    routed: ClassVar[bool] = False
    nearness: ClassVar[float] = 1.0
    seen: ClassVar[list[FitContext]] = []

    @classmethod
    def config(cls, preset: str) -> MethodConfig:  # noqa: ARG003 (of the method)
        return MethodConfig()

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> Head:  # noqa: ARG003 (of the method)
        cls.seen.append(context)
        tap = context.features.taps["s8"].float()
        head = LightHead(tap.shape[1])
        head.mean.copy_(tap.mean((0, 2, 3)))
        if cls.routed and context.subclasses is not None:
            head.subclasses, head.nearness = tuple(sorted(set(context.subclasses.tolist()))), cls.nearness
        return head.eval()

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> Head:
        raise NotImplementedError


class RoutedMethod(LightMethod):
    name: ClassVar[str] = "routed"
    routed: ClassVar[bool] = True


class LostMethod(RoutedMethod):
    name: ClassVar[str] = "lost"
    nearness: ClassVar[float] = -1.0


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"light": LightMethod, "routed": RoutedMethod, "lost": LostMethod}
    monkeypatch.setattr(shift_variants, "get", lambda name: known[name])
    monkeypatch.setattr(fit, "_VALIDATION_DEFECTS", 8)
    LightMethod.seen.clear()


def settings(*methods: str) -> ShiftSettings:
    return ShiftSettings(methods=methods, rotations=2, preprocessing=VIEW, device="cpu")


def store(names: tuple[str, ...] = ("s8",), **options: int) -> FeatureStore:
    return FeatureStore(build_trunk("lite0"), VIEW, names, CPU, **options)


def equal(one: Features, other: Features) -> bool:
    return all(torch.equal(one.taps[name], other.taps[name]) for name in other.taps)


def test_correction_takes_back_the_alarms_of_another_light(cloth: Material) -> None:
    first, names = cloth.subclasses[0], [one.name for one in cloth.subclasses]
    # One cloth four times, each with pixels of its own, and once in a light of 80 grey levels more.
    alike = [turned(first, name, 7 * index) for index, name in enumerate(names)]
    alike[0] = lit(alike[0], 80)
    how = replace(settings("light"), rotations=4, n_test=1, alpha=0.2)
    found = evaluate_material(Material("cloth", tuple(alike)), how)
    (rotation,) = [one for one in found.methods[0].rotations if one.unseen == ("1",)]
    rates = {one.setting: one.false_positive_rate for one in rotation.subclasses if one.subclass == "1"}
    assert rates["unseen"] == 1.0
    assert max(rates["unseen, own"], rates["unseen+5"]) <= 1 / 3


def turned(one: Subclass, name: str, columns: int) -> Subclass:
    """Return a sub-class of another name that shows the same, moved."""

    def moved(image: SubclassImage) -> SubclassImage:
        pixels, own = np.roll(image.load(), columns, axis=1), f"{name}/{image.name.partition('/')[2]}"
        return replace(image, name=own, subclass=name, group=own, load=lambda: pixels)

    return Subclass(name, tuple(map(moved, one.train)), tuple(map(moved, one.test)))


def lit(one: Subclass, grey: int) -> Subclass:
    return replace(
        one, train=tuple(brighter(i, grey) for i in one.train), test=tuple(brighter(i, grey) for i in one.test)
    )


@pytest.mark.parametrize("method", ["light", "routed", "lost"])
def test_moments_come_from_given_images_and_training_alone(
    cloth: Material, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    built, given = [], []
    plain = MomentsOfTraining.given

    class Watched(MomentsOfTraining):
        def __init__(self, images: Sequence[SubclassImage], *rest: object) -> None:
            built.append([image.name for image in images])
            super().__init__(images, *rest)  # type: ignore[arg-type]

        def given(self, good: Sequence[SubclassImage], expert: str) -> object:
            given.append(([image.name for image in good], expert))
            return plain(self, good, expert)

    monkeypatch.setattr(shift_stage, "MomentsOfTraining", Watched)
    evaluate_material(cloth, settings(method))
    splits = subclass_shift_splits(cloth, digests(cloth), rotations=2)
    assert built == [[image.name for image in split.fit] for split in splits]
    wanted = [
        [image.name for image in split.shots[name][:count]]
        for split in splits
        for name in split.unseen_test
        for count in (1, 5)
    ]
    assert [names for names, _ in given] == wanted
    tested = {image.name for one in cloth.subclasses for image in one.test}
    assert tested.isdisjoint(name for names, _ in given for name in names)
    if method != "routed":  # one expert, or a router that knows none of the images
        assert {expert for _, expert in given} == {ALL}
    else:  # the router's word: the last of the trained ones
        last = [max(split.trained) for split in splits for _ in split.unseen_test for _ in (1, 5)]
        assert [expert for _, expert in given] == last


def test_references_are_means_of_training_images_by_subclass(cloth: Material) -> None:
    images = [image for one in cloth.subclasses[:2] for image in one.train]
    shelf = store()
    found = MomentsOfTraining(images, shelf, {}).references
    assert set(found) == {ALL, "1", "2"}
    greys = {name: [] for name in found}
    for image, canvas in zip(images, shelf.canvases(images), strict=True):
        measured = measure_canvas(canvas[None]).mean[IMAGE]
        greys[ALL].append(measured)
        greys[image.subclass].append(measured)
    for name, values in greys.items():
        np.testing.assert_allclose(found[name].mean[IMAGE], np.mean(values, axis=0), rtol=1e-5)
    assert set(found[ALL].mean) == {DETAIL, IMAGE, "s8"}


def test_images_in_the_light_of_training_are_hardly_corrected_and_others_are(cloth: Material) -> None:
    images = list(cloth.subclasses[0].train)
    shelf = store()
    moments = MomentsOfTraining(images, shelf, {})
    reference = moments.references[ALL].mean[IMAGE]
    for light, least in ((0, 0.0), (40, 30.0)):
        good = [replace(brighter(image, light), name=f"{light}/{image.name}") for image in images]
        before, after = shelf.canvases(good), shelf.canvases(good)
        correction = moments.given(good, ALL)
        for canvas in after:
            correction.canvas(canvas[None])
        moved = [np.mean([measure_canvas(c[None]).mean[IMAGE] for c in part], axis=0) for part in (before, after)]
        assert np.abs(moved[0] - reference).max() >= least
        assert np.abs(moved[1] - reference).max() < 1.5


def test_own_moments_are_each_images_own(cloth: Material) -> None:
    images = list(cloth.subclasses[0].train)
    moments = MomentsOfTraining(images, store(), {})
    correction, wanted = moments.own(ALL), moments.references[ALL].mean[IMAGE]
    for light in (-25, 0, 35):
        canvas = store().canvases([brighter(images[0], light)])
        correction.canvas(canvas)
        assert np.abs(measure_canvas(canvas).mean[IMAGE] - wanted).max() < 1.5
    unknown = moments.own("nobody's")
    canvas, other = (store().canvases(images[:1]) for _ in range(2))
    correction.canvas(canvas)
    unknown.canvas(other)
    np.testing.assert_array_equal(canvas, other)


def test_every_image_goes_through_the_trunk_once_and_corrected_ones_are_not_remembered(
    cloth: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = []
    monkeypatch.setattr(shift_features, "extract", lambda *a, **k: passed.append(len(a[1])) or extract(*a, **k))
    evaluate_material(cloth, settings("light", "routed"))
    used = {
        image.name
        for split in subclass_shift_splits(cloth, digests(cloth), rotations=2)
        for part in (*split.seen_test.values(), *split.unseen_test.values(), split.fit, split.calibration)
        for image in part
    } | {
        image.name
        for split in subclass_shift_splits(cloth, digests(cloth), rotations=2)
        for images in split.shots.values()
        for image in images[:5]
    }
    assert sum(passed) == len(used)


def test_remembered_features_are_those_of_the_trunk_in_any_order_and_however_few_are_kept(cloth: Material) -> None:
    images = [*cloth.subclasses[0].test, *cloth.subclasses[1].test]
    for limit in (2**30, 200_000, 1):
        shelf = store(("s8", "s16"), limit=limit)
        shelf.features(images[::2])
        shelf.features(images[:3])
        found = shelf.features(images[::-1])
        wanted = extract(
            build_trunk("lite0"),
            shelf.canvases(images[::-1]),
            VIEW,
            tap_names=("s8", "s16"),
            groups=groups_of(images[::-1]),
            device=CPU,
            progress=lambda *_: None,
            what="",
        )
        for name in ("s8", "s16"):
            torch.testing.assert_close(found.taps[name], wanted.taps[name], rtol=0, atol=2e-2)
        assert found.groups.tolist() == [image.group for image in images[::-1]]
        assert shelf.shapes(images) == [(64, 64)] * len(images)


def test_correction_is_applied_before_and_after_the_trunk_and_only_to_its_image(cloth: Material) -> None:
    class Marks:
        def __init__(self, value: int) -> None:
            self.value = value

        def canvas(self, tiles: np.ndarray) -> None:
            tiles[:] = self.value

        def taps(self, taps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {name: tap * 0 + tap.mean() + self.value for name, tap in taps.items()}

    images, shelf = list(cloth.subclasses[0].test[:2]), store()
    before = shelf.features(images)
    found = shelf.corrected(images, [Marks(1), Marks(200)])
    flat = extract_tiles(
        np.stack([np.full((64, 64, 3), v, np.uint8) for v in (1, 200)]),
        trunk=shelf.network,
        tap_names=("s8",),
        device=CPU,
    ).taps["s8"]
    for index, value in enumerate((1, 200)):
        level = float(flat[index].float().mean()) + value
        assert float(found.taps["s8"][index].float().mean()) == pytest.approx(level, rel=2e-3)
    assert equal(shelf.features(images), before)


def test_methods_share_what_they_ask_of_the_trunk_and_cannot_spoil_it() -> None:
    asked = []

    def answer(tiles: np.ndarray) -> Features:
        asked.append(len(tiles))
        return Features({"s8": torch.full((len(tiles), 1), float(tiles.mean()))}, 1, np.array(["a"] * len(tiles)))

    shared = SharedExtract(answer, limit=100)
    one, two = np.zeros((2, 4, 4, 3), np.uint8), np.ones((2, 4, 4, 3), np.uint8)
    shared(one).taps["s8"] += 5
    assert shared(one.copy()).taps["s8"].tolist() == [[0.0], [0.0]]
    assert shared(two).taps["s8"].tolist() == [[1.0], [1.0]]
    assert asked == [2, 2]
    assert SharedExtract(answer, limit=0)(two).taps["s8"].tolist() == [[1.0], [1.0]]


def test_pooled_variant_is_not_told_subclasses(cloth: Material) -> None:
    evaluate_material(cloth, replace(settings("light", "light:pooled"), rotations=1))
    assert [context.subclasses is None for context in LightMethod.seen] == [False, True]


def test_figures_of_a_method_do_not_depend_on_what_else_is_judged(cloth: Material) -> None:
    once = replace(settings("light", "routed"), rotations=1)
    together = evaluate_material(cloth, once).methods
    for one in together:
        (alone,) = evaluate_material(cloth, replace(once, methods=(one.name,))).methods
        assert alone == one
    given = [method.settings["unseen+5"]["image_auroc"] for method in together]
    assert given[0] != given[1]  # they are brought to different moments, so that a mix-up would show
