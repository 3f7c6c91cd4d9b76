"""How far moments lie from others, as one figure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from edge.adaptation.moments import IMAGE

if TYPE_CHECKING:
    from edge.adaptation.moments import Moments

# A channel that hardly varies has no unit of its own: a grey level, or a part of what the tap's channels usually vary.
_LEAST_GREY, _LEAST_SHARE = 1.0, 0.1
_TINY = 1e-6


def shift_of(moments: Moments, reference: Moments) -> float:
    """Return the size of the shift from reference moments to others.

    The root of the mean, over names and channels, of what the mean moved in deviations of the reference, squared, and
    of the natural logarithm of the ratio of deviations, squared. Every name weighs the same, however many channels it
    has.

    Args:
        moments: with at least the names of the reference.
        reference: what it is compared with.

    Returns:
        In deviations, >= 0; NaN where a value is no number.
    """
    parts = []
    for name, mean in reference.mean.items():
        std = reference.std[name]
        least = max(_LEAST_GREY if name == IMAGE else _LEAST_SHARE * float(np.median(std)), _TINY)
        unit = np.maximum(std, least)
        moved = (moments.mean[name] - mean) / unit
        scaled = np.log(np.maximum(moments.std[name], least) / unit)
        parts.append(float(np.mean(moved * moved + scaled * scaled, dtype=np.float64)))
    return math.sqrt(sum(parts) / len(parts)) if parts else 0.0
