"""Sub-classes of a material: the same stuff of another make, or under other optics, each with images of its own.

It knows images, labels and groups; it must not know where they come from, nor networks.
"""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy.progress import Progress, no_progress
from edge.errors import DataError
from trainer.data.folder import load_image, load_mask

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import numpy as np
    import numpy.typing as npt

    from trainer.data.folder import Sample

_SHOWN = 5


@dataclass(frozen=True)
class SubclassImage:
    """One image, in a file or in memory.

    Attributes:
        name: sub-class and path below it, with forward slashes; no other image of the material has it.
        subclass: where it belongs; known in training, not to a detector that is tested.
        split: ``train`` or ``test``.
        label: ``good``, or the kind of defect.
        anomalous: whether the part is defective.
        group: images of one group are not independent; a group may span sub-classes (one part in several lights).
        load: gives uint8 [H, W, 3] BGR.
        load_mask: gives bool [H, W] for (H, W); None where a defect's pixels are unknown.
    """

    name: str
    subclass: str
    split: str
    label: str
    anomalous: bool
    group: str
    load: Callable[[], npt.NDArray[np.uint8]]
    load_mask: Callable[[tuple[int, int]], npt.NDArray[np.bool_]] | None

    @classmethod
    def from_sample(cls, sample: Sample, subclass: str, *, name: str, group: str) -> SubclassImage:
        """Take an image of a folder; a defective one without a mask has no ``load_mask``."""
        known = sample.mask is not None or not sample.anomalous
        return cls(
            name=name,
            subclass=subclass,
            split=sample.split,
            label=sample.label,
            anomalous=sample.anomalous,
            group=group,
            load=lambda: load_image(sample.path),
            load_mask=(lambda shape: load_mask(sample, shape)) if known else None,
        )


@dataclass(frozen=True)
class Subclass:
    """One sub-class.

    Attributes:
        name: of its folder, or what a view calls it.
        train: good images, sorted by name; empty for one that is only tested on.
        test: labelled images, sorted by name; may be empty.
    """

    name: str
    train: tuple[SubclassImage, ...]
    test: tuple[SubclassImage, ...]


@dataclass(frozen=True)
class Material:
    """All sub-classes of one material.

    Attributes:
        name: such as ``cloth``.
        subclasses: in natural order of their names ("2" before "10"), or in time where ``ordered``.
        ordered: whether sub-classes follow each other in time, so that a later one must never be trained on.
        notes: what is missing or left aside, one sentence each, for people to read.
    """

    name: str
    subclasses: tuple[Subclass, ...]
    ordered: bool = False
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[SubclassImage, ...]:
        """Every image."""
        return tuple(image for one in self.subclasses for image in (*one.train, *one.test))

    def subclass(self, name: str) -> Subclass:
        """Return one sub-class.

        Raises:
            KeyError: there is none of that name.
        """
        return {one.name: one for one in self.subclasses}[name]


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return what sorts "2" before "10" and is total: equal numbers fall back on their text."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts)


def image_digest(image: npt.NDArray[np.uint8]) -> str:
    """Return the sha256 of an image's size and pixels: a copy in another file or format has the same."""
    digest = hashlib.sha256(repr(image.shape).encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def digests(material: Material, *, progress: Progress = no_progress, workers: int = 4) -> dict[str, str]:
    """Decode every image and mask once, in parallel, and return the digests of the images by name.

    Args:
        material: what to check.
        progress: called from this thread after each image.
        workers: decoding threads, >= 1.

    Raises:
        DataError: at least one image or mask is damaged, or a mask differs in size; names them.
    """
    found: dict[str, str] = {}
    errors: list[str] = []
    images = material.images
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for done, (image, result) in enumerate(zip(images, pool.map(_inspect, images), strict=True), start=1):
            if isinstance(result, DataError):
                errors.append(str(result))
            else:
                found[image.name] = result
            progress(f"checking {material.name}", done, len(images))
    if errors:
        more = f"\n... and {len(errors) - _SHOWN} more" if len(errors) > _SHOWN else ""
        raise DataError("\n".join(errors[:_SHOWN]) + more)
    return found


def material_hash(material: Material, of: Mapping[str, str]) -> str:
    """Return the sha256 of names, labels, groups, pixels and masks; order and location do not matter.

    Args:
        material: whose.
        of: its :func:`digests`.
    """
    whole = hashlib.sha256()
    for image in sorted(material.images, key=lambda image: image.name):
        facts = [image.name, image.label, image.group, of[image.name]]
        if image.anomalous and image.load_mask is not None:
            mask = image.load_mask(image.load().shape[:2])
            facts.append(hashlib.sha256(mask.tobytes()).hexdigest())
        for fact in facts:
            whole.update(len(fact.encode()).to_bytes(4, "big") + fact.encode())
    return whole.hexdigest()


def by_name(images: Iterable[SubclassImage]) -> tuple[SubclassImage, ...]:
    """Return images sorted by name."""
    return tuple(sorted(images, key=lambda image: image.name))


def _inspect(image: SubclassImage) -> str | DataError:
    try:
        pixels = image.load()
        if image.load_mask is not None and image.anomalous:
            image.load_mask(pixels.shape[:2])
    except DataError as error:
        return error
    return image_digest(pixels)
