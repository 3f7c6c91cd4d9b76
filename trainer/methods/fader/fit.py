"""The method FADeR: its settings, and how a head is fitted and rebuilt.

Knows features and good images; the trunk is frozen and belongs to all methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Head, Method, MethodConfig
from trainer.methods.fader.base import Hint
from trainer.methods.fader.bases import BaseKind, FeatureBase, ImageBase
from trainer.methods.fader.gates import Gates, GateShape
from trainer.methods.fader.model import MAP_STRIDE, FaderHead, initialise
from trainer.methods.fader.training import Objective, measure, new_gates, settle, train_base, train_gates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from trainer.methods.fader.base import MaskedBase

_BASES: dict[BaseKind, type[FeatureBase | ImageBase]] = {BaseKind.FEATURES: FeatureBase, BaseKind.IMAGE: ImageBase}


class FaderConfig(MethodConfig):
    """Settings of FADeR; the README says which values are the paper's, which inferred and which measured."""

    base: BaseKind = Field(BaseKind.FEATURES, description="What is reconstructed.")
    width: int = Field(48, ge=8, le=256, description="Channels of the decoder.")
    bottleneck: float = Field(0.3, gt=0, le=1, description="Share of its channels that a skip is narrowed to.")
    mask_quantile: float = Field(0.5, ge=0, lt=1, description="Share of good cells that the fixed threshold spares.")
    hint: Hint = Field(Hint.MOSAIC, description="What the decoder sees of masked cells; blank is the ablation.")
    mosaic: int = Field(32, multiple_of=16, ge=16, le=32, description="Side of a mosaic block in pixels, 16 or 32.")
    random_masks: float = Field(0.3, ge=0, le=1, description="Share of random blocks masked too in training.")
    position_share: float = Field(0.5, ge=0, le=1, description="Share of a place's own mean in the normal mean.")
    whitening: float = Field(0.1, gt=0, description="Added to every eigenvalue of a tap, as a share of their mean.")
    residual_whitening: float = Field(0.3, gt=0, description="The same for the residuals.")
    place_prior: float = Field(
        10.0, ge=0, description="Images that the mean over places counts as, in a place's scale."
    )
    background: float = Field(0.3, ge=0, le=1, description="Share of its own mean that is taken off a map.")
    steps: int = Field(200, ge=1, description="Optimiser steps of the base.")
    batch_tiles: int = Field(8, ge=1, description="Tiles of a step.")
    rate: float = Field(2e-3, gt=0, description="Highest learning rate of the base (AdamW, one cycle).")
    gates: bool = Field(True, description="Plug attenuation gates in; off is the base alone.")
    gate: GateShape = Field(GateShape.SPATIAL, description="What one gate value belongs to.")
    objective: Objective = Field(Objective.BOTH, description="What the gates are trained for.")
    beta: float = Field(1.0, ge=0, description="Weight of the error targets beside clean reconstruction.")
    least_gate: float = Field(0.9, ge=0, lt=1, description="Mean gate on good tiles that training holds, every level.")
    gate_steps: int = Field(60, ge=1, description="Optimiser steps of the gates.")
    gate_rate: float = Field(2e-2, gt=0, description="Learning rate of the gates (Adam).")
    gate_tiles: int = Field(48, ge=1, description="Good tiles that corruptions are made of.")


class FaderMethod(Method):
    """Reconstruction by inpainting with attenuation gates, on the shared trunk."""

    name: ClassVar[str] = "fader"
    tap_names: ClassVar[tuple[str, ...]] = ImageBase.tap_names

    @classmethod
    def config(cls, preset: str) -> FaderConfig:
        """Return the settings of preset ``quick`` or ``full``.

        Raises:
            UsageError: no preset of that name.
        """
        presets = {"quick": FaderConfig(), "full": FaderConfig(steps=400)}
        if preset not in presets:
            raise UsageError(f"--preset {preset}: unknown; choose {' or '.join(presets)}")
        return presets[preset]

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> FaderHead:
        """Learn base and gates from good images.

        Raises:
            DataError: no features, or features that are not finite.
            UsageError: training diverged.
        """
        settings, generator = _own(config), context.generator()
        shapes = {name: tuple(context.features.taps[name].shape[1:]) for name in _BASES[settings.base].tap_names}
        head = fit_base(context, settings, generator, shapes)
        if settings.gates:
            head.gates = new_gates(head.base, settings, generator).to(context.device)
            train_gates(head, context, settings, generator)
        return head.to("cpu").eval().requires_grad_(requires_grad=False)

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> Head:
        """Rebuild a fitted head from its config and state dict.

        Raises:
            DataError: the tensors do not fit the config.
        """
        settings = _own(config)
        try:
            prefix, suffix = "base.deviations.", ".centre"
            shapes = {
                name.removeprefix(prefix).removesuffix(suffix): tuple(tensor.shape)
                for name, tensor in tensors.items()
                if name.startswith(prefix) and name.endswith(suffix)
            }
            shapes["s1"] = (3, 0, 0)
            head = empty_head(settings, shapes)
            if settings.gates:
                head.gates = Gates(head.base.skip_channels, settings.gate)
            head.load_state_dict(tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise DataError(
                f"these are not the weights of a FADeR head of this config: {error}; train again"
            ) from error
        return head.eval().requires_grad_(requires_grad=False)


def fit_base(
    context: FitContext, config: FaderConfig, generator: torch.Generator, shapes: Mapping[str, Sequence[int]]
) -> FaderHead:
    """Run stage 1.

    Args:
        context: good images.
        config: settings.
        generator: of every random choice.
        shapes: [C, h, w] of each tap.

    Returns:
        The base as a head without gates, frozen, on the context's device.
    """
    head = empty_head(config, shapes)
    initialise(head.base, generator)
    head.to(context.device)
    measure(head.base, context, config, generator)
    train_base(head.base, context, config, generator)
    settle(head, context, config, generator)
    return head


def empty_head(config: FaderConfig, shapes: Mapping[str, Sequence[int]]) -> FaderHead:
    """Return a head without gates whose weights are not set."""
    base: MaskedBase = _BASES[config.base](
        shapes, hint=config.hint, block=config.mosaic, width=config.width, bottleneck=config.bottleneck
    )
    height, width = shapes["s4"][1:]
    return FaderHead(base, None, background=config.background, grid=(height * 4 // MAP_STRIDE, width * 4 // MAP_STRIDE))


def _own(config: MethodConfig) -> FaderConfig:
    if not isinstance(config, FaderConfig):
        raise UsageError(f"FADeR cannot use a {type(config).__name__}; take FaderMethod.config(preset)")
    return config
