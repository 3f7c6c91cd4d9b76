"""The sub-class shift protocol: what it trains on, what it freezes, what it measures and how it says so."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from deploy.metrics import image_auroc
from edge.bundle import Pooling, Preprocessing
from edge.errors import DataError, EngineError, UsageError
from trainer import fit
from trainer.data.subclass_shift import subclass_shift_splits
from trainer.data.subclasses import Material, SubclassImage, digests
from trainer.data.texture_factory import TextureFactory
from trainer.evaluation import command, shift_stage, shift_variants
from trainer.evaluation.shift import ShiftSettings, evaluate_material
from trainer.evaluation.shift_measure import measure
from trainer.evaluation.shift_report import (
    MaterialResult,
    RotationResult,
    ShiftReport,
    SubclassFigures,
    summarise,
)
from trainer.evaluation.shift_show import draw, legend, tables
from trainer.methods import registry
from trainer.methods.base import Features, FitContext, Head, Method, MethodConfig

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SMALL = TextureFactory(seed=1, side=64, train=18, good=3, defective=3, subclasses={"cloth": 4, "metal": 4})
VIEW = Preprocessing(height=64, width=64)
UNSEEN_SETTINGS = ("unseen", "unseen, own", "unseen+1", "unseen+5")


class MeanHead(Head):
    """Distance of a cell's features to the mean of all good ones."""

    tap_names = ("s8",)
    map_stride = 8

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((taps[0] - self.mean[:, None, None]).square().mean(1).sqrt(),)


class MovingHead(MeanHead):
    def adapted(self, good: Features, generator: torch.Generator) -> Head:  # noqa: ARG002 (of the capability)
        head = MovingHead(len(self.mean))
        head.mean.copy_(good.taps["s8"].float().mean((0, 2, 3)))
        return head


class Fixed(Method):
    name: ClassVar[str] = "fixed"
    tap_names: ClassVar[tuple[str, ...]] = ("s8",)
    head: ClassVar[type[MeanHead]] = MeanHead
    contexts: ClassVar[list[FitContext]] = []

    @classmethod
    def config(cls, preset: str) -> MethodConfig:  # noqa: ARG003 (of the method)
        return MethodConfig()

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> Head:  # noqa: ARG003 (of the method)
        cls.contexts.append(context)
        tap = context.features.taps["s8"].float()
        head = cls.head(tap.shape[1])
        head.mean.copy_(tap.mean((0, 2, 3)))
        return head.eval()

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> Head:
        raise NotImplementedError


class Moving(Fixed):
    name: ClassVar[str] = "moving"
    head: ClassVar[type[MeanHead]] = MovingHead


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"fixed": Fixed, "moving": Moving}
    monkeypatch.setattr(shift_variants, "get", lambda name: known[name] if name in known else registry.get(name))
    monkeypatch.setattr(fit, "_VALIDATION_DEFECTS", 8)
    Fixed.contexts.clear()


TOYS = ShiftSettings(methods=("fixed", "moving"), rotations=2, preprocessing=VIEW, device="cpu")


@pytest.fixture(scope="module")
def cloth() -> Material:
    return SMALL.material("cloth")


def run(path: Path, toys: ShiftSettings = TOYS, **options: object) -> tuple[ShiftReport, str]:
    report = command.evaluate_shift(settings=toys, data=None, json=path, factory=SMALL, **options)  # type: ignore[arg-type]
    return report, path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("toys")
def test_report_is_the_same_bit_for_bit_and_says_that_images_are_generated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, first = run(tmp_path / "a.json", picture=tmp_path / "a.png", materials=["metal"])
    _, second = run(tmp_path / "b.json", picture=tmp_path / "b.png", materials=["metal"])
    assert first == second
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    read = json.loads(first)
    assert ShiftReport.model_validate(read) == report
    assert read["schema_version"] == 2
    assert read["generated"]
    assert read["seed"] == 0
    assert {one["name"] for one in read["settings"]} >= set(read["materials"][0]["methods"][1]["settings"])
    (found,) = read["materials"]
    ids = {one["embedding_id"] for method in found["methods"] for one in method["rotations"]}
    assert len(ids) == 4  # two methods, two rotations: another projection each
    _, other = run(tmp_path / "c.json", replace(TOYS, methods=("fixed",), seed=1))
    both = json.loads(other)["materials"]
    assert [one["material"] for one in both] == ["cloth", "metal"]
    assert len({one["data_sha256"] for one in both}) == 2
    assert both[1]["methods"] != found["methods"][:1]
    said = capsys.readouterr().out
    assert "generated stand-in, not Texture-AD" in said
    assert "The images are generated, not Texture-AD's" in said


@pytest.mark.usefixtures("toys")
def test_folder_gives_the_figures_that_memory_does(tmp_path: Path, cloth: Material) -> None:
    factory = replace(SMALL, subclasses={"cloth": 4})
    factory.write(tmp_path / "set")
    report = command.evaluate_shift(settings=TOYS, data=tmp_path / "set")
    made = evaluate_material(cloth, TOYS)
    assert not report.generated
    assert report.materials[0].data_sha256 == made.data_sha256
    assert report.materials[0].methods == made.methods


@pytest.mark.usefixtures("toys")
def test_methods_see_good_images_of_trained_subclasses_alone_and_their_names(cloth: Material) -> None:
    found = evaluate_material(cloth, TOYS)
    of = {image.load()[..., ::-1].tobytes(): image.subclass for image in cloth.images}
    trained = {one.name: {image.load().tobytes() for image in one.train} for one in cloth.subclasses}
    for index, rotation in enumerate(found.methods[0].rotations):
        context = Fixed.contexts[2 * index]
        assert context.subclasses is not None
        assert set(context.subclasses.tolist()) == set(rotation.trained)
        assert len(context.subclasses) == len(context.images) == rotation.n_fit
        good = set().union(*(trained[name] for name in rotation.trained))
        seen = {image[..., ::-1].tobytes() for image in context.images}  # 64 pixels in, 64 out: the same
        assert seen <= good
        assert [of[image.tobytes()] for image in context.images] == context.subclasses.tolist()
        assert rotation.n_calibration + rotation.n_fit == 18 * len(rotation.trained)


@pytest.mark.usefixtures("toys")
def test_threshold_is_frozen_on_calibration_for_every_setting(cloth: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    fits, used = [], []
    frozen, measured = shift_stage.fit_threshold, shift_stage.measure
    monkeypatch.setattr(shift_stage, "fit_threshold", lambda *a: fits.append(a) or frozen(*a))
    scored: list[Features] = []
    scores_of = shift_stage.Stage.scores
    monkeypatch.setattr(shift_stage.Stage, "scores", lambda *a: scored.append(a[2]) or scores_of(*a))
    monkeypatch.setattr(shift_stage, "measure", lambda *a, **k: used.append(k) or measured(*a, **k))
    found = evaluate_material(cloth, replace(TOYS, methods=("moving",)))
    rotations = found.methods[0].rotations
    splits = subclass_shift_splits(cloth, digests(cloth), rotations=2)
    assert len(fits) == len(rotations) == len(splits) == 2
    assert all(one is context.validation.good for one, context in zip(scored, Fixed.contexts, strict=True))
    for (scores, groups, alpha), rotation, split in zip(fits, rotations, splits, strict=True):
        assert len(scores) == rotation.n_calibration
        assert groups.tolist() == [image.group for image in split.calibration]
        assert not {image.name for image in split.calibration} & {image.name for image in split.fit}
        assert frozen(scores, groups, alpha).value == rotation.threshold
    assert {k["setting"] for k in used} == {"seen", *UNSEEN_SETTINGS, "unseen+1 rows", "unseen+5 rows"}
    assert {k["threshold"] for k in used} == {rotation.threshold for rotation in rotations}


@pytest.mark.usefixtures("toys")
def test_what_cannot_adapt_or_has_too_few_images_has_no_figures_and_says_why(cloth: Material) -> None:
    fixed, moving = evaluate_material(cloth, TOYS).methods
    assert set(fixed.settings) == {"seen", *UNSEEN_SETTINGS}  # 18 good images are no 20
    assert set(fixed.unavailable) == {"unseen+1 rows", "unseen+5 rows", "unseen+20 rows"}
    assert set(moving.settings) == {"seen", *UNSEEN_SETTINGS, "unseen+1 rows", "unseen+5 rows"}
    assert not moving.unavailable
    assert all(any("fewer than 20 good images" in note for note in one.notes) for one in moving.rotations)
    assert moving.settings["unseen+5 rows"] != moving.settings["unseen+1 rows"] != moving.settings["unseen"]
    for setting in ("seen", *UNSEEN_SETTINGS):  # they differ in what they take in, not in what is corrected for them
        assert moving.settings[setting] == fixed.settings[setting]


@pytest.mark.usefixtures("toys")
def test_subclasses_without_masks_have_image_figures_only(cloth: Material) -> None:
    blind = replace(
        cloth,
        subclasses=tuple(
            replace(
                one,
                test=tuple(
                    replace(image, load_mask=None if image.anomalous else image.load_mask) for image in one.test
                ),
            )
            for one in cloth.subclasses
        ),
    )
    for method in evaluate_material(blind, TOYS).methods:
        for rotation in method.rotations:
            assert all(one.pixel_auroc is None and one.aupro is None for one in rotation.subclasses)
            assert all(one.image_auroc is not None for one in rotation.subclasses)
        assert "pixel_auroc" not in method.settings["seen"]


@pytest.mark.usefixtures("toys")
def test_damage_is_named_before_anything_is_trained(cloth: Material) -> None:
    def broken() -> npt.NDArray[np.uint8]:
        raise DataError("2/train/good/0000.png: not a readable image")

    first = cloth.subclasses[1]
    spoilt = replace(first, train=(replace(first.train[0], load=broken), *first.train[1:]))
    with pytest.raises(DataError, match=r"2/train/good/0000\.png"):
        evaluate_material(replace(cloth, subclasses=(cloth.subclasses[0], spoilt, *cloth.subclasses[2:])), TOYS)
    assert not Fixed.contexts


def test_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    for wrong, words in (
        ({"methods": ()}, "--methods"),
        ({"methods": ("memory", "memory")}, "each once"),
        ({"methods": ("wood",)}, "wood: unknown"),
        ({"alpha": 1.0}, "--alpha"),
        ({"rotations": 0}, "--rotations 0"),
        ({"seed": -1}, "--seed -1"),
        ({"preset": "best"}, "--preset best"),
        ({"device": "tpu"}, "--device tpu"),
    ):
        with pytest.raises(UsageError, match=words):
            run(tmp_path / "a.json", ShiftSettings(**{"methods": ("memory",), **wrong}))
    with pytest.raises(UsageError, match=r"--picture .*: end the name"):
        run(tmp_path / "a.json", ShiftSettings(methods=("memory",)), picture=tmp_path / "a.jpg")
    with pytest.raises(UsageError, match="--material wood: choose among cloth, metal"):
        run(tmp_path / "a.json", ShiftSettings(methods=("memory",)), materials=["wood"])
    assert not list(tmp_path.iterdir())


def labelled(index: int, mask: npt.NDArray[np.bool_]) -> SubclassImage:
    return SubclassImage(
        name=f"1/test/x/{index}.png",
        subclass="1",
        split="test",
        label="hole" if mask.any() else "good",
        anomalous=bool(mask.any()),
        group=str(index),
        load=lambda: np.zeros((*mask.shape, 3), np.uint8),
        load_mask=lambda _: mask,
    )


def figures(masks: npt.NDArray[np.bool_], maps: npt.NDArray[np.float32], threshold: float = 0.5) -> SubclassFigures:
    return measure(
        [labelled(index, mask) for index, mask in enumerate(masks)],
        maps,
        [masks.shape[1:]] * len(masks),
        trained_pooling=Pooling(cells=1),
        threshold=threshold,
        setting="seen",
        preprocessing=VIEW,
    )


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32), levels=st.integers(2, 40))
def test_image_auroc_is_the_pairwise_definition_with_ties_at_half(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        labels = rng.random(int(rng.integers(2, 40))) < 0.5
        scores = rng.integers(0, levels, len(labels)) / 7
        found = image_auroc(labels, scores)
        if labels.all() or not labels.any():
            assert found is None
            continue
        difference = scores[labels][:, None] - scores[~labels][None, :]
        assert found == pytest.approx(np.mean((difference > 0) + 0.5 * (difference == 0)), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_pixel_figures_know_the_order_of_pixels_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    masks = np.zeros((4, 12, 12), bool)
    masks[2, 3:6, 2:7] = masks[3, 8:10, 1:3] = True
    maps = rng.integers(0, 30, masks.shape).astype(np.float32) + 10 * masks
    one, other = figures(masks, maps), figures(masks, np.float32(3) * maps + np.float32(7))
    assert one.pixel_auroc == pytest.approx(other.pixel_auroc, abs=1e-12)
    assert one.aupro == pytest.approx(other.aupro, abs=1e-12)


def test_pixel_figures_are_pooled_over_images_and_no_map_is_stretched() -> None:
    masks = np.zeros((2, 8, 8), bool)
    masks[1, 2:4, 2:4] = True
    maps = np.stack([np.full((8, 8), 9.0), masks[1] * 1.0]).astype(np.float32)  # a good image that alarms all over
    found = figures(masks, maps)
    # Each map stretched to 0..1 would give 1: within the defective image the defect stands out.
    assert found.pixel_auroc == pytest.approx(60 / 124)
    perfect = figures(masks, masks.astype(np.float32))
    assert perfect.pixel_auroc == perfect.aupro == perfect.image_auroc == 1.0
    assert (perfect.false_positive_rate, perfect.miss_rate) == (0.0, 0.0)
    flat = figures(masks, np.ones_like(maps))
    assert flat.pixel_auroc == 0.5
    assert flat.aupro == pytest.approx(0.15)
    assert (flat.false_positive_rate, flat.miss_rate) == (1.0, 0.0)


def test_map_that_is_no_number_is_named() -> None:
    masks = np.zeros((1, 8, 8), bool)
    with pytest.raises(EngineError, match=r"1/test/x/0\.png: the anomaly map holds a NaN"):
        figures(masks, np.full((1, 8, 8), np.nan, np.float32))


def rotation(number: int, seen: float, unseen: tuple[float, ...], false: tuple[float, float]) -> RotationResult:
    def one(name: str, setting: str, auroc: float, rate: float) -> SubclassFigures:
        return SubclassFigures(
            subclass=name,
            setting=setting,
            n_good=5,
            n_defective=5,
            image_auroc=auroc,
            pixel_auroc=None,
            aupro=None,
            false_positive_rate=rate,
            miss_rate=0.0,
        )

    return RotationResult(
        rotation=number,
        trained=("1",),
        unseen=("2", "3"),
        n_fit=9,
        n_calibration=6,
        n_calibration_groups=6,
        threshold=1.0,
        threshold_method="empirical",
        budget_supported=True,
        pooling_cells=1,
        embedding_id="0" * 64,
        subclasses=(
            one("1", "seen", seen, false[0]),
            *(one(str(i), "unseen", v, false[1]) for i, v in enumerate(unseen)),
        ),
    )


def test_summary_is_of_means_over_subclasses() -> None:
    found = summarise(
        "m", "m", {}, [rotation(0, 1.0, (0.9, 0.7), (0, 0.1)), rotation(1, 0.8, (0.4, 0.4), (0, 0.1))], {}
    )
    unseen = found.settings["unseen"]["image_auroc"]
    assert (unseen.mean, unseen.min, unseen.max, unseen.rotations) == (pytest.approx(0.6), 0.4, pytest.approx(0.8), 2)
    assert unseen.std == pytest.approx(np.std([0.8, 0.4], ddof=1))
    assert found.drop["unseen"]["image_auroc"].mean == pytest.approx((0.2 + 0.5) / 2)
    assert "pixel_auroc" not in found.settings["seen"]
    assert found.shift_is_real


@pytest.mark.parametrize(
    ("unseen", "false", "real"), [(0.96, 0.1, False), (0.94, 0.1, True), (0.99, 0.25, True), (1.0, 0.0, False)]
)
def test_shift_that_costs_nothing_is_said_to_be_too_easy(unseen: float, false: float, real: bool) -> None:  # noqa: FBT001
    found = summarise("m", "m", {}, [rotation(0, 1.0, (unseen,), (0.0, false))], {})
    assert found.shift_is_real is real
    material = MaterialResult(material="cloth", data_sha256="", subclasses={}, ordered=False, methods=(found,))
    notes = command._shift_notes([material], generated=False)
    assert any("too easy" in note for note in notes) is not real


def test_tables_and_drawing_show_every_setting(tmp_path: Path) -> None:
    found = summarise("m", "m", {}, [rotation(0, 1.0, (0.9,), (0, 0.1))], {})
    report = ShiftReport(
        data="there",
        generated=False,
        seed=0,
        rotations=1,
        alpha=0.01,
        preset="quick",
        trunk="lite0",
        trunk_sha256="",
        preprocessing={},
        versions={},
        materials=(MaterialResult(material="wood", data_sha256="", subclasses={}, ordered=False, methods=(found,)),),
    )
    console = Console(width=140, record=True)
    for table in tables(report):
        console.print(table)
    said = console.export_text()
    assert any(line.startswith("unseen: Test images of sub-classes that were left out") for line in legend(report))
    assert not any(line.startswith("unseen, own") for line in legend(report))
    for words in ("wood", "there", "seen", "unseen", "0.900", "+10 %"):
        assert words in said
    draw(report, tmp_path / "a.svg")
    assert "I-AUROC" not in (tmp_path / "a.svg").read_bytes()[:20].decode()
    assert (tmp_path / "a.svg").stat().st_size > 5000
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        draw(report, tmp_path / "file" / "a.png")


def test_stand_in_is_a_shift_that_one_pooled_bank_suffers_from() -> None:
    factory = TextureFactory(seed=0, side=128, train=14, good=6, defective=6, subclasses={"metal": 6})
    found = evaluate_material(
        factory.material("metal"),
        ShiftSettings(
            methods=("memory:rows=200:candidates=6000",),
            rotations=1,
            n_test=2,
            preprocessing=Preprocessing(height=128, width=128),
            device="cpu",
        ),
    ).methods[0]
    assert found.shift_is_real
    assert (
        found.settings["unseen+5 rows"]["false_positive_rate"].mean
        <= found.settings["unseen"]["false_positive_rate"].mean
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cloth", "wafer", "metal"])
def test_stand_in_is_hard_in_every_material_and_good_images_help(kind: str) -> None:
    factory = TextureFactory(seed=0, side=128, train=20, good=10, defective=12, subclasses={kind: 8})
    found = evaluate_material(
        factory.material(kind),
        ShiftSettings(
            methods=("memory",), rotations=4, preprocessing=Preprocessing(height=128, width=128), device="cpu"
        ),
    ).methods[0]
    assert found.shift_is_real
    unseen, given = (found.settings[name] for name in ("unseen", "unseen+5 rows"))
    assert given["image_auroc"].mean >= unseen["image_auroc"].mean
    assert given["false_positive_rate"].mean < unseen["false_positive_rate"].mean
