"""A vision transformer as the global teacher, at training only: read from a file, asked, distilled into an adapter.

A box never runs it. Knows images and tokens, not what becomes of them.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edge.errors import DataError, UsageError
from trainer.methods.hetnet.context import Adapter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from trainer.methods.base import Progress

    Forward = Callable[[torch.Tensor], torch.Tensor]

_BATCH = 8
_MOST_EXTRA_TOKENS = 16  # class, distillation and register tokens, which stand before those of the image
_TOKEN_CHANNELS = 64
_HIDDEN = 96
_RATE = 3e-3
_FORMATS = {".onnx": "ONNX", ".pt": "TorchScript", ".ts": "TorchScript"}


class Transformer:
    """A network in a file: image in, tokens out.

    ONNX (``.onnx``, one float32 input [N, 3, S, S]) or TorchScript (``.pt``, ``.ts``; nothing in the file is
    unpickled by Python). The first output is tokens [N, T, C], of which leading ones beyond the largest square are
    left out, or a map [N, C, h, w].

    Args:
        path: the file.
        side: S in pixels that images are resized to.
        mean: of the network's normalisation, per channel, for pixels in 0..1.
        deviation: likewise.

    Raises:
        UsageError: the file's name ends in no known format.
        DataError: the file cannot be read as what its name says.
    """

    def __init__(
        self, path: Path, *, side: int, mean: tuple[float, ...], deviation: tuple[float, ...], device: torch.device
    ) -> None:
        self.path, self.side, self.device = path, side, device
        self.mean, self.deviation = (torch.tensor(values)[:, None, None] for values in (mean, deviation))
        if path.suffix not in _FORMATS:
            raise UsageError(f"transformer {path}: the name must end in one of {', '.join(_FORMATS)}")
        if not path.is_file():
            raise DataError(f"transformer {path}: there is no such file; give the path of a vision transformer")
        self._forward = self._onnx() if path.suffix == ".onnx" else self._script()

    def _onnx(self) -> Forward:
        import onnxruntime  # noqa: PLC0415 (fitting without a transformer needs no engine)

        try:
            session = onnxruntime.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises what its C++ side names, without a common base
            raise DataError(f"transformer {self.path}: no ONNX graph ({str(error).splitlines()[0]})") from error
        name = session.get_inputs()[0].name

        def forward(images: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])

        return forward

    def _script(self) -> Forward:
        try:
            with warnings.catch_warnings():
                # torch advises its newer format, whose reader unpickles; this one does not.
                warnings.simplefilter("ignore", DeprecationWarning)
                module = torch.jit.load(str(self.path), map_location=self.device).eval()
        except RuntimeError as error:
            raise DataError(f"transformer {self.path}: no TorchScript ({str(error).splitlines()[0]})") from error

        def forward(images: torch.Tensor) -> torch.Tensor:
            found = module(images.to(self.device))
            return found[0] if isinstance(found, (tuple, list)) else found

        return forward

    def __call__(self, tiles: npt.NDArray[np.uint8]) -> torch.Tensor:
        """Return the token map float32 [m, C, k, k] of tiles uint8 [m, H, W, 3] RGB, on the CPU.

        Raises:
            DataError: the network refuses such images, or its output is neither tokens nor a map, or not finite.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(tiles)).permute(0, 3, 1, 2).float() / 255
        size = (self.side, self.side)
        if tuple(pixels.shape[2:]) != size:
            pixels = functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        try:
            with torch.inference_mode():
                found = self._forward((pixels - self.mean) / self.deviation)
        except Exception as error:  # the file is the user's: whatever it does not take is said with its own words
            raise DataError(f"transformer {self.path}: takes no [N, 3, {self.side}, {self.side}] ({error})") from error
        tokens = _as_map(found.float().cpu(), self.path)
        if not torch.isfinite(tokens).all():
            raise DataError(f"transformer {self.path}: gives tokens that are not finite; check its normalisation")
        return tokens.clone()


def _as_map(found: torch.Tensor, path: Path) -> torch.Tensor:
    if found.ndim == 4:  # noqa: PLR2004
        return found
    if found.ndim == 3:  # noqa: PLR2004
        side = math.isqrt(found.shape[1])
        extra = found.shape[1] - side * side
        if side and extra <= _MOST_EXTRA_TOKENS:
            return found[:, extra:].transpose(1, 2).unflatten(2, (side, side))
    raise DataError(
        f"transformer {path}: its first output is {tuple(found.shape)}, expected tokens [N, T, C] of a square of "
        "patches, or a map [N, C, h, w]"
    )


def distil(
    transformer: Transformer,
    images: npt.NDArray[np.uint8],
    deepest: Callable[[torch.Tensor], torch.Tensor],
    grid: tuple[int, int],
    *,
    steps: int,
    batch_tiles: int,
    generator: torch.Generator,
    device: torch.device,
    progress: Progress,
) -> Adapter:
    """Teach an adapter to give a transformer's tokens from the deepest tap.

    The tokens are resized to the deepest grid and reduced to their 64 (or fewer) strongest principal directions, at
    one scale for all, so that the adapter learns what varies.

    Args:
        transformer: the teacher.
        images: uint8 [n, H, W, 3] RGB tiles to learn from.
        deepest: from indices int64 [m] into ``images`` to the local teacher's deepest map float32 [m, C, h, w].
        grid: (h, w).
        steps: optimiser steps.
        batch_tiles: tiles in a step.
        generator: source of every random choice.
        device: where to train.
        progress: progress function.

    Returns:
        The adapter, frozen, on ``device``.
    """
    parts = []
    for start in range(0, len(images), _BATCH):
        tokens = transformer(images[start : start + _BATCH])
        parts.append(functional.interpolate(tokens, size=grid, mode="bilinear", align_corners=False).half())
        progress("transformer", min(start + _BATCH, len(images)), len(images))
    wanted = _principal(torch.cat(parts))
    adapter = Adapter(int(deepest(torch.arange(1)).shape[1]), _HIDDEN, int(wanted.shape[1]))
    for part in adapter.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(part.get_parameter("bias"))
    adapter.to(device)
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        rows = torch.randint(len(images), (batch_tiles,), generator=generator)
        loss = (adapter(deepest(rows)) - wanted[rows].to(device, torch.float32)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress("adapter", step + 1, steps)
    return adapter.eval().requires_grad_(False)


def _principal(tokens: torch.Tensor) -> torch.Tensor:
    """Reduce float16 [n, C, h, w] to its strongest directions, as float16 at unit mean variance."""
    count, mean, second = 0, torch.zeros(tokens.shape[1], dtype=torch.float64), None
    for part in tokens.split(_BATCH):
        rows = part.permute(0, 2, 3, 1).flatten(0, 2).double()
        count, mean = count + len(rows), mean + rows.sum(0)
        second = rows.T @ rows if second is None else second + rows.T @ rows
    assert second is not None
    mean = mean / count
    values, vectors = torch.linalg.eigh(second / count - torch.outer(mean, mean))
    kept = min(_TOKEN_CHANNELS, len(values))
    scale = values[-kept:].mean().clamp_min(1e-12).sqrt()
    matrix, bias = (vectors[:, -kept:] / scale).float(), mean.float()[:, None, None]
    return torch.cat(
        [torch.einsum("nchw,cd->ndhw", part.float() - bias, matrix).half() for part in tokens.split(_BATCH)]
    )
