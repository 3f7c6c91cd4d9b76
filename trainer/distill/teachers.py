"""Trained detectors as teachers: what they say of pictures.

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
from trainer.runs import Run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploy.progress import Progress
    from edge.bundle import Preprocessing
    from trainer.distill.gallery import Gallery
    from trainer.methods.base import Features, Head


@dataclass(frozen=True)
class Taught:
    """What teachers say of a lesson.

    Attributes:
        maps: per teacher, float32 [n, h, w], one joined map per picture of the lesson, in deviations of that
            teacher's map on held-out good parts.
    """

    maps: tuple[npt.NDArray[np.float32], ...]

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
    maps = []
    for index, run in enumerate(runs):
        preprocessing = run.record.preprocessing
        lesson = gallery.at(preprocessing).lesson()
        features = extract(
            run.trunk,
            lesson,
            preprocessing,
            tap_names=run.head.tap_names,
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
    return Taught(tuple(maps))


def standardised(
    head: Head, features: Features, held: Features, preprocessing: Preprocessing, device: torch.device
) -> npt.NDArray[np.float32]:
    """Return a head's joined maps float32 [n, h, w] in deviations of its maps of held-out good parts."""
    good = head_maps(head, held, preprocessing, device)
    mean, deviation = float(good.mean()), max(float(good.std()), 1e-9)
    return (head_maps(head, features, preprocessing, device) - mean) / deviation
