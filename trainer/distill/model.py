"""The student's head: small banks, and a convolutional branch that corrects their map towards the teacher's.

A pure module; it does not know who taught it nor on what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from trainer.methods.base import Head
from trainer.methods.patches import enlarge, patch_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

MAP_STRIDE = 4
_GRID = 8  # stride of the branch's grid and of the embedding
_PLACE = 4  # cells of that grid, along a side, that share one bias
_FINE = 48  # channels that the stride-4 level is folded into on the branch's grid


class Branch(nn.Module):
    """Convolutions on the embeddings and distances of all levels -> one map at stride 4.

    The work is done on the stride-8 grid, which costs a quarter; a last pixel shuffle gives stride 4. A bias for each
    place of 32 x 32 pixels lets it follow a teacher that knows where on the part a feature may occur.

    Args:
        channels: of each level's embedding, by tap name, finest (``s4``) first.
        width: channels of the hidden layers.
        places: rows and columns of places.
        generator: draws the weights; None leaves them as they come, to be loaded.
    """

    def __init__(
        self,
        channels: dict[str, int],
        width: int,
        places: tuple[int, int],
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, width, *places))
        self.fine = skip_init(nn.Conv2d, channels["s4"] + 1, _FINE, 3, 2, 1)
        self.enter = skip_init(nn.Conv2d, _FINE + channels["s8"] + 1, width, 1)
        self.coarse = skip_init(nn.Conv2d, channels["s16"] + 1, width, 1) if "s16" in channels else None
        self.spatial = skip_init(nn.Conv2d, width, width, 3, 1, 1, groups=width)
        self.mix = skip_init(nn.Conv2d, width, width, 1)
        self.leave = skip_init(nn.Conv2d, width, (_GRID // MAP_STRIDE) ** 2, 1)
        if generator is not None:
            self._draw(generator)

    def _draw(self, generator: torch.Generator) -> None:
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        # At first it corrects nothing.
        nn.init.zeros_(self.leave.weight)

    def hidden(self, levels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Map embeddings with their distance as last channel, [N, C + 1, h, w] each, to [N, width, H / 8, W / 8]."""
        x = self.enter(torch.cat([functional.relu(self.fine(levels["s4"])), levels["s8"]], 1))
        if self.coarse is not None:
            x = x + enlarge(self.coarse(levels["s16"]), 2)
        x = functional.relu(x + enlarge(self.place, _PLACE))
        return x + functional.relu(self.mix(functional.relu(self.spatial(x))))

    def forward(self, levels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Map embeddings with their distance as last channel, [N, C + 1, h, w] each, to [N, H / 4, W / 4]."""
        return unfold(self.leave(self.hidden(levels)))


def unfold(folded: torch.Tensor) -> torch.Tensor:
    """Turn [N, 4, H / 8, W / 8] into a map [N, H / 4, W / 4]."""
    return functional.pixel_shuffle(folded, _GRID // MAP_STRIDE)[:, 0]


class StudentHead(Head):
    """Distances to small banks, level by level, and a branch that corrects their sum.

    ``bank = sum_l scale_l * min_r ||E_l p - m_r||`` on the stride-4 grid, less ``background`` times its own mean, then
    standardised by ``offset`` and ``gain`` from good parts that the banks have not seen; the map is ``bank + branch``.
    State: ``bank_s4``, ``bank_s8`` and, where the trunk has it, ``bank_s16``, float32 [R, D]. The embedding is float32
    [N, L, D in all] on the stride-8 grid, levels side by side.

    Args:
        rows: of each level's bank, finest first.
        channels: (tap channels, embedding channels) of each level, finest first.
        width: of the branch.
        places: rows and columns of 32 x 32 pixels in a tile.
        background: share of its own mean that is taken off the banks' map.
        generator: draws the branch's weights; None leaves them to be loaded.
    """

    map_stride = MAP_STRIDE

    def __init__(
        self,
        *,
        rows: tuple[int, ...],
        channels: tuple[tuple[int, int], ...],
        width: int,
        places: tuple[int, int],
        background: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.tap_names = ("s4", "s8", "s16")[: len(rows)]
        self.strides = (4, 8, 16)[: len(rows)]
        self.state_names = tuple(f"bank_{name}" for name in self.tap_names)
        # Small directions of the embedding would drown in the rounding of larger ones, and the last layer decides.
        self.float_ops = (*(f"embed_{name}" for name in self.tap_names), "branch.leave")
        self.background = background
        for name, count, (inputs, outputs) in zip(self.tap_names, rows, channels, strict=True):
            self.register_module(f"embed_{name}", skip_init(nn.Conv2d, inputs, outputs, 1))
            self.register_buffer(f"bank_{name}", torch.zeros(count, outputs))
        self.register_buffer("scales", torch.ones(len(rows)))
        self.register_buffer("offset", torch.zeros(1))
        self.register_buffer("gain", torch.ones(1))
        outputs = {name: outputs for name, (_, outputs) in zip(self.tap_names, channels, strict=True)}
        self.branch = Branch(outputs, width, places, generator)

    def levels(self, taps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return each level's embedding with its scaled distance as the last channel, [N, D + 1, h, w]."""
        found = []
        for index, (name, tap) in enumerate(zip(self.tap_names, taps, strict=True)):
            patches, bank = self.get_submodule(f"embed_{name}")(patch_mean(tap)), self.get_buffer(f"bank_{name}")
            rows = patches.flatten(2).transpose(1, 2)
            # ||q - m||^2 = ||q||^2 + (||m||^2 - 2 q.m): one matrix product, then a minimum over the bank.
            nearest = ((bank * bank).sum(1) - 2.0 * (rows @ bank.t())).amin(2)
            distance = (nearest + (rows * rows).sum(2)).clamp_min(0.0).sqrt().unflatten(1, patches.shape[2:])
            found.append(torch.cat([patches, distance[:, None] * self.scales[index]], 1))
        return tuple(found)

    def bank_map(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the standardised map of the banks alone, [N, H / 4, W / 4]."""
        total = enlarge(levels[0][:, -1:], self.strides[0] // MAP_STRIDE)
        for level, stride in zip(levels[1:], self.strides[1:], strict=True):
            total = total + enlarge(level[:, -1:], stride // MAP_STRIDE)
        total = total - self.background * total.mean((1, 2, 3), keepdim=True)
        return (total[:, 0] - self.offset) * self.gain

    def branch_map(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the branch's correction, [N, H / 4, W / 4]."""
        correction: torch.Tensor = self.branch(dict(zip(self.tap_names, levels, strict=True)))
        return correction

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the map float32 [N, H / 4, W / 4] and the patch rows float32 [N, H / 8 * W / 8, D in all]."""
        levels = self.levels(taps)
        anomaly_map = self.bank_map(levels) + self.branch_map(levels)
        columns = [_on_grid(level[:, :-1], stride) for level, stride in zip(levels, self.strides, strict=True)]
        return anomaly_map, torch.cat(columns, 1).flatten(2).transpose(1, 2)


def _on_grid(patches: torch.Tensor, stride: int) -> torch.Tensor:
    if stride < _GRID:
        return functional.avg_pool2d(patches, _GRID // stride)
    return enlarge(patches, stride // _GRID)
