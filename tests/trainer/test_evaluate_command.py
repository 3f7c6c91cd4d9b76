"""The body of `lineward evaluate`: what it accepts, what it writes, and that runs and bundles are judged alike."""

from __future__ import annotations

import json
import shutil
from datetime import datetime, timezone
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from edge.bundle import Bundle, Engine, Pooling, Precision, Preprocessing
from edge.errors import BundleError, DataError, UsageError
from edge.inference import detector as detector_module
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from edge.judgement.threshold import fit_threshold
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle, repack
from trainer.evaluation import command
from trainer.evaluation.command import evaluate
from trainer.runs import RunRecord


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    made = make_tiny_bundle(tmp_path_factory.mktemp("evaluate") / "bundle")
    return repack(made, parity={"int8": {"shift": 0.0125}})


@pytest.fixture
def data(tmp_path):
    """A folder of five good and four defective test images with masks, which differ in size."""
    root = tmp_path / "data"
    for name in ("train/good", "test/good", "test/spot", "ground_truth/spot"):
        (root / name).mkdir(parents=True)
    cv2.imwrite(str(root / "train/good/0.png"), good_frame(900))
    for i in range(5):
        cv2.imwrite(str(root / f"test/good/{i}.png"), good_frame(1000 + i, height=96 + 8 * i))
    for i in range(4):
        image, clean = defective_frame(2000 + i), good_frame(2000 + i)
        mask = np.any(image != clean, axis=2)
        assert 0 < mask.mean() < 0.5
        cv2.imwrite(str(root / f"test/spot/{i}.png"), image)
        cv2.imwrite(str(root / f"ground_truth/spot/{i}_mask.png"), mask.astype(np.uint8) * 255)
    return root


def fake_run():
    """A run whose detector looks for light, without training."""
    preprocessing = Preprocessing(height=64, width=64)
    record = RunRecord(
        method="brightness",
        preset="quick",
        config={},
        product="tiny",
        preprocessing=preprocessing,
        pooling=Pooling(cells=2),
        seed=3,
        data_sha256="0" * 64,
        train_images=7,
        validation={},
        seconds=1.0,
        versions={},
        created=datetime.now(timezone.utc),
    )

    def judge(canvas):
        return canvas.astype(np.float32).max(axis=2).reshape(16, 4, 16, 4).mean(axis=(1, 3))

    canvases = [to_canvas(good_frame(seed), preprocessing) for seed in range(30)]
    scores = np.array([pool_score(judge(canvas), record.pooling) for canvas in canvases], np.float32)
    groups = np.array([str(seed) for seed in range(30)])
    return SimpleNamespace(record=record, judge=judge, holdout_scores=lambda: scores, holdout_groups=groups)


@pytest.mark.parametrize("precision", ["float32", Precision.INT8])
def test_bundle_is_judged_on_the_engine_and_threshold_asked_for(bundle, data, tmp_path, precision, capsys):
    out = tmp_path / "out" / "figures.json"
    report = tmp_path / "out" / "report.html"
    found = evaluate(
        run=None, bundle=bundle.path, data=data, json=out, report=report, engine="onnxruntime", precision=precision
    )
    figures = json.loads(out.read_text())
    assert (figures["engine"], figures["precision"]) == ("onnxruntime", Precision(precision).value)
    calibration = bundle.calibration(Engine.ONNXRUNTIME, Precision(precision))
    expected = fit_threshold(calibration.scores, calibration.groups, 0.01)
    assert figures["threshold"] == pytest.approx(expected.value)
    assert (figures["n_good"], figures["n_defective"]) == (5, 4)
    assert figures["image_auroc"] == 1.0
    assert figures["pixel_auroc"] > 0.7
    assert figures == json.loads(json.dumps(found.figures()))
    page = report.read_text(encoding="utf-8")
    assert bundle.id in page
    assert "0.0125" in page
    assert any("sizes" in note for note in found.notes)
    assert "I-AUROC" in capsys.readouterr().out


def test_run_is_judged_by_torch_at_a_threshold_from_its_own_holdout(data, monkeypatch, tmp_path):
    run = fake_run()
    monkeypatch.setattr(command.Run, "load", lambda _path: run)
    report = tmp_path / "report.html"
    found = evaluate(run=tmp_path / "run", bundle=None, data=data, report=report, alpha=0.1)
    assert (found.subject.engine, found.subject.precision) == ("torch", "float32")
    assert found.threshold == fit_threshold(run.holdout_scores(), run.holdout_groups, 0.1)
    assert found.images[0].score == pytest.approx(
        pool_score(
            run.judge(to_canvas(cv2.imread(str(data / "test/good/0.png")), run.record.preprocessing)), Pooling(cells=2)
        )
    )
    assert "train_images" in report.read_text(encoding="utf-8")


def test_alpha_moves_the_threshold(bundle, data):
    lax, strict = (
        evaluate(run=None, bundle=bundle.path, data=data, alpha=alpha).threshold.value for alpha in (0.2, 0.001)
    )
    assert lax < strict


def test_fallback_is_told_in_the_notes(bundle, data, monkeypatch):
    opened = detector_module.Detector.open(bundle, engine=Engine.ONNXRUNTIME, precision=Precision.FLOAT32)
    opened.status = detector_module.DetectorStatus(
        Engine.ONNXRUNTIME, Precision.FLOAT32, Engine.ONNXRUNTIME, Precision.INT8, "golden frames miss", 0.0
    )
    monkeypatch.setattr(command.Detector, "open", lambda *_args, **_options: opened)
    found = evaluate(run=None, bundle=bundle.path, data=data)
    assert any("golden frames miss" in note for note in found.notes)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"run": None, "bundle": None}, "exactly one"),
        ({"run": "run", "bundle": "bundle"}, "exactly one"),
        ({"run": "run", "bundle": None, "engine": "openvino"}, "belong to a bundle"),
        ({"run": "run", "bundle": None, "precision": "int8"}, "belong to a bundle"),
        ({"run": None, "bundle": "bundle", "engine": "tensorflow"}, "onnxruntime, openvino"),
        ({"run": None, "bundle": "bundle", "precision": "int4"}, "float32, bfloat16, int8"),
        ({"run": None, "bundle": "bundle", "alpha": 0.0}, "alpha"),
        ({"run": None, "bundle": "bundle", "alpha": 1.0}, "alpha"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_read(options, words, tmp_path):
    with pytest.raises(UsageError, match=words) as caught:
        evaluate(data=tmp_path / "absent", **options)
    assert caught.value.exit_code == 2


def test_folder_without_test_images_is_refused(bundle, data, tmp_path):
    shutil.rmtree(data / "test")
    shutil.rmtree(data / "ground_truth")
    with pytest.raises(DataError, match="no test images"):
        evaluate(run=None, bundle=bundle.path, data=data, json=tmp_path / "figures.json")
    assert not (tmp_path / "figures.json").exists()


def test_mask_of_another_size_is_refused_before_anything_is_judged(bundle, data, monkeypatch, tmp_path):
    mask = data / "ground_truth/spot/2_mask.png"
    cv2.imwrite(str(mask), np.zeros((5, 5), np.uint8))
    monkeypatch.setattr(command.Detector, "open", lambda *_args, **_options: pytest.fail("judged"))
    with pytest.raises(DataError, match=r"2_mask\.png"):
        evaluate(run=None, bundle=bundle.path, data=data, json=tmp_path / "figures.json")
    assert not (tmp_path / "figures.json").exists()


def test_truncated_bundle_is_refused(bundle, data, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    head = copy / Bundle.open(copy).manifest.head.float32
    head.write_bytes(head.read_bytes()[:-10])
    with pytest.raises(BundleError, match="sha256"):
        evaluate(run=None, bundle=copy, data=data)


def test_folder_that_is_no_run_is_refused(data, tmp_path):
    with pytest.raises(DataError, match=r"run\.json"):
        evaluate(run=tmp_path, bundle=None, data=data)
