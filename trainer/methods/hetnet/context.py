"""The global teacher as a box runs it: every place of an image told from the rest of that image.

Pure modules on whitened taps; they know no student.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

BARRED = -1e4  # added to a logit before the softmax; exp of it is 0 in float32 and fits float16


class GlobalContext(nn.Module):
    """Attention over the deepest grid, with an image's own maps as values.

    Tokens are the deepest map itself (no weights at all), or what a small adapter makes of it where a vision
    transformer was the teacher. The attention ``softmax(cos(t_i, t_j) / temperature)`` leaves out the sites within
    ``reach`` cells of i: what is told of a site comes from elsewhere, so a defect that occurs once is not told, while
    a change of the whole image (light, focus) is. Finer levels are carried along in blocks of their own cells.

    Args:
        grid: height and width of the deepest map.
        reach: Chebyshev radius in cells that is left out, >= 0.
        temperature: > 0.
        adapter: tokens from the deepest map; None takes the map itself.
    """

    def __init__(self, grid: tuple[int, int], *, reach: int, temperature: float, adapter: Adapter | None) -> None:
        super().__init__()
        self.grid, self.temperature, self.adapter = grid, temperature, adapter
        y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
        near = torch.maximum((y[:, None] - y).abs(), (x[:, None] - x).abs()) <= reach
        # On a grid so small that nothing lies beyond the reach, a site looks everywhere.
        near &= ~near.all(1, keepdim=True)
        self.register_buffer("barred", torch.where(near, BARRED, 0.0), persistent=False)

    def forward(self, local: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Look around.

        Args:
            local: maps float32 [N, C_l, h_l, w_l], finest first; each grid is the next one's doubled.

        Returns:
            The global map float32 [N, Cg, h, w] on the deepest grid, and what is foretold of each level, shaped as
            ``local``.
        """
        deepest = local[-1]
        tokens = deepest if self.adapter is None else self.adapter(deepest)
        unit = tokens.flatten(2)
        unit = unit / (unit * unit).sum(1, keepdim=True).clamp_min(1e-6).sqrt()
        similarity = unit.transpose(1, 2) @ unit
        attention = (similarity * (1 / self.temperature) + self.get_buffer("barred")).softmax(2)
        foretold = []
        for index, level in enumerate(local):
            factor = 2 ** (len(local) - 1 - index)
            blocks = functional.pixel_unshuffle(level, factor).flatten(2)
            told = (blocks @ attention.transpose(1, 2)).unflatten(2, self.grid)
            foretold.append(functional.pixel_shuffle(told, factor))
        return (foretold[-1] if self.adapter is None else tokens), foretold


class Adapter(nn.Module):
    """Stands in for a vision transformer on the box: its tokens, distilled from the deepest tap.

    Args:
        inputs: channels of the deepest map.
        hidden: width.
        outputs: channels of the tokens.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            skip_init(nn.Conv2d, inputs, hidden, 1),
            nn.ReLU(),
            skip_init(nn.Conv2d, hidden, hidden, 5, padding=2, groups=hidden),
            nn.ReLU(),
        )
        self.outer = skip_init(nn.Conv2d, 2 * hidden, outputs, 1)

    def forward(self, deepest: torch.Tensor) -> torch.Tensor:
        """Return tokens float32 [N, outputs, h, w] of float32 [N, inputs, h, w]; every token sees the image's mean."""
        x = self.inner(deepest)
        whole = x.mean((2, 3), keepdim=True).expand_as(x)
        tokens: torch.Tensor = self.outer(torch.cat([x, whole], 1))
        return tokens
