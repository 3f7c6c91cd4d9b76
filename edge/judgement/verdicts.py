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
class _Levels:
    """What the calibration scores say under one region of interest."""

    scores: npt.NDArray[np.float32]
    threshold: Threshold
    leave_level: float


@dataclass(frozen=True, slots=True)
class _View:
    """What holds for one frame size."""

    frame_shape: tuple[int, int]
    map_shape: tuple[int, ...]
    box: Box
    mask: npt.NDArray[np.bool_] | None
    levels: _Levels


class Judge:
    """Judges the predictions of one camera.

    The threshold is fitted on the bundle's calibration scores. Under a region of interest the calibration maps are
    pooled again under that same region, which depends on the size of the frames: it then happens with the first
    frame and again when the size changes.

    Attributes:
        memory_version: of the memory that its thresholds hold for.
        notice: why a threshold from outside is not used; empty where it is, or where there is none.
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
        """Prepare a judge.

        Args:
            calibration: held-out good scores of the engine and precision in use.
            pooling: the manifest's rule.
            crop: the manifest's crop.
            alpha: false-alarm probability per frame, see :class:`~edge.judgement.threshold.Budget`.
            leave_quantile: quantile of the good scores below which a frame is calm.
            region_of_interest: in pixels of the camera frame.
            external: a threshold set from outside; ignored, with a notice, when it names another bundle or memory.
            bundle_id: of the bundle in use.
            memory_version: of the memory whose predictions are judged, 0 for the one packed in the bundle.
            max_regions: most regions in a verdict.
            clock_ns: the monotonic clock.

        Raises:
            DataError: the calibration cannot give a threshold.
        """
        self._calibration = calibration
        self._pooling = pooling
        self._crop = crop
        self._alpha = alpha
        self._leave_quantile = leave_quantile
        self._region = region_of_interest or RegionOfInterest()
        self._max_regions = max_regions
        self._clock_ns = clock_ns
        self._bundle_id = bundle_id
        self._given = external
        self.memory_version = memory_version
        self.notice = "" if external is None else external.mismatch(bundle_id=bundle_id, memory_version=memory_version)
        self._external = None if self.notice else external
        self._view: _View | None = None
        self._whole = self._fit(calibration.scores)
        self._levels = self._whole

    @property
    def threshold(self) -> Threshold:
        """The threshold in force; with a region of interest, that of the whole map before the first frame."""
        return self._levels.threshold

    @property
    def leave_level(self) -> float:
        """The raw score below which a frame is calm; at most the threshold."""
        return self._levels.leave_level

    @property
    def calibration_count(self) -> int:
        """Calibration scores; the p-value's floor is 1 / (this + 1)."""
        return int(self._calibration.scores.size)

    @property
    def good_scores(self) -> npt.NDArray[np.float32]:
        """The calibration scores float32 [n] under this camera's region of interest, once a frame was seen."""
        return self._levels.scores

    @property
    def mask(self) -> npt.NDArray[np.bool_] | None:
        """Map cells bool [h, w] that count for frames of the size seen last; None where all do."""
        return None if self._view is None else self._view.mask

    @property
    def calibration(self) -> CalibrationScores:
        """What its thresholds are made from."""
        return self._calibration

    def recalibrated(self, calibration: CalibrationScores, *, memory_version: int) -> Judge:
        """Make the judge of the same camera for another memory, ready for frames of the size seen last.

        Args:
            calibration: what good images score against that memory.
            memory_version: its version; a threshold from outside that names another one is not used.

        Raises:
            DataError: the calibration cannot give a threshold.
            BundleError: its maps are of another shape than the detector's.
        """
        judge = Judge(
            calibration=calibration,
            pooling=self._pooling,
            crop=self._crop,
            alpha=self._alpha,
            leave_quantile=self._leave_quantile,
            region_of_interest=self._region,
            external=self._given,
            bundle_id=self._bundle_id,
            memory_version=memory_version,
            max_regions=self._max_regions,
            clock_ns=self._clock_ns,
        )
        seen = self._view
        if seen is not None:
            judge._view = judge._look(seen.frame_shape, seen.map_shape)
            judge._levels = judge._view.levels
        return judge

    def judge(self, prediction: Prediction) -> Verdict:
        """Judge one prediction.

        Returns:
            OK, NOK, or NOT_JUDGED when the map holds NaN or infinity inside the region of interest.

        Raises:
            SettingsError: the region of interest leaves nothing of the map.
            BundleError: the calibration maps are of another shape than the prediction's map.
            DataError: the calibration cannot give a threshold.
            ValueError: the prediction is of another memory than this judge's thresholds.
        """
        started = self._clock_ns()
        frame, anomaly_map = prediction.frame, prediction.anomaly_map
        if prediction.memory_version != self.memory_version:
            raise ValueError(
                f"a prediction of memory version {prediction.memory_version} cannot be judged by the thresholds of "
                f"version {self.memory_version}"
            )
        view = self._viewed(frame, anomaly_map.shape)
        score = pool_score(anomaly_map, self._pooling, view.mask)
        if not math.isfinite(score):
            return self.not_judged(frame, "the detector returned a score that is not finite")
        threshold = view.levels.threshold.value
        nok = score >= threshold
        regions = (
            find_regions(np.nan_to_num(anomaly_map), threshold, view.box, mask=view.mask, limit=self._max_regions)
            if nok
            else ()
        )
        probability = p_value(score, view.levels.scores)
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
            memory_version=self.memory_version,
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
            threshold=self._levels.threshold.value,
            p_value=math.nan,
            camera=camera,
            camera_seq=camera_seq,
            captured_ns=captured_ns,
            captured_at=captured_at,
            part_id=part_id,
            reason=reason,
            latency_ms={"total": (self._clock_ns() - captured_ns) / NS_PER_MS},
            memory_version=self.memory_version,
        )

    def _viewed(self, frame: Frame, map_shape: tuple[int, ...]) -> _View:
        frame_shape = (frame.image.shape[0], frame.image.shape[1])
        if self._view is None or (frame_shape, map_shape) != (self._view.frame_shape, self._view.map_shape):
            self._view = self._look(frame_shape, map_shape)
            self._levels = self._view.levels
        return self._view

    def _look(self, frame_shape: tuple[int, int], map_shape: tuple[int, ...]) -> _View:
        box = covered_box(self._crop, frame_width=frame_shape[1], frame_height=frame_shape[0])
        mask = rasterise(self._region, box, (map_shape[0], map_shape[1]))
        levels = self._whole if mask is None else self._fit(self._pooled_again(mask, map_shape))
        return _View(frame_shape=frame_shape, map_shape=map_shape, box=box, mask=mask, levels=levels)

    def _pooled_again(self, mask: npt.NDArray[np.bool_], map_shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        maps = self._calibration.maps
        if maps.shape[1:] != map_shape:
            raise BundleError(
                f"calibration maps are {maps.shape[1:]}, the detector's {map_shape}: the bundle cannot be calibrated "
                "for a region of interest; export it again"
            )
        return np.asarray([pool_score(one.astype(np.float32), self._pooling, mask) for one in maps], dtype=np.float32)

    def _fit(self, scores: npt.NDArray[np.float32]) -> _Levels:
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
        calm = leave_level(scores, groups, self._leave_quantile, threshold.value)
        return _Levels(scores=scores, threshold=threshold, leave_level=calm)
