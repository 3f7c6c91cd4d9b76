"""Generated pictures of assembled parts: a plate with six components at their places, and parts assembled wrongly.

It knows what a plate looks like and which pixels are wrong; it must not know networks or methods.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING

import cv2
import numpy as np

from trainer.data.images import new_folder, write_png

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Picture = npt.NDArray[np.uint8]
    Mask = npt.NDArray[np.bool_]
    Plane = npt.NDArray[np.float32]

COMPONENTS = ("screw", "washer", "chip", "capacitor", "connector", "label")
SMALLEST_SIDE = 64

_FINE = 2  # drawn at twice the side and averaged, so that edges are smooth
_MARGIN = 0.16  # of the side: no component lies nearer to the rim
_ROOM = 0.25  # of the side: nominal places lie at least so far apart
_REACH = 0.105  # of the side: what no component exceeds around its middle
_CLEAR = 0.17  # of the side: a component that was added or moved lies so far from all others
_TRIES = 400
_COVERED = 0.5
_SCRATCH_LEVEL = 60.0  # grey levels above the plate


class Fault(str, Enum):
    """What is wrong with a part.

    ``moved``: a component lies where none belongs. ``missing``: a component is not there. ``extra``: one more of a
    kind lies where none belongs. ``swapped``: two components lie in each other's places. ``scratch``: the control, a
    scratched plate on which everything is in its place. In all but the last every patch of the picture is a patch
    of good parts, but for the rims.
    """

    MOVED = "moved"
    MISSING = "missing"
    EXTRA = "extra"
    SWAPPED = "swapped"
    SCRATCH = "scratch"


@dataclass(frozen=True)
class Component:
    """One component on a plate; lengths are shares of the side.

    Attributes:
        kind: one of ``COMPONENTS``.
        x: of its middle.
        y: of its middle.
        turn: radians.
    """

    kind: str
    x: float
    y: float
    turn: float = 0.0


@dataclass(frozen=True)
class Part:
    """A picture of one part.

    Attributes:
        image: uint8 [side, side, 3] BGR.
        mask: bool [side, side], the pixels that a component wrongly covers or wrongly leaves free, or the scratch.
        components: what lies on the plate.
    """

    image: Picture
    mask: Mask
    components: tuple[Component, ...]


@dataclass(frozen=True)
class Assembly:
    """One product: which components lie where, on what plate, and how much good parts differ.

    Attributes:
        nominal: the components at their places.
        plate: BGR grey levels of the plate.
        grain: deviation of the plate's brushed texture in grey levels.
        slack: half the width of the uniform error of a component's place, as a share of the side.
        turn: half the width of the uniform error of its turn, in radians.
        light: half the width of the uniform gain of a picture about 1.
        noise: deviation of the camera's noise in grey levels.
    """

    nominal: tuple[Component, ...]
    plate: tuple[float, float, float]
    grain: float = 9.0
    slack: float = 0.02
    turn: float = 0.12
    light: float = 0.08
    noise: float = 2.5
    looks: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    @classmethod
    def draw(cls, seed: int, *, slack: float = 0.02) -> Assembly:
        """Draw a product: places of the six components, and colours.

        Args:
            seed: the same seed gives the same product.
            slack: see above, 0..0.04.

        Raises:
            ValueError: ``slack`` is out of range.
        """
        if not 0 <= slack <= 0.04:  # noqa: PLR2004 (above, neighbours may touch)
            raise ValueError(f"slack {slack} must lie in 0..0.04")
        rng = np.random.default_rng((seed, 101))
        places: list[tuple[float, float]] = []
        while len(places) < len(COMPONENTS):
            places = _apart(rng)
        turns = rng.uniform(-np.pi, np.pi, len(COMPONENTS))
        level = rng.uniform(95, 150)
        plate = tuple(float(level + shift) for shift in rng.uniform(-14, 14, 3))
        looks = {kind: tuple(float(value) for value in rng.uniform(0.8, 1.2, 3)) for kind in COMPONENTS}
        nominal = tuple(
            Component(kind, x, y, float(turn)) for kind, (x, y), turn in zip(COMPONENTS, places, turns, strict=True)
        )
        return cls(nominal, (plate[0], plate[1], plate[2]), slack=slack, looks=looks)

    def part(self, seed: int, fault: Fault | None = None, *, side: int = 224) -> Part:
        """Return one part, good or with a fault.

        The same seed gives the same plate, light, noise and places with and without a fault, so that the picture
        differs from that of the good part in the mask, its rim and its soft shadow only.

        Args:
            seed: of the part.
            fault: None is a good part.
            side: height and width of the picture in pixels, at least 64.

        Raises:
            ValueError: the side is too small.
        """
        if side < SMALLEST_SIDE:
            raise ValueError(f"side {side} must be at least {SMALLEST_SIDE}")
        rng = np.random.default_rng((seed, 202))
        good = tuple(self._placed(one, rng) for one in self.nominal)
        canvas = self._plate(rng, side * _FINE)
        found = good if fault is None else _assembled_wrongly(good, fault, np.random.default_rng((seed, 303)))
        covered = _coverage(good, side)
        mask = np.zeros((side, side), np.bool_)
        if fault is not None and fault is not Fault.SCRATCH:
            changed = [one for one in (*good, *found) if (one in good) != (one in found)]
            mask = np.logical_or.reduce([_cover(one, side) for one in changed])
        for one in found:
            _stamp(canvas, one, self.looks.get(one.kind, (1.0, 1.0, 1.0)))
        if fault is Fault.SCRATCH:
            mask = _scratch(canvas, np.random.default_rng((seed, 303)), covered)
        image = cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA)
        return Part(self._seen(image, rng), mask, found)

    def _placed(self, one: Component, rng: np.random.Generator) -> Component:
        dx, dy = rng.uniform(-self.slack, self.slack, 2)
        return replace(one, x=one.x + dx, y=one.y + dy, turn=one.turn + float(rng.uniform(-self.turn, self.turn)))

    def _plate(self, rng: np.random.Generator, side: int) -> Plane:
        """Return float32 [side, side, 3]: brushed across, with a fine grain."""
        brushed = cv2.GaussianBlur(rng.standard_normal((side, side), dtype=np.float32), (0, 0), 6.0, sigmaY=0.8)
        grain = cv2.GaussianBlur(rng.standard_normal((side, side), dtype=np.float32), (0, 0), 1.0)
        texture = self.grain * (0.8 * brushed / brushed.std() + 0.4 * grain / grain.std())
        return np.asarray(np.array(self.plate, np.float32) + texture[..., None], np.float32)

    def _seen(self, image: Plane, rng: np.random.Generator) -> Picture:
        """Return what the camera makes of the plate: gain, a slow slope of the light, noise."""
        side = len(image)
        gain = 1 + rng.uniform(-self.light, self.light)
        slope = rng.uniform(-self.light, self.light, 2) / 2
        axis = np.linspace(-1, 1, side, dtype=np.float32)
        lit = image * (gain + slope[0] * axis[:, None] + slope[1] * axis)[..., None]
        lit = lit + self.noise * rng.standard_normal(image.shape, dtype=np.float32)
        return np.clip(np.rint(lit), 0, 255).astype(np.uint8)


def write_assembled(
    folder: Path,
    *,
    seed: int = 0,
    train: int = 60,
    test_good: int = 40,
    test_each: int = 20,
    side: int = 224,
    slack: float = 0.02,
    faults: Sequence[Fault] = tuple(Fault),
) -> Path:
    """Write a product in MVTec layout: train/good, test/good, test/<fault> and ground_truth/<fault>.

    Args:
        folder: to write to; made where it is missing.
        seed: of the product and of all parts.
        train: good parts to learn from, >= 1.
        test_good: good parts to test on.
        test_each: faulty parts of each kind to test on.
        side: of the pictures in pixels.
        slack: see :class:`Assembly`.
        faults: kinds to write.

    Returns:
        The folder.

    Raises:
        DataError: the folder holds something already, or cannot be written.
    """
    assembly = Assembly.draw(seed, slack=slack)
    jobs: list[tuple[str, str, Fault | None, int]] = [("train", "good", None, train), ("test", "good", None, test_good)]
    jobs += [("test", fault.value, fault, test_each) for fault in faults]
    new_folder(folder)
    number = 0
    for split, label, fault, count in jobs:
        for index in range(count):
            part = assembly.part(part_seed(seed, number), fault, side=side)
            write_png(folder / split / label / f"{index:04d}.png", part.image)
            if fault is not None:
                mask = part.mask.astype(np.uint8) * 255
                write_png(folder / "ground_truth" / label / f"{index:04d}_mask.png", mask)
            number += 1
    return folder


def part_seed(seed: int, number: int) -> int:
    """Return the seed of the part of a number, distinct for every product and number below a million."""
    return seed * 1_000_000 + number


def _apart(rng: np.random.Generator) -> list[tuple[float, float]]:
    places: list[tuple[float, float]] = []
    for _ in range(_TRIES):
        x, y = (float(v) for v in rng.uniform(_MARGIN, 1 - _MARGIN, 2))
        if all(np.hypot(x - u, y - v) >= _ROOM for u, v in places):
            places.append((x, y))
        if len(places) == len(COMPONENTS):
            break
    return places


def _assembled_wrongly(good: tuple[Component, ...], fault: Fault, rng: np.random.Generator) -> tuple[Component, ...]:
    """Return the components of the faulty part; of a scratched one they are the good part's."""
    first, second = (int(v) for v in rng.permutation(len(good))[:2])
    if fault is Fault.MISSING:
        return tuple(one for index, one in enumerate(good) if index != first)
    if fault is Fault.SWAPPED:
        a, b = good[first], good[second]
        exchanged = {first: replace(a, x=b.x, y=b.y), second: replace(b, x=a.x, y=a.y)}
        return tuple(exchanged.get(index, one) for index, one in enumerate(good))
    if fault is Fault.SCRATCH:
        return good
    x, y = _free_place(good, rng)
    elsewhere = replace(good[first], x=x, y=y)
    if fault is Fault.EXTRA:
        return (*good, elsewhere)
    return tuple(elsewhere if index == first else one for index, one in enumerate(good))


def _free_place(good: tuple[Component, ...], rng: np.random.Generator) -> tuple[float, float]:
    """Return a place clear of all components; where none is found, the clearest of those tried."""
    tried = rng.uniform(_MARGIN - 0.04, 1.04 - _MARGIN, (_TRIES, 2))
    others = np.array([(one.x, one.y) for one in good])
    clear = np.sqrt(((tried[:, None] - others) ** 2).sum(2)).min(1)
    enough = np.flatnonzero(clear >= _CLEAR)
    x, y = tried[enough[0] if len(enough) else int(clear.argmax())]
    return float(x), float(y)


def _coverage(components: Sequence[Component], side: int) -> Mask:
    return np.asarray(np.logical_or.reduce([_cover(one, side) for one in components]), np.bool_)


def _cover(one: Component, side: int) -> Mask:
    """Return which pixels a component covers by at least half."""
    share = np.zeros((side * _FINE, side * _FINE), np.float32)
    box, u, v = _local(share.shape[0], one)
    share[box] = _DRAWN[one.kind](u, v)[0]
    small = cv2.resize(share, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(small >= _COVERED, np.bool_)


def _local(side: int, one: Component) -> tuple[tuple[slice, slice], Plane, Plane]:
    """Return the window of a component and its own coordinates there, in shares of the picture's side."""
    reach = _REACH * side
    top, left = (max(0, int(np.floor(m * side - reach))) for m in (one.y, one.x))
    bottom, right = (min(side, int(np.ceil(m * side + reach))) for m in (one.y, one.x))
    y = (np.arange(top, bottom, dtype=np.float32) + 0.5)[:, None] / side - one.y
    x = (np.arange(left, right, dtype=np.float32) + 0.5)[None] / side - one.x
    c, s = np.float32(np.cos(one.turn)), np.float32(np.sin(one.turn))
    return (slice(top, bottom), slice(left, right)), c * x + s * y, c * y - s * x


def _stamp(canvas: Plane, one: Component, look: tuple[float, float, float]) -> None:
    box, u, v = _local(len(canvas), one)
    cover, colour = _DRAWN[one.kind](u, v)
    shadow = cv2.GaussianBlur(cover, (0, 0), 0.012 * len(canvas))[..., None]
    under = canvas[box] * (1 - 0.35 * shadow)
    canvas[box] = under + cover[..., None] * (colour * np.array(look, np.float32) - under)


def _scratch(canvas: Plane, rng: np.random.Generator, covered: Mask) -> Mask:
    """Draw a bright scratch on the free plate, and return its pixels."""
    fine = len(canvas)
    side = fine // _FINE
    best: tuple[int, Mask, Plane] | None = None
    for _ in range(12):
        length, angle = rng.uniform(0.12, 0.3) * fine, rng.uniform(0, np.pi)
        x, y = rng.uniform(0.1, 0.9, 2) * fine
        bend = rng.uniform(-0.15, 0.15) * length
        t = np.linspace(-0.5, 0.5, 24)
        points = np.stack(
            [
                x + np.cos(angle) * t * length - np.sin(angle) * bend * (4 * t * t - 1),
                y + np.sin(angle) * t * length + np.cos(angle) * bend * (4 * t * t - 1),
            ],
            1,
        )
        drawn = np.zeros((fine, fine), np.uint8)
        width = max(2, round(0.011 * fine))
        cv2.polylines(drawn, [np.rint(points * 16).astype(np.int32)], isClosed=False, color=255, thickness=width,
                      lineType=cv2.LINE_AA, shift=4)  # fmt: skip
        share = drawn.astype(np.float32) / 255
        mask = np.asarray(cv2.resize(share, (side, side), interpolation=cv2.INTER_AREA) >= _COVERED / 2, np.bool_)
        hidden = int((mask & covered).sum())
        if mask.any() and (best is None or hidden < best[0]):
            best = (hidden, mask, share)
        if best is not None and best[0] == 0:
            break
    assert best is not None
    canvas += best[2][..., None] * _SCRATCH_LEVEL
    return best[1]


def _soft(inside: Plane, edge: float = 0.004) -> Plane:
    """Return 1 inside (distance above 0), 0 outside, with a rim of ``edge``."""
    return np.asarray(np.clip(inside / edge + 0.5, 0, 1), np.float32)


def _disc(u: Plane, v: Plane, radius: float) -> Plane:
    return _soft(np.asarray(radius - np.hypot(u, v), np.float32))


def _box(u: Plane, v: Plane, half_u: float, half_v: float) -> Plane:
    return _soft(np.asarray(np.minimum(half_u - np.abs(u), half_v - np.abs(v)), np.float32))


def _paint(base: Plane, over: Plane, colour: tuple[float, float, float]) -> Plane:
    return np.asarray(base + over[..., None] * (np.array(colour, np.float32) - base), np.float32)


def _filled(u: Plane, v: Plane, colour: tuple[float, float, float]) -> Plane:
    shape = np.broadcast_shapes(u.shape, v.shape)
    return np.full((*shape, 3), colour, np.float32)


def _screw(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    colour = _filled(u, v, (150, 155, 160)) * (1 - 2.2 * (u + v))[..., None]
    cross = np.maximum(_box(u, v, 0.042, 0.009), _box(u, v, 0.009, 0.042))
    return _disc(u, v, 0.062), _paint(colour, cross, (35, 35, 38))


def _washer(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    ring = _disc(u, v, 0.075) * (1 - _disc(u, v, 0.038))
    return ring, _filled(u, v, (70, 160, 205)) * (1 - 1.6 * (u - v))[..., None]


def _chip(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    pins = _box(u, v, 0.08, 0.046) * (np.mod(v + 0.0085, 0.026) < 0.013)  # noqa: PLR2004 (pitch of the pins)
    body = _box(u, v, 0.056, 0.06)
    colour = _paint(_filled(u, v, (205, 208, 210)), body, (42, 40, 38))
    return np.asarray(np.maximum(pins, body), np.float32), _paint(colour, _disc(u + 0.035, v + 0.04, 0.01), (150,) * 3)


def _capacitor(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    colour = _paint(_filled(u, v, (120, 62, 40)), _disc(u, v, 0.05), (175, 170, 168))
    return _disc(u, v, 0.068), _paint(colour, _box(u - 0.05, v, 0.02, 0.05), (200, 195, 190))


def _connector(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    colour = _filled(u, v, (215, 222, 224))
    holes = (np.abs(np.mod(u + 0.015, 0.03) - 0.015) < 0.008) & (np.abs(np.abs(v) - 0.018) < 0.008)  # noqa: PLR2004
    return _box(u, v, 0.085, 0.042), _paint(colour, np.asarray(holes, np.float32), (40, 38, 36))


def _label(u: Plane, v: Plane) -> tuple[Plane, Plane]:
    colour = _filled(u, v, (60, 190, 120))
    lines = (np.mod(v + 0.007, 0.022) < 0.008) & (np.abs(u) < 0.055)  # noqa: PLR2004 (printed lines)
    return _box(u, v, 0.072, 0.05), _paint(colour, np.asarray(lines, np.float32), (30, 40, 30))


_DRAWN: dict[str, Callable[[Plane, Plane], tuple[Plane, Plane]]] = {
    "screw": _screw, "washer": _washer, "chip": _chip, "capacitor": _capacitor, "connector": _connector,
    "label": _label,
}  # fmt: skip
