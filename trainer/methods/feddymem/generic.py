"""The fixed generic set that a shared generator is trained on: made-up products out of webs and photographs.

No product's own images, nor those that the embedded example is cut from; the same set at every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trainer.data.camera import Light, Pose, illuminate, look, sensor_noise
from trainer.data.generic import photograph_folder
from trainer.data.images import load_image
from trainer.data.textures import TEXTURES, TextureWeb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    Picture = npt.NDArray[np.uint8]

GENERIC_VERSION = 1
"""Raised when the set changes: it is part of every generator's cache key."""

SIDE = 224
# brick, grass and gravel are left out: the embedded example shows them as products.
_TRAIN_PHOTOGRAPHS = (
    "astronaut.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png",
    "moon.png", "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip
_HELD_OUT_PHOTOGRAPHS = ("coins.png", "retina.jpg", "text.png")
_WINDOWS = 2  # of one photograph, each a product
_SMALLEST_WINDOW = 112
_WEB_SIDES = (256, 176, 336, 220)  # pixels of the surface in one view: how far away the camera is
_SEED = 20240301
_GAINS = (0.75, 1.25)


@dataclass(frozen=True)
class GenericProduct:
    """Good images of one made-up product, each in a pose and light of its own.

    Attributes:
        name: what it shows.
        remembered: uint8 [a, 224, 224, 3] RGB, for its bank.
        seen: uint8 [b, 224, 224, 3] RGB, further images, under a wider range of light.
    """

    name: str
    remembered: Picture
    seen: Picture


def generic_products(*, held_out: bool, remembered: int, seen: int) -> Iterator[GenericProduct]:
    """Draw the made-up products.

    Args:
        held_out: those of other webs and photographs, for validation.
        remembered: images for the bank of each.
        seen: further images of each.

    Raises:
        MissingExtraError: scikit-image is not installed.
        DataError: a photograph is missing or damaged.
    """
    count = remembered + seen
    for number, (name, view) in enumerate(_views(held_out=held_out)):
        rng = np.random.default_rng((_SEED, int(held_out), number))
        images = [_shoot(view(index), rng, wide=index >= remembered) for index in range(count)]
        yield GenericProduct(name, np.stack(images[:remembered]), np.stack(images[remembered:]))


def _views(*, held_out: bool) -> Iterator[tuple[str, Callable[[int], Picture]]]:
    """Yield a name and a function from number to view, for every product."""
    for kind in TEXTURES:
        for number, side in enumerate(_WEB_SIDES[:1] if held_out else _WEB_SIDES):
            web = TextureWeb(kind, _SEED + 100 * held_out + number, side)

            def drawn(index: int, web: TextureWeb = web, side: int = side) -> Picture:
                return web.view(index * side, side)

            yield f"{kind} {number}", drawn
    rng = np.random.default_rng((_SEED, int(held_out)))
    for file in _HELD_OUT_PHOTOGRAPHS if held_out else _TRAIN_PHOTOGRAPHS:
        photo = load_image(photograph_folder() / file)
        for number in range(_WINDOWS):
            side = int(rng.integers(_SMALLEST_WINDOW, min(photo.shape[:2]) + 1))
            y, x = (int(rng.integers(0, extent - side + 1)) for extent in photo.shape[:2])
            window = np.ascontiguousarray(photo[y : y + side, x : x + side])

            def cut(_index: int, window: Picture = window) -> Picture:
                return window

            yield f"{file} {number}", cut


def _shoot(view: Picture, rng: np.random.Generator, *, wide: bool) -> Picture:
    light = Light.draw(rng)
    gain = float(rng.uniform(*_GAINS))  # always drawn, so that what follows is the same
    lit = illuminate(look(view, Pose.draw(rng), SIDE), Light(gain, light.slope_x, light.slope_y) if wide else light)
    return np.ascontiguousarray(sensor_noise(lit, rng)[:, :, ::-1])
