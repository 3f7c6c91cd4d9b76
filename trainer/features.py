"""Images -> canvases -> taps of the shared trunk. Knows nothing of methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from deploy.progress import no_progress
from edge.bundle import Preprocessing
from edge.errors import CaptureError, DataError
from edge.inference.preprocessing import cut_tiles, to_canvas
from trainer.data.folder import load_image
from trainer.methods.base import Features

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from deploy.progress import Progress
    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.data.folder import Sample

_BATCH = 16


def load_canvases(
    samples: Sequence[Sample], preprocessing: Preprocessing, *, progress: Progress, what: str
) -> npt.NDArray[np.uint8]:
    """Read images as the box would see them.

    Returns:
        uint8 [n, canvas_height, canvas_width, 3] RGB.

    Raises:
        DataError: an image cannot be read, or is smaller than the crop; the message names it.
    """
    shape = (len(samples), preprocessing.canvas_height, preprocessing.canvas_width, 3)
    canvases = np.empty(shape, np.uint8)
    for index, sample in enumerate(samples):
        try:
            canvases[index] = to_canvas(load_image(sample.path), preprocessing)
        except CaptureError as error:
            raise DataError(f"{sample.path}: {error}") from error
        progress(what, index + 1, len(samples))
    return canvases


def tiles_of(canvases: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Return the tiles uint8 [n * T, H, W, 3] of canvases, an image's T tiles consecutive; no copy for one tile."""
    if preprocessing.tiles.rows * preprocessing.tiles.cols == 1:
        return canvases
    return np.concatenate([cut_tiles(canvas, preprocessing) for canvas in canvases])


def extract_tiles(
    tiles: npt.NDArray[np.uint8], *, trunk: Trunk, tap_names: Sequence[str], device: torch.device
) -> Features:
    """Run the trunk over tiles uint8 [m, H, W, 3] RGB of no image in particular, each a group of its own."""
    return extract(
        trunk,
        tiles,
        Preprocessing(height=tiles.shape[1], width=tiles.shape[2]),
        tap_names=tap_names,
        groups=np.arange(len(tiles)).astype(np.str_),
        device=device,
        progress=no_progress,
        what="",
    )


def extract(
    trunk: Trunk,
    canvases: npt.NDArray[np.uint8],
    preprocessing: Preprocessing,
    *,
    tap_names: Sequence[str],
    groups: npt.NDArray[np.str_],
    device: torch.device,
    progress: Progress,
    what: str,
    products: npt.NDArray[np.int64] | None = None,
) -> Features:
    """Run the trunk over canvases.

    Args:
        trunk: the shared trunk.
        canvases: uint8 [n, canvas_height, canvas_width, 3] RGB.
        preprocessing: how a canvas is cut into tiles.
        tap_names: which taps to keep, as float16 on the CPU.
        groups: one name per canvas.
        device: where the trunk runs (under autocast on a GPU).
        progress: progress function.
        what: its label.
        products: int64 [n], which product each canvas shows; None where there is one.
    """
    trunk = trunk.to(device, memory_format=torch.channels_last)
    tiles_per_image = preprocessing.tiles.rows * preprocessing.tiles.cols
    kept: dict[str, torch.Tensor] = {}
    step = max(1, _BATCH // tiles_per_image)
    for start in range(0, len(canvases), step):
        batch = np.concatenate([cut_tiles(canvas, preprocessing) for canvas in canvases[start : start + step]])
        with torch.inference_mode(), torch.autocast(device.type, enabled=device.type == "cuda"):
            taps = dict(zip(trunk.tap_names, trunk(torch.from_numpy(batch).to(device)), strict=True))
        for name in tap_names:
            tap = taps[name].to("cpu", torch.float16)
            if name not in kept:
                # Allocated once: a list of batches would need twice the memory when it is joined.
                kept[name] = torch.empty((len(canvases) * tiles_per_image, *tap.shape[1:]), dtype=torch.float16)
            kept[name][start * tiles_per_image : start * tiles_per_image + len(batch)] = tap
        progress(what, min(start + step, len(canvases)), len(canvases))
    shown = None if products is None else torch.from_numpy(np.repeat(products, tiles_per_image))
    return Features(taps=kept, tiles_per_image=tiles_per_image, groups=groups, products=shown)
