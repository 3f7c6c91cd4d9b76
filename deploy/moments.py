"""What each expert of a bundle was trained on: moments of good images, through the trunk as each precision runs it.

It must not know how a box corrects by them, nor where the images are from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from edge.adaptation.moments import Moments, Reference
from edge.adaptation.shift import shift_of
from edge.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Canvases = npt.NDArray[np.uint8]
    Vectors = Mapping[str, npt.NDArray[np.float32]]

Source = Literal["training", "holdout"]

USUAL_SHARE = 0.99
"""Share of single good images whose shift is usual."""

_NORMAL_QUANTILE = 2.33  # of USUAL_SHARE
_MOST_JUDGED = 128  # held-out images per expert that say what is usual
_LEAST_JUDGED = 8
_LEAST_USUAL = 1e-3


@dataclass(frozen=True)
class ReferenceImages:
    """Good images, and which expert each is of.

    Attributes:
        seen: uint8 [m, canvas_height, canvas_width, 3] RGB, that moments are measured on.
        seen_of: int64 [m], index of the expert.
        others: uint8 [n, ...], that say what is usual.
        others_of: int64 [n].
        source: where ``seen`` is from.
        subclasses: name of each expert's sub-class.
    """

    seen: Canvases
    seen_of: npt.NDArray[np.int64]
    others: Canvases
    others_of: npt.NDArray[np.int64]
    source: Source
    subclasses: tuple[str, ...]


def reference_images(
    subclasses: tuple[str, ...],
    training: tuple[Canvases, Sequence[str]],
    holdout: tuple[Canvases, Sequence[str]],
) -> ReferenceImages | None:
    """Attribute images to experts: all to one expert, else each by its label.

    Args:
        subclasses: name of each expert's sub-class.
        training: images that were learned from, and a label for each; there may be none.
        holdout: good images that were not, and a label for each.

    Returns:
        The images; None where there are several experts and no labels to attribute by.

    Raises:
        DataError: some, but not all images have labels, a label names no expert, or an expert has no image.
    """
    seen: tuple[Canvases, Sequence[str]] = training if len(training[0]) else holdout
    found = []
    for canvases, labels in (seen, holdout):
        if len(subclasses) == 1:
            found.append(np.zeros(len(canvases), np.int64))
            continue
        if not len(labels):
            return None
        if len(labels) != len(canvases):
            raise DataError(f"{len(labels)} sub-class labels for {len(canvases)} images; give one each")
        unknown = sorted(set(labels) - set(subclasses))
        if unknown:
            raise DataError(f"images of sub-class {unknown[0]!r}, which no expert is for; train again with them")
        found.append(np.array([subclasses.index(label) for label in labels], np.int64))
    bare = sorted(set(range(len(subclasses))) - set(found[0].tolist()))
    if bare:
        raise DataError(
            f"no good image of sub-class {subclasses[bare[0]]!r} to measure its moments on; add some and train again"
        )
    source: Source = "training" if seen is training else "holdout"
    return ReferenceImages(seen[0], found[0], holdout[0], found[1], source, subclasses)


def reference_of(images: ReferenceImages, moments_of: Callable[[Canvases], Moments]) -> Reference:
    """Measure every expert's moments and what shift is usual for it.

    An expert's moments are the means of those of its images: of their means, and of their deviations within an image,
    which is also what a box's running average comes to.

    Args:
        images: see :class:`ReferenceImages`.
        moments_of: of one canvas uint8 [canvas_height, canvas_width, 3] RGB, through the trunk that will run.
    """
    moments, usual, spread, images_seen = [], [], [], []
    for expert in range(len(images.subclasses)):
        seen = [moments_of(canvas) for canvas in images.seen[images.seen_of == expert]]
        centre = mean_moments(seen)
        own = images.others[images.others_of == expert]
        drawn = np.unique(np.linspace(0, max(0, len(own) - 1), min(_MOST_JUDGED, len(own))).round().astype(np.intp))
        others = [moments_of(canvas) for canvas in own[drawn]]
        if len(others) < _LEAST_JUDGED:
            others += seen
        moments.append(centre)
        usual.append(usual_shift([shift_of(one, centre) for one in others]))
        spread.append(spread_of(seen))
        images_seen.append(len(seen))
    return Reference(tuple(moments), tuple(usual), images.subclasses, tuple(spread), tuple(images_seen))


def usual_shift(shifts: Sequence[float]) -> float:
    """Return the size that 99 of 100 shifts stay below, > 0.

    Of fewer than 100 the largest says too little: then at least what a normal distribution of them gives.

    Args:
        shifts: of single good images, at least one.
    """
    found = np.asarray(shifts, np.float64)
    high = float(np.quantile(found, USUAL_SHARE, method="higher"))
    if len(found) * (1 - USUAL_SHARE) < 1:
        high = max(high, float(found.mean() + _NORMAL_QUANTILE * found.std()))
    return max(high, _LEAST_USUAL)


def mean_moments(found: Sequence[Moments]) -> Moments:
    """Return the means of the moments of several images: of their means and of their deviations.

    Args:
        found: at least one, all with the same names.
    """
    return Moments(_mean([one.mean for one in found]), _mean([one.std for one in found]))


def spread_of(found: Sequence[Moments]) -> Moments:
    """Return the deviations between images of their means and of their deviations; of one image, none.

    Args:
        found: as for :func:`mean_moments`.
    """
    return Moments(_deviation([one.mean for one in found]), _deviation([one.std for one in found]))


def _mean(of: Sequence[Vectors]) -> Vectors:
    return {
        name: np.stack([one[name] for one in of]).mean(axis=0, dtype=np.float64).astype(np.float32) for name in of[0]
    }


def _deviation(of: Sequence[Vectors]) -> Vectors:
    """Of a sample; of one image there is none, and nothing is taken for chance."""
    spare = min(1, len(of) - 1)
    return {
        name: np.stack([one[name] for one in of]).std(axis=0, dtype=np.float64, ddof=spare).astype(np.float32)
        for name in of[0]
    }
