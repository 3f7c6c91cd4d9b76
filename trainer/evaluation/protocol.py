"""Evaluating a detector on labelled images at a threshold that was frozen before.

It knows images, maps and scores; it must not know whether torch or an engine of the box makes the maps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from deploy.evaluation import Evaluation, Picture, ScoredImage, Subject
from deploy.metrics import PixelMetrics, pixel_metrics
from deploy.progress import Progress, no_progress
from edge.errors import CaptureError, DataError, EngineError
from edge.inference.preprocessing import to_canvas
from edge.judgement.score import pool_score
from trainer.data.folder import Sample, load_image, load_mask

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge.bundle import Crop, Pooling, Preprocessing
    from edge.judgement.threshold import Threshold

Judge = Callable[["npt.NDArray[np.uint8]"], "npt.NDArray[np.float32]"]
"""From a canvas uint8 [canvas_height, canvas_width, 3] RGB to its raw anomaly map float32 [h, w]."""

DEFAULT_ALPHA = 0.01
PICTURES = 6


@dataclass(frozen=True)
class LabelledImage:
    """One image to test on, loaded when needed.

    Attributes:
        name: for people.
        label: ``good``, or the kind of defect.
        anomalous: whether the part is defective.
        group: images of one group are not independent.
        condition: a camera, a lighting, a site; may be empty.
        load: gives uint8 [H, W, 3] BGR.
        load_mask: gives bool [H, W] for (H, W); None where a defect's pixels are unknown.
    """

    name: str
    label: str
    anomalous: bool
    group: str
    condition: str
    load: Callable[[], npt.NDArray[np.uint8]]
    load_mask: Callable[[tuple[int, int]], npt.NDArray[np.bool_]] | None

    @classmethod
    def from_sample(cls, sample: Sample) -> LabelledImage:
        """Take an image of a folder; a defective one without a mask has no ``load_mask``."""
        known = sample.mask is not None or not sample.anomalous
        return cls(
            name=sample.name,
            label=sample.label,
            anomalous=sample.anomalous,
            group=sample.group,
            condition=sample.condition,
            load=lambda: load_image(sample.path),
            load_mask=(lambda shape: load_mask(sample, shape)) if known else None,
        )

    @classmethod
    def from_arrays(
        cls,
        name: str,
        image: npt.NDArray[np.uint8],
        mask: npt.NDArray[np.bool_] | None,
        *,
        label: str | None = None,
        group: str | None = None,
    ) -> LabelledImage:
        """Take an image in memory, such as a generated one.

        Args:
            name: for people.
            image: uint8 [H, W, 3] BGR.
            mask: bool [H, W] of a defective image; None for a good one.
            label: ``good`` or ``defect`` where not given.
            group: the name where not given.
        """
        truth = np.zeros(image.shape[:2], np.bool_) if mask is None else mask
        return cls(
            name=name,
            label=label or ("good" if mask is None else "defect"),
            anomalous=mask is not None,
            group=group or name,
            condition="",
            load=lambda: image,
            load_mask=lambda _: truth,
        )


@dataclass(frozen=True)
class _Judged:
    scored: ScoredImage
    anomaly_map: npt.NDArray[np.float32]
    shape: tuple[int, int]
    milliseconds: float


def evaluate(
    judge: Judge,
    images: Sequence[LabelledImage],
    *,
    preprocessing: Preprocessing,
    pooling: Pooling,
    threshold: Threshold,
    subject: Subject,
    progress: Progress = no_progress,
    pictures: int = PICTURES,
) -> Evaluation:
    """Judge every image and measure.

    Pixel figures are taken at the images' own resolution: the map is enlarged bilinearly over the crop, and pixels
    outside the crop rank below all others, so a defect there is missed. They cover good images and defective ones
    with a mask, and are undefined without a single mask. The time per image runs from the decoded image to its score;
    one judgement before the first is not counted.

    Args:
        judge: makes the raw map of a canvas.
        images: good and defective ones; pixel figures need masks.
        preprocessing: the detector's.
        pooling: from a map to a score.
        threshold: frozen, from held-out good images.
        subject: which detector it is.
        progress: called now and then.
        pictures: how many of each kind to keep for a report.

    Returns:
        Scores, figures and pictures.

    Raises:
        DataError: there is no image, an image or mask is damaged, or an image is smaller than the crop.
        EngineError: the detector gave a map with a NaN.
    """
    if not images:
        raise DataError("no images to evaluate on; put labelled images in test/<label>, good ones in test/good")
    judged: list[_Judged] = []
    judge(np.zeros((preprocessing.canvas_height, preprocessing.canvas_width, 3), np.uint8))
    for done, image in enumerate(images, start=1):
        judged.append(_judge_one(judge, image, preprocessing, pooling))
        progress("judging test images", done, len(images))
    crop = preprocessing.crop
    pixels = _measure_pixels(images, judged, crop, progress)
    chosen = _choose(judged, threshold.value, pictures)
    found, missed, alarming = (tuple(_picture(images[i], judged[i], crop) for i in kind) for kind in chosen)
    good_maps = [one.anomaly_map for one in judged if not one.scored.anomalous] or [one.anomaly_map for one in judged]
    return Evaluation(
        subject=subject,
        threshold=threshold,
        images=tuple(one.scored for one in judged),
        pixels=pixels,
        milliseconds=np.array([one.milliseconds for one in judged]),
        background=float(np.median([np.median(anomaly_map) for anomaly_map in good_maps])),
        found=found,
        missed=missed,
        alarming=alarming,
        notes=_notes(images, threshold, pixels),
    )


def enlarge_map(
    anomaly_map: npt.NDArray[np.float32], shape: tuple[int, int], crop: Crop | None
) -> npt.NDArray[np.float32]:
    """Bring a map to the resolution of its image.

    Args:
        anomaly_map: float32 [h, w], covering the crop.
        shape: (H, W) of the image.
        crop: the part that the map covers; None for the whole image.

    Returns:
        float32 [H, W]; bilinear between cell centres inside the crop, -inf outside.
    """
    if crop is None:
        return np.asarray(cv2.resize(anomaly_map, (shape[1], shape[0]), interpolation=cv2.INTER_LINEAR))
    enlarged = np.full(shape, -np.inf, np.float32)
    inside = cv2.resize(anomaly_map, (crop.w, crop.h), interpolation=cv2.INTER_LINEAR)
    enlarged[crop.y : crop.y + crop.h, crop.x : crop.x + crop.w] = inside
    return enlarged


def _judge_one(judge: Judge, image: LabelledImage, preprocessing: Preprocessing, pooling: Pooling) -> _Judged:
    decoded = image.load()
    start = time.perf_counter_ns()
    try:
        anomaly_map = judge(to_canvas(decoded, preprocessing))
    except CaptureError as error:
        raise DataError(f"{image.name}: {error}") from error
    score = pool_score(anomaly_map, pooling)
    milliseconds = (time.perf_counter_ns() - start) / 1e6
    if np.isnan(anomaly_map).any():
        raise EngineError(f"{image.name}: the anomaly map holds a NaN; train or export the detector again")
    scored = ScoredImage(image.name, image.label, image.anomalous, score, image.group, image.condition)
    # A copy: an engine may hand out a view of a buffer that it fills again.
    return _Judged(scored, np.array(anomaly_map, np.float32), decoded.shape[:2], milliseconds)


def _measure_pixels(
    images: Sequence[LabelledImage], judged: Sequence[_Judged], crop: Crop | None, progress: Progress
) -> PixelMetrics | None:
    if not any(image.anomalous and image.load_mask for image in images):
        return None
    known = [(image.load_mask, one) for image, one in zip(images, judged, strict=True) if image.load_mask]

    def masks() -> Iterator[npt.NDArray[np.bool_]]:
        for done, (load, one) in enumerate(known, start=1):
            yield load(one.shape)
            progress("comparing pixels", done, len(known))

    return pixel_metrics(masks(), (enlarge_map(one.anomaly_map, one.shape, crop) for _, one in known))


def _choose(judged: Sequence[_Judged], threshold: float, count: int) -> tuple[list[int], list[int], list[int]]:
    """Return the indices of the strongest defects found, the faintest missed, and the highest-scoring good images."""
    falling = sorted(range(len(judged)), key=lambda i: (-judged[i].scored.score, judged[i].scored.name))
    found = [i for i in falling if judged[i].scored.anomalous and judged[i].scored.score >= threshold]
    missed = [i for i in reversed(falling) if judged[i].scored.anomalous and judged[i].scored.score < threshold]
    good = [i for i in falling if not judged[i].scored.anomalous]
    return found[:count], missed[:count], good[:count]


def _picture(image: LabelledImage, one: _Judged, crop: Crop | None) -> Picture:
    mask = image.load_mask(one.shape) if image.anomalous and image.load_mask else None
    return Picture(one.scored, image.load(), one.anomaly_map, crop, mask)


def _notes(images: Sequence[LabelledImage], threshold: Threshold, pixels: PixelMetrics | None) -> tuple[str, ...]:
    notes = []
    defective = [image for image in images if image.anomalous]
    without = sum(image.load_mask is None for image in defective)
    if not defective:
        notes.append("There are no defective images: recall and the areas under curves are undefined.")
    elif len(defective) == len(images):
        notes.append("There are no good images: false alarms and the areas under curves are undefined.")
    if defective and pixels is None:
        notes.append("There are no masks: pixel figures are undefined.")
    elif without:
        notes.append(f"{without} of {len(defective)} defective images have no mask and are left out of pixel figures.")
    if not threshold.budget_supported:
        notes.append(
            f"The false-alarm rate of {threshold.alpha:g} per image is extrapolated from {threshold.n_groups} "
            f"independent good images or groups; they support {threshold.smallest_supported_alpha:.3g} at best."
        )
    return tuple(notes)
