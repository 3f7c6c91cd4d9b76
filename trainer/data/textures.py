"""Generated webs of cloth, wafers and brushed metal: endless, seeded, the same at every visit.

It knows what a surface looks like; it must not know cameras, light or defects.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    Field = npt.NDArray[np.float32]
    Index = npt.NDArray[np.int64]

TEXTURES = ("cloth", "wafer", "metal")

_YARN = 7  # pixels from yarn to yarn
_DIE = (58, 74)  # pixels from die to die, along and across the web


class TextureWeb:
    """A continuous web of one texture.

    Every pixel depends on the seed and its place alone, so views may be taken in any order, overlap, and lie as far
    apart as independent frames need.

    Attributes:
        run: rows after which the web repeats, far beyond use.
    """

    run = 2**32

    def __init__(self, kind: str, seed: int, width: int) -> None:
        """Describe a web; nothing is drawn yet.

        Args:
            kind: one of ``TEXTURES``.
            seed: of everything random.
            width: pixels across, >= 16.

        Raises:
            ValueError: the kind is unknown or the width too small.
        """
        if kind not in TEXTURES:
            raise ValueError(f"unknown texture {kind!r}; known are {', '.join(TEXTURES)}")
        if width < 16:  # noqa: PLR2004
            raise ValueError(f"width {width} is less than 16 pixels")
        self.kind = kind
        self.width = width
        self._noise = Lattice(seed, zlib.crc32(kind.encode()))
        draw = {"cloth": self._cloth, "wafer": self._wafer, "metal": self._metal}
        self._draw: Callable[[Index, Index], Field] = draw[kind]
        rng = np.random.default_rng((seed, zlib.crc32(kind.encode())))
        tints = {"cloth": rng.uniform(0.72, 1.0, 3), "wafer": np.array([1.0, 0.93, 0.88]), "metal": np.ones(3)}
        self._tint = (tints[kind] / tints[kind].max()).astype(np.float32)
        self._die = _die_pattern(rng)

    def view(self, position: int, height: int) -> npt.NDArray[np.uint8]:
        """Draw part of the web.

        Args:
            position: first row, in pixels along the web, >= 0.
            height: rows, >= 1.

        Returns:
            uint8 [height, width, 3] BGR.

        Raises:
            ValueError: ``position`` or ``height`` is out of range.
        """
        if position < 0 or height < 1:
            raise ValueError(f"position {position} and height {height} must be at least 0 and 1")
        rows = np.arange(position, position + height, dtype=np.int64)
        grey = self._draw(rows, np.arange(self.width, dtype=np.int64))
        return np.asarray(np.clip(grey[..., None] * self._tint, 0, 255), dtype=np.uint8)

    def _cloth(self, rows: Index, cols: Index) -> Field:
        """Plain weave: warp and weft pass over each other in turn; yarns differ, wander and thicken."""
        noise = self._noise
        y = rows[:, None] + 0.9 * noise.smooth(rows, cols, (90, 40), 1).astype(np.float64)  # rows may be far along
        x = cols[None, :] + 0.9 * noise.smooth(rows, cols, (60, 120), 2)
        weft, warp = np.floor(y / _YARN).astype(np.int64), np.floor(x / _YARN).astype(np.int64)
        v = (y / _YARN - weft - 0.5).astype(np.float32)
        u = (x / _YARN - warp - 0.5).astype(np.float32)
        over = ((weft + warp) % 2 == 0).astype(np.float32)  # the warp is on top
        across = over * u + (1 - over) * v
        along = over * v + (1 - over) * u
        round_ = np.sqrt(np.clip(1 - 3.2 * across * across, 0.05, 1)) * (1 - 0.9 * along * along)
        nowhere = np.zeros((1, 1), np.int64)
        shade_warp = noise.at(nowhere, warp, 3) - 0.5
        shade_weft = noise.at(weft, nowhere, 4) - 0.5
        yarn = over * shade_warp + (1 - over) * shade_weft
        slub = noise.smooth(rows, cols, (45, 7), 5) * over + noise.smooth(rows, cols, (7, 45), 6) * (1 - over)
        fibre = noise.white(rows, cols, 7) - 0.5
        return np.asarray(62 + 88 * round_ + 26 * yarn + 14 * slub + 16 * fibre, dtype=np.float32)

    def _wafer(self, rows: Index, cols: Index) -> Field:
        """Dies of one pattern in streets; each die is a little brighter or darker, films vary slowly."""
        (die_h, die_w), noise = _DIE, self._noise
        grey = self._die[np.ix_(rows % die_h, cols % die_w)]
        shade = noise.at((rows // die_h)[:, None], (cols // die_w)[None, :], 1) - 0.5
        film = noise.smooth(rows, cols, (260, 200), 2)
        grain = noise.white(rows, cols, 3) - 0.5
        return np.asarray(grey * (1 + 0.05 * shade + 0.08 * film) + 7 * grain, dtype=np.float32)

    def _metal(self, rows: Index, cols: Index) -> Field:
        """Brushed along the web: streaks of several lengths, one pixel to a few wide, on a slowly changing sheen."""
        noise = self._noise
        streaks = (
            17 * noise.smooth(rows, cols, (70, 1), 1)
            + 12 * noise.smooth(rows, cols, (24, 1), 2)
            + 9 * noise.smooth(rows, cols, (260, 3), 3)
        )
        sheen = 12 * noise.smooth(rows, cols, (300, 90), 4)
        grain = noise.white(rows, cols, 5) - 0.5
        return np.asarray(148 + streaks + sheen + 10 * grain, dtype=np.float32)


@dataclass(frozen=True)
class Lattice:
    """Random numbers that belong to places: a hash of the place, so that no state is kept.

    Attributes:
        seed: of the web.
        salt: of the kind, so that kinds of one seed do not share fields.
    """

    seed: int
    salt: int

    def at(self, rows: Index, cols: Index, layer: int) -> Field:
        """Return a number in [0, 1) per place; rows and columns broadcast."""
        key = np.random.SeedSequence((self.seed, self.salt, layer)).generate_state(2, np.uint32)
        r = rows.astype(np.uint32) * np.uint32(0x85EBCA6B) ^ key[0]
        h = (r ^ (r >> np.uint32(15))) * np.uint32(0x2C1B3C6D)
        h = h ^ (cols.astype(np.uint32) * np.uint32(0xC2B2AE35) + key[1])
        h = (h ^ (h >> np.uint32(16))) * np.uint32(0x7FEB352D)  # finaliser "lowbias32" of C. Wellons
        h = (h ^ (h >> np.uint32(15))) * np.uint32(0x846CA68B)
        h = h ^ (h >> np.uint32(16))
        return np.asarray((h >> np.uint32(8)).astype(np.float32) * np.float32(2**-24), dtype=np.float32)

    def white(self, rows: Index, cols: Index, layer: int) -> Field:
        """Return a number in [0, 1) per pixel, float32 [rows, cols]."""
        return self.at(rows[:, None], cols[None, :], layer)

    def smooth(self, rows: Index, cols: Index, cell: tuple[int, int], layer: int) -> Field:
        """Return value noise in about -1..1, float32 [rows, cols], smooth over ``cell`` pixels (rows, columns)."""
        (y0, ty), (x0, tx) = _between(rows, cell[0]), _between(cols, cell[1])
        nodes_y = np.arange(y0[0], y0[-1] + 2, dtype=np.int64)
        nodes_x = np.arange(x0[0], x0[-1] + 2, dtype=np.int64)
        values = 2 * self.white(nodes_y, nodes_x, layer) - 1
        # Two terms per place, never a sum over a view: a pixel is the same to the last bit in every view.
        low = y0 - y0[0]
        tall = values[low] * (1 - ty[:, None]) + values[low + 1] * ty[:, None]
        low = x0 - x0[0]
        return np.asarray(tall[:, low] * (1 - tx) + tall[:, low + 1] * tx, dtype=np.float32)


def _between(places: Index, cell: int) -> tuple[Index, Field]:
    """Return the lattice node before each place and the smoothstep weight of the node after it."""
    low = places // cell
    t = ((places - low * cell) / cell).astype(np.float32)
    return low, t * t * (3 - 2 * t)


def _die_pattern(rng: np.random.Generator) -> Field:
    """Draw one die: street, seal ring, pads along two edges, blocks of memory and logic."""
    h, w = _DIE
    die = np.full(_DIE, 176.0, np.float32)  # street
    die[3 : h - 3, 3 : w - 3] = 92
    die[5 : h - 5, 5 : w - 5] = 120
    die[7 : h - 7 : 6, 7:10] = die[7 : h - 7 : 6, w - 10 : w - 7] = 208  # pads
    for top, left, height, width in ((9, 13, 18, 22), (9, 38, 18, 22), (30, 13, 19, 14), (30, 30, 19, 30)):
        block = die[top : top + height, left : left + width]
        block[:] = rng.uniform(70, 170)
        if rng.random() < 0.7:  # noqa: PLR2004
            block[:: int(rng.integers(2, 4))] += rng.uniform(15, 45)
        else:
            block[:, :: int(rng.integers(2, 5))] -= rng.uniform(15, 45)
    return die
