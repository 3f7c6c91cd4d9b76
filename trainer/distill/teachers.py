"""Trained detectors as teachers: what they say of pictures, and the features that they see.

A teacher is any run; several are an ensemble whose maps are standardised by their own held-out good parts.
It must not know students.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from edge.errors import DataError, UsageError
from trainer.distill.record import TeacherRecord
from trainer.features import extract
from trainer.fit import head_maps
from trainer.methods.memory.reduce import whitening
from trainer.methods.patches import patch_mean
from trainer.runs import Run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Preprocessing
    from trainer.distill.gallery import Gallery, Views
    from trainer.methods.base import Features, Head

LEVELS = ("s4", "s8", "s16")
_WHITENING = 0.3  # of the mean eigenvalue, as the memory detector's
_EMBEDDED = 80  # pictures of each kind that carry the first teacher's features to the student


@dataclass(frozen=True)
class Taught:
    """What teachers say of a lesson.

    Attributes:
        maps: per teacher, float32 [n, h, w], one joined map per picture of the lesson, in deviations of that
            teacher's map on held-out good parts.
        embedding: per level of the first teacher, float32 [m, C, h, w], whitened, a row per tile of ``embedded``.
        embedded: int64, indices of the lesson's pictures that ``embedding`` is of.
    """

    maps: tuple[npt.NDArray[np.float32], ...]
    embedding: dict[str, torch.Tensor]
    embedded: npt.NDArray[np.int64]

    def target(self, size: tuple[int, int]) -> torch.Tensor:
        """Return the mean map of all teachers on a grid of ``size``, float32 [n, h, w]."""
        resized = [
            functional.interpolate(
                torch.from_numpy(maps)[:, None], size=size, mode="bilinear", antialias=True, align_corners=False
            )
            for maps in self.maps
        ]
        return torch.stack(resized).mean(0)[:, 0]


def load_teachers(paths: Sequence[Path], data_sha256: str) -> list[Run]:
    """Read runs that can teach together.

    Args:
        paths: run folders.
        data_sha256: of the training images that the student will learn from.

    Raises:
        DataError: a folder is no run, or its run learned from other images.
        UsageError: teachers of different seeds, crops, tiles or products.
    """
    runs = [Run.load(path) for path in paths]
    first = runs[0].record
    for run in runs:
        record = run.record
        if record.data_sha256 != data_sha256:
            raise DataError(f"{run.path}: learned from other images than --data holds; train it again on that folder")
        if record.seed != first.seed:
            raise UsageError(
                f"--teacher {run.path}: seed {record.seed}, the first teacher's is {first.seed}; with another seed it "
                "has seen the images that are held out here, so train it with the same"
            )
        ours, others = (
            (one.preprocessing.crop, one.preprocessing.tiles.rows, one.preprocessing.tiles.cols, one.product)
            for one in (first, record)
        )
        if ours != others:
            raise UsageError(f"--teacher {run.path}: other crop, tiles or product than {runs[0].path}")
    return runs


def teacher_record(run: Run) -> TeacherRecord:
    """Return what a student remembers of a teacher."""
    record = run.record
    return TeacherRecord(
        method=record.method,
        trunk=record.trunk.name,
        height=record.preprocessing.height,
        width=record.preprocessing.width,
        seed=record.seed,
        image_auroc=max(record.validation.values()),
    )


def teach(runs: Sequence[Run], gallery: Gallery, *, device: torch.device, progress: Progress) -> Taught:
    """Let teachers look at the lesson of a gallery.

    Args:
        runs: at least one.
        gallery: the pictures.
        device: where trunks and heads run.
        progress: progress function.
    """
    maps, embedding, embedded = [], {}, np.empty(0, np.int64)
    for index, run in enumerate(runs):
        preprocessing = run.record.preprocessing
        views = gallery.at(preprocessing)
        lesson = views.lesson()
        names = [name for name in run.trunk.tap_names if name in {*run.head.tap_names, *LEVELS}]
        features = extract(
            run.trunk,
            lesson,
            preprocessing,
            tap_names=names,
            groups=np.arange(len(lesson)).astype(np.str_),
            device=device,
            progress=progress,
            what=f"teacher {index + 1}",
        )
        held = extract(
            run.trunk,
            run.holdout,
            preprocessing,
            tap_names=run.head.tap_names,
            groups=run.holdout_groups,
            device=device,
            progress=progress,
            what=f"teacher {index + 1} on hold-out",
        )
        maps.append(standardised(run.head, features, held, preprocessing, device))
        if index == 0:
            embedded = chosen_pictures(views)
            embedding = whitened(features, len(views.good), embedded)
    return Taught(tuple(maps), embedding, embedded)


def standardised(
    head: Head, features: Features, held: Features, preprocessing: Preprocessing, device: torch.device
) -> npt.NDArray[np.float32]:
    """Return a head's joined maps float32 [n, h, w] in deviations of its maps of held-out good parts."""
    good = head_maps(head, held, preprocessing, device)
    mean, deviation = float(good.mean()), max(float(good.std()), 1e-9)
    return (head_maps(head, features, preprocessing, device) - mean) / deviation


def chosen_pictures(views: Views) -> npt.NDArray[np.int64]:
    """Return which pictures of a lesson carry a teacher's features to the student: some good, some defective."""
    first = len(views.good) + len(views.relit)
    return np.r_[np.arange(min(_EMBEDDED, len(views.good))), first + np.arange(min(_EMBEDDED, len(views.defective)))]


def tile_rows(pictures: npt.NDArray[np.int64], tiles: int) -> torch.Tensor:
    """Return the rows of the tiles of some pictures, a picture's tiles consecutive."""
    return torch.from_numpy((pictures[:, None] * tiles + np.arange(tiles)).reshape(-1))


def whitened(features: Features, good: int, pictures: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
    """Whiten each level by the first ``good`` pictures; return it for some pictures, float32 [tiles, C, h, w]."""
    tiles, found = features.tiles_per_image, {}
    rows = tile_rows(pictures, tiles)
    for name in LEVELS:
        if name not in features.taps:
            continue
        tap = features.taps[name]
        batches = (
            patch_mean(tap[i : min(i + 16, good * tiles)].float()).permute(0, 2, 3, 1).flatten(0, 2)
            for i in range(0, good * tiles, 16)
        )
        mean, matrix = whitening(batches, _WHITENING)
        patches = patch_mean(tap[rows].float()).permute(0, 2, 3, 1)
        found[name] = ((patches - mean) @ matrix).permute(0, 3, 1, 2)
    return found
