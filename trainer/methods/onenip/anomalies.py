"""Pseudo anomalies for restoring and refining: pieces pasted about (CutPaste) and foreign texture under noise (DRAEM).

Pictures in, pictures with masks out; it must not know features. Textures come from other training images and from
noise, since no set of textures is shipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from trainer.synthesis.noise import fractal, perlin

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Picture = npt.NDArray[np.uint8]
    Mask = npt.NDArray[np.bool_]

PAPER_SIDE = 224
"""Pixels; lengths of scars are the paper's for a picture of this side and grow with it."""

_PATCH_AREA, _PATCH_ASPECT = (0.02, 0.15), (0.3, 3.3)
_SCAR_WIDTH, _SCAR_LENGTH, _SCAR_TURN = (2, 16), (10, 25), 45.0
_JITTER, _HUE = 0.4, 0.1
_OCTAVES = (1, 5)  # cells of the noise are powers of two
# The original scales its noise by the root of 2 and takes what is above a half.
_TURN, _LEVEL, _MOST_BLEND = 5.0, 0.5 / 2**0.5, 0.8
_LEAST_CHANGE = 6.0  # grey levels, as a mean over the mask: what nobody can see is no anomaly
_ATTEMPTS = 8
_GREY = 3.0  # grey levels between channels, as JPEG leaves them in grey pictures


def pseudo_anomaly(image: Picture, others: Picture, rng: np.random.Generator) -> tuple[Picture, Mask]:
    """Return a good picture with one pseudo anomaly, and where that is.

    By equal chance a piece of the picture itself is pasted elsewhere (a patch or a scar, by equal chance), or a foreign
    texture is blended in where noise is high.

    Args:
        image: uint8 [H, W, 3] RGB, both sides at least 16; not changed.
        others: uint8 [m, H', W', 3], pictures to take texture from, of other products where there are any; m may be 0.
        rng: source of all choices.

    Returns:
        uint8 [H, W, 3] and bool [H, W], never empty; outside of it nothing is changed.
    """
    ways: tuple[Callable[[], tuple[Picture, Mask]], ...] = (
        lambda: cut_patch(image, rng),
        lambda: cut_scar(image, rng),
        lambda: blend_texture(image, others, rng),
        lambda: blend_texture(image, others, rng),
    )
    for _ in range(_ATTEMPTS):
        made, mask = ways[int(rng.integers(len(ways)))]()
        if mask.any() and np.abs(made[mask].astype(np.int16) - image[mask]).mean() >= _LEAST_CHANGE:
            return made, mask
    # A picture of one shade: there is nothing to paste that would show, so a patch of it is made darker or lighter.
    made, mask = cut_patch(image, rng)
    made[mask] = np.where(made[mask] < 128, made[mask] + 60, made[mask] - 60)  # noqa: PLR2004 (middle of the scale)
    return made, mask


def cut_patch(image: Picture, rng: np.random.Generator) -> tuple[Picture, Mask]:
    """Paste a jittered rectangle from elsewhere in the picture (CutPaste, Li et al., CVPR 2021)."""
    height, width = image.shape[:2]
    area = rng.uniform(*_PATCH_AREA) * height * width
    # By equal chance upright or lying, and evenly within each, as in the original.
    aspect = rng.uniform(_PATCH_ASPECT[0], 1) if rng.random() < 0.5 else rng.uniform(1, _PATCH_ASPECT[1])  # noqa: PLR2004
    h = int(np.clip(round((area / aspect) ** 0.5), 1, height))
    w = int(np.clip(round((area * aspect) ** 0.5), 1, width))
    return _paste(image, _piece(image, h, w, rng), np.ones((h, w), np.bool_), rng)


def cut_scar(image: Picture, rng: np.random.Generator) -> tuple[Picture, Mask]:
    """Paste a jittered thin strip from elsewhere in the picture, turned (the scar of CutPaste)."""
    share = min(image.shape[:2]) / PAPER_SIDE
    w, h = (max(2, round(share * rng.uniform(*span))) for span in (_SCAR_WIDTH, _SCAR_LENGTH))
    piece = _piece(image, min(h, image.shape[0]), min(w, image.shape[1]), rng)
    (h, w), angle = piece.shape[:2], rng.uniform(-_SCAR_TURN, _SCAR_TURN)
    cos, sin = abs(np.cos(np.deg2rad(angle))), abs(np.sin(np.deg2rad(angle)))
    tall = min(image.shape[0], int(np.ceil(h * cos + w * sin)))
    wide = min(image.shape[1], int(np.ceil(w * cos + h * sin)))
    turn = cv2.getRotationMatrix2D(((w - 1) / 2, (h - 1) / 2), angle, 1.0)
    turn[:, 2] += ((wide - w) / 2, (tall - h) / 2)
    shape = cv2.warpAffine(np.ones((h, w), np.uint8), turn, (wide, tall), flags=cv2.INTER_NEAREST)
    turned = cv2.warpAffine(piece, turn, (wide, tall), borderMode=cv2.BORDER_REPLICATE)
    return _paste(image, np.asarray(turned, np.uint8), shape.astype(np.bool_), rng)


def blend_texture(image: Picture, others: Picture, rng: np.random.Generator) -> tuple[Picture, Mask]:
    """Blend a foreign texture in where Perlin noise is high (DRAEM, Zavrtanik et al., ICCV 2021)."""
    shape = image.shape[:2]
    cells = tuple(2.0 ** rng.integers(_OCTAVES[0], _OCTAVES[1] + 1, 2))
    field = perlin(shape, (float(cells[0]), float(cells[1])), rng)
    turn = cv2.getRotationMatrix2D((shape[1] / 2, shape[0] / 2), rng.uniform(-_TURN, _TURN), 1.0)
    field = cv2.warpAffine(field, turn, shape[::-1], borderMode=cv2.BORDER_REFLECT_101)
    mask = np.asarray(field > _LEVEL)
    texture = foreign_texture(shape, others, rng).astype(np.float32)
    if np.ptp(image.astype(np.int16), axis=2).mean() < _GREY:
        texture[:] = texture.mean(2, keepdims=True)  # a colour on a grey product would be told by its colour alone
    kept = rng.uniform(0, _MOST_BLEND)
    blended = np.rint((1 - kept) * texture + kept * image).astype(np.uint8)
    return np.where(mask[..., None], blended, image), mask


def foreign_texture(shape: tuple[int, int], others: Picture, rng: np.random.Generator) -> Picture:
    """Return a picture uint8 [H, W, 3] to take texture from: another one, changed three times, or noise."""
    if not len(others) or rng.random() < 0.25:  # noqa: PLR2004 (a quarter)
        cells = 2.0 ** rng.uniform(1, 5)
        field = np.stack([fractal(shape, (cells, cells), rng, 3) for _ in range(3)], 2)
        mixed = field @ rng.uniform(-1, 1, (3, 3)).astype(np.float32)
        return np.asarray(np.clip(128 + rng.uniform(40, 140) * mixed + rng.uniform(-60, 60, 3), 0, 255), np.uint8)
    taken = others[int(rng.integers(len(others)))]
    # A piece of it, so that the part itself is not to be recognised.
    h, w = (max(1, round(side * rng.uniform(0.4, 1.0))) for side in taken.shape[:2])
    texture = np.asarray(cv2.resize(_piece(taken, h, w, rng), shape[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
    for change in rng.choice(len(_CHANGES), 3, replace=False):
        texture = _CHANGES[change](texture, rng)
    return texture


def _piece(image: Picture, h: int, w: int, rng: np.random.Generator) -> Picture:
    y, x = rng.integers(0, image.shape[0] - h + 1), rng.integers(0, image.shape[1] - w + 1)
    return image[y : y + h, x : x + w]


def _paste(image: Picture, piece: Picture, shape: Mask, rng: np.random.Generator) -> tuple[Picture, Mask]:
    h, w = shape.shape
    y, x = rng.integers(0, image.shape[0] - h + 1), rng.integers(0, image.shape[1] - w + 1)
    made, mask = image.copy(), np.zeros(image.shape[:2], np.bool_)
    mask[y : y + h, x : x + w] = shape
    made[mask] = _jittered(piece, rng)[shape]
    return made, mask


def _jittered(piece: Picture, rng: np.random.Generator) -> Picture:
    """Change brightness, contrast, saturation and hue, as torchvision's ColorJitter does."""
    brightness, contrast, saturation = rng.uniform(1 - _JITTER, 1 + _JITTER, 3)
    values = np.clip(piece.astype(np.float32) * brightness, 0, 255)
    grey = values @ np.array([0.299, 0.587, 0.114], np.float32)
    values = np.clip(contrast * values + (1 - contrast) * grey.mean(), 0, 255)
    values = np.clip(saturation * values + (1 - saturation) * grey[..., None], 0, 255)
    return _turned_hue(values.astype(np.uint8), rng.uniform(-_HUE, _HUE))


def _turned_hue(image: Picture, turn: float) -> Picture:
    colours = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    colours[..., 0] += np.uint8(round(turn * 256) % 256)  # a whole turn is 256 and wraps
    return np.asarray(cv2.cvtColor(colours, cv2.COLOR_HSV2RGB_FULL), np.uint8)


def _gamma(image: Picture, rng: np.random.Generator) -> Picture:
    table = np.rint(255 * (np.arange(256) / 255) ** rng.uniform(0.5, 2.0)).astype(np.uint8)
    return np.asarray(table[image])


def _brightness(image: Picture, rng: np.random.Generator) -> Picture:
    changed = image * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30, 3)
    return np.asarray(np.clip(changed, 0, 255), np.uint8)


def _sharpened(image: Picture, _: np.random.Generator) -> Picture:
    blurred = cv2.GaussianBlur(image, (0, 0), 2.0)
    return np.asarray(cv2.addWeighted(image, 2.0, blurred, -1.0, 0), np.uint8)


def _solarised(image: Picture, rng: np.random.Generator) -> Picture:
    return np.where(image >= rng.integers(32, 129), 255 - image, image)


def _posterised(image: Picture, rng: np.random.Generator) -> Picture:
    return np.asarray(image & np.uint8(0xFF << int(rng.integers(3, 6)) & 0xFF))


def _inverted(image: Picture, _: np.random.Generator) -> Picture:
    return 255 - image


def _stretched(image: Picture, _: np.random.Generator) -> Picture:
    low, high = image.min((0, 1)).astype(np.float32), image.max((0, 1)).astype(np.float32)
    return np.asarray((image - low) * (255 / np.maximum(high - low, 1)), np.uint8)


def _turned(image: Picture, rng: np.random.Generator) -> Picture:
    turned = np.rot90(image, int(rng.integers(0, 3)) + 1)
    return np.asarray(cv2.resize(np.ascontiguousarray(turned), image.shape[1::-1]), np.uint8)


def _recoloured(image: Picture, rng: np.random.Generator) -> Picture:
    return _turned_hue(image, rng.uniform(-0.5, 0.5))


_CHANGES = (_gamma, _brightness, _sharpened, _solarised, _posterised, _inverted, _stretched, _turned, _recoloured)
