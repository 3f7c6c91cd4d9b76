"""Entropic optimal transport between patches and prototypes, in the log domain. Pure functions of tensors.

Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; log-domain iterations as in Peyre and Cuturi, 2019, section 4.4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from edge.errors import UsageError

_LEAST = -80.0
"""Logarithm below which a term beside 1 changes no bit of a sum, in float64 either."""


@dataclass(frozen=True)
class Plan:
    """A transport plan.

    Attributes:
        log: float [N, K], natural logarithm of the mass that goes from row to column.
        iterations: that were made.
        error: Euclidean norm of what the columns' masses lack when it was last looked at; rows are exact.
    """

    log: torch.Tensor
    iterations: int
    error: float

    @property
    def mass(self) -> torch.Tensor:
        """The plan itself, float [N, K], its sum 1."""
        return self.log.exp()


def sinkhorn(
    cost: torch.Tensor, *, epsilon: float, iterations: int, tolerance: float = 0.0, masses: torch.Tensor | None = None
) -> Plan:
    """Spread uniform masses of rows over given masses of columns at the least cost, smoothed by entropy.

    The potentials of columns are updated before those of rows, so that rows' masses are exact after each iteration and
    columns' only in the limit. Nothing is exponentiated that could underflow to a zero sum.

    Args:
        cost: float [N, K], finite; float64 where equality with another implementation matters.
        epsilon: > 0, weight of the entropy, in units of the cost; the smaller, the sharper and the slower.
        iterations: at most, >= 1.
        tolerance: of the columns' error, looked at every tenth iteration; 0 makes them all.
        masses: of the columns, float [K] > 0, in any unit; None is the same for all.

    Raises:
        UsageError: a value is out of range, or the cost is not finite.
    """
    if not (epsilon > 0 and iterations >= 1 and tolerance >= 0):
        raise UsageError(f"epsilon {epsilon:g} must be > 0, iterations {iterations} >= 1, tolerance {tolerance:g} >= 0")
    if cost.ndim != 2 or not cost.numel() or not torch.isfinite(cost).all():  # noqa: PLR2004
        raise UsageError(f"a cost of shape {tuple(cost.shape)} must be a matrix of finite values; check the features")
    rows, columns = cost.shape
    if masses is None:
        masses = cost.new_ones(columns)
    if masses.shape != (columns,) or not ((masses > 0).all() and torch.isfinite(masses).all()):
        raise UsageError(f"masses of shape {tuple(masses.shape)} must be {columns} finite values above 0")
    log_row, log_column = -math.log(rows), (masses / masses.sum()).log()
    scores = cost / -epsilon
    u = cost.new_zeros(rows)
    v = cost.new_zeros(columns)
    done, error = 0, math.inf
    while done < iterations:
        v = log_column - _logsumexp(scores + u[:, None], 0)
        u = log_row - _logsumexp(scores + v, 1)
        done += 1
        if tolerance and done % 10 == 1:
            error = float((_logsumexp(scores + u[:, None] + v, 0).exp() - log_column.exp()).norm())
            if error < tolerance:
                break
    log = scores + u[:, None] + v
    return Plan(log, done, float((_logsumexp(log.clone(), 0).exp() - log_column.exp()).norm()))


def barycentres(plan: Plan, values: torch.Tensor) -> torch.Tensor:
    """Return where the mass of each column comes from: means of rows' values, weighted by the plan, [K, D].

    Weights of a column are divided by their own sum, so that each mean is convex although columns' masses are exact in
    the limit only.

    Args:
        plan: over N rows and K columns.
        values: float [N, D].
    """
    return torch.softmax(plan.log, 0).T @ values


def _logsumexp(values: torch.Tensor, axis: int) -> torch.Tensor:
    """Return ``torch.logsumexp`` without underflow, which is ten to fifty times as slow. Uses up ``values``."""
    largest = values.amax(axis, keepdim=True)
    return values.sub_(largest).clamp_min_(_LEAST).exp_().sum(axis).log_() + largest.squeeze(axis)
