"""Training of the two students: reconstruction of the local teacher's maps, and denoising towards it.

Knows whitened maps and losses; neither what becomes of the students nor how they are judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import nn

from edge.errors import UsageError
from trainer.methods.hetnet.model import LEVELS, STRIDES, HetNetwork, Maps, cosine, initialise
from trainer.synthesis.gaussian_noise import LocalGaussian, draw_boxes, extrude

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.methods.base import Features, FitContext
    from trainer.methods.hetnet.context import GlobalContext

Taught = tuple[Maps, torch.Tensor | None, Maps]
"""Local maps, global map, and what the global teacher foretells of each level; without gradient."""

_BATCH = 16
_WEIGHT_DECAY = 1e-4


class Loss(str, Enum):
    """Distance between a teacher's map and a student's, averaged over sites and summed over levels."""

    COSINE = "cosine"
    """One minus the cosine of the vectors at each site."""
    SQUARED = "squared"
    """Mean squared difference."""


@dataclass(frozen=True)
class Training:
    """How to train; the fields are those of the method's config."""

    loss: Loss
    steps: int
    batch_tiles: int
    rate: float
    denoising_steps: int
    denoising_rate: float
    noise_share: float
    noise_rank: int


@dataclass(frozen=True)
class Teachers:
    """The frozen teachers.

    Attributes:
        local: from taps to whitened maps.
        context: the global teacher; None where there is none.
    """

    local: Callable[[tuple[torch.Tensor, ...]], Maps]
    context: GlobalContext | None

    def __call__(self, taps: tuple[torch.Tensor, ...]) -> Taught:
        """Return local maps, the global map and what it foretells; none of them carries gradient."""
        with torch.no_grad():
            local = [level.contiguous(memory_format=torch.channels_last) for level in self.local(taps)]
            context, foretold = (None, []) if self.context is None else self.context(local)
        return local, context, foretold


@dataclass(frozen=True)
class Noise:
    """LMGN on every level, the boxes aligned through the levels.

    Attributes:
        levels: the Gaussians of each level.
        share: of the cells inside boxes.
    """

    levels: list[LocalGaussian]
    share: float

    def __call__(self, local: Maps, generator: torch.Generator) -> Maps:
        """Return noisy copies of local maps; the maps themselves stay as they are."""
        grid = self.levels[-1].grid
        cells = draw_boxes(len(local[0]), grid, generator, share=self.share)
        factors = [STRIDES[-1] // stride for stride in STRIDES]
        return [
            level.replace(x, extrude(cells, factor), generator)
            for level, x, factor in zip(self.levels, local, factors, strict=True)
        ]


def distance(teacher: Maps, student: Maps, loss: Loss) -> torch.Tensor:
    """Return the scalar distance between a teacher's maps and a student's answers to them, one or two a level."""
    teacher = teacher * (len(student) // len(teacher))
    if loss is Loss.COSINE:
        parts = [1 - cosine(x, s).mean() for x, s in zip(teacher, student, strict=True)]
    else:
        parts = [(x - s).square().mean() for x, s in zip(teacher, student, strict=True)]
    return torch.stack(parts).sum()


def reconstruction(network: HetNetwork, taught: Taught, loss: Loss) -> torch.Tensor:
    """Return L_R of a batch: how far SR is from the local teacher. It gives SD no gradient."""
    local, context, foretold = taught
    return distance(local, network.sr(network.encoder(local, context), foretold), loss)


def denoising(network: HetNetwork, taught: Taught, noisy: Maps, loss: Loss) -> torch.Tensor:
    """Return L_D of a batch: how far SD on noisy maps is from SR on clean ones, which is a constant to it.

    Args:
        network: encoder and students.
        taught: what :class:`Teachers` returned; the global map and what it foretells stay clean.
        noisy: the local maps with noise.
        loss: see :class:`Loss`.
    """
    local, context, foretold = taught
    with torch.no_grad():
        wanted = network.sr(network.encoder(local, context), foretold)
    return distance(wanted, network.sd(network.encoder(noisy, context), foretold), loss)


def measure_noise(
    teachers: Teachers, features: Features, order: torch.Tensor, device: torch.device, *, rank: int, share: float
) -> Noise:
    """Measure the Gaussians of every level over training tiles."""

    def maps(index: int) -> Iterator[torch.Tensor]:
        for taps in features.batches(LEVELS, _BATCH, device=device, order=order):
            with torch.no_grad():
                yield teachers.local(taps)[index]

    return Noise([LocalGaussian.fit(maps(index), rank=rank) for index in range(len(LEVELS))], share)


def train(
    network: HetNetwork,
    teachers: Teachers,
    context: FitContext,
    order: torch.Tensor,
    settings: Training,
    *,
    generator: torch.Generator,
) -> None:
    """Train in place, on the context's device: encoder and SR first, then SD from where SR stands.

    Trained side by side from the start, SD follows a target that runs away from it and ends farther from it, inside
    the noise boxes too, than SR with noise is from SR without (README). So SR and the encoder stand still while SD
    learns, and what sets the students apart is the noise.

    Args:
        network: with weights not drawn yet.
        teachers: frozen.
        context: features of good images, device and progress.
        order: int64, the tiles to learn from.
        settings: see :class:`Training`.
        generator: source of every random choice.

    Raises:
        UsageError: training diverged.
    """
    initialise(network, generator)
    # Depthwise convolutions on a processor: 1.5 times faster than channels first.
    network.to(context.device, memory_format=torch.channels_last).train()
    batches = _endless(context.features, order, settings.batch_tiles, generator, context.device)

    def reconstruct() -> torch.Tensor:
        return reconstruction(network, teachers(next(batches)), settings.loss)

    first = nn.ModuleList([network.encoder, network.sr])
    _descend(first, reconstruct, settings.steps, rate=settings.rate, context=context, what="reconstruction")
    network.sd.load_state_dict(network.sr.state_dict())
    if not settings.denoising_steps:
        return
    noise = measure_noise(
        teachers, context.features, order, context.device, rank=settings.noise_rank, share=settings.noise_share
    )
    first.eval().requires_grad_(False)
    # SD starts as SR: statistics of small batches would carry it off before the noise has taught it anything.
    network.sd.eval()

    def denoise() -> torch.Tensor:
        taught = teachers(next(batches))
        return denoising(network, taught, noise(taught[0], generator), settings.loss)

    _descend(
        network.sd, denoise, settings.denoising_steps, rate=settings.denoising_rate, context=context, what="denoising"
    )


def _descend(
    part: nn.Module, loss: Callable[[], torch.Tensor], steps: int, *, rate: float, context: FitContext, what: str
) -> None:
    optimiser = torch.optim.AdamW(part.parameters(), lr=rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        found = loss()
        if not torch.isfinite(found):
            raise UsageError(f"HetNet: the {what} loss is not finite at step {step + 1} of {steps}; lower rate")
        optimiser.zero_grad()
        found.backward()
        optimiser.step()
        schedule.step()
        context.progress(f"HetNet {what}", step + 1, steps)


def _endless(
    features: Features, order: torch.Tensor, size: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield batches without end; every tile is seen once before any is seen twice."""
    while True:
        shuffled = order[torch.randperm(len(order), generator=generator)]
        yield from features.batches(LEVELS, size, device=device, order=shuffled)
