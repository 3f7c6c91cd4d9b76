"""The two stages: a base learns to reconstruct good parts under masks, then gates learn on top of it, frozen.

Reads features of good images and corruptions made of them here; never a real defect.
"""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn import functional

from edge.errors import DataError, UsageError
from trainer.methods.deviation import feature_rows, mean_of_places, smooth_places
from trainer.methods.fader.base import Reading, enlarge_nearest
from trainer.methods.fader.gates import Gates, attenuated
from trainer.methods.memory.reduce import whitening
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from trainer.methods.base import Features, FitContext
    from trainer.methods.deviation import Deviation
    from trainer.methods.fader.base import MaskedBase
    from trainer.methods.fader.fit import FaderConfig
    from trainer.methods.fader.model import FaderHead

_BATCH = 16
_MEASURE_TILES = 400  # statistics of good parts hardly change beyond
_BLOCK_CELLS = 2  # side of a random mask block, in mask cells
_CORRUPTION_SEED = 104_729  # apart from the seeds that validation and the parity gate draw defects with
_DECAY = 1e-4
_GATE_LEVELS = (0.95, 0.999)  # quantiles of good patches' errors between which the attenuation target falls from 1 to 0
_HINGE = 10.0  # weight; far above the other terms, so that it binds
# Larger and more than on validation: a gate learns from places, and small defects have few.
_CORRUPTION_SIZE, _CORRUPTION_DEFECTS = (0.08, 0.4), 3


class Objective(str, Enum):
    """What the gates are trained for."""

    BOTH = "both"
    """Reconstruct the clean image, with a small weight on the error targets."""
    CLEAN = "clean"
    """Reconstruct the clean image from the corrupted one."""
    ERROR = "error"
    """Only the paper's signal: attenuate where the current model's reconstruction error is large."""


class GateTrace(NamedTuple):
    """What the second stage saw, one number per step.

    Attributes:
        clean: reconstruction loss against the clean targets.
        error: binary cross-entropy against the error targets.
    """

    clean: list[float]
    error: list[float]


def checksum(base: MaskedBase) -> str:
    """Return the sha256 of every weight and buffer of a base."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _subset(features: Features, generator: torch.Generator) -> torch.Tensor:
    return torch.randperm(len(features), generator=generator)[:_MEASURE_TILES].sort().values


def measure(base: MaskedBase, context: FitContext, config: FaderConfig, generator: torch.Generator) -> None:
    """Set the normal means, the whitening and the mask threshold of a base from good parts.

    Raises:
        DataError: there are no training features, or they are not finite.
    """
    features, device = context.features, context.device
    if len(features) == 0:
        raise DataError("FADeR got no training features; give at least one good image")
    order = _subset(features, generator)
    for name in base.skip_names:
        deviation = base.deviation(name)
        total = torch.zeros(deviation.centre.shape, dtype=torch.float64, device=device)
        for (tap,) in features.batches((name,), _BATCH, device=device, order=order):
            total += deviation.local(tap).double().sum(0)
        place = (total / len(order)).float()
        if not torch.isfinite(place).all():
            raise DataError(f"features of tap {name} are not finite; check the training images")
        everywhere = place.mean((1, 2), keepdim=True)
        mean = (1 - config.position_share) * everywhere + config.position_share * smooth_places(place)
        _, matrix = whitening(_deviations(features, name, deviation, mean, order), config.whitening)
        if not torch.isfinite(matrix).all():
            raise DataError(f"features of tap {name} are not finite; check the training images")
        deviation.set(mean, matrix.to(device))
    with torch.no_grad():
        saliencies = [
            base.saliency(base.read(taps)).flatten().cpu()
            for taps in features.batches(base.tap_names, _BATCH, device=device, order=order)
        ]
    base.threshold.fill_(float(_quantile(torch.cat(saliencies), config.mask_quantile)))


def _quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    # torch.quantile refuses more than 16 million values.
    ordered = values.sort().values
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _deviations(
    features: Features, name: str, deviation: Deviation, mean: torch.Tensor, order: torch.Tensor
) -> Iterator[torch.Tensor]:
    for (tap,) in features.batches((name,), _BATCH, device=mean.device, order=order):
        yield feature_rows(deviation.local(tap) - mean)


def random_blocks(mask: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Add random 2x2 blocks to a mask float32 [N, 1, h, w] (h, w even), each with probability ``share``."""
    n, _, h, w = mask.shape
    drawn = torch.rand(n, 1, h // _BLOCK_CELLS, w // _BLOCK_CELLS, generator=generator) < share
    return torch.maximum(mask, enlarge_nearest(drawn.to(mask), _BLOCK_CELLS))


def train_base(base: MaskedBase, context: FitContext, config: FaderConfig, generator: torch.Generator) -> list[float]:
    """Stage 1: learn to reconstruct good parts under the deterministic mask and random blocks beside it.

    Returns:
        The reconstruction loss of every step.

    Raises:
        UsageError: training diverged.
    """
    features, device = context.features, context.device
    optimiser = torch.optim.AdamW(base.parameters(), lr=config.rate, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.rate, total_steps=config.steps, pct_start=0.1)
    for deviation in base.deviations.values():
        deviation.requires_grad_(requires_grad=False)
    losses = torch.empty(config.steps)
    base.train()
    for step in range(config.steps):
        drawn = torch.randperm(len(features), generator=generator)[: config.batch_tiles]
        (taps,) = features.batches(base.tap_names, len(drawn), device=device, order=drawn)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            reading = base.read(taps)
            mask = random_blocks(base.mask(reading), config.random_masks, generator)
            reconstruction = base.decode(base.skips(reading, mask))
        loss = base.loss([part.float() for part in reconstruction], [part.float() for part in reading.targets])
        _refuse_divergence(loss, step, config.steps, "rate")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        optimiser.step()
        schedule.step()
        losses[step] = loss.detach()
        context.progress("FADeR base", step + 1, config.steps)
    base.eval().requires_grad_(requires_grad=False)
    return losses.tolist()


def _refuse_divergence(loss: torch.Tensor, step: int, steps: int, setting: str) -> None:
    if not torch.isfinite(loss):
        raise UsageError(
            f"FADeR: the loss became {float(loss.detach())} at step {step + 1} of {steps}; lower {setting}"
        )


def reconstructions(
    base: MaskedBase, features: Features, order: torch.Tensor, device: torch.device
) -> Iterator[tuple[tuple[torch.Tensor, ...], Reading]]:
    """Yield the reconstruction and reading of batches of tiles, without gates, under the base's own mask."""
    with torch.no_grad():
        for taps in features.batches(base.tap_names, _BATCH, device=device, order=order):
            reading = base.read(taps)
            yield base.decode(base.skips(reading, base.mask(reading))), reading


def settle(head: FaderHead, context: FitContext, config: FaderConfig, generator: torch.Generator) -> None:
    """Set what follows from the residuals of good parts: their whitening, and the scale of every level and place."""
    base, device = head.base, context.device
    order = _subset(context.features, generator)
    base.settle(reconstructions(base, context.features, order, device), config.residual_whitening)
    scales = [head.get_buffer(f"scale_{index}") for index in range(len(base.level_strides))]
    totals = [torch.zeros_like(scale, dtype=torch.float64) for scale in scales]
    for reconstruction, reading in reconstructions(base, context.features, order, device):
        for total, level in zip(totals, base.levels(reconstruction, reading), strict=True):
            total.add_(level.double().sum(0))
    for scale, total, weight in zip(scales, totals, base.level_weights, strict=True):
        scale.copy_(weight / mean_of_places(total, len(order), config.place_prior).clamp_min(1e-6))


class Corruptions(NamedTuple):
    """Good tiles and what was made of them, row for row."""

    clean: Features
    corrupted: Features
    rows: torch.Tensor


def corrupt(context: FitContext, config: FaderConfig, generator: torch.Generator) -> Corruptions:
    """Put synthetic defects on some of the good training tiles, and take their features through the trunk."""
    rows = torch.randperm(len(context.features), generator=generator)[: config.gate_tiles]
    tiles, _ = make_defects(
        context.images[rows.numpy()],
        seed=context.seed + _CORRUPTION_SEED,
        size=_CORRUPTION_SIZE,
        defects=_CORRUPTION_DEFECTS,
    )
    return Corruptions(context.features, context.extract(tiles), rows)


def place_errors(head: FaderHead, reconstruction: Sequence[torch.Tensor], reading: Reading) -> torch.Tensor:
    """Return the scaled error of every place, float32 [N, 1, H/4, W/4]."""
    return head.combine(head.base.levels(reconstruction, reading))


def _error_range(head: FaderHead, context: FitContext, generator: torch.Generator) -> tuple[float, float]:
    order = _subset(context.features, generator)
    errors = torch.cat(
        [
            place_errors(head, *pair).flatten().cpu()
            for pair in reconstructions(head.base, context.features, order, context.device)
        ]
    )
    low, high = (float(_quantile(errors, share)) for share in _GATE_LEVELS)
    return low, max(high, low + 1e-6)


def on_grids(target: torch.Tensor, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a target float32 [N, 1, h, w] on the grid of each gate: means of finer cells, copies of coarser ones."""
    found = []
    for value in values:
        size, factor = value.shape[-1], target.shape[-1] / value.shape[-1]
        coarser = target if size >= target.shape[-1] else functional.avg_pool2d(target, int(factor))
        found.append(enlarge_nearest(coarser, size // coarser.shape[-1]))
    return found


def _balanced(values: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of gates against targets in 0..1, open and closed places weighing alike in all."""
    # Gate values are probabilities already; clamped, since float32 reaches 1.
    mean = values.mean(1, keepdim=True).clamp(1e-6, 1 - 1e-6)
    open_, closed = wanted / wanted.sum().clamp_min(1), (1 - wanted) / (1 - wanted).sum().clamp_min(1)
    return -(open_ * mean.log() + closed * (1 - mean).log()).sum() / 2


def cell_gates(values: Sequence[torch.Tensor], shape: torch.Size) -> list[torch.Tensor]:
    """Return the mean gate of each skip per mask cell, float32 [N, 1, H/16, W/16] each."""
    return [functional.adaptive_avg_pool2d(value.mean(1, keepdim=True), shape[-2:]) for value in values]


def train_gates(head: FaderHead, context: FitContext, config: FaderConfig, generator: torch.Generator) -> GateTrace:
    """Stage 2: learn to attenuate what the mask let through; the base is frozen.

    Half of each batch is corrupted, the other half the same tiles clean. Masks lose random cells, so that defects
    leak. Loss: reconstruction of the clean tile, ``beta`` times the cross-entropy of the gates against the error
    target ``1 - clip((e - low) / (high - low), 0, 1)`` of each place (fixed scale; e is measured on the current
    model), and a hinge that holds every level's mean gate on clean tiles at ``least_gate`` or above.

    Raises:
        UsageError: training diverged.
    """
    base, gates, device = head.base, head.gates, context.device
    assert gates is not None
    base.requires_grad_(requires_grad=False)
    pairs = corrupt(context, config, generator)
    low, high = _error_range(head, context, generator)
    optimiser = torch.optim.Adam(gates.parameters(), lr=config.gate_rate)
    trace = GateTrace([], [])
    gates.train()
    for step in range(config.gate_steps):
        drawn = torch.randperm(len(pairs.rows), generator=generator)[: max(1, config.batch_tiles // 2)]
        (bad,) = pairs.corrupted.batches(base.tap_names, len(drawn), device=device, order=drawn)
        (good,) = pairs.clean.batches(base.tap_names, len(drawn), device=device, order=pairs.rows[drawn])
        reading = base.read([torch.cat(both) for both in zip(bad, good, strict=True)])
        sought = Reading(*(tuple(torch.cat([part] * 2) for part in parts) for parts in base.read(good)))
        mask = _leaking(base.mask(reading), generator)
        reconstruction, values = attenuated(base, gates, reading, mask)
        clean = base.loss(reconstruction, sought.targets)
        with torch.no_grad():
            # Measured against what the clean twin gives: a defect that leaked and was reproduced is an error too.
            twin = [part[len(drawn) :].repeat(2, 1, 1, 1) for part in reconstruction]
            wanted = 1 - ((place_errors(head, twin, reading) - low) / (high - low)).clamp(0, 1)
        grids = on_grids(wanted, values)
        entropy = torch.stack([_balanced(value, target) for value, target in zip(values, grids, strict=True)]).sum()
        hinge = torch.stack([functional.relu(config.least_gate - value[len(drawn) :].mean()) for value in values]).sum()
        loss = _HINGE * hinge
        if config.objective is not Objective.ERROR:
            loss = loss + clean
        if config.objective is not Objective.CLEAN:
            loss = loss + (1.0 if config.objective is Objective.ERROR else config.beta) * entropy
        _refuse_divergence(loss, step, config.gate_steps, "gate_rate")
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch ships no type for it
        optimiser.step()
        trace.clean.append(float(clean.detach()))
        trace.error.append(float(entropy.detach()))
        context.progress("FADeR gates", step + 1, config.gate_steps)
    gates.eval().requires_grad_(requires_grad=False)
    return trace


def _leaking(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Uncover a random share of each mask's cells."""
    kept = torch.rand(mask.shape, generator=generator) < torch.rand(len(mask), 1, 1, 1, generator=generator)
    return mask * kept.to(mask)


def new_gates(base: MaskedBase, config: FaderConfig, generator: torch.Generator) -> Gates:
    """Return gates that fit a base, open."""
    return Gates(base.skip_channels, config.gate).initialise(generator)
