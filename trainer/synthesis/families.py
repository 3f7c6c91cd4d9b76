"""Families of surface defects: what each one looks like inside the box where it happens.

A family turns a site into a shape and what is to be seen there; it must not know contrast, masks or seeds of others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from trainer.synthesis.noise import blob, fractal
from trainer.synthesis.strokes import bezier, ends, jagged, soft_rectangle, stroke

if TYPE_CHECKING:
    import numpy.typing as npt

    Shape = npt.NDArray[np.float32]
    Content = npt.NDArray[np.float32]

_SUBPIXEL_BITS = 4  # cv2 takes coordinates in 1/16 pixel
_DARK, _LIGHT = 60.0, 195.0  # a darker defect on a dark ground, or a lighter one on a light ground, would not show


@dataclass(frozen=True)
class Site:
    """The box of an image where a defect is to be.

    Attributes:
        image: uint8 [H, W, 3], the whole good image; to take texture from, never to change.
        patch: float32 [h, w, 3], the box itself.
        grey: whether the image has no colour, so that the defect may have none.
        rng: source of all choices.
    """

    image: npt.NDArray[np.uint8]
    patch: Content
    grey: bool
    rng: np.random.Generator

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the box."""
        return self.patch.shape[0], self.patch.shape[1]

    def shift(self, low: float, high: float) -> Content:
        """Draw a change of brightness of ``low``..``high`` grey levels, tinted now and then on colour images."""
        level = float(self.patch.mean())
        lighter = self.rng.random() < 0.5  # noqa: PLR2004 (a fair coin)
        if level < _DARK:
            lighter = True
        elif level > _LIGHT:
            lighter = False
        amount = self.rng.uniform(low, high) * (1 if lighter else -1)
        tint = self.rng.uniform(0.3, 1.0, 3)
        tinted = not self.grey and self.rng.random() < 0.4  # noqa: PLR2004
        return np.asarray(amount * (tint / tint.max() if tinted else np.ones(3)), dtype=np.float32)

    def elsewhere(self) -> Content:
        """Copy a box of the same size from another place of the image, flipped or turned by chance."""
        (h, w), (height, width) = self.shape, self.image.shape[:2]
        y, x = self.rng.integers(0, height - h + 1), self.rng.integers(0, width - w + 1)
        taken = self.image[y : y + h, x : x + w].astype(np.float32)
        turns = int(self.rng.integers(0, 4))
        if h != w:
            turns = 2 * (turns // 2)
        taken = np.rot90(taken, turns)
        return np.ascontiguousarray(taken[:, ::-1] if self.rng.random() < 0.5 else taken)  # noqa: PLR2004


Family = Callable[[Site], "tuple[Shape, Content]"]
"""Site -> (shape float32 [h, w] in [0, 1], content float32 [h, w, 3] in grey levels, clipped later)."""


def perlin_blend(site: Site) -> tuple[Shape, Content]:
    """Blend other texture in where noise is high (after DRAEM, Zavrtanik et al., ICCV 2021)."""
    cells = 2.0 ** site.rng.uniform(0.5, 3.0)
    field = fractal(site.shape, (cells, cells), site.rng, 2) + 0.35 * blob(
        site.shape, site.rng, irregularity=0.3, softness=1.0
    )
    envelope = blob(site.shape, site.rng, irregularity=0.3, softness=0.3)
    level = np.quantile(field, site.rng.uniform(0.4, 0.7))
    shape = np.clip((field - level) / 0.08, 0, 1) * envelope
    opacity = site.rng.uniform(0.5, 1.0)
    content = opacity * site.elsewhere() + (1 - opacity) * site.patch
    return shape, content + site.shift(5, 50)


def cut_paste(site: Site) -> tuple[Shape, Content]:
    """Paste a rectangle from elsewhere, slightly off in brightness (CutPaste, Li et al., CVPR 2021)."""
    return soft_rectangle(site.shape), site.elsewhere() * site.rng.uniform(0.85, 1.15) + site.shift(8, 30)


def scar(site: Site) -> tuple[Shape, Content]:
    """Paste a thin turned strip from elsewhere (the scar of CutPaste)."""
    h, w = site.shape
    length = 0.9 * max(min(h, w), 3)
    thickness = max(length * site.rng.uniform(0.08, 0.25), 1.5)
    box = cv2.boxPoints((((w - 1) / 2, (h - 1) / 2), (length, thickness), site.rng.uniform(0, 180)))
    canvas = np.zeros((h, w), np.uint8)
    points = np.round(box * 2**_SUBPIXEL_BITS).astype(np.int32)
    cv2.fillPoly(canvas, [points], 255, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)
    return canvas.astype(np.float32) / 255, site.elsewhere() + site.shift(5, 40)


def scratch(site: Site) -> tuple[Shape, Content]:
    """Draw a Bezier curve of varying width; on some, one flank throws light back and the other is in shade."""
    curve, t = bezier(site.shape, site.rng)
    widest = _line_width(site)
    swell = np.sin(np.pi * t) ** 0.5 * site.rng.uniform(0.6, 1.0) + 0.25
    shape = stroke(site.shape, curve, widest * swell)
    content = site.patch + site.shift(45, 120)
    if site.rng.random() < 0.3 and min(site.shape) > 8:  # noqa: PLR2004
        relief = cv2.Sobel(shape, cv2.CV_32F, 0, 1, ksize=3)[..., None]
        content = content + relief * site.rng.uniform(10, 40)
    return shape, content


def crack(site: Site) -> tuple[Shape, Content]:
    """Draw a jagged dark line, thin, with a branch now and then."""
    curve = jagged(ends(site.shape, site.rng), site.rng)
    width = 0.6 * _line_width(site)
    shape = stroke(site.shape, curve, width * site.rng.uniform(0.7, 1.3, len(curve)))
    if site.rng.random() < 0.35:  # noqa: PLR2004
        start = curve[len(curve) // 2]
        tip = start + site.rng.normal(0, 0.25, 2) * np.asarray(site.shape[::-1])
        branch = jagged(np.stack([start, tip]), site.rng)
        shape = np.maximum(shape, 0.8 * stroke(site.shape, branch, np.full(len(branch), 0.7 * width)))
    depth = -np.abs(site.shift(50, 130)) if float(site.patch.mean()) >= _DARK else site.shift(50, 130)
    return shape, site.patch + depth


def stain(site: Site) -> tuple[Shape, Content]:
    """Darken, lighten or tint a soft blob, with a dried rim now and then."""
    softness = site.rng.uniform(0.2, 0.9)
    shape = blob(site.shape, site.rng, irregularity=0.35, softness=softness)
    cloud = 1 + 0.4 * fractal(site.shape, (3, 3), site.rng, 2)[..., None]
    content = site.patch + site.shift(25, 80) * cloud
    if site.rng.random() < 0.3:  # noqa: PLR2004
        shape = np.clip(0.55 * shape + 1.8 * shape * (1 - shape), 0, 1)
    return shape, content


def smear(site: Site) -> tuple[Shape, Content]:
    """Blur a patch, along one direction or all around, as a rub or a slip would."""
    h, w = site.shape
    reach = max(3, int(max(h, w) * site.rng.uniform(0.3, 0.8))) | 1
    kernel = np.zeros((reach, reach), np.float32)
    if site.rng.random() < 0.6:  # noqa: PLR2004
        centre, angle = (reach - 1) / 2, site.rng.uniform(0, np.pi)
        step = np.array([np.cos(angle), np.sin(angle)]) * centre
        tail, head = (tuple(round(v) for v in (centre - step, centre + step)[i]) for i in (0, 1))
        cv2.line(kernel, tail, head, 1.0)
        content = cv2.filter2D(site.patch, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)
    else:
        content = cv2.GaussianBlur(site.patch, (reach, reach), reach / 5, borderType=cv2.BORDER_REFLECT_101)
    return blob(site.shape, site.rng, irregularity=0.2, softness=0.35), content + site.shift(0, 20)


def blur(site: Site) -> tuple[Shape, Content]:
    """Put a patch out of focus: only what is finer than the blur goes, so that on a plain surface little shows."""
    width = max(0.6, min(site.shape) * site.rng.uniform(0.04, 0.15))
    content = cv2.GaussianBlur(site.patch, (0, 0), width, borderType=cv2.BORDER_REFLECT_101)
    return blob(site.shape, site.rng, irregularity=0.2, softness=0.35), content


def missing(site: Site) -> tuple[Shape, Content]:
    """Fill a region with its surroundings' colour, as missing print or a lost part looks."""
    if site.rng.random() < 0.5:  # noqa: PLR2004
        shape = blob(site.shape, site.rng, irregularity=0.25, softness=0.12)
    else:
        shape = soft_rectangle(site.shape)
    rim = np.concatenate([site.patch[0], site.patch[-1], site.patch[:, 0], site.patch[:, -1]])
    corner = np.percentile(rim, site.rng.uniform(20, 80), axis=0).astype(np.float32)
    grain = site.rng.normal(0, 2.0, site.shape).astype(np.float32)[..., None]
    low = cv2.GaussianBlur(site.patch, (0, 0), max(site.shape) / 4, borderType=cv2.BORDER_REFLECT_101)
    return shape, 0.7 * corner + 0.3 * low + grain


def spot(site: Site) -> tuple[Shape, Content]:
    """Punch a pit or hole: a small sharp ellipse, some with a rim that catches the light."""
    shape = blob(site.shape, site.rng, irregularity=0.12, softness=site.rng.uniform(0.2, 0.6))
    content = site.patch * site.rng.uniform(0.3, 0.9) + 0 if site.patch.mean() >= _DARK else site.patch
    content = content + site.shift(30, 90)
    if site.rng.random() < 0.3:  # noqa: PLR2004
        rim = 4 * shape * (1 - shape)
        content = content - rim[..., None] * site.shift(20, 60)
    return shape, content


def warp(site: Site) -> tuple[Shape, Content]:
    """Displace the texture locally, as a pulled thread or a dent does."""
    h, w = site.shape
    strength = site.rng.uniform(0.12, 0.35) * min(h, w)
    cells = (site.rng.uniform(1, 3),) * 2
    dy, dx = (strength * fractal(site.shape, cells, site.rng, 1) for _ in range(2))
    ys, xs = np.mgrid[0:h, 0:w].astype(np.float32)
    moved = cv2.remap(site.patch, xs + dx, ys + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    shading = 1 + 0.25 * fractal(site.shape, cells, site.rng, 1)[..., None]
    return blob(site.shape, site.rng, irregularity=0.25, softness=0.4), moved * shading


def colour(site: Site) -> tuple[Shape, Content]:
    """Change the colour of a patch, as a lot of another dye does; a grey surface becomes lighter or darker."""
    weights = np.ones(3) if site.grey else site.rng.uniform(-1.0, 1.0, 3)
    weights = weights / np.abs(weights).max()
    lighter = site.rng.random() < 0.5 if _DARK <= site.patch.mean() <= _LIGHT else site.patch.mean() < _DARK  # noqa: PLR2004
    amount = site.rng.uniform(18, 50) * (1 if lighter else -1)
    content = np.asarray(site.patch + amount * weights, dtype=np.float32)
    return blob(site.shape, site.rng, irregularity=0.2, softness=0.6), content


def wrinkle(site: Site) -> tuple[Shape, Content]:
    """Fold the surface along a bent line: texture is drawn towards it, one flank is lit and the other in shade."""
    h, w = site.shape
    curve, along = bezier((h, w), site.rng)
    reach = max(2.0, min(h, w) * site.rng.uniform(0.15, 0.35))
    fold = stroke((h, w), curve, reach * (1 - np.abs(2 * along - 1) ** 3))
    soft = cv2.GaussianBlur(fold, (0, 0), reach / 4, borderType=cv2.BORDER_REFLECT_101)
    dy, dx = (np.asarray(slope, np.float32) * np.float32(reach) for slope in np.gradient(soft))
    ys, xs = np.mgrid[0:h, 0:w].astype(np.float32)
    pull = np.float32(site.rng.uniform(0.5, 1.5))
    moved = cv2.remap(site.patch, xs + pull * dx, ys + pull * dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    angle = site.rng.uniform(0, 2 * np.pi)
    flank = np.float32(np.cos(angle)) * dx + np.float32(np.sin(angle)) * dy
    shading = np.float32(site.rng.uniform(20, 50)) * flank / max(float(np.abs(flank).max()), 1e-6)
    return np.asarray(np.clip(1.5 * soft, 0, 1), np.float32), moved + shading[..., None]


FAMILIES: dict[str, Family] = {
    "perlin": perlin_blend,
    "cut_paste": cut_paste,
    "scar": scar,
    "scratch": scratch,
    "crack": crack,
    "stain": stain,
    "smear": smear,
    "missing": missing,
    "spot": spot,
    "warp": warp,
}
"""Families that are drawn from unless others are asked for."""

BY_NAME: dict[str, Family] = {**FAMILIES, "blur": blur, "colour": colour, "wrinkle": wrinkle}
"""Every family. Those beyond ``FAMILIES`` are given by name only: a blur of a plain surface would be strengthened to a
mere change of shade, and what validation is drawn from stays what figures were measured with."""


def _line_width(site: Site) -> float:
    """Draw a width in pixels that grows slowly with the image: 1 to 3 pixels at 256, about 2 to 7 at 2000."""
    diagonal = float(np.hypot(*site.image.shape[:2]))
    return float(np.clip(site.rng.uniform(0.4, 1.4) * (diagonal / 181.0) ** 0.5, 0.8, 12.0))
