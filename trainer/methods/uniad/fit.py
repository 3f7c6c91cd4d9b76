"""Training of UniAD: rebuild jittered features of good images of every product together, without their labels.

Knows features, never images; the trunk is frozen and belongs to all methods.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.uniad.model import TAP_NAMES, Features, Reconstructor, Sampling, UniADHead, distance, jitter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BATCH = 32
_CONSTANT = 1e-10
PAPER_CHANNELS = 272
PAPER_JITTER = 20.0
PLACE_PRIOR = 10.0
"""Tiles that the mean over all places counts as, beside what each place shows."""
_DROP_AT = 0.8
_DROP_TO = 0.1


class UniADConfig(MethodConfig):
    """Settings of UniAD; the README says which values are the paper's, which inferred and which measured."""

    width: int = Field(128, ge=8, description="d of tokens inside; a multiple of the heads.")
    layers: int = Field(2, ge=1, le=12, description="Of the encoder, and of the decoder.")
    heads: int = Field(8, ge=1, description="Of every attention.")
    hidden: int = Field(512, ge=8, description="Of feed-forward networks.")
    neighbours: int | None = Field(None, ge=0, description="Side of the hidden square; null for half of the grid.")
    jitter: float | None = Field(None, ge=0, description="alpha; null keeps the paper's noise for the channels here.")
    dropout: float = Field(0.0, ge=0, lt=1, description="In training; of attention it is 40 % of a step on a CPU.")
    queries: bool = Field(True, description="A query in each decoder layer; without them it is a plain transformer.")
    sampling: Sampling = Field(Sampling.MEAN, description="How finer taps come to the grid of the deepest.")
    standardise: bool = Field(True, description="Give every channel mean 0 and deviation 1 on good patches first.")
    places: bool = Field(True, description="Divide the map by what good images have at each site.")
    balance: float = Field(1.0, ge=0, le=1, description="0: every tile equally often; 1: every product equally often.")
    steps: int = Field(4000, ge=1, description="Optimiser steps; fixed, there is no early stop.")
    batch_tiles: int = Field(8, ge=1, description="Tiles of a step.")
    rate: float = Field(2e-3, gt=0, description="Learning rate (AdamW); a tenth of it for the last fifth of the steps.")
    decay: float = Field(1e-4, ge=0, description="Weight decay.")
    clip: float = Field(0.1, gt=0, description="Norm that gradients are clipped to.")


class UniADMethod(Method):
    """One reconstructor of features for all products together."""

    name: ClassVar[str] = "uniad"
    tap_names: ClassVar[tuple[str, ...]] = TAP_NAMES

    @classmethod
    def config(cls, preset: str) -> UniADConfig:
        """Return the preset: ``quick`` is the edge's size, ``full`` the paper's.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return UniADConfig()
        if preset == "full":
            return UniADConfig(width=256, layers=4, hidden=1024, dropout=0.1, steps=40_000, rate=1e-4)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> UniADHead:
        """Learn the reconstructor.

        Raises:
            DataError: there are no features, or they are not finite, or the grid is too small for the hidden square.
            UsageError: training diverged.
        """
        own = _own(config)
        tokens, grid = training_tokens(context, own.sampling)
        mean, scale = standardisation(tokens) if own.standardise else _identity(tokens.shape[2])
        network = reconstructor(own, grid, int(tokens.shape[2]))
        network.initialise(context.generator())
        drawn = shares(context.features.products, len(tokens), own.balance)
        taken, times = mean.to(context.device), scale.to(context.device)

        def clean(rows: torch.Tensor) -> torch.Tensor:
            return (tokens[rows].to(context.device, torch.float32) - taken) * times

        with torch.random.fork_rng():
            torch.manual_seed(context.seed)  # dropout draws from it
            train(
                network.to(context.device),
                clean,
                drawn,
                own,
                generator=context.generator(),
                report=lambda done: context.progress("uniad", done, own.steps),
            )
        level = place_level(network, clean, drawn).unflatten(0, grid) if own.places else torch.ones(grid)
        head = UniADHead(network.to("cpu"), mean, scale, level, own.sampling)
        return head.eval().requires_grad_(requires_grad=False)

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> UniADHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not a UniAD head's.
        """
        own = _own(config)
        try:
            grid = (len(tensors["reconstructor.rows"]), len(tensors["reconstructor.columns"]))
            channels = int(tensors["reconstructor.enter.weight"].shape[1])
            head = UniADHead(
                reconstructor(own, grid, channels),
                torch.zeros(channels),
                torch.ones(channels),
                torch.ones(grid),
                own.sampling,
            )
            head.load_state_dict(tensors)
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise DataError(f"these tensors are no UniAD head ({error}); train again") from error
        return head.eval().requires_grad_(requires_grad=False)


def reconstructor(config: UniADConfig, grid: tuple[int, int], channels: int) -> Reconstructor:
    """Return an empty reconstructor for a grid.

    Raises:
        DataError: the hidden square leaves a site nothing to see.
    """
    # The paper's 7 of 14, kept in proportion and odd.
    neighbours = 2 * (min(grid) // 2 // 2) + 1 if config.neighbours is None else config.neighbours
    return Reconstructor(
        grid=grid,
        channels=channels,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        hidden=config.hidden,
        neighbours=neighbours,
        dropout=config.dropout,
        queries=config.queries,
    )


def shares(products: torch.Tensor | None, count: int, balance: float) -> torch.Tensor:
    """Return how often each tile is drawn, float64 [n], in parts of the mean.

    A product of n tiles is drawn in proportion to n^(1 - balance).

    Args:
        products: int64 [n], the product of each tile; None is one product.
        count: n.
        balance: 0 for all tiles alike, 1 for all products alike.
    """
    if products is None:
        return torch.ones(count, dtype=torch.float64)
    weights = torch.bincount(products).double()[products] ** -balance
    return weights / weights.mean()


def training_tokens(context: FitContext, sampling: Sampling = Sampling.ALIGNED) -> tuple[torch.Tensor, tuple[int, int]]:
    """Return tokens float16 [n tiles, L, C] of the training tiles, and their grid.

    Raises:
        DataError: there are none, or a value is not finite.
    """
    features = context.features
    if len(features) == 0:
        raise DataError("there are no training features; add good parts to train/good")
    deepest = features.taps[TAP_NAMES[-1]]
    grid = (int(deepest.shape[2]), int(deepest.shape[3]))
    together = Features(grid, sampling)
    tokens = torch.cat(
        [
            together(*taps).to("cpu", torch.float16)
            for taps in features.batches(TAP_NAMES, _BATCH, device=context.device)
        ]
    )
    if not torch.isfinite(tokens).all():
        raise DataError("features of the training images are not finite; check the images")
    return tokens, grid


def standardisation(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and reciprocal deviation per channel, float32 [C] each, of tokens [n, L, C]."""
    total, squares, count = 0.0, 0.0, 0
    for part in tokens.split(_BATCH):
        rows = part.flatten(0, 1).double()
        total, squares, count = total + rows.sum(0), squares + rows.square().sum(0), count + len(rows)
    mean = torch.as_tensor(total / count)
    variance = (torch.as_tensor(squares / count) - mean.square()).clamp_min(0)
    variance[variance <= _CONSTANT] = 1  # a channel that never varies keeps its units
    return mean.float(), variance.rsqrt().float()


def train(
    network: torch.nn.Module,
    tokens: Callable[[torch.Tensor], torch.Tensor],
    drawn: torch.Tensor,
    config: UniADConfig,
    *,
    generator: torch.Generator,
    report: Callable[[int], None],
) -> list[float]:
    """Train a network to give clean tokens from jittered ones.

    Args:
        network: from tokens [n, L, C] to tokens; on the device it is trained on, and left in eval mode.
        tokens: from indices int64 [n] to clean tokens float32 [n, L, C].
        drawn: float64 [n tiles], how often each is, see :func:`shares`.
        config: settings.
        generator: source of order and jitter.
        report: called with the steps done.

    Returns:
        The loss of each step.

    Raises:
        UsageError: training diverged.
    """
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.rate, weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, max(1, round(_DROP_AT * config.steps)), _DROP_TO)
    network.train()
    losses = []
    for step, rows in zip(range(config.steps), orders(drawn, config.batch_tiles, generator)):  # noqa: B905 (endless)
        clean = tokens(rows)
        alpha = paper_jitter(clean.shape[2]) if config.jitter is None else config.jitter
        on_gpu = clean.device.type == "cuda"
        with torch.autocast(clean.device.type, dtype=torch.bfloat16) if on_gpu else nullcontext():
            rebuilt = network(jitter(clean, alpha, generator))
        loss = (rebuilt.float() - clean).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if not torch.isfinite(loss):
            raise UsageError(f"uniad diverged at step {step + 1}; lower --set rate (now {config.rate:g})")
        report(step + 1)
    network.eval()
    return losses


@torch.no_grad()
def place_level(
    network: torch.nn.Module, tokens: Callable[[torch.Tensor], torch.Tensor], drawn: torch.Tensor
) -> torch.Tensor:
    """Return how far from what they are rebuilt as good tokens are at each site, float32 [L], in parts of the mean.

    Sites near the border see padding and fewer neighbours, and are rebuilt worse. Few tiles tell little of a site, so
    the mean over all sites counts as :data:`PLACE_PRIOR` tiles more.

    Args:
        network: trained, in eval mode.
        tokens: as in :func:`train`.
        drawn: float64 [n tiles], what each counts.
    """
    total: torch.Tensor | float = 0.0
    for rows in torch.arange(len(drawn)).split(_BATCH):
        clean = tokens(rows)
        error = distance(clean, network(clean)).double().cpu()
        total = total + (error * drawn[rows, None]).sum(0)
    found = torch.as_tensor(total)
    level = (found + PLACE_PRIOR * found.mean() / len(drawn)) / (len(drawn) + PLACE_PRIOR)
    return (level / level.mean()).float()


def paper_jitter(channels: int) -> float:
    """Return the alpha that keeps the paper's noise in units of a token's root mean square: alpha / sqrt(C)."""
    return PAPER_JITTER * (channels / PAPER_CHANNELS) ** 0.5


def orders(drawn: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield rows, pass after pass; in each a tile comes as often as its share says, rounded up or down by chance."""
    while True:
        times = (drawn + torch.rand(len(drawn), generator=generator, dtype=torch.float64)).floor().long()
        rows = torch.arange(len(drawn)).repeat_interleave(times)
        yield from rows[torch.randperm(len(rows), generator=generator)].split(batch)


def _identity(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(channels), torch.ones(channels)


def _own(config: MethodConfig) -> UniADConfig:
    if not isinstance(config, UniADConfig):
        raise UsageError(f"uniad cannot use a {type(config).__name__}; take UniADMethod.config(preset)")
    return config
