"""Moments: the mean and the deviation of each channel of what a camera shows, on the canvas and in the trunk's taps.

Values only; they must not know who measures them nor what is done with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

IMAGE = "image"
"""Name of the canvas among the things that are measured; the others are taps (``s4``, ``s8`` ...)."""

DETAIL = "detail"
"""Name of how sharp the canvas is: one channel, whose deviation is that of the finest detail (what a 3 x 3 binomial
filter takes away) as a share of the colours' own, so that no gain or offset changes it. Its mean is 0."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Moments of one image, or of many.

    Attributes:
        mean: float32 [C] by name; of :data:`IMAGE` in grey levels 0..255, RGB.
        std: float32 [C] by name, >= 0: the deviation within an image.
    """

    mean: Mapping[str, Vector]
    std: Mapping[str, Vector]


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What a bundle's experts were trained on.

    Attributes:
        moments: of each expert, in order; a bundle of one product has one.
        usual: per expert the size of the shift (see :mod:`edge.adaptation.shift`) that 99 of 100 single held-out good
            images stay below, > 0: the unit that shifts are told in.
        subclasses: name of the sub-class of each expert; empty names where the bundle has none.
        spread: per expert how far moments of single good images lie from one another: the deviation between images of
            their means, and of their deviations; empty where the bundle does not say.
        images: per expert how many its moments were measured on, >= 1; empty where the bundle does not say.
    """

    moments: tuple[Moments, ...]
    usual: tuple[float, ...]
    subclasses: tuple[str, ...]
    spread: tuple[Moments, ...] = ()
    images: tuple[int, ...] = ()
