"""Several products to be learned together: a folder each, its images named after it so that none is mistaken.

It knows folders, names and samples; it must not open an image.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edge.errors import UsageError
from trainer.data.folder import content_hash, read_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trainer.data.folder import ImageSet, Sample

_LONGEST_NAME = 60


@dataclass(frozen=True)
class ProductFolder:
    """One product's images.

    Attributes:
        name: of the product.
        images: what its folder holds; each image's ``condition`` is the product's name, and its group begins with it.
    """

    name: str
    images: ImageSet


def read_products(
    data: Sequence[Path], names: Sequence[str] = (), *, needs_train: bool = True
) -> tuple[ProductFolder, ...]:
    """List the folders of several products, sorted by product, so that the order given does not matter.

    Args:
        data: folders in MVTec layout, at least two.
        names: of the products, one for each folder; its own name where there are none.
        needs_train: see :func:`trainer.data.folder.read_folder`.

    Raises:
        UsageError: as many names as folders are needed, each once and none empty.
        DataError: a folder cannot be used.
    """
    found = product_names(data, names)
    return tuple(
        ProductFolder(name, _named(read_folder(path, needs_train=needs_train), name)) for name, path in sorted(found)
    )


def product_names(data: Sequence[Path], names: Sequence[str] = ()) -> list[tuple[str, Path]]:
    """Return the product of each folder.

    Raises:
        UsageError: as many names as folders are needed, each once and none empty.
    """
    if names and len(names) != len(data):
        raise UsageError(f"--product: {len(names)} names for {len(data)} folders; give one for each --data, or none")
    chosen = list(names) or [path.resolve().name for path in data]
    for name in chosen:
        if not name or "\n" in name:
            raise UsageError(f"--product {name!r}: empty or of several lines; give the product a name")
        if chosen.count(name) > 1:
            raise UsageError(f"--product {name}: given twice; give each product a name of its own")
    return list(zip(chosen, data, strict=True))


def joined_name(names: Sequence[str]) -> str:
    """Return what people call a run of these products."""
    text = "+".join(names)
    return text if len(text) <= _LONGEST_NAME else f"{names[0]} and {len(names) - 1} more products"


def joined_hash(products: Sequence[tuple[str, Sequence[Sample]]]) -> str:
    """Return the sha256 of several products' names and contents; order and location do not matter."""
    digest = hashlib.sha256()
    for name, samples in sorted(products, key=lambda one: one[0]):
        for part in (name, content_hash(samples)):
            digest.update(len(part.encode()).to_bytes(8, "big") + part.encode())
    return digest.hexdigest()


def _named(images: ImageSet, product: str) -> ImageSet:
    def own(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        return tuple(replace(one, condition=product, group=f"{product}/{one.group}") for one in samples)

    return replace(images, train=own(images.train), test=own(images.test))
