"""Gives the gates what they compare an update with: canaries from a folder, references from bundles. No decisions."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from deploy.aggregator.canaries import read_canaries
from deploy.aggregator.gates import examine_all
from edge.bundle import Bundle
from edge.errors import DataError
from edge.inference.state import stored_state
from edge.memory.bank import MemoryBank
from edge.memory.banks import packed_banks

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from deploy.aggregator.canaries import Canaries
    from deploy.aggregator.gates import Examination, GateLimits
    from edge.federation.update import MemoryUpdate

LOG = logging.getLogger("lineward.aggregator")
NOT_ENROLLED = "the key of its box was taken back after it was sent"


class CanaryFolder:
    """Canary files of a folder, read again when they change.

    A file that is damaged while the service runs leaves its former content in force: an aggregator without canaries
    would take what they are there to stop.

    Args:
        folder: of ``*.npz`` files; None for none.

    Raises:
        DataError: the folder or a file in it cannot be read, or two files are for one product.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._read: dict[Path, tuple[int, Canaries]] = {}
        self._found: dict[tuple[str, str], Canaries] = {}
        self.trouble = ""
        self._refresh()

    def find(self, embedding_id: str, product: str) -> Canaries | None:
        """Return the canaries of a product, else others of its embedding: those without a product first."""
        try:
            self._refresh()
        except DataError as error:
            if str(error) != self.trouble:
                LOG.warning("%s; the former canaries stay in force", error)
            self.trouble = str(error)
        else:
            self.trouble = ""
        known = sorted(other for space, other in self._found if space == embedding_id)
        return self._found.get((embedding_id, product)) or (self._found[embedding_id, known[0]] if known else None)

    def _refresh(self) -> None:
        if self._folder is None:
            return
        try:
            stamps = {path: path.stat().st_mtime_ns for path in sorted(self._folder.glob("*.npz"))}
            if not self._folder.is_dir():
                raise DataError(f"{self._folder}: no such folder; name the folder of the canary files, or none")
        except OSError as error:
            raise DataError(f"{self._folder}: cannot be read ({error.strerror}); correct its permissions") from error
        if {path: stamp for path, (stamp, _) in self._read.items()} == stamps:
            return
        read = {
            path: self._read[path] if self._read.get(path, (0,))[0] == stamp else (stamp, read_canaries(path))
            for path, stamp in stamps.items()
        }
        found: dict[tuple[str, str], Canaries] = {}
        for path, (_, canaries) in read.items():
            if (canaries.embedding_id, canaries.product) in found:
                raise DataError(f"{path}: is the second file for {canaries.product!r}; keep one for each product")
            found[canaries.embedding_id, canaries.product] = canaries
        self._read, self._found = read, found


class Examiner:
    """The gate that a merge calls, see :class:`deploy.aggregator.closing.GateOfAll`.

    Args:
        limits: of the gates.
        canaries: where canaries come from.
        enrolled: names of the boxes that have a key now; what a box has sent before its key was taken back waits for
            a person. None asks nobody.
    """

    def __init__(
        self, limits: GateLimits, canaries: CanaryFolder, enrolled: Callable[[], Collection[str]] | None = None
    ) -> None:
        self._limits = limits
        self._canaries = canaries
        self._enrolled = enrolled
        self._untried: set[tuple[str, str]] = set()

    def __call__(
        self, update: MemoryUpdate, *, reference: MemoryBank | None, peers: Sequence[MemoryUpdate]
    ) -> Examination:
        """Compare an update with the canaries, with what the fleet knew, and with the round's others."""
        return self.examine_all([update, *peers], reference=reference, first=1)[0]

    def examine_all(
        self, updates: Sequence[MemoryUpdate], *, reference: MemoryBank | None, first: int
    ) -> Sequence[Examination]:
        """Examine the ``first`` updates, each beside all others, with the canaries of its own product."""
        products: dict[str, list[int]] = {}
        for number, update in enumerate(updates[:first]):
            products.setdefault(update.product, []).append(number)
        found: dict[int, Examination] = {}
        for product, numbers in products.items():
            mine = [updates[number] for number in numbers]
            chosen = set(numbers)
            others = [update for number, update in enumerate(updates) if number not in chosen]
            canaries = self._canaries.find(updates[0].embedding_id, product)
            examinations = examine_all(
                [*mine, *others], reference=reference, canaries=canaries, limits=self._limits, first=len(mine)
            )
            found.update(zip(numbers, examinations, strict=True))
            self._note(updates[0].embedding_id, product, examinations)
        enrolled = None if self._enrolled is None else self._enrolled()
        return [
            found[number]
            if enrolled is None or updates[number].box in enrolled
            else replace(found[number], accepted=False, reasons=(*found[number].reasons, NOT_ENROLLED))
            for number in range(first)
        ]

    def _note(self, embedding_id: str, product: str, examinations: Sequence[Examination]) -> None:
        """Say once where canaries told nothing: there defect rows would pass."""
        untried = any(one.figures.get("canaries", 0) < self._limits.fewest_canaries for one in examinations)
        if untried and (embedding_id, product) not in self._untried:
            LOG.warning("product %s of %s: no canaries could be tried; add a canary file", product, embedding_id[:12])
        (self._untried.add if untried else self._untried.discard)((embedding_id, product))


def read_references(bundles: Sequence[Path]) -> dict[str, MemoryBank]:
    """Return the memories that bundles were packed with, by embedding id: the rows of all bundles of one.

    Args:
        bundles: their folders.

    Raises:
        BundleError: one is damaged.
        DataError: the memory of one cannot change, so no box has anything to send.
    """
    found: dict[str, list[npt.NDArray[np.float32]]] = {}
    for path in bundles:
        bundle = Bundle.open(path)
        layout = bundle.manifest.memory
        if layout is None:
            raise DataError(f"references: {path}: its memory cannot change; name a bundle of the method feddymem")
        for embedding_id in bundle.manifest.embedding_id.values():
            found.setdefault(embedding_id, []).extend(packed_banks(stored_state(bundle), layout).rows)
    return {embedding_id: _evenly(np.unique(np.concatenate(rows), axis=0)) for embedding_id, rows in found.items()}


def _evenly(rows: npt.NDArray[np.float32]) -> MemoryBank:
    share = np.full(len(rows), 1 / len(rows), np.float32)
    return MemoryBank(rows, share, share)
