"""Multi-scale gradient noise on a square grid: what a synthetic surface defect takes its shape from.

It knows lattices and a generator; it must not know points, surfaces or defects.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Values = npt.NDArray[np.float64]

_PERIOD = 256  # entries of a permutation: the lattice repeats after as many cells


class GradientNoise:
    """Perlin noise (Improving Noise, SIGGRAPH 2002) with random unit gradients of a seeded permutation.

    Args:
        rng: source of the permutation and of the gradients' directions.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._order = np.tile(rng.permutation(_PERIOD), 2)
        angle = rng.uniform(0.0, 2.0 * np.pi, _PERIOD)
        self._gx, self._gy = np.cos(angle), np.sin(angle)

    def __call__(self, x: Values, y: Values) -> Values:
        """Return the noise at places in lattice cells: float64 of their shape, within +-0.71, zero on the lattice."""
        column, row = np.floor(x), np.floor(y)
        fx, fy = x - column, y - row
        column = column.astype(np.int64) % _PERIOD
        row = row.astype(np.int64) % _PERIOD
        ux, uy = _fade(fx), _fade(fy)
        near, far = self._order[column], self._order[(column + 1) % _PERIOD]
        low = self._corner(near, row, fx, fy)
        low += ux * (self._corner(far, row, fx - 1.0, fy) - low)
        high = self._corner(near, row + 1, fx, fy - 1.0)
        high += ux * (self._corner(far, row + 1, fx - 1.0, fy - 1.0) - high)
        return np.asarray(low + uy * (high - low))

    def _corner(self, column: npt.NDArray[np.int64], row: npt.NDArray[np.int64], dx: Values, dy: Values) -> Values:
        corner = self._order[column + row % _PERIOD]
        return np.asarray(self._gx[corner] * dx + self._gy[corner] * dy)


def fractal_sum(
    x: Values,
    y: Values,
    *,
    octaves: int,
    persistence: float,
    lacunarity: float,
    rng: np.random.Generator,
) -> Values:
    """Return fractional Brownian motion: octaves of :class:`GradientNoise`, each finer and weaker than the one before.

    ``sum_k persistence^k * noise_k(lacunarity^k * (x, y)) / sum_k persistence^k``, each octave with a permutation of
    its own, so that no octave repeats what a coarser one shows.

    Args:
        x: places in cells of the coarsest lattice.
        y: the same, of the other axis; broadcast against ``x``.
        octaves: how many, >= 1.
        persistence: strength of an octave as a share of the one before, in (0, 1].
        lacunarity: cells of an octave per cell of the one before, >= 1.
        rng: source of the permutations.

    Returns:
        float64 of the shape of the places, about -0.7..0.7.
    """
    total = np.zeros(np.broadcast_shapes(x.shape, y.shape))
    weight = 0.0
    for octave in range(octaves):
        share, cells = persistence**octave, lacunarity**octave
        total += share * GradientNoise(rng)(x * cells, y * cells)
        weight += share
    return np.asarray(total / weight)


def _fade(t: Values) -> Values:
    return np.asarray(t * t * t * (t * (t * 6.0 - 15.0) + 10.0))
