"""`lineward prompt`: a product from one good image, calibrated by more of them, with the bundle's own detector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from edge.adaptation.look import Look
from edge.bundle import Engine, Precision
from edge.cli import app
from edge.errors import CaptureError, ProductError
from edge.inference.detector import Detector
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from edge.products.product_file import PROMPTS, read_product, require_fit
from edge.products.prompt import make_product
from tests.edge.prompted_bundle import make_prompted_bundle
from tests.edge.routed_bundle import bright_frame
from tests.edge.tiny_bundle import make_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from edge.bundle import Bundle

ENGINE = Engine.ONNXRUNTIME


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_prompted_bundle(tmp_path_factory.mktemp("prompted") / "bundle")


@pytest.fixture
def detector(bundle: Bundle) -> Detector:
    return Detector.open(bundle, engine=ENGINE, threads=1)


def striped(seed: int) -> npt.NDArray[np.uint8]:
    """A good part of a third product."""
    image = bright_frame(seed)
    image[:, ::16] = 20
    return image


@pytest.fixture
def good(tmp_path: Path) -> Path:
    folder = tmp_path / "good"
    folder.mkdir()
    for index in range(8):
        cv2.imwrite(str(folder / f"{index}.png"), striped(index))
    return folder


def score(detector: Detector, image: npt.NDArray[np.uint8], product: int) -> float:
    manifest = detector.bundle.manifest
    return pool_score(detector.map_of_canvas(to_canvas(image, manifest.preprocessing), Look(product)), manifest.pooling)


def test_prompt_is_what_the_head_gives_for_the_image(detector: Detector, good: Path) -> None:
    made = make_product(detector, "striped", good / "0.png")
    canvas = to_canvas(striped(0), detector.bundle.manifest.preprocessing)
    np.testing.assert_array_equal(made.state[PROMPTS], detector.embeddings_of_canvas(canvas)[0])
    assert made.calibration is None
    assert (made.engine, made.precision, made.image) == (ENGINE, Precision.FLOAT32, "0.png")
    require_fit(made, detector.bundle, "x")


def test_good_images_are_scored_as_the_box_will_score_them(bundle: Bundle, detector: Detector, good: Path) -> None:
    made = make_product(detector, "striped", good / "0.png", good)
    assert made.calibration is not None
    assert made.calibration.groups.tolist() == [f"{index}.png" for index in range(1, 8)]
    box = Detector.open(bundle, engine=ENGINE, threads=1)
    box.prepare_products([made]).result().put_in_force()
    for index, (found, one) in enumerate(zip(made.calibration.scores, made.calibration.maps, strict=True), start=1):
        assert found == pytest.approx(score(box, striped(index), 2), rel=1e-5)
        assert found == pytest.approx(pool_score(one.astype(np.float32), bundle.manifest.pooling), rel=1e-2)
    assert made.calibration.scores.max() < 0.5 * min(score(box, striped(3), product) for product in (0, 1))


def test_prompt_of_a_tiled_image_is_the_tile_nearest_to_all(tmp_path: Path) -> None:
    bundle = make_prompted_bundle(tmp_path / "bundle", tiles=3)
    detector = Detector.open(bundle, engine=ENGINE, threads=1)
    # Two thirds alike and an odd one first: the first tile of all must not be taken.
    image = np.concatenate([bright_frame(0) // 4, bright_frame(1), bright_frame(2)], axis=1)
    cv2.imwrite(str(tmp_path / "wide.png"), image)
    tiles = detector.embeddings_of_canvas(to_canvas(image, bundle.manifest.preprocessing))
    made = make_product(detector, "wide", tmp_path / "wide.png").state[PROMPTS]
    assert len(tiles) == 3
    assert any(np.array_equal(made, tile) for tile in tiles[1:])


def test_prompt_itself_does_not_calibrate_and_six_others_must(detector: Detector, good: Path) -> None:
    for index in (6, 7):
        (good / f"{index}.png").unlink()
    cv2.imwrite(str(good.parent / "same.png"), striped(0))
    with pytest.raises(ProductError, match="5 good images besides the prompt are too few"):
        make_product(detector, "striped", good.parent / "same.png", good)


def test_name_of_a_product_of_the_bundle_is_refused(detector: Detector, good: Path) -> None:
    with pytest.raises(ProductError, match="of the bundle itself"):
        make_product(detector, "dark", good / "0.png")


def test_bundle_that_takes_no_prompt_is_refused(tmp_path: Path, good: Path) -> None:
    detector = Detector.open(make_tiny_bundle(tmp_path / "tiny"), engine=ENGINE, threads=1)
    with pytest.raises(ProductError, match="told none by an image"):
        make_product(detector, "striped", good / "0.png")


def test_image_that_cannot_be_read_is_named(detector: Detector, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(CaptureError, match=r"bad\.png"):
        make_product(detector, "striped", tmp_path / "bad.png")


def test_command_writes_a_file_that_a_box_can_take(bundle: Bundle, good: Path, tmp_path: Path) -> None:
    out = tmp_path / "striped.product"
    command = ["prompt", "--bundle", str(bundle.path), "--product", "striped", "--image", str(good / "0.png"),
               "--engine", "onnxruntime", "--out", str(out)]  # fmt: skip
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "borrowed" in found.output
    assert read_product(out).calibration is None
    found = CliRunner().invoke(app, [*command, "--good", str(good)])
    assert found.exit_code == 0, found.output
    assert "7 good images" in found.output
    made = read_product(out)
    require_fit(made, bundle, str(out))
    assert made.calibration is not None
