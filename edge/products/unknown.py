"""UnknownProducts: which cameras show, most of the time, a product that they must not judge.

It must not know why a frame is refused, nor whom that is told.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from edge.adaptation.owner import UNKNOWN_WINDOW

if TYPE_CHECKING:
    from collections.abc import Collection

# As of cameras that follow their line: a router refuses a good part now and then, another product most of the time.
_UNKNOWN_FROM, _KNOWN_FROM = 5, 1


class Turn(NamedTuple):
    """A camera whose product has become unknown, or known again.

    Attributes:
        camera: its name.
        refusal: why its frames are refused; empty where they are judged again.
    """

    camera: str
    refusal: str


class UnknownProducts:
    """Counts refusals among the last frames of each camera. Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, deque[bool]] = {}
        self._refusals: dict[str, str] = {}
        self._lasting: set[str] = set()

    def count(self, camera: str, refusal: str) -> None:
        """Take note of a frame; ``refusal`` is empty where it was judged."""
        with self._lock:
            self._last.setdefault(camera, deque(maxlen=UNKNOWN_WINDOW)).append(bool(refusal))
            if refusal:
                self._refusals[camera] = refusal

    def turns(self, cameras: Collection[str]) -> list[Turn]:
        """Say what begins and what ends, each once; cameras that are not among ``cameras`` are forgotten."""
        found = []
        with self._lock:
            for camera in [one for one in self._last if one not in cameras]:
                del self._last[camera]
                self._lasting.discard(camera)
            for camera, last in self._last.items():
                lasting = camera in self._lasting
                if (sum(last) >= (_KNOWN_FROM + 1 if lasting else _UNKNOWN_FROM)) is lasting:
                    continue
                self._lasting ^= {camera}
                found.append(Turn(camera, "" if lasting else self._refusals[camera]))
        return found

    def lasting(self) -> dict[str, str]:
        """Why frames are refused, by camera, of those whose product is unknown."""
        with self._lock:
            return {camera: self._refusals[camera] for camera in sorted(self._lasting)}
