"""The head that a box runs: a base, its gates, and the sum of its levels on one scale.

A pure module; it knows no losses and no schedules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from trainer.methods.base import Head
from trainer.methods.fader.gates import Gates, attenuated
from trainer.methods.patches import enlarge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.methods.fader.base import MaskedBase

MAP_STRIDE = 4


class Judgement(NamedTuple):
    """What a head says of N tiles, and why.

    Attributes:
        anomaly_map: float32 [N, H/4, W/4], higher is more anomalous.
        total: float32 [N, 1, H/4, W/4] >= 0, the scaled error itself: the map before its background is taken off.
        mask: float32 [N, 1, H/16, W/16], 1 where cells were hidden.
        gates: gate values of each skip feature, finest first; empty without gates.
    """

    anomaly_map: torch.Tensor
    total: torch.Tensor
    mask: torch.Tensor
    gates: tuple[torch.Tensor, ...]


class FaderHead(Head):
    """Hide the salient cells, reconstruct in one pass through attenuated skips, and sum how far each level misses.

    ``sum_l scale_l * level_l`` on the stride-4 grid, less ``background`` times its own mean; ``scale_l`` is a map, the
    reciprocal of what good parts miss at that place. The gates stay in float32 under int8: near 1 they would lose the
    little that they attenuate.

    Args:
        base: fitted or empty.
        gates: None is the base alone.
        background: share of its own mean that is taken off a map.
        grid: h, w of the anomaly map.
    """

    map_stride = MAP_STRIDE

    def __init__(self, base: MaskedBase, gates: Gates | None, *, background: float, grid: tuple[int, int]) -> None:
        super().__init__()
        self.base, self.gates, self.background = base, gates, background
        self.tap_names = base.tap_names
        self.float_ops = ("gates", *(f"base.{name}" for name in base.float_ops))
        for index, stride in enumerate(base.level_strides):
            size = (grid[0] * MAP_STRIDE // stride, grid[1] * MAP_STRIDE // stride)
            self.register_buffer(f"scale_{index}", torch.ones(1, *size))

    def combine(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the scaled sum of the levels, float32 [N, 1, H/4, W/4]."""
        total: torch.Tensor | None = None
        for index, (level, stride) in enumerate(zip(levels, self.base.level_strides, strict=True)):
            scaled = enlarge(level * self.get_buffer(f"scale_{index}"), stride // MAP_STRIDE)
            total = scaled if total is None else total + scaled
        assert total is not None
        return total

    def judge(self, taps: Sequence[torch.Tensor], mask: torch.Tensor | None = None) -> Judgement:
        """Judge taps, under another mask than the head's own where one is given.

        Args:
            taps: float32 [N, C, h, w] each, in the order of ``tap_names``.
            mask: float32 [N, 1, H/16, W/16] of 0 and 1; None computes it from the saliency.
        """
        reading = self.base.read(taps)
        if mask is None:
            mask = self.base.mask(reading)
        reconstruction, values = attenuated(self.base, self.gates, reading, mask)
        total = self.combine(self.base.levels(reconstruction, reading))
        anomaly_map = total[:, 0] - self.background * total.mean((1, 2, 3), keepdim=True)[:, 0]
        return Judgement(anomaly_map, total, mask, values)

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return ``(anomaly_map,)`` float32 [N, H/4, W/4]."""
        return (self.judge(taps).anomaly_map,)


def without_gates(head: FaderHead) -> FaderHead:
    """Return the base of a head, scored as the head scores: what the gates are compared with."""
    first = head.get_buffer("scale_0")
    bare = FaderHead(head.base, None, background=head.background, grid=(first.shape[1], first.shape[2]))
    for name, scale in head.named_buffers(recurse=False):
        bare.get_buffer(name).copy_(scale)
    return bare.eval()


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of every convolution with more than its own zeros: He-normal, biases zero."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
