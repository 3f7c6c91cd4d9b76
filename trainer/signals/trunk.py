"""The trunk of signals: takes each channel's usual value off and divides by its usual deviation.

It learns nothing; its numbers are those of the recording that a detector was trained on. It must not know methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from edge.errors import DataError
from trainer.methods.mmae_ecg.model import SIGNAL

if TYPE_CHECKING:
    import numpy.typing as npt

_FLAT = 1e-6


class SignalTrunk(nn.Module):
    """From a window in its unit to the tap ``signal``.

    Args:
        mean: float32 [K], of good windows.
        std: float32 [K], of good windows, > 0.
    """

    tap_names: tuple[str, ...] = (SIGNAL,)
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean[:, None])
        self.register_buffer("std", std[:, None])

    @classmethod
    def of(cls, windows: npt.NDArray[np.float32]) -> SignalTrunk:
        """Return the trunk of good windows float32 [n, K, Q].

        Raises:
            DataError: there is none, or a channel never changes.
        """
        if not len(windows):
            raise DataError("there is no good window to learn from")
        mean, std = windows.mean((0, 2), dtype=np.float64), windows.std((0, 2), dtype=np.float64)
        # Of its own size, whatever the unit: a current in A may be a millionth.
        flat = np.flatnonzero(std <= _FLAT * np.abs(mean))
        if len(flat):
            raise DataError(f"channel {int(flat[0])} never changes in the good windows; is the sensor connected?")
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(std).float()).eval()

    def forward(self, window: torch.Tensor) -> tuple[torch.Tensor]:
        """Return ``(signal,)`` float32 [N, 1, K, Q] of windows float32 [N, K, Q]."""
        return (((window - self.mean) / self.std).unsqueeze(1),)
