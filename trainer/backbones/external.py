"""Networks of timm and torchvision as trunks, where a user has them installed: for teachers, not for boxes.

Knows nothing of anomalies. Taps are the last feature maps at strides 4, 8 and 16, whatever the network calls them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edge.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from types import ModuleType

LIBRARIES = ("timm", "torchvision")
_STRIDES = (4, 8, 16)
_PROBE = 64  # pixels, the side of the image that finds the taps
# What both libraries trained nearly all their networks with, shares of full scale.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ExternalTrunk(nn.Module):
    """A convolutional network with taps at strides 4, 8 and 16.

    Args:
        net: called with float32 [N, 3, H, W].
        mean: of the pixels it was trained on, shares of full scale, RGB.
        deviation: of the same.

    Attributes:
        tap_names: ``s1`` and those of ``s4``, ``s8`` and ``s16`` that the network has.
        tap_channels: channels of each.
        tap_strides: input pixels per cell of each.

    Raises:
        UsageError: no feature map of the network has any of these strides.
    """

    def __init__(
        self, net: nn.Module, mean: tuple[float, ...] = _MEAN, deviation: tuple[float, ...] = _DEVIATION
    ) -> None:
        super().__init__()
        self.net = net.eval()
        self.register_buffer("mean", 255.0 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("deviation", 255.0 * torch.tensor(deviation)[:, None, None], persistent=False)
        found = self._find()
        if not found:
            raise UsageError(
                f"{type(net).__name__} has no feature map at stride {_STRIDES}; take a convolutional network"
            )
        self._modules_of = {name: module for name, (module, _) in found.items()}
        self.tap_names: tuple[str, ...] = ("s1", *found)
        self.tap_channels = {"s1": 3, **{name: channels for name, (_, channels) in found.items()}}
        self.tap_strides = {name: int(name[1:]) for name in self.tap_names}

    def _find(self) -> dict[str, tuple[str, int]]:
        """Return, by tap, the module that gives the last map of its stride, and its channels."""
        found: dict[int, tuple[str, int]] = {}

        def look(name: str, output: object) -> None:
            if not isinstance(output, torch.Tensor) or output.ndim != 4 or output.shape[2] != output.shape[3]:  # noqa: PLR2004
                return
            stride = _PROBE // output.shape[2]
            if stride in _STRIDES and stride * output.shape[2] == _PROBE:
                found[stride] = (name, output.shape[1])

        hooks = [
            module.register_forward_hook(lambda _m, _i, output, name=name: look(name, output))
            for name, module in self.net.named_modules()
        ]
        with torch.inference_mode():
            self.net(torch.zeros(1, 3, _PROBE, _PROBE))
        for hook in hooks:
            hook.remove()
        return {f"s{stride}": found[stride] for stride in _STRIDES if stride in found}

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the taps of uint8 [N, H, W, 3] RGB: see :class:`trainer.backbones.efficientnet_lite.Trunk`."""
        pixels = image.float().permute(0, 3, 1, 2)
        seen: dict[str, torch.Tensor] = {}
        hooks = [
            self.net.get_submodule(module).register_forward_hook(
                lambda _m, _i, output, name=name: seen.__setitem__(name, output)
            )
            for name, module in self._modules_of.items()
        ]
        try:
            self.net((pixels - self.mean) / self.deviation)
        finally:
            for hook in hooks:
                hook.remove()
        # In float32 and without the memory of an in-place activation that comes later.
        return ((pixels - 127.0) * (1.0 / 128.0), *(seen[name].float() for name in self.tap_names[1:]))


def external_trunk(name: str) -> ExternalTrunk:
    """Return a pretrained network of another library as a trunk, in eval mode.

    Args:
        name: ``timm:MODEL`` or ``torchvision:MODEL``, as those libraries call it.

    Raises:
        MissingExtraError: the library is not installed, or does not import here.
        UsageError: it has no such model, or the model has no usable feature map.
    """
    library, _, model = name.partition(":")
    module = _library(library, name)
    try:
        if library == "timm":
            net: Any = module.create_model(model, pretrained=True)
            stated = getattr(net, "pretrained_cfg", None) or {}
            return ExternalTrunk(net, stated.get("mean", _MEAN), stated.get("std", _DEVIATION)).eval()
        return ExternalTrunk(module.models.get_model(model, weights="DEFAULT")).eval()
    except UsageError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise UsageError(f"--trunk {name}: {library} cannot give it ({str(error).splitlines()[0]})") from error


def _library(library: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(library)
    # A torchvision of another torch fails with RuntimeError while it registers its operators.
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError(
            f"--trunk {name}: {library} does not import here ({error}); pip install {library}"
        ) from error
