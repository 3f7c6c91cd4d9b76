"""MomentCorrection: gives what a camera shows now the moments of what an expert was trained on.

An affine map per channel of the canvas and of each tap, and a gain of the canvas's finest detail. It must not know how
moments are followed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from edge.adaptation.measure import blurred, measure_canvas, measure_taps
from edge.adaptation.moments import DETAIL, IMAGE

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.adaptation.look import Taps
    from edge.adaptation.moments import Moments

    Vector = npt.NDArray[np.float32]

SCALE_LIMIT = 2.0
"""Largest ratio of deviations that is corrected, and its inverse the smallest: a channel that went silent, or a flat
image, must not be blown up to what its noise is not. On generated cloth under blur and noise, limits of 1.5, 2 and 4
gave the same scores."""
SHARPEN_LIMIT = 3.0
"""Largest gain of the finest detail, and its inverse the smallest. Reached by a Gaussian blur of about 1 pixel."""
# The filter takes away a part of each wave length, so that the detail measured changes by half of what its gain does.
# On generated metal and wafers 2 gave no more false alarms under blur than 3 did; a 5 x 5 filter was no better in all.
_SHARPEN_SLOPE = 2.0
# Below it nothing would be seen of it but its cost.
_SHARPEN_LEAST = 0.02
_LEAST_GREY, _LEAST_SHARE, _LEAST_DETAIL, _TINY = 1.0, 0.01, 1e-3, 1e-6


class MomentCorrection:
    """The correction from some moments to others. Immutable, safe to share between threads.

    Names that one of the two lacks are left as they are. Where both are equal, every bit stays as it was.

    Args:
        now: what the camera shows; of taps behind the correction of the canvas.
        reference: what is wanted.
        own: share, 0..1, of each frame's own moments in those that it is corrected from; the rest is ``now``.
    """

    def __init__(self, now: Moments, reference: Moments, own: float = 0.0) -> None:
        self._now, self._reference, self._own = now, reference, own
        common = [name for name in reference.mean if name in now.mean]
        self._names = tuple(name for name in common if name not in {IMAGE, DETAIL})
        self._corrects_detail = DETAIL in common
        self._sharpen = self._sharpening(now.std[DETAIL]) if self._corrects_detail else 1.0
        self._corrects_image = IMAGE in common
        self._table = self._table_from(now.mean[IMAGE], now.std[IMAGE]) if self._corrects_image else None
        self._affine = {name: self._affine_from(name, now.mean[name], now.std[name]) for name in self._names}

    def canvas(self, tiles: npt.NDArray[np.uint8]) -> None:
        """Correct tiles in place, before the trunk.

        Args:
            tiles: contiguous uint8 [T, H, W, 3] RGB.
        """
        table, sharpen = self._table, self._sharpen
        if self._own and (self._corrects_image or self._corrects_detail):
            mine = measure_canvas(tiles)
            if self._corrects_image:
                table = self._table_from(*self._mixed(IMAGE, mine))
            if self._corrects_detail:
                sharpen = self._sharpening(self._mixed(DETAIL, mine)[1])
        if table is not None:
            rows = tiles.reshape(-1, tiles.shape[2], 3)
            cv2.LUT(rows, table, dst=rows)
        if abs(sharpen - 1) >= _SHARPEN_LEAST:
            for tile in tiles:
                cv2.addWeighted(tile, sharpen, blurred(tile), 1 - sharpen, 0, dst=tile)

    def taps(self, taps: Taps, *, in_place: bool = False) -> Taps:
        """Return taps corrected, before the head.

        Args:
            taps: float32 [T, C, h, w] by name.
            in_place: write into the arrays given, which are then those returned.
        """
        affine = self._affine
        if self._own:
            mine = measure_taps({name: taps[name] for name in self._names if name in taps})
            affine = {name: self._affine_from(name, *self._mixed(name, mine)) for name in mine.mean}
        found = dict(taps)
        for name, pair in affine.items():
            if pair is None or name not in taps:
                continue
            gain, offset = pair
            target = np.multiply(taps[name], gain, out=taps[name] if in_place else None)
            target += offset
            found[name] = target
        return found

    def _mixed(self, name: str, mine: Moments) -> tuple[Vector, Vector]:
        own, now = np.float32(self._own), self._now
        mean = now.mean[name] + own * (mine.mean[name] - now.mean[name])
        return mean, now.std[name] + own * (mine.std[name] - now.std[name])

    def _sharpening(self, detail: Vector) -> float:
        ratio = max(float(self._reference.std[DETAIL][0]), _LEAST_DETAIL) / max(float(detail[0]), _LEAST_DETAIL)
        return min(max(1 + _SHARPEN_SLOPE * (ratio - 1), 1 / SHARPEN_LIMIT), SHARPEN_LIMIT)

    def _table_from(self, mean: Vector, std: Vector) -> npt.NDArray[np.uint8] | None:
        gain, offset = self._gain_and_offset(IMAGE, mean, std, _LEAST_GREY)
        levels = np.arange(256, dtype=np.float32)[:, np.newaxis]
        table = np.clip(np.rint(levels * gain + offset), 0, 255).astype(np.uint8)
        return None if (table == levels).all() else table[np.newaxis]

    def _affine_from(self, name: str, mean: Vector, std: Vector) -> tuple[Vector, Vector] | None:
        least = max(_LEAST_SHARE * float(np.median(self._reference.std[name])), _TINY)
        gain, offset = self._gain_and_offset(name, mean, std, least)
        if (gain == 1).all() and (offset == 0).all():
            return None
        return gain[:, np.newaxis, np.newaxis], offset[:, np.newaxis, np.newaxis]

    def _gain_and_offset(self, name: str, mean: Vector, std: Vector, least: float) -> tuple[Vector, Vector]:
        wanted = np.maximum(self._reference.std[name], np.float32(least))
        gain = np.clip(wanted / np.maximum(std, np.float32(least)), 1 / SCALE_LIMIT, SCALE_LIMIT).astype(np.float32)
        return gain, (self._reference.mean[name] - mean * gain).astype(np.float32)
