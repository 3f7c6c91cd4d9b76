"""Paired comparisons under the sub-class shift protocol, and the variants of methods that they compare."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import UsageError
from trainer.evaluation.shift_pairs import compare, compare_all, interval
from trainer.evaluation.shift_report import MethodResult, RotationResult, SubclassFigures, summarise
from trainer.evaluation.shift_variants import COMPARED, Variant, parse_variants

if TYPE_CHECKING:
    from collections.abc import Mapping


def result(name: str, values: Mapping[tuple[int, str], float], setting: str = "unseen") -> MethodResult:
    """Return a method with an I-AUROC per rotation and sub-class, in the order given."""
    rotations = []
    for number in dict.fromkeys(rotation for rotation, _ in values):
        own = {name: value for (rotation, name), value in values.items() if rotation == number}
        rotations.append(
            RotationResult(
                rotation=number,
                trained=("0",),
                unseen=tuple(own),
                n_fit=9,
                n_calibration=6,
                n_calibration_groups=6,
                threshold=1.0,
                threshold_method="empirical",
                budget_supported=True,
                pooling_cells=1,
                embedding_id="0" * 64,
                subclasses=tuple(
                    SubclassFigures(
                        subclass=place,
                        setting=setting,
                        n_good=5,
                        n_defective=5,
                        image_auroc=value,
                        pixel_auroc=None,
                        aupro=None,
                        false_positive_rate=None,
                        miss_rate=None,
                    )
                    for place, value in own.items()
                ),
            )
        )
    return summarise(name, name, {}, rotations, {})


def test_differences_are_of_the_same_rotation_and_subclass_whatever_their_order() -> None:
    ours = result("a", {(0, "1"): 0.9, (0, "2"): 0.5, (1, "2"): 0.8, (1, "3"): 0.6})
    theirs = result("b", {(1, "3"): 0.5, (1, "2"): 0.3, (0, "2"): 0.4, (0, "1"): 0.8})
    found = compare(ours, theirs, "unseen", "image_auroc", 0)
    assert found is not None
    assert found.differences == pytest.approx((0.1, 0.3))
    assert found.mean == pytest.approx(0.2)
    assert found.subclasses == 3
    assert found.low <= found.mean <= found.high
    turned = compare(theirs, ours, "unseen", "image_auroc", 0)
    assert turned is not None
    assert turned.mean == pytest.approx(-0.2)
    assert turned.high == pytest.approx(-found.low)
    assert compare(ours, theirs, "unseen, own", "image_auroc", 0) is None
    assert compare(ours, theirs, "unseen", "miss_rate", 0) is None


def test_rotations_count_alike_however_many_subclasses_they_judge() -> None:
    ours = result("a", {(0, "1"): 1.0, (1, "2"): 0.5, (1, "3"): 0.5, (1, "4"): 0.5})
    theirs = result("b", {(0, "1"): 0.0, (1, "2"): 0.5, (1, "3"): 0.5, (1, "4"): 0.5})
    found = compare(ours, theirs, "unseen", "image_auroc", 0)
    assert found is not None
    assert found.mean == pytest.approx(0.5)


def test_only_what_is_named_is_compared_and_each_pair_once() -> None:
    methods = [result(name, {(0, "1"): value, (0, "2"): value}) for name, value in (("a", 0.9), ("b", 0.7), ("c", 0.4))]
    found = compare_all(methods, ("c", "a"), 0)
    assert [(one.first, one.second, one.setting, one.figure) for one in found] == [("c", "a", "unseen", "image_auroc")]
    assert found[0].mean == found[0].low == found[0].high == pytest.approx(-0.5)
    assert compare_all(methods, (), 0) == ()
    assert [(one.first, one.second) for one in compare_all(methods, ("a", "b", "c"), 0)] == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]


def test_more_rotations_of_the_same_subclasses_say_nothing_new() -> None:
    rng = np.random.default_rng(3)
    once = rng.normal(0.1, 0.2, (1, 9))
    assert interval(np.repeat(once, 5, axis=0), 7) == pytest.approx(interval(once, 7))


def test_interval_has_about_the_coverage_that_it_claims() -> None:
    rng, hits, runs = np.random.default_rng(0), 0, 120
    for run in range(runs):
        low, high = interval(rng.normal(0.0, 1.0, (1, 15)), run)
        hits += low <= 0.0 <= high
    assert 0.85 <= hits / runs <= 0.99  # percentiles of 15 are a little narrow


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), shift=st.floats(-2, 2), rotations=st.integers(1, 5), count=st.integers(1, 8))
def test_interval_moves_with_the_differences_and_lies_within_them(
    seed: int, shift: float, rotations: int, count: int
) -> None:
    rng = np.random.default_rng(seed)
    difference = rng.normal(0, 1, (rotations, count))
    holes = rng.random(difference.shape) < 0.4
    holes[:, 0] = False  # a rotation judges at least one
    difference[holes] = np.nan
    low, high = interval(difference, 1)
    assert np.nanmin(difference) - 1e-9 <= low <= high <= np.nanmax(difference) + 1e-9
    assert interval(difference, 1) == (low, high)
    assert interval(difference + shift, 1) == pytest.approx((low + shift, high + shift), abs=1e-9)


def test_variants_are_read_with_their_settings() -> None:
    one = Variant.parse("memory:rows=30/expert:site_weight=0", "quick")
    assert (one.method.name, one.config.rows, one.config.site_weight, one.pooled) == ("memory", 30, 0.0, False)  # type: ignore[attr-defined]
    assert one.config_for(7).rows == 240  # type: ignore[attr-defined]
    assert one.config_for(1).rows == 30  # type: ignore[attr-defined]
    assert one.config_for(7).site_weight == 0.0  # type: ignore[attr-defined]
    assert Variant.parse("memory:pooled", "quick").pooled
    assert [found.name for found in parse_variants(("pbas", "memory", "pbas"), "quick")] == ["pbas", "memory"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("wood", "wood: unknown"),
        ("memory:rows", "'rows' is neither pooled nor setting=value"),
        ("memory:wheels=3", "--methods memory:wheels=3: wheels"),
        ("memory:rows=x", "--methods memory:rows=x: rows"),
        ("memory:rows=2.5/expert", "whole number before /expert"),
    ],
)
def test_variants_that_cannot_be_are_named(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        Variant.parse(text, "quick")


def test_multiplied_setting_out_of_range_says_with_how_many_subclasses() -> None:
    with pytest.raises(UsageError, match="times 51 experts: rows"):
        Variant.parse("memory:rows=200/expert", "quick").config_for(50)


@pytest.mark.parametrize("subclasses", [7, 10])
def test_what_is_compared_without_a_choice_has_equal_rows_in_total(subclasses: int) -> None:
    rows = []
    for one in parse_variants(COMPARED, "quick"):
        config = one.config_for(subclasses)
        experts = subclasses + 1 if one.method.name == "adapted_moe" and not one.pooled else 1
        rows.append(config.rows * experts)  # type: ignore[attr-defined]
    assert set(rows) == {180 * (subclasses + 1)}
