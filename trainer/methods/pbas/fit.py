"""Training of PBAS: centres first (ABL), then anomalies outside of them (AFS) and the boundary between (RBO).

Knows features, never images; the trunk is frozen and belongs to all methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch.nn import functional

from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Head, Method, MethodConfig
from trainer.methods.pbas.boundary import Direction, align_centres, synthesise
from trainer.methods.pbas.model import EMBEDDING_DIM, TAP_NAMES, PbasHead, PbasNetwork, embed
from trainer.synthesis.gaussian_noise import LocalGaussian

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.methods.base import Features

PROJECTOR_DECAY = 1e-5
DISCRIMINATOR_DECAY = 1e-2  # the default of AdamW, which the paper's code leaves as it is
CONSTANT_VARIANCE = 1e-10
_MEASURE_TILES = 16


class Schedule(str, Enum):
    """How the learning rates go over the steps."""

    CONSTANT = "constant"
    """The paper's."""
    COSINE = "cosine"
    """Half a cosine down to zero, so that the last weights are settled ones."""


class PbasConfig(MethodConfig):
    """Settings of PBAS; the README says which values are the paper's, which inferred and which measured."""

    k: float = Field(0.25, gt=0, le=10, description="Displacement of anomalies in units of the mean radius.")
    direction: Direction = Field(Direction.OUTWARD, description="Random is the ablation.")
    standardise: bool = Field(False, description="Give every feature channel mean 0 and deviation 1 on good patches.")
    alignment: bool = Field(True, description="Align the features of later batches with the centres of the first.")
    centre_weight: float = Field(0.05, ge=0, description="Weight of the centre loss.")
    refinement: bool = Field(True, description="Let the classification losses move the projector too.")
    steps: int = Field(250, ge=1, description="Optimiser steps; fixed, there is no early stop.")
    batch_tiles: int = Field(8, ge=1, description="Tiles that a step draws its patches from.")
    batch_rows: int = Field(768, ge=2, description="Patches of a step at most, drawn from its tiles.")
    projector_rate: float = Field(3e-3, gt=0, description="Learning rate of the projector (Adam).")
    discriminator_rate: float = Field(6e-3, gt=0, description="Learning rate of the discriminator (AdamW).")
    schedule: Schedule = Field(Schedule.COSINE, description="How the learning rates go over the steps.")
    noise_share: float = Field(0.0, ge=0, le=1, description="Share of anomalies that are local Gaussian noise instead.")
    noise_spread: float = Field(2.0, gt=0, le=100, description="Deviation of that noise in units of its place's own.")
    smoothing: float = Field(0.5, ge=0, le=16, description="Sigma of the Gaussian over the map, in cells; 0 is none.")


@dataclass(frozen=True)
class Fitted:
    """What training leaves behind; only ``network`` goes into the head.

    Attributes:
        network: trained, in eval mode, on the CPU.
        centres: float32 [sites of a tile's grid, 152], as before the first step.
        radii: mean distance of a step's patches from their centres, one per step.
        classification: sum of the two binary cross-entropies, one per step.
    """

    network: PbasNetwork
    centres: torch.Tensor
    radii: list[float]
    classification: list[float]


def patch_rows(taps: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return patch embeddings as rows: taps of N tiles -> float32 [N * h * w, 152], a tile's sites consecutive."""
    return embed(*taps).permute(0, 2, 3, 1).reshape(-1, EMBEDDING_DIM)


def measure(features: Features, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and reciprocal deviation per channel of the patch embeddings, float32 [152] each.

    Raises:
        DataError: there is no patch, or a tap holds a value that is not finite.
    """
    if len(features) == 0:
        raise DataError("PBAS got no training features; give at least one good image")
    total = torch.zeros(EMBEDDING_DIM, dtype=torch.float64, device=device)
    squares = torch.zeros_like(total)
    count = 0
    for taps in features.batches(TAP_NAMES, _MEASURE_TILES, device=device):
        rows = patch_rows(taps).double()
        total += rows.sum(0)
        squares += rows.square().sum(0)
        count += len(rows)
    mean = total / count
    variance = (squares / count - mean.square()).clamp_min(0)
    if not torch.isfinite(variance).all():
        raise DataError("training features are not finite; the trunk's weights are damaged or overflow float16")
    # A channel that never varies on good parts keeps its units; dividing by its rounding error would drown the rest.
    variance[variance <= CONSTANT_VARIANCE] = 1
    return mean.float(), variance.rsqrt().float()


def initial_centres(
    network: PbasNetwork, features: Features, config: PbasConfig, *, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """Return the grid of centres from one pass over the shuffled training tiles.

    Without alignment a centre is the plain mean at its site.

    Returns:
        float32 [sites of a tile's grid, 152] of projected patches.
    """
    order = torch.randperm(len(features), generator=generator)
    centres = torch.empty(0)
    seen = 0
    with torch.no_grad():
        for taps in features.batches(TAP_NAMES, config.batch_tiles, device=device, order=order):
            tiles = len(taps[0])
            means = network.projector(patch_rows(taps)).reshape(tiles, -1, EMBEDDING_DIM).mean(0)
            if seen == 0:
                centres = means
            elif config.alignment:
                centres = align_centres(centres, means)
            else:
                centres = centres + (means - centres) * (tiles / (seen + tiles))
            seen += tiles
    return centres


def _row_batches(
    features: Features, config: PbasConfig, *, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield random patches and their sites without end; every tile is drawn from once before any is drawn from twice.

    Sites are indices int64 into a tile's grid, on the CPU.
    """
    while True:
        order = torch.randperm(len(features), generator=generator)
        for taps in features.batches(TAP_NAMES, config.batch_tiles, device=device, order=order):
            rows = patch_rows(taps)
            places = torch.arange(len(rows))
            if len(rows) > config.batch_rows:
                places = torch.randperm(len(rows), generator=generator)[: config.batch_rows]
                rows = rows[places.to(device)]
            yield rows, places % (taps[0].shape[2] * taps[0].shape[3])


def _losses(
    network: PbasNetwork,
    rows: torch.Tensor,
    centres: torch.Tensor,
    config: PbasConfig,
    generator: torch.Generator,
    *,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (centre loss, sum of both cross-entropies) of one step.

    With noise, patch embeddings [K, 152] of no image, the last K anomalies are these instead, projected.
    """
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=rows.device.type == "cuda"):
        projected = network.projector(rows).float()
        with torch.autocast(rows.device.type, enabled=False):
            # Distances are differences of near values: bfloat16 would leave them two digits.
            made = synthesise(projected, centres, k=config.k, direction=config.direction, generator=generator)
        anomalies = made.anomalies
        if noise is not None:
            anomalies = torch.cat([anomalies[: len(rows) - len(noise)], network.projector(noise).float()])
        pairs = torch.cat([projected, anomalies])
        logits = network.discriminator(pairs if config.refinement else pairs.detach()).float()
    good, anomalous = logits.chunk(2)
    # softplus(x) is the cross-entropy of logit x against 0, and softplus(-x) against 1, without an overflow.
    return made.centre_loss, functional.softplus(good).mean() + functional.softplus(-anomalous).mean()


def _measure_noise(features: Features, device: torch.device) -> LocalGaussian:
    """Measure the Gaussian of patch embeddings at every site of a tile's grid."""
    return LocalGaussian.fit(embed(*taps) for taps in features.batches(TAP_NAMES, _MEASURE_TILES, device=device))


def train(context: FitContext, config: PbasConfig) -> Fitted:
    """Train projector and discriminator for ``config.steps`` steps; no validation or test data is read.

    Args:
        context: features of good images, seed, device and progress.
        config: settings.

    Raises:
        DataError: the features are not finite, do not fit the method, or are a single patch.
        UsageError: training diverged.
    """
    device, generator = context.device, context.generator()
    network = PbasNetwork(generator).to(device)
    mean, scale = measure(context.features, device)
    if config.standardise:
        network.projector.mean.copy_(mean)
        network.projector.scale.copy_(scale)
    centres = initial_centres(network, context.features, config, generator=generator, device=device)
    optimisers = (
        torch.optim.Adam(network.projector.parameters(), lr=config.projector_rate, weight_decay=PROJECTOR_DECAY),
        torch.optim.AdamW(
            network.discriminator.parameters(), lr=config.discriminator_rate, weight_decay=DISCRIMINATOR_DECAY
        ),
    )
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps) for optimiser in optimisers]
    radii, classification = torch.empty(config.steps), torch.empty(config.steps)
    batches = _row_batches(context.features, config, generator=generator, device=device)
    gaussian = _measure_noise(context.features, device) if config.noise_share else None
    network.train()
    for step in range(config.steps):
        rows, sites = next(batches)
        noise = None
        if gaussian is not None:
            drawn = sites[len(rows) - round(config.noise_share * len(rows)) :]
            noise = gaussian.sample(drawn, generator, spread=config.noise_spread)
        centre_loss, cross_entropy = _losses(network, rows, centres, config, generator, noise=noise)
        loss = config.centre_weight * centre_loss + cross_entropy
        if not torch.isfinite(loss):
            raise UsageError(
                f"PBAS: the loss became {float(loss.detach())} at step {step + 1} of {config.steps}; "
                "lower projector_rate and discriminator_rate, or turn standardise on"
            )
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in optimisers:
            optimiser.step()
        if config.schedule is Schedule.COSINE:
            for schedule in schedules:
                schedule.step()
        radii[step], classification[step] = centre_loss.detach(), cross_entropy.detach()
        context.progress("PBAS", step + 1, config.steps)
    return Fitted(network.eval().cpu(), centres.cpu(), radii.tolist(), classification.tolist())


class PbasMethod(Method):
    """PBAS on the shared trunk (Q. Chen et al., arXiv 2412.17458)."""

    name: ClassVar[str] = "pbas"
    tap_names: ClassVar[tuple[str, ...]] = TAP_NAMES

    @classmethod
    def config(cls, preset: str) -> PbasConfig:
        """Return the settings of preset ``quick`` or ``full``.

        Raises:
            UsageError: no preset of that name.
        """
        presets = {"quick": PbasConfig(), "full": PbasConfig(batch_rows=3136)}
        if preset not in presets:
            raise UsageError(f"--preset {preset}: unknown; choose {' or '.join(presets)}")
        return presets[preset]

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> Head:
        """Learn a head from good images; see :func:`train` for what it raises."""
        settings = _own(config)
        return PbasHead.fold(train(context, settings).network, settings.smoothing)

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> Head:
        """Rebuild a fitted head from its config and state dict.

        Raises:
            DataError: the tensors do not fit the config.
        """
        head = PbasHead(_own(config).smoothing)
        try:
            head.load_state_dict(tensors)
        except RuntimeError as error:
            raise DataError(f"these are not the weights of a PBAS head of this config: {error}; train again") from error
        return head.eval().requires_grad_(False)


def _own(config: MethodConfig) -> PbasConfig:
    if not isinstance(config, PbasConfig):
        raise UsageError(f"PBAS cannot use a {type(config).__name__}; take PbasMethod.config(preset)")
    return config
