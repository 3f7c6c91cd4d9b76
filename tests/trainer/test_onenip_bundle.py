"""OneNIP for two products from folders to the box, which is told of a third by one good image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from deploy.parity import ParityRules
from edge.adaptation.look import Look
from edge.bundle import Bundle, Engine, Precision, Preprocessing
from edge.inference.detector import Detector
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from edge.products.product_file import PROMPTS, read_product, require_fit, write_product
from edge.products.prompt import make_product
from trainer import export as exporting
from trainer.data.conveyor import write_default
from trainer.data.folder import load_image
from trainer.data.generic import generic_canvases
from trainer.export import export_run
from trainer.fit import train
from trainer.methods.onenip.model import OneNipHead

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.runs import Run

# Few samples of small images: the limits are those of a smoke test. The gate's own limits have their own tests.
RULES = ParityRules(
    shift=4.0, flipped=0.3, auroc_drop=0.3, worst_shift=8.0, worst_drop=0.5, rerouted=0.2, unknown=0.3,
    good_samples=32, defect_samples=32,
)  # fmt: skip
KNOWN, THIRD = ("cloth", "metal"), "wafer"


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("products")
    return {
        kind: write_default(root / kind, seed=4, kind=kind, train=12, test_good=4, test_defective=4, side=96)
        for kind in (*KNOWN, THIRD)
    }


@pytest.fixture(scope="module")
def packed(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Bundle]:
    out, generic = tmp_path_factory.mktemp("onenip"), generic_canvases(64)[::3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "generic_canvases", lambda: generic)
        patch.setenv("LINEWARD_CACHE", str(request.config.cache.mkdir("lineward")))
        run = train(
            method="onenip", data=[folders[kind] for kind in KNOWN], out=out / "run", device="cpu", progress=quiet,
            preprocessing=Preprocessing(height=64, width=64),
            settings={"steps": 60, "anomalies": 32, "width": 32, "heads": 4, "hidden": 64, "refiner": 16},
        )  # fmt: skip
        return run, export_run(run.path, out / "bundle", precision="float32", rules=RULES, progress=quiet)


def canvas(path: Path) -> np.ndarray:
    return to_canvas(load_image(path), Preprocessing(height=64, width=64))


def test_bundle_carries_a_prompt_for_each_product(packed: tuple[Run, Bundle]) -> None:
    manifest = packed[1].manifest
    assert manifest.products == manifest.subclasses == KNOWN
    assert manifest.takes_product
    assert manifest.product_state == (PROMPTS,)
    assert next(tensor.shape for tensor in manifest.state if tensor.name == PROMPTS) == (2, 16, 32)


@pytest.mark.parametrize("engine", list(Engine))
def test_box_is_told_of_a_third_product_by_one_good_image(
    packed: tuple[Run, Bundle], folders: dict[str, Path], tmp_path: Path, engine: Engine
) -> None:
    run, bundle = packed
    good = folders[THIRD] / "train" / "good"
    image = min(good.glob("*.png"))
    made = make_product(Detector.open(bundle, engine=engine, precision=Precision.FLOAT32), THIRD, image, good)
    write_product(tmp_path / "third.product", made)
    read = read_product(tmp_path / "third.product")
    require_fit(read, bundle, "third.product")

    # The encoder's tokens that training would have kept for this image.
    head = run.head
    assert isinstance(head, OneNipHead)
    with torch.no_grad():
        taps = dict(zip(run.trunk.tap_names, run.trunk(torch.from_numpy(canvas(image)[None])), strict=True))
        tokens = head.reconstructor.encode(head.tokens(*(taps[name] for name in head.tap_names)))[0]
    np.testing.assert_allclose(read.state[PROMPTS], tokens.numpy(), atol=1e-3)

    box = Detector.open(bundle, engine=engine, precision=Precision.FLOAT32)
    before = [box.map_of_canvas(canvas(image), Look(product)) for product in range(len(KNOWN))]
    box.prepare_products([read]).result().put_in_force()
    assert box.products == (*KNOWN, THIRD)
    for product, found in enumerate(before):
        np.testing.assert_allclose(box.map_of_canvas(canvas(image), Look(product)), found, rtol=1e-4, atol=1e-4)
    assert read.calibration is not None
    for group, score in zip(read.calibration.groups, read.calibration.scores, strict=True):
        own = pool_score(box.map_of_canvas(canvas(good / str(group)), Look(2)), bundle.manifest.pooling)
        assert own == pytest.approx(float(score), rel=1e-4)
