"""UniAD: a transformer that rebuilds features from a layer-wise query and cannot copy what it sees.

A pure module from taps to an anomaly map; it does not know how it is trained. Source: You et al., "A Unified Model for
Multi-class Anomaly Detection", NeurIPS 2022.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from edge.errors import DataError
from trainer.methods.base import Head
from trainer.methods.patches import enlarge

if TYPE_CHECKING:
    from collections.abc import Sequence

TAP_NAMES = ("s2", "s4", "s8", "s16")
STRIDE = 16
MAP_STRIDE = 8
MASKED = -1e4
"""What hides a key: finite, so that int8 scales and float16 survive it; exp of it is exactly 0 in float32."""


def neighbour_mask(grid: tuple[int, int], neighbours: int) -> torch.Tensor:
    """Return the additive mask float32 [N, N] that hides from each site the sites around it, and itself.

    Args:
        grid: (h, w); N = h w, row by row.
        neighbours: side of the hidden square, odd; 0 hides nothing. Clipped at the border.

    Raises:
        DataError: the side is even, or a site would see no other one.
    """
    if neighbours < 0 or (neighbours and neighbours % 2 == 0):
        raise DataError(f"neighbours {neighbours}: the hidden square has a middle; give an odd side, or 0")
    rows, columns = (side.flatten() for side in torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"))
    near = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    if neighbours:
        reach = neighbours // 2
        near = ((rows[:, None] - rows).abs() <= reach) & ((columns[:, None] - columns).abs() <= reach)
    if near.all(dim=1).any():
        raise DataError(
            f"neighbours {neighbours} on a grid of {grid[0]} x {grid[1]}: a site in the middle would see nothing; give "
            "a smaller square or larger images"
        )
    return near.float() * MASKED


class Sampling(str, Enum):
    """How a finer tap comes to the grid."""

    ALIGNED = "aligned"
    """Bilinear with aligned corners, as the original does: of a fine tap a few sites, the others unseen."""
    MEAN = "mean"
    """The mean of all sites in a cell, so that a defect between the samples is seen."""


class Features(nn.Module):
    """Taps brought to one grid and concatenated.

    Args:
        grid: (h, w), that of the deepest tap; others are whole multiples of it.
        sampling: see :class:`Sampling`.
    """

    def __init__(self, grid: tuple[int, int], sampling: Sampling = Sampling.ALIGNED) -> None:
        super().__init__()
        self.grid, self.sampling = grid, sampling

    def forward(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return tokens float32 [N, h w, C] of taps [N, C_i, h_i, w_i]."""
        return torch.cat([self._sampled(tap) for tap in taps], 1).flatten(2).transpose(1, 2)

    def _sampled(self, tap: torch.Tensor) -> torch.Tensor:
        if tuple(tap.shape[2:]) == self.grid:
            return tap
        if self.sampling is Sampling.MEAN:
            return functional.avg_pool2d(tap, (tap.shape[2] // self.grid[0], tap.shape[3] // self.grid[1]))
        return functional.interpolate(tap, size=self.grid, mode="bilinear", align_corners=True)


class Attention(nn.Module):
    """Multi-head attention with an additive mask, written out so that every product is its own node when exported.

    Args:
        width: d, a multiple of the heads.
        heads: number of them.
        dropout: on the weights, in training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise DataError(f"width {width} is no multiple of {heads} heads; change one of the two")
        self.heads = heads
        self.query, self.key, self.value, self.out = (skip_init(nn.Linear, width, width) for _ in range(4))
        self.dropout = nn.Dropout(dropout)

    def weights(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return attention weights float32 [N, heads, Q, K] of queries [N, Q, d] to keys [N, K, d]."""
        q, k = self._split(self.query(query)), self._split(self.key(key))
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3) + mask, -1)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return [N, Q, d]."""
        mixed = self.dropout(self.weights(query, key, mask)) @ self._split(self.value(value))
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between, of ``hidden`` units, for each token by itself."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.enter, self.leave = skip_init(nn.Linear, width, hidden), skip_init(nn.Linear, hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return tokens [N, L, d]."""
        return self.leave(self.dropout(functional.relu(self.enter(x))))


class EncoderLayer(nn.Module):
    """Attention among tokens and a feed-forward network, each followed by its norm."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.feed = FeedForward(width, hidden, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, place: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return tokens [N, L, d]; places are added to queries and keys, never to values."""
        at = x + place
        x = self.norms[0](x + self.dropout(self.attention(at, at, x, mask)))
        return self.norms[1](x + self.dropout(self.feed(x)))


class DecoderLayer(nn.Module):
    """A layer that starts from a query of its own: what it sees enters as values of attention only.

    No residual path leads from the tokens to the output, so that there is nothing to copy along.

    Args:
        tokens: L, length of the query table.
        width: d.
        heads: of both attentions.
        hidden: of the feed-forward network.
        dropout: in training.
        queries: False takes what came before in place of the table: the plain decoder of the comparison.
    """

    def __init__(
        self, tokens: int, width: int, heads: int, hidden: int, dropout: float, *, queries: bool = True
    ) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(tokens, width)) if queries else None
        self.memory_attention, self.before_attention = (Attention(width, heads, dropout) for _ in range(2))
        self.feed = FeedForward(width, hidden, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, before: torch.Tensor, memory: torch.Tensor, place: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return [N, L, d] of the layer before and of the encoder's tokens, [N, L, d] each."""
        x = before if self.table is None else self.table[None]
        x = self.norms[0](x + self.dropout(self.memory_attention(x + place, memory + place, memory, mask)))
        x = self.norms[1](x + self.dropout(self.before_attention(x + place, before + place, before, mask)))
        return self.norms[2](x + self.dropout(self.feed(x)))


def places(columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return a place for each site, float32 [h w, d], from tables [w, d / 2] and [h, d / 2]: column first, then row."""
    across = columns[None].expand(len(rows), -1, -1)
    return torch.cat([across, rows[:, None].expand(-1, len(columns), -1)], 2).flatten(0, 1)


@torch.no_grad()
def draw_linear(module: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of all linear layers in a module, Xavier-uniform; biases are zero."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight, generator=generator)
            nn.init.zeros_(part.bias)


class Reconstructor(nn.Module):
    """From tokens of features to what they would be on a good part.

    Args:
        grid: (h, w).
        channels: C of features.
        width: d.
        layers: of encoder and decoder, each.
        heads: of every attention.
        hidden: of feed-forward networks.
        neighbours: side of the hidden square, see :func:`neighbour_mask`.
        dropout: in training.
        queries: whether each decoder layer has a query of its own.
    """

    mask: torch.Tensor

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        channels: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        neighbours: int,
        dropout: float = 0.1,
        queries: bool = True,
    ) -> None:
        super().__init__()
        tokens = grid[0] * grid[1]
        self.grid = grid
        self.enter, self.leave = skip_init(nn.Linear, channels, width), skip_init(nn.Linear, width, channels)
        self.columns = nn.Parameter(torch.zeros(grid[1], width // 2))
        self.rows = nn.Parameter(torch.zeros(grid[0], width - width // 2))
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, hidden, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(
            DecoderLayer(tokens, width, heads, hidden, dropout, queries=queries) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", neighbour_mask(grid, neighbours), persistent=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draw every weight: linear ones Xavier-uniform, queries normal, places uniform in 0..1."""
        draw_linear(self, generator)
        for part in self.modules():
            if isinstance(part, DecoderLayer) and part.table is not None:
                part.table.normal_(generator=generator)
        for table in (self.columns, self.rows):
            table.uniform_(generator=generator)

    def place(self) -> torch.Tensor:
        """Return the learned place of each site, float32 [h w, d]: its column's half, then its row's."""
        return places(self.columns, self.rows)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return features float32 [N, L, C] rebuilt from tokens [N, L, C]."""
        place, x = self.place(), self.enter(tokens)
        for layer in self.encoder:
            x = layer(x, place, self.mask)
        memory = x
        for layer in self.decoder:
            x = layer(x, memory, place, self.mask)
        rebuilt: torch.Tensor = self.leave(self.norm(x))
        return rebuilt


def jitter(tokens: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Return tokens float32 [N, L, C] with noise of deviation ``scale`` ‖f‖ / C per channel, f being the token.

    ``scale`` / sqrt(C) is the noise's deviation in units of the token's root mean square.
    """
    noise = torch.randn(tokens.shape, generator=generator).to(tokens.device)
    return tokens + noise * (tokens.norm(dim=2, keepdim=True) * (scale / tokens.shape[2]))


def distance(tokens: torch.Tensor, rebuilt: torch.Tensor) -> torch.Tensor:
    """Return the distance of each token from what it was rebuilt as, float32 [N, L]."""
    return (tokens - rebuilt).square().sum(2).clamp_min(1e-12).sqrt()


class UniADHead(Head):
    """Distance of features from what the reconstructor makes of them, one number a site, on the stride-8 grid.

    Args:
        reconstructor: trained.
        mean: float32 [C], taken from features first.
        scale: float32 [C], features are multiplied by then.
        level: float32 [h, w], what the distance at each site is divided by.
        sampling: of finer taps.
    """

    tap_names: Sequence[str] = TAP_NAMES  # type: ignore[assignment]
    map_stride = MAP_STRIDE

    def __init__(
        self,
        reconstructor: Reconstructor,
        mean: torch.Tensor,
        scale: torch.Tensor,
        level: torch.Tensor,
        sampling: Sampling = Sampling.ALIGNED,
    ) -> None:
        super().__init__()
        self.features = Features(reconstructor.grid, sampling)
        self.reconstructor = reconstructor
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("level", level)

    mean: torch.Tensor
    scale: torch.Tensor
    level: torch.Tensor

    def tokens(self, *taps: torch.Tensor) -> torch.Tensor:
        """Return what is rebuilt, float32 [N, L, C]."""
        found: torch.Tensor = (self.features(*taps) - self.mean) * self.scale
        return found

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the map."""
        tokens = self.tokens(*taps)
        error = distance(tokens, self.reconstructor(tokens)).unflatten(1, self.features.grid)
        grid = (error / self.level)[:, None]
        return (enlarge(grid, STRIDE // MAP_STRIDE)[:, 0],)
