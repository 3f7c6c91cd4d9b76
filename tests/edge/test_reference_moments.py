"""The reference moments of a bundle: read as they were written, refused by a typed error where they do not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save

from edge.adaptation.moments import IMAGE, Moments, Reference
from edge.adaptation.reference import described, read_reference, tensors_of
from edge.bundle import Bundle, Precision
from edge.errors import BundleError
from tests.edge.tiny_bundle import CHANNELS, TAPS, make_tiny_bundle, repack

if TYPE_CHECKING:
    import pathlib

FILE = "moments.safetensors"
SUBCLASSES = ("cloth", "metal", "wafer")
WIDTHS = dict(zip((IMAGE, *TAPS), (3, *CHANNELS), strict=True))


def reference(seed: int) -> Reference:
    """Return moments of three experts."""
    rng = np.random.default_rng(seed)

    def drawn(high: float) -> dict[str, Any]:
        return {name: rng.uniform(0, high, width).astype(np.float32) for name, width in WIDTHS.items()}

    return Reference(tuple(Moments(drawn(255), drawn(60)) for _ in SUBCLASSES), (0.5, 0.25, 1.0), SUBCLASSES)


def tensors() -> dict[str, Any]:
    return {**tensors_of(reference(1), Precision.FLOAT32), **tensors_of(reference(2), Precision.INT8)}


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("moments") / "bundle")


@pytest.fixture(scope="module")
def bundle(without: Bundle) -> Bundle:
    without.file(FILE).write_bytes(save(tensors()))
    return repack(without, moments_file=FILE, subclasses=SUBCLASSES)


def put(bundle: Bundle, content: bytes, folder: pathlib.Path) -> Bundle:
    """Return the bundle with another file of moments, as if that had been packed."""
    (folder / FILE).write_bytes(content)
    return replace(bundle, path=folder)


@pytest.mark.parametrize(("precision", "seed"), [(Precision.FLOAT32, 1), (Precision.INT8, 2)])
def test_what_was_written_is_read_of_the_precision_that_runs(bundle: Bundle, precision: Precision, seed: int) -> None:
    found, wanted = read_reference(bundle, precision), reference(seed)
    assert found is not None
    assert (found.usual, found.subclasses) == (wanted.usual, wanted.subclasses)
    for one, other in zip(found.moments, wanted.moments, strict=True):
        assert tuple(one.mean) == tuple(one.std) == tuple(WIDTHS)
        for name in WIDTHS:
            assert np.array_equal(one.mean[name], other.mean[name])
            assert np.array_equal(one.std[name], other.std[name])


def test_a_bundle_without_moments_opens_and_has_none(without: Bundle) -> None:
    assert without.manifest.moments_file is None
    assert read_reference(without, Precision.FLOAT32) is None


def test_a_precision_that_was_not_packed_is_named(bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="no moments of precision bfloat16, only float32, int8; export"):
        read_reference(bundle, Precision.BFLOAT16)


def test_what_the_taps_do_not_name_is_kept_beside_them(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    more = np.ones((3, 2), np.float32)
    content = save({**tensors(), "float32/mean/bands": more, "float32/std/bands": more})
    found = read_reference(put(bundle, content, tmp_path), Precision.FLOAT32)
    assert found is not None
    assert tuple(found.moments[0].mean) == (*WIDTHS, "bands")


ODD = {
    "mean/image is missing": {"mean/image": None},
    "std/stride8 is missing": {"std/stride8": None},
    "usual is missing": {"usual": None},
    "usual is float32 \\[2\\], not float32 \\[3\\]": {"usual": np.ones(2, np.float32)},
    "usual has values that are not above 0": {"usual": np.zeros(3, np.float32)},
    "mean/stride4 is float64": {"mean/stride4": np.ones((3, 8))},
    "mean/stride4 is float32 \\[1, 8\\]": {"mean/stride4": np.ones((1, 8), np.float32)},
    "mean/stride4 is \\[3, 7\\], std/stride4 \\[3, 8\\]": {"mean/stride4": np.ones((3, 7), np.float32)},
    "std/stride4 has values below 0": {"std/stride4": np.full((3, 8), -1, np.float32)},
    "std/image has values that are not finite": {"std/image": np.full((3, 3), np.nan, np.float32)},
    "mean/image is not \\[3, 3\\] of grey levels": {"mean/image": np.full((3, 3), 256, np.float32)},
    "mean/stride4 is float32 \\[3, 0\\]": dict.fromkeys(("mean/stride4", "std/stride4"), np.ones((3, 0), np.float32)),
    "std/detail is \\[3, 2\\], not \\[3, 1\\]": dict.fromkeys(
        ("mean/detail", "std/detail"), np.ones((3, 2), np.float32)
    ),
    "std/extra is missing": {"mean/extra": np.ones((3, 3), np.float32)},
}


@pytest.mark.parametrize("message", ODD)
def test_moments_that_do_not_fit_are_refused_by_name(bundle: Bundle, tmp_path: pathlib.Path, message: str) -> None:
    changed: dict[str, Any] = {**tensors(), **{f"float32/{name}": value for name, value in ODD[message].items()}}
    content = save({name: value for name, value in changed.items() if value is not None})
    with pytest.raises(BundleError, match=f"{FILE}: float32/{message}.*; export the bundle again"):
        read_reference(put(bundle, content, tmp_path), Precision.FLOAT32)


def test_a_file_that_is_gone_is_told(bundle: Bundle, tmp_path: pathlib.Path) -> None:
    with pytest.raises(BundleError, match="not a readable safetensors file"):
        read_reference(replace(bundle, path=tmp_path / "nowhere"), Precision.FLOAT32)


QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(bundle: Bundle, content: bytes, folder: pathlib.Path) -> None:
    """Read; what comes back must be usable, and nothing but a BundleError may be raised."""
    try:
        found = read_reference(put(bundle, content, folder), Precision.FLOAT32)
    except BundleError:
        return
    assert found is not None
    assert len(found.moments) == len(found.usual) == len(SUBCLASSES)
    assert min(found.usual) > 0
    for one in found.moments:
        assert {IMAGE, *TAPS} <= one.mean.keys() == one.std.keys()
        for name, mean in one.mean.items():
            assert mean.shape == one.std[name].shape != (0,)
            assert np.isfinite([mean, one.std[name]]).all()


def test_a_bundle_says_what_its_cameras_can_follow(bundle: Bundle, without: Bundle) -> None:
    assert described(without.manifest) == "no moments: cameras cannot follow their light"
    assert described(bundle.manifest) == "moments of 3 sub-classes (cloth, metal, wafer)"
    known = bundle.manifest.provenance.model_copy(update={"moments_from": "holdout", "moments_images": 9})
    one = bundle.manifest.model_copy(update={"provenance": known, "subclasses": ("",)})
    assert described(one) == "moments of one product, from 9 held-out images"


@QUICK
@given(data=st.data())
def test_damaged_bytes_are_read_or_refused(bundle: Bundle, tmp_path: pathlib.Path, data: st.DataObject) -> None:
    content = bytearray(save(tensors()))
    # Most of the damage in the header, where it changes what the rest means.
    places = st.one_of(st.integers(0, 400), st.integers(0, len(content) - 1))
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        content[place] = value
    cut = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    read_or_refuse(bundle, bytes(content[:cut]), tmp_path)


@QUICK
@given(data=st.data())
def test_other_tensors_are_read_or_refused(bundle: Bundle, tmp_path: pathlib.Path, data: st.DataObject) -> None:
    names = sorted(tensors())
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9)
    arrays = hnp.arrays(st.sampled_from([np.float32, np.float16, np.int8, np.bool_]), shapes)
    changes = data.draw(st.dictionaries(st.one_of(st.sampled_from(names), st.text(max_size=20)), arrays, max_size=3))
    read_or_refuse(bundle, save({**tensors(), **changes}), tmp_path)


@pytest.mark.parametrize("kind", ["BF16", "F16", "F8_E4M3", "U64", "BOOL"])
def test_other_types_of_the_same_bytes_are_refused(bundle: Bundle, tmp_path: pathlib.Path, kind: str) -> None:
    header, body = b'{"float32/usual":{"dtype":"%s","shape":[24],"data_offsets":[0,24]}}', bytes(24)
    filled = (header % kind.encode()).replace(b"[24]", b"[%d]" % (24 // {"BF16": 2, "F16": 2, "U64": 8}.get(kind, 1)))
    with pytest.raises(BundleError, match=FILE):
        read_reference(put(bundle, len(filled).to_bytes(8, "little") + filled + body, tmp_path), Precision.FLOAT32)
