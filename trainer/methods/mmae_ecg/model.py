"""MMAE-ECG: an autoencoder of segments that are hidden at two scales; how badly it rebuilds them is the anomaly.

Pure modules from a signal to an anomaly map; they do not know how they are trained, nor what the signal is of. Source:
Zhou et al., arXiv 2502.05494.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import nn

from edge.errors import DataError
from trainer.methods.base import Head
from trainer.methods.mmae_ecg.masks import Masks

if TYPE_CHECKING:
    from trainer.methods.mmae_ecg.masks import Scales

SIGNAL = "signal"
"""The tap: float32 [N, 1, K, Q], the scaled samples."""
EPSILON = 1e-6
_LEAST = 1e-12
# First positions: deviation of what is random, and height of the waves.
_SMALL, _WAVES = 0.02, 0.5


class Space(str, Enum):
    """What an error is measured in.

    ``normalised``: each segment of each channel has mean 0 and deviation 1, so that a segment counts by its shape.
    ``raw``: in the scaled signal, so that it counts by its size too. ``both``: the map is the raw one, multiplied so
    that its mean is that of the normalised one: where from the first, how much from the second.
    """

    NORMALISED = "normalised"
    RAW = "raw"
    BOTH = "both"


class Attention(nn.Module):
    """Self-attention over tokens [N, n, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.together = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens [N, n, d]."""
        count, width = tokens.shape[1:]
        depth = width // self.heads
        split = self.together(tokens).reshape(-1, count, 3, self.heads, depth).permute(2, 0, 3, 1, 4)
        query, key, value = split[0], split[1], split[2]
        weights = (query * depth**-0.5) @ key.transpose(2, 3)
        mixed = weights.softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(-1, count, width))


class Block(nn.Module):
    """A transformer block that normalises before each part."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.first = nn.LayerNorm(width, EPSILON)
        self.attention = Attention(width, heads)
        self.second = nn.LayerNorm(width, EPSILON)
        self.enter = nn.Linear(width, ratio * width)
        self.leave = nn.Linear(ratio * width, width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens [N, n, d]."""
        tokens = tokens + self.attention(self.first(tokens))
        return tokens + self.leave(nn.functional.gelu(self.enter(self.second(tokens))))


class Autoencoder(nn.Module):
    """Rebuilds hidden segments from visible ones, of the whole window and of a run of it in one sequence.

    Args:
        channels: K.
        samples: Q, a multiple of ``scales.segments``.
        scales: how a window is cut and hidden.
        width: d of tokens.
        depth: blocks of the encoder; the decoder has one.
        heads: of every attention.
        ratio: how much wider the hidden layer of a block is.

    Raises:
        DataError: the window cannot be cut into the segments.
    """

    def __init__(
        self, *, channels: int, samples: int, scales: Scales, width: int, depth: int, heads: int, ratio: int = 4
    ) -> None:
        super().__init__()
        if samples % scales.segments:
            raise DataError(
                f"a window of {samples} samples is not cut into {scales.segments} equal segments; choose --set segments"
            )
        if width % heads:
            raise DataError(f"width {width} is no multiple of {heads} heads")
        self.scales, self.channels, self.length = scales, channels, samples // scales.segments
        inner = channels * self.length
        self.embed = nn.Linear(inner, width)
        self.encoder_global = nn.Parameter(torch.empty(scales.segments, width))
        self.encoder_local = nn.Parameter(torch.empty(scales.segments, width))
        self.encoder = nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width, EPSILON)
        self.enter = nn.Linear(width, width)
        self.hidden = nn.Parameter(torch.empty(width))
        self.decoder_global = nn.Parameter(torch.empty(scales.segments, width))
        self.decoder_local = nn.Parameter(torch.empty(scales.segments, width))
        self.decoder = Block(width, heads, ratio)
        self.decoder_norm = nn.LayerNorm(width, EPSILON)
        self.leave = nn.Linear(width, inner)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw first weights: matrices as Xavier, the token of hidden segments with deviation 0.02.

        Positions begin as sines and cosines of the segment's number and are learned from there: from small random ones
        a network of five blocks does not find out within a few thousand steps which segments are neighbours.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.hidden, std=_SMALL, generator=generator)
        for table in (self.encoder_global, self.encoder_local, self.decoder_global, self.decoder_local):
            nn.init.trunc_normal_(table, std=_SMALL, generator=generator)
            with torch.no_grad():
                table.add_(waves(*table.shape), alpha=_WAVES)

    def cut(self, signal: torch.Tensor) -> torch.Tensor:
        """Return the segments float32 [N, T, K, P] of a signal [N, K, Q]."""
        return signal.unflatten(2, (self.scales.segments, self.length)).transpose(1, 2)

    def forward(self, segments: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Rebuild the hidden segments of training windows, each under a mask of its own.

        Args:
            segments: float32 [N, T, K, P].
            masks: N rows.

        Returns:
            float32 [N, n_g + n_l, K, P]: the globally hidden ones, then the locally hidden ones, normalised.
        """
        of_window, of_run = self.placed(segments)
        rows = torch.arange(len(segments), device=segments.device)[:, None]
        return self.rebuild(of_window[rows, masks.global_visible], of_run[rows, masks.local_visible], masks)

    def placed(self, segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens [N, T, d] of all segments, with the positions of the window and with those of the run."""
        tokens = self.embed(segments.flatten(2))
        return tokens + self.encoder_global, tokens + self.encoder_local

    def rebuild(self, of_window: torch.Tensor, of_run: torch.Tensor, masks: Masks) -> torch.Tensor:
        """Rebuild hidden segments from the tokens of visible ones.

        Positions are added to whole windows and runs, so that a graph holds each table once, not once per pass.

        Args:
            of_window: float32 [M, T - n_g, d].
            of_run: float32 [M, delta - n_l, d].
            masks: their rows: M, or as many as divide M, which are then repeated.

        Returns:
            float32 [M, n_g + n_l, K, P].
        """
        known = torch.cat([of_window, of_run], 1)
        for block in self.encoder:
            known = block(known)
        known = self.enter(self.encoder_norm(known))
        seen = masks.global_visible.shape[1]
        window = self._in_order(known[:, :seen], masks.global_order) + self.decoder_global
        within = torch.arange(self.scales.local, device=known.device)
        run = self._in_order(known[:, seen:], masks.local_order) + self.decoder_local[masks.starts + within]
        tokens = self.decoder(torch.cat([window, run], 2).flatten(0, 1))
        hidden = torch.cat([masks.global_hidden, self.scales.segments + masks.local_hidden - masks.starts], 1)
        found = self.decoder_norm(_taken(tokens, hidden).flatten(0, 1))
        return self.leave(found).unflatten(2, (self.channels, self.length))

    def _in_order(self, known: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Fill up with the token of hidden segments: [M / L, L, m, d] of tokens [M, n, d] and order [L, m]."""
        hidden = self.hidden.expand(known.shape[0], order.shape[1] - known.shape[1], -1)
        return _taken(torch.cat([known, hidden], 1), order)


def _taken(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return [M / L, L, m, d], of each row of tokens [M, n, d] those that its row of ``index`` [L, m] names."""
    rows, count = index.shape[0], tokens.shape[1]
    first = torch.arange(rows, device=index.device)[:, None] * count
    return tokens.unflatten(0, (-1, rows)).flatten(1, 2)[:, index + first]


def waves(count: int, width: int) -> torch.Tensor:
    """Return float32 [count, width], each row a place in sines and cosines of falling frequency (Vaswani et al., 2017).

    The slowest has a period of about 2 pi times 100 segments, the most that a window usually has.
    """
    rates = 100.0 ** -(torch.arange(-(-width // 2)) / (width / 2))
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


def normalised(segments: torch.Tensor, floor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every segment of every channel mean 0 and deviation 1; a flat one keeps its noise small.

    Args:
        segments: float32 [..., K, P].
        floor: float32 [K, 1], what is added to the variance, squared, in units of the scaled signal.

    Returns:
        The same shape, and the variance that it was divided by [..., 1].
    """
    mean = segments.mean(-1, keepdim=True)
    centred = segments - mean
    variance = centred.square().mean(-1, keepdim=True) + floor**2
    return centred * variance.rsqrt(), variance


def flat(segments: torch.Tensor) -> torch.Tensor:
    """Return each channel's median deviation of a segment, float32 [K, 1], of segments [N, T, K, P]."""
    deviation = segments.std(-1, correction=0).flatten(0, 1)
    return deviation.median(0).values.clamp_min(_LEAST**0.5)[:, None]


def hidden_errors(
    rebuilt: torch.Tensor, segments: torch.Tensor, masks: Masks, floor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each scale: mean squared errors of normalised hidden segments.

    Args:
        rebuilt: as :meth:`Autoencoder.forward` returns it.
        segments: float32 [N, T, K, P].
        masks: N rows.
        floor: as for :func:`normalised`.
    """
    target = normalised(segments, floor)[0]
    rows = torch.arange(len(segments), device=segments.device)[:, None]
    hidden = torch.cat([target[rows, masks.global_hidden], target[rows, masks.local_hidden]], 1)
    errors = (rebuilt - hidden).square()
    return errors[:, : masks.global_hidden.shape[1]].mean(), errors[:, masks.global_hidden.shape[1] :].mean()


class MmaeHead(Head):
    """The exported part: every window is judged by fixed passes in one batch.

    Its buffer ``loss`` is what training reached, both scales together; NaN before.

    Args:
        network: fitted.
        masks: H rows.
        floor: as for :func:`normalised`.
        space: what errors are measured in.
        cell: samples per cell of the map, a divisor of the segments' length.
        smooth: deviation of the Gaussian that the map is smoothed with over time, in segments; 0 for none.
        seed: that the masks were made from, kept to make them again.

    Raises:
        DataError: the cell does not divide a segment.
    """

    tap_names: tuple[str, ...] = (SIGNAL,)
    float_ops: tuple[str, ...] = ("smoothing",)
    floor: torch.Tensor
    smoothing: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor
    loss: torch.Tensor

    def __init__(
        self,
        network: Autoencoder,
        masks: Masks,
        *,
        floor: torch.Tensor,
        space: Space,
        cell: int,
        smooth: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if network.length % cell:
            raise DataError(f"a segment of {network.length} samples is not cut into cells of {cell}")
        self.network, self.space, self.map_stride = network, space, cell
        for name in Masks.__slots__:
            self.register_buffer(name, getattr(masks, name), persistent=False)
        segments = network.scales.segments
        self.register_buffer("shape", torch.tensor([network.channels, segments * network.length, seed]))
        self.register_buffer("floor", floor)
        self.register_buffer("smoothing", gaussian(smooth * network.length / cell), persistent=False)
        self.register_buffer("loss", torch.full((), float("nan")))
        self.register_buffer("rows", _gathering(masks, segments), persistent=False)
        self.register_buffer("counts", masks.counts(segments).float(), persistent=False)

    @property
    def masks(self) -> Masks:
        """The passes' masks, H rows."""
        return Masks(*(getattr(self, name) for name in Masks.__slots__))

    def forward(self, signal: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the anomaly map float32 [N, K, Q / cell] of tap ``signal`` float32 [N, 1, K, Q]."""
        raw, shape = self.point_scores(signal)
        found = shape if self.space is Space.NORMALISED else raw
        if self.space is Space.BOTH:
            found = raw * (shape.mean((1, 2), keepdim=True) / (raw.mean((1, 2), keepdim=True) + _LEAST))
        return (self.smoothed(found),)

    def smoothed(self, cells: torch.Tensor) -> torch.Tensor:
        """Return float32 [N, K, n] smoothed over time; beyond its ends a map is taken to go on as it ends."""
        half = len(self.smoothing) // 2
        if not half:
            return cells
        rows = nn.functional.pad(cells.flatten(0, 1)[:, None], (half, half), mode="replicate")
        return nn.functional.conv1d(rows, self.smoothing[None, None]).reshape(cells.shape)

    def point_scores(self, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean squared error of each point over the passes that hid it, raw and normalised.

        Args:
            signal: tap, float32 [N, 1, K, Q].

        Returns:
            float32 [N, K, Q / cell] each; exactly 0 where no pass hid a segment.
        """
        segments = self.network.cut(signal[:, 0])
        (of_window, of_run), masks = self.network.placed(segments), self.masks
        # One batch of N H rows, the passes of a window side by side: each segment is embedded once for all of them.
        rebuilt = self.network.rebuild(
            of_window[:, masks.global_visible].flatten(0, 1), of_run[:, masks.local_visible].flatten(0, 1), masks
        )
        hidden = torch.cat([masks.global_hidden, masks.local_hidden], 1)
        target, variance = normalised(segments, self.floor)
        errors = (rebuilt.unflatten(0, (-1, len(masks))) - target[:, hidden]).square()
        cells = errors.unflatten(4, (-1, self.map_stride)).mean(5).flatten(1, 2)
        nothing = torch.zeros_like(cells[:, :1])
        total = torch.cat([cells, nothing], 1)[:, self.rows].sum(2)
        mean = total / self.counts.clamp_min(1)[:, None, None]
        return tuple(part.transpose(1, 2).flatten(2) for part in (mean * variance, mean))

    def sample_scores(self, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of all errors over the number of hidden entries, float32 [N], raw and normalised."""
        cells = self.network.length // self.map_stride
        weights = (self.counts / (self.counts.sum() * cells)).repeat_interleave(cells)
        return tuple((part.mean(1) * weights).sum(1) for part in self.point_scores(signal))


def gaussian(deviation: float) -> torch.Tensor:
    """Return the weights, float32 [odd], of a Gaussian to three deviations; a single 1 for none."""
    half = math.ceil(3 * deviation)
    if not half:
        return torch.ones(1)
    weights = torch.exp(-0.5 * (torch.arange(-half, half + 1) / deviation) ** 2)
    return weights / weights.sum()


def _gathering(masks: Masks, segments: int) -> torch.Tensor:
    """Return int64 [T, m]: among all hidden segments of all passes, those that are segment t; filled up with none."""
    flat = torch.cat([masks.global_hidden, masks.local_hidden], 1).flatten()
    found = [torch.nonzero(flat == segment).flatten() for segment in range(segments)]
    most = max(len(one) for one in found)
    return torch.stack([nn.functional.pad(one, (0, most - len(one)), value=len(flat)) for one in found])
