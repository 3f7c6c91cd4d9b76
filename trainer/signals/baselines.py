"""What every detector of signals is measured beside: a linear one that exports too, and two that learn nothing.

It must not know how they are compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from edge.errors import DataError, UsageError
from trainer.methods.base import FitContext, Head, Method, MethodConfig
from trainer.methods.mmae_ecg.model import SIGNAL

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# Windows that components are computed from; more hardly turn them.
_MOST_WINDOWS = 2000
_CELLS_OF_A_WINDOW = 300


class PcaConfig(MethodConfig):
    """Settings of the PCA residual."""

    components: int = Field(8, ge=1, description="Directions of good windows that are taken off.")
    cell: int | None = Field(
        None, ge=1, description="Samples of a map cell; null: a divisor that gives up to 300 cells."
    )


class PcaHead(Head):
    """Squares of what a window has besides its mean and its main directions.

    Args:
        mean: float32 [K Q].
        components: float32 [k, K Q], orthonormal rows.
        channels: K.
        cell: samples per cell of the map.
    """

    tap_names: tuple[str, ...] = (SIGNAL,)
    float_ops: tuple[str, ...] = ("components", "mean")
    mean: torch.Tensor
    components: torch.Tensor

    def __init__(self, mean: torch.Tensor, components: torch.Tensor, channels: int, cell: int) -> None:
        super().__init__()
        self.channels, self.map_stride = channels, cell
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.register_buffer("channels_cell", torch.tensor([channels, cell]))

    def forward(self, signal: torch.Tensor) -> tuple[torch.Tensor]:
        """Return the anomaly map float32 [N, K, Q / cell] of tap ``signal`` float32 [N, 1, K, Q]."""
        centred = signal.flatten(1) - self.mean
        residual = centred - (centred @ self.components.T) @ self.components
        return (residual.unflatten(1, (self.channels, -1, self.map_stride)).square().mean(3),)


class PcaMethod(Method):
    """The residual of principal components of good windows."""

    name: ClassVar[str] = "pca_residual"
    tap_names: ClassVar[tuple[str, ...]] = (SIGNAL,)

    @classmethod
    def config(cls, preset: str) -> PcaConfig:
        """Return the preset: ``quick`` has 8 components, ``full`` 32.

        Raises:
            UsageError: unknown preset.
        """
        if preset not in {"quick", "full"}:
            raise UsageError(f"--preset {preset}: unknown; choose quick or full")
        return PcaConfig(components=8 if preset == "quick" else 32)

    @classmethod
    def fit(cls, context: FitContext, config: MethodConfig) -> PcaHead:
        """Compute the components.

        Raises:
            DataError: fewer windows than components, or a cell that does not divide the window.
        """
        own = _own(config)
        windows = context.features.taps[SIGNAL][:, 0].float()
        return pca(windows[drawn(len(windows), _MOST_WINDOWS)], own.components, own.cell)

    @classmethod
    def build(cls, config: MethodConfig, tensors: dict[str, torch.Tensor]) -> PcaHead:
        """Rebuild a fitted head.

        Raises:
            DataError: the tensors are not a PCA head's.
        """
        _own(config)
        try:
            channels, cell = tensors["channels_cell"].tolist()
            return PcaHead(tensors["mean"], tensors["components"], channels, cell).eval()
        except (KeyError, ValueError) as error:
            raise DataError(f"these tensors are no PCA head ({error}); train again") from error


def pca(windows: torch.Tensor, components: int, cell: int | None = None) -> PcaHead:
    """Return the head of scaled good windows float32 [n, K, Q].

    Raises:
        DataError: fewer windows than components and one, or a cell that does not divide the window.
    """
    count, channels, samples = windows.shape
    if count <= components:
        raise DataError(f"{count} good windows are too few for {components} components; add recordings or take fewer")
    chosen = cell or next(n for n in range(max(1, -(-samples // _CELLS_OF_A_WINDOW)), samples + 1) if samples % n == 0)
    if samples % chosen:
        raise DataError(f"a window of {samples} samples is not cut into cells of {chosen}")
    rows = windows.flatten(1).double()
    mean = rows.mean(0)
    # Of few long rows the small matrix of products has the same directions.
    values, vectors = torch.linalg.eigh((rows - mean) @ (rows - mean).T)
    best = vectors[:, -components:].flip(1)
    directions = (best.T @ (rows - mean)) / values[-components:].flip(0).clamp_min(1e-12).sqrt()[:, None]
    return PcaHead(mean.float(), directions.float(), channels, chosen).eval()


def drawn(count: int, most: int) -> torch.Tensor:
    """Return int64 indices of at most so many rows, evenly spread."""
    return torch.linspace(0, max(0, count - 1), min(count, most)).round().long()


def peak_to_peak(scaled: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the largest range of a channel, float32 [n], of scaled windows [n, K, Q]."""
    return (scaled.max(2) - scaled.min(2)).max(1)


def amplitude(scaled: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the root mean square, float32 [n], of scaled windows [n, K, Q]."""
    return (scaled**2).mean((1, 2)) ** 0.5


def _own(config: MethodConfig) -> PcaConfig:
    if not isinstance(config, PcaConfig):
        raise UsageError(f"pca_residual cannot use a {type(config).__name__}; take PcaMethod.config(preset)")
    return config
