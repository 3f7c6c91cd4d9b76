"""The canary file: what is written comes back, and whatever else lies there is refused by name, under caps."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.aggregator.canaries import Canaries, read_canaries, write_canaries
from edge.errors import DataError
from tests.deploy.fleet_values import EMBEDDING_ID

if TYPE_CHECKING:
    from pathlib import Path


def canaries(**changes: Any) -> Canaries:
    rng = np.random.default_rng(0)
    good, defect = rng.standard_normal((7, 3)).astype(np.float32), rng.standard_normal((5, 3)).astype(np.float32)
    made = Canaries(embedding_id=EMBEDDING_ID, product="part", defect=defect, good=good, threshold=1.5)
    return replace(made, **changes)


def same(one: Canaries, other: Canaries) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Canaries.__slots__)


def pack(path: Path, **changes: Any) -> Path:
    """Write fields as they are; None leaves one out."""
    made = canaries()
    fields = {name: np.asarray(getattr(made, name)) for name in Canaries.__slots__} | changes
    np.savez(path, **{name: field for name, field in fields.items() if field is not None})
    return path


@pytest.mark.parametrize("product", ["", "part", "Bänder/Ø 3"])
def test_canaries_come_back(tmp_path: Path, product: str) -> None:
    path = tmp_path / "c.npz"
    write_canaries(path, canaries(product=product))
    assert same(read_canaries(path), canaries(product=product))
    assert same(read_canaries(pack(path)), canaries())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defect": None}, "expected"),
        ({"more": np.zeros(1)}, "expected"),
        ({"defect": np.zeros((2, 3))}, "defect is float64"),
        ({"good": np.zeros((0, 3), np.float32)}, "good is"),
        ({"good": np.zeros(3, np.float32)}, "good is"),
        ({"good": np.full((2, 3), np.nan, np.float32)}, "good holds"),
        ({"good": np.zeros((2, 4), np.float32)}, "good ones 4"),
        ({"good": np.asfortranarray(np.zeros((2, 3), np.float32))}, "good is not in C order"),
        ({"defect": np.array([[1, None]])}, "defect is object"),
        ({"threshold": np.float64(0)}, "threshold is 0"),
        ({"threshold": np.float64(np.nan)}, "threshold is nan"),
        ({"threshold": np.zeros(2)}, "threshold is float64"),
        ({"embedding_id": np.array("xyz")}, "embedding_id is 'xyz'"),
        ({"embedding_id": np.array(3)}, "embedding_id is int64"),
        ({"product": np.array("x" * 300)}, "product is"),
        ({"product": np.frombuffer(b"\xff\xff\xff\xff", "<U1")[0:1].reshape(())}, "product is not a text"),
    ],
)
def test_other_fields_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as told:
        read_canaries(pack(tmp_path / "c.npz", **changes))
    assert str(tmp_path / "c.npz") in str(told.value)


@pytest.mark.parametrize(("name", "value"), [("embedding_id", "AB" * 32), ("product", "x" * 300), ("threshold", -1.0)])
def test_canaries_refuse(name: str, value: object) -> None:
    with pytest.raises(DataError, match=name):
        canaries(**{name: value})


def test_a_file_beyond_the_cap_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.npz"
    write_canaries(path, canaries(defect=np.zeros((100_000, 3), np.float32)))
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="unpacks to more than 1000000"):
        read_canaries(path, most_bytes=1_000_000)
    monkeypatch.setattr("deploy.aggregator.canaries.MOST_BYTES", 1_000_000)
    with pytest.raises(DataError, match="take fewer"):
        write_canaries(path, canaries(defect=np.zeros((100_000, 3), np.float32)))


@pytest.mark.parametrize("shape", [(2**40, 3), (2**62, 8), (-2, -3), (1, 3)])
def test_a_shape_that_lies_takes_no_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path, field = pack(tmp_path / "c.npz", defect=None), io.BytesIO()
    np.lib.format.write_array_header_1_0(field, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("defect.npy", field.getvalue() + bytes(24))
    with pytest.raises(DataError, match="defect is"):
        read_canaries(path)


def test_files_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    for path in (tmp_path / "text.npz", tmp_path / "missing.npz", tmp_path):
        with pytest.raises(DataError, match="not a readable npz"):
            read_canaries(path)
    with pytest.raises(DataError, match="cannot be written"):
        write_canaries(tmp_path / "no" / "c.npz", canaries())


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damage_gives_the_typed_error_or_the_same_canaries(tmp_path: Path, data: st.DataObject) -> None:
    path = pack(tmp_path / "c.npz")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([None, data.draw(st.integers(0, len(content)))]))])
    try:
        found = read_canaries(path)
    except DataError:
        return
    assert same(found, canaries())  # the zip's sums see every other change
