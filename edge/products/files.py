"""ProductFiles: adds the products of files to the detectors that they were made for; refuses others, and says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge.errors import LinewardError, ProductError
from edge.products.product_file import read_product, require_fit

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from edge.inference.detector import Detector
    from edge.products.product_file import ProductFile

ADD_S = 60.0
"""A head is compiled in far less."""


def add_products(files: Sequence[Path], detectors: Iterable[Detector]) -> list[str]:
    """Add products from files, each to every detector of its bundle.

    What cannot be added leaves the others alone: a box goes on judging what it knows.

    Args:
        files: of products; one that was added before and has not changed is passed over.
        detectors: of a box.

    Returns:
        Why files were refused, one text for each.
    """
    refused: list[str] = []
    detectors = tuple(detectors)
    found: dict[int, dict[str, ProductFile]] = {index: {} for index in range(len(detectors))}
    for path in files:
        try:
            product = read_product(path)
            its = [index for index, one in enumerate(detectors) if one.bundle.id == product.bundle]
            for index in its or [0]:
                require_fit(product, detectors[index].bundle, str(path))
                if product.product in found[index]:
                    raise ProductError(f"{path}: another file has the product {product.product!r}; rename one of them")
                found[index][product.product] = product
        except LinewardError as error:  # noqa: PERF203 (one file at a time, at the start)
            refused.append(str(error))
    for index, detector in enumerate(detectors):
        present = {one.product: one for one in detector.added}
        new = [one for one in found[index].values() if not _same(one, present.get(one.product))]
        if not new:
            continue
        try:
            detector.add_products(new).result(ADD_S)
        except (LinewardError, TimeoutError) as error:
            names = ", ".join(one.product for one in new)
            refused.append(f"products {names} cannot be added: {str(error) or type(error).__name__}")
    return refused


def _same(one: ProductFile, other: ProductFile | None) -> bool:
    if other is None or one.created != other.created or one.state.keys() != other.state.keys():
        return False
    return all(np.array_equal(row, other.state[name]) for name, row in one.state.items())
