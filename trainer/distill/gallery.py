"""The pictures that teacher and student look at: the same parts, defects and light at every input size.

Defects are drawn once, at the largest size, and carried to the others as differences, so that a small input shows
what a large one shows and no size has easier defects. It must not know networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch.nn import functional

from trainer.features import load_canvases
from trainer.synthesis.image2d import synthesise

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Preprocessing
    from trainer.data.folder import Sample

    Canvases = npt.NDArray[np.uint8]

LEARNED = ("perlin", "cut_paste", "scratch", "stain", "missing")
"""Kinds of defects that the branch learns from."""
UNSEEN = ("scar", "crack", "smear", "spot", "warp")
"""Kinds that everything is chosen on: what is as good on them has learned more than five recipes."""
_CONTRASTS, _VALIDATION_CONTRASTS = (0.25, 0.5, 0.75, 1.0), (0.5, 0.75, 1.0)
_LIGHT = (0.9, 1.1)
_VALIDATION_DEFECTS = 120
_LESSON_SEED = 104_729  # apart from the seeds of the validation set's defects


@dataclass(frozen=True)
class Views:
    """All pictures at one size, uint8 [n, canvas_height, canvas_width, 3] RGB.

    Attributes:
        good: images to learn from.
        relit: copies of them under another light.
        defective: copies of them with synthetic defects.
        holdout: good images that nothing is fitted on.
        spoiled: the hold-out with synthetic defects of unseen kinds, for validation.
    """

    good: Canvases
    relit: Canvases
    defective: Canvases
    holdout: Canvases
    spoiled: Canvases

    def lesson(self) -> Canvases:
        """Return what the branch learns from: good, relit, defective, in this order."""
        return np.concatenate([self.good, self.relit, self.defective])


class Gallery:
    """Pictures of one product.

    Args:
        fit: samples to learn from.
        holdout: samples held out.
        largest: preprocessing at which defects are drawn.
        seed: of defects and light.
        relit: how many copies under another light.
        defects: how many defective copies.
        progress: progress function.

    Attributes:
        masks: bool [defects, H, W] of the defective copies, at the largest size.
        spoiled_masks: bool [m, H, W] of the hold-out's.
        repeats: defective copies of each held-out image.
    """

    def __init__(
        self,
        fit: Sequence[Sample],
        holdout: Sequence[Sample],
        largest: Preprocessing,
        *,
        seed: int,
        relit: int,
        defects: int,
        progress: Progress,
    ) -> None:
        self._fit, self._holdout, self._largest, self._progress = tuple(fit), tuple(holdout), largest, progress
        good, held = self._load(largest, progress)
        self._good = len(good)
        rng = np.random.default_rng((seed, _LESSON_SEED))
        self._relit_of = np.arange(relit) % len(good)
        self._light = rng.uniform(*_LIGHT, (relit, 1, 1, 1)).astype(np.float32)
        self._spoilt_of = np.arange(defects) % len(good)
        images, self.masks = _defects(good[self._spoilt_of], LEARNED, _CONTRASTS, (seed, _LESSON_SEED))
        self.repeats = max(1, round(_VALIDATION_DEFECTS / len(held)))
        many = np.concatenate([held] * self.repeats)
        spoiled, self.spoiled_masks = _defects(many, UNSEEN, _VALIDATION_CONTRASTS, (seed,))
        self._changes = images.astype(np.int16) - good[self._spoilt_of]
        self._held_changes = spoiled.astype(np.int16) - many

    def at(self, preprocessing: Preprocessing, *, progress: Progress | None = None) -> Views:
        """Return all pictures at a size; crop and tiles are those of the largest."""
        good, held = self._load(preprocessing, progress or self._progress)
        relit = np.clip(np.rint(good[self._relit_of] * self._light), 0, 255).astype(np.uint8)
        return Views(
            good=good,
            relit=relit,
            defective=_changed(good[self._spoilt_of], self._changes),
            holdout=held,
            spoiled=_changed(np.concatenate([held] * self.repeats), self._held_changes),
        )

    def lesson_masks(self, size: tuple[int, int]) -> torch.Tensor:
        """Return, per picture of the lesson, the share of each cell that a defect covers, float32 [n, *size]."""
        clean = torch.zeros((self._good + len(self._relit_of), *size))
        covered = functional.interpolate(
            torch.from_numpy(self.masks)[:, None].float(), size=size, mode="bilinear", antialias=True
        )
        return torch.cat([clean, covered[:, 0]])

    def _load(self, preprocessing: Preprocessing, progress: Progress) -> tuple[Canvases, Canvases]:
        what = f"read images at {preprocessing.canvas_height}x{preprocessing.canvas_width}"
        good, held = (
            load_canvases(samples, preprocessing, progress=progress, what=what)
            for samples in (self._fit, self._holdout)
        )
        return good, held


def _defects(
    canvases: Canvases, families: Sequence[str], contrasts: Sequence[float], seed: tuple[int, ...]
) -> tuple[Canvases, npt.NDArray[np.bool_]]:
    """Put one defect on each canvas; kinds and contrasts are drawn."""
    images, masks = np.empty_like(canvases), np.empty(canvases.shape[:3], np.bool_)
    for index, canvas in enumerate(canvases):
        rng = np.random.default_rng((*seed, index))
        family, contrast = str(rng.choice(families)), float(rng.choice(contrasts))
        defect = synthesise(canvas, rng=rng, family=family, contrast=contrast)
        images[index], masks[index] = defect.image, defect.mask
    return images, masks


def _changed(canvases: Canvases, changes: npt.NDArray[np.int16]) -> Canvases:
    size = canvases.shape[1:3]
    out = np.empty_like(canvases)
    for index, (canvas, change) in enumerate(zip(canvases, changes, strict=True)):
        scaled = change if change.shape[:2] == size else cv2.resize(change, size[::-1], interpolation=cv2.INTER_AREA)
        out[index] = np.clip(canvas.astype(np.int16) + scaled, 0, 255)
    return out
