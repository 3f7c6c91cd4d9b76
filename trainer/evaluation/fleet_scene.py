"""Generated products under the light, exposure and position of each box: the images that a simulated fleet sees.

It knows surfaces and cameras; it must not know memories, rounds or scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.camera import SEEN, Light, Pose, illuminate, look, look_at_mask, sensor_noise
from trainer.data.textures import TEXTURES, TextureWeb
from trainer.synthesis.image2d import FAMILIES, Defect, synthesise

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Canvases = npt.NDArray[np.uint8]
    Masks = npt.NDArray[np.bool_]

SIDE = 224
"""Height and width in pixels of the images, the network's input."""

PRODUCTS = 6
"""Webs in the fleet: two of each kind, unlike in tint, pattern or streaks."""

KNOWN_DEFECTS = tuple(FAMILIES)[::2]
"""Families that the aggregator's canaries are made of."""

UNKNOWN_DEFECTS = tuple(FAMILIES)[1::2]
"""Families that a poisoner teaches; none is among the canaries'."""

DEFECT_SIZE = (0.06, 0.2)
"""Extent of defects as a share of the diagonal of the surface in view; plainly visible, so that what a figure lacks is
the memory's doing."""

MOST_BOXES = 3000
"""Of a fleet; a web is long enough for so many and the trainer."""

_MARGIN = 0.1  # of a view: defects inside it stay in the picture at every pose
_BOX_RUN = 2**20  # rows of a web that belong to one box: no two boxes ever see one place
_SPLITS = ("learn", "commissioning", "good", "defective", "taught", "canary_good", "canary_defective")
_SPLIT_RUN = _BOX_RUN // len(_SPLITS)


@dataclass(frozen=True, slots=True)
class Condition:
    """How one box sees its product.

    Attributes:
        gain: exposure, a factor on all grey levels.
        slope_x: relative change of light from left to right.
        slope_y: relative change from top to bottom.
        distance: pixels of surface in a picture, as a share of the usual.
        quarter_turns: how the camera is mounted.
        noise: factor on the sensor's noise.
    """

    gain: float
    slope_x: float
    slope_y: float
    distance: float
    quarter_turns: int
    noise: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Condition:
        """Draw a condition: exposures within a factor of 2.4, distances within one of 1.6."""
        slopes = rng.uniform(-0.35, 0.35, 2)
        return cls(
            gain=float(rng.uniform(0.55, 1.3)),
            slope_x=float(slopes[0]),
            slope_y=float(slopes[1]),
            distance=float(rng.uniform(0.8, 1.3)),
            quarter_turns=int(rng.integers(2)),
            noise=float(rng.uniform(0.8, 2.0)),
        )

    def __str__(self) -> str:
        return f"gain {self.gain:.2f}, distance {self.distance:.2f}, turned {90 * self.quarter_turns}"


@dataclass(frozen=True, slots=True)
class Site:
    """One box: a product in its own condition.

    Attributes:
        number: counts from 0; the same number and seed see the same images.
        product: kind and number of the web.
        condition: how the box sees it.
        seed: of the fleet.
    """

    number: int
    product: str
    condition: Condition
    seed: int

    def good(self, split: str, count: int) -> Canvases:
        """Return good images of a split, uint8 [count, 224, 224, 3] RGB; splits share no place of the web."""
        return self._pictures(split, count, ())[0]

    def defective(self, split: str, count: int, families: Sequence[str] = tuple(FAMILIES)) -> tuple[Canvases, Masks]:
        """Return images with a defect each, made on the surface, and their masks bool [count, 224, 224].

        Families take turns; places are other ones than those of every other split.
        """
        return self._pictures(split, count, families)

    def _pictures(self, split: str, count: int, families: Sequence[str]) -> tuple[Canvases, Masks]:
        side = int(np.ceil(SIDE / SEEN * self.condition.distance))
        kind, _, web_seed = self.product.rpartition("-")
        web = TextureWeb(kind, int(web_seed), side)
        start = self.number * _BOX_RUN + _SPLITS.index(split) * _SPLIT_RUN
        if (count + 1) * side > _SPLIT_RUN:
            raise ValueError(f"{count} images of a box do not fit its stretch of the web")
        rng = np.random.default_rng((self.seed, self.number, _SPLITS.index(split)))
        canvases = np.empty((count, SIDE, SIDE, 3), np.uint8)
        masks = np.zeros((count, SIDE, SIDE), np.bool_)
        for index in range(count):
            view = web.view(start + index * side, side)
            defect = _scarred(view, rng, families[index % len(families)]) if families else None
            pose = Pose.draw(rng)
            picture = self._lit(look(view if defect is None else defect.image, pose, SIDE), rng)
            if defect is not None:
                mask = look_at_mask(defect.mask, pose, SIDE)
                masks[index] = np.rot90(mask, self.condition.quarter_turns)
            canvases[index] = np.rot90(picture, self.condition.quarter_turns)[:, :, ::-1]
        return canvases, masks

    def _lit(self, picture: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
        """Light a picture by the box's condition, with the drift that is left from frame to frame."""
        own, drift = self.condition, Light.draw(rng)
        light = Light(
            gain=own.gain * (1 + (drift.gain - 1) / 4),
            slope_x=own.slope_x + drift.slope_x / 4,
            slope_y=own.slope_y + drift.slope_y / 4,
        )
        noisy = sensor_noise(illuminate(picture, light), rng, read=1.2 * own.noise, shot=0.18 * own.noise)
        return np.asarray(noisy, dtype=np.uint8)


def _scarred(view: npt.NDArray[np.uint8], rng: np.random.Generator, family: str) -> Defect:
    """Put a defect on a view, far enough inside to stay in the picture."""
    margin = int(np.ceil(_MARGIN * len(view)))
    inner = slice(margin, len(view) - margin)
    made = synthesise(np.ascontiguousarray(view[inner, inner]), rng=rng, family=family, size=DEFECT_SIZE)
    image, mask = view.copy(), np.zeros(view.shape[:2], np.bool_)
    image[inner, inner], mask[inner, inner] = made.image, made.mask
    return Defect(image, mask, made.family, made.contrast)


def make_sites(boxes: int, *, seed: int, products: int = PRODUCTS) -> tuple[Site, ...]:
    """Spread boxes over products and conditions; neighbours have different products.

    Args:
        boxes: how many, >= 1.
        seed: of products and conditions; a box keeps its own whatever the number of boxes.
        products: webs in the fleet, >= 1.

    Raises:
        ValueError: a number is out of range, or there are more boxes than a web is long.
    """
    if boxes < 1 or products < 1 or boxes > MOST_BOXES:
        raise ValueError(f"boxes {boxes} and products {products} must be at least 1, boxes at most {MOST_BOXES}")
    return tuple(_site(number, number % products, seed) for number in range(boxes))


def trainer_sites(*, seed: int, products: int = PRODUCTS) -> tuple[Site, ...]:
    """Return one site of each product where the trainer's images are from; no box is there."""
    return tuple(_site(MOST_BOXES + number, number, seed) for number in range(products))


def _site(number: int, product: int, seed: int) -> Site:
    name = f"{TEXTURES[product % len(TEXTURES)]}-{1000 * seed + product // len(TEXTURES)}"
    return Site(number, name, Condition.draw(np.random.default_rng((seed, number, 77))), seed)
