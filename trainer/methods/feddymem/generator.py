"""Training the generator: generic statistics first, then the metric loss, the best epoch by synthetic validation.

It sees joined patches of made-up products, or of one product where asked for; it must not know heads or runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from deploy.metrics import image_auroc
from edge.errors import DataError
from trainer.methods.feddymem.metric import effective_rank, metric_loss
from trainer.methods.feddymem.model import LEVELS, Generator, level_patches
from trainer.methods.memory.reduce import greedy_coreset, moments, nearest, oriented, weighted_average_reduce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from trainer.methods.base import Features

LEAST_RANK = 0.5
"""Share of the effective rank before training below which the generator has collapsed."""

_BATCH = 16
_FLOOR = 0.1  # of a level's mean length: shorter patches are noise and are not stretched to full length
_ANCHORS = 256  # rows of a product's bank while the generator is trained
_POOL = 6000  # patches that they are chosen from
_QUERIES = 512  # patches of one product in a step
_STEPS_PER_EPOCH = 40
_RANK_ROWS = 4000
_MEMORY = 1024


@dataclass(frozen=True)
class Patches:
    """Good images of one product as raw patches on the stride-8 grid, before lengths and projection.

    Attributes:
        remembered: float32 [n, C0], for its bank.
        seen: float32 [m, C0], of further images.
    """

    remembered: torch.Tensor
    seen: torch.Tensor


@dataclass(frozen=True)
class Judged:
    """Good and synthetically defective images of one product, to choose by.

    Attributes:
        remembered: float32 [n, C0] raw patches for its bank.
        images: float32 [k * L, C0] raw patches of k images, good ones and defective ones.
        labels: bool [k], True is defective.
        inside: bool [k * L], patches at least half covered by a defect.
    """

    remembered: torch.Tensor
    images: torch.Tensor
    labels: npt.NDArray[np.bool_]
    inside: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Recipe:
    """How a generator is made.

    Attributes:
        width: D.
        steps: of the metric loss; 0 leaves the statistics as they are.
        pull: weight of the pull to the memory of all products.
        rate: of AdamW.
    """

    width: int
    steps: int
    pull: float = 0.0
    rate: float = 1e-3


@dataclass(frozen=True)
class Trained:
    """A generator and what its training said.

    Attributes:
        generator: frozen, in eval mode, on the CPU.
        figures: ``rank_before``, ``rank_after``, ``epoch`` (kept; 0 is before the metric loss), ``collapsed`` (0 or
            1); where there was a metric loss ``score_before`` and ``score_after``, means of I-AUROC and patch AUROC on
            the validation products.
    """

    generator: Generator
    figures: dict[str, float]


def raw_patches(features: Features) -> torch.Tensor:
    """Return every patch of every level on the stride-8 grid, float32 [n * L, C0]."""
    batches = features.batches(LEVELS, _BATCH, device=torch.device("cpu"))
    rows = torch.cat([torch.cat(level_patches(*taps), 1).permute(0, 2, 3, 1).flatten(0, 2) for taps in batches])
    if not torch.isfinite(rows).all():
        raise DataError("features are not finite; check the training images")
    return rows


def train_generator(
    products: Sequence[Patches],
    judged: Sequence[Judged],
    channels: Sequence[int],
    recipe: Recipe,
    *,
    seed: int,
    loss: Callable[..., torch.Tensor] = metric_loss,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Trained:
    """Make a generator: statistics of all patches, then the metric loss, keeping the best epoch.

    An epoch whose rows have less than half the effective rank of the beginning ends the training; the best of the
    epochs before it is kept.

    Args:
        products: what it learns from.
        judged: what the epoch is chosen by; without any the last good epoch is kept.
        channels: of each level.
        recipe: how.
        seed: of every random choice.
        loss: see :func:`metric_loss`.
        progress: called with (what, done, all).

    Raises:
        DataError: no patches, fewer channels than D, or values that are not finite.
    """
    if not products or not sum(channels) >= recipe.width >= 1:
        raise DataError(f"a generator of {recipe.width} of {sum(channels)} channels from {len(products)} products")
    random = torch.Generator().manual_seed(seed)
    generator = initial_generator([part for p in products for part in (p.remembered, p.seen)], channels, recipe)
    if not recipe.steps:
        rank = _rank(generator, _sample([joined(generator, p.seen) for p in products], random))
        return Trained(generator, {"rank_before": rank, "rank_after": rank, "epoch": 0.0, "collapsed": 0.0})
    training = _Training(generator, products, judged, recipe=recipe, random=random, loss=loss)
    return training.run(seed, progress)


def initial_generator(rows: Sequence[torch.Tensor], channels: Sequence[int], recipe: Recipe) -> Generator:
    """Return a generator of statistics alone: centres, lengths, and the leading principal directions."""
    generator = Generator(channels, recipe.width)
    count = sum(len(part) for part in rows)
    mean = torch.stack([part.double().sum(0) for part in rows]).sum(0) / count
    with torch.no_grad():
        generator.centre.copy_(mean.float())
        for index, part in enumerate(zip(*(p.split(list(channels), 1) for p in rows), strict=True)):
            centre = generator.centre.split(list(channels))[index]
            length = sum(float((level - centre).norm(dim=1).sum()) for level in part) / count
            generator.floors[index] = max(_FLOOR * length, 1e-6)
        mean, matrix = _principal((joined(generator, part) for part in rows), recipe.width)
        generator.project.weight.copy_(matrix.T[:, :, None, None])
        generator.project.bias.copy_(-(mean @ matrix))
    return generator.eval().requires_grad_(requires_grad=False)


def joined(generator: Generator, raw: torch.Tensor) -> torch.Tensor:
    """Return raw patches float32 [n, C0] at unit length, level by level, as :meth:`Generator.joined` does."""
    levels = []
    parts = zip(raw.split(list(generator.channels), 1), generator.centre.split(list(generator.channels)), strict=True)
    for index, (patches, centre) in enumerate(parts):
        away = patches - centre
        length = (away.square().sum(1, keepdim=True) + generator.floors[index].square()).sqrt()
        levels.append(away / length)
    return torch.cat(levels, 1)


def project(generator: Generator, flat: torch.Tensor) -> torch.Tensor:
    """Return rows float32 [n, D] of joined patches float32 [n, C0]."""
    rows: torch.Tensor = flat @ generator.project.weight[:, :, 0, 0].T + generator.project.bias
    return rows


def _principal(batches: Iterable[torch.Tensor], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean [C0] and the leading principal directions [C0, width], largest variance first."""
    mean, covariance = moments(batches)
    vectors = torch.linalg.eigh(covariance)[1].flip(1)[:, :width]
    return mean.float(), oriented(vectors).float()


def _sample(parts: Sequence[torch.Tensor], random: torch.Generator) -> torch.Tensor:
    probe = torch.cat(list(parts))
    return probe[torch.randperm(len(probe), generator=random)[:_RANK_ROWS]]


@torch.no_grad()
def _rank(generator: Generator, probe: torch.Tensor) -> float:
    rows = project(generator, probe)
    return effective_rank(rows) if torch.isfinite(rows).all() else float("nan")


@dataclass
class _Bank:
    """A product's anchors and queries, joined but not projected: they move with the generator."""

    anchors: torch.Tensor
    queries: torch.Tensor


class _Training:
    def __init__(
        self,
        generator: Generator,
        products: Sequence[Patches],
        judged: Sequence[Judged],
        *,
        recipe: Recipe,
        random: torch.Generator,
        loss: Callable[..., torch.Tensor],
    ) -> None:
        self.generator, self.recipe, self.random, self.loss = generator, recipe, random, loss
        self.banks = [_Bank(self._anchors(p.remembered), joined(generator, p.seen)) for p in products]
        self.judged = [(self._anchors(one.remembered), joined(generator, one.images), one) for one in judged]
        self.probe = _sample([bank.queries for bank in self.banks], random)

    def _anchors(self, raw: torch.Tensor) -> torch.Tensor:
        """Return joined anchors [R, C0] as weighted averages of their cells in the space at the beginning."""
        flat = joined(self.generator, raw)
        pool = flat[torch.randperm(len(flat), generator=self.random)[:_POOL]]
        return weighted_average_reduce([pool], pool[greedy_coreset(pool, _ANCHORS, self.random)])[0]

    def run(self, seed: int, progress: Callable[[str, int, int], None]) -> Trained:
        layer = self.generator.project
        before, score = _rank(self.generator, self.probe), self._score()
        kept = {name: value.clone() for name, value in layer.state_dict().items()}
        figures = {"rank_before": before, "rank_after": before, "score_before": score, "score_after": score}
        figures |= {"epoch": 0.0, "collapsed": 0.0}
        epochs = -(-self.recipe.steps // _STEPS_PER_EPOCH)
        layer.requires_grad_(requires_grad=True)
        radius = torch.nn.Parameter(torch.tensor(1e-5))
        optimiser = torch.optim.AdamW(
            [*layer.parameters(), radius], lr=self.recipe.rate, weight_decay=5e-4, amsgrad=True
        )
        order = np.random.default_rng(seed)
        for epoch in range(epochs):
            steps = min(_STEPS_PER_EPOCH, self.recipe.steps - epoch * _STEPS_PER_EPOCH)
            self._epoch(optimiser, radius, order, steps)
            rank = _rank(self.generator, self.probe)
            if not rank >= LEAST_RANK * before:  # NaN too
                figures["collapsed"] = 1.0
                break
            score = self._score()
            if score > figures["score_after"] or not self.judged:
                kept = {name: value.clone() for name, value in layer.state_dict().items()}
                figures |= {"rank_after": rank, "score_after": score, "epoch": epoch + 1.0}
            progress("generator", epoch + 1, epochs)
        layer.requires_grad_(requires_grad=False)
        layer.load_state_dict(kept)
        return Trained(self.generator, figures)

    def _epoch(
        self, optimiser: torch.optim.Optimizer, radius: torch.nn.Parameter, order: np.random.Generator, steps: int
    ) -> None:
        with torch.no_grad():
            banks = [project(self.generator, bank.anchors) for bank in self.banks]
            memory = self._memory(torch.cat(banks)) if self.recipe.pull else None
        for _ in range(steps):
            index = int(order.integers(len(banks)))
            queries = self.banks[index].queries
            drawn = queries[torch.randperm(len(queries), generator=self.random)[:_QUERIES]]
            optimiser.zero_grad()
            rows = project(self.generator, drawn)
            self.loss(rows, banks[index], radius, pull=self.recipe.pull, memory=memory).backward()
            optimiser.step()

    def _memory(self, rows: torch.Tensor) -> torch.Tensor:
        anchors = rows[greedy_coreset(rows, _MEMORY, self.random)]
        return weighted_average_reduce([rows], anchors)[0]

    @torch.no_grad()
    def _score(self) -> float:
        """Return the mean over products of the means of image AUROC (highest patch) and patch AUROC."""
        found = []
        for anchors, flat, one in self.judged:
            distance = nearest(project(self.generator, flat), project(self.generator, anchors))[0].sqrt().numpy()
            images = distance.reshape(len(one.labels), -1).max(1)
            pairs = ((one.labels, images), (one.inside, distance))
            found += [image_auroc(truth, scores) for truth, scores in pairs]
        known = [value for value in found if value is not None]
        return float(np.mean(known)) if known else 0.5
