"""Where the part is, as far as good images alone can tell: not on a backdrop that is plain and always the same.

It must not know defects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_PLAIN = 2.0  # grey levels of deviation in a neighbourhood, mean over images: a backdrop out of focus, sensor noise
_STILL = 2.0  # grey levels that a neighbourhood's mean deviates from image to image
_LEAST, _MOST = 0.05, 0.9  # shares of the picture; less is not worth it, more leaves too little part to trust
_BORDER = 0.25  # a backdrop surrounds the part: share of the picture's border that it covers
_FEWEST = 4  # images; below that nothing is known of what varies


def foreground(canvases: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_] | None:
    """Find where the part may lie in pictures from one fixed camera.

    A backdrop is plain, the same in all images, joined to the border of the picture, and surrounds the part. A part
    that moves counts wherever it was seen.

    Args:
        canvases: uint8 [n, H, W, 3], good images.

    Returns:
        bool [H, W], True where a defect could be on the part; None where no backdrop can be told from it (a surface
        that fills the picture, fewer than 4 images, light that changes).
    """
    if len(canvases) < _FEWEST:
        return None
    side = max(3, min(canvases.shape[1:3]) // 25 | 1)
    count, first, second = 0, 0.0, 0.0
    rough = np.zeros(canvases.shape[1:3], np.float64)
    for canvas in canvases:
        grey = canvas.mean(axis=2, dtype=np.float32)
        mean = cv2.blur(grey, (side, side))
        rough += np.sqrt(np.maximum(cv2.blur(grey * grey, (side, side)) - mean * mean, 0))
        count, first, second = count + 1, first + mean.astype(np.float64), second + mean.astype(np.float64) ** 2
    moves = np.sqrt(np.maximum(second / count - (first / count) ** 2, 0))
    plain = (rough / count < _PLAIN) & (moves < _STILL)
    _, labels = cv2.connectedComponents(plain.astype(np.uint8), connectivity=4)
    rim = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    backdrop = np.isin(labels, np.unique(rim[rim > 0]))
    if not _LEAST <= backdrop.mean() <= _MOST or (rim > 0).mean() < _BORDER:
        return None
    return ~backdrop
