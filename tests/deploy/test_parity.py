from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.parity import ParityRules, PathScores, Sample, draw_sample, jitter, judge, require
from edge.bundle import Engine, Precision
from edge.errors import DataError, GateError

INT8 = (Engine.OPENVINO, Precision.INT8)
FLOAT32 = (Engine.OPENVINO, Precision.FLOAT32)


def _sample(good: int = 400, bad: int = 200, images: int = 40) -> Sample:
    blank = np.zeros((1, 1, 1, 3), np.uint8)
    return Sample(
        good=blank.repeat(good, 0), good_base=np.arange(good) % images, defective=blank.repeat(bad, 0),
        defect_base=np.arange(bad) % 20, images=images, contrast=0.3, in_window=True,
    )  # fmt: skip


def _reference(seed: int = 0) -> PathScores:
    rng = np.random.default_rng(seed)
    maps = rng.random((4, 5, 5)).astype(np.float32)
    return PathScores(rng.normal(10, 1, 400).astype(np.float32), rng.normal(11.8, 1, 200).astype(np.float32), maps)


def test_judge_passes_what_scores_the_same() -> None:
    reference = _reference()
    report = judge(_sample(), reference, {INT8: reference, FLOAT32: reference})
    assert report.passed
    assert 0.80 <= report.reference_auroc <= 0.95
    require(report)


def _broken(kind: str, reference: PathScores) -> PathScores:
    rng = np.random.default_rng(1)
    if kind == "shift":
        return PathScores(reference.good + 0.5, reference.defective + 0.5)
    if kind == "flipped":
        # Swap the highest good scores with others of the copies: the medians stay.
        good = reference.good.copy()
        good[np.argsort(-good)[:6]] = np.median(good)
        good[rng.choice(np.flatnonzero(good < 9), 6, replace=False)] = 20
        return PathScores(good, reference.defective)
    if kind == "drops":
        return PathScores(reference.good, reference.defective - np.float32(0.1))
    return PathScores(reference.good * np.float32(np.nan), reference.defective)


@pytest.mark.parametrize("kind", ["shift", "flipped", "drops", "not finite"])
def test_judge_refuses_with_figures(kind: str) -> None:
    reference = _reference()
    report = judge(_sample(), reference, {INT8: _broken(kind, reference), FLOAT32: reference})
    assert not report.passed
    assert any(kind in text for text in report.refusals)
    with pytest.raises(GateError, match="--precision float32") as caught:
        require(report)
    assert caught.value.exit_code == 4
    assert "openvino int8" in str(caught.value)


def test_judge_refuses_float32_maps_that_differ_from_torch() -> None:
    reference = _reference()
    path = PathScores(reference.good, reference.defective, reference.maps * np.float32(1.002))
    report = judge(_sample(), reference, {FLOAT32: path})
    assert not report.passed
    with pytest.raises(GateError, match="exported graph"):
        require(report)


def _routed(flipped: int, unknown: int, known: float = 0.5) -> PathScores:
    """The reference's scores with a router of two experts that gives some images to the other one, or to none."""
    reference = _reference()
    routes = np.tile(np.array([known, -3], np.float32), (400, 1))
    routes[:flipped] = routes[:flipped, ::-1]
    routes[400 - unknown :, 0] = -0.1
    return dataclasses.replace(reference, routes=routes)


@pytest.mark.parametrize(
    ("flipped", "unknown", "refused"),
    [(0, 0, ""), (4, 0, ""), (5, 0, "another expert 0.0125"), (0, 8, ""), (0, 9, "unknown product 0.0225")],
)
def test_judge_refuses_a_router_that_decides_otherwise(flipped: int, unknown: int, refused: str) -> None:
    report = judge(_sample(), _routed(0, 0), {INT8: _routed(flipped, unknown)})
    assert report.passed == (not refused)
    assert refused in "".join(report.refusals)
    (path,) = report.paths
    assert (path.rerouted, path.unknown) == (flipped / 400, unknown / 400)


def test_judge_refuses_a_router_that_is_gone_or_no_number() -> None:
    for path in (_reference(), _routed(0, 0, known=float("nan"))):
        assert "another expert 1.0" in "".join(judge(_sample(), _routed(0, 0), {INT8: path}).refusals)
    (path,) = judge(_sample(), _reference(), {INT8: _reference()}).paths
    assert (path.rerouted, path.unknown) == (None, None)


def test_judge_drops_an_optional_precision_instead() -> None:
    reference = _reference()
    pair = (Engine.OPENVINO, Precision.BFLOAT16)
    report = judge(_sample(), reference, {pair: _broken("shift", reference)}, optional=(Precision.BFLOAT16,))
    assert report.passed
    assert report.dropped == ["openvino bfloat16"]


@settings(deadline=None, max_examples=25)
@given(st.floats(0.1, 10), st.integers(0, 1000))
def test_judge_does_not_mind_a_monotone_change_of_scale_in_its_ranks(scale: float, seed: int) -> None:
    reference = _reference(seed)
    scaled = PathScores(reference.good * np.float32(scale), reference.defective * np.float32(scale))
    (path,) = judge(_sample(), reference, {INT8: scaled}).paths
    assert path.auroc_drop == pytest.approx(0, abs=1e-3)
    assert path.flipped is not None
    assert path.flipped <= 0.005


def _pictures(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(90, 110, (n, 16, 16, 3)).astype(np.uint8)


def _stain(contrast: float) -> np.ndarray:
    pictures = _pictures(30, 3).astype(np.float32)
    pictures[:, 4:8, 4:8] += 100 * contrast
    return np.clip(pictures, 0, 255).astype(np.uint8)


def _score(canvases: np.ndarray) -> np.ndarray:
    return canvases.mean((1, 2, 3)).astype(np.float32)


def test_draw_sample_finds_the_contrast_of_the_window() -> None:
    sample = draw_sample(_pictures(30, 1), _stain, _score)
    assert sample.in_window
    assert 0.01 < sample.contrast < 1
    assert len(sample.good) == ParityRules().good_samples
    assert sample.images == 30


def test_draw_sample_takes_the_nearest_where_defects_stay_invisible() -> None:
    sample = draw_sample(_pictures(30, 1), lambda _contrast: _pictures(30, 3), _score)
    assert not sample.in_window
    assert sample.contrast == 1.0


def test_draw_sample_refuses_too_few_good_images_and_odd_defects() -> None:
    with pytest.raises(DataError, match="at least 6"):
        draw_sample(_pictures(5, 1), _stain, _score)
    with pytest.raises(DataError, match="defects are"):
        draw_sample(_pictures(8, 1), lambda _c: _pictures(3, 1)[:, :8], _score)


def test_jitter_keeps_the_originals_and_is_seeded() -> None:
    pictures = _pictures(5, 1)
    first, base = jitter(pictures, 12, seed=4)
    np.testing.assert_array_equal(first[:5], pictures)
    np.testing.assert_array_equal(first, jitter(pictures, 12, seed=4)[0])
    assert base.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert not np.array_equal(first[5], pictures[0])


def _two_products() -> Sample:
    sample = _sample()
    return dataclasses.replace(sample, good_products=sample.good_base % 2, defect_products=sample.defect_base % 2)


def test_judge_of_products_measures_each_by_itself_and_gates_their_mean() -> None:
    sample, reference = _two_products(), _reference()
    # Another scale for the second product: scores of two are never compared.
    shift = np.float32(1000)
    moved = PathScores(
        reference.good + shift * (sample.good_products == 1),
        reference.defective + shift * (sample.defect_products == 1),
    )
    report = judge(sample, moved, {INT8: moved})
    assert report.passed
    assert report.good_iqr == pytest.approx(judge(_sample(), reference, {}).good_iqr, rel=0.3)
    (path,) = report.paths
    assert [one.auroc_drop for one in path.products] == [0.0, 0.0]
    assert path.auroc == pytest.approx(np.mean([one.auroc for one in path.products]))


def test_judge_refuses_one_product_that_shifts_where_the_mean_does_not() -> None:
    sample, reference = _two_products(), _reference()
    quiet = dataclasses.replace(ParityRules(), shift=0.5)
    iqr = judge(sample, reference, {}).good_iqr
    path = PathScores(
        reference.good + np.float32(0.8 * iqr) * (sample.good_products == 1),
        reference.defective + np.float32(0.8 * iqr) * (sample.defect_products == 1),
    )
    report = judge(sample, reference, {INT8: path}, rules=quiet)
    assert len(report.refusals) == 1
    assert "of one product" in report.refusals[0]
    assert judge(_sample(), reference, {INT8: reference}).paths[0].products == []


def test_draw_sample_gives_each_product_its_part_of_the_defects() -> None:
    products = np.repeat([0, 1, 2], 10)
    rules = dataclasses.replace(ParityRules(), defect_samples=12)
    sample = draw_sample(_pictures(30, 1), _stain, _score, rules=rules, products=products)
    assert sample.defect_products is not None
    assert np.bincount(sample.defect_products).tolist() == [4, 4, 4]
    assert (sample.defect_products == products[sample.defect_base]).all()
    assert (sample.good_products == products[sample.good_base]).all()
