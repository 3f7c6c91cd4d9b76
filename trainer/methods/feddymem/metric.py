"""The metric loss of a generator and the guard against its collapse, as pure functions of rows.

Source: the reconstruction of FedDyMem's loss after CFA (Lee et al., 2022); the pull is FedProto's (Tan et al., 2022).
"""

from __future__ import annotations

import torch

ATTRACTED, REPELLED = 3, 3
"""Nearest rows that attract a patch, and rows after them that repel it (CFA: K and J)."""
MARGIN = 0.1
"""CFA's alpha: how far within the radius the repelling rows may lie."""
SHARPNESS = 1e-3
"""CFA's nu: both hinges are divided by it."""


def metric_loss(
    rows: torch.Tensor,
    bank: torch.Tensor,
    radius: torch.Tensor,
    *,
    pull: float = 0.0,
    memory: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attract patches to their nearest rows within a radius, and repel the rows after those.

    ``L = (mean max(0, d_j - r^2) [j <= K] + mean max(0, r^2 - d_j - alpha) [K < j <= K + J]) / nu``, d_j the squared
    distance to the j-th nearest row; plus ``pull`` times the mean squared distance to the nearest row of a global
    memory, per channel.

    Args:
        rows: float32 [n, D] of good patches.
        bank: float32 [R, D] of other images of the same product; with fewer than 6 rows fewer repel.
        radius: float32 [], learnt.
        pull: >= 0.
        memory: float32 [M, D]; needed where ``pull`` > 0.
    """
    squared = _squared(rows, bank)
    nearest = squared.topk(min(ATTRACTED + REPELLED, len(bank)), largest=False).values
    within = radius * radius
    attract = (nearest[:, :ATTRACTED] - within).clamp_min(0).mean()
    repelled = nearest[:, ATTRACTED:]
    repel = (within - repelled - MARGIN).clamp_min(0).mean() if repelled.shape[1] else attract.new_zeros(())
    loss = (attract + repel) / SHARPNESS
    if pull:
        assert memory is not None
        loss = loss + pull * _squared(rows, memory).amin(1).mean() / rows.shape[1]
    return loss


def effective_rank(rows: torch.Tensor) -> float:
    """Return exp(entropy) of the singular values of centred rows float32 [n, D], 1 <= value <= D.

    Source: O. Roy and M. Vetterli, EUSIPCO 2007. Rows that are all alike have rank 1.
    """
    values = torch.linalg.svdvals((rows - rows.mean(0)).double())
    total = values.sum()
    if total <= 0:
        return 1.0
    shares = values / total
    return float(torch.exp(-(shares * shares.clamp_min(1e-300).log()).sum()))


def _squared(rows: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    return ((rows * rows).sum(1)[:, None] + (bank * bank).sum(1) - 2.0 * (rows @ bank.T)).clamp_min(0.0)
