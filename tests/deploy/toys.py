"""Small trunks and heads that have the shape of the real ones, so that the deploy tests need no trainer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


def _same_pad(size: int, kernel: int, stride: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class ToyBlock(nn.Module):
    """Convolution, batch norm, ReLU6 with asymmetric SAME padding at stride 2, as in EfficientNet-Lite."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=0, bias=False, groups=groups)
        self.norm = nn.BatchNorm2d(outputs)
        # At a multiple of 32 the SAME pad of a 3x3 stride-2 convolution is (0, 1) whatever the size.
        self.pad = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu6(self.norm(self.conv(functional.pad(x, self.pad))))


class ToyTrunk(nn.Module):
    """uint8 [N, H, W, 3] RGB -> taps of strides 2, 4, 8, 16 with 8, 12, 16, 24 channels."""

    tap_names = ("s2", "s4", "s8", "s16")
    tap_channels = (8, 12, 16, 24)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = ToyBlock(3, 8, 2)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                [ToyBlock(a, a, 2, groups=a), nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), ToyBlock(b, b, 1)]
            )
            for a, b in ((8, 12), (12, 16), (16, 24))
        )
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.1, 0.3)
                nn.init.uniform_(module.bias, 0.0, 0.8)
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = ((image.to(torch.float32) - 127.0) * (1.0 / 128.0)).permute(0, 3, 1, 2)
        x = self.stem(x)
        taps = [x]
        for down, project, norm, mix in self.stages:
            x = norm(project(down(x)))
            x = x + mix(x)
            taps.append(x)
        return tuple(taps)


class ToyMemoryHead(nn.Module):
    """Nearest row of a bank over two taps, as a product with the bank and a minimum."""

    tap_names = ("s8", "s16")
    state_names = ("bank", "bank_norms")
    map_stride = 8
    float_ops: tuple[str, ...] = ()

    def __init__(
        self, bank: torch.Tensor, scale: torch.Tensor, centre: torch.Tensor | None = None, *, embedding: bool = True
    ) -> None:
        super().__init__()
        self.register_buffer("bank", bank)
        self.register_buffer("bank_norms", (bank * bank).sum(1))
        self.register_buffer("scale", scale)
        # Distances do not change, but an int8 product of rows with a large common part would drown them.
        self.register_buffer("centre", torch.zeros_like(scale) if centre is None else centre)
        kernel = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("blur", (kernel[:, None] * kernel)[None, None])
        self.embedding = embedding
        self.eval()

    def embed(self, s8: torch.Tensor, s16: torch.Tensor) -> torch.Tensor:
        s8 = functional.avg_pool2d(s8, 3, 1, 1)
        s16 = functional.avg_pool2d(s16, 3, 1, 1)
        s16 = functional.interpolate(s16, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = (torch.cat((s8, s16), 1) - self.centre[:, None, None]) * self.scale[:, None, None]
        return x.flatten(2).transpose(1, 2)

    def forward(self, s8: torch.Tensor, s16: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = self.embed(s8, s16)
        cross = rows @ self.bank.t()
        least = (self.bank_norms - 2.0 * cross).amin(-1)
        distance = (least + (rows * rows).sum(-1)).clamp_min(0.0).sqrt()
        anomaly_map = distance.reshape(-1, 1, s8.shape[2], s8.shape[3])
        anomaly_map = functional.conv2d(functional.pad(anomaly_map, (1, 1, 1, 1), mode="replicate"), self.blur)[:, 0]
        return (anomaly_map, rows) if self.embedding else (anomaly_map,)


class ToyPbasHead(nn.Module):
    """A small network of convolutions that gives logits."""

    tap_names = ("s8", "s16")
    state_names = ("centre",)
    map_stride = 8
    float_ops = ("logits",)

    def __init__(self, channels: int = 40, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.project = nn.Conv2d(channels, 32, 1)
        self.hidden = nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.logits = nn.Conv2d(32, 1, 1)
        self.register_buffer("centre", torch.randn(32, 1, 1) * 0.1)
        self.eval()

    def forward(self, s8: torch.Tensor, s16: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s16 = functional.interpolate(s16, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = self.project(functional.avg_pool2d(torch.cat((s8, s16), 1), 3, 1, 1)) - self.centre
        x = functional.leaky_relu(self.norm(self.hidden(x)), 0.2)
        return (self.logits(x)[:, 0],)
