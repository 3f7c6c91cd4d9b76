"""Training of MMAE-ECG: rebuild what random masks hide of good windows.

Knows scaled windows, never where they were measured; there is no search for beats, shafts or any other landmark.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.mmae_ecg.masks import Scales, fixed_masks, random_masks
from trainer.methods.mmae_ecg.model import SIGNAL, Autoencoder, MmaeHead, Space, flat, hidden_errors, normalised

if TYPE_CHECKING:
    from collections.abc import Callable

_BETAS = (0.9, 0.95)
_WARM_UP = 0.1
# Steps whose mean loss is the loss of a training.
_LAST = 50
# Segments of a window where nothing else is asked for: at most so many, each of at least so many samples.
_MOST_SEGMENTS, _LEAST_LENGTH = 100, 16
_LEAST_LOCAL = 8
CHANCE = 2.0
"""The loss of both scales together where nothing is known but a segment's mean and deviation."""


class MmaeConfig(MethodConfig):
    """Settings of MMAE-ECG; the README says which values are the paper's, which inferred and which measured."""

    segments: int | None = Field(None, ge=4, description="T; null: the most up to 100 that leave each 16 samples.")
    local: int | None = Field(
        None, ge=2, description="delta, segments of the local run; null: a fifth of T, at least 8."
    )
    ratio: float = Field(0.5, gt=0, lt=1, description="theta, share that is hidden at each scale.")
    passes: int = Field(12, ge=1, description="H, passes that a window is judged by.")
    couple_masks: bool = Field(False, description="Hide at the global scale what is hidden at the local one.")
    space: Space = Field(Space.BOTH, description="What the map is measured in: normalised, raw or both.")
    cell: int | None = Field(None, ge=1, description="Samples of a map cell; null: a third of a segment, or a half.")
    floor: float = Field(
        4.0, gt=0, description="Deviation below which a segment is flat, over its channel's median over good segments."
    )
    smooth: float = Field(0.4, ge=0, le=4, description="Segments, deviation of the Gaussian that smooths the map.")
    width: int = Field(64, ge=8, description="d of tokens.")
    depth: int = Field(5, ge=1, le=24, description="Blocks of the encoder.")
    heads: int = Field(4, ge=1, description="Of every attention.")
    stretch: float = Field(0.1, ge=0, lt=0.5, description="Share by which a training window is slowed or hastened.")
    shift: float = Field(0.025, ge=0, lt=0.5, description="Share of a window by which a training window is moved.")
    gain: float = Field(0.2, ge=0, lt=1, description="Share by which a channel of a training window is made larger.")
    noise: float = Field(0.05, ge=0, description="Deviation of the noise on training windows, of the scaled signal.")
    steps: int = Field(3000, ge=1, description="Optimiser steps; fixed, there is no early stop.")
    batch: int = Field(32, ge=1, description="Windows of a step.")
    rate: float = Field(2e-3, gt=0, description="Highest learning rate (AdamW).")
    decay: float = Field(1e-5, ge=0, description="Weight decay.")
    loss_gate: float = Field(1.5, gt=0, description="Largest loss of a training that counts; 2 is chance.")


class MmaeMethod(Method):
    """An autoencoder of hidden segments at two scales."""

    name: ClassVar[str] = "mmae_ecg"
    tap_names: ClassVar[tuple[str, ...]] = (SIGNAL,)

    @classmethod
    def config(cls, preset: str) -> MmaeConfig:
        """Return the preset.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return MmaeConfig()
        if preset == "full":
            return MmaeConfig(steps=20_000, batch=64, rate=1e-3)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> MmaeHead:
        """Learn to rebuild good windows.

        Raises:
            DataError: there are no windows, they are not finite, or cannot be cut as asked.
            UsageError: training diverged, or learned nothing.
        """
        own = _own(config)
        windows = training_windows(context)
        network = autoencoder(own, channels=windows.shape[1], samples=windows.shape[2])
        generator = context.generator()
        network.initialise(generator)
        segments = network.cut(windows)
        floor = own.floor * flat(segments)
        losses = train(
            network.to(context.device),
            windows,
            own,
            floor=floor.to(context.device),
            generator=generator,
            device=context.device,
            report=lambda done: context.progress("mmae_ecg", done, own.steps),
        )
        # What a floor takes from a flat segment's target, nobody has to rebuild: of 2 it is the same share everywhere.
        known_nothing = float(normalised(segments, floor)[0].square().mean())
        reached = sum(losses[-_LAST:]) / len(losses[-_LAST:]) / known_nothing
        if not reached < own.loss_gate:
            raise UsageError(
                f"mmae_ecg reached a loss of {reached:.2f} after {own.steps} steps, and {CHANCE:g} is chance: what it "
                f"would say means nothing; raise --set steps, or --set loss_gate={own.loss_gate:g} for a noisy signal"
            )
        head = _head(network.to("cpu"), own, floor, context.seed)
        head.loss.fill_(reached)
        return head

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> MmaeHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not an MMAE-ECG head's.
        """
        own = _own(config)
        try:
            shape = tensors["shape"].tolist()
            network = autoencoder(own, channels=shape[0], samples=shape[1])
            head = _head(network, own, tensors["floor"], shape[2])
            head.load_state_dict(tensors)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, UsageError) as error:
            raise DataError(f"these tensors are no MMAE-ECG head ({error}); train again") from error
        return head


def scales(config: MmaeConfig, samples: int) -> Scales:
    """Return how windows of so many samples are cut and hidden.

    Raises:
        DataError: no number of segments divides the window.
        UsageError: the settings do not fit each other.
    """
    segments = config.segments
    if segments is None:
        most = min(_MOST_SEGMENTS, samples // _LEAST_LENGTH)
        segments = next((n for n in range(most, 3, -1) if samples % n == 0), 0)
        if not segments:
            raise DataError(f"a window of {samples} samples is not cut into equal segments; choose another --window")
    local = min(segments, max(_LEAST_LOCAL, segments // 5)) if config.local is None else config.local
    return Scales(segments, local, config.ratio)


def autoencoder(config: MmaeConfig, *, channels: int, samples: int) -> Autoencoder:
    """Return an empty network for windows of K channels and Q samples.

    Raises:
        DataError: the window cannot be cut.
        UsageError: the settings do not fit each other.
    """
    return Autoencoder(
        channels=channels,
        samples=samples,
        scales=scales(config, samples),
        width=config.width,
        depth=config.depth,
        heads=config.heads,
    )


def training_windows(context: FitContext) -> torch.Tensor:
    """Return float32 [n, K, Q] of the training windows; a lost sample is at its channel's mean, as in the graph.

    Raises:
        DataError: there are none, or a value is not finite.
    """
    if len(context.features) == 0:
        raise DataError("mmae_ecg got no training windows; add good recordings")
    windows = context.features.taps[SIGNAL][:, 0].float()
    if not torch.isfinite(windows).all():
        raise DataError("the training windows are not finite; check the recordings")
    return windows


def train(
    network: Autoencoder,
    windows: torch.Tensor,
    config: MmaeConfig,
    *,
    floor: torch.Tensor,
    generator: torch.Generator,
    device: torch.device,
    report: Callable[[int], None],
) -> list[float]:
    """Train a network to rebuild what is hidden; masks are drawn anew in each step.

    Args:
        network: on the device; left in eval mode.
        windows: float32 [n, K, Q], scaled, on the CPU.
        config: settings.
        floor: float32 [K, 1], on the device, as for :func:`trainer.methods.mmae_ecg.model.normalised`.
        generator: source of order and masks.
        device: where to train.
        report: called with the steps done.

    Returns:
        The loss of each step, both scales together.

    Raises:
        UsageError: training diverged.
    """
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=config.rate, betas=_BETAS, weight_decay=config.decay, foreach=True
    )
    warm = max(1, round(_WARM_UP * config.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _share(step, warm, config.steps))
    network.train()
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.int64)
    while len(losses) < config.steps:
        while len(order) < config.batch:
            order = torch.cat([order, torch.randperm(len(windows), generator=generator)])
        rows, order = order[: config.batch], order[config.batch :]
        masks = random_masks(network.scales, len(rows), generator, couple=config.couple_masks).to(device)
        segments = network.cut(varied(windows[rows], config, generator).to(device))
        with torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext():
            rebuilt = network(segments, masks)
        of_window, of_run = hidden_errors(rebuilt.float(), segments, masks, floor)
        loss = of_window + of_run
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise UsageError(f"mmae_ecg diverged at step {len(losses)}; lower --set rate (now {config.rate:g})")
        report(len(losses))
    network.eval()
    return losses


def varied(windows: torch.Tensor, config: MmaeConfig, generator: torch.Generator) -> torch.Tensor:
    """Return windows as they might have been: slower or faster, earlier or later, larger or smaller, noisier.

    Where a moved window reaches beyond what was recorded, the last sample stands still.

    Args:
        windows: float32 [n, K, Q], scaled.
        config: how much of each; with 0 of all the windows come back as they are.
        generator: on the CPU.
    """
    if not (config.stretch or config.shift or config.gain or config.noise):
        return windows
    count, channels, samples = windows.shape

    def drawn(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(shape, generator=generator) - 1

    middle = (samples - 1) / 2
    pace, moved = 1 + config.stretch * drawn(count, 1), config.shift * samples * drawn(count, 1)
    places = ((torch.arange(samples) - middle) * pace + middle + moved).clamp(0, samples - 1)
    before = places.floor().long().clamp(max=samples - 2)
    share = (places - before)[:, None]
    before = before[:, None].expand(-1, channels, -1)
    found = windows.gather(2, before) * (1 - share) + windows.gather(2, before + 1) * share
    louder = 1 + config.gain * drawn(count, channels, 1)
    return found * louder + config.noise * torch.randn(windows.shape, generator=generator)


def _share(step: int, warm: int, steps: int) -> float:
    """Share of the highest rate: a straight rise, then half a cosine down to nothing."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _head(network: Autoencoder, config: MmaeConfig, floor: torch.Tensor, seed: int) -> MmaeHead:
    length = network.length
    cell = config.cell or next(length // parts for parts in (3, 2, 1) if length % parts == 0)
    masks = fixed_masks(network.scales, config.passes, seed, couple=config.couple_masks)
    head = MmaeHead(network, masks, floor=floor, space=config.space, cell=cell, smooth=config.smooth, seed=seed)
    return head.eval().requires_grad_(requires_grad=False)


def _own(config: MethodConfig) -> MmaeConfig:
    if not isinstance(config, MmaeConfig):
        raise UsageError(f"mmae_ecg cannot use a {type(config).__name__}; take MmaeMethod.config(preset)")
    return config
