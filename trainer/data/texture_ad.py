"""Read Texture-AD's released layout, and any folder in MVTec layout as sub-classes by condition or over time.

It knows folders; it must not know splits or networks. Decoding is the business of images.py.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError, UsageError
from trainer.data.folder import read_folder
from trainer.data.images import IMAGE_EXTENSIONS
from trainer.data.subclasses import Material, Subclass, SubclassImage, by_name, natural_key

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trainer.data.folder import ImageSet, Sample

PERIODS = 6
"""Stretches of time that a folder is cut into: as many as give five trainings, each followed by later images."""

_PARTS = ("train", "test")
_TIME = re.compile(r"(?:^|[\s;,])time=([0-9]{8,17})(?:$|[\s;,])")


class By(str, Enum):
    """What makes the sub-classes of a folder in MVTec layout.

    ``condition``: the column of meta.csv. ``time``: stretches of ``time=`` in the column extra, each with as many good
    images; training then never sees an image that is later than an unseen one it is tested on.
    """

    CONDITION = "condition"
    TIME = "time"


def read_materials(root: Path, *, names: Sequence[str] = (), by: By = By.CONDITION) -> tuple[Material, ...]:
    """Read whatever kind of folder is given.

    Taken are a folder of materials (``<material>/<sub-class>/test``), one material (``<sub-class>/test``), and a
    folder in MVTec layout (``train/good`` and ``test``) with a meta.csv, see :func:`read_view`.

    Args:
        root: the folder.
        names: materials wanted, in any case; empty is all.
        by: how a folder in MVTec layout is seen.

    Returns:
        At least one material, in order of their names.

    Raises:
        DataError: the folder is none of these, or something in it is wrong; the message has the path.
        UsageError: a material is asked for that is not there, or ``by`` time of a folder of sub-classes.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; give a folder of materials, one material, or one in MVTec layout")
    if _is_subclass(root) or any(_is_subclass(folder) for folder in _folders(root)):
        found = [root]
    else:
        found = [folder for folder in _folders(root) if any(_is_subclass(inner) for inner in _folders(folder))]
    if not found:
        raise DataError(
            f"{root}: holds no <sub-class>/test nor <material>/<sub-class>/test; unpack the data set so that it does"
        )
    wanted = {name.lower() for name in names}
    chosen = [folder for folder in found if not wanted or folder.resolve().name.lower() in wanted]
    missing = wanted - {folder.resolve().name.lower() for folder in chosen}
    if missing:
        known = ", ".join(folder.resolve().name for folder in found)
        raise UsageError(f"--material {', '.join(sorted(missing))}: not in {root}; there are {known}")
    if _is_subclass(root):
        return (read_view(root, by=by),)
    if by is By.TIME:
        raise UsageError(f"--by time: {root} is a folder of sub-classes; give one in MVTec layout with a meta.csv")
    return tuple(read_material(folder) for folder in chosen)


def read_material(root: Path) -> Material:
    """Read one material: a folder per sub-class, each in MVTec layout, of which some may lack train/good.

    Masks are paired with images by stem, with or without ``_mask``; every value above 0 is a defect. A folder of
    defects without any mask counts for image figures only; where some of its images have one, all must.

    Raises:
        DataError: there is no sub-class, a mask is missing or has no image, or a sub-class cannot be read.
    """
    notes, subclasses = [], []
    for folder in sorted(_folders(root), key=lambda path: natural_key(path.name)):
        if not _is_subclass(folder):
            notes.append(f"{folder} ignored: it holds neither train nor test")
            continue
        images = read_folder(folder, needs_train=False)
        _refuse_missing_masks(images)
        notes += [f"sub-class {folder.name}: {note}" for note in images.notes]
        notes += _unknown_folders(folder)
        subclasses.append(
            Subclass(
                folder.name,
                by_name(_image(sample, folder.name) for sample in images.train),
                by_name(_image(sample, folder.name) for sample in images.test),
            )
        )
    if not subclasses:
        raise DataError(f"{root}: no sub-class; put <sub-class>/train/good and <sub-class>/test below it")
    return Material(root.resolve().name, tuple(subclasses), notes=tuple(notes))


def read_view(root: Path, *, by: By = By.CONDITION, periods: int = PERIODS) -> Material:
    """See a folder in MVTec layout as sub-classes, by its meta.csv.

    By condition, a group keeps its name in all of them: one part under several lights is one group. Over time, the
    part that comes again is what is asked about, so its images of another stretch are another group.

    Args:
        root: the folder.
        by: condition or time.
        periods: stretches of time, >= 2; fewer where there are fewer moments.

    Raises:
        DataError: the folder cannot be read, or an image has no condition or time.
    """
    images = read_folder(root)
    samples = (*images.train, *images.test)
    names = _by_condition(root, samples) if by is By.CONDITION else _by_time(root, images, periods)
    grouped: dict[str, list[SubclassImage]] = {}
    for sample, name in zip(samples, names, strict=True):
        group = sample.group if by is By.CONDITION else f"{name}/{sample.group}"
        image = SubclassImage.from_sample(sample, name, name=f"{name}/{sample.name}", group=group)
        grouped.setdefault(name, []).append(image)
    subclasses = tuple(
        Subclass(
            name,
            by_name(image for image in grouped[name] if image.split == "train"),
            by_name(image for image in grouped[name] if image.split == "test"),
        )
        for name in sorted(grouped, key=natural_key)
    )
    return Material(root.resolve().name, subclasses, ordered=by is By.TIME, notes=images.notes)


def _by_condition(root: Path, samples: Sequence[Sample]) -> list[str]:
    for sample in samples:
        if not sample.condition:
            raise DataError(
                f"{sample.path}: no condition; fill that column of {root / 'meta.csv'}, which makes the sub-classes"
            )
    return [sample.condition for sample in samples]


def _by_time(root: Path, images: ImageSet, periods: int) -> list[str]:
    if periods < 2:  # noqa: PLR2004
        raise ValueError(f"periods {periods} must be at least 2")

    def moment(sample: Sample) -> str:
        found = _TIME.search(sample.extra)
        if not found:
            raise DataError(
                f"{sample.path}: no time; the column extra of {root / 'meta.csv'} needs time=YYYYMMDDhhmmss"
            )
        return found[1].ljust(17, "0")

    times = sorted(moment(sample) for sample in (*images.train, *images.test) if not sample.anomalous)
    # A stretch begins at an image's moment, so images of one moment are never torn apart.
    starts = sorted({times[int(at)] for at in np.arange(1, periods) * len(times) // periods} - {times[0]})
    if not starts:
        raise DataError(f"{root / 'meta.csv'}: all good images are of one moment, {times[0]}; give a longer record")
    return [
        f"period {1 + sum(moment(sample) >= start for start in starts)}" for sample in (*images.train, *images.test)
    ]


def _image(sample: Sample, subclass: str) -> SubclassImage:
    return SubclassImage.from_sample(
        sample, subclass, name=f"{subclass}/{sample.name}", group=f"{subclass}/{sample.group}"
    )


def _refuse_missing_masks(images: ImageSet) -> None:
    with_masks = {sample.label for sample in images.test if sample.mask}
    for sample in images.test:
        if sample.anomalous and sample.mask is None and sample.label in with_masks:
            folder = images.root / "ground_truth" / sample.label
            raise DataError(
                f"{sample.path}: its mask {folder / sample.path.stem}_mask.png (or {sample.path.stem}.png) is missing, "
                "and others of its folder have one; add it, or remove all of them for image figures only"
            )


def _unknown_folders(folder: Path) -> list[str]:
    known = {*_PARTS, "ground_truth"}
    notes = [f"{inner} ignored: not part of the layout" for inner in _folders(folder) if inner.name not in known]
    loose = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS]
    if loose:
        notes.append(f"{len(loose)} images directly in {folder} ignored: they are in neither train nor test")
    return notes


def _is_subclass(folder: Path) -> bool:
    return any((folder / part).is_dir() for part in _PARTS)


def _folders(folder: Path) -> list[Path]:
    try:
        inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    return sorted(inside, key=lambda path: path.name)
