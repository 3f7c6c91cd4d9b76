"""The ranking benchmark: its arithmetic against scipy and by hand, saved results, and a short turn of everything."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks import ranking
from benchmarks.ranking import USUAL, Record, correlation, rank, read_records
from edge.errors import DataError
from trainer.synthesis.features import FEATURE_FAMILIES
from trainer.synthesis.image2d import BY_NAME

if TYPE_CHECKING:
    from pathlib import Path


def records(tables: dict[str, list[tuple[float, float]]]) -> list[Record]:
    return [
        Record(folder, f"d{index}", 0, USUAL, "image", synthetic, real)
        for folder, table in tables.items()
        for index, (synthetic, real) in enumerate(table)
    ]


def test_rank_by_hand() -> None:
    found = rank(records({"a": [(0.5, 0.6), (0.6, 0.7), (0.7, 0.9)], "b": [(0.7, 0.8), (0.6, 0.7), (0.5, 0.9)]}))
    assert found is not None
    # Folder a is in order; in b the pairs (1, 2) are right and (1, 3), (2, 3) wrong.
    assert found.spearman == pytest.approx((1 - 0.5) / 2)
    assert found.kendall == pytest.approx((1 - 1 / 3) / 2)
    # a loses nothing; b takes 0.8 where 0.9 is to be had.
    assert found.regret == pytest.approx(0.05)
    assert found.chance == pytest.approx((0.9 - 2.2 / 3 + 0.9 - 0.8) / 2)
    # Means of the detectors: validation 0.6 each (a tie of all), so it tells nothing.
    assert found.means == 0
    assert (found.low, found.high, found.folders) == (-0.5, 1.0, 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=12))
def test_rank_of_one_folder_is_scipys(table: list[tuple[float, float]]) -> None:
    found = rank(records({"a": table}))
    assert found is not None
    one, other = np.array(table).T
    if np.ptp(one) and np.ptp(other):
        assert found.spearman == pytest.approx(stats.spearmanr(one, other).statistic)
        assert found.kendall == pytest.approx(stats.kendalltau(one, other).statistic)
    assert found.low == pytest.approx(found.spearman)
    assert found.high == pytest.approx(found.spearman)
    assert 0 <= found.regret <= 1


def test_rank_averages_seeds_and_leaves_out_what_is_not_finite_and_folders_of_two() -> None:
    seeds = [Record("a", f"d{d}", seed, USUAL, "image", d + seed, d - seed) for d in range(3) for seed in (0, 1)]
    broken = [Record("a", "d9", 0, USUAL, "image", float("nan"), 0.5)]
    small = records({"b": [(0.1, 0.9), (0.9, 0.1)]})
    found = rank([*seeds, *broken, *small])
    assert found is not None
    assert (found.folders, found.spearman) == (1, 1.0)
    assert rank(small) is None
    assert rank([]) is None


def test_rank_interval_is_seeded_and_widens_with_disagreement() -> None:
    agreeing = {name: [(0.1, 0.2), (0.2, 0.3), (0.3, 0.4)] for name in "abcd"}
    mixed = agreeing | {"d": [(0.1, 0.4), (0.2, 0.3), (0.3, 0.2)]}
    first, again, whole = rank(records(mixed)), rank(records(mixed)), rank(records(agreeing))
    assert first == again
    assert first is not None
    assert whole is not None
    assert first.high - first.low > whole.high - whole.low == 0


def test_correlation_of_what_cannot_tell_is_zero() -> None:
    assert correlation(np.ones(4), np.arange(4.0), "spearman") == 0


def test_records_are_read_back_and_those_of_the_accuracy_benchmark_too(tmp_path: Path) -> None:
    own = records({"a": [(0.5, 0.6), (0.6, 0.7)]})
    (tmp_path / "own.json").write_text(json.dumps([vars(record) for record in own]))
    assert read_records(tmp_path / "own.json") == own
    lines = {"bsdata/ball padim-style s4+s8": {"I-AUROC": 0.8, "synthetic": 0.7, "spread": 0.1}}
    (tmp_path / "accuracy.json").write_text(json.dumps({"categories": lines}))
    assert read_records(tmp_path / "accuracy.json") == [
        Record("bsdata/ball", "padim-style s4+s8", 0, USUAL, "image", 0.7, 0.8)
    ]


@pytest.mark.parametrize("content", ["no json", "[1]", '[{"folder": "a"}]', '{"a": 1}', '{"categories": {"a b": {}}}'])
def test_files_without_records_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(DataError, match="no records of"):
        read_records(tmp_path / "r.json")
    with pytest.raises(DataError, match="no records of"):
        read_records(tmp_path / "missing.json")


@pytest.mark.slow  # a whole benchmark, if a small one: half a minute to a minute
def test_ranking_judges_every_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--size", "64", "--train", "16", "--test", "8", "--defects", "22"]
    few = ["memory, 60 rows", "memory, coreset", "patchcore-style s8+s16"]
    found = ranking.main([*sizes, "--only", *few, "--json", str(tmp_path / "r.json")])
    expected = {USUAL, *(f"images, contrast {contrast:g}" for contrast in ranking.CONTRASTS)}
    expected |= {f"images, {family}" for family in BY_NAME} | {f"features, {family}" for family in FEATURE_FAMILIES}
    for level in ("image", "pixel"):
        assert expected <= set(found[level])
        for one in found[level].values():
            assert -1 <= one.low <= one.spearman <= one.high <= 1
            assert one.folders == 3
    assert "| images, contrast 0.1 |" in capsys.readouterr().out
    saved = read_records(tmp_path / "r.json")
    assert {record.detector for record in saved} == set(few)
    assert ranking.main(["--records", str(tmp_path / "r.json")]) == found
