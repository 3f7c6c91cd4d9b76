"""Where a generator comes from: the generic set (kept in the cache), a product's own images, or another run.

It must not know heads, banks or how a generator is trained.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from deploy.trunks import CACHE_VARIABLE, default_cache
from edge.errors import DataError
from trainer.methods.feddymem.generator import Judged, Patches, Trained, raw_patches, train_generator
from trainer.methods.feddymem.generic import GENERIC_VERSION, generic_products
from trainer.methods.feddymem.model import LEVELS, MAP_STRIDE, Generator, level_channels
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from deploy.progress import Progress
    from trainer.methods.base import Features, FitContext
    from trainer.methods.feddymem.generator import Recipe

    Extract = Callable[[npt.NDArray[np.uint8]], Features]

_LOG = logging.getLogger(__name__)

GENERATOR_VERSION = 1
"""Raised when equal recipes give other generators: it is part of every cache key."""

_SEED = 0  # of every generic generator: no run's own, or two products would lie in two spaces
_REMEMBERED, _SEEN, _HELD_OUT_SEEN, _DEFECTS_EACH = 4, 2, 8, 3
_DEFECT_SEED = 77
_LEAST_COVER = 0.5
_OWN_IMAGES = 60
_PREFIX = "generator."


def generic_generator(extract: Extract, recipe: Recipe, *, trunk_id: str, progress: Progress) -> Trained:
    """Return the generator of the generic set, from the cache where an equal one was made before.

    Args:
        extract: taps of tiles, through the trunk; see :class:`trainer.methods.base.FitContext`.
        recipe: how it is made.
        trunk_id: of the trunk; empty keeps nothing.
        progress: progress function.

    Raises:
        DataError: the cache cannot be written.
        MissingExtraError: scikit-image is not installed.
    """
    path = None
    if trunk_id:
        text = json.dumps([trunk_id, GENERATOR_VERSION, GENERIC_VERSION, LEVELS, asdict(recipe)], sort_keys=True)
        path = default_cache() / "generators" / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"
        if (found := _read(path)) is not None:
            return found
    products, channels = _generic_products(extract, progress)
    judged = _generic_judged(extract, progress) if recipe.steps else []  # statistics alone leave nothing to choose
    trained = train_generator(products, judged, channels, recipe, seed=_SEED, progress=progress)
    _say(trained)
    if path is not None:
        _write(path, trained)
        # What the next run will read: its bits, not those of this process.
        return _read(path) or trained
    return trained


def own_generator(context: FitContext, recipe: Recipe) -> Trained:
    """Return a generator of the product's own images: half of them for its bank, half to learn from.

    Raises:
        DataError: fewer than 2 images.
    """
    features = context.features
    images = len(features) // features.tiles_per_image
    drawn = torch.randperm(images, generator=context.generator())[:_OWN_IMAGES]
    if len(drawn) < 2:  # noqa: PLR2004
        raise DataError("a generator of the product's own images needs at least 2 of them; add good parts")
    half = len(drawn) // 2
    remembered, seen = (raw_patches(_images(features, part)) for part in (drawn[:half], drawn[half:]))
    channels = channels_of(features)
    trained = train_generator([Patches(remembered, seen)], [], channels, recipe, seed=context.seed)
    _say(trained)
    return trained


def generator_of(path: Path, channels: tuple[int, ...]) -> Generator:
    """Return the generator of another run, bit for bit.

    Args:
        path: a run folder of this method, or its head.safetensors.
        channels: of each level of the trunk.

    Raises:
        DataError: the file is missing, is no fleet memory, or stands on a trunk with other channels.
    """
    file = path / "head.safetensors" if path.is_dir() else path
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: cannot be read ({error}); give generator=RUN, a run folder of feddymem") from error
    return generator_from({k[len(_PREFIX) :]: v for k, v in tensors.items() if k.startswith(_PREFIX)}, channels, file)


def generator_from(tensors: dict[str, torch.Tensor], channels: tuple[int, ...], what: object) -> Generator:
    """Rebuild a generator from its tensors.

    Raises:
        DataError: the tensors are not a generator's, or of other channels.
    """
    try:
        generator = Generator(channels, int(tensors["project.weight"].shape[0]))
        generator.load_state_dict(tensors)
    except (KeyError, IndexError, RuntimeError) as error:
        raise DataError(f"{what}: holds no generator for taps of {channels} channels ({error})") from error
    return generator.eval().requires_grad_(requires_grad=False)


def _generic_products(extract: Extract, progress: Progress) -> tuple[list[Patches], tuple[int, ...]]:
    products = []
    channels: tuple[int, ...] = ()
    for product in generic_products(held_out=False, remembered=_REMEMBERED, seen=_SEEN):
        features = extract(product.remembered)
        channels = channels_of(features)
        products.append(Patches(raw_patches(features), raw_patches(extract(product.seen))))
        progress("generic products", len(products), 0)
    return products, channels


def _generic_judged(extract: Extract, progress: Progress) -> list[Judged]:
    judged = []
    for product in generic_products(held_out=True, remembered=_REMEMBERED, seen=_HELD_OUT_SEEN):
        defective, masks = make_defects(product.seen, seed=_DEFECT_SEED, repeats=_DEFECTS_EACH)
        good = len(product.seen)
        unmarked = np.zeros(good * masks[0].size // MAP_STRIDE**2, np.bool_)
        judged.append(
            Judged(
                remembered=raw_patches(extract(product.remembered)),
                images=torch.cat([raw_patches(extract(part)) for part in (product.seen, defective)]),
                labels=np.arange(good + len(defective)) >= good,
                inside=np.concatenate([unmarked, covered(masks)]),
            )
        )
        progress("generic defects", len(judged), 0)
    return judged


def covered(masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which patches of the stride-8 grid a mask covers at least half.

    Args:
        masks: bool [n, H, W], H and W multiples of 8.

    Returns:
        bool [n * H / 8 * W / 8], row-major.
    """
    height, width = masks.shape[1] // MAP_STRIDE, masks.shape[2] // MAP_STRIDE
    shares = [cv2.resize(m.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) for m in masks]
    return np.stack(shares).ravel() >= _LEAST_COVER


def _images(features: Features, images: torch.Tensor) -> Features:
    tiles = features.tiles_per_image
    rows = (images[:, None] * tiles + torch.arange(tiles)).flatten()
    return type(features)(
        {name: tap[rows] for name, tap in features.taps.items()}, tiles, features.groups[images.numpy()]
    )


def channels_of(features: Features) -> tuple[int, ...]:
    """Return the channels of each level's patches."""
    return level_channels([int(features.taps[name].shape[1]) for name in LEVELS])


def _say(trained: Trained) -> None:
    if trained.figures["collapsed"]:
        _LOG.warning(
            "the generator's rows fell below half their effective rank; kept epoch %d of its training",
            trained.figures["epoch"],
        )


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> Trained | None:
    """Return what the cache holds intact, else None."""
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads(file.metadata()["trained"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if _digest(tensors) != said["sha256"]:
            return None
        return Trained(generator_from(tensors, tuple(said["channels"]), path), said["figures"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, DataError):
        return None


def _write(path: Path, trained: Trained) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in trained.generator.state_dict().items()}
    said = {"sha256": _digest(tensors), "channels": trained.generator.channels, "figures": trained.figures}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, work = tempfile.mkstemp(dir=path.parent, prefix=".making-")
        os.close(handle)
        try:
            save_file(tensors, work, metadata={"trained": json.dumps(said)})
            Path(work).replace(path)
        finally:
            Path(work).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be written ({reason}); set {CACHE_VARIABLE} to a folder that can") from error
