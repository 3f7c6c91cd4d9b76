"""Learning the router: a space in which each sub-class gathers about its centre, and the floor below which none is.

Tensors in, tensors out; it must not know experts or graphs. Source of the centre loss: Wen et al., ECCV 2016.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from edge.errors import UsageError
from trainer.methods.adapted_moe.model import closeness
from trainer.methods.memory.reduce import whitening

if TYPE_CHECKING:
    from collections.abc import Callable

LAST_RATE = 0.4
"""Share of the learning rate at the last step: half a cosine from the first one, as in the published schedule."""

SHARPNESS = 8.0
"""From a mean squared distance to a logit; whitened images of one sub-class lie about 1 from their centre."""

_DECAY = 1e-5
_TINY = 1e-6


@dataclass(frozen=True)
class Schedule:
    """How long and how strongly the router learns.

    Attributes:
        steps: of the optimiser; 0 keeps the closed form.
        rate: learning rate of the first step.
        batch: images of a step.
        micro_batch: of these at once; the gradient is that of the whole batch.
        centre_weight: of the centre loss.
    """

    steps: int
    rate: float
    batch: int
    micro_batch: int
    centre_weight: float


class RouterSpace(nn.Module):
    """What the router learns: one linear layer and the centres, in one optimiser.

    Args:
        channels: D.
        count: E, sub-classes.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        # skip_init: the global generator is not ours to advance.
        self.embed = skip_init(nn.Linear, channels, channels)
        self.centres = nn.Parameter(torch.zeros(count, channels))

    @classmethod
    def closed_form(cls, points: torch.Tensor, labels: torch.Tensor, count: int, share: float) -> RouterSpace:
        """Whiten what varies within sub-classes and put each centre in the middle of its own.

        Args:
            points: float32 [n, D].
            labels: int64 [n], every one of 0 .. count - 1 at least once.
            count: E.
            share: see :func:`trainer.methods.memory.reduce.whitening`.
        """
        space = cls(points.shape[1], count)
        means = torch.stack([points[labels == label].mean(0) for label in range(count)])
        _, matrix = whitening([points - means[labels]], share)
        middle = means.mean(0)
        with torch.no_grad():
            space.embed.weight.copy_(matrix.T)
            space.embed.bias.copy_(-(middle @ matrix))
            space.centres.copy_((means - middle) @ matrix)
        return space

    def losses(self, points: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sums over points of cross-entropy and of centre loss (half the mean squared distance)."""
        close = closeness(self.embed(points), self.centres)
        own = close.gather(1, labels[:, None])
        return functional.cross_entropy(SHARPNESS * close, labels, reduction="sum"), -0.5 * own.sum()


def accumulate(
    space: RouterSpace, points: torch.Tensor, labels: torch.Tensor, *, micro_batch: int, centre_weight: float
) -> float:
    """Add the gradient of the mean loss of a batch to that of the parameters, in parts that fit in memory.

    Every part keeps its graph and is divided by the size of the whole batch, so the sum is the batch's own gradient.

    Returns:
        The mean loss.
    """
    total = 0.0
    for part, own in zip(points.split(micro_batch), labels.split(micro_batch), strict=True):
        routing, centre = space.losses(part, own)
        loss = (routing + centre_weight * centre) / len(points)
        loss.backward()
        total += float(loss.detach())
    return total


def learn(
    space: RouterSpace,
    points: torch.Tensor,
    labels: torch.Tensor,
    *,
    schedule: Schedule,
    generator: torch.Generator,
    report: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Train a space in place; one cosine over the steps, the last step is kept.

    Args:
        space: where to begin.
        points: float32 [n, D], mean patch features of images.
        labels: int64 [n].
        schedule: how.
        generator: draws the batches.
        report: called with the number of steps done.

    Returns:
        The learning rate of each step.

    Raises:
        UsageError: training diverged.
    """
    optimiser = torch.optim.Adam(space.parameters(), lr=schedule.rate, weight_decay=_DECAY)
    lowest = LAST_RATE * schedule.rate
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, schedule.steps - 1), eta_min=lowest)
    rates = []
    for step in range(schedule.steps):
        drawn = torch.randint(len(points), (min(schedule.batch, len(points)),), generator=generator)
        optimiser.zero_grad()
        loss = accumulate(
            space,
            points[drawn],
            labels[drawn],
            micro_batch=schedule.micro_batch,
            centre_weight=schedule.centre_weight,
        )
        if not torch.isfinite(torch.tensor(loss)):
            raise UsageError(f"router: the loss became {loss} at step {step + 1}; lower router_rate")
        optimiser.step()
        rates.append(float(optimiser.param_groups[0]["lr"]))
        plan.step()
        report(step + 1)
    return rates


def scatter(points: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the variance within classes over that between their means, of points [n, D] with labels [n]."""
    known = labels.unique()
    means = torch.stack([points[labels == label].mean(0) for label in known])
    within = torch.stack(
        [(points[labels == label] - mean).square().sum(1).mean() for label, mean in zip(known, means, strict=True)]
    )
    between = (means - means.mean(0)).square().sum(1).mean()
    return float(within.mean() / between.clamp_min(_TINY))


def floors(known: torch.Tensor, labels: torch.Tensor, others: list[torch.Tensor], *, refusal: float) -> torch.Tensor:
    """Return the closeness [E] below which an image shows no known sub-class.

    Closeness is brought to one scale by each sub-class's mean and the deviation of all. The floor is the ``refusal``
    quantile of every set of unseen images, of the sets the lowest; with fewer than 1 / refusal - 1 images it is one
    deviation below the lowest of them, because nothing is known of a rarer one.

    Args:
        known: [n, E], closeness of the images that the router learnt from.
        labels: int64 [n], their sub-classes.
        others: [m, E] each, closeness of images of known sub-classes that it did not learn from; empty ones are
            left out.
        refusal: share of known images that may be refused, in (0, 0.5).
    """
    own = known.gather(1, labels[:, None])[:, 0]
    means = torch.stack([own[labels == label].mean() for label in range(known.shape[1])])
    spread = (own - means[labels]).square().mean().sqrt().clamp_min(_TINY)
    lowest = 0.0
    for close in (*others, known):
        if not len(close):
            continue
        best, chosen = close.max(1)
        levels = ((best - means[chosen]) / spread).sort().values
        rank = int(refusal * (len(levels) + 1))
        lowest = min(lowest, float(levels[rank - 1]) if rank else float(levels[0]) - 1.0)
    return means + lowest * spread
