"""Patches of a tap and their grid: what methods on the shared trunk have in common.

Pure functions of tensors, exportable; they know no method.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    import torch


def patch_mean(tap: torch.Tensor) -> torch.Tensor:
    """Return the 3x3 mean around every site, at the tap's own resolution.

    The border counts the padding as zeros, as the zero-padded unfold of PatchCore (Roth et al., 2022, section 3.1) and
    PBAS does: patches that see the padding lie apart from all others, and this draws them together (measured for each
    method: see its README).

    Args:
        tap: float32 [N, C, h, w].
    """
    return functional.avg_pool2d(tap, 3, stride=1, padding=1)


def enlarge(grid: torch.Tensor, factor: int) -> torch.Tensor:
    """Resize float32 [N, C, h, w] by a whole factor: bilinear, half-pixel centres (``align_corners=False``).

    The factor is a constant, so that the exported Resize has no shape arithmetic.
    """
    if factor == 1:
        return grid
    return functional.interpolate(grid, scale_factor=float(factor), mode="bilinear", align_corners=False)
