"""The memory benchmark: its arithmetic against scipy, its recurring defect, and a short turn of every question."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks import memory_update
from benchmarks._memory import Pool, Product, rate_interval, scar
from benchmarks.memory_update import KINDS, ROUNDS, SIZES, answers, losses_of, report
from edge.bundle import MemoryLayout, Preprocessing


def product(train: int = 120, good: int = 40, bad: int = 30) -> Product:
    """Return a product of 4 x 4 patches of 8 channels, whose defects are one patch far away."""
    rng = np.random.default_rng(0)
    modes = rng.standard_normal((40, 8))

    def frames(count: int, *, defective: bool = False) -> np.ndarray:
        rows = modes[rng.integers(40, size=(count, 16))] + 0.1 * rng.standard_normal((count, 16, 8))
        rows[:, 5] += 1.5 * defective
        return rows.astype(np.float16)

    return Product(
        name="made/up",
        train=frames(train),
        canvases=rng.integers(60, 200, (train, 32, 32, 3)).astype(np.uint8),
        good=frames(good),
        bad=frames(bad, defective=True),
        layout=MemoryLayout(grid=(4, 4)),
        preprocessing=Preprocessing(height=32, width=32),
        embed=lambda canvases: frames(len(canvases), defective=True),
    )


def test_the_interval_of_one_product_is_the_beta_binomials() -> None:
    low, high = rate_interval([(200, 99)], 0.05)
    truth = stats.betabinom(200, 100 - 95, 95)
    assert low == pytest.approx(truth.ppf(0.025) / 200, abs=0.006)
    assert high == pytest.approx(truth.ppf(0.975) / 200, abs=0.006)


def test_the_scar_is_the_same_everywhere_but_for_a_few_pixels_and_the_surface() -> None:
    canvases = np.full((6, 64, 64, 3), 128, np.uint8) + np.arange(6, dtype=np.uint8)[:, None, None, None]
    change = scar(canvases, np.random.default_rng(1)).astype(int) - canvases
    assert all(one.any() for one in change)
    assert len({tuple(sorted(one[one != 0])) for one in change}) == 1
    places = [np.argwhere(one.any(2)).mean(0) for one in change]
    assert np.ptp(places, axis=0).max() <= 8


def test_pools_share_no_frame() -> None:
    good = np.arange(120, dtype=np.float16)[:, None, None]
    pool = Pool.cut(good, np.random.default_rng(0))
    parts = [part.ravel().tolist() for part in (pool.fit, pool.commissioning, pool.held, pool.stream)]
    assert [len(part) for part in parts] == [40, 20, 20, 40]
    assert sorted(x for part in parts for x in part) == good.ravel().tolist()
    assert {x for n in range(4) for x in pool.round(n, 4).ravel().tolist()} == set(parts[3])


def test_every_question_is_answered_and_reported(capsys, monkeypatch) -> None:
    monkeypatch.setattr(memory_update, "FED", 40)
    monkeypatch.setattr(memory_update, "DYNAMIC_ROWS", 64)
    found = answers(product(), memory_update.QUESTIONS, seeds=[0], test=30)
    for size in SIZES:
        assert len(losses_of(found["reduction"], "anchor", size)) == 1
        assert (
            losses_of(found["reduction"], "anchor", size)[0] <= losses_of(found["reduction"], "random", size)[0] + 0.1
        )
    arms = {one.arm: one for one in found["feeding"] if one.defects == "real"}
    assert arms["off"].fed == 40
    assert arms["off"].fed_bad == memory_update.DEFECTIVE
    assert arms["clean"].fed_bad == 0
    assert arms["gate"].fed_bad < 5
    assert [one.round for one in found["rounds"] if one.calibrated == KINDS[0]] == list(range(ROUNDS + 1))
    first = [one for one in found["rounds"] if one.round == 0]
    assert first[0].alarms == first[1].alarms
    report(found)
    printed = capsys.readouterr().out
    for told in ("| made/up | anchor |", "| made/up | scar | 50 |", "| 10 |", "false-alarm rate, worst of ten rounds"):
        assert told in printed


def test_what_cannot_be_measured_is_skipped_aloud(capsys, tmp_path) -> None:
    found = answers(product(train=60, good=0), ("feeding", "rounds"), seeds=[0], test=30)
    assert found == {"feeding": [], "rounds": []}
    memory_update.main(["--data", str(tmp_path / "nowhere")])
    printed = capsys.readouterr().out
    assert printed.count("SKIPPED") == 3
    assert "nowhere" in printed
