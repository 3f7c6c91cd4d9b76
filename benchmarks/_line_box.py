"""What a box makes of a drifting line: bundles of its products, thresholds for a budget, each frame judged.

Frames go through the packed bundle as on a box: detector, looks, follower. It must not know how lines are drawn.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import cv2
import numpy as np

from benchmarks._setting import as_frame, quiet
from edge.adaptation.follower import Follower, Phase
from edge.adaptation.guided import GuidedDetector
from edge.adaptation.reference import read_reference
from edge.bundle import Bundle
from edge.frames import Decision, JudgedFrame, Verdict
from edge.inference.detector import Detector
from edge.judgement.score import pool_score
from edge.judgement.threshold import fit_threshold

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from edge.adaptation.settings import AdaptationSettings
    from edge.bundle import Precision

    Image = npt.NDArray[np.uint8]

BUDGET = 0.01
# Less than a bundle for a line: the stream is what is measured here, many bundles are needed, and each trains for long.
_SETTINGS = {"memory": {"rows": 200, "candidates": 6000}, "adapted_moe": {"rows": 200, "candidates": 6000}}


def make_bundle(method: str, trains: Sequence[Image], folder: Path, *, precision: str = "float32") -> Bundle:
    """Train and pack a bundle, or open the one that is there.

    Args:
        method: name in the registry.
        trains: good pictures uint8 [n, side, side, 3] BGR of each product.
        folder: to keep data, run and bundle in.
        precision: see :func:`trainer.export.export_run`.
    """
    bundle = folder / "bundle"
    if (bundle / "manifest.json").exists():
        return Bundle.open(bundle)
    # Imported here: a box has neither torch nor the trainer.
    from deploy.parity import ParityRules
    from trainer.export import export_run
    from trainer.fit import preprocessing_for, train

    data = _write(trains, folder / "data")
    side = trains[0].shape[1]
    preprocessing = preprocessing_for(size=(side, side), tiles=(1, 1), overlap=0, crop=None)
    settings = _SETTINGS.get(method, {})
    run = train(
        method=method, data=data, out=folder / "run", preprocessing=preprocessing, settings=settings, progress=quiet
    )
    # Few pictures of few pixels: the gate's limits are for a bundle that goes to a line.
    rules = ParityRules(
        shift=4.0, flipped=0.2, auroc_drop=0.2, rerouted=0.1, unknown=0.2, good_samples=32, defect_samples=32
    )
    return export_run(run.path, bundle, precision=precision, rules=rules, progress=quiet)


def _write(trains: Sequence[Image], folder: Path) -> Path:
    good = folder / "train" / "good"
    good.mkdir(parents=True, exist_ok=True)
    rows = []
    for product, pictures in enumerate(trains):
        for index, picture in enumerate(pictures):
            name = f"{product}_{index:04d}.png"
            cv2.imwrite(str(good / name), picture)
            rows.append((f"train/good/{name}", name_of(product)))
    with (folder / "meta.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "condition"), *rows])
    return folder


def name_of(product: int) -> str:
    """Return the sub-class that a product is, as recipes name it."""
    return f"product_{product}"


@dataclass(frozen=True, slots=True)
class Judged:
    """What a line box said of a frame.

    Attributes:
        score: pooled; NaN where it was refused.
        nok: at or above the threshold.
        refused: shown as no product, or another than the recipe's.
        phase: of the follower before it.
        shift: of the follower after it, in units of what is usual; 0 without one.
    """

    score: float
    nok: bool
    refused: bool
    phase: Phase
    shift: float


@dataclass
class LineBox:
    """One camera's detectors, thresholds and followers; the recipe says which are in use.

    A method without experts has a bundle for each product, and a change of recipe changes the bundle; one with experts
    has one for both.

    Attributes:
        detectors: one for all products, or one for each.
        thresholds: of each detector.
        adaptation: settings; None corrects nothing.
    """

    detectors: list[Detector]
    thresholds: list[float]
    adaptation: AdaptationSettings | None
    follower: Follower | None = None
    _guided: GuidedDetector | None = None
    _current: int = 0
    _seq: int = field(default=0)

    def change_recipe(self, product: int) -> None:
        """What the command ``recipe`` does on a box, the bundle changed before where there is one per product."""
        self._current = product if len(self.detectors) > 1 else 0
        detector = self.detectors[self._current]
        if self.adaptation is None:
            self._guided = GuidedDetector(detector)
            return
        if self.follower is None or len(self.detectors) > 1:
            reference = read_reference(detector.bundle, detector.status.precision)
            if reference is None:
                raise SystemExit(f"{detector.bundle.path}: packed without moments; remove it, it is then made again")
            self.follower = Follower(reference, self.adaptation)
        self._guided = GuidedDetector(detector, self.follower)
        self.follower.reset(name_of(product))

    def judge(self, image: Image) -> Judged:
        """Judge a frame and let the follower learn from it."""
        assert self._guided is not None
        frame = as_frame(image, self._seq)
        self._seq += 1
        phase = Phase.FOLLOWING if self.follower is None else self.follower.phase
        seen = self._guided.predict(frame)
        pooling = self.detectors[self._current].bundle.manifest.pooling
        threshold = self.thresholds[self._current]
        score = float("nan") if seen.refusal else pool_score(seen.prediction.anomaly_map, pooling)
        # A NaN is no alarm; it is refused.
        nok = score >= threshold
        decision = Decision.NOT_JUDGED if seen.refusal else Decision.NOK if nok else Decision.OK
        verdict = Verdict(decision, score, threshold, score, "cam", frame.camera_seq, 0, frame.captured_at)
        if self.follower is not None:
            self.follower.take(JudgedFrame(frame, seen.prediction, verdict, alarmed=nok))
        shift = 0.0 if self.follower is None else self.follower.shift
        return Judged(score, nok, bool(seen.refusal), phase, shift)


def scores_of(detector: Detector, images: Sequence[Image]) -> npt.NDArray[np.float64]:
    """Return the pooled scores float64 [n] of pictures, nothing corrected."""
    pooling = detector.bundle.manifest.pooling
    return np.array([pool_score(detector.predict(as_frame(one, 0)).anomaly_map, pooling) for one in images])


def threshold_for(scores: npt.NDArray[np.float64], budget: float = BUDGET) -> float:
    """Return the threshold of a budget, as a box fits it; each frame is a part of its own."""
    return fit_threshold(scores, None, budget).value


def open_detector(bundle: Bundle, precision: Precision | None = None) -> Detector:
    """Open a bundle on one core."""
    return Detector.open(bundle, precision=precision, threads=1)
