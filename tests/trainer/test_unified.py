"""One run and one bundle for several products, from the folders to the box's detector."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from deploy.parity import LEAST_GOOD_IMAGES, ParityRules
from edge.adaptation.look import Look
from edge.adaptation.reference import read_reference
from edge.bundle import Bundle, Precision, Preprocessing, load_arrays
from edge.errors import DataError, UsageError
from edge.inference.detector import Detector
from edge.judgement.score import pool_score
from edge.judgement.threshold import fit_threshold
from tests.trainer.product_head import ProductMeans
from trainer import export as exporting
from trainer.data.conveyor import write_default
from trainer.data.generic import generic_canvases
from trainer.evaluation.command import evaluate
from trainer.evaluation.products import ProductsEvaluation, _routed
from trainer.export import export_run
from trainer.fit import train
from trainer.methods import registry
from trainer.methods.routed import Routed
from trainer.runs import Run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IMAGES = 2 * LEAST_GOOD_IMAGES
KINDS = ("metal", "cloth")
# Few samples of small images: the limits are those of a smoke test. The gate's own limits have their own tests.
RULES = ParityRules(
    shift=4.0, flipped=0.3, auroc_drop=0.3, worst_shift=8.0, worst_drop=0.5, rerouted=0.2, unknown=0.3,
    good_samples=32, defect_samples=32,
)  # fmt: skip


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def one_more_method(request: pytest.FixtureRequest) -> Iterator[None]:
    known, generic = registry.methods(), generic_canvases(64)[::3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "methods", lambda: known | {"means": ProductMeans})
        patch.setattr(exporting, "generic_canvases", lambda: generic)
        patch.setattr(exporting, "_GATE_IMAGES", 24)
        patch.setattr(exporting, "_GATE_EACH", 12)
        patch.setenv("LINEWARD_CACHE", str(request.config.cache.mkdir("lineward")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("products")
    return [
        write_default(root / kind, seed=4, kind=kind, train=IMAGES, test_good=4, test_defective=4, side=96)
        for kind in KINDS
    ]


def fitted(method: str, folders: list[Path], out: Path, **options: object) -> Run:
    return train(
        method=method, data=folders, out=out, preprocessing=Preprocessing(height=64, width=64), device="cpu",
        progress=quiet, **options,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["means", pytest.param("memory", marks=pytest.mark.slow)])
def packed(
    request: pytest.FixtureRequest, folders: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Bundle]:
    out = tmp_path_factory.mktemp(request.param)
    run = fitted(request.param, folders, out / "run")
    return run, export_run(run.path, out / "bundle", rules=RULES, progress=quiet)


def test_a_run_of_several_products_names_them_and_comes_back(packed: tuple[Run, Bundle]) -> None:
    run = Run.load(packed[0].path)
    assert run.record.products == tuple(sorted(KINDS))
    assert sorted(set(run.holdout_subclasses.tolist())) == sorted(KINDS)
    assert sorted(set(run.reference_subclasses.tolist())) == sorted(KINDS)
    canvas = run.holdout[0]
    for index in range(2):
        before, after = packed[0].see(canvas, index), run.see(canvas, index)
        assert np.array_equal(before[0], after[0])
        assert before[1] is not None
        assert after[1] is not None
        assert np.array_equal(before[1], after[1])


def test_a_bundle_of_several_products_says_of_every_image_which_it_shows(packed: tuple[Run, Bundle]) -> None:
    run, bundle = packed
    manifest = bundle.manifest
    assert manifest.products == manifest.subclasses == run.record.products
    assert manifest.takes_product is run.head.takes_product
    assert manifest.product_state == tuple(run.head.product_state)
    for engine, precision in bundle.calibrated():
        scores = bundle.calibration(engine, precision)
        assert scores.products is not None
        assert scores.products.tolist() == run.holdout_subclasses.tolist()
        for name in manifest.products:
            assert len(scores.of(name).scores) >= LEAST_GOOD_IMAGES
    golden = load_arrays(bundle.file(manifest.golden.file))
    assert golden["product"].dtype == np.int64
    assert set(golden["product"].tolist()) == {0, 1}
    if manifest.commissioning_file:
        kept = load_arrays(bundle.file(manifest.commissioning_file))
        assert sorted(set(kept["products"].tolist())) == sorted(KINDS)
    reference = read_reference(bundle, Precision.FLOAT32)
    assert reference is not None
    assert reference.subclasses == manifest.products
    assert all(len(path["products"]) == 2 for path in manifest.parity["paths"])


def test_every_engine_judges_each_product_as_the_run_does(packed: tuple[Run, Bundle]) -> None:
    run, bundle = packed
    for engine, precision in bundle.calibrated():
        if precision is not Precision.FLOAT32:
            continue
        detector = Detector.open(bundle, engine=engine, precision=precision, threads=1)
        calibrated = bundle.calibration(engine, precision)
        for row in (0, len(run.holdout) - 1):
            own = int(run.holdout_products[row])
            for product in (0, 1):
                found = detector.map_of_canvas(run.holdout[row], Look(product))
                assert found == pytest.approx(run.judge(run.holdout[row], product), rel=1e-3, abs=1e-3)
                if product == own:
                    assert pool_score(found, bundle.manifest.pooling) == pytest.approx(calibrated.scores[row], rel=1e-4)


def test_a_router_names_held_out_images_and_leaves_maps_alone(
    packed: tuple[Run, Bundle], folders: list[Path], tmp_path: Path
) -> None:
    run = packed[0]
    plain = fitted(run.record.method, folders, tmp_path / "plain", router=False)
    assert not isinstance(plain.head, Routed)
    assert isinstance(run.head, Routed)
    assert isinstance(run.head, type(plain.head))
    for canvas, product in zip(run.holdout, run.holdout_products, strict=True):
        found, route = run.see(canvas, int(product))
        assert route is not None
        assert int(route.argmax()) == product
        assert route.max() >= 0
        assert np.array_equal(found, plain.judge(canvas, int(product)))
    noise = np.random.default_rng(0).integers(0, 256, run.holdout[0].shape, dtype=np.uint8)
    route = run.see(noise)[1]
    assert route is not None
    assert route.max() < 0


def test_an_evaluation_judges_each_folder_as_its_product_and_as_it_is_routed(
    packed: tuple[Run, Bundle], folders: list[Path], tmp_path: Path
) -> None:
    run, bundle = packed
    found = evaluate(run=run.path, bundle=None, data=folders, json=tmp_path / "run.json", alpha=0.2)
    boxed = evaluate(
        run=None, bundle=bundle.path, data=folders[::-1], report=tmp_path / "report.html", alpha=0.2,
        engine="onnxruntime", precision="float32",
    )  # fmt: skip
    assert isinstance(found, ProductsEvaluation)
    assert isinstance(boxed, ProductsEvaluation)
    written = json.loads((tmp_path / "run.json").read_text())
    assert list(written["products"]) == sorted(KINDS)
    for name, one in found.products.items():
        assert boxed.products[name].scores == pytest.approx(one.scores, rel=1e-3, abs=1e-3)
        own = run.holdout_subclasses == name
        expected = fit_threshold(run.holdout_scores()[own], run.holdout_groups[own], 0.2)
        assert one.threshold.value == expected.value
        assert found.routing[name] == boxed.routing[name]
        assert found.routing[name].right >= 7
    assert written["mean"]["image_auroc"] == pytest.approx(
        np.mean([written["products"][name]["image_auroc"] for name in KINDS])
    )
    page = (tmp_path / "report.html").read_text()
    for link in re.findall(r'href="([^"]+)"', page):
        assert (tmp_path / link).is_file()
    assert len(re.findall(r"href=", page)) == 2
    with pytest.raises(DataError, match="other: no product of this detector"):
        evaluate(run=run.path, bundle=None, data=folders, product=["metal", "other"])


def test_alarms_by_the_router_are_those_of_a_threshold_below_zero_too() -> None:
    threshold = fit_threshold(np.linspace(-2, -1, 20, dtype=np.float32), np.arange(20).astype(np.str_), 0.2)
    assert threshold.value < 0
    detector = SimpleNamespace(route=lambda _: np.ones(1, np.float32), preprocessing=Preprocessing(height=32, width=32))
    images = [SimpleNamespace(load=lambda: np.zeros((32, 32, 3), np.uint8))] * 2
    given = SimpleNamespace(
        images=[SimpleNamespace(score=score) for score in (-1.9, -0.5)], labels=np.array([False, True])
    )
    found = _routed(detector, images, given, [threshold], 0)  # type: ignore[arg-type]  # as much as is asked for
    assert (found.false_alarms, found.recall) == (0, 1)


def test_the_order_of_folders_does_not_matter(packed: tuple[Run, Bundle], folders: list[Path], tmp_path: Path) -> None:
    run = packed[0]
    other = fitted(run.record.method, folders[::-1], tmp_path / "other")
    assert other.record.data_sha256 == run.record.data_sha256
    for name, values in run.head.state_dict().items():
        assert np.array_equal(values, other.head.state_dict()[name]), name


def test_names_that_do_not_fit_are_refused(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="3 names for 2 folders"):
        fitted("memory", folders, tmp_path / "run", product=["a", "b", "c"])
    with pytest.raises(UsageError, match="--product a: given twice"):
        fitted("memory", folders, tmp_path / "run", product=["a", "a"])
    with pytest.raises(UsageError, match="--product metal: given twice"):
        fitted("memory", [folders[0], folders[0]], tmp_path / "run")
    with pytest.raises(DataError, match="knows no product 'x'"):
        fitted("memory", folders, tmp_path / "run").product_index("x")
