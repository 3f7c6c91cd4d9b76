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

_DIE = (58, 74)  # pixels of the drawn die, along and across the web


@dataclass(frozen=True)
class Cloth:
    """What one cloth is woven of; lengths in pixels, the others in grey levels.

    Attributes:
        yarn: from yarn to yarn.
        repeat: yarns after which the weave repeats; 2 is plain, more is a twill.
        over: of them, those where the warp lies on top.
        level: of the deepest place between yarns.
        relief: from there to the top of a yarn.
        shade: from yarn to yarn.
        slub: thickening along a yarn.
        fibre: noise of single fibres.
    """

    yarn: float = 7.0
    repeat: int = 2
    over: int = 1
    level: float = 62.0
    relief: float = 88.0
    shade: float = 26.0
    slub: float = 14.0
    fibre: float = 16.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Cloth:
        """Draw a cloth from plain to twill, fine to coarse, dark to light."""
        repeat = int(rng.integers(2, 6))
        return cls(
            yarn=float(rng.uniform(5.0, 12.0)),
            repeat=repeat,
            over=int(rng.integers(1, repeat)),
            level=float(rng.uniform(35, 85)),
            relief=float(rng.uniform(45, 110)),
            shade=float(rng.uniform(8, 36)),
            slub=float(rng.uniform(4, 24)),
            fibre=float(rng.uniform(6, 26)),
        )


@dataclass(frozen=True)
class Wafer:
    """What one wafer is made of.

    Attributes:
        die: pixels from die to die, along and across the web.
        turned: whether the die lies across.
        level: mean grey level.
        contrast: of the pattern; 1 is the drawn one.
        shade: share by which dies differ in brightness.
        film: share by which a film changes it slowly.
        grain: grey levels.
    """

    die: tuple[int, int] = _DIE
    turned: bool = False
    level: float | None = None
    contrast: float = 1.0
    shade: float = 0.05
    film: float = 0.08
    grain: float = 7.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Wafer:
        """Draw a wafer of small to large dies, faint to plain."""
        return cls(
            die=(int(rng.integers(36, 96)), int(rng.integers(44, 110))),
            turned=bool(rng.random() < 0.5),  # noqa: PLR2004 (a coin)
            level=float(rng.uniform(85, 150)),
            contrast=float(rng.uniform(0.45, 1.2)),
            shade=float(rng.uniform(0.02, 0.12)),
            film=float(rng.uniform(0.03, 0.18)),
            grain=float(rng.uniform(3, 13)),
        )


@dataclass(frozen=True)
class Metal:
    """What one brushed plate looks like; lengths in pixels, the others in grey levels.

    Attributes:
        lengths: of fine, short and broad streaks.
        strengths: of the same.
        across: whether it was brushed across the web.
        level: mean.
        sheen: slow change.
        grain: noise.
    """

    lengths: tuple[int, int, int] = (70, 24, 260)
    strengths: tuple[float, float, float] = (17.0, 12.0, 9.0)
    across: bool = False
    level: float = 148.0
    sheen: float = 12.0
    grain: float = 10.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Metal:
        """Draw a plate from polished to coarse, brushed along or across."""
        return cls(
            lengths=(int(rng.integers(20, 120)), int(rng.integers(6, 40)), int(rng.integers(120, 320))),
            strengths=(float(rng.uniform(4, 24)), float(rng.uniform(2, 20)), float(rng.uniform(2, 16))),
            across=bool(rng.random() < 0.5),  # noqa: PLR2004 (a coin)
            level=float(rng.uniform(95, 180)),
            sheen=float(rng.uniform(4, 22)),
            grain=float(rng.uniform(3, 18)),
        )


Stuff = Cloth | Wafer | Metal
"""What a web is made of; the plain ones are those of the embedded example."""

STUFFS: dict[str, type[Cloth | Wafer | Metal]] = {"cloth": Cloth, "wafer": Wafer, "metal": Metal}


class TextureWeb:
    """A continuous web of one texture.

    Every pixel depends on the seed and its place alone, so views may be taken in any order, overlap, and lie as far
    apart as independent frames need.

    Attributes:
        run: rows after which the web repeats, far beyond use.
    """

    run = 2**32

    def __init__(self, kind: str, seed: int, width: int, stuff: Stuff | None = None) -> None:
        """Describe a web; nothing is drawn yet.

        Args:
            kind: one of ``TEXTURES``.
            seed: of everything random.
            width: pixels across, >= 16.
            stuff: what it is made of, of the kind's class in ``STUFFS``; None is that of the embedded example.

        Raises:
            ValueError: the kind is unknown, the stuff is another kind's, or the width too small.
        """
        if kind not in TEXTURES:
            raise ValueError(f"unknown texture {kind!r}; known are {', '.join(TEXTURES)}")
        if width < 16:  # noqa: PLR2004
            raise ValueError(f"width {width} is less than 16 pixels")
        stuff = STUFFS[kind]() if stuff is None else stuff
        self.kind = kind
        self.width = width
        self._noise = Lattice(seed, zlib.crc32(kind.encode()))
        self._draw = self._drawing(kind, stuff)
        rng = np.random.default_rng((seed, zlib.crc32(kind.encode())))
        tints = {"cloth": rng.uniform(0.72, 1.0, 3), "wafer": np.array([1.0, 0.93, 0.88]), "metal": np.ones(3)}
        self._tint = (tints[kind] / tints[kind].max()).astype(np.float32)
        self._die = _die_of(_die_pattern(rng), stuff) if isinstance(stuff, Wafer) else np.zeros((1, 1), np.float32)

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

    def _drawing(self, kind: str, stuff: Stuff) -> Callable[[Index, Index], Field]:
        if kind == "cloth" and isinstance(stuff, Cloth):
            return lambda rows, cols: self._cloth(stuff, rows, cols)
        if kind == "wafer" and isinstance(stuff, Wafer):
            return lambda rows, cols: self._wafer(stuff, rows, cols)
        if kind == "metal" and isinstance(stuff, Metal):
            return lambda rows, cols: self._metal(stuff, rows, cols)
        raise ValueError(f"a web of {kind} cannot be made of {type(stuff).__name__}")

    def _cloth(self, stuff: Cloth, rows: Index, cols: Index) -> Field:
        """Warp and weft pass over each other in turn; yarns differ, wander and thicken."""
        noise = self._noise
        y = rows[:, None] + 0.9 * noise.smooth(rows, cols, (90, 40), 1).astype(np.float64)  # rows may be far along
        x = cols[None, :] + 0.9 * noise.smooth(rows, cols, (60, 120), 2)
        weft, warp = np.floor(y / stuff.yarn).astype(np.int64), np.floor(x / stuff.yarn).astype(np.int64)
        v = (y / stuff.yarn - weft - 0.5).astype(np.float32)
        u = (x / stuff.yarn - warp - 0.5).astype(np.float32)
        over = ((weft + warp) % stuff.repeat < stuff.over).astype(np.float32)  # the warp is on top
        across = over * u + (1 - over) * v
        along = over * v + (1 - over) * u
        round_ = np.sqrt(np.clip(1 - 3.2 * across * across, 0.05, 1)) * (1 - 0.9 * along * along)
        nowhere = np.zeros((1, 1), np.int64)
        shade_warp = noise.at(nowhere, warp, 3) - 0.5
        shade_weft = noise.at(weft, nowhere, 4) - 0.5
        yarn = over * shade_warp + (1 - over) * shade_weft
        slub = noise.smooth(rows, cols, (45, 7), 5) * over + noise.smooth(rows, cols, (7, 45), 6) * (1 - over)
        fibre = noise.white(rows, cols, 7) - 0.5
        grey = stuff.level + stuff.relief * round_ + stuff.shade * yarn + stuff.slub * slub + stuff.fibre * fibre
        return np.asarray(grey, dtype=np.float32)

    def _wafer(self, stuff: Wafer, rows: Index, cols: Index) -> Field:
        """Dies of one pattern in streets; each die is a little brighter or darker, films vary slowly."""
        (die_h, die_w), noise = self._die.shape, self._noise
        grey = self._die[np.ix_(rows % die_h, cols % die_w)]
        shade = noise.at((rows // die_h)[:, None], (cols // die_w)[None, :], 1) - 0.5
        film = noise.smooth(rows, cols, (260, 200), 2)
        grain = noise.white(rows, cols, 3) - 0.5
        return np.asarray(grey * (1 + stuff.shade * shade + stuff.film * film) + stuff.grain * grain, dtype=np.float32)

    def _metal(self, stuff: Metal, rows: Index, cols: Index) -> Field:
        """Brushed: streaks of several lengths, one pixel to a few wide, on a slowly changing sheen."""
        noise, (fine, short, broad) = self._noise, stuff.lengths

        def smooth(length: int, width: int, layer: int) -> Field:
            return noise.smooth(rows, cols, (width, length) if stuff.across else (length, width), layer)

        streaks = (
            stuff.strengths[0] * smooth(fine, 1, 1)
            + stuff.strengths[1] * smooth(short, 1, 2)
            + stuff.strengths[2] * smooth(broad, 3, 3)
        )
        sheen = stuff.sheen * smooth(300, 90, 4)
        grain = noise.white(rows, cols, 5) - 0.5
        return np.asarray(stuff.level + streaks + sheen + stuff.grain * grain, dtype=np.float32)


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


def _die_of(drawn: Field, stuff: Wafer) -> Field:
    """Return the die of a wafer: the drawn one turned, resized (nearest: edges stay sharp), and of its contrast."""
    die = drawn.T if stuff.turned else drawn
    rows, cols = (np.arange(want) * have // want for want, have in zip(stuff.die, die.shape, strict=True))
    die = die[np.ix_(rows, cols)]
    if stuff.level is None:
        return die
    return np.asarray(stuff.level + stuff.contrast * (die - die.mean()), dtype=np.float32)
