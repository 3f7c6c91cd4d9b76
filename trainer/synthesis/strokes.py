"""Where defects lie and what they are drawn along: boxes, lines of varying width, curves, jags.

It knows shapes and a generator; it must not know images or families.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Shape = npt.NDArray[np.float32]
    Curve = npt.NDArray[np.float64]


def draw_box(
    shape: tuple[int, int],
    rng: np.random.Generator,
    size: tuple[float, float],
    *,
    least: int,
    where: npt.NDArray[np.bool_] | None = None,
) -> tuple[int, int, int, int]:
    """Draw a box inside a picture or a grid: its extent log-uniform, its place uniform.

    Args:
        shape: (height, width) of the picture.
        rng: source of all choices.
        size: smallest and largest extent as shares of the diagonal, 0 < smallest <= largest <= 1.
        least: shortest side of a box.
        where: bool [height, width], not empty: where the middle is to be; near the border it moves inside.

    Returns:
        (top, left, height, width).
    """
    height, width = shape
    extent = float(np.exp(rng.uniform(*np.log(size)))) * float(np.hypot(height, width))
    aspect = float(np.exp(rng.uniform(0, np.log(2.5))))
    sides = (extent, extent / aspect) if rng.random() < 0.5 else (extent / aspect, extent)  # noqa: PLR2004 (a coin)
    h, w = (int(np.clip(round(side), least, limit)) for side, limit in zip(sides, (height, width), strict=True))
    if where is None:
        return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    places = np.flatnonzero(where)
    y, x = divmod(int(places[rng.integers(len(places))]), width)
    return int(np.clip(y - h // 2, 0, height - h)), int(np.clip(x - w // 2, 0, width - w)), h, w


def soft_rectangle(shape: tuple[int, int]) -> Shape:
    """Return a box float32 [h, w] in [0, 1] that is full from the second pixel on."""
    ramps = [np.clip((np.minimum(np.arange(n), np.arange(n)[::-1]) + 1) / 2, 0, 1) for n in shape]
    return np.asarray(np.minimum.outer(*ramps), dtype=np.float32)


def ends(shape: tuple[int, int], rng: np.random.Generator) -> Curve:
    """Draw two points (x, y) on opposite sides of a box (h, w)."""
    h, w = shape
    angle = rng.uniform(0, np.pi)
    step = 0.45 * np.array([np.cos(angle) * w, np.sin(angle) * h])
    centre = np.array([(w - 1) / 2, (h - 1) / 2])
    return np.stack([centre - step, centre + step])


def bezier(shape: tuple[int, int], rng: np.random.Generator) -> tuple[Curve, npt.NDArray[np.float64]]:
    """Draw a bent line across a box (h, w).

    Returns:
        48 points (x, y), and where each lies along the line, in [0, 1].
    """
    tips = ends(shape, rng)
    bend = rng.normal(0, 0.15 * max(shape), (2, 2))
    control = np.stack([tips[0], tips[0] * 0.67 + tips[1] * 0.33 + bend[0], tips[0] * 0.33 + tips[1] * 0.67 + bend[1]])
    t = np.linspace(0, 1, 48)[:, None]
    p0, p1, p2, p3 = (*control, tips[1])
    curve = (1 - t) ** 3 * p0 + 3 * (1 - t) ** 2 * t * p1 + 3 * (1 - t) * t**2 * p2 + t**3 * p3
    return curve, t[:, 0]


def jagged(tips: Curve, rng: np.random.Generator) -> Curve:
    """Split the line between two points at its middles, each moved sideways, four times over."""
    points = tips
    for _ in range(4):
        middle = (points[:-1] + points[1:]) / 2
        step = points[1:] - points[:-1]
        middle = middle + rng.normal(0, 0.16, (len(middle), 1)) * np.stack([-step[:, 1], step[:, 0]], axis=1)
        merged = np.empty((len(points) + len(middle), 2))
        merged[::2], merged[1::2] = points, middle
        points = merged
    return points


def stroke(shape: tuple[int, int], curve: Curve, widths: npt.NDArray[np.float64]) -> Shape:
    """Draw a curve of varying width: distance to its segments, so that widths below a pixel stay fractions.

    Args:
        shape: (h, w) of the box.
        curve: points (x, y).
        widths: in pixels, one per point.

    Returns:
        float32 [h, w] in [0, 1].
    """
    h, w = shape
    nearest = np.full(shape, -np.inf, np.float32)
    for (a, b), width in zip(itertools.pairwise(curve), widths[:-1], strict=True):
        reach = width / 2 + 1.5
        x0, x1 = int(max(min(a[0], b[0]) - reach, 0)), int(min(max(a[0], b[0]) + reach + 1, w))
        y0, y1 = int(max(min(a[1], b[1]) - reach, 0)), int(min(max(a[1], b[1]) + reach + 1, h))
        if x0 >= x1 or y0 >= y1:
            continue
        ys, xs = np.arange(y0, y1, dtype=np.float32)[:, None], np.arange(x0, x1, dtype=np.float32)[None, :]
        step = b - a
        along = np.clip(((xs - a[0]) * step[0] + (ys - a[1]) * step[1]) / max(float(step @ step), 1e-6), 0, 1)
        distance = np.hypot(xs - a[0] - along * step[0], ys - a[1] - along * step[1])
        view = nearest[y0:y1, x0:x1]
        np.maximum(view, width / 2 + 0.5 - distance, out=view, casting="unsafe")
    return np.asarray(np.clip(nearest, 0, 1), dtype=np.float32)
