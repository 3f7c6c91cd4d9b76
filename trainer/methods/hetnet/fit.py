"""Fitting the HetNet-style method: teachers frozen, students trained, residuals measured on good images held back.

Knows features; images only to vary light and pose in them, and to ask a vision transformer about them.
"""

from __future__ import annotations

from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, PositiveFloat
from torch import nn

from deploy.metrics import image_auroc
from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Method, MethodConfig
from trainer.methods.deviation import Deviation, feature_rows, mean_of_places, smooth_places
from trainer.methods.hetnet.context import Adapter, GlobalContext
from trainer.methods.hetnet.model import LEVELS, LOCAL_MEANS, HetNetHead, HetNetwork, Shape
from trainer.methods.hetnet.training import Loss, Teachers, Training, train
from trainer.methods.hetnet.transformer import Transformer, distil
from trainer.methods.memory.reduce import whitening

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trainer.methods.base import Features

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BATCH = 16
_LEAST_IMAGES = 2
_VALIDATION_SHARE = 0.005  # of the map's cells, whose mean ranks images when the student is chosen


class GlobalTeacher(str, Enum):
    """What tells of the whole image."""

    SELF = "self"
    """Attention of the deepest tap on itself, without weights: a substitute for a transformer."""
    TRANSFORMER = "transformer"
    """A vision transformer from a file, distilled into an adapter on the deepest tap; its tokens attend."""
    NONE = "none"
    """No global teacher: the CNN-only student that others are compared with."""


class ShippedStudent(str, Enum):
    """Which student a box runs."""

    RECONSTRUCTION = "sr"
    DENOISING = "sd"
    AUTO = "auto"
    """The one with the better image AUROC on synthetic validation."""


class Residual(str, Enum):
    """How far a place is from what the student recalls."""

    WHITENED = "whitened"
    """Length of the residual, whitened by the residuals of good images that training did not see."""
    COSINE = "cosine"
    """One minus the cosine: the paper's."""
    AUTO = "auto"
    """The one with the better image AUROC on synthetic validation."""


class HetNetConfig(MethodConfig):
    """Settings of the HetNet-style method; the README says where each value is from."""

    teacher: GlobalTeacher = Field(GlobalTeacher.SELF, description="Global teacher.")
    transformer: str = Field(
        "", description="Path of a vision transformer, .onnx or TorchScript; read at training only."
    )
    transformer_side: int = Field(224, ge=16, le=1024, description="Side in pixels of the transformer's input.")
    transformer_mean: tuple[float, float, float] = Field(IMAGENET_MEAN, description="Its normalisation, pixels 0..1.")
    transformer_deviation: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(IMAGENET_DEVIATION)
    adapter_steps: int = Field(200, ge=1, description="Optimiser steps of the transformer's distillation.")
    student: ShippedStudent = Field(ShippedStudent.AUTO, description="Which student a box runs.")
    residual: Residual = Field(Residual.WHITENED, description="Distance between teacher and student.")
    loss: Loss = Field(Loss.SQUARED, description="What training makes small.")
    width: int = Field(48, ge=8, le=256, description="Channels of the fused maps.")
    code: int = Field(32, ge=1, le=512, description="Channels of the one-class bottleneck.")
    reach: int = Field(1, ge=0, le=8, description="Cells of the deepest tap around a site that foretell nothing of it.")
    temperature: float = Field(0.1, gt=0, le=10, description="Of the self-similarity's softmax over cosines.")
    steps: int = Field(150, ge=1, description="Optimiser steps of fusion and reconstruction student.")
    batch_tiles: int = Field(8, ge=2, description="Tiles in a step.")
    rate: float = Field(3e-3, gt=0, description="Learning rate (AdamW, half a cosine down to zero).")
    denoising_steps: int = Field(60, ge=1, description="Optimiser steps of the denoising student, where it may ship.")
    denoising_rate: float = Field(1e-3, gt=0, description="Learning rate of the denoising student.")
    noise_share: float = Field(0.1, gt=0, le=1, description="Share of cells inside noise boxes.")
    noise_rank: int = Field(16, ge=1, description="Rank of the noise's covariance; a diagonal comes on top.")
    whitening: float = Field(0.3, gt=0, description="Added to every eigenvalue, as a share of their mean.")
    position_share: float = Field(0.5, ge=0, le=1, description="Share of a place's own mean in the normal mean.")
    place_prior: float = Field(
        10.0, ge=0, description="Images that the mean over places counts as, in a place's scale."
    )
    held_back: float = Field(0.2, gt=0, lt=1, description="Share of images that residuals are measured on.")
    fine_weight: float = Field(1.0, gt=0, description="Weight of the finest level in the map; the others have 1.")
    foretold_weight: float = Field(0.5, ge=0, le=1, description="Weight of residuals from what is foretold.")
    background: float = Field(0.3, ge=0, le=1, description="Share of its own mean that is taken off a map.")


class HetNetMethod(Method):
    """Two teachers, their fusion and a light student (after HetNet)."""

    name: ClassVar[str] = "hetnet"
    tap_names: ClassVar[tuple[str, ...]] = LEVELS

    @classmethod
    def config(cls, preset: str) -> HetNetConfig:
        """Return the preset.

        Raises:
            UsageError: unknown preset.
        """
        presets = {"quick": HetNetConfig(), "full": HetNetConfig(steps=400, denoising_steps=150)}
        if preset not in presets:
            raise UsageError(f"--preset {preset}: unknown; choose {' or '.join(presets)}")
        return presets[preset]

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> HetNetHead:
        """Learn a head.

        Raises:
            DataError: fewer than two training images, or features that are not finite.
            UsageError: training diverged.
        """
        return _Fit(context, _own(config)).head()

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> HetNetHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not those of a head of this config.
        """
        settings = _own(config)
        try:
            channels = tuple(int(tensors[f"whiten.{index}.centre"].shape[0]) for index in range(len(LEVELS)))
            height, width = (int(side) for side in tensors["grid"])
            adapter = None
            if settings.teacher is GlobalTeacher.TRANSFORMER:
                tokens, twice = tensors["context.adapter.outer.weight"].shape[:2]
                adapter = Adapter(channels[-1], twice // 2, tokens)
            cosine = settings.residual is Residual.COSINE
            if settings.residual is Residual.AUTO:
                cosine = "residual.0.weight" not in tensors
            head = _empty(settings, channels, (height, width), adapter, cosine=cosine)
            head.load_state_dict(tensors)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"these tensors are no HetNet head of this config ({error}); train again") from error
        return head.eval().requires_grad_(False)


def _own(config: MethodConfig) -> HetNetConfig:
    if not isinstance(config, HetNetConfig):
        raise UsageError(f"HetNet cannot use a {type(config).__name__}; take HetNetMethod.config(preset)")
    return config


def _empty(
    config: HetNetConfig,
    channels: tuple[int, ...],
    grid: tuple[int, int],
    adapter: Adapter | None,
    *,
    cosine: bool,
) -> HetNetHead:
    context, told = None, 0
    if config.teacher is not GlobalTeacher.NONE:
        context = GlobalContext(grid, reach=config.reach, temperature=config.temperature, adapter=adapter)
        told = channels[-1] if adapter is None else adapter.outer.out_channels
    shape = Shape(channels, grid, config.width, config.code, told)
    return HetNetHead(shape, context, cosine=cosine, background=config.background)


class _Fit:
    def __init__(self, context: FitContext, config: HetNetConfig) -> None:
        self.context, self.config, self.features = context, config, context.features
        self.generator = context.generator()
        images = len(self.features) // self.features.tiles_per_image
        if images < _LEAST_IMAGES:
            raise DataError(f"HetNet needs at least {_LEAST_IMAGES} training images; add good parts to train/good")
        taps = [self.features.taps[name] for name in LEVELS]
        self.channels = tuple(int(tap.shape[1]) for tap in taps)
        self.grid = (int(taps[-1].shape[2]), int(taps[-1].shape[3]))
        order = torch.randperm(images, generator=self.generator)
        kept = max(1, min(images - 1, round(config.held_back * images)))
        self.held, self.seen = self._tiles(order[:kept]), self._tiles(order[kept:])

    def _tiles(self, images: torch.Tensor) -> torch.Tensor:
        tiles = self.features.tiles_per_image
        return (images[:, None] * tiles + torch.arange(tiles)).flatten()

    def head(self) -> HetNetHead:
        config, device = self.config, self.context.device
        whiten = self._whiten()
        head = _empty(config, self.channels, self.grid, self._adapter(whiten[-1]), cosine=False)
        head.whiten = whiten
        head.to(device)
        network = HetNetwork(head.shape)
        settings = Training(
            loss=config.loss,
            steps=config.steps,
            batch_tiles=config.batch_tiles,
            rate=config.rate,
            denoising_steps=0 if config.student is ShippedStudent.RECONSTRUCTION else config.denoising_steps,
            denoising_rate=config.denoising_rate,
            noise_share=config.noise_share,
            noise_rank=config.noise_rank,
        )
        teachers = Teachers(head.whitened, head.context)
        train(network, teachers, self.context, self.seen, settings, generator=self.generator)
        network.to(device).eval()
        head.encoder.load_state_dict(network.encoder.state_dict())
        head.eval().requires_grad_(False)
        return self._choose(head, network).to("cpu")

    def _whiten(self) -> nn.ModuleList:
        """Measure what the local teacher's maps are deviations from, and their whitening."""
        layers, device = nn.ModuleList(), self.context.device
        for name, local_mean in zip(LEVELS, LOCAL_MEANS, strict=True):
            layer = Deviation(self.features.taps[name].shape[1:], local_mean=local_mean).to(device)
            total = sum(layer.local(tap).double().sum(0) for (tap,) in self._seen(name))
            assert isinstance(total, torch.Tensor)
            place = (total / len(self.seen)).float()
            everywhere = place.mean((1, 2), keepdim=True)
            mean = everywhere + self.config.position_share * (smooth_places(place) - everywhere)
            rows = (feature_rows(layer.local(tap) - mean) for (tap,) in self._seen(name))
            _, matrix = whitening(rows, self.config.whitening)
            if not (torch.isfinite(mean).all() and torch.isfinite(matrix).all()):
                raise DataError(f"features of tap {name} are not finite; check the training images")
            layer.set(mean, matrix.to(device))
            layers.append(layer)
        return layers.requires_grad_(False)

    def _seen(self, name: str) -> Iterator[tuple[torch.Tensor, ...]]:
        return self.features.batches((name,), _BATCH, device=self.context.device, order=self.seen)

    def _adapter(self, whiten: nn.Module) -> Adapter | None:
        config, context = self.config, self.context
        if config.teacher is not GlobalTeacher.TRANSFORMER:
            return None
        if not config.transformer:
            raise UsageError("teacher transformer: no path given; set transformer to an .onnx or TorchScript file")
        transformer = Transformer(
            Path(config.transformer),
            side=config.transformer_side,
            mean=config.transformer_mean,
            deviation=config.transformer_deviation,
            device=context.device,
        )
        whiten.to(context.device)

        def deepest(rows: torch.Tensor) -> torch.Tensor:
            ((tap,),) = self.features.batches(LEVELS[-1:], len(rows), device=context.device, order=self.seen[rows])
            maps: torch.Tensor = whiten(tap)
            return maps

        return distil(
            transformer,
            context.images[self.seen.numpy()],
            deepest,
            self.grid,
            steps=config.adapter_steps,
            batch_tiles=config.batch_tiles,
            generator=self.generator,
            device=context.device,
            progress=context.progress,
        )

    def _choose(self, head: HetNetHead, network: HetNetwork) -> HetNetHead:
        """Ship the student and the residual that were asked for, or those that rank synthetic defects best."""
        students, residuals = [self.config.student.value], [self.config.residual]
        if self.config.student is ShippedStudent.AUTO:
            students = [ShippedStudent.RECONSTRUCTION.value, ShippedStudent.DENOISING.value]
        if self.config.residual is Residual.AUTO:
            residuals = [Residual.WHITENED, Residual.COSINE]
        candidates = [(student, residual) for student in students for residual in residuals]
        best, chosen = -1.0, head
        for student, residual in candidates:
            candidate = deepcopy(head)
            candidate.student.load_state_dict(network.get_submodule(student).state_dict())
            if residual is Residual.COSINE:
                candidate.use_cosine()
            self._measure(candidate)
            found = self._validate(candidate) if len(candidates) > 1 else 0.0
            if found > best:
                best, chosen = found, candidate
        return chosen

    def _measure(self, head: HetNetHead) -> None:
        """Whiten the residuals, and scale every place of every answer, on the images held back."""
        scales = head.scales()
        with torch.no_grad():
            for scale in scales:
                scale.fill_(1.0)
            for index, layer in enumerate(head.residual):
                rows = (feature_rows(found[index]) for found in self._residuals(head))
                _as_convolution(layer, *whitening(rows, self.config.whitening))
            totals = [torch.zeros_like(scale, dtype=torch.float64) for scale in scales]
            for taps in self._batches(self.held):
                for total, level in zip(totals, head.levels(taps), strict=True):
                    total.add_(level.double().sum(0))
            for scale, total, weight in zip(scales, totals, self._weights(len(scales)), strict=True):
                scale.copy_(weight / mean_of_places(total, len(self.held), self.config.place_prior).clamp_min(1e-9))

    def _weights(self, answers: int) -> list[float]:
        levels = [self.config.fine_weight, *[1.0] * (len(LEVELS) - 1)]
        if answers == len(LEVELS):
            return levels
        told = self.config.foretold_weight
        return [(1 - told) * weight for weight in levels] + [told * weight for weight in levels]

    def _batches(self, order: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        return self.features.batches(LEVELS, _BATCH, device=self.context.device, order=order)

    def _residuals(self, head: HetNetHead) -> Iterator[list[torch.Tensor]]:
        for taps in self._batches(self.held):
            local, recalled = head.recall(taps)
            yield [x - s for x, s in zip(local, recalled, strict=True)]

    def _validate(self, head: HetNetHead) -> float:
        parts = (self.context.validation.good, self.context.validation.defective)
        if not all(len(part) for part in parts):
            return 0.0
        scores = [self._scores(head, part) for part in parts]
        labels = torch.cat([torch.full_like(part, index) for index, part in enumerate(scores)]).bool()
        return float(image_auroc(labels.numpy(), torch.cat(scores).numpy()) or 0.0)

    def _scores(self, head: HetNetHead, features: Features) -> torch.Tensor:
        found = []
        with torch.inference_mode():
            for taps in features.batches(LEVELS, _BATCH, device=self.context.device):
                cells = head(*taps)[0].flatten(1)
                found.append(cells.topk(max(1, round(_VALIDATION_SHARE * cells.shape[1])), 1).values.mean(1).cpu())
        return torch.cat(found).view(-1, features.tiles_per_image).amax(1)


def _as_convolution(layer: nn.Module, mean: torch.Tensor, matrix: torch.Tensor) -> nn.Module:
    with torch.no_grad():
        layer.get_parameter("weight").copy_(matrix.T[:, :, None, None])
        layer.get_parameter("bias").copy_(-(mean @ matrix))
    return layer
