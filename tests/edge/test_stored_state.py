"""A bundle's state in int8: read back as float32 at load, and refused where it does not fit the manifest."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from edge.bundle import Bundle, Engine, Precision, StateTensor, manifest_bytes
from edge.errors import BundleError
from edge.inference.detector import Detector
from edge.inference.preprocessing import to_canvas
from edge.inference.state import stored_state
from edge.memory.rows import RowsPrecision, encode_rows, round_rows
from tests.edge.tiny_bundle import defective_frame, make_tiny_bundle, maps_of, repack

if TYPE_CHECKING:
    from pathlib import Path

INT8 = StateTensor(name="bank", shape=(20, 32), stored=RowsPrecision.INT8)


def with_state(bundle: Bundle, tensors: dict[str, np.ndarray]) -> Bundle:
    """Write a state file of int8 rows, and a manifest that says so; golden scores are those of the float32 rows."""
    save_file(tensors, bundle.file("state.safetensors"))
    golden = bundle.manifest.golden
    loose = golden.model_copy(update={"tolerance": dict.fromkeys(golden.tolerance, 0.5)})
    return repack(bundle, state=(INT8,), golden=loose)


def encoded(bundle: Bundle) -> dict[str, np.ndarray]:
    values, scale = encode_rows(load_file(bundle.file("state.safetensors"))["bank"])
    return {"bank": values, "bank.scale": scale}


@pytest.mark.parametrize("engine", list(Engine))
def test_int8_rows_judge_as_the_float32_rows_they_stand_for(tmp_path: Path, engine: Engine) -> None:
    made = make_tiny_bundle(tmp_path / "b")
    rows = round_rows(load_file(made.file("state.safetensors"))["bank"])
    before = made.file("state.safetensors").stat().st_size
    detector = Detector.open(with_state(made, encoded(made)), engine=engine, precision=Precision.FLOAT32, threads=1)
    # 20 rows of 32 values: 4 bytes become 1, and a scale of 4 bytes for every row.
    assert before - made.file("state.safetensors").stat().st_size > 20 * 32 * 3 - 20 * 4 - 100
    canvas = to_canvas(defective_frame(5), made.manifest.preprocessing)
    expected = maps_of(
        made.path, made.manifest.preprocessing, [canvas], {"bank": rows}, engine=engine, precision=Precision.FLOAT32
    )[0]
    assert np.array_equal(detector.map_of_canvas(canvas), expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bank.scale": None}, r"bank\.scale is missing, int8 rows need float32 \[20, 1\]"),
        ({"bank.scale": np.ones(20, np.float32)}, r"bank\.scale is float32 \[20\]"),
        ({"bank.scale": np.ones((20, 1), np.float64)}, r"bank\.scale is float64"),
        ({"bank.scale": np.zeros((20, 1), np.float32)}, "not finite and above 0"),
        ({"bank.scale": np.full((20, 1), np.nan, np.float32)}, "not finite and above 0"),
        ({"bank.scale": np.full((20, 1), -1, np.float32)}, "not finite and above 0"),
        ({"bank": np.zeros((20, 32), np.float32)}, r"bank is float32 \[20, 32\], the manifest says int8"),
        ({"bank": np.zeros((32, 20), np.int8)}, r"bank is int8 \[32, 20\], the manifest says int8 \[20, 32\]"),
        ({"bank": None}, r"holds the tensors bank\.scale, the manifest needs bank"),
        ({"more": np.ones(3, np.float32)}, "holds the tensors bank, more, the manifest needs bank"),
    ],
)
def test_int8_rows_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray | None], words: str
) -> None:
    made = make_tiny_bundle(tmp_path / "b")
    tensors = {name: values for name, values in (encoded(made) | change).items() if values is not None}
    with pytest.raises(BundleError, match=words):
        Detector.open(with_state(made, tensors), threads=1)


def test_float32_manifest_with_int8_rows_is_refused(tmp_path: Path) -> None:
    made = make_tiny_bundle(tmp_path / "b")
    save_file(encoded(made), made.file("state.safetensors"))
    with pytest.raises(BundleError, match=r"holds the tensors bank, bank\.scale, the manifest needs bank"):
        Detector.open(repack(made), threads=1)


def test_manifest_mentions_int8_only_where_it_is_used(tmp_path: Path) -> None:
    """A bundle of float32 rows stays readable for a box that knows no other."""
    manifest = make_tiny_bundle(tmp_path / "b").manifest
    assert json.loads(manifest_bytes(manifest))["state"] == [{"name": "bank", "shape": [20, 32]}]
    stored = json.loads(manifest_bytes(manifest.model_copy(update={"state": (INT8,)})))["state"]
    assert stored == [{"name": "bank", "shape": [20, 32], "stored": "int8"}]
    assert StateTensor.model_validate(stored[0]) == INT8


def test_a_state_without_rows_cannot_be_int8() -> None:
    with pytest.raises(ValidationError, match="has no rows"):
        StateTensor(name="centre", shape=(3,), stored=RowsPrecision.INT8)


def test_float16_state_is_read_as_the_float32_numbers_that_it_holds(tmp_path: Path) -> None:
    made = make_tiny_bundle(tmp_path / "b")
    half = load_file(made.file("state.safetensors"))["bank"].astype(np.float16)
    entry = INT8.model_copy(update={"stored": RowsPrecision.FLOAT16})
    save_file({"bank": half}, made.file("state.safetensors"))
    read = stored_state(repack(made, state=(entry,)))["bank"]
    assert read.dtype == np.float32
    assert np.array_equal(read, half.astype(np.float32))


def test_float16_state_of_another_type_is_refused(tmp_path: Path) -> None:
    made = make_tiny_bundle(tmp_path / "b")
    entry = INT8.model_copy(update={"stored": RowsPrecision.FLOAT16})
    with pytest.raises(BundleError, match="bank is float32, the manifest says float16"):
        stored_state(repack(made, state=(entry,)))
