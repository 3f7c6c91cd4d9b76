"""Images to patch rows in torch, in batches: what simulators and measurements feed memories with.

It must not know memories. A box does the same with its engine: ``Detector.embeddings_of_canvas``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.methods.feddymem.model import FedDyMemHead

_BATCH = 16


def embed_tiles(
    head: FedDyMemHead, trunk: Trunk, tiles: npt.NDArray[np.uint8], *, batch: int = _BATCH
) -> npt.NDArray[np.float32]:
    """Return the patch rows of tiles.

    Args:
        head: fitted, on the CPU.
        trunk: that it stands on, on the CPU.
        tiles: uint8 [n, H, W, 3] RGB, of the size that the head was fitted on, n >= 1.
        batch: tiles at once.

    Returns:
        float32 [n, L, D], row-major on ``head.memory_layout.grid``.
    """
    found = []
    with torch.inference_mode():
        for start in range(0, len(tiles), batch):
            part = torch.from_numpy(np.ascontiguousarray(tiles[start : start + batch]))
            taps = dict(zip(trunk.tap_names, trunk(part), strict=True))
            found.append(head.embed(*(taps[name] for name in head.tap_names)).numpy())
    return np.concatenate(found)
