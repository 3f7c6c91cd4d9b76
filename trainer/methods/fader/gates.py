"""Attenuation gates: two small layers on each skip feature of a trained base, and the plug that puts them there.

It knows the interface of a base, never which base it is, nor how anything is trained.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.methods.fader.base import MaskedBase, Reading

OPEN_BIAS = 4.0
"""Bias of the last layer at the start: sigmoid(4) is 0.982, so the plugged-in gates hardly change the base."""

CLOSED_FORM_ONE = 40.0
"""A bias whose sigmoid is 1 in float32, to the last bit."""

_REDUCTION = 4


class GateShape(str, Enum):
    """What one gate value belongs to."""

    SPATIAL = "spatial"
    """A place: all channels there are attenuated alike."""
    CHANNEL = "channel"
    """A place and a channel."""


class AttenuationGate(nn.Module):
    """``sigmoid(W2 relu(W1 f + b1) + b2)`` at every place of a skip feature: the two MLP layers of FADeR.

    Args:
        channels: C of the skip feature.
        shape: one value per place, or one per place and channel.
    """

    def __init__(self, channels: int, shape: GateShape) -> None:
        super().__init__()
        hidden = max(1, channels // _REDUCTION)
        self.reduce = skip_init(nn.Conv2d, channels, hidden, 1)
        self.attenuate = skip_init(nn.Conv2d, hidden, channels if shape is GateShape.CHANNEL else 1, 1)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Return gate values in [0, 1], float32 [N, 1 or C, h, w], for a skip feature float32 [N, C, h, w]."""
        return torch.sigmoid(self.attenuate(functional.relu(self.reduce(feature))))


class Gates(nn.Module):
    """One gate for each skip feature of a base.

    Args:
        channels: C of each skip feature, in the base's order.
        shape: see :class:`GateShape`.
    """

    def __init__(self, channels: Sequence[int], shape: GateShape = GateShape.SPATIAL) -> None:
        super().__init__()
        self.levels = nn.ModuleList(AttenuationGate(width, shape) for width in channels)

    def initialise(self, generator: torch.Generator) -> Gates:
        """Draw the first layers, and open every gate to sigmoid(4)."""
        for gate in self.levels:
            assert isinstance(gate, AttenuationGate)
            nn.init.kaiming_normal_(gate.reduce.weight, generator=generator)
            nn.init.zeros_(gate.reduce.bias)
            nn.init.normal_(gate.attenuate.weight, std=1e-2, generator=generator)
            nn.init.constant_(gate.attenuate.bias, OPEN_BIAS)
        return self

    @torch.no_grad()
    def force_open(self) -> Gates:
        """Make every gate 1 to the last bit, whatever the feature: the base as it was before gates."""
        for gate in self.levels:
            assert isinstance(gate, AttenuationGate)
            gate.reduce.weight.zero_()
            gate.reduce.bias.zero_()
            gate.attenuate.weight.zero_()
            gate.attenuate.bias.fill_(CLOSED_FORM_ONE)
        return self

    def forward(self, skips: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return gate values, one tensor per skip feature."""
        return tuple(gate(skip) for gate, skip in zip(self.levels, skips, strict=True))


def attenuated(
    base: MaskedBase, gates: Gates | None, reading: Reading, mask: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Decode once, with the skip features attenuated.

    Args:
        base: any base.
        gates: None is the base alone.
        reading: what the base read from the taps.
        mask: float32 [N, 1, H/16, W/16], 1 where a cell is hidden.

    Returns:
        The reconstructions of the base, and the gate values (empty without gates).
    """
    skips = base.skips(reading, mask)
    if gates is None:
        return base.decode(skips), ()
    values = gates(skips)
    return base.decode(tuple(value * skip for value, skip in zip(values, skips, strict=True))), values
