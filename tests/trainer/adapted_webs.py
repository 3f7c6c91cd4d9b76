"""Variants of generated webs as sub-classes, good, defective and in another light, with their taps."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt
import torch

from deploy.progress import no_progress
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.data.textures import TextureWeb
from trainer.methods.adapted_moe.model import TAP_NAMES
from trainer.methods.base import Features, FitContext, Validation
from trainer.synthesis.image2d import synthesise

SIDE = 128
KNOWN = ("cloth", "cloth, near", "metal", "metal, across")
UNSEEN = "wafer"
CPU = torch.device("cpu")

Images = npt.NDArray[np.uint8]


def view(name: str, index: int) -> Images:
    """Return a good image uint8 [SIDE, SIDE, 3]; images of different index share no place."""
    kind, _, variant = name.partition(", ")
    side = SIDE * 2 // 3 if variant == "near" else SIDE
    image = TextureWeb(kind, 3, SIDE).view(index * 4 * SIDE, SIDE)[:side, :side]
    if variant == "across":
        image = np.rot90(image)
    return np.ascontiguousarray(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR))


def good(name: str, first: int, count: int) -> Images:
    return np.stack([view(name, first + index) for index in range(count)])


def defective(images: Images, *, size: tuple[float, float] = (0.1, 0.3), contrast: float = 0.7) -> Images:
    rngs = (np.random.default_rng(index) for index in range(len(images)))
    made = [synthesise(one, rng=rng, contrast=contrast, size=size) for one, rng in zip(images, rngs, strict=True)]
    return np.stack([one.image for one in made])


def dimmed(images: Images) -> Images:
    """Another lamp: gain 0.72, offset 0.16."""
    return np.clip(np.rint(images * 0.72 + 0.16 * 255), 0, 255).astype(np.uint8)


def darkened(images: Images) -> Images:
    """Half the contrast: gain 0.5, offset 0.25; the experts bear :func:`dimmed` by themselves."""
    return np.clip(np.rint(images * 0.5 + 0.25 * 255), 0, 255).astype(np.uint8)


def toned(images: Images) -> Images:
    """Another tone curve: gamma 1.4."""
    return np.rint(255 * (images / 255) ** 1.4).astype(np.uint8)


def blurred(images: Images) -> Images:
    return np.stack([cv2.GaussianBlur(one, (0, 0), 0.8) for one in images])


def extract(images: Images) -> Features:
    trunk = lite0_trunk()
    found: dict[str, list[torch.Tensor]] = {name: [] for name in TAP_NAMES}
    for start in range(0, len(images), 16):
        with torch.inference_mode():
            taps = dict(zip(trunk.tap_names, trunk(torch.from_numpy(images[start : start + 16])), strict=True))
        for name in TAP_NAMES:
            found[name].append(taps[name].half())
    return Features({n: torch.cat(v) for n, v in found.items()}, 1, np.arange(len(images)).astype(np.str_))


def joined(parts: list[Features]) -> Features:
    taps = {name: torch.cat([part.taps[name] for part in parts]) for name in TAP_NAMES}
    return Features(taps, 1, np.arange(sum(map(len, parts))).astype(np.str_))


TRAIN, HELD, TEST = 12, 8, 24


@lru_cache(maxsize=1)
def context() -> FitContext:
    """Return four known sub-classes of TRAIN images and HELD held-out ones each."""
    images = np.concatenate([good(name, 0, TRAIN) for name in KNOWN])
    held = extract(np.concatenate([good(name, 100, HELD) for name in KNOWN]))
    nothing = replace(held, taps={name: tap[:0] for name, tap in held.taps.items()})
    return FitContext(
        features=extract(images),
        images=images,
        extract=extract,
        validation=Validation(held, nothing, np.zeros((0, SIDE, SIDE), bool)),
        seed=0,
        device=CPU,
        progress=no_progress,
        subclasses=np.repeat(np.array(KNOWN), TRAIN),
    )


@lru_cache(maxsize=1)
def tests() -> dict[str, Images]:
    """Return TEST good images of each sub-class, known and unseen."""
    return {name: good(name, 200, TEST) for name in (*KNOWN, UNSEEN)}
