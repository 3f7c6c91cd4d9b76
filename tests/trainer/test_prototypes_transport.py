"""Sinkhorn's algorithm: marginals, equality with another implementation, the exact optimum, barycentres."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings

from edge.errors import UsageError
from trainer.methods.prototypes.sinkhorn import barycentres, sinkhorn


def cost(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(count: int) -> np.ndarray:
    return np.full(count, 1 / count)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 40), columns=st.integers(2, 40), seed=st.integers(0, 99))
def test_marginals_are_uniform_when_converged(rows: int, columns: int, seed: int) -> None:
    plan = sinkhorn(cost(rows, columns, seed), epsilon=0.1, iterations=5000, tolerance=1e-12)
    # Relative errors: of a mass of 1e-4 an absolute one says nothing.
    assert (plan.mass.sum(1) * rows - 1).abs().max() <= 1e-6
    assert (plan.mass.sum(0) * columns - 1).abs().max() <= 1e-6


def test_rows_are_exact_after_one_iteration_and_columns_only_in_the_limit() -> None:
    matrix = cost(60, 25, 1)
    early, late = (sinkhorn(matrix, epsilon=0.01, iterations=count) for count in (1, 3000))
    assert (early.mass.sum(1) * 60 - 1).abs().max() <= 1e-12
    assert (early.mass.sum(0) * 25 - 1).abs().max() > 1e-2
    assert (late.mass.sum(0) * 25 - 1).abs().max() <= 1e-6
    assert late.error < early.error


@pytest.mark.parametrize("epsilon", [0.01, 0.1])
@pytest.mark.parametrize("iterations", [1, 10, 100])
def test_plan_is_that_of_another_implementation(epsilon: float, iterations: int) -> None:
    matrix = cost(50, 30, 2)
    expected = ot.bregman.sinkhorn(
        uniform(50), uniform(30), matrix.numpy(), epsilon, method="sinkhorn_log", stopThr=0, numItermax=iterations,
        warn=False,
    )  # fmt: skip
    found = sinkhorn(matrix, epsilon=epsilon, iterations=iterations).mass.numpy()
    assert np.abs(found - expected).max() <= 1e-10


def test_columns_carry_the_masses_that_are_asked_for() -> None:
    matrix, masses = cost(50, 4, 7), torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    found = sinkhorn(matrix, epsilon=0.1, iterations=3000, tolerance=1e-12, masses=masses)
    torch.testing.assert_close(found.mass.sum(0), masses / 10, rtol=1e-6, atol=0)
    expected = ot.bregman.sinkhorn(
        uniform(50), (masses / 10).numpy(), matrix.numpy(), 0.1, method="sinkhorn_log", stopThr=0, numItermax=20,
        warn=False,
    )  # fmt: skip
    again = sinkhorn(matrix, epsilon=0.1, iterations=20, masses=masses).mass.numpy()
    assert np.abs(again - expected).max() <= 1e-10


def test_cost_is_above_the_exact_optimum_and_nears_it_with_less_entropy() -> None:
    matrix = cost(40, 24, 3)
    exact = ot.emd2(uniform(40), uniform(24), matrix.numpy())
    gaps = []
    for epsilon in (0.3, 0.1, 0.03):
        plan = sinkhorn(matrix, epsilon=epsilon, iterations=20_000, tolerance=1e-12)
        gaps.append(float((plan.mass * matrix).sum()) - exact)
    assert gaps[0] > gaps[1] > gaps[2] > 0


def test_float32_plan_of_sharp_costs_has_no_empty_row() -> None:
    # exp(-cost / epsilon) itself is 0 everywhere here.
    plan = sinkhorn(cost(30, 20, 4).float() + 5.0, epsilon=0.01, iterations=50)
    assert (plan.mass.sum(1) * 30 - 1).abs().max() <= 1e-4


def test_tolerance_ends_early() -> None:
    matrix = cost(30, 20, 5)
    assert sinkhorn(matrix, epsilon=0.5, iterations=1000, tolerance=1e-6).iterations < 100
    assert sinkhorn(matrix, epsilon=0.5, iterations=1000).iterations == 1000


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(2, 40), columns=st.integers(2, 20), seed=st.integers(0, 99), iterations=st.integers(1, 30))
def test_barycentres_are_convex_however_few_iterations(rows: int, columns: int, seed: int, iterations: int) -> None:
    values = torch.randn(rows, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan = sinkhorn(cost(rows, columns, seed), epsilon=0.05, iterations=iterations)
    found = barycentres(plan, values)
    assert (found >= values.amin(0) - 1e-9).all()
    assert (found <= values.amax(0) + 1e-9).all()
    assert barycentres(plan, torch.ones(rows, 1, dtype=torch.float64)).sub(1).abs().max() <= 1e-9


def test_barycentres_of_a_converged_plan_are_its_weighted_means() -> None:
    values = torch.randn(40, 6, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    plan = sinkhorn(cost(40, 12, 6), epsilon=0.1, iterations=5000)
    torch.testing.assert_close(barycentres(plan, values), 12 * plan.mass.T @ values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epsilon": 0.0}, "epsilon 0 must be > 0"),
        ({"iterations": 0}, "iterations 0 >= 1"),
        ({"tolerance": -1.0}, "tolerance -1 >= 0"),
        ({"cost": torch.full((2, 2), torch.nan)}, "finite values"),
        ({"cost": torch.zeros(3)}, "must be a matrix"),
        ({"masses": torch.tensor([1.0, 0.0])}, "2 finite values above 0"),
        ({"masses": torch.ones(3)}, "2 finite values above 0"),
    ],
)
def test_values_out_of_range_are_refused(change: dict[str, object], words: str) -> None:
    given_ = {"cost": torch.zeros(2, 2), "epsilon": 0.1, "iterations": 3, **change}
    with pytest.raises(UsageError, match=words):
        sinkhorn(given_.pop("cost"), **given_)
