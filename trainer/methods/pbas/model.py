"""The networks of PBAS: patch embedding, projector, discriminator, and the folded head that a box runs.

Pure modules; they know neither losses nor schedules nor centres.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from edge.errors import DataError
from trainer.methods.base import Head
from trainer.methods.patches import enlarge, patch_mean

TAP_NAMES = ("s8", "s16")
TAP_CHANNELS = (40, 112)
EMBEDDING_DIM = sum(TAP_CHANNELS)
HIDDEN_DIM = 256
MAP_STRIDE = 8
LEAK = 0.2
SMOOTHING_TRUNCATE = 4.0  # in standard deviations, as scipy.ndimage.gaussian_filter has it


def embed(s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
    """Return the patch embedding, as training sees it.

    Args:
        s8: float32 [N, 40, h, w], h and w even.
        s16: float32 [N, 112, h / 2, w / 2].

    Returns:
        float32 [N, 152, h, w].

    Raises:
        DataError: the taps have other channels, or their grids do not fit.
    """
    if (s8.shape[1], s16.shape[1]) != TAP_CHANNELS:
        raise DataError(f"taps s8, s16 have {s8.shape[1]}, {s16.shape[1]} channels; PBAS is made for {TAP_CHANNELS}")
    if (2 * s16.shape[2], 2 * s16.shape[3]) != tuple(s8.shape[2:]):
        raise DataError(
            f"tap s8 is {tuple(s8.shape[2:])}, s16 is {tuple(s16.shape[2:])}; "
            "make the input's height and width multiples of 16"
        )
    return torch.cat([patch_mean(s8), enlarge(patch_mean(s16), 2)], dim=1)


class Projector(nn.Module):
    """Standardisation by fixed training statistics, then one linear layer without activation.

    Args:
        generator: draws the xavier-normal weights.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        # skip_init: the global generator is not ours to advance.
        self.linear = skip_init(nn.Linear, EMBEDDING_DIM, EMBEDDING_DIM)
        nn.init.xavier_normal_(self.linear.weight, generator=generator)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(EMBEDDING_DIM))
        self.register_buffer("scale", torch.ones(EMBEDDING_DIM))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Project patch embeddings, float32 [R, 152] -> [R, 152]."""
        return self.linear((rows - self.mean) * self.scale)


class Discriminator(nn.Module):
    """Linear, batch normalisation, LeakyReLU, linear: projected patch -> logit, higher is more anomalous.

    Args:
        generator: draws the xavier-normal weights.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.hidden = skip_init(nn.Linear, EMBEDDING_DIM, HIDDEN_DIM)
        self.norm = nn.BatchNorm1d(HIDDEN_DIM)
        self.logit = skip_init(nn.Linear, HIDDEN_DIM, 1, bias=False)
        nn.init.xavier_normal_(self.hidden.weight, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.xavier_normal_(self.logit.weight, generator=generator)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Judge projected patches, float32 [R, 152] -> logits [R]."""
        hidden = functional.leaky_relu(self.norm(self.hidden(rows)), LEAK)
        return self.logit(hidden).squeeze(1)


class PbasNetwork(nn.Module):
    """Projector and discriminator as they are trained, on rows of patches."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.projector = Projector(generator)
        self.discriminator = Discriminator(generator)

    def forward(self, s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
        """Return the unsmoothed logit map [N, h, w]: the reference that the folded head must equal."""
        embedding = embed(s8, s16)
        n, d, h, w = embedding.shape
        rows = embedding.permute(0, 2, 3, 1).reshape(-1, d)
        logits: torch.Tensor = self.discriminator(self.projector(rows))
        return logits.reshape(n, h, w)


class _FoldedLinear(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor


def _fold(network: PbasNetwork) -> _FoldedLinear:
    """Multiply out standardisation, projector, first discriminator layer and batch normalisation, in float64."""
    projector, discriminator = network.projector, network.discriminator
    norm = discriminator.norm
    if norm.running_mean is None or norm.running_var is None:  # pragma: no cover - we always track statistics
        raise AssertionError("batch normalisation without running statistics")
    weight = projector.linear.weight.double() * projector.scale.double()
    bias = projector.linear.bias.double() - weight @ projector.mean.double()
    hidden = discriminator.hidden
    weight, bias = hidden.weight.double() @ weight, hidden.weight.double() @ bias + hidden.bias.double()
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return _FoldedLinear(weight * gain[:, None], (bias - norm.running_mean.double()) * gain + norm.bias.double())


def gaussian_kernel(sigma: float) -> torch.Tensor:
    """Return a normalised 2-D Gaussian, float32 [1, 1, 2r + 1, 2r + 1] with r = round(4 sigma) cells.

    Args:
        sigma: standard deviation in map cells, > 0.
    """
    radius = max(1, round(SMOOTHING_TRUNCATE * sigma))
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    line = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = torch.outer(line, line)
    return (kernel / kernel.sum()).to(torch.float32)[None, None]


class PbasHead(Head):
    """The exported head: taps -> logit map, in convolutions only, batch dimension free.

    Everything linear between a tap and the hidden layer is one 1x1 convolution per tap; the stride-16 one runs before
    the up-sampling, which is the same by linearity and needs a quarter of its products. Borders of the smoothing
    repeat the edge, because a logit of zero means "undecided", not "good".

    Args:
        smoothing: sigma of the Gaussian over the logit map in cells; 0 leaves the map as it is.
    """

    tap_names = TAP_NAMES
    map_stride = MAP_STRIDE

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.from_s8 = skip_init(nn.Conv2d, TAP_CHANNELS[0], HIDDEN_DIM, 1)
        self.from_s16 = skip_init(nn.Conv2d, TAP_CHANNELS[1], HIDDEN_DIM, 1, bias=False)
        self.logit = skip_init(nn.Conv2d, HIDDEN_DIM, 1, 1, bias=False)
        self.smooth: nn.Conv2d | None = None
        if smoothing > 0:
            kernel = gaussian_kernel(smoothing)
            self.smooth = skip_init(nn.Conv2d, 1, 1, kernel.shape[-1], bias=False)
            with torch.no_grad():
                self.smooth.weight.copy_(kernel)

    @classmethod
    def fold(cls, network: PbasNetwork, smoothing: float) -> PbasHead:
        """Turn a trained network into its head, in eval mode, on the CPU."""
        head = cls(smoothing)
        with torch.no_grad():
            weight, bias = _fold(network)
            head.from_s8.weight.copy_(weight[:, : TAP_CHANNELS[0], None, None])
            head.from_s8.bias.copy_(bias)
            head.from_s16.weight.copy_(weight[:, TAP_CHANNELS[0] :, None, None])
            head.logit.weight.copy_(network.discriminator.logit.weight[:, :, None, None])
        return head.eval().requires_grad_(False)

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Judge taps.

        Args:
            taps: s8 float32 [N, 40, H/8, W/8] and s16 float32 [N, 112, H/16, W/16].

        Returns:
            ``(anomaly_map,)`` float32 [N, H/8, W/8], logits: 0 is the trained boundary, higher is more anomalous.
        """
        s8, s16 = taps
        hidden = self.from_s8(patch_mean(s8)) + enlarge(self.from_s16(patch_mean(s16)), 2)
        logits = self.logit(functional.leaky_relu(hidden, LEAK))
        if self.smooth is not None:
            radius = self.smooth.kernel_size[0] // 2
            logits = self.smooth(functional.pad(logits, (radius, radius, radius, radius), mode="replicate"))
        return (logits[:, 0],)
