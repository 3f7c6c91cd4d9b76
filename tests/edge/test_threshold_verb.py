"""`lineward threshold`: which thresholds budgets mean, the same that a box uses."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from edge.bundle import Engine, Precision
from edge.cameras import make_judge
from edge.cli import app
from edge.errors import BundleError, SettingsError, UsageError
from edge.frames import Prediction
from edge.settings import load_settings
from tests.edge.test_verdicts import prediction
from tests.edge.tiny_bundle import CALIBRATION_FRAMES, make_tiny_bundle
from tests.edge.unified_bundle import COUNT, make_unified_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle

FRAME = (96, 96)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def tables(*arguments: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(app, ["threshold", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def box_file(tmp_path: Path, bundle: Bundle, *cameras: dict[str, Any]) -> Path:
    path = tmp_path / "box.yaml"
    default = {"source": {"kind": "folder", "path": "."}}
    named = [{"name": f"cam-{index}", **default, **camera} for index, camera in enumerate(cameras)]
    path.write_text(yaml.safe_dump({
        "site": "s", "box": "b", "state_dir": "state", "bundle": str(bundle.path), "engine": "onnxruntime",
        "precision": "int8", "cameras": named,
    }))  # fmt: skip
    return path


def test_bundle_alone_shows_what_it_supports(bundle: Bundle) -> None:
    (table,) = tables("--bundle", str(bundle.path), "--mode", "triggered")

    assert (table["n"], table["groups"]) == (CALIBRATION_FRAMES, CALIBRATION_FRAMES)
    assert table["smallest_budget"] == pytest.approx(1000 / (CALIBRATION_FRAMES + 1))
    supported = {row["budget"]: row["supported"] for row in table["rows"]}
    assert supported == {100: True, 10: False, 1: False, 0.1: False}
    thresholds = [row["threshold"] for row in table["rows"]]
    assert thresholds == sorted(thresholds)
    assert [row["budget"] for row in table["rows"] if row["chosen"]] == [1]


def test_camera_of_a_box_has_the_threshold_that_the_box_uses(bundle: Bundle, tmp_path: Path) -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[:, 8:40] = 255
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    path = box_file(
        tmp_path, bundle,
        {"budget": {"false_events_per_hour": 2000}, "frame_rate": 10},
        {"mode": "triggered", "budget": {"false_nok_per_1000": 60}, "min_area": {"pixels": 300},
         "region_of_interest": {"mask": "mask.png"}, "events": {"enter_quantile": 0.99, "leave_quantile": 0.5}},
    )  # fmt: skip

    found = tables("--config", str(path), "--frame-size", "96x96")

    for camera, table in zip(load_settings(path).cameras, found, strict=True):
        calibration = bundle.calibration(Engine.ONNXRUNTIME, Precision.INT8)
        judge = make_judge(camera, bundle, calibration)
        blank = prediction(np.zeros(calibration.maps.shape[1:]), size=FRAME)
        judge.judge(Prediction(blank.anomaly_map, blank.frame, 0, 0))
        (row,) = [row for row in table["rows"] if row["chosen"]]
        assert (table["camera"], table["precision"]) == (camera.name, "int8")
        assert row["threshold"] == judge.threshold.value
        assert row["alpha"] == judge.threshold.alpha
        assert (row["enter_level"], row["leave_level"]) == (judge.enter_level, judge.leave_level)
    assert found[1]["highest_score"] < found[0]["highest_score"]
    assert [table["camera"] for table in tables("--config", str(path), "--camera", "cam-0")] == ["cam-0"]


def test_each_product_of_a_bundle_has_a_table_of_its_own(tmp_path: Path) -> None:
    unified = make_unified_bundle(tmp_path / "bundle")
    dark, bright = tables("--bundle", str(unified.path), "--engine", "onnxruntime")
    assert (dark["product"], bright["product"], dark["n"], bright["n"]) == ("dark", "bright", COUNT, COUNT)
    scores = unified.calibration(Engine.ONNXRUNTIME, Precision.FLOAT32)
    assert dark["highest_score"] == scores.of("dark").scores.max()
    assert bright["highest_score"] == scores.of("bright").scores.max() != dark["highest_score"]
    assert tables("--bundle", str(unified.path), "--engine", "onnxruntime", "--product", "bright") == [bright]
    said = CliRunner().invoke(app, ["threshold", "--bundle", str(unified.path)]).output
    assert "product    dark" in said
    with pytest.raises(UsageError, match="no product 'tiles'; the bundle has dark, bright"):
        tables("--bundle", str(unified.path), "--product", "tiles")


def test_table_is_readable(bundle: Bundle) -> None:
    result = CliRunner().invoke(app, ["threshold", "--bundle", str(bundle.path)])

    assert result.exit_code == 0
    assert bundle.id in result.output
    assert "40 good scores in 40 groups" in result.output
    assert "supported  budgets of " in result.output
    assert "extrapolated" in result.output
    assert "<- asked for" in result.output


def test_it_needs_numpy_alone(bundle: Bundle) -> None:
    """Neither OpenCV nor an engine is loaded for a bundle without mask or area."""
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom edge.cli import app\n"
        f"assert CliRunner().invoke(app, ['threshold', '--bundle', {str(bundle.path)!r}]).exit_code == 0\n"
        "print([name for name in ('cv2', 'onnxruntime', 'openvino', 'torch') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ([], UsageError, "give either --bundle"),
        (["--bundle", "{bundle}", "--engine", "abacus"], BundleError, "not calibrated for abacus"),
        (["--bundle", "{bundle}", "--frame-size", "big"], UsageError, "WIDTHxHEIGHT"),
        (["--bundle", "{bundle}", "--mode", "guess"], UsageError, "mode"),
        (["--bundle", "{bundle}", "--min-area", "1e9", "--frame-size", "96x96"], SettingsError, "min_area"),
        (["--bundle", "{bundle}", "--min-area", "300"], Exception, "--frame-size"),
        (["--config", "{box}", "--camera", "none"], UsageError, "no camera 'none'"),
    ],
)
def test_wrong_use_is_said_in_one_line(
    bundle: Bundle, tmp_path: Path, arguments: list[str], error: type[Exception], said: str
) -> None:
    box = box_file(tmp_path, bundle, {})
    given = [argument.format(bundle=bundle.path, box=box) for argument in arguments]

    with pytest.raises(error, match=said):
        CliRunner().invoke(app, ["threshold", *given], catch_exceptions=False)
