"""Put synthetic defects on images of good parts, with their exact masks.

It decides where, how large and how visible; what a defect looks like is the families' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError
from trainer.synthesis.families import BY_NAME, FAMILIES, Site
from trainer.synthesis.strokes import draw_box

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

__all__ = ["BY_NAME", "CONTRASTS", "FAMILIES", "SIZE_RANGE", "Defect", "make_defects", "synthesise"]

SIZE_RANGE = (0.01, 0.25)
"""Extent of defects as a share of the image diagonal: from pits and cracks of a few pixels to large stains."""

SMALLEST_SIDE = 16
"""Pixels; a smaller image is no view of a part."""

CONTRASTS = (0.5, 0.75, 1.0)
"""What a contrast is drawn from where none is given."""

_LEAST_BOX = 3  # pixels; below it no shape is left
_MASK_FLOOR = 0.2  # of full opacity; fainter rims are neither drawn nor labelled
_LEAST_CHANGE = 12.0  # grey levels at contrast 1, as a mean over the mask
_TEXTURE_SHARE = 0.5  # a change must also reach this share of the texture's own deviation
_GREY_TOLERANCE = 3.0  # grey levels between channels, as JPEG leaves them in grey pictures


@dataclass(frozen=True)
class Defect:
    """An image with one defect.

    Attributes:
        image: uint8 [H, W, 3], as the input outside ``mask``, bit for bit.
        mask: bool [H, W], never empty; at contrast 1 exactly the changed pixels, below it a superset of them that
            does not depend on the contrast.
        family: one of ``BY_NAME``.
        contrast: as asked for.
    """

    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    family: str
    contrast: float


def synthesise(
    image: npt.NDArray[np.uint8],
    *,
    rng: np.random.Generator,
    family: str | None = None,
    contrast: float = 1.0,
    size: tuple[float, float] = SIZE_RANGE,
    where: npt.NDArray[np.bool_] | None = None,
) -> Defect:
    """Put one defect on a good image.

    The extent is drawn log-uniformly from ``size``, the place uniformly, or with its middle in ``where``. Contrast
    scales the change of each pixel and nothing else: one generator state gives the same mask at every contrast. Grey
    images get grey defects.

    Args:
        image: uint8 [H, W, 3], both sides at least 16; not changed.
        rng: source of all choices.
        family: one of ``BY_NAME``; None draws one of ``FAMILIES``.
        contrast: in (0, 1]; 1 is plainly visible, small values are hard to see.
        size: smallest and largest extent as shares of the image diagonal, 0 < smallest <= largest <= 1.
        where: bool [H, W], not empty, such as :func:`trainer.synthesis.foreground.foreground` gives; None is anywhere.
            Near the border of the picture the box is moved inside, and its middle with it.

    Returns:
        The changed copy with its mask.

    Raises:
        DataError: the image is not uint8 [H, W, 3] or too small.
        ValueError: ``family``, ``contrast``, ``size`` or ``where`` is out of range.
    """
    _refuse(image, family, contrast, size, where)
    name = family if family is not None else list(FAMILIES)[int(rng.integers(len(FAMILIES)))]
    top, left, h, w = draw_box(image.shape[:2], rng, size, least=_LEAST_BOX, where=where)
    box = (slice(top, top + h), slice(left, left + w))
    patch = image[box].astype(np.float32)
    shape, content = BY_NAME[name](Site(image, patch, _is_grey(image), rng))
    shape, inside = _label(shape)
    full = _apply(patch, shape, content, inside)
    changed = np.rint(patch + contrast * (full - patch)).astype(np.uint8)
    out, mask = image.copy(), np.zeros(image.shape[:2], np.bool_)
    out[box] = changed
    mask[box] = inside
    return Defect(out, mask, name, contrast)


def make_defects(
    canvases: npt.NDArray[np.uint8],
    *,
    seed: int,
    contrast: float | None = None,
    repeats: int = 1,
    size: tuple[float, float] = SIZE_RANGE,
    defects: int = 1,
    families: Sequence[str] | None = None,
    where: npt.NDArray[np.bool_] | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Synthesise defects on every canvas, ``repeats`` times.

    Args:
        canvases: uint8 [n, H, W, 3].
        seed: the same seed gives the same defects in the same places at every contrast.
        contrast: in (0, 1]; None draws from a fixed set.
        repeats: defective copies of each canvas.
        size: smallest and largest extent of a defect, as shares of the diagonal.
        defects: defects on each copy.
        families: names to take in turns, of ``BY_NAME``; None draws from ``FAMILIES``.
        where: bool [H, W], where the middles of defects may be; None is anywhere.

    Returns:
        uint8 [repeats * n, H, W, 3] and their masks bool [repeats * n, H, W].
    """
    images = np.empty((repeats * len(canvases), *canvases.shape[1:]), np.uint8)
    masks = np.empty(images.shape[:3], np.bool_)
    for index in range(len(images)):
        rng = np.random.default_rng((seed, index))
        drawn = float(rng.choice(CONTRASTS))  # always drawn, so that what follows is the same at every contrast
        strength = drawn if contrast is None else contrast
        images[index], masks[index] = canvases[index % len(canvases)], False
        for number in range(defects):
            family = None if families is None else families[(index * defects + number) % len(families)]
            defect = synthesise(images[index], rng=rng, family=family, contrast=strength, size=size, where=where)
            images[index] = defect.image
            masks[index] |= defect.mask
    return images, masks


def _refuse(
    image: npt.NDArray[np.uint8],
    family: str | None,
    contrast: float,
    size: tuple[float, float],
    where: npt.NDArray[np.bool_] | None,
) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:  # noqa: PLR2004
        raise DataError(f"image is {image.dtype} {image.shape}, expected uint8 [H, W, 3]; convert it to 8-bit colour")
    if min(image.shape[:2]) < SMALLEST_SIDE:
        raise DataError(
            f"image is {image.shape[1]}x{image.shape[0]}, too small for a defect; give at least {SMALLEST_SIDE} pixels"
        )
    if family is not None and family not in BY_NAME:
        raise ValueError(f"unknown family {family!r}; known are {', '.join(BY_NAME)}")
    if not 0 < contrast <= 1:
        raise ValueError(f"contrast {contrast} is outside (0, 1]")
    if not 0 < size[0] <= size[1] <= 1:
        raise ValueError(f"size {size} must be 0 < smallest <= largest <= 1")
    if where is not None and (where.shape != image.shape[:2] or not where.any()):
        raise ValueError(f"where is {list(where.shape)}, expected {list(image.shape[:2])} with a place in it")


def _is_grey(image: npt.NDArray[np.uint8]) -> bool:
    """Compare channels on at most some 64 thousand pixels."""
    step = max(1, int((image.shape[0] * image.shape[1] / 65536) ** 0.5))
    seen = image[::step, ::step].astype(np.int16)
    return bool(np.mean(seen.max(axis=2) - seen.min(axis=2)) < _GREY_TOLERANCE)


def _label(shape: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    inside = shape >= _MASK_FLOOR
    if not inside.any():  # a shape smaller than a pixel: keep its strongest one
        shape = shape.copy()
        peak = np.unravel_index(int(np.argmax(shape)), shape.shape)
        shape[peak] = 1.0
        inside = shape >= _MASK_FLOOR
    return np.asarray((shape - _MASK_FLOOR / 2) / (1 - _MASK_FLOOR / 2), dtype=np.float32), inside


def _apply(
    patch: npt.NDArray[np.float32],
    shape: npt.NDArray[np.float32],
    content: npt.NDArray[np.float32],
    inside: npt.NDArray[np.bool_],
) -> npt.NDArray[np.float32]:
    """Return the patch at contrast 1, in whole grey levels, different from ``patch`` at every pixel inside.

    Content that happens to look like what it covers (a flat surface blurred, a copy of the same texture) is
    strengthened, and where there is nothing to strengthen, shifted towards the middle of the scale.
    """
    opacity = np.where(inside, shape, 0)[..., None]
    wanted = max(_LEAST_CHANGE, _TEXTURE_SHARE * float(patch.std(axis=(0, 1)).mean()))
    delta = opacity * (content - patch)
    full = np.clip(patch + delta, 0, 255)
    reached = float(np.abs(full - patch).max(axis=2)[inside].mean())
    if reached < wanted:
        full = np.clip(patch + delta * min(wanted / max(reached, 1e-3), 4.0), 0, 255)
        reached = float(np.abs(full - patch).max(axis=2)[inside].mean())
    if reached < _LEAST_CHANGE / 2:
        towards = 1.0 if float(patch.mean()) < 128 else -1.0  # noqa: PLR2004 (middle of the scale)
        full = np.clip(full + towards * 2 * _LEAST_CHANGE * opacity, 0, 255)
    full = np.rint(full)
    same = inside & (full == patch).all(axis=2)
    full[same] += np.where(patch[same] < 128, 1, -1)  # noqa: PLR2004
    return np.asarray(full, dtype=np.float32)
