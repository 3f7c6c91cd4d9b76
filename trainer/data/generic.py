"""The fixed generic set that the shared trunk is quantised on: photographs that ship with scikit-image.

It must never contain a product's images: a trunk is quantised once, for all products.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from edge.errors import MissingExtraError
from trainer.data.images import load_image

_PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)
_CROPS_EACH = 6
_SMALLEST_CROP = 96


def photograph_folder() -> Path:
    """Return the folder of photographs inside the scikit-image wheel; nothing is downloaded.

    Raises:
        MissingExtraError: scikit-image is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingExtraError("scikit-image is not installed: pip install 'lineward[trainer]'")
    return Path(spec.origin).parent / "data"


def generic_canvases(side: int = 224) -> npt.NDArray[np.uint8]:
    """Return crops of every photograph at mixed scales, a third of them dimmed, brightened or blurred.

    Args:
        side: height and width in pixels, a multiple of 32.

    Returns:
        uint8 [96, side, side, 3] RGB, the same at every call.
    """
    rng = np.random.default_rng(20240229)
    crops = []
    for name in _PHOTOGRAPHS:
        image = load_image(photograph_folder() / name)[:, :, ::-1]
        for index in range(_CROPS_EACH):
            size = int(rng.integers(_SMALLEST_CROP, min(image.shape[:2]) + 1))
            y, x = (int(rng.integers(0, extent - size + 1)) for extent in image.shape[:2])
            crop = cv2.resize(image[y : y + size, x : x + size], (side, side), interpolation=cv2.INTER_LINEAR)
            if index % 6 == 1:
                crop = cv2.convertScaleAbs(crop, alpha=float(rng.uniform(0.3, 0.7)))
            elif index % 6 == 3:  # noqa: PLR2004 (every sixth, offset)
                crop = cv2.convertScaleAbs(crop, alpha=float(rng.uniform(1.3, 1.8)), beta=20)
            crops.append(crop)
    return np.stack(crops)
