"""What a box would correct in images of another sub-class, from their moments and those of training.

It knows moments and images; it must not know heads, thresholds or labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from deploy.moments import mean_moments, spread_of
from edge.adaptation.certain import certain
from edge.adaptation.correction import MomentCorrection
from edge.adaptation.measure import joined, measure_canvas, measure_taps
from edge.adaptation.moments import DETAIL, IMAGE, Moments
from edge.inference.preprocessing import cut_tiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.adaptation.look import Correction
    from trainer.data.subclasses import SubclassImage
    from trainer.evaluation.shift_features import FeatureStore
    from trainer.methods.base import Features

    Images = Sequence[SubclassImage]

ALL = ""
"""Key of the moments of all training images together: those of a head with one expert."""


class MomentsOfTraining:
    """Moments of what one rotation learned from, and corrections towards them.

    Args:
        fit: images that were learned from; calibration images have no say.
        store: their taps.
        known: moments of single images by name, kept from rotation to rotation.
    """

    def __init__(self, fit: Images, store: FeatureStore, known: dict[str, Moments]) -> None:
        self._store, self._known = store, known
        self._measure(fit)
        grouped: dict[str, list[Moments]] = {ALL: [known[image.name] for image in fit]}
        for image in fit:
            grouped.setdefault(image.subclass, []).append(known[image.name])
        self.references = {name: mean_moments(found) for name, found in grouped.items()}
        self._spread = {name: spread_of(found) for name, found in grouped.items()}
        self._images = {name: len(found) for name, found in grouped.items()}

    def own(self, expert: str) -> Correction:
        """Return what brings every image from its own moments to an expert's.

        Args:
            expert: name of a trained sub-class, or :data:`ALL`; an unknown name is :data:`ALL`.
        """
        reference = self._reference(expert)
        return MomentCorrection(reference, reference, own=1.0)

    def given(self, good: Images, expert: str) -> Correction:
        """Return what brings images of the kind of some good ones to an expert's, as far as so many can tell.

        Taps are measured on canvases that are corrected already, as a box that follows its camera measures them.

        Args:
            good: at least one good image.
            expert: as in :meth:`own`.
        """
        self._measure(good)
        reference = self._reference(expert)
        seen = self._told(mean_moments([self._known[image.name] for image in good]), expert, len(good))
        of_canvas = MomentCorrection(_of_image(seen), _of_image(reference))
        after = self._store.corrected(good, [of_canvas] * len(good))
        taps = mean_moments([measure_taps(_taps(after, index)) for index in range(len(good))])
        return MomentCorrection(self._told(joined([_of_image(seen), taps]), expert, len(good)), reference)

    def _told(self, seen: Moments, expert: str, frames: int) -> Moments:
        name = expert if expert in self.references else ALL
        spread, images = self._spread[name], self._images[name]
        return certain(seen, self.references[name], spread, frames=frames, images=images)

    def _reference(self, expert: str) -> Moments:
        return self.references.get(expert, self.references[ALL])

    def _measure(self, images: Images) -> None:
        new = [image for image in images if image.name not in self._known]
        if not new:
            return
        features = self._store.features(new)
        for index, (image, canvas) in enumerate(zip(new, self._store.canvases(new), strict=True)):
            of_canvas = measure_canvas(np.asarray(cut_tiles(canvas, self._store.preprocessing)))
            self._known[image.name] = joined([of_canvas, measure_taps(_taps(features, index))])


def _of_image(moments: Moments) -> Moments:
    names = (IMAGE, DETAIL)
    return Moments({name: moments.mean[name] for name in names}, {name: moments.std[name] for name in names})


def _taps(features: Features, index: int) -> dict[str, npt.NDArray[np.float32]]:
    rows = slice(index * features.tiles_per_image, (index + 1) * features.tiles_per_image)
    return {name: tap[rows].float().numpy() for name, tap in features.taps.items()}
