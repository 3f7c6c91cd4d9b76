"""Smooth random fields and outlines that defects and textures are made of.

It knows shapes and a generator; it must not know images or families.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Field = npt.NDArray[np.float32]


def perlin(shape: tuple[int, int], cells: tuple[float, float], rng: np.random.Generator) -> Field:
    """Make gradient noise (Perlin, An Image Synthesizer, SIGGRAPH 1985, with the quintic fade of 2002).

    Args:
        shape: (height, width) wanted, >= 1 each.
        cells: lattice cells along height and width, > 0; need not be whole.
        rng: source of the gradients.

    Returns:
        float32 [height, width], about -0.7..0.7, zero at lattice points.
    """
    height, width = shape
    ys = (np.arange(height, dtype=np.float32) + 0.5) * np.float32(cells[0] / height)
    xs = (np.arange(width, dtype=np.float32) + 0.5) * np.float32(cells[1] / width)
    y0, x0 = ys.astype(np.intp), xs.astype(np.intp)
    fy, fx = (ys - y0)[:, None], (xs - x0)[None, :]
    angle = rng.uniform(0.0, 2.0 * np.pi, (y0[-1] + 2, x0[-1] + 2)).astype(np.float32)
    gy, gx = np.sin(angle), np.cos(angle)

    def corner(dy: int, dx: int) -> Field:
        index = np.ix_(y0 + dy, x0 + dx)
        return gy[index] * (fy - dy) + gx[index] * (fx - dx)

    uy, ux = _fade(fy), _fade(fx)
    top = corner(0, 0) * (1 - ux) + corner(0, 1) * ux
    bottom = corner(1, 0) * (1 - ux) + corner(1, 1) * ux
    return np.asarray(top * (1 - uy) + bottom * uy, dtype=np.float32)


def fractal(shape: tuple[int, int], cells: tuple[float, float], rng: np.random.Generator, octaves: int = 3) -> Field:
    """Sum octaves of :func:`perlin`, each twice as fine and half as strong as the one before.

    Args:
        shape: (height, width) wanted.
        cells: lattice cells of the coarsest octave.
        rng: source of the gradients.
        octaves: number of octaves, >= 1.

    Returns:
        float32 [height, width], about -1..1.
    """
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        total += perlin(shape, (cells[0] * 2**octave, cells[1] * 2**octave), rng) * np.float32(0.5**octave)
    return total


def blob(shape: tuple[int, int], rng: np.random.Generator, *, irregularity: float, softness: float) -> Field:
    """Make a filled outline whose radius wanders with the angle.

    Args:
        shape: (height, width) of the box that it fills.
        rng: source of the outline.
        irregularity: 0 is an ellipse, 0.5 is ragged.
        softness: share of the radius over which the edge fades, in (0, 1].

    Returns:
        float32 [height, width] in [0, 1].
    """
    ys = ((np.arange(shape[0], dtype=np.float32) + 0.5) * 2 / shape[0] - 1)[:, None]
    xs = ((np.arange(shape[1], dtype=np.float32) + 0.5) * 2 / shape[1] - 1)[None, :]
    orders = np.arange(2, 8)
    strength = rng.normal(0.0, irregularity, orders.size) / orders
    phase = rng.uniform(0.0, 2 * np.pi, orders.size)
    table = np.clip(1 + (strength * np.cos(np.linspace(0, 2 * np.pi, 256)[:, None] * orders + phase)).sum(1), 0.3, None)
    table = (table / table.max()).astype(np.float32)
    turn = (np.arctan2(ys, xs) * np.float32(255 / (2 * np.pi))).astype(np.intp) % 255
    distance = np.hypot(ys, xs) / table[turn]
    return np.asarray(np.clip((1 - distance) / softness, 0, 1), dtype=np.float32)


def _fade(t: Field) -> Field:
    return t * t * t * (t * (t * 6 - 15) + 10)
