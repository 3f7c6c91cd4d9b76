"""Look: how one camera's next frame is to be seen: what to correct before judging, and what to measure.

A value that the camera's worker hands to the detector with each frame; it must not know how corrections are found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    Taps = Mapping[str, npt.NDArray[np.float32]]


class Correction(Protocol):
    """Brings what a camera shows now to what an expert was trained on; immutable, safe to share between threads."""

    def canvas(self, tiles: npt.NDArray[np.uint8]) -> None:
        """Correct tiles uint8 [T, H, W, 3] RGB in place, before the trunk."""
        ...

    def taps(self, taps: Taps, *, in_place: bool = False) -> Taps:
        """Return taps float32 [T, C, h, w] by name corrected, before the head; what needs nothing is passed on.

        With ``in_place`` the arrays given may be written to and returned: nothing is allocated for them.
        """
        ...


@dataclass(frozen=True, slots=True)
class Look:
    """How a frame is to be seen.

    Attributes:
        expert: index of the expert that the correction is for, 0 where the bundle has one.
        version: of the moments that the correction was made from; 0 is no correction.
        correction: None leaves the frame as it is.
        measure: whether the frame's moments are wanted with its prediction.
    """

    expert: int = 0
    version: int = 0
    correction: Correction | None = None
    measure: bool = False


PLAIN = Look()
"""Nothing corrected, nothing measured."""
