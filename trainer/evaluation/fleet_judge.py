"""How the boxes of a simulated fleet judge: distances, scores, thresholds and their figures on labelled images.

It must not know how the memories were made.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploy.aggregator.lloyd import single_threaded_blas
from deploy.metrics import image_auroc
from edge.errors import DataError
from edge.judgement.score import pool_score
from edge.judgement.threshold import fit_threshold
from edge.memory.search import anomaly_map, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from edge.bundle import MemoryLayout, Pooling, Preprocessing
    from trainer.evaluation.fleet_box import BoxData

    Half = npt.NDArray[np.float16]
    Single = npt.NDArray[np.float32]
    Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Judge:
    """From distances to image scores, by the rules of a bundle.

    Attributes:
        layout: of the memory head.
        preprocessing: of the images; one tile.
        map_stride: input pixels per map cell.
        pooling: from a map to a score.
    """

    layout: MemoryLayout
    preprocessing: Preprocessing
    map_stride: int
    pooling: Pooling

    def scores(self, squared: Single) -> npt.NDArray[np.float64]:
        """Return image scores float64 [M] from squared distances float32 [M, L] to the nearest row of all banks."""
        # A row of one column at distance d from the only row of a bank has the map of a patch at distance d.
        origin = np.zeros((1, 1), np.float32)
        distances = np.sqrt(squared)[:, None, :, None]
        maps = (anomaly_map(one, [origin], self.layout, self.preprocessing, self.map_stride) for one in distances)
        return np.array([pool_score(one, self.pooling) for one in maps])


def squared_distances(images: Half, bank: Single) -> Single:
    """Return float32 [M, L], the squared distance of every patch of images [M, L, D] to the nearest row [R, D].

    Threads share the images and the BLAS is kept to one: its own threads wait for each other on products this small
    (14 times as slow beside other work on two cores).
    """
    found = np.empty(images.shape[:2], np.float32)

    def search(index: int) -> None:
        found[index] = nearest(images[index].astype(np.float32), bank)[0]

    with single_threaded_blas(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(search, range(len(images))))
    return found


@dataclass(frozen=True, slots=True)
class Judged:
    """Scores of all honest boxes' test images by each honest box, K boxes and M images.

    Attributes:
        local: float64 [K, M], with the box's own memory alone.
        fleet: float64 [K, M], with the fleet's memory beside it.
        false_alarms: float64 [K], share of a box's own good test images at or above its threshold, with both.
    """

    local: Scores
    fleet: Scores
    false_alarms: Scores


@dataclass(frozen=True, slots=True)
class Exam:
    """The test images of all honest boxes together.

    Attributes:
        images: float16 [M, L, D].
        labels: bool [M], True is defective.
        box: int64 [M], whose image it is.
        product: unicode [M].
        groups: unicode [M]; groups of two boxes never share a name.
    """

    images: Half
    labels: npt.NDArray[np.bool_]
    box: npt.NDArray[np.int64]
    product: npt.NDArray[np.str_]
    groups: npt.NDArray[np.str_]

    @classmethod
    def of(cls, boxes: Sequence[BoxData]) -> Exam:
        """Put the boxes' test images together."""
        counts = [len(box.test) for box in boxes]
        return cls(
            images=np.concatenate([box.test for box in boxes]),
            labels=np.concatenate([box.labels for box in boxes]),
            box=np.repeat(np.arange(len(boxes)), counts),
            product=np.repeat([box.product for box in boxes], counts),
            groups=np.concatenate([[f"{i} {group}" for group in box.groups] for i, box in enumerate(boxes)]),
        )

    def auroc(self, scores: Scores, of: npt.NDArray[np.bool_] | None = None) -> float:
        """Return the I-AUROC of scores [M], of some images; NaN where a class is absent."""
        chosen = np.ones(len(self.labels), np.bool_) if of is None else of
        found = image_auroc(self.labels[chosen], scores[chosen])
        return np.nan if found is None else found

    def mixed(self, scores: Scores) -> Scores:
        """Return each box's I-AUROC over all images, float64 [K], from scores [K, M]."""
        return np.array([self.auroc(row) for row in scores])

    def own(self, scores: Scores) -> Scores:
        """Return each box's I-AUROC over its own images from scores [K, M]; NaN where a class is absent."""
        return np.array([self.auroc(row, self.box == box) for box, row in enumerate(scores)])


class Judgement:
    """Boxes with their own memories, ready to judge with any fleet memory beside them.

    Attributes:
        exam: what they judge.
        local: float64 [K, M], scores with their own memories alone.
    """

    def __init__(self, judge: Judge, exam: Exam, boxes: Sequence[BoxData], banks: Sequence[Single]) -> None:
        """Measure all distances to the boxes' own memories, once.

        Args:
            judge: the rules.
            exam: what they judge.
            boxes: K boxes, for their commissioning images.
            banks: float32 [R, D] each, their own memories.
        """
        self.judge, self.exam = judge, exam
        self._boxes = boxes
        self._own = [squared_distances(exam.images, bank) for bank in banks]
        self._calibration = [squared_distances(box.commissioning, bank) for box, bank in zip(boxes, banks, strict=True)]
        self.local = np.array([judge.scores(own) for own in self._own])

    def beside(self, bank: Single) -> Scores:
        """Return the scores float64 [K, M] of boxes that all have one fleet memory beside their own."""
        squared = squared_distances(self.exam.images, bank)
        return np.array([self.judge.scores(np.minimum(own, squared)) for own in self._own])

    def judged(self, held: Sequence[Single | None], *, alpha: float) -> Judged:
        """Judge and set thresholds with the fleet memory that each box holds, None for none.

        Args:
            held: K banks; boxes that hold the same one share the array.
            alpha: false-alarm probability that the thresholds are set for.
        """
        found = {id(bank): squared_distances(self.exam.images, bank) for bank in held if bank is not None}
        scores, alarms = [], []
        for index, bank in enumerate(held):
            squared, calibration = self._own[index], self._calibration[index]
            if bank is not None:
                squared = np.minimum(squared, found[id(bank)])
                calibration = np.minimum(calibration, squared_distances(self._boxes[index].commissioning, bank))
            scores.append(self.judge.scores(squared))
            good = scores[-1][(self.exam.box == index) & ~self.exam.labels]
            alarms.append(_false_alarms(good, self.judge.scores(calibration), alpha))
        return Judged(self.local, np.array(scores), np.array(alarms))


def _false_alarms(good: Scores, calibration: Scores, alpha: float) -> float:
    try:
        threshold = fit_threshold(calibration, None, alpha).value
    except DataError:  # too few commissioning images: this box has no threshold
        return np.nan
    return float(np.mean(good >= threshold)) if good.size else np.nan
