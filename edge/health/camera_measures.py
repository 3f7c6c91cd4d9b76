"""What one frame tells of its camera: brightness, clipping, sharpness, and samples to compare it with others.

Pure functions of pixels; they must not know products, time or what is normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Image = npt.NDArray[np.uint8]

THUMB_WIDTH = 240
STRIPS = 24
# Every so many samples of a strip stand for its pixels when frames are compared.
POINT_STEP = 5
# At or beyond these a sensor or its gamma clips, and noise is cut off.
LOW_CLIP, HIGH_CLIP = 4, 251
GREEN = 1
# An edge is seen over this many pixels to each side of a point.
REACH = 12
EDGES = 256
# Pixels over which noise is measured, and the largest of 23 differences of neighbours in units of its sigma.
BLOCK = 32
NOISE_PEAK = 3.1
# Edges of less contrast, in units of the noise's sigma, say more of the noise than of the lens.
ABOVE_NOISE = 8.0
# Grey levels: weaker edges are texture or noise.
MIN_CONTRAST = 16.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A frame made small.

    Attributes:
        thumb: luma uint8 [h, w], about 240 wide; each row is the mean along one row of pixels.
        strips: green channel uint8 [24, W] of single rows, as the sensor gave them.
        scale: camera pixels per thumb pixel.
        frame_shape: (H, W) of the frame.
    """

    thumb: Image
    strips: Image
    scale: float
    frame_shape: tuple[int, int]


def take_sample(image: Image) -> Sample:
    """Make a frame small; copies what it keeps.

    Args:
        image: uint8 [H, W, 3] BGR.
    """
    height, width = image.shape[:2]
    factor = max(1, round(width / THUMB_WIDTH))
    size = (max(1, width // factor), max(1, height // factor))
    # The mean along a row hides noise and the finest texture well enough; all rows would cost as many times more.
    small = cv2.resize(image[factor // 2 :: factor], size, interpolation=cv2.INTER_AREA)
    thumb = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY)
    rows = np.linspace(0, height - 1, min(STRIPS, height) + 2).astype(int)[1:-1]
    return Sample(thumb, np.ascontiguousarray(image[rows, :, GREEN]), width / size[0], (height, width))


def points(sample: Sample) -> Image:
    """Return pixels as the sensor gave them, uint8 [n], at the same places in every frame."""
    return np.ascontiguousarray(sample.strips[:, ::POINT_STEP]).ravel()


def share_changed(one: Image, other: Image) -> float | None:
    """Return the share of points that differ, of those that neither frame clips; None where nearly all are clipped."""
    lively = (one > LOW_CLIP) & (one < HIGH_CLIP) & (other > LOW_CLIP) & (other < HIGH_CLIP)
    count = int(np.count_nonzero(lively))
    if count < max(16, one.size // 50):
        return None
    return float(np.count_nonzero((one != other) & lively)) / count


def brightness(sample: Sample) -> tuple[float, float]:
    """Return the mean and the 99th percentile of the thumb's luma, 0 to 255.

    The mean and not the median: where a picture has bright and dark halves, the median jumps with the size of a part.
    """
    counts = np.bincount(sample.thumb.ravel(), minlength=256)
    high = np.searchsorted(np.cumsum(counts), 0.99 * sample.thumb.size)
    return float(sample.thumb.mean()), float(high)


def share_clipped(sample: Sample) -> float:
    """Return the share of pixels at the top of their range."""
    return float(np.count_nonzero(sample.strips >= HIGH_CLIP)) / sample.strips.size


def sharpness(sample: Sample) -> float | None:
    """Return how steep the strongest edges are, 0 to about 1: 1 for a step within one pixel.

    The steepest rise over 2 pixels over the whole rise within 25, median of the 256 strongest edges along the strips. A
    ratio, so neither contrast nor light matters; edges far above the noise, so that noise does not stand for detail as
    it does in the variance of a Laplacian. Edges along the picture's rows are not seen.

    Returns:
        None where there are fewer than 32 edges of at least 16 grey levels.
    """
    rows = sample.strips.astype(np.float32)
    if rows.shape[1] < 4 * REACH:
        return None
    total = np.cumsum(rows, axis=1)
    mean = (total[:, REACH:] - total[:, :-REACH]) / REACH  # mean[i]: pixels i + 1 .. i + REACH
    coarse = np.abs(mean[:, REACH + 1 :] - mean[:, : -REACH - 1])  # around pixel i + REACH + 1, which is in neither
    fine = cv2.absdiff(rows[:, 2:], rows[:, :-2])  # around pixel i + 1
    # The steepest place of an edge may be anywhere in its rise.
    steepest = cv2.dilate(fine, np.ones((1, 2 * REACH - 1), np.uint8))[:, REACH : REACH + coarse.shape[1]]
    flat = coarse.ravel()
    count = min(EDGES, flat.size)
    strongest = np.argpartition(flat, flat.size - count)[-count:]
    noise = _noise(fine)
    strong = strongest[flat[strongest] >= max(MIN_CONTRAST, ABOVE_NOISE * noise)]
    if strong.size < EDGES // 8:
        return None
    # Noise makes the steepest of 23 differences steeper; without this a heavy blur of a soft picture goes unseen.
    power = np.maximum(steepest.ravel()[strong] ** 2 - (NOISE_PEAK * noise) ** 2, 0)
    return float(np.median(np.sqrt(power) / flat[strong]))


def _noise(differences: npt.NDArray[np.float32]) -> float:
    """Return sigma of the noise from differences of neighbours, where the picture is flattest."""
    width = differences.shape[1] // BLOCK * BLOCK
    blocks = differences[:, :width].reshape(-1, BLOCK)
    power = np.einsum("ij,ij->i", blocks, blocks) / BLOCK
    flattest = np.partition(power, len(power) // 10)[len(power) // 10]
    return float(np.sqrt(flattest / 2))
