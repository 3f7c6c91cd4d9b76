"""Synthetic defects on feature maps of good images: seeded, one region on all levels, exact masks on each grid.

It knows feature maps and a generator; it must not know images, networks or methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch.nn import functional

from edge.errors import DataError
from trainer.methods.base import Features
from trainer.synthesis.image2d import CONTRASTS
from trainer.synthesis.noise import blob, fractal
from trainer.synthesis.strokes import bezier, draw_box, soft_rectangle, stroke

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    Shape = npt.NDArray[np.float32]
    Masks = dict[str, npt.NDArray[np.bool_]]

SIZE_RANGE = (0.04, 0.3)
"""Extent of defects as a share of the grid's diagonal: from two or three cells at stride 4 up."""

_LEAST_BOX = 2  # cells
_FLOOR = 0.1  # of full coverage; a cell that a defect hardly touches is neither changed nor labelled
_LEAST_CHANGE = 0.5  # deviations at contrast 1 under full coverage, root mean square over channels
_NO_CHANGE = 0.05  # below it there is nothing to strengthen
_QUIET = 0.01  # of the level's own magnitude: the least deviation that a channel is taken to have
_CHUNK = 32


@dataclass(frozen=True)
class FeatureDefect:
    """The taps of one image with one defect.

    Attributes:
        taps: [C, h, w] each, of the dtype given; as the input outside the mask, bit for bit.
        masks: bool [h, w] for each tap, never empty; at contrast 1 exactly the changed cells, below it a superset of
            them that does not depend on the contrast.
        family: one of ``FEATURE_FAMILIES``.
        contrast: as asked for.
    """

    taps: dict[str, torch.Tensor]
    masks: Masks
    family: str
    contrast: float


@dataclass(frozen=True)
class _Plan:
    """What all levels of one defect share.

    Attributes:
        shape: float32 [H, W] in [0, 1] on the finest grid.
        step: (y, x) to where other cells are taken from, as shares of the grid.
        strength: of what is added, in deviations.
        reach: of a blur, as a share of the grid's height.
        cloud: float32 [H, W] about 1, uneven strength.
    """

    shape: Shape
    step: tuple[float, float]
    strength: float
    reach: float
    cloud: Shape


@dataclass(frozen=True)
class _Level:
    """One tap of one image: cells float32 [C, h, w], deviation [C, 1, 1] and a direction [C, 1, 1] of mean square 1."""

    cells: torch.Tensor
    deviation: torch.Tensor
    direction: torch.Tensor
    rng: np.random.Generator

    def rolled(self, step: tuple[float, float]) -> torch.Tensor:
        """Return the cells of another place, round the edges."""
        h, w = self.cells.shape[1:]
        return torch.roll(self.cells, (round(step[0] * h), round(step[1] * w)), (1, 2))


def _noise(level: _Level, plan: _Plan) -> torch.Tensor:
    """Add noise of the features' own deviation, half of it common to the region (Perlin-masked as in DRAEM, 2021)."""
    grain = torch.from_numpy(level.rng.standard_normal(level.cells.shape, dtype=np.float32))
    return level.cells + plan.strength * 0.5**0.5 * level.deviation * (level.direction + grain)


def _paste(level: _Level, plan: _Plan) -> torch.Tensor:
    """Take cells from elsewhere (CutPaste, Li et al., CVPR 2021, on features)."""
    return level.rolled(plan.step)


def _blurred(level: _Level, plan: _Plan) -> torch.Tensor:
    """Take the mean of the cells around."""
    side = max(3, round(plan.reach * level.cells.shape[1])) | 1
    return functional.avg_pool2d(level.cells[None], side, 1, side // 2, count_include_pad=False)[0]


def _scratched(level: _Level, plan: _Plan) -> torch.Tensor:
    """Put one foreign cell along the whole line: one from elsewhere, pushed off in one direction."""
    h, w = level.cells.shape[1:]
    one = level.cells[:, int(plan.step[0] * h), int(plan.step[1] * w)][:, None, None]
    return (one + plan.strength * level.deviation * level.direction).expand_as(level.cells)


def _stained(level: _Level, plan: _Plan) -> torch.Tensor:
    """Push all cells the same way, unevenly strong."""
    h, w = level.cells.shape[1:]
    cloud = torch.from_numpy(cv2.resize(plan.cloud, (w, h), interpolation=cv2.INTER_AREA))
    return level.cells + plan.strength * level.deviation * level.direction * cloud


def _perlin_shape(shape: tuple[int, int], rng: np.random.Generator) -> Shape:
    cells = 2.0 ** rng.uniform(0.5, 2.5)
    field = fractal(shape, (cells, cells), rng, 2) + 0.35 * blob(shape, rng, irregularity=0.3, softness=1.0)
    envelope = blob(shape, rng, irregularity=0.3, softness=0.3)
    level = np.quantile(field, rng.uniform(0.3, 0.6))
    return np.asarray(np.clip((field - level) / 0.15, 0, 1) * envelope, dtype=np.float32)


def _line(shape: tuple[int, int], rng: np.random.Generator) -> Shape:
    curve, along = bezier(shape, rng)
    width = max(1.0, 0.06 * max(shape)) * rng.uniform(0.7, 1.4)
    return stroke(shape, curve, width * (np.sin(np.pi * along) ** 0.5 + 0.25))


def _soft_blob(shape: tuple[int, int], rng: np.random.Generator) -> Shape:
    return blob(shape, rng, irregularity=0.35, softness=rng.uniform(0.2, 0.9))


def _rectangle(shape: tuple[int, int], _rng: np.random.Generator) -> Shape:
    return soft_rectangle(shape)


FEATURE_FAMILIES: dict[
    str,
    tuple[
        Callable[[tuple[int, int], np.random.Generator], Shape],
        Callable[[_Level, _Plan], torch.Tensor],
    ],
] = {
    "perlin": (_perlin_shape, _noise),
    "cut_paste": (_rectangle, _paste),
    "blur": (_soft_blob, _blurred),
    "scratch": (_line, _scratched),
    "stain": (_soft_blob, _stained),
}
"""Each family's shape and what is to be seen in it."""


def deviations(features: Features) -> dict[str, torch.Tensor]:
    """Return the standard deviation float32 [C] of every channel of every tap, over all images and places.

    A channel that hardly varies counts as varying by 1 % of its tap's root mean square.

    Raises:
        DataError: there are no features, or some are not finite.
    """
    found = {}
    for name, tap in features.taps.items():
        if not len(tap):
            raise DataError(f"tap {name} has no features; give at least one image")
        first, second = torch.zeros(tap.shape[1], dtype=torch.float64), torch.zeros(tap.shape[1], dtype=torch.float64)
        for chunk in tap.split(_CHUNK):
            wide = chunk.double()
            first, second = first + wide.sum((0, 2, 3)), second + (wide * wide).sum((0, 2, 3))
        count = tap.numel() / tap.shape[1]
        deviation = (second / count - (first / count).square()).clamp_min(0).sqrt()
        whole = float((second / count).mean().sqrt())
        if not np.isfinite(whole):
            raise DataError(f"features of tap {name} are not finite; check the images")
        found[name] = deviation.clamp_min(_QUIET * whole if whole > 0 else 1.0).float()
    return found


def corrupt(
    taps: Mapping[str, torch.Tensor],
    *,
    deviation: Mapping[str, torch.Tensor],
    rng: np.random.Generator,
    family: str | None = None,
    contrast: float = 1.0,
    size: tuple[float, float] = SIZE_RANGE,
) -> FeatureDefect:
    """Put one defect on the taps of a good image.

    The region is drawn on the finest grid; a coarser cell is changed by the share of it that the region covers.
    Contrast scales the change and nothing else: one generator state gives the same masks at every contrast.

    Args:
        taps: float16 or float32 [C, h, w] each, of one picture at several strides; not changed.
        deviation: float32 [C] for each tap, see :func:`deviations`.
        rng: source of all choices.
        family: one of ``FEATURE_FAMILIES``; None draws one.
        contrast: in (0, 1].
        size: smallest and largest extent as shares of the grid's diagonal, 0 < smallest <= largest <= 1.

    Returns:
        Changed copies with their masks.

    Raises:
        DataError: no taps, a tap without deviation, or a finest grid of fewer than 2 x 2 cells.
        ValueError: ``family``, ``contrast`` or ``size`` is out of range.
    """
    _refuse(taps, deviation, family, contrast, size)
    name = family if family is not None else list(FEATURE_FAMILIES)[int(rng.integers(len(FEATURE_FAMILIES)))]
    outline, content_of = FEATURE_FAMILIES[name]
    plan = _draw_plan(max((tap.shape[1:] for tap in taps.values()), key=np.prod), outline, rng, size)
    changed, masks = {}, {}
    for tap_name, tap in taps.items():
        direction = torch.from_numpy(rng.standard_normal((len(tap), 1, 1), dtype=np.float32))
        level = _Level(
            cells=tap.float(),
            deviation=deviation[tap_name].float()[:, None, None],
            direction=direction / direction.square().mean().sqrt(),
            rng=rng,
        )
        cover, inside = _covered(plan.shape, (tap.shape[1], tap.shape[2]))
        delta = _strengthened(content_of(level, plan) - level.cells, level)
        moved = (level.cells + contrast * torch.from_numpy(cover) * delta).to(tap.dtype)
        changed[tap_name] = torch.where(torch.from_numpy(inside), moved, tap)
        masks[tap_name] = inside
    return FeatureDefect(changed, masks, name, contrast)


def corrupt_features(
    features: Features,
    *,
    seed: int,
    deviation: Mapping[str, torch.Tensor] | None = None,
    contrast: float | None = None,
    repeats: int = 1,
    families: Sequence[str] | None = None,
    size: tuple[float, float] = SIZE_RANGE,
) -> tuple[Features, Masks]:
    """Put a defect on every tile, ``repeats`` times.

    Args:
        features: of good images.
        seed: the same seed gives the same defects in the same places at every contrast.
        deviation: see :func:`deviations`; None measures it on ``features``.
        contrast: in (0, 1]; None draws from those that images take.
        repeats: defective copies of each image.
        families: names to take in turns; None draws from all.
        size: as in :func:`corrupt`.

    Returns:
        Features of ``repeats`` times as many images, and for each tap the masks bool [repeats * n, h, w].

    Raises:
        DataError: as in :func:`corrupt` and :func:`deviations`.
        ValueError: as in :func:`corrupt`.
    """
    deviation = deviations(features) if deviation is None else deviation
    n = len(features)
    taps = {name: tap.repeat(repeats, 1, 1, 1) for name, tap in features.taps.items()}
    masks = {name: np.zeros((repeats * n, *tap.shape[2:]), np.bool_) for name, tap in taps.items()}
    for index in range(repeats * n):
        rng = np.random.default_rng((seed, index))
        drawn = float(rng.choice(CONTRASTS))  # always drawn, so that what follows is the same at every contrast
        made = corrupt(
            {name: tap[index % n] for name, tap in features.taps.items()},
            deviation=deviation,
            rng=rng,
            family=None if families is None else families[index % len(families)],
            contrast=drawn if contrast is None else contrast,
            size=size,
        )
        for name, tap in made.taps.items():
            taps[name][index], masks[name][index] = tap, made.masks[name]
    return Features(taps, features.tiles_per_image, np.tile(features.groups, repeats)), masks


def _refuse(
    taps: Mapping[str, torch.Tensor],
    deviation: Mapping[str, torch.Tensor],
    family: str | None,
    contrast: float,
    size: tuple[float, float],
) -> None:
    grids = [tuple(tap.shape[1:]) for tap in taps.values()]
    if not grids or any(len(grid) != 2 for grid in grids) or min(max(grids, key=np.prod)) < _LEAST_BOX:  # noqa: PLR2004
        raise DataError(f"feature grids {grids} have no room for a defect; give taps [C, h, w] of 2 x 2 cells or more")
    for name, tap in taps.items():
        if name not in deviation or deviation[name].shape != (len(tap),):
            raise DataError(f"tap {name}: no deviation of {len(tap)} channels; give deviations() of the same features")
    if family is not None and family not in FEATURE_FAMILIES:
        raise ValueError(f"unknown family {family!r}; known are {', '.join(FEATURE_FAMILIES)}")
    if not 0 < contrast <= 1:
        raise ValueError(f"contrast {contrast} is outside (0, 1]")
    if not 0 < size[0] <= size[1] <= 1:
        raise ValueError(f"size {size} must be 0 < smallest <= largest <= 1")


def _draw_plan(
    grid: tuple[int, int],
    outline: Callable[[tuple[int, int], np.random.Generator], Shape],
    rng: np.random.Generator,
    size: tuple[float, float],
) -> _Plan:
    height, width = grid
    top, left, h, w = draw_box((height, width), rng, size, least=_LEAST_BOX)
    shape = np.zeros((height, width), np.float32)
    shape[top : top + h, left : left + w] = outline((h, w), rng)
    if not (shape >= _FLOOR).any():  # a shape smaller than a cell: fill the middle of its box
        shape[top + h // 2, left + w // 2] = 1.0
    return _Plan(
        shape=np.where(shape >= _FLOOR, shape, 0).astype(np.float32),
        step=(rng.uniform(0.15, 0.85), rng.uniform(0.15, 0.85)),
        strength=rng.uniform(1.5, 3.0),
        reach=rng.uniform(0.1, 0.25),
        cloud=1 + 0.4 * fractal((height, width), (3, 3), rng, 2),
    )


def _covered(shape: Shape, grid: tuple[int, int]) -> tuple[Shape, npt.NDArray[np.bool_]]:
    """Return how much of each cell of a grid the region covers, and which cells count as covered; one at least."""
    cover = cv2.resize(shape, grid[::-1], interpolation=cv2.INTER_AREA)
    inside = cover >= min(_FLOOR, float(cover.max()))
    return np.maximum(cover, _FLOOR), inside


def _strengthened(delta: torch.Tensor, level: _Level) -> torch.Tensor:
    """Strengthen a change that would not show (cells like those they replace) to half a deviation."""
    size = (delta / level.deviation).square().mean(0, keepdim=True).sqrt()
    enough = torch.where(size < _LEAST_CHANGE, delta * (_LEAST_CHANGE / size.clamp_min(_NO_CHANGE)), delta)
    return torch.where(size < _NO_CHANGE, _LEAST_CHANGE * level.deviation * level.direction, enough)
