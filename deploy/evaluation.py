"""What an evaluation found: scores, figures and a few pictures, as values that are written as JSON and drawn as HTML.

It must not know where images come from nor how they were judged.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.metrics import fpr_at_threshold, image_ap, image_auroc, image_f1, recall_at_threshold
from edge.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    from deploy.metrics import PixelMetrics
    from edge.bundle import Crop
    from edge.judgement.threshold import Threshold


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """One test image and its raw score.

    Attributes:
        name: what people call it, such as ``test/scratch/003.png``.
        label: ``good``, or the kind of defect.
        anomalous: whether the part is defective.
        score: raw, higher is more anomalous.
        group: images of one group are not independent.
        condition: a camera, a lighting, a site; may be empty.
    """

    name: str
    label: str
    anomalous: bool
    score: float
    group: str
    condition: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A test image with its map, kept to be drawn.

    Attributes:
        scored: the image's name, label and score.
        image: uint8 [H, W, 3] BGR, as the camera gave it.
        anomaly_map: float32 [h, w], raw, covering ``crop``.
        crop: the part of the image that the map covers; None for all of it.
        mask: bool [H, W], the true defect; None where it is unknown or there is none.
    """

    scored: ScoredImage
    image: npt.NDArray[np.uint8]
    anomaly_map: npt.NDArray[np.float32]
    crop: Crop | None
    mask: npt.NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class Subject:
    """Which detector was evaluated.

    Attributes:
        product: what it inspects.
        method: how it was trained.
        engine: ``torch`` or the engine of the bundle.
        precision: numerics of its graphs.
    """

    product: str
    method: str
    engine: str
    precision: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A detector's performance on labelled images at a threshold that was frozen before.

    Attributes:
        subject: which detector.
        threshold: the frozen threshold, from held-out good images.
        images: every test image with its score.
        pixels: figures over the pixels; None without a single mask.
        milliseconds: float64 [n], wall time per image from the decoded image to its score.
        background: typical map value on good images, the cold end of the heat maps' scale.
        found: strongest of the defects at or above the threshold, strongest first.
        missed: defects below the threshold, lowest score first.
        alarming: good images of the highest scores, highest first.
        notes: what a reader of the figures should know, one sentence each.
    """

    subject: Subject
    threshold: Threshold
    images: tuple[ScoredImage, ...]
    pixels: PixelMetrics | None
    milliseconds: npt.NDArray[np.float64]
    background: float
    found: tuple[Picture, ...] = ()
    missed: tuple[Picture, ...] = ()
    alarming: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> npt.NDArray[np.bool_]:
        """Bool [n], True is anomalous."""
        return np.array([image.anomalous for image in self.images], np.bool_)

    @property
    def scores(self) -> npt.NDArray[np.float64]:
        """Raw scores, float64 [n]."""
        return np.array([image.score for image in self.images], np.float64)

    def figures(self) -> dict[str, Any]:
        """Return the figures under their published names; None where undefined (no masks, one class only).

        ``image_f1`` is the best F1 of all thresholds and sees the test labels; ``fpr_at_threshold`` and
        ``recall_at_threshold`` are at the frozen one. ``ms_per_image`` is a mean.
        """
        labels, scores = self.labels, self.scores
        best = image_f1(labels, scores)
        return {
            "image_auroc": image_auroc(labels, scores),
            "image_ap": image_ap(labels, scores),
            "image_f1": best.f1 if best else None,
            "pixel_auroc": self.pixels.auroc if self.pixels else None,
            "aupro": self.pixels.aupro if self.pixels else None,
            "fpr_at_threshold": fpr_at_threshold(labels, scores, self.threshold.value),
            "recall_at_threshold": recall_at_threshold(labels, scores, self.threshold.value),
            "ms_per_image": float(self.milliseconds.mean()),
            "ms_p50": float(np.quantile(self.milliseconds, 0.5)),
            "ms_p99": float(np.quantile(self.milliseconds, 0.99)),
            "n_good": int(np.count_nonzero(~labels)),
            "n_defective": int(np.count_nonzero(labels)),
            "n_regions": self.pixels.regions if self.pixels else 0,
            "threshold": self.threshold.value,
            "threshold_method": self.threshold.method,
            "alpha": self.threshold.alpha,
            "budget_supported": self.threshold.budget_supported,
            "smallest_supported_alpha": self.threshold.smallest_supported_alpha,
            "n_calibration": self.threshold.n,
            "per_label": self.per_label(),
            "product": self.subject.product,
            "method": self.subject.method,
            "engine": self.subject.engine,
            "precision": self.subject.precision,
            "notes": list(self.notes),
        }

    def per_label(self) -> dict[str, dict[str, float | int | bool | None]]:
        """Return per label: images, those at or above the threshold, their median score and AUROC against the good."""
        labels, scores = self.labels, self.scores
        names = np.array([image.label for image in self.images])
        table: dict[str, dict[str, float | int | bool | None]] = {}
        for name in sorted(set(names.tolist()), key=lambda name: (bool(labels[names == name].any()), name)):
            chosen = names == name
            anomalous = bool(labels[chosen].any())
            against = chosen | ~labels
            table[name] = {
                "anomalous": anomalous,
                "images": int(chosen.sum()),
                "flagged": int(np.count_nonzero(scores[chosen] >= self.threshold.value)),
                "median_score": float(np.median(scores[chosen])),
                "image_auroc": image_auroc(labels[against], scores[against]) if anomalous else None,
            }
        return table


def write_json(path: Path, evaluation: Evaluation) -> None:
    """Write :meth:`Evaluation.figures` as JSON, whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    write_whole(path, json.dumps(evaluation.figures(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a UTF-8 text file so that readers see the old content or the new one; missing folders are made.

    Raises:
        DataError: the file cannot be written; what stood there before is unchanged.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({error.strerror}); free space or choose another file") from error


def colour_scale(evaluation: Evaluation) -> tuple[float, float]:
    """Return (low, high) of the heat maps: the background of good images, and as far above the threshold again by half.

    One scale for all pictures of an evaluation, so that they can be compared; the threshold lies at two thirds.
    """
    low, threshold = evaluation.background, evaluation.threshold.value
    if threshold > low and math.isfinite(threshold):
        return low, threshold + (threshold - low) / 2
    return low, low + max(1e-6, abs(low))
