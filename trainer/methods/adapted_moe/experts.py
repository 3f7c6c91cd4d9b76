"""Learning one expert from the adapted rows of its sub-class: a reduced bank, or a discriminator against noise.

It must not know routing. Sources: PatchCore and FedDyMem for banks, SimpleNet (Liu et al., CVPR 2023) for noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from edge.errors import UsageError
from trainer.methods.adapted_moe.adapt import unit
from trainer.methods.adapted_moe.model import LEAK
from trainer.methods.adapted_moe.routing import LAST_RATE
from trainer.methods.feddymem.model import repeated
from trainer.methods.memory.reduce import greedy_coreset, nearest, weighted_average_reduce

if TYPE_CHECKING:
    from collections.abc import Callable

_DECAY = 1e-5
_FOLD_SHARE = 4  # rows of a fold's bank: a quarter, of half as many images, and it is made twice
_TINY = 1e-6


@dataclass(frozen=True)
class Rows:
    """Patches of one sub-class.

    Attributes:
        rows: float32 [n, D], before adaptation.
        image: int64 [n], which image each is of.
        now: mean and deviation [m, D] each of the m images.
        adapt: from rows [n, D] and the moments [n, D] of their images to adapted rows [n, D].
    """

    rows: torch.Tensor
    image: torch.Tensor
    now: tuple[torch.Tensor, torch.Tensor]
    adapt: Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor]], torch.Tensor]

    def adapted(self, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return rows [k, D] adapted as those of index int64 [k] are."""
        image = self.image[index]
        return self.adapt(rows, (self.now[0][image], self.now[1][image]))


def bank_expert(of: Rows, *, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return ``bank`` float32 [size, D] and ``bank_scale`` [].

    The scale is the mean distance of good patches to a smaller bank that has not seen their image (two folds): it
    brings experts to one threshold.

    Args:
        of: patches of at least two images.
        size: R; where there are fewer patches, rows are repeated.
        generator: draws the first row and the folds.
    """
    rows = of.adapted(of.rows, torch.arange(len(of.rows)))
    bank = _reduced(rows, size, generator)
    images = torch.randperm(int(of.image.max()) + 1, generator=generator)
    first = torch.isin(of.image, images[: len(images) // 2])
    total = count = 0.0
    for seen, unseen in ((rows[first], rows[~first]), (rows[~first], rows[first])):
        squared, _ = nearest(unseen, _reduced(seen, max(1, size // _FOLD_SHARE), generator))
        total, count = total + float(squared.sqrt().sum()), count + len(squared)
    return {"bank": repeated(bank, size), "bank_scale": torch.tensor(max(total / count, _TINY))}


def _reduced(rows: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    anchors = rows[greedy_coreset(rows, size, generator).to(rows.device)]
    return weighted_average_reduce([rows], anchors)[0]


@dataclass(frozen=True)
class DiscriminatorSchedule:
    """How a discriminator learns.

    Attributes:
        hidden: H, width of its hidden layer.
        steps: of the optimiser.
        rate: learning rate of the first step; the last is 0.4 of it.
        batch: rows of a step.
        noise: length of the noise that makes a bad row of a good one, in units of the row's own length.
        margin: good rows should be above it, bad ones below its negative.
    """

    hidden: int
    steps: int
    rate: float
    batch: int
    noise: float
    margin: float


def discriminator_expert(
    of: Rows, *, schedule: DiscriminatorSchedule, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return ``hidden_weight`` float32 [D, H], ``hidden_bias`` [H] and ``logit_weight`` [H].

    Bad rows are good ones with isotropic Gaussian noise, added before normalisation and adapted with the moments of
    the good image; truncated hinge losses on both.

    Raises:
        UsageError: training diverged.
    """
    width, device = of.rows.shape[1], of.rows.device
    weight = _xavier(width, schedule.hidden, generator).to(device).requires_grad_()
    bias = torch.zeros(schedule.hidden, device=device, requires_grad=True)
    out = _xavier(schedule.hidden, 1, generator)[:, 0].to(device).requires_grad_()
    optimiser = torch.optim.Adam((weight, bias, out), lr=schedule.rate, weight_decay=_DECAY)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, max(1, schedule.steps - 1), eta_min=LAST_RATE * schedule.rate
    )
    for step in range(schedule.steps):
        index = torch.randint(len(of.rows), (min(schedule.batch, len(of.rows)),), generator=generator).to(device)
        good = of.rows[index]
        noise = torch.randn(good.shape, generator=generator).to(device) * (schedule.noise / width**0.5)
        both = torch.cat([of.adapted(good, index), of.adapted(unit(good + noise), index)])
        # A common factor of unit rows: entries about 1, where Xavier's weights and the rate are meant for.
        opinion = functional.leaky_relu(both @ weight * width**0.5 + bias, LEAK) @ out
        loss = sum(
            (schedule.margin + sign * part).clamp_min(0).mean()
            for sign, part in zip((-1, 1), opinion.chunk(2), strict=True)
        )
        if not torch.isfinite(loss):
            raise UsageError(f"expert: the loss is not finite at step {step + 1}; lower expert_rate")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        plan.step()
    return {
        "hidden_weight": weight.detach() * width**0.5,
        "hidden_bias": bias.detach(),
        "logit_weight": out.detach(),
    }


def _xavier(inputs: int, outputs: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(inputs, outputs, generator=generator) * (2 / (inputs + outputs)) ** 0.5
