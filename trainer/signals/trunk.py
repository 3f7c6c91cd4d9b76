"""The trunk of signals: keeps a band of frequencies, takes each channel's usual value off, divides by its deviation.

It learns nothing; its numbers are those of the recording that a detector was trained on. It must not know methods.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy import signal
from torch import nn

from edge.errors import DataError
from trainer.methods.mmae_ecg.model import SIGNAL

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.inputs import SignalLayout

_FLAT = 1e-6
# Half of a Hamming filter's length times its transition, in samples times shares of the rate.
_HAMMING = 3.3


class SignalTrunk(nn.Module):
    """From a window in its unit to the tap ``signal``.

    Args:
        mean: float32 [K], of good windows in the band.
        std: float32 [K], of good windows in the band, > 0.
        kernel: float32 [odd], see :func:`band_kernel`.
    """

    tap_names: tuple[str, ...] = (SIGNAL,)
    mean: torch.Tensor
    std: torch.Tensor
    kernel: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, kernel: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None])
        self.register_buffer("std", std[:, None])
        self.register_buffer("kernel", kernel)

    @classmethod
    def of(cls, windows: npt.NDArray[np.float32], layout: SignalLayout) -> SignalTrunk:
        """Return the trunk of good windows float32 [n, K, Q].

        Raises:
            DataError: there is none, or a channel never changes.
        """
        if not len(windows):
            raise DataError("there is no good window to learn from")
        kernel = torch.from_numpy(band_kernel(layout))
        size = np.abs(windows).max((0, 2))
        windows = in_band(torch.from_numpy(windows), kernel).numpy()
        mean, std = windows.mean((0, 2), dtype=np.float64), windows.std((0, 2), dtype=np.float64)
        # Of its own size, whatever the unit: a current in A may be a millionth.
        flat = np.flatnonzero(std <= _FLAT * size)
        if len(flat):
            raise DataError(f"channel {int(flat[0])} never changes in the good windows; is the sensor connected?")
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(std).float(), kernel).eval()

    def forward(self, window: torch.Tensor) -> tuple[torch.Tensor]:
        """Return ``(signal,)`` float32 [N, 1, K, Q] of windows float32 [N, K, Q]."""
        return (((in_band(window, self.kernel) - self.mean) / self.std).unsqueeze(1),)


def band_kernel(layout: SignalLayout) -> npt.NDArray[np.float32]:
    """Return the weights, float32 [odd], of a symmetric filter that keeps a layout's band and delays nothing.

    Above ``high_hz`` a low-pass (Hamming window, half as wide a transition) takes off what is faster, below ``low_hz``
    a running mean (Hann window of 1 / ``low_hz`` seconds) what is slower, the constant part wholly; at either edge
    half of an amplitude is left. One weight of 1 where the layout names neither.
    """
    kernel = np.ones(1)
    if layout.high_hz is not None:
        half = math.ceil(_HAMMING * layout.rate_hz / layout.high_hz)
        kernel = signal.firwin(2 * half + 1, layout.high_hz, fs=layout.rate_hz)
    if layout.low_hz is not None:
        half = math.ceil(0.5 * layout.rate_hz / layout.low_hz)
        mean = np.hanning(2 * half + 3)[1:-1]
        slow = np.convolve(kernel, mean / mean.sum())
        kernel = np.pad(kernel, half) - slow
    return kernel.astype(np.float32)


def in_band(windows: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Filter windows float32 [N, K, Q]; beyond its ends a window is taken to stand still."""
    half = len(kernel) // 2
    if not half:
        return windows
    # A group for each channel: OpenVINO is eight times as fast as over rows of one channel.
    channels = windows.shape[1]
    wide = nn.functional.pad(windows, (half, half), mode="replicate")
    return nn.functional.conv1d(wide, kernel.expand(channels, 1, -1), groups=channels)
