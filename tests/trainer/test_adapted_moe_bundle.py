"""A packed bundle of several experts: each has the moments of its own images, and int8 routes as float32 does."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

import deploy.pack as packing
import trainer.export as exporting
from deploy.parity import ParityRules
from deploy.progress import no_progress
from edge.adaptation.reference import described, read_reference
from edge.bundle import Engine, Precision, Preprocessing
from edge.frames import Frame
from edge.inference.detector import Detector
from trainer.data.texture_factory import TextureSubclass
from trainer.export import export_run
from trainer.fit import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle

SIDE, TRAIN, TEST = 96, 16, 70
PRODUCTS = {f"{name}{number}": TextureSubclass(name, number, 9, SIDE) for name, number in (
    ("cloth", 1), ("metal", 2), ("wafer", 4))}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Train and export Adapted-MoE on three generated sub-classes."""
    folder = tmp_path_factory.mktemp("experts")
    rows = write(folder / "data")
    (folder / "data" / "meta.csv").write_text("\n".join(["path,condition", *rows]))
    size = Preprocessing(height=SIDE, width=SIDE)
    run = train(method="adapted_moe", data=folder / "data", out=folder / "run", preprocessing=size,
                progress=no_progress)  # fmt: skip
    # What is tried is routing and moments: of so few and small images the other figures of the gate say little.
    rules = ParityRules(shift=9, flipped=1, auroc_drop=1, good_samples=200)
    with pytest.MonkeyPatch.context() as patch:
        # One engine, and few defects to look for the gate's contrast with: most of the time goes there.
        patch.setattr(packing, "available_engines", lambda: (Engine.ONNXRUNTIME,))
        patch.setattr(exporting, "_GATE_IMAGES", 18)
        return export_run(run.path, folder / "bundle", rules=rules, progress=no_progress)


def write(data: Path) -> list[str]:
    (data / "train" / "good").mkdir(parents=True)
    rows = []
    for name, product in PRODUCTS.items():
        for index in range(TRAIN):
            path = f"train/good/{name}_{index:02d}.png"
            cv2.imwrite(str(data / path), product.good("train", index))
            rows.append(f"{path},{name}")
    return rows


def test_each_expert_has_the_moments_of_its_own_images(bundle: Bundle) -> None:
    assert bundle.manifest.subclasses == tuple(PRODUCTS)
    assert described(bundle.manifest) == "moments of 3 sub-classes (cloth1, metal2, wafer4), from 39 training images"
    for precision in (Precision.FLOAT32, Precision.INT8):
        reference = read_reference(bundle, precision)
        assert reference is not None
        for moments, product in zip(reference.moments, PRODUCTS.values(), strict=True):
            shown = np.mean([product.good("train", index)[..., ::-1].mean((0, 1)) for index in range(TRAIN)], axis=0)
            assert moments.mean["image"] == pytest.approx(shown, abs=6)


def test_int8_routes_as_float32_does(bundle: Bundle) -> None:
    paths = [path for path in bundle.manifest.parity["paths"] if path["precision"] == "int8"]
    assert paths
    assert all(path["rerouted"] <= 0.01 and path["unknown"] <= 0.02 for path in paths)
    decisions = {}
    for precision in (Precision.FLOAT32, Precision.INT8):
        detector = Detector.open(bundle, engine=Engine.ONNXRUNTIME, precision=precision, threads=1)
        assert detector.status.precision is precision
        decisions[precision] = [decision(detector, product, i) for product in PRODUCTS.values() for i in range(TEST)]
    whole, rounded = (np.array(found) for found in decisions.values())
    assert len(whole) >= 200
    assert np.mean(whole == rounded) >= 0.99
    assert np.mean(whole == np.repeat(np.arange(3), TEST)) >= 0.9


def decision(detector: Detector, product: TextureSubclass, index: int) -> int:
    """Return the expert that a good image is given to, -1 for none."""
    frame = Frame(product.good("good", index), "cam", index, 0, datetime.now(timezone.utc))
    route = detector.predict(frame).route
    assert route is not None
    return int(route.argmax()) if route.max() >= 0 else -1
