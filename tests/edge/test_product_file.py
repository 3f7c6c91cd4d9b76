"""A product file: what is written comes back, what is damaged or of another bundle is refused, rows go behind."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from edge.bundle import CalibrationScores, Engine, Precision
from edge.errors import ProductError
from edge.products.product_file import (
    PROMPTS,
    ProductFile,
    read_product,
    require_fit,
    with_products,
    write_product,
)
from tests.edge.prompted_bundle import make_prompted_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle

SHAPE = (64, 12)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_prompted_bundle(tmp_path_factory.mktemp("prompted") / "bundle")


def scores(count: int, seed: int = 0) -> CalibrationScores:
    rng = np.random.default_rng(seed)
    maps = rng.random((count, 8, 8)).astype(np.float16)
    return CalibrationScores(rng.random(count).astype(np.float32), maps, np.array([f"é{i}" for i in range(count)]))


def product(of: Bundle, /, **changes: Any) -> ProductFile:
    row = np.random.default_rng(1).random(SHAPE, np.float32)
    made = ProductFile(
        product="third", bundle=of.id, head=of.manifest.head.id, engine=Engine.OPENVINO,
        precision=Precision.INT8, image="good.png", created=datetime(2026, 2, 3, tzinfo=timezone.utc),
        state={PROMPTS: row}, calibration=scores(3),
    )  # fmt: skip
    return replace(made, **changes)


@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200),
    count=st.integers(0, 4),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_what_is_written_comes_back(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, *, name: str, count: int, shape: list[int], seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "same.product"
    row = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    written = product(bundle, product=name, state={"a": row}, calibration=scores(count, seed) if count else None)
    write_product(path, written)
    found = read_product(path)
    for field in ("product", "bundle", "head", "engine", "precision", "image", "created"):
        assert getattr(found, field) == getattr(written, field)
    np.testing.assert_array_equal(found.state["a"], row)
    assert (found.calibration is None) == (not count)
    if found.calibration is not None and written.calibration is not None:
        for field in ("scores", "maps", "groups"):
            np.testing.assert_array_equal(getattr(found.calibration, field), getattr(written.calibration, field))


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_no_bit_can_change_unnoticed(
    bundle: Bundle, tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.product"
    written = product(bundle)
    write_product(path, written)
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = read_product(path)
    except ProductError:
        return
    # What is no tensor has no hash: a name or a time may read otherwise, but numbers never do.
    np.testing.assert_array_equal(found.state[PROMPTS], written.state[PROMPTS])
    assert found.calibration is not None
    assert written.calibration is not None
    np.testing.assert_array_equal(found.calibration.scores, written.calibration.scores)


@pytest.mark.parametrize("length", [0, 5, 40, -1])
def test_a_truncated_file_is_refused(bundle: Bundle, tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.product"
    write_product(path, product(bundle))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ProductError, match=r"cut\.product"):
        read_product(path)


def test_other_files_are_refused_by_name(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ProductError, match="cannot be read"):
        read_product(tmp_path / "none.product")
    with pytest.raises(ProductError, match="no product file"):
        read_product(bundle.path / "state.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"product": ""}, "product"),
        ({"engine": "other"}, "engine"),
        ({"groups": ["one"]}, "do not belong"),
        ({"more": 1}, "more"),
    ],
)
def test_a_header_of_another_kind_is_refused(
    bundle: Bundle, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "other.product"
    write_product(path, product(bundle))
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["product_file"])
    save_file(load_file(path), path, metadata={"product_file": json.dumps(header | change)})
    with pytest.raises(ProductError, match=message):
        read_product(path)


def test_values_that_are_not_finite_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "nan.product"
    write_product(path, product(bundle, state={PROMPTS: np.full(SHAPE, np.nan, np.float32)}))
    with pytest.raises(ProductError, match="not finite"):
        read_product(path)
    maps = np.full((3, 8, 8), np.inf, np.float16)
    write_product(path, product(bundle, calibration=replace(scores(3), maps=maps)))
    with pytest.raises(ProductError, match="not finite"):
        read_product(path)


def test_a_file_that_cannot_be_written_is_an_error_and_leaves_nothing(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ProductError, match="cannot be written"):
        write_product(tmp_path / "none" / "x.product", product(bundle))
    with pytest.raises(ProductError, match="product"):
        write_product(tmp_path / "x.product", product(bundle, product=""))
    assert not list(tmp_path.iterdir())


def test_a_product_fits_the_bundle_that_it_was_made_with(bundle: Bundle) -> None:
    require_fit(product(bundle), bundle, "x.product")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "0" * 64}, "the same head"),
        ({"bundle": "0" * 64, "head": "1" * 64}, "another head"),
        ({"product": "dark"}, "of the bundle itself"),
        ({"state": {PROMPTS: np.zeros((63, 12), np.float32)}}, r"\[63, 12\]"),
        ({"state": {"other": np.zeros(SHAPE, np.float32)}}, "other"),
        ({"calibration": replace(scores(3), maps=np.zeros((3, 9, 8), np.float16))}, r"\[9, 8\]"),
    ],
)
def test_a_product_of_something_else_is_refused(bundle: Bundle, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ProductError, match=message):
        require_fit(product(bundle, **change), bundle, "x.product")


def test_rows_of_more_products_go_behind_and_nothing_else_changes() -> None:
    state = {PROMPTS: np.arange(24, dtype=np.float32).reshape(2, 4, 3), "bank": np.ones((5, 3), np.float32)}
    rows = [np.full((4, 3), value, np.float32) for value in (7, 8)]
    made = [
        ProductFile("x", "", "", Engine.OPENVINO, Precision.INT8, "", datetime.now(timezone.utc), {PROMPTS: row})
        for row in rows
    ]
    grown = with_products(state, made)
    np.testing.assert_array_equal(grown[PROMPTS], np.concatenate([state[PROMPTS], np.stack(rows)]))
    np.testing.assert_array_equal(grown["bank"], state["bank"])
    assert with_products(state, []).keys() == state.keys()
