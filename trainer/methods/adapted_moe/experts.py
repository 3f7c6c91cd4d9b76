"""Learning one expert from the adapted taps of its sub-class: the memory method's banks, or a discriminator.

It must not know routing. Source of the discriminator: SimpleNet (Liu et al., CVPR 2023), good rows against noise.
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
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.memory.model import LEVELS

if TYPE_CHECKING:
    from trainer.methods.base import FitContext
    from trainer.methods.memory.fit import MemoryConfig

_DECAY = 1e-5


def level_rows(rows: int) -> tuple[int, ...]:
    """Return how many rows each level's bank has: the finest half as many, as in the memory method."""
    return tuple(max(1, rows // 2) if name == LEVELS[0] else rows for name in LEVELS)


def bank_expert(context: FitContext, config: MemoryConfig) -> dict[str, torch.Tensor]:
    """Fit a memory and return its tensors under the names of ``BANK``.

    Args:
        context: its features are those of the expert alone, adapted.
        config: of the memory; where there are fewer patches than rows, rows are repeated.

    Raises:
        DataError: fewer than two images, or features that are not finite.
    """
    memory = MemoryMethod.fit(context, config)
    found = {"level_scale": memory.get_buffer("scales")}
    for name, size in zip(LEVELS, level_rows(config.rows), strict=True):
        layer = memory.get_submodule(f"whiten_{name}")
        found[f"whiten_{name}"] = layer.get_parameter("weight")[:, :, 0, 0].T
        found[f"offset_{name}"] = layer.get_parameter("bias")
        found[f"bank_{name}"] = repeated(memory.get_buffer(f"bank_{name}"), size)
    if memory.sites is not None:
        layers = [memory.sites.get_submodule(f"project_{name}") for name in LEVELS]
        found["site_project"] = torch.cat([layer.get_parameter("weight")[:, :, 0, 0] for layer in layers], 1)
        found["site_offset"] = layers[0].get_parameter("bias")
        found["site_mean"] = memory.sites.means[0]
        found["site_scale"] = memory.sites.scale
    return found


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
    of: torch.Tensor, *, schedule: DiscriminatorSchedule, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return ``hidden_weight`` float32 [D, H], ``hidden_bias`` [H] and ``logit_weight`` [H].

    Bad rows are good ones with isotropic Gaussian noise, brought to unit length again; truncated hinge losses on both.

    Args:
        of: adapted rows float32 [n, D] of unit length.
        schedule: how.
        generator: draws weights, batches and noise.

    Raises:
        UsageError: training diverged.
    """
    width, device = of.shape[1], of.device
    weight = _xavier(width, schedule.hidden, generator).to(device).requires_grad_()
    bias = torch.zeros(schedule.hidden, device=device, requires_grad=True)
    out = _xavier(schedule.hidden, 1, generator)[:, 0].to(device).requires_grad_()
    optimiser = torch.optim.Adam((weight, bias, out), lr=schedule.rate, weight_decay=_DECAY)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimiser, max(1, schedule.steps - 1), eta_min=LAST_RATE * schedule.rate
    )
    for step in range(schedule.steps):
        index = torch.randint(len(of), (min(schedule.batch, len(of)),), generator=generator).to(device)
        good = of[index]
        noise = torch.randn(good.shape, generator=generator).to(device) * (schedule.noise / width**0.5)
        both = torch.cat([good, unit(good + noise)])
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
