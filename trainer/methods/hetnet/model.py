"""The networks of the HetNet-style method: fusion, one-class bottleneck, students, and the head that a box runs.

Pure modules; they know neither losses nor noise nor schedules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import skip_init

from trainer.methods.base import Head
from trainer.methods.deviation import Deviation
from trainer.methods.patches import enlarge

if TYPE_CHECKING:
    from trainer.methods.hetnet.context import GlobalContext

LEVELS = ("s4", "s8", "s16")
"""Taps of the local teacher, finest first; the map has the grid of the first."""
STRIDES = (4, 8, 16)
LOCAL_MEANS = (False, True, True)
"""Whether a level is averaged over 3x3 cells first: on the finest that would blur small defects."""
MAP_STRIDE = STRIDES[0]
TINY = 1e-6

Maps = list[torch.Tensor]
"""One float32 [N, C_l, H / stride_l, W / stride_l] for each of ``LEVELS``."""


class Shape(NamedTuple):
    """Sizes that a network is built from.

    Attributes:
        channels: of the taps, in the order of ``LEVELS``.
        grid: height and width of the deepest tap, both even.
        width: channels of the fused maps; the finest level has half.
        code: channels of the one-class bottleneck.
        context: channels of the global map; 0 where there is no global teacher.
    """

    channels: tuple[int, ...]
    grid: tuple[int, int]
    width: int
    code: int
    context: int

    def level_grid(self, level: int) -> tuple[int, int]:
        """Return height and width of a level's grid."""
        factor = STRIDES[-1] // STRIDES[level]
        return self.grid[0] * factor, self.grid[1] * factor


class Separable(nn.Sequential):
    """Depthwise 3x3, pointwise, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        # skip_init: the global generator is not ours to advance.
        super().__init__(
            skip_init(nn.Conv2d, inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
            skip_init(nn.Conv2d, inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Fusion(nn.Module):
    """Adaptive local-global fusion of one level (ALGF).

    ``out = p + g + hybrid``: p the local map, g the global map at p's size, both by a 1x1 convolution. The
    cross-structure attention reduces p and g to their means, and a small perceptron on both weighs them per channel:
    ``hybrid = w p + (1 - w) g``. Without a global teacher the output is p.
    """

    def __init__(self, local: int, context: int, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.local = skip_init(nn.Conv2d, local, width, 1)
        self.context: nn.Conv2d | None = None
        if context:
            self.context = skip_init(nn.Conv2d, context, width, 1)
            self.squeeze = skip_init(nn.Linear, 2 * width, width)
            self.weigh = skip_init(nn.Linear, width, 2 * width)

    def forward(self, local: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """Fuse float32 [N, C, h, w] with float32 [N, Cg, h / factor, w / factor] to [N, width, h, w]."""
        p: torch.Tensor = self.local(local)
        if self.context is None or context is None:
            return p
        g = self.context(context)
        bars = torch.cat([p.mean((2, 3)), g.mean((2, 3))], 1)
        weights = self.weigh(functional.relu(self.squeeze(bars))).unflatten(1, (2, -1)).softmax(1)[..., None, None]
        g = enlarge(g, self.factor)
        fused: torch.Tensor = p + g + weights[:, 0] * p + weights[:, 1] * g
        return fused


class HybridFusion(nn.Module):
    """Three fused maps to one on the deepest grid (MHF): two strided 3x3 convolutions, one, none, then joined."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(Separable(width // 2, width, 2), Separable(width, width, 2))
        self.middle = Separable(width, width, 2)
        self.join = nn.Sequential(skip_init(nn.Conv2d, 3 * width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width))

    def forward(self, fused: Maps) -> torch.Tensor:
        """Return float32 [N, 2 * width, h16, w16]."""
        fine, middle, deep = fused
        joined: torch.Tensor = self.join(torch.cat([self.fine(fine), self.middle(middle), deep], 1))
        return functional.relu(joined)


class Student(nn.Module):
    """One-class embedding and a decoder of three stages: resize and convolve, no transposed convolution.

    The bottleneck keeps ``code`` channels at half the deepest grid, so that only what good parts have in common
    passes. Where there is a global teacher, each stage answers twice: from the bottleneck alone, and with what the
    global teacher foretells of the level (see :class:`GlobalContext`) added by a 1x1 convolution.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.embed = nn.Sequential(
            Separable(2 * width, 2 * width, 2), skip_init(nn.Conv2d, 2 * width, shape.code, 1), nn.ReLU()
        )
        inputs = (width, 2 * width, shape.code)
        outputs = (width // 2, width, 2 * width)
        self.stages = nn.ModuleList(Separable(a, b) for a, b in zip(inputs, outputs, strict=True))
        self.out = nn.ModuleList(skip_init(nn.Conv2d, b, c, 1) for b, c in zip(outputs, shape.channels, strict=True))
        self.beside, self.foretold = nn.ModuleList(), nn.ModuleList()
        if shape.context:
            self.beside.extend(skip_init(nn.Conv2d, b, c, 1) for b, c in zip(outputs, shape.channels, strict=True))
            self.foretold.extend(skip_init(nn.Conv2d, c, c, 1, bias=False) for c in shape.channels)

    def forward(self, fused: torch.Tensor, foretold: Maps) -> Maps:
        """Recall the teacher's maps from float32 [N, 2 * width, h16, w16].

        Returns:
            The maps of all levels from the bottleneck alone, then, with a global teacher, all levels again.
        """
        x, alone, told = self.embed(fused), [], []
        for index in (2, 1, 0):
            x = self.stages[index](enlarge(x, 2))
            alone.insert(0, self.out[index](x))
            if len(self.foretold):
                told.insert(0, self.beside[index](x) + self.foretold[index](foretold[index]))
        return alone + told


class Encoder(nn.Module):
    """ALGF at every level, then MHF: what the reconstruction and the denoising path share."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        factors = [STRIDES[-1] // stride for stride in STRIDES]
        widths = (shape.width // 2, shape.width, shape.width)
        self.fusions = nn.ModuleList(
            Fusion(c, shape.context, w, f) for c, w, f in zip(shape.channels, widths, factors, strict=True)
        )
        self.hybrid = HybridFusion(shape.width)

    def forward(self, local: Maps, context: torch.Tensor | None) -> torch.Tensor:
        """Fuse local maps and the global map to float32 [N, 2 * width, h16, w16]."""
        fused = [fusion(level, context) for fusion, level in zip(self.fusions, local, strict=True)]
        joined: torch.Tensor = self.hybrid(fused)
        return joined


class HetNetwork(nn.Module):
    """All that is trained: encoder, reconstruction student SR, denoising student SD."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.encoder = Encoder(shape)
        self.sr, self.sd = Student(shape), Student(shape)


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight that has not been drawn; what is foretold starts as the student's answer."""
    for name, part in module.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            if ".foretold." in name:
                nn.init.dirac_(part.weight)
            else:
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class HetNetHead(Head):
    """The exported head: taps -> anomaly map; the trained encoder and one student.

    ``x_l`` is the whitened deviation of tap l from its normal mean and ``s_l`` what the student recalls of it, from
    the bottleneck alone and with what is foretold. A residual is ``||M_l (x_l - s_l) + b_l||`` (whitened by the
    residuals of unseen good images) or ``1 - cos(x_l, s_l)``. Each is scaled place by place by what good images have
    there (buffers ``scale_i`` float32 [1, h_l, w_l], i counts answers); the map is the sum over levels and answers on
    the s4 grid, less ``background`` times its own mean.
    """

    tap_names = LEVELS
    map_stride = MAP_STRIDE
    # What a residual is a small difference of stays in float32 under int8; these products are few.
    float_ops = ("whiten", "context", "residual", "student.out", "student.beside", "student.foretold")

    def __init__(self, shape: Shape, context: GlobalContext | None, *, cosine: bool, background: float) -> None:
        super().__init__()
        self.shape, self.cosine, self.background = shape, cosine, background
        self.whiten = nn.ModuleList(
            Deviation((c, *shape.level_grid(level)), local_mean=LOCAL_MEANS[level])
            for level, c in enumerate(shape.channels)
        )
        self.context = context
        self.encoder, self.student = Encoder(shape), Student(shape)
        answers = shape.channels * (2 if shape.context else 1)
        self.residual = nn.ModuleList(skip_init(nn.Conv2d, c, c, 1) for c in answers if not cosine)
        for index in range(len(answers)):
            self.register_buffer(f"scale_{index}", torch.ones(1, *shape.level_grid(index % len(LEVELS))))
        self.register_buffer("grid", torch.tensor(shape.grid))

    def scales(self) -> Maps:
        """Return the scale of every place, float32 [1, h_l, w_l] for each answer."""
        return [scale for name, scale in self.named_buffers() if name.startswith("scale_")]

    def use_cosine(self) -> None:
        """Judge by one minus the cosine from now on."""
        self.cosine, self.residual = True, nn.ModuleList()

    def whitened(self, taps: tuple[torch.Tensor, ...]) -> Maps:
        """Return the local teacher's maps x_l."""
        return [whiten(tap) for whiten, tap in zip(self.whiten, taps, strict=True)]

    def recall(self, taps: tuple[torch.Tensor, ...]) -> tuple[Maps, Maps]:
        """Return the local teacher's maps x_l, once for each answer, and the student's answers s_l."""
        local = self.whitened(taps)
        context, foretold = (None, []) if self.context is None else self.context(local)
        recalled = self.student(self.encoder(local, context), foretold)
        return local * (len(recalled) // len(local)), recalled

    def levels(self, taps: tuple[torch.Tensor, ...]) -> Maps:
        """Return the scaled residual of each answer float32 [N, 1, h_l, w_l]."""
        found = []
        for index, (x, s) in enumerate(zip(*self.recall(taps), strict=True)):
            distance = 1 - cosine(x, s) if self.cosine else norm(self.residual[index](x - s))
            found.append(distance * self.get_buffer(f"scale_{index}"))
        return found

    def forward(self, *taps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Judge taps.

        Args:
            taps: s4, s8, s16 float32 [N, C_l, H / stride_l, W / stride_l].

        Returns:
            ``(anomaly_map,)`` float32 [N, H / 4, W / 4].
        """
        found = self.levels(taps)
        # Answers of one level are added on its own grid, before they are enlarged.
        parts = [sum(found[index + len(LEVELS) :: len(LEVELS)], found[index]) for index in range(len(LEVELS))]
        total = parts[0]
        for level, stride in zip(parts[1:], STRIDES[1:], strict=True):
            total = total + enlarge(level, stride // MAP_STRIDE)
        return ((total - self.background * total.mean((1, 2, 3), keepdim=True))[:, 0],)


def norm(x: torch.Tensor) -> torch.Tensor:
    """Return the length of every site's vector, float32 [N, C, h, w] -> [N, 1, h, w]."""
    return (x * x).sum(1, keepdim=True).clamp_min(TINY).sqrt()


def cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the cosine of every site's vectors, float32 [N, C, h, w] twice -> [N, 1, h, w]."""
    return (x * y).sum(1, keepdim=True) / (norm(x) * norm(y))
