"""The student's head: a small memory head, and a convolutional branch that corrects its map towards the teacher's.

A pure module; it does not know who taught it nor on what.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from trainer.methods.memory.model import EMBEDDING_STRIDE, LEVELS, MAP_STRIDE, STRIDES, MemoryHead
from trainer.methods.patches import enlarge

if TYPE_CHECKING:
    from collections.abc import Sequence

_FINE = 48  # channels that the stride-4 level is folded into on the branch's grid


class Branch(nn.Module):
    """Convolutions on the patches and distances of all levels -> one map at stride 4.

    The work is done on the stride-8 grid, which costs a quarter; a last pixel shuffle gives stride 4.

    Args:
        channels: of each level, distances included, by tap name.
        width: channels of the hidden layers.
        generator: draws the weights; None leaves them as they come, to be loaded.
    """

    def __init__(self, channels: dict[str, int], width: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.fine = skip_init(nn.Conv2d, channels["s4"], _FINE, 3, 2, 1)
        self.enter = skip_init(nn.Conv2d, _FINE + channels["s8"], width, 1)
        self.coarse = skip_init(nn.Conv2d, channels["s16"], width, 1)
        self.spatial = skip_init(nn.Conv2d, width, width, 3, 1, 1, groups=width)
        self.mix = skip_init(nn.Conv2d, width, width, 1)
        self.leave = skip_init(nn.Conv2d, width, (EMBEDDING_STRIDE // MAP_STRIDE) ** 2, 1)
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

    def hidden(self, s4: torch.Tensor, s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
        """Map levels [N, C, h, w], distances last, to [N, width, H / 8, W / 8]."""
        x = self.enter(torch.cat([functional.relu(self.fine(s4)), s8], 1)) + enlarge(self.coarse(s16), 2)
        x = functional.relu(x)
        return x + functional.relu(self.mix(functional.relu(self.spatial(x))))

    def forward(self, s4: torch.Tensor, s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
        """Map levels [N, C, h, w], distances last, to [N, H / 4, W / 4]."""
        return unfold(self.leave(self.hidden(s4, s8, s16)))


def unfold(folded: torch.Tensor) -> torch.Tensor:
    """Turn [N, 4, H / 8, W / 8] into a map [N, H / 4, W / 4]."""
    return functional.pixel_shuffle(folded, EMBEDDING_STRIDE // MAP_STRIDE)[:, 0]


class StudentHead(MemoryHead):
    """A memory head, and a branch that corrects its map.

    ``bank`` is the memory detector's map, standardised by ``offset`` and ``gain`` from good parts that the banks have
    not seen; the map is ``bank + branch``. State and embedding are the memory detector's.

    Args:
        memory: whose banks, sites and settings are taken over.
        width: of the branch.
        generator: draws the branch's weights; None leaves them to be loaded.
    """

    offset: torch.Tensor
    gain: torch.Tensor

    def __init__(self, memory: MemoryHead, *, width: int, generator: torch.Generator | None = None) -> None:
        banks = {name: memory.get_buffer(f"bank_{name}") for name in LEVELS}
        super().__init__(
            rows=tuple(len(bank) for bank in banks.values()),
            channels=tuple(int(bank.shape[1]) for bank in banks.values()),
            background=memory.background,
            sites=copy.deepcopy(memory.sites),
            site_weight=memory.site_weight,
            int8_rows=bool(memory.int8_state),
        )
        self.load_state_dict(memory.state_dict())
        # The last layer decides: rounding it would show in every cell of the map.
        self.float_ops = (*memory.float_ops, "branch.leave")
        self.register_buffer("offset", torch.zeros(1))
        self.register_buffer("gain", torch.ones(1))
        channels = {name: int(bank.shape[1]) + 1 for name, bank in banks.items()}
        channels["s4"] += self.sites is not None
        self.branch = Branch(channels, width, generator)

    def levels(self, taps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return each level's whitened patches and its scaled distance as the last channel, [N, C + 1, h, w].

        The finest level has the weighted distance to each site's mean as one channel more, where there are sites.
        """
        found = []
        for index, (name, tap) in enumerate(zip(LEVELS, taps, strict=True)):
            patches, bank = self.whitened(name, tap), self.get_buffer(f"bank_{name}")
            rows = patches.flatten(2).transpose(1, 2)
            # ||q - m||^2 = ||q||^2 + (||m||^2 - 2 q.m): one matrix product, then a minimum over the bank.
            nearest = ((bank * bank).sum(1) - 2.0 * (rows @ bank.t())).amin(2)
            distance = (nearest + (rows * rows).sum(2)).clamp_min(0.0).sqrt().unflatten(1, patches.shape[2:])
            found.append(torch.cat([patches, distance[:, None] * self.scales[index]], 1))
        if self.sites is not None:
            found[0] = torch.cat([found[0], self.site_weight * self.sites(*taps)[:, None]], 1)
        return tuple(found)

    def bank_map(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the standardised map of banks and sites alone, [N, H / 4, W / 4]."""
        total = levels[0][:, len(self.get_submodule("whiten_s4").weight) :].sum(1, keepdim=True)
        for level, stride in zip(levels[1:], STRIDES[1:], strict=True):
            total = total + enlarge(level[:, -1:], stride // MAP_STRIDE)
        total = total - self.background * total.mean((1, 2, 3), keepdim=True)
        return (total[:, 0] - self.offset) * self.gain

    def branch_map(self, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the branch's correction, [N, H / 4, W / 4]."""
        correction: torch.Tensor = self.branch(*levels)
        return correction

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the map float32 [N, H / 4, W / 4] and the patch rows float32 [N, H / 8 * W / 8, C in all]."""
        levels = self.levels(taps)
        columns = [
            on_embedding_grid(level[:, : len(self.get_submodule(f"whiten_{name}").weight)], stride)
            for name, level, stride in zip(LEVELS, levels, STRIDES, strict=True)
        ]
        return self.bank_map(levels) + self.branch_map(levels), torch.cat(columns, 1).flatten(2).transpose(1, 2)


def on_embedding_grid(patches: torch.Tensor, stride: int) -> torch.Tensor:
    """Bring a level's patches to the grid of the embedding: means where it is finer, enlarged where it is coarser."""
    if stride < EMBEDDING_STRIDE:
        return functional.avg_pool2d(patches, EMBEDDING_STRIDE // stride)
    return enlarge(patches, stride // EMBEDDING_STRIDE)
