"""ProductFiles: prepares the products of files for the detectors that they were made for; refuses others, says why."""

from __future__ import annotations

from concurrent import futures
from typing import TYPE_CHECKING

from edge.errors import LinewardError, ProductError
from edge.products.product_file import read_product, require_fit

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from edge.inference.detector import Detector
    from edge.products.product_file import MoreProducts, ProductFile

ADD_S = 60.0
"""A head is compiled in far less."""


class PreparedProducts:
    """Products of files, ready to be judged and not judged yet. Made by :func:`prepare_products`.

    Attributes:
        refused: why files were refused, one text for each.
    """

    def __init__(self, refused: Sequence[str], more: Mapping[Detector, MoreProducts]) -> None:
        self.refused = tuple(refused)
        self._more = dict(more)

    def of(self, detector: Detector) -> tuple[ProductFile, ...]:
        """Return all products from files that a detector judges once these are in force."""
        return self._more[detector].added if detector in self._more else detector.added

    def put_in_force(self) -> None:
        """Have the detectors judge them; cannot fail."""
        for more in self._more.values():
            more.put_in_force()


def prepare_products(files: Sequence[Path], detectors: Iterable[Detector]) -> PreparedProducts:
    """Read products from files and make them ready, each at every detector of its bundle; nothing changes yet.

    What cannot be added leaves the others alone: a box goes on judging what it knows.

    Args:
        files: of products; one that was added before and has not changed is passed over.
        detectors: of a box.
    """
    refused: list[str] = []
    detectors = tuple(detectors)
    found: dict[Detector, dict[str, ProductFile]] = {one: {} for one in detectors}
    for path in files:
        try:
            product = read_product(path)
            its = [one for one in detectors if one.bundle.id == product.bundle]
            for detector in its or detectors[:1]:
                require_fit(product, detector.bundle, str(path))
                if product.product in found[detector]:
                    raise ProductError(f"{path}: another file has the product {product.product!r}; rename one of them")
                found[detector][product.product] = product
        except LinewardError as error:  # noqa: PERF203 (one file at a time, at the start)
            refused.append(str(error))
    more: dict[Detector, MoreProducts] = {}
    for detector, its_own in found.items():
        present = {one.digest for one in detector.added}
        new = [one for one in its_own.values() if one.digest not in present]
        if not new:
            continue
        try:
            more[detector] = detector.prepare_products(new).result(ADD_S)
        except (LinewardError, futures.TimeoutError) as error:
            names = ", ".join(one.product for one in new)
            refused.append(f"products {names} cannot be added: {str(error) or type(error).__name__}")
    return PreparedProducts(refused, more)


def add_products(files: Sequence[Path], detectors: Iterable[Detector]) -> tuple[str, ...]:
    """Have detectors judge the products of files at once; returns why files were refused."""
    prepared = prepare_products(files, detectors)
    prepared.put_in_force()
    return prepared.refused
