"""Three generated products with their taps, and a OneNIP trained on all of them together within seconds."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from deploy.progress import no_progress
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.data.texture_factory import TextureSubclass
from trainer.features import extract_tiles
from trainer.methods.base import Features, FitContext, Validation
from trainer.methods.onenip.fit import OneNipConfig, OneNipMethod
from trainer.methods.uniad.model import TAP_NAMES
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from trainer.methods.onenip.model import OneNipHead

SIDE = 96
PRODUCTS = ("cloth", "metal", "wafer")
_NUMBERS = (3, 4, 2)
TRAIN, HELD, TEST = 16, 6, 12
CPU = torch.device("cpu")
SMALL = OneNipConfig(width=48, heads=4, hidden=96, refiner=24, steps=260, anomalies=96, rate=2e-3)

Images = npt.NDArray[np.uint8]


class Unseen(NamedTuple):
    """Good images of every product that nobody saw, and the same with synthetic defects."""

    good: Features
    defective: Features
    masks: npt.NDArray[np.bool_]


def views(part: str, first: int, count: int) -> tuple[Images, torch.Tensor]:
    """Return images uint8 [3 * count, SIDE, SIDE, 3] RGB of the products in turn, and which product each shows."""
    makes = [TextureSubclass(name, number, 91, SIDE) for name, number in zip(PRODUCTS, _NUMBERS, strict=True)]
    images = [make.good(part, first + index)[..., ::-1] for make in makes for index in range(count)]
    return np.stack(images), torch.arange(len(PRODUCTS)).repeat_interleave(count)


def taps(images: Images, products: torch.Tensor) -> Features:
    found = extract_tiles(images, trunk=lite0_trunk(), tap_names=TAP_NAMES, device=CPU)
    return Features(found.taps, 1, found.groups, products)


@lru_cache(maxsize=1)
def context() -> FitContext:
    """Return what a method may see of the three products together."""
    images, products = views("train", 0, TRAIN)
    held = taps(*views("train", TRAIN, HELD))
    return FitContext(
        features=taps(images, products),
        images=images,
        extract=partial(extract_tiles, trunk=lite0_trunk(), tap_names=TAP_NAMES, device=CPU),
        validation=Validation(held, held, np.zeros((len(held), SIDE, SIDE), bool)),
        seed=0,
        device=CPU,
        progress=no_progress,
        subclasses=np.repeat(np.array(PRODUCTS), TRAIN),
        products=PRODUCTS,
    )


@lru_cache(maxsize=1)
def trained() -> OneNipHead:
    """Return a head trained on all three."""
    return OneNipMethod.fit(context(), SMALL)


@lru_cache(maxsize=1)
def unseen() -> Unseen:
    """Return images that training did not see."""
    images, products = views("good", 0, TEST)
    marred, masks = make_defects(images, seed=5, contrast=1.0, size=(0.15, 0.4))
    return Unseen(taps(images, products), taps(marred, products), masks)
