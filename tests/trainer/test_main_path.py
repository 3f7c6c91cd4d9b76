"""The main path, the same for every method: train, export, quantise, pack, verify, judge, evaluate.

On 12 images of good parts, the fewest that training takes: what few images must survive, more will.
"""

from __future__ import annotations

import json
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from deploy.cli import verify
from deploy.parity import LEAST_GOOD_IMAGES, ParityRules
from edge.bundle import Bundle, Engine, Precision, Preprocessing
from edge.errors import UsageError
from edge.frames import Frame
from edge.inference.detector import Detector
from edge.inference.engines import available_engines
from edge.inference.preprocessing import to_canvas
from trainer import export as exporting
from trainer.data.conveyor import write_default
from trainer.data.folder import load_image
from trainer.data.generic import generic_canvases
from trainer.evaluation.command import evaluate
from trainer.export import export_run
from trainer.fit import train
from trainer.methods.registry import methods

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trainer.runs import Run

METHODS = sorted(methods())
# Few samples of small images: the limits are those of a smoke test. The gate's own limits have their own tests.
RULES = ParityRules(
    shift=4.0, flipped=0.2, auroc_drop=0.2, rerouted=0.2, unknown=0.2, good_samples=32, defect_samples=32
)

# What takes long to learn learns less: the path is tried here, not how good a method is.
BRIEF = {"uniad": {"steps": 200}, "onenip": {"steps": 150, "anomalies": 48}}

IMAGES = 2 * LEAST_GOOD_IMAGES


def quiet(_what: str, _done: int, _total: int) -> None:
    pass


@pytest.fixture(scope="module", autouse=True)
def trunk_cache(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep the quantised trunk between test runs, out of the home folder, and made from a smaller generic set."""
    generic = generic_canvases(64)[::3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "generic_canvases", lambda: generic)
        patch.setenv("LINEWARD_CACHE", str(request.config.cache.mkdir("lineward")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    return write_default(folder, seed=4, kind="metal", train=IMAGES, test_good=16, test_defective=16, side=96)


@pytest.fixture(scope="module", params=METHODS)
def packed(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Bundle]:
    folder = tmp_path_factory.mktemp(request.param)
    run = train(
        method=request.param,
        data=data,
        out=folder / "run",
        preprocessing=Preprocessing(height=64, width=64),
        product="web",
        device="cpu",
        settings=BRIEF.get(request.param),
        progress=quiet,
    )
    return run, export_run(run.path, folder / "bundle", rules=RULES, progress=quiet)


def test_bundle_says_where_it_comes_from(packed: tuple[Run, Bundle]) -> None:
    run, bundle = packed
    manifest = bundle.manifest
    assert (manifest.method, manifest.product) == (run.record.method, "web")
    assert (manifest.pooling, manifest.preprocessing) == (run.record.pooling, run.record.preprocessing)
    assert manifest.provenance.data_sha256 == run.record.data_sha256
    assert manifest.provenance.train_images + manifest.provenance.calibration_images == IMAGES
    assert [tensor.name for tensor in manifest.state] == list(run.head.state_names)
    assert manifest.parity["passed"]


def test_bundle_holds_every_precision_of_every_engine(packed: tuple[Run, Bundle]) -> None:
    _, bundle = packed
    expected = {(engine, precision) for engine in available_engines() for precision in ("float32", "int8")}
    assert {pair for pair in bundle.calibrated() if pair[1] is not Precision.BFLOAT16} == expected


def test_bundle_float32_judges_as_the_run(packed: tuple[Run, Bundle], data: Path) -> None:
    run, bundle = packed
    paths = sorted(data.glob("test/*/*.png"))[::5]
    for engine in available_engines():
        detector = Detector.open(bundle, engine=engine, precision=Precision.FLOAT32, threads=1)
        assert detector.status.fallback_reason == ""
        for index, path in enumerate(paths):
            image = load_image(path)
            frame = Frame(image, "cam", index, time.monotonic_ns(), datetime.now(timezone.utc))
            expected = run.judge(to_canvas(image, run.record.preprocessing))
            found = detector.predict(frame).anomaly_map
            assert np.abs(found - expected).max() <= 1e-3 * np.abs(expected).max()


def test_verify_accepts_the_bundle_and_refuses_a_changed_one(packed: tuple[Run, Bundle], tmp_path: Path) -> None:
    _, bundle = packed
    app = typer.Typer()
    app.command()(verify)
    assert CliRunner().invoke(app, [str(bundle.path)]).exit_code == 0
    content = bundle.file("head.onnx").read_bytes()
    try:
        bundle.file("head.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "head.onnx" in str(CliRunner().invoke(app, [str(bundle.path)]).exception)
    finally:
        bundle.file("head.onnx").write_bytes(content)


def figures(data: Path, out: Path, **subject: Any) -> dict[str, Any]:
    evaluate(**{"run": None, "bundle": None, **subject}, data=data, json=out, alpha=0.1)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_evaluate_run_and_bundle_agree(packed: tuple[Run, Bundle], data: Path, tmp_path: Path) -> None:
    run, bundle = packed
    of_run = figures(data, tmp_path / "run.json", run=run.path)
    assert set(of_run) >= {
        "image_auroc", "image_ap", "image_f1", "pixel_auroc", "aupro", "fpr_at_threshold", "recall_at_threshold",
        "ms_per_image",
    }  # fmt: skip
    assert of_run["image_auroc"] > 0.6
    for engine in available_engines():
        exact = figures(
            data, tmp_path / "f.json", bundle=bundle.path, engine=Engine(engine), precision=Precision.FLOAT32
        )
        assert exact["image_auroc"] == pytest.approx(of_run["image_auroc"], abs=0.005)
        assert exact["pixel_auroc"] == pytest.approx(of_run["pixel_auroc"], abs=0.005)
    rounded = figures(data, tmp_path / "b.json", bundle=bundle.path)
    # 256 pairs of small images: what int8 may cost is the parity gate's question, this one is whether it judges at all.
    assert rounded["image_auroc"] == pytest.approx(of_run["image_auroc"], abs=0.1)


def test_export_unknown_precision_and_used_folder_are_refused(packed: tuple[Run, Bundle], tmp_path: Path) -> None:
    run, bundle = packed
    with pytest.raises(UsageError, match="--precision int4"):
        export_run(run.path, tmp_path / "bundle", precision="int4", progress=quiet)
    with pytest.raises(UsageError, match="exists already"):
        export_run(run.path, bundle.path, progress=quiet)
