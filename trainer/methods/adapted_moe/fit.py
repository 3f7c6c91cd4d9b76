"""Fitting Adapted-MoE: learn the router, measure each sub-class's moments, make an expert of its adapted rows.

Sub-classes come with the training images; nothing is chosen on defects, synthetic or real.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

import cv2
import numpy as np
import torch
from pydantic import Field

from deploy.progress import no_progress
from edge.errors import DataError, UsageError
from trainer.methods.adapted_moe.adapt import TRIM, squared_shift, unit
from trainer.methods.adapted_moe.experts import DiscriminatorSchedule, bank_expert, discriminator_expert, level_rows
from trainer.methods.adapted_moe.model import (
    BANK,
    DISCRIMINATOR,
    TAP_NAMES,
    AdaptedMoEHead,
    Router,
    closeness,
    patches,
)
from trainer.methods.adapted_moe.routing import RouterSpace, Schedule, floors, learn
from trainer.methods.base import Features, FitContext, Method, MethodConfig
from trainer.methods.memory.fit import MemoryConfig
from trainer.methods.memory.model import LEVELS, level_patches
from trainer.methods.memory.reduce import whitening

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

_BATCH = 16
_LEAST_IMAGES = 2
_WINDOWS = 4  # per tile; the router sees parts of images, so that few images do not look alike
_EXTRACTED = 32
_ROUTER_WHITENING = 1.0  # of the mean eigenvalue: few images measure few directions
_LEAST_BLUR = 0.05  # pixels; less changes no grey level


class ExpertKind(str, Enum):
    """What an expert is.

    ``bank``: a memory of its sub-class. ``discriminator``: a small network that tells its rows from noisy ones.
    """

    BANK = "bank"
    DISCRIMINATOR = "discriminator"


class Adaptation(str, Enum):
    """What a fitted head adapts to; a box may give other moments later.

    ``image``: mean and deviation of each image. ``mean``: its mean alone, but both where the general expert judges.
    ``none``: nothing.
    """

    IMAGE = "image"
    MEAN = "mean"
    NONE = "none"


_MODES = {Adaptation.IMAGE: (1.0, 1.0), Adaptation.MEAN: (1.0, 0.0), Adaptation.NONE: (0.0, 0.0)}


class AdaptedMoEConfig(MethodConfig):
    """Settings of Adapted-MoE; the README says what each was measured to do."""

    experts: ExpertKind = Field(ExpertKind.BANK, description="What an expert is.")
    adaptation: Adaptation = Field(Adaptation.MEAN, description="What the head adapts to until a box says otherwise.")
    trim: float = Field(TRIM, ge=0, le=0.5, description="Share of an image's sites that its moments leave out.")
    usual: float = Field(
        1.0, ge=0, description="Shift, in units of what training images show, up to which an image's moments are noise."
    )
    rows: int = Field(500, ge=2, le=2000, description="Rows of each bank of an expert; its finest level has half.")
    candidates: int = Field(20_000, ge=2, description="Patches of each sub-class, drawn at random, to learn from.")
    whitening: float = Field(0.3, gt=0, description="Added to every eigenvalue, as a share of their mean.")
    background: float = Field(0.5, ge=0, le=1, description="Share of its own mean that is taken off a bank's map.")
    site_weight: float = Field(1.0, ge=0, description="Weight of the distance to each site's own mean; 0 is none.")
    site_components: int = Field(96, ge=1, description="Principal directions that the sites are compared in.")
    hidden: int = Field(128, ge=1, le=1024, description="Hidden units of a discriminator.")
    expert_steps: int = Field(300, ge=1, description="Optimiser steps of each discriminator.")
    expert_rate: float = Field(2e-3, gt=0, description="Learning rate of discriminators (Adam).")
    expert_rows: int = Field(1024, ge=1, description="Patches of a step.")
    noise: float = Field(0.5, gt=0, description="Length of a bad row's noise, in units of the row's length.")
    margin: float = Field(0.5, gt=0, description="Where the hinges of a discriminator's losses are.")
    steps: int = Field(200, ge=0, description="Optimiser steps of the router; 0 keeps the closed form.")
    router_rate: float = Field(1e-3, gt=0, description="Learning rate of the router (Adam).")
    batch: int = Field(64, ge=1, description="Images of a step.")
    micro_batch: int = Field(64, ge=1, description="Of these at once; changes memory, not the gradient.")
    centre_weight: float = Field(0.1, ge=0, description="Weight of the centre loss.")
    jitter: float = Field(0.3, ge=0, lt=1, description="How far another light may lie from that of training.")
    jittered: int = Field(200, ge=0, description="Training images that the router sees in another light too, at most.")
    refusal: float = Field(0.02, gt=0, lt=0.5, description="Share of known images that may count as unknown.")


class AdaptedMoEMethod(Method):
    """One expert per sub-class, a router, and adaptation of features to the expert's moments."""

    name: ClassVar[str] = "adapted_moe"
    tap_names: ClassVar[tuple[str, ...]] = TAP_NAMES
    uses_subclasses: ClassVar[bool] = True

    @classmethod
    def config(cls, preset: str) -> AdaptedMoEConfig:
        """Return the preset.

        Raises:
            UsageError: unknown preset.
        """
        if preset == "quick":
            return AdaptedMoEConfig()
        if preset == "full":
            return AdaptedMoEConfig(rows=1000, candidates=60_000, steps=600, expert_steps=1000, jittered=1000)
        raise UsageError(f"--preset {preset}: unknown; choose quick or full")

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> AdaptedMoEHead:
        """Learn router, moments and experts.

        Raises:
            DataError: a sub-class of one image, features that are not finite, or labels that do not fit the images.
            UsageError: training diverged.
        """
        return _Fit(context, _own(config)).head()

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> AdaptedMoEHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not an Adapted-MoE head's.
        """
        own = _own(config)
        try:
            names = tuple(bytes(tensors["names"].tolist()).decode().split("\n"))
            channels = tuple(int(tensors[f"project.{tap}.weight"].shape[1]) for tap in TAP_NAMES)
            wanted = BANK if own.experts is ExpertKind.BANK else DISCRIMINATOR
            shapes = {
                name: tuple(tensors[name].shape[1:])
                for name in wanted
                if own.site_weight or not name.startswith("site_")
            }
            head = _empty(channels, names, own, shapes)
            head.load_state_dict(tensors)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"these tensors are no Adapted-MoE head ({error}); train again") from error
        return head.eval().requires_grad_(requires_grad=False)


def _own(config: MethodConfig) -> AdaptedMoEConfig:
    if not isinstance(config, AdaptedMoEConfig):
        raise UsageError(f"adapted_moe cannot use a {type(config).__name__}; take AdaptedMoEMethod.config(preset)")
    return config


def _empty(
    channels: tuple[int, ...], names: tuple[str, ...], config: AdaptedMoEConfig, shapes: dict[str, tuple[int, ...]]
) -> AdaptedMoEHead:
    return AdaptedMoEHead(
        channels=channels,
        experts=shapes,
        subclasses=names,
        trim=config.trim,
        background=config.background,
        site_weight=config.site_weight,
    )


def _shapes(taps: dict[str, torch.Tensor], config: AdaptedMoEConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of an expert's tensors, by name."""
    channels = [int(taps[name].shape[1]) for name in LEVELS]
    if config.experts is ExpertKind.DISCRIMINATOR:
        sizes = ((sum(channels), config.hidden), (config.hidden,), (config.hidden,))
        return dict(zip(DISCRIMINATOR, sizes, strict=True))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, width, rows in zip(LEVELS, channels, level_rows(config.rows), strict=True):
        shapes |= {f"whiten_{name}": (width, width), f"offset_{name}": (width,), f"bank_{name}": (rows, width)}
    kept, (fine, grid) = min(config.site_components, sum(channels)), (taps[name].shape[2:] for name in LEVELS[:2])
    return {
        **shapes,
        "level_scale": (len(LEVELS),),
        "site_project": (kept, sum(channels)),
        "site_offset": (kept,),
        "site_mean": (kept, *grid),
        "site_scale": (fine[0], fine[1]),
    }


def subclass_labels(context: FitContext) -> tuple[tuple[str, ...], torch.Tensor]:
    """Return the names of the sub-classes, sorted, and the index of each training image's, int64 [n images].

    Raises:
        DataError: there are not as many labels as images, or a sub-class has a single image or a line break.
    """
    features = context.features
    images = len(features) // features.tiles_per_image
    given = np.full(images, "") if context.subclasses is None else context.subclasses
    if len(given) != images:
        raise DataError(f"{len(given)} sub-class labels for {images} training images; give one for each")
    names, labels, counts = np.unique(given, return_inverse=True, return_counts=True)
    for name, count in zip(names, counts, strict=True):
        if count < _LEAST_IMAGES:
            raise DataError(
                f"sub-class {str(name)!r} has {count} training image; an expert needs at least {_LEAST_IMAGES}: add "
                "good parts of it, or give its images the condition of another in meta.csv"
            )
        if "\n" in name:
            raise DataError(f"sub-class {str(name)!r}: its name has a line break; rename it in meta.csv")
    return tuple(str(name) for name in names), torch.from_numpy(labels.astype(np.int64))


def in_another_light(image: npt.NDArray[np.uint8], jitter: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return an image uint8 [H, W, 3], mirrored or not, as another lamp, lens or camera setting might show it.

    Args:
        image: uint8 [H, W, 3].
        jitter: the gain lies within 1 +- jitter, the offset within +- jitter / 2 of full scale, the logarithm of gamma
            within +- jitter, and the blur's deviation below 3 jitter pixels.
        rng: draws them.
    """
    level = (image[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))] / np.float32(255)) ** np.float32(
        np.exp(rng.uniform(-jitter, jitter))
    )
    level = level * rng.uniform(1 - jitter, 1 + jitter) + rng.uniform(-jitter, jitter) / 2
    blurred = cv2.GaussianBlur(level, (0, 0), max(_LEAST_BLUR, 3 * jitter * rng.random()))
    return np.asarray(np.clip(np.rint(255 * blurred), 0, 255), np.uint8)


class _Fit:
    def __init__(self, context: FitContext, config: AdaptedMoEConfig) -> None:
        self.context, self.config = context, config
        self.features, self.device = context.features, context.device
        self.generator = context.generator()
        if len(self.features) == 0:
            raise DataError("adapted_moe got no training features; add good parts to train/good")
        self.names, labels = subclass_labels(context)
        self.labels = labels.repeat_interleave(self.features.tiles_per_image)
        channels = tuple(int(self.features.taps[name].shape[1]) for name in TAP_NAMES)
        self.built = _empty(channels, self.names, config, _shapes(self.features.taps, config)).to(self.device)

    def head(self) -> AdaptedMoEHead:
        head = self.built
        for name in LEVELS:
            head.project.set(name, *self._whitening(name))
        self._route()
        for index in range(head.experts):
            found = self._expert(index)
            self.context.progress("experts", index + 1, head.experts)
            with torch.no_grad():
                for name in head.expert_state:
                    head.get_buffer(name)[index] = found[name].to(self.device)
        return head.to("cpu").eval().requires_grad_(requires_grad=False)

    def _batches(self, of: Features, tiles: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
        return of.batches(TAP_NAMES, _BATCH, device=self.device, order=tiles)

    def _whitening(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean of the sub-classes' means of a level, and what whitens patches within them."""
        means = []

        def level(index: int) -> Iterator[torch.Tensor]:
            tiles = (self.labels == index).nonzero()[:, 0]
            for (tap,) in self.features.batches((name,), _BATCH, device=self.device, order=tiles):
                yield level_patches(name, tap).permute(0, 2, 3, 1).flatten(0, 2)

        for index in range(len(self.names)):
            sums = [(rows.sum(0), len(rows)) for rows in level(index)]
            means.append(torch.stack([total for total, _ in sums]).sum(0) / sum(count for _, count in sums))
        middle = torch.stack(means).mean(0)
        _, matrix = whitening(
            (rows - mean for index, mean in enumerate(means) for rows in level(index)), self.config.whitening
        )
        if not (torch.isfinite(matrix).all() and torch.isfinite(middle).all()):
            raise DataError(f"features of tap {name} are not finite; check the training images")
        return middle, matrix.to(self.device)

    def _route(self) -> None:
        """Learn the router and set its layer, centres and floors."""
        config, count = self.config, len(self.names)
        whole = self._pooled(self.features)
        jittered, drawn = self._jittered()
        # Every second one is kept for the floors: what was learnt from would call any other light unknown.
        points = torch.cat([whole, self._windows(), jittered[::2]])
        labels = torch.cat([self.labels, self.labels.repeat_interleave(_WINDOWS), self.labels[drawn[::2]]])
        space = RouterSpace.closed_form(points, labels, count, _ROUTER_WHITENING)
        schedule = Schedule(
            steps=config.steps if count > 1 else 0,
            rate=config.router_rate,
            batch=config.batch,
            micro_batch=config.micro_batch,
            centre_weight=config.centre_weight,
        )
        learn(
            space,
            points,
            labels,
            schedule=schedule,
            generator=self.generator,
            report=lambda done: self.context.progress("router", done, schedule.steps),
        )
        with torch.no_grad():
            close = [
                closeness(space.embed(part), space.centres)
                for part in (whole, jittered[1::2], self._pooled(self.context.validation.good))
            ]
            self.built.router.embed.load_state_dict(space.embed.state_dict())
            self.built.route_centre.copy_(space.centres)
            self.built.route_floor.copy_(floors(close[0], self.labels, close[1:], refusal=config.refusal))

    def _pooled(self, of: Features) -> torch.Tensor:
        """Return the mean patch feature of every tile, float32 [n, D], on the CPU."""
        found = [Router.pooled(*taps[1:]).cpu() for taps in self._batches(of)]
        return torch.cat(found) if found else torch.zeros(0, self.built.route_centre.shape[1])

    def _windows(self) -> torch.Tensor:
        """Return the mean patch feature of windows of half the height and width, float32 [n * windows, D]."""
        found = []
        for taps in self._batches(self.features):
            grid = patches(*taps[1:])
            height, width = (max(1, side // 2) for side in grid.shape[2:])
            for one in grid:
                for _ in range(_WINDOWS):
                    top = int(torch.randint(one.shape[1] - height + 1, (1,), generator=self.generator))
                    left = int(torch.randint(one.shape[2] - width + 1, (1,), generator=self.generator))
                    found.append(one[:, top : top + height, left : left + width].mean((1, 2)).cpu())
        return torch.stack(found)

    def _jittered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean patch features of some images in another light, float32 [m, D], and their rows int64 [m]."""
        images = self.context.images
        count = min(self.config.jittered, len(images)) if self.config.jitter else 0
        drawn = torch.randperm(len(images), generator=self.generator)[:count].sort().values
        rng = np.random.default_rng(self.context.seed)
        found = []
        for part in drawn.split(_EXTRACTED):
            turned = [in_another_light(one, self.config.jitter, rng) for one in images[part.numpy()]]
            found.append(self._pooled(self.context.extract(np.ascontiguousarray(turned))))
            self.context.progress("light", int(sum(map(len, found))), count)
        return torch.cat(found) if found else torch.zeros(0, self.built.route_centre.shape[1]), drawn

    def _expert(self, index: int) -> dict[str, torch.Tensor]:
        """Set the moments of one expert, and return its other tensors."""
        config = self.config
        of = self._shown(index, self._subset(index))
        if config.experts is ExpertKind.BANK:
            memory = MemoryConfig(
                rows=config.rows,
                candidates=config.candidates,
                whitening=config.whitening,
                site_weight=config.site_weight,
                site_components=config.site_components,
            )
            return bank_expert(replace(self.context, features=of, progress=no_progress), memory)
        schedule = DiscriminatorSchedule(
            hidden=config.hidden,
            steps=config.expert_steps,
            rate=config.expert_rate,
            batch=config.expert_rows,
            noise=config.noise,
            margin=config.margin,
        )
        return discriminator_expert(self._rows(of), schedule=schedule, generator=self.generator)

    def _subset(self, index: int) -> Features:
        """Return the features of one sub-class, or all of them for the general expert."""
        if index == len(self.names):
            return self.features
        tiles = (self.labels == index).nonzero()[:, 0]
        images = tiles[:: self.features.tiles_per_image] // self.features.tiles_per_image
        return Features(
            {name: self.features.taps[name][tiles] for name in TAP_NAMES},
            self.features.tiles_per_image,
            self.features.groups[images.numpy()],
        )

    @torch.no_grad()
    def _shown(self, index: int, of: Features) -> Features:
        """Measure the moments of an expert's images, set them, and return the images' taps as it learns from them.

        Images of training lie within what is usual, so an expert of a sub-class learns from them as they are; the
        general one sees every image adapted.
        """
        head, general = self.built, index == len(self.names)
        own, scale = _MODES[self.config.adaptation]
        moments = [head.measured(taps) for taps in self._batches(of)]
        mean, std = (torch.cat(part) for part in zip(*moments, strict=True))
        # An image's own deviation, not that of all sites: between images the mean wanders, and adaptation takes that
        # away.
        head.expert_mean[index] = head.tta_mean[index] = mean.mean(0)
        head.expert_std[index] = head.tta_std[index] = std.square().mean(0).sqrt()
        # What the general expert judges is of no known light and make: there is no usual shift, nor a deviation.
        head.tta_mode[index] = torch.tensor([own, own if general else scale])
        if not general:
            shift = squared_shift(mean, head.expert_mean[index], head.expert_std[index]).mean().sqrt()
            # The mean has seen each of these images: without it, it lies n / (n - 1) times as far from it.
            head.tta_usual[index] = self.config.usual * shift * len(of) / (len(of) - 1)
            return of
        found: dict[str, torch.Tensor] = {
            name: torch.empty(len(of), *of.taps[name].shape[1:], dtype=torch.float16) for name in TAP_NAMES
        }
        for start, taps in zip(range(0, len(of), _BATCH), self._batches(of), strict=True):
            chosen = torch.full((len(taps[0]),), index, device=self.device)
            for name, tap in zip(TAP_NAMES, head.shown(taps, chosen, head.present(taps, chosen)), strict=True):
                found[name][start : start + len(tap)] = tap.cpu()
        return Features(found, of.tiles_per_image, of.groups)

    @torch.no_grad()
    def _rows(self, of: Features) -> torch.Tensor:
        """Return rows of unit length drawn from adapted taps, float32 [n, D]."""
        drawn, share = [], self.config.candidates / len(of)
        for taps in self._batches(of):
            for rows in unit(self.built.project(*taps)):
                kept = torch.randperm(len(rows), generator=self.generator)[: max(1, round(share))]
                drawn.append(rows[kept.to(rows.device)])
        return torch.cat(drawn)
