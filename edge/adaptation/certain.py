"""What so many frames can tell of a shift: the rest of what they seem to show is chance, and is not corrected.

Good images differ from one another, so the mean of some never equals that of the training set. It must not know where
moments are from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge.adaptation.moments import Moments

if TYPE_CHECKING:
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

CHANCE = 4.0
"""A difference of two standard errors, squared: what one in twenty channels shows where nothing has changed."""
_TINY = 1e-12


def certain(now: Moments, reference: Moments, spread: Moments, *, frames: float, images: int) -> Moments:
    """Return moments with what chance explains put back to the reference.

    Of each channel's difference d with the standard error e = spread sqrt(1 / frames + 1 / images) the share
    max(0, 1 - 4 e^2 / d^2) is left: nothing of what lies within two standard errors, nearly all of what lies far beyond
    (the positive-part estimator of James and Stein, 1961, channel by channel).

    Args:
        now: means over frames.
        reference: means over the training images.
        spread: deviations between single good images.
        frames: independent ones that ``now`` is a mean of, > 0.
        images: that ``reference`` is a mean of, >= 1.
    """
    chance = CHANCE * (1 / frames + 1 / images)

    def kept(seen: Vector, wanted: Vector, deviation: Vector) -> Vector:
        difference = seen - wanted
        doubt = chance * np.square(deviation) / np.maximum(np.square(difference), _TINY)
        return np.asarray(wanted + difference * np.maximum(0, 1 - doubt), np.float32)

    return Moments(
        {name: kept(now.mean[name], mean, spread.mean[name]) for name, mean in reference.mean.items()},
        {name: kept(now.std[name], std, spread.std[name]) for name, std in reference.std.items()},
    )
