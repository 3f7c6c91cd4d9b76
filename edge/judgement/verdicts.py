"""From a prediction to a verdict: pool inside the region of interest, compare with the threshold, name the regions.

Knows nothing of engines or cameras; the calibration is handed in.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import BundleError
from edge.frames import Decision, Verdict
from edge.judgement.region_of_interest import Box, RegionOfInterest, covered_box, rasterise
from edge.judgement.regions import find_regions
from edge.judgement.score import pool_score
from edge.judgement.threshold import ExternalThreshold, Threshold, fit_threshold, leave_level, p_value

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    import numpy.typing as npt

    from edge.bundle import CalibrationScores, Crop, Pooling
    from edge.frames import Frame, Prediction

NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class _Fit:
    """What holds for one frame size."""

    frame_shape: tuple[int, int]
    map_shape: tuple[int, ...]
    box: Box
    mask: npt.NDArray[np.bool_] | None
    scores: npt.NDArray[np.float32]
    threshold: Threshold
    leave_level: float


class Judge:
    """Judges the predictions of one camera.

    The threshold is fitted on the bundle's calibration scores; under a region of interest the calibration maps are
    pooled again under that same region. Both depend on the size of the frames, so it happens with the first frame
    and again when the size changes.
    """

    def __init__(
        self,
        *,
        calibration: CalibrationScores,
        pooling: Pooling,
        crop: Crop | None,
        alpha: float,
        leave_quantile: float = 0.95,
        region_of_interest: RegionOfInterest | None = None,
        external: ExternalThreshold | None = None,
        bundle_id: str = "",
        memory_version: int = 0,
        max_regions: int = 16,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Prepare a judge; nothing is fitted yet.

        Args:
            calibration: held-out good scores of the engine and precision in use.
            pooling: the manifest's rule.
            crop: the manifest's crop.
            alpha: false-alarm probability per frame, see :class:`~edge.judgement.threshold.Budget`.
            leave_quantile: quantile of the good scores below which a frame is calm.
            region_of_interest: in pixels of the camera frame.
            external: a threshold set from outside; ignored, with a notice, when it names another bundle or memory.
            bundle_id: of the bundle in use.
            memory_version: of the memory in use, 0 for the one packed in the bundle.
            max_regions: most regions in a verdict.
            clock_ns: the monotonic clock.
        """
        self._calibration = calibration
        self._pooling = pooling
        self._crop = crop
        self._alpha = alpha
        self._leave_quantile = leave_quantile
        self._region = region_of_interest or RegionOfInterest()
        self._max_regions = max_regions
        self._clock_ns = clock_ns
        self._fit: _Fit | None = None
        self.notice = "" if external is None else external.mismatch(bundle_id=bundle_id, memory_version=memory_version)
        self._external = None if self.notice else external

    @property
    def threshold(self) -> Threshold | None:
        """The threshold in force; None before the first frame."""
        return None if self._fit is None else self._fit.threshold

    @property
    def leave_level(self) -> float:
        """The raw score below which a frame is calm; NaN before the first frame."""
        return math.nan if self._fit is None else self._fit.leave_level

    @property
    def calibration_count(self) -> int:
        """Calibration scores; the p-value's floor is 1 / (this + 1)."""
        return int(self._calibration.scores.size)

    def judge(self, prediction: Prediction) -> Verdict:
        """Judge one prediction.

        Returns:
            OK, NOK, or NOT_JUDGED when the map holds NaN or infinity inside the region of interest.

        Raises:
            SettingsError: the region of interest leaves nothing of the map.
            BundleError: the calibration maps are of another shape than the prediction's map.
            DataError: the calibration cannot give a threshold.
        """
        started = self._clock_ns()
        frame, anomaly_map = prediction.frame, prediction.anomaly_map
        fit = self._fitted(frame, anomaly_map.shape)
        score = pool_score(anomaly_map, self._pooling, fit.mask)
        if not math.isfinite(score):
            return self.not_judged(frame, "the detector returned a score that is not finite")
        threshold = fit.threshold.value
        nok = score >= threshold
        regions = (
            find_regions(np.nan_to_num(anomaly_map), threshold, fit.box, mask=fit.mask, limit=self._max_regions)
            if nok
            else ()
        )
        probability = p_value(score, fit.scores)
        ended = self._clock_ns()
        return Verdict(
            decision=Decision.NOK if nok else Decision.OK,
            score=score,
            threshold=threshold,
            p_value=probability,
            camera=frame.camera,
            camera_seq=frame.camera_seq,
            captured_ns=frame.captured_ns,
            captured_at=frame.captured_at,
            part_id=frame.part_id,
            regions=regions,
            latency_ms={
                "preprocess": prediction.preprocess_ns / NS_PER_MS,
                "inference": prediction.inference_ns / NS_PER_MS,
                "judgement": (ended - started) / NS_PER_MS,
                "total": (ended - frame.captured_ns) / NS_PER_MS,
            },
        )

    def not_judged(self, frame: Frame, reason: str) -> Verdict:
        """Return the verdict of a frame that could not be judged."""
        return self.missing(
            camera=frame.camera,
            camera_seq=frame.camera_seq,
            captured_ns=frame.captured_ns,
            captured_at=frame.captured_at,
            part_id=frame.part_id,
            reason=reason,
        )

    def missing(
        self,
        *,
        camera: str,
        camera_seq: int,
        captured_ns: int,
        captured_at: datetime,
        reason: str,
        part_id: str | None = None,
    ) -> Verdict:
        """Return the verdict of a part whose frame never arrived here (dropped or unreadable)."""
        return Verdict(
            decision=Decision.NOT_JUDGED,
            score=math.nan,
            threshold=math.nan if self._fit is None else self._fit.threshold.value,
            p_value=math.nan,
            camera=camera,
            camera_seq=camera_seq,
            captured_ns=captured_ns,
            captured_at=captured_at,
            part_id=part_id,
            reason=reason,
            latency_ms={"total": (self._clock_ns() - captured_ns) / NS_PER_MS},
        )

    def _fitted(self, frame: Frame, map_shape: tuple[int, ...]) -> _Fit:
        frame_shape = (frame.image.shape[0], frame.image.shape[1])
        if self._fit is None or (frame_shape, map_shape) != (self._fit.frame_shape, self._fit.map_shape):
            self._fit = self._make_fit(frame_shape, map_shape)
        return self._fit

    def _make_fit(self, frame_shape: tuple[int, int], map_shape: tuple[int, ...]) -> _Fit:
        box = covered_box(self._crop, frame_width=frame_shape[1], frame_height=frame_shape[0])
        mask = rasterise(self._region, box, (map_shape[0], map_shape[1]))
        scores = self._calibration.scores
        if mask is not None:
            maps = self._calibration.maps
            if maps.shape[1:] != map_shape:
                raise BundleError(
                    f"calibration maps are {maps.shape[1:]}, the detector's {map_shape}: the bundle cannot be "
                    "calibrated for a region of interest; export it again"
                )
            pooled = [pool_score(one.astype(np.float32), self._pooling, mask) for one in maps]
            scores = np.asarray(pooled, dtype=np.float32)
        groups = self._calibration.groups
        if self._external is None:
            threshold = fit_threshold(scores, groups, self._alpha)
        else:
            n_groups = int(np.unique(groups).size)
            threshold = Threshold(
                value=self._external.value,
                alpha=self._alpha,
                n=int(scores.size),
                n_groups=n_groups,
                budget_supported=False,
                smallest_supported_alpha=1 / (n_groups + 1),
                method="external",
            )
        return _Fit(
            frame_shape=frame_shape,
            map_shape=map_shape,
            box=box,
            mask=mask,
            scores=scores,
            threshold=threshold,
            leave_level=leave_level(scores, groups, self._leave_quantile, threshold.value),
        )
