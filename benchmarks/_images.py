"""Folders of images as benchmarks use them: taps of all images once, and what a method may see of them for a seed.

It must not know methods or figures.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from benchmarks._setting import quiet
from edge.bundle import Preprocessing
from trainer.backbones.efficientnet_lite import lite0_trunk
from trainer.backbones.registry import trunk_id
from trainer.data.conveyor import write_default
from trainer.data.folder import load_mask, read_folder
from trainer.data.images import load_image
from trainer.data.splits import split_holdout
from trainer.data.textures import TEXTURES
from trainer.features import extract, extract_tiles, load_canvases
from trainer.fit import HOLDOUT_FRACTION, HOLDOUT_MINIMUM
from trainer.methods.base import Features, FitContext, Validation
from trainer.synthesis.image2d import make_defects

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from trainer.backbones.efficientnet_lite import Trunk
    from trainer.data.folder import Sample

    Canvases = npt.NDArray[np.uint8]
    Masks = npt.NDArray[np.bool_]

CPU = torch.device("cpu")
_VALIDATION_DEFECTS = 120


@dataclass(frozen=True)
class Category:
    """One folder: taps of its images, and the truth about the test images.

    Attributes:
        name: of the folder and the one above it.
        preprocessing: one tile of the network's size.
        trunk: the shared trunk.
        samples: training images.
        canvases: uint8 [n, H, W, 3] RGB, the training images.
        train: their taps.
        test: taps of the test images.
        labels: bool [m], True is defective.
        groups: names [m]; images of one group are not independent.
        masks: bool [m, H, W], None where a defective image has none.
    """

    name: str
    preprocessing: Preprocessing
    trunk: Trunk
    samples: tuple[Sample, ...]
    canvases: Canvases
    train: Features
    test: Features
    labels: npt.NDArray[np.bool_]
    groups: npt.NDArray[np.str_]
    masks: Masks | None

    def features(self, canvases: Canvases, groups: npt.NDArray[np.str_], taps: Sequence[str]) -> Features:
        """Return taps of canvases uint8 [k, H, W, 3]."""
        return _extract(self.trunk, canvases, self.preprocessing, groups, taps)


@dataclass(frozen=True)
class Split:
    """What training with a seed sees: images to learn from, and the held-out ones.

    Attributes:
        fit: taps of the images to learn from.
        images: uint8 [n, H, W, 3] RGB, those images.
        holdout: uint8 [k, H, W, 3] RGB, good images that nothing is fitted on.
        good: their taps.
    """

    fit: Features
    images: Canvases
    holdout: Canvases
    good: Features


def open_category(
    folder: Path, *, taps: Sequence[str], size: int, train: int | None = None, test: int | None = None
) -> Category:
    """Read a folder in MVTec layout.

    Args:
        folder: with train/good and test.
        taps: names of the taps to keep.
        size: side of the network's input in pixels.
        train: most training images, evenly drawn; None is all.
        test: most test images, half of them good; None is all.
    """
    found = read_folder(folder)
    samples = _thinned(found.train, train)
    judged = (
        *_thinned([sample for sample in found.test if not sample.anomalous], test and test // 2),
        *_thinned([sample for sample in found.test if sample.anomalous], test and test // 2),
    )
    preprocessing = Preprocessing(height=size, width=size)
    trunk = lite0_trunk()
    canvases = load_canvases(samples, preprocessing, progress=quiet, what="")
    groups = _groups(judged)
    seen = load_canvases(judged, preprocessing, progress=quiet, what="")
    print(f"  read {folder}: {len(samples)} to train on, {len(judged)} to test", file=sys.stderr, flush=True)
    return Category(
        name=f"{folder.resolve().parent.name}/{folder.resolve().name}",
        preprocessing=preprocessing,
        trunk=trunk,
        samples=samples,
        canvases=canvases,
        train=_extract(trunk, canvases, preprocessing, _groups(samples), taps),
        test=_extract(trunk, seen, preprocessing, groups, taps),
        labels=np.array([sample.anomalous for sample in judged]),
        groups=groups,
        masks=_read_masks(judged, size),
    )


@contextmanager
def generated_folders(*, train: int, test: int, seed: int = 0) -> Iterator[list[Path]]:
    """Write generated webs with defects made on the surface, before the camera; gone when the block ends."""
    with TemporaryDirectory() as folder:
        halves = {"test_good": test // 2, "test_defective": test // 2}
        yield [
            write_default(Path(folder) / "web" / kind, seed=seed, kind=kind, train=train, **halves) for kind in TEXTURES
        ]


def split(category: Category, seed: int) -> Split:
    """Hold good images out as training does."""
    parts = split_holdout(category.samples, HOLDOUT_FRACTION, seed, HOLDOUT_MINIMUM)
    place = {sample.path: index for index, sample in enumerate(category.samples)}
    fit, held = ([place[sample.path] for sample in part] for part in (parts.fit, parts.holdout))
    return Split(
        fit=subset(category.train, fit),
        images=category.canvases[fit],
        holdout=category.canvases[held],
        good=subset(category.train, held),
    )


def fit_context(
    category: Category,
    parts: Split,
    *,
    seed: int,
    taps: Sequence[str],
    defects: Callable[[Canvases], tuple[Canvases, Masks]] | None = None,
) -> FitContext:
    """Return what a method may use.

    Args:
        category: the folder.
        parts: from :func:`split`.
        seed: of the run.
        taps: of the method.
        defects: makes the validation defects of the held-out images; None is what training uses.
    """
    if defects is None:
        defects = partial(make_defects, seed=seed, repeats=max(1, round(_VALIDATION_DEFECTS / len(parts.holdout))))
    defective, masks = defects(parts.holdout)
    groups = np.resize(parts.good.groups, len(defective))
    return FitContext(
        features=parts.fit,
        images=parts.images,
        extract=partial(extract_tiles, trunk=category.trunk, tap_names=taps, device=CPU),
        validation=Validation(parts.good, category.features(defective, groups, taps), masks),
        seed=seed,
        device=CPU,
        progress=quiet,
        trunk_id=trunk_id(category.trunk),
    )


def subset(features: Features, rows: Sequence[int]) -> Features:
    """Return the taps of some images (one tile each)."""
    index = torch.tensor(rows)
    return Features({name: tap[index] for name, tap in features.taps.items()}, 1, features.groups[list(rows)])


def at_size(maps: npt.NDArray[np.float32], size: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield maps enlarged to the masks' size."""
    return (cv2.resize(one, (size, size), interpolation=cv2.INTER_LINEAR) for one in maps)


def _thinned(samples: Sequence[Sample], most: int | None) -> tuple[Sample, ...]:
    if most is None or len(samples) <= most:
        return tuple(samples)
    return tuple(samples[i] for i in np.linspace(0, len(samples) - 1, most).round().astype(int))


def _extract(
    trunk: Trunk,
    canvases: Canvases,
    preprocessing: Preprocessing,
    groups: npt.NDArray[np.str_],
    taps: Sequence[str],
) -> Features:
    return extract(trunk, canvases, preprocessing, tap_names=taps, groups=groups, device=CPU, progress=quiet, what="")


def _groups(samples: Sequence[Sample]) -> npt.NDArray[np.str_]:
    return np.array([sample.group for sample in samples], np.str_)


def _read_masks(samples: Sequence[Sample], size: int) -> Masks | None:
    if any(sample.anomalous and sample.mask is None for sample in samples):
        return None
    masks = np.zeros((len(samples), size, size), np.bool_)
    for index, sample in enumerate(samples):
        if sample.anomalous:
            mask = load_mask(sample, load_image(sample.path).shape[:2]).astype(np.uint8)
            masks[index] = cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST).astype(np.bool_)
    return masks
