"""Judges: those of one camera, one for each product and each memory that may judge its next frames.

It must not know how they are made, nor what becomes of verdicts.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from edge.judgement.threshold import RunTimeThreshold
    from edge.judgement.verdicts import Judge


class Judges:
    """The judges of one camera and one bundle. Safe to call from several threads.

    Args:
        judges: of one memory, one for each product; a bundle of one product has one.
    """

    def __init__(self, judges: Iterable[Judge]) -> None:
        found = tuple(judges)
        self._lock = threading.Lock()
        # During a switch of the memory there are two for each: frames of the old head meet the old thresholds.
        self._judges = {(one.memory_version, one.product): one for one in found}
        self._met = found[0]

    @property
    def met(self) -> Judge:
        """Whose thresholds the last frame met; that of the first product before any frame."""
        return self._met

    @property
    def all(self) -> tuple[Judge, ...]:
        """Those of the memory in force, by product."""
        with self._lock:
            present = self._met.memory_version
            return tuple(one for (version, _), one in self._judges.items() if version == present)

    def meet(self, memory_version: int, product: str) -> Judge:
        """Return the judge of a frame's prediction, which is met by that.

        Args:
            memory_version: of the prediction.
            product: that it was seen as; a bundle of one product does not ask.

        Raises:
            DataError: there are no thresholds for them.
        """
        with self._lock:
            of = product if self._met.product else ""
            judge = self._judges.get((memory_version, of))
            if judge is None:
                what = f"product {of!r}" if of else f"memory version {memory_version}"
                raise DataError(f"{what} judges, but no thresholds were made for it; restart the box")
            self._met = judge
        return judge

    def install(self, judge: Judge) -> None:
        """Have a judge ready for another memory or product; those of memories before the present one are forgotten."""
        with self._lock:
            present = self._met.memory_version
            kept = {key: one for key, one in self._judges.items() if key[0] >= present}
            self._judges = kept | {(judge.memory_version, judge.product): judge}

    def set_threshold(self, given: RunTimeThreshold | None, product: str = "") -> Judge:
        """Have frames of a product meet a threshold given at run time, or none, from the next one on.

        Returns:
            The judge of the memory in force, with it.

        Raises:
            DataError: no such product is judged.
        """
        with self._lock:
            met = self._met
            self._judges = {
                key: one.with_threshold(given) if key[1] == product else one for key, one in self._judges.items()
            }
            found = self._judges.get((met.memory_version, product))
            if found is None:
                raise DataError(f"no thresholds were made for product {product!r}")
            self._met = self._judges.get((met.memory_version, met.product), met)
            return found
