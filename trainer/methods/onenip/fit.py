"""Training of OneNIP: rebuild good features, restore those of pseudo anomalies, and refine errors to masks, together.

It makes pictures through the context and knows features; the trunk is frozen and belongs to all methods.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.onenip.anomalies import pseudo_anomaly
from trainer.methods.onenip.model import MAP_STRIDE, OneNipHead, PromptedReconstructor, Refiner
from trainer.methods.uniad.fit import orders, paper_jitter, shares, standardisation, training_tokens
from trainer.methods.uniad.model import TAP_NAMES, Features, Sampling, jitter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trainer.methods.base import Features as TapFeatures

_BATCH = 32
_POOL_BATCH = 64  # pictures whose taps are in memory at once: 0.7 MB each at 224 pixels
_DROP_AT, _DROP_TO = 0.8, 0.1
_SMOOTH = 1.0  # of the Dice loss
_CANDIDATES = 400  # tiles of a product that may become its prompt, so that their distances fit into memory


class OneNipConfig(MethodConfig):
    """Settings of OneNIP; the README says which values are the paper's, which inferred and which measured."""

    width: int = Field(128, ge=8, description="d of tokens inside; a multiple of the heads.")
    layers: int = Field(2, ge=1, le=12, description="Of the encoder, and of the decoder.")
    heads: int = Field(8, ge=1, description="Of every attention.")
    hidden: int = Field(512, ge=8, description="Of feed-forward networks.")
    neighbours: int | None = Field(None, ge=0, description="Side of the hidden square; null for half of the grid.")
    jitter: float | None = Field(None, ge=0, description="alpha; null keeps the paper's noise for the channels here.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Of the encoder, in training.")
    sampling: Sampling = Field(Sampling.ALIGNED, description="How finer taps come to the grid of the deepest.")
    standardise: bool = Field(True, description="Give every channel mean 0 and deviation 1 on good patches first.")
    refiner: int = Field(64, ge=1, description="Channels inside the refiner.")
    restore: float = Field(1.0, ge=0, description="Weight of restoring pseudo anomalies to what was there.")
    dice: float = Field(0.5, ge=0, description="Weight of the refiner's Dice loss.")
    balance: float = Field(0.5, ge=0, le=1, description="0: every tile equally often; 1: every product equally often.")
    share: float = Field(0.5, ge=0, le=1, description="Of the refiner in the map.")
    level: float = Field(2.0, gt=0, description="Of a probability of 1, in means of the least and greatest error.")
    anomalies: int = Field(400, ge=1, description="Pictures with pseudo anomalies, made once before training.")
    steps: int = Field(1200, ge=1, description="Optimiser steps; fixed, there is no early stop.")
    batch_tiles: int = Field(8, ge=1, description="Good tiles of a step, and as many with pseudo anomalies.")
    rate: float = Field(1e-3, gt=0, description="Learning rate (AdamW); a tenth of it for the last fifth of the steps.")
    decay: float = Field(1e-4, ge=0, description="Weight decay.")
    clip: float = Field(0.1, gt=0, description="Norm that gradients are clipped to.")


class OneNipMethod(Method):
    """One reconstructor of features for all products together, told by one good image which product it is."""

    name: ClassVar[str] = "onenip"
    tap_names: ClassVar[tuple[str, ...]] = TAP_NAMES

    @classmethod
    def config(cls, preset: str) -> OneNipConfig:
        """Return the preset: ``quick`` is the edge's size, ``full`` the paper's.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return OneNipConfig()
        if preset == "full":
            return OneNipConfig(
                width=256, layers=4, hidden=1024, dropout=0.1, refiner=128, anomalies=4000, steps=40_000, rate=1e-4
            )
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> OneNipHead:
        """Learn reconstructor and refiner, and choose each product's prompt.

        Raises:
            DataError: there are no features, or they are not finite, or the grid is too small for the hidden square,
                or a product has no image.
            UsageError: training diverged.
        """
        own = _own(config)
        clean, grid = training_tokens(context, own.sampling)
        channels = int(clean.shape[2])
        mean, scale = standardisation(clean) if own.standardise else (torch.zeros(channels), torch.ones(channels))
        products = products_of(context.features)
        counts = torch.bincount(products, minlength=max(1, len(context.products)))
        if not counts.all():
            raise DataError(f"onenip got no image of {context.products[int(counts.argmin())]!r}; add good parts of it")
        material = Material(clean, products, *make_anomalies(context, own, products), grid)
        network, refiner = empty_networks(own, grid, channels)
        network.initialise(context.generator())
        refiner.initialise(context.generator())
        network.to(context.device)
        refiner.to(context.device)
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)  # dropout draws from it
            train(
                network,
                refiner,
                material,
                own,
                normalise=lambda x: (x - mean.to(x.device)) * scale.to(x.device),
                generator=context.generator(),
                report=lambda done: context.progress("onenip", done, own.steps),
            )
        head = OneNipHead(
            network.to("cpu"), refiner.to("cpu"), mean=mean, scale=scale, share=own.share, level=1.0,
            sampling=own.sampling, prompts=choose_prompts(network, (clean, products), lambda x: (x - mean) * scale),
        ).eval().requires_grad_(requires_grad=False)  # fmt: skip
        head.level.fill_(own.level * error_level(head.to(context.device), context.validation.good, context.device))
        return head.to("cpu")

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> OneNipHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not a OneNIP head's.
        """
        own = _own(config)
        try:
            grid = (len(tensors["reconstructor.rows"]), len(tensors["reconstructor.columns"]))
            channels = int(tensors["reconstructor.enter.weight"].shape[1])
            network, refiner = empty_networks(own, grid, channels)
            head = OneNipHead(
                network, refiner, mean=torch.zeros(channels), scale=torch.ones(channels), share=own.share, level=1.0,
                sampling=own.sampling,
                prompts=torch.zeros(len(tensors["prompts"]), grid[0] * grid[1], own.width),
            )  # fmt: skip
            head.load_state_dict(tensors)
        except (KeyError, IndexError, TypeError, RuntimeError) as error:
            raise DataError(f"these tensors are no OneNIP head ({error}); train again") from error
        return head.eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class Material:
    """What is trained on; all of it on the CPU.

    Attributes:
        clean: float16 [n, L, C], features of good tiles.
        products: int64 [n], which product each shows.
        anomalous: float16 [m, L, C], features of tiles with pseudo anomalies.
        masks: float16 [m, 4 h, 4 w], the share of each cell of the map that is anomalous.
        sources: int64 [m], the good tile that each was made from.
        grid: (h, w).
    """

    clean: torch.Tensor
    products: torch.Tensor
    anomalous: torch.Tensor
    masks: torch.Tensor
    sources: torch.Tensor
    grid: tuple[int, int]


def empty_networks(config: OneNipConfig, grid: tuple[int, int], channels: int) -> tuple[PromptedReconstructor, Refiner]:
    """Return a reconstructor and a refiner for a grid, without weights.

    Raises:
        DataError: the hidden square leaves a site nothing to see.
    """
    # The paper's 7 of 14, kept in proportion and odd.
    neighbours = 2 * (min(grid) // 2 // 2) + 1 if config.neighbours is None else config.neighbours
    network = PromptedReconstructor(
        grid=grid,
        channels=channels,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        hidden=config.hidden,
        neighbours=neighbours,
        dropout=config.dropout,
    )
    return network, Refiner(channels, config.refiner)


def products_of(features: TapFeatures) -> torch.Tensor:
    """Return which product each tile shows, int64 [n]; all the first where there is one only."""
    return torch.zeros(len(features), dtype=torch.int64) if features.products is None else features.products


def make_anomalies(
    context: FitContext, config: OneNipConfig, products: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make pictures with pseudo anomalies and take their features.

    Each training tile in turn, in a drawn order, so that all take part where there are enough pictures; textures come
    from tiles of other products, or from any where there is one product.

    Returns:
        ``anomalous``, ``masks`` and ``sources`` of :class:`Material`.
    """
    images, known = context.images, products.unique()
    rng = np.random.default_rng((context.seed, 1))
    # One of each product first: none is left out where there are few.
    count = max(config.anomalies, len(known))
    first = [rng.choice(np.flatnonzero(products == product)) for product in known]
    orders = [rng.permutation(len(images)) for _ in range(-(-count // len(images)))]
    sources = np.concatenate([first, *orders])[:count]
    foreign = {
        int(product): np.flatnonzero(other)
        if (other := (products != product).numpy()).any()
        else np.arange(len(images))
        for product in known
    }
    tokens, masks = [], []
    for start in range(0, count, _POOL_BATCH):
        made = []
        for source in sources[start : start + _POOL_BATCH]:
            # A few to draw from: indexing copies them.
            others = images[rng.choice(foreign[int(products[source])], 4)]
            picture, mask = pseudo_anomaly(images[source], others, rng)
            made.append(picture)
            share = torch.from_numpy(mask)[None].float()
            masks.append(functional.avg_pool2d(share, MAP_STRIDE)[0].half())
        features = context.extract(np.stack(made))
        deepest = features.taps[TAP_NAMES[-1]]
        together = Features((int(deepest.shape[2]), int(deepest.shape[3])), config.sampling)
        tokens += [together(*taps).to("cpu", torch.float16) for taps in features.batches(
            TAP_NAMES, _BATCH, device=context.device
        )]  # fmt: skip
        context.progress("pseudo anomalies", min(start + _POOL_BATCH, count), count)
    return torch.cat(tokens), torch.stack(masks), torch.from_numpy(sources)


def train(
    network: PromptedReconstructor,
    refiner: Refiner,
    material: Material,
    config: OneNipConfig,
    *,
    normalise: Callable[[torch.Tensor], torch.Tensor],
    generator: torch.Generator,
    report: Callable[[int], None],
) -> list[tuple[float, float]]:
    """Train both networks together.

    Args:
        network: on the device it is trained on; left in eval mode.
        refiner: likewise.
        material: see there.
        config: settings.
        normalise: from features float32 [N, L, C] to what is rebuilt.
        generator: source of order, prompts and jitter.
        report: called with the steps done.

    Returns:
        Reconstruction and Dice loss of each step.

    Raises:
        UsageError: training diverged.
    """
    device = next(network.parameters()).device
    parameters = [*network.parameters(), *refiner.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=config.rate, weight_decay=config.decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, max(1, round(_DROP_AT * config.steps)), _DROP_TO)
    network.train()
    refiner.train()
    losses = []
    for step, batch in zip(range(config.steps), batches(material, config, generator)):  # noqa: B905 (endless)
        features, target, prompt = (
            normalise(one.to(device, torch.float32)) for one in (batch.features, batch.target, batch.prompt)
        )
        alpha = paper_jitter(features.shape[2]) if config.jitter is None else config.jitter
        noisy = [jitter(one, alpha, generator) for one in (features, prompt)]
        with torch.autocast(device.type, dtype=torch.bfloat16) if device.type == "cuda" else nullcontext():
            rebuilt = network.decode(network.encode(noisy[0]), network.encode(noisy[1]).repeat(2, 1, 1))
            error = (rebuilt.float() - features).abs().transpose(1, 2).unflatten(2, material.grid)
            refined = torch.sigmoid(refiner(error).float())
        whole, half = (rebuilt.float() - target).square().mean((1, 2)), len(features) // 2
        rebuilding = (whole[:half].mean() + config.restore * whole[half:].mean()) / (1 + config.restore)
        dicing = dice(refined, batch.masks.to(device, torch.float32)).mean()
        loss = rebuilding + config.dice * dicing
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimiser.step()
        schedule.step()
        losses.append((float(rebuilding.detach()), float(dicing.detach())))
        if not torch.isfinite(loss):
            raise UsageError(f"onenip diverged at step {step + 1}; lower --set rate (now {config.rate:g})")
        report(step + 1)
    network.eval()
    refiner.eval()
    return losses


def dice(probability: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the original's Dice loss of each image, float32 [N].

    ``1 - (sum p t + 1) / (sum p^2 + sum t^2 + 1)``, without the usual factor 2: a perfect answer to a large mask is
    0.5 and not 0, to an empty one 0.

    Args:
        probability: float32 [N, h, w] in [0, 1].
        truth: likewise.
    """
    p, t = probability.flatten(1), truth.flatten(1)
    return 1 - ((p * t).sum(1) + _SMOOTH) / (p.square().sum(1) + t.square().sum(1) + _SMOOTH)


@torch.no_grad()
def choose_prompts(
    network: PromptedReconstructor,
    tiles: tuple[torch.Tensor, torch.Tensor],
    normalise: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return each product's prompt: the encoder's tokens of its medoid, the tile nearest to all others in these tokens.

    Args:
        network: trained, in eval mode, on the CPU.
        tiles: features [n, L, C], and which product each shows, int64 [n], each product at least once.
        normalise: from features float32 to what is rebuilt.

    Returns:
        float32 [P, L, d].
    """
    clean, products = tiles
    prompts = []
    for product in range(int(products.max()) + 1):
        rows = (products == product).nonzero()[:, 0]
        rows = rows[torch.linspace(0, len(rows) - 1, min(len(rows), _CANDIDATES)).round().long()]
        tokens = torch.cat([network.encode(normalise(clean[part].float())) for part in rows.split(_BATCH)])
        flat = tokens.flatten(1)
        prompts.append(tokens[torch.cdist(flat, flat).sum(1).argmin()])
    return torch.stack(prompts)


@torch.inference_mode()
def error_level(head: OneNipHead, good: TapFeatures, device: torch.device) -> float:
    """Return the mean of the least and greatest error, which brings the refiner's probability to the error's scale.

    The original takes both over the test set; here they are those of good images that nothing was fitted on.

    Args:
        head: on ``device``.
        good: features of such images.
        device: where to compute.
    """
    products, least, most, start = products_of(good), float("inf"), 0.0, 0
    for taps in good.batches(TAP_NAMES, _BATCH, device=device):
        prompt = head.prompts[products[start : start + len(taps[0])].to(device)]
        error = head.errors(head.tokens(*taps), prompt)[0]
        least, most, start = min(least, float(error.min())), max(most, float(error.max())), start + len(error)
    return (least + most) / 2


@dataclass(frozen=True)
class Drawn:
    """What one step learns from.

    Attributes:
        features: float16 [2 n, L, C], n good tiles, then n with pseudo anomalies of the same products.
        target: float16 [2 n, L, C], what they should be rebuilt to.
        masks: float16 [2 n, 4 h, 4 w], as in :class:`Material`; of good tiles 0.
        prompt: float16 [n, L, C], good tiles of the same products, for both halves.
    """

    features: torch.Tensor
    target: torch.Tensor
    masks: torch.Tensor
    prompt: torch.Tensor


def batches(material: Material, config: OneNipConfig, generator: torch.Generator) -> Iterator[Drawn]:
    """Draw good tiles and, for each, a tile with a pseudo anomaly and a prompt, both of the same product."""
    of_product = [(material.products == product).nonzero()[:, 0] for product in range(int(material.products.max()) + 1)]
    product_of = material.products[material.sources]
    made = [(product_of == product).nonzero()[:, 0] for product in range(len(of_product))]

    def one_of(choices: torch.Tensor) -> torch.Tensor:
        return choices[torch.randint(len(choices), (1,), generator=generator)]

    drawn = shares(material.products, len(material.clean), config.balance)
    for rows in orders(drawn, config.batch_tiles, generator):
        products = material.products[rows].tolist()
        prompts = torch.cat([one_of(of_product[product]) for product in products])
        spoilt = torch.cat([one_of(made[product]) for product in products])
        good = material.clean[rows]
        yield Drawn(
            features=torch.cat([good, material.anomalous[spoilt]]),
            target=torch.cat([good, material.clean[material.sources[spoilt]]]),
            masks=torch.cat([torch.zeros_like(material.masks[spoilt]), material.masks[spoilt]]),
            prompt=material.clean[prompts],
        )


def _own(config: MethodConfig) -> OneNipConfig:
    if not isinstance(config, OneNipConfig):
        raise UsageError(f"onenip cannot use a {type(config).__name__}; take OneNipMethod.config(preset)")
    return config
