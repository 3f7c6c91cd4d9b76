"""A line whose lamp ages and whose recipe changes: which part each frame shows and in which light, all from one seed.

It must not know detectors. Parts are drawn once into pools; light, ageing and sensor noise are made per frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from trainer.data.texture_factory import DEFECTS, TextureSubclass

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    Image = npt.NDArray[np.uint8]

SIDE = 96
# Of one product: frames that the threshold is set with, and good and defective ones that come on the line.
CALIBRATION, GOOD, DEFECTIVE = 1000, 1200, 120
# A frame's own light, beside that of its picture, and its read noise.
_FLICKER, _NOISE = 0.01, 1.0
_NOISE_SIDE = 512


@dataclass(frozen=True, slots=True)
class Lamp:
    """What ageing makes of the light: it falls to a share of what it was, blue more than red, and stray light grows.

    Attributes:
        left: share of the green light at the end, in (0, 1].
        cooling: how much more blue loses than green, and red less, as a share.
        stray: grey levels of stray light at the end.
    """

    left: float = 0.7
    cooling: float = 0.05
    stray: float = 6.0

    def at(self, age: float) -> tuple[npt.NDArray[np.float32], float]:
        """Return the gains of blue, green and red and the offset in grey levels at an age of 0 (new) to 1 (the end)."""
        green = self.left**age
        return np.float32([green * (1 - self.cooling * age), green, green * (1 + self.cooling * age)]), self.stray * age


@dataclass(frozen=True)
class Pool:
    """Pictures of one product: BGR, uint8 [n, SIDE, SIDE, 3] each; no part is in two of them."""

    train: Image
    calibration: Image
    good: Image
    defective: Image

    @classmethod
    def draw(cls, product: TextureSubclass, *, train: int, calibration: int, good: int, defective: int) -> Pool:
        """Draw them; the types of defects take turns."""
        plain = [product.good("train", index) for index in range(train + calibration)]
        return cls(
            np.stack(plain[:train]),
            np.stack(plain[train:]) if calibration else np.empty((0, *plain[0].shape), np.uint8),
            np.stack([product.good("good", index) for index in range(good)]),
            np.stack([product.defective(DEFECTS[index % len(DEFECTS)], index)[0] for index in range(defective)]),
        )


@dataclass(frozen=True, slots=True)
class Shown:
    """One frame of a stream.

    Attributes:
        image: uint8 [SIDE, SIDE, 3] BGR.
        product: index of what it shows.
        defect: index of the defective picture; None for a good part.
        age: of the lamp.
    """

    image: Image
    product: int
    defect: int | None
    age: float


class Light:
    """Shows pictures in a light, with sensor noise; a frame costs a table and an addition."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        noise = _NOISE * rng.standard_normal((_NOISE_SIDE, _NOISE_SIDE, 1))
        # Grey noise, in whole levels as a sensor gives them.
        self._noise = np.repeat(np.rint(noise).astype(np.int8), 3, axis=2)

    def show(self, image: Image, gains: npt.NDArray[np.float32], offset: float) -> Image:
        """Return a picture uint8 of the same shape in a light of gains per channel and an offset."""
        flicker = 1 + _FLICKER * self._rng.standard_normal()
        levels = np.arange(256, dtype=np.float32)[:, None] * (gains * np.float32(flicker)) + np.float32(offset)
        table = np.clip(np.rint(levels), 0, 255).astype(np.uint8)[None]
        side = image.shape[0]
        y, x = self._rng.integers(0, _NOISE_SIDE - side, 2)
        lit = cv2.LUT(image, np.ascontiguousarray(table))
        return np.asarray(cv2.add(lit, self._noise[y : y + side, x : x + side], dtype=cv2.CV_8U))


def stream(
    pools: Sequence[Pool], seed: int, *, frames: int, defects: float = 0.02, lamp: Lamp = Lamp()
) -> Iterator[Shown]:
    """Show a line: first one product, from a frame in the middle fifth on the other, the lamp ageing all the time.

    Args:
        pools: of the two products.
        seed: of everything.
        frames: of the stream.
        defects: share of parts that are defective.
        lamp: how it ages; the first frames are in the light of the calibration.
    """
    rng = np.random.default_rng((seed, 5))
    light = Light(rng)
    change = int(rng.integers(int(frames * 0.4), int(frames * 0.6) + 1))
    orders = [_Order(pool, rng) for pool in pools]
    for index in range(frames):
        product, age = int(index >= change), index / max(1, frames - 1)
        defect, picture = orders[product].next(defective=bool(rng.random() < defects))
        gains, offset = lamp.at(age)
        yield Shown(light.show(picture, gains, offset), product, defect, age)


class _Order:
    """Goes through the pictures of a pool in an order of its own, all of them before any comes again."""

    def __init__(self, pool: Pool, rng: np.random.Generator) -> None:
        self._pool, self._rng = pool, rng
        self._left: dict[bool, list[int]] = {False: [], True: []}

    def next(self, *, defective: bool) -> tuple[int | None, Image]:
        pictures = self._pool.defective if defective else self._pool.good
        if not self._left[defective]:
            self._left[defective] = self._rng.permutation(len(pictures)).tolist()
        index = self._left[defective].pop()
        return (index if defective else None), pictures[index]


GROWING = ("tint", "haze", "stain", "scratches")
"""Defects that grow into every part: in the colour of everything, in the contrast of everything, in two fifths of the
picture, in a few lines."""


def growing(name: str, picture: Image, strength: float) -> Image:
    """Return a picture with a defect that grows.

    Args:
        name: one of :data:`GROWING`.
        picture: uint8 [H, W, 3] BGR.
        strength: 0 (nothing) to 1: 60 grey levels darker in red and green, 70 % of the contrast lost, a stain 60 levels
            darker, lines 60 levels darker.
    """
    height, width = picture.shape[:2]
    level = picture.astype(np.float32)
    if name == "tint":
        level -= strength * np.float32([0, 60, 60])
    elif name == "haze":
        mean = level.mean(axis=(0, 1))
        level = mean + (1 - 0.7 * strength) * (level - mean)
    else:
        mask = np.zeros((height, width), np.float32)
        if name == "stain":
            cv2.ellipse(mask, (width // 2, height // 2), (int(0.41 * width), int(0.31 * height)), 20, 0, 360, 1.0, -1)
        else:
            for x in (0.3, 0.5, 0.8):
                start, end = (int(x * width), int(0.2 * height)), (int((x - 0.15) * width), int(0.7 * height))
                cv2.line(mask, start, end, 1.0, 2)
        level -= strength * 60 * cv2.GaussianBlur(mask, (0, 0), 0.7)[..., None]
    return np.asarray(np.clip(np.rint(level), 0, 255), dtype=np.uint8)


def growth(pool: Pool, name: str, seed: int, *, frames: int) -> Iterator[Shown]:
    """Show a line in unchanging light whose every part has a defect that grows from nothing, evenly, to the end."""
    rng = np.random.default_rng((seed, 6))
    light, order = Light(rng), _Order(pool, rng)
    for index in range(frames):
        strength = index / max(1, frames - 1)
        picture = growing(name, order.next(defective=False)[1], strength)
        yield Shown(light.show(picture, *Lamp().at(0)), 0, None, strength)
