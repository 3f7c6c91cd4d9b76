"""A detector of a bundle for several products: each frame as the product of its look, and products added behind."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edge.adaptation.look import Look
from edge.bundle import Bundle, Engine, load_arrays
from edge.errors import BundleError, EngineError
from edge.frames import Frame
from edge.inference.detector import Detector
from edge.inference.onnx_file import read_initialisers, with_initialisers
from edge.inference.state import check_state, stored_state
from edge.judgement.score import pool_score
from tests.edge.routed_bundle import BRIGHT, DARK, bright_frame, dark_frame
from tests.edge.tiny_bundle import repack
from tests.edge.unified_bundle import BANKS, MAKE, PRODUCTS, make_product_file, make_unified_bundle

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SOON = 20.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_unified_bundle(tmp_path_factory.mktemp("unified") / "bundle")


def frame(image: npt.NDArray[np.uint8]) -> Frame:
    return Frame(image, "cam", 0, 0, datetime.now(timezone.utc))


def score(detector: Detector, image: npt.NDArray[np.uint8], product: int) -> float:
    return pool_score(detector.predict(frame(image), Look(product)).anomaly_map, detector.bundle.manifest.pooling)


@pytest.mark.parametrize("engine", list(Engine))
def test_a_frame_is_judged_as_the_product_of_its_look(bundle: Bundle, engine: Engine) -> None:
    detector = Detector.open(bundle, engine=engine, threads=1)
    assert detector.products == PRODUCTS
    for index, name in enumerate(PRODUCTS):
        good = MAKE[name](5)
        assert detector.predict(frame(good), Look(index)).subclass == name
        assert score(detector, good, index) < score(detector, good, 1 - index) / 2
        ahead = detector.begin(frame(good), Look(index))
        assert ahead is not None
        found = ahead.result()
        assert found.subclass == name
        np.testing.assert_allclose(found.anomaly_map, detector.predict(frame(good), Look(index)).anomaly_map, atol=1e-5)


@pytest.mark.parametrize("product", [-1, 2, 7])
def test_a_product_that_the_head_lacks_is_an_error_with_every_engine(bundle: Bundle, product: int) -> None:
    for engine in Engine:
        detector = Detector.open(bundle, engine=engine, threads=1)
        with pytest.raises(EngineError, match="no such product"):
            detector.predict(frame(dark_frame(1)), Look(product))


def test_a_head_that_takes_no_product_names_it_all_the_same(tmp_path: Path) -> None:
    detector = Detector.open(make_unified_bundle(tmp_path / "b", takes_product=False, router=False), threads=1)
    assert [detector.predict(frame(dark_frame(1)), Look(i)).subclass for i in range(2)] == [DARK, BRIGHT]


def test_golden_frames_are_run_as_their_product(bundle: Bundle, tmp_path: Path) -> None:
    own = make_unified_bundle(tmp_path / "b")
    path = own.file(own.manifest.golden.file)
    arrays = load_arrays(path)

    def reopened(products: npt.NDArray[np.int64]) -> Bundle:
        np.savez(path, **{**arrays, "product": products})
        return repack(own)

    with pytest.raises(EngineError, match="misses the golden scores"):
        Detector.open(reopened(1 - arrays["product"]), threads=1)
    for wrong in (
        arrays["product"][:-1],
        arrays["product"] + 9,
        arrays["product"] - 3,
        arrays["product"].astype(float),
    ):
        with pytest.raises(BundleError, match="product"):
            Detector.open(reopened(wrong), threads=1)


@pytest.mark.parametrize("engine", list(Engine))
def test_an_added_product_is_judged_by_its_own_rows_and_changes_nobody_elses(
    bundle: Bundle, engine: Engine, tmp_path: Path
) -> None:
    def middle_frame(seed: int) -> npt.NDArray[np.uint8]:
        return bright_frame(seed, 30)

    detector = Detector.open(bundle, engine=engine, threads=1)
    before = [score(detector, MAKE[name](7), index) for index, name in enumerate(PRODUCTS)]
    added = make_product_file(tmp_path / "m.safetensors", bundle, middle_frame, name="middle")
    detector.prepare_products([added]).result(SOON).put_in_force()

    assert detector.products == (*PRODUCTS, "middle")
    assert detector.golden_error() <= 1e-3
    assert [score(detector, MAKE[name](7), index) for index, name in enumerate(PRODUCTS)] == pytest.approx(before)
    assert score(detector, middle_frame(9), 2) < min(score(detector, middle_frame(9), index) for index in range(2)) / 2
    assert detector.predict(frame(middle_frame(9)), Look(2)).subclass == "middle"
    # Another memory keeps what was added, and a file that is given again takes its own place.
    detector.switch_state(stored_state(bundle), memory_version=3).result(SOON)
    assert detector.predict(frame(middle_frame(9)), Look(2)).memory_version == 3
    again = make_product_file(tmp_path / "m.safetensors", bundle, dark_frame, name="middle")
    detector.prepare_products([again]).result(SOON).put_in_force()
    assert detector.products == (*PRODUCTS, "middle")
    assert score(detector, dark_frame(9), 2) < score(detector, middle_frame(9), 2)


def test_more_rows_are_for_products_alone(bundle: Bundle) -> None:
    state = stored_state(bundle)
    longer = np.concatenate([state[BANKS], state[BANKS][:1]])
    check_state(bundle, {BANKS: longer}, "here")
    for wrong in (state[BANKS][:1], longer[:, :-1], longer.astype(np.float64), np.float32(1)):
        with pytest.raises(BundleError, match="here"):
            check_state(bundle, {BANKS: wrong}, "here")


def test_initialisers_grow_only_where_they_may(bundle: Bundle) -> None:
    model = bundle.file(bundle.manifest.head.float32).read_bytes()
    longer = np.concatenate([stored_state(bundle)[BANKS]] * 3)
    grown = read_initialisers(with_initialisers(model, {BANKS: longer}, more_rows=(BANKS,)))
    assert grown[BANKS].shape == longer.shape
    assert grown[BANKS].length == longer.nbytes
    assert grown.keys() == read_initialisers(model).keys()
    for wrong, allowed in ((longer, ()), (longer[:1], (BANKS,)), (longer[..., 1:], (BANKS,))):
        with pytest.raises(EngineError, match="shape"):
            with_initialisers(model, {BANKS: wrong}, more_rows=allowed)
