"""The figure of the identical shortcut: its defects, its arithmetic by hand, and a short turn of everything."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks.shortcut import (
    CONVOLUTION,
    DEFECTS,
    FULL,
    KINDS,
    MLP,
    PLAIN,
    QUERIES,
    TINY,
    Patches,
    Point,
    Size,
    draw,
    goals,
    look,
    looks_at,
    main,
    make_network,
    matched,
    put_defect,
)
from trainer.methods.uniad.model import Reconstructor

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_defect_changes_its_mask_and_nothing_else(kind: str) -> None:
    image, other = np.full((64, 64, 3), 90, np.uint8), np.full((64, 64, 3), 200, np.uint8)
    for seed in range(8):
        found, mask = put_defect(image, other, kind, np.random.default_rng(seed))
        assert np.array_equal((found != image).any(2), mask)
        assert 0.02 < mask.mean() < 0.25
        if kind == DEFECTS[0]:
            assert (found[mask] == 200).all()


def test_looks_begin_early_and_end_with_training() -> None:
    for steps in (TINY.steps, Size().steps, 1):
        times = looks_at(steps)
        assert times[-1] == steps
        assert all(one < other for one, other in pairwise(times))
        assert times[0] <= max(1, steps // 100)


def test_networks_differ_in_what_bars_copying_alone() -> None:
    size = Size(side=96, steps=3)
    made = {kind: make_network(kind, size, 24, (6, 6), 0) for kind in KINDS}
    for kind in (PLAIN, QUERIES, FULL):
        network, config = made[kind]
        assert isinstance(network, Reconstructor)
        assert (network.decoder[0].table is not None) == (kind != PLAIN)
        assert bool(network.mask.any()) == (kind == FULL)
        assert (config.jitter == 0) == (kind != FULL)
    tokens = torch.randn(2, 36, 24)
    other = tokens.clone()
    other[:, 14] += 1
    for kind, reach in ((MLP, 1), (CONVOLUTION, 9 * 9)):
        changed = (made[kind][0](other) - made[kind][0](tokens)).detach().abs().amax((0, 2)) > 0
        assert changed[14]
        assert int(changed.sum()) <= reach


class Halved(torch.nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens / 2


def test_look_by_hand() -> None:
    good, bad = torch.full((6, 4, 1), 2.0), torch.full((6, 4, 1), 2.0)
    bad[:, 0] = 10.0
    bad[:, 1] = 50.0  # only touched: counts neither way for patches
    cover = torch.tensor([1.0, 0.2, 0.0, 0.0]).expand(6, 4)
    found = look(Halved(), Patches((2, 2), good, good, bad, cover), seed=0, kind=MLP, step=7)
    assert (found.normal, found.ratio) == (1.0, 0.5)
    assert (found.image, found.patch) == (1.0, 1.0)


def course(kind: str, figures: list[tuple[float, float]], *, auroc: float = 0.9) -> list[Point]:
    return [
        Point(0, kind, 8 * (index + 1), normal, ratio, auroc, auroc) for index, (normal, ratio) in enumerate(figures)
    ]


def test_networks_are_compared_where_their_errors_on_good_images_are_the_same() -> None:
    points = [
        *course(MLP, [(80.0, 1.0), (40.0, 0.6)]),
        *course(PLAIN, [(90.0, 1.0), (50.0, 0.8)]),
        *course(FULL, [(100.0, 1.0), (60.0, 0.98)]),
    ]
    found = matched(points, (MLP, PLAIN, FULL))
    assert {one.normal for one in found.values()} == {60.0}
    assert {kind: one.ratio for kind, one in found.items()} == pytest.approx({MLP: 0.8, PLAIN: 0.85, FULL: 0.98})


def test_goals_are_met_by_the_claim_and_missed_by_its_contrary() -> None:
    falling = [(80.0, 1.0), (60.0, 0.8), (40.0, 0.6)]
    steady = [(90.0, 0.97), (70.0, 0.97), (50.0, 0.975)]
    claim = [*course(MLP, falling), *course(PLAIN, falling), *course(FULL, steady, auroc=0.95)]
    assert all(goal.met for goal in goals(claim))
    contrary = [*course(MLP, steady), *course(PLAIN, steady), *course(FULL, falling, auroc=0.8)]
    verdicts = {goal.name: goal.met for goal in goals(contrary)}
    # A curve that does not rise falls or stands: the two networks are refused by how far below the full one they stay.
    assert not any(met for name, met in verdicts.items() if "rise" not in name)
    rising = [*course(MLP, [*falling, (39.0, 0.7)]), *course(PLAIN, falling), *course(FULL, steady)]
    assert not next(goal for goal in goals(rising) if "perceptron: largest rise" in goal.name).met


def test_a_short_turn_prints_every_goal_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = main(["--tiny", "--seeds", "1", "--picture", str(tmp_path / "p.png"), "--json", str(tmp_path / "p.json")])
    assert len(found) == 8
    assert all(math.isfinite(goal.value) for goal in found)
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS)
    assert (tmp_path / "p.png").stat().st_size > 10_000
    draw([Point(0, MLP, 1, 2.0, 1.0, 1.0, 1.0)], tmp_path / "one.png")
