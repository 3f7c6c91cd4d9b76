"""From a prediction to a verdict: pool inside the region of interest, compare with the threshold, name the regions.

Knows nothing of engines or cameras; the calibration is handed in.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import BundleError
from edge.frames import Decision, Verdict
from edge.judgement.region_of_interest import Box  # noqa: TC001
from edge.judgement.regions import find_regions
from edge.judgement.scope import Scope
from edge.judgement.score import pool_score
from edge.judgement.threshold import (
    ExternalThreshold,
    RunTimeThreshold,
    Threshold,
    choose_threshold,
    enter_level,
    fit_threshold,
    leave_level,
    p_value,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    import numpy.typing as npt

    from edge.bundle import CalibrationScores, Crop, Pooling
    from edge.frames import Frame, Prediction
    from edge.judgement.min_area import MinArea
    from edge.judgement.region_of_interest import RegionOfInterest

NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class _Levels:
    """What the calibration scores say under one region of interest and smallest area."""

    scores: npt.NDArray[np.float32]
    threshold: Threshold
    enter_level: float
    leave_level: float


@dataclass(frozen=True, slots=True)
class _View:
    """What holds for one frame size."""

    frame_shape: tuple[int, int]
    map_shape: tuple[int, ...]
    box: Box
    mask: npt.NDArray[np.bool_] | None
    min_cells: int
    notes: tuple[str, ...]
    levels: _Levels


class Judge:
    """Judges the predictions of one camera.

    The threshold is fitted on the bundle's calibration scores. Under a region of interest or a smallest area the
    calibration maps are pooled again under the same, which depends on the size of the frames: it then happens with the
    first frame and again when the size changes.

    Attributes:
        bundle_id: of the bundle in use.
        memory_version: of the memory that its thresholds hold for.
        product: that its thresholds hold for; empty in a bundle of one.
        product_file: digest of the file that the product is of; empty of one of the bundle's own.
        run_time: the threshold given at run time, whether it holds here or not.
        notice: why a threshold from outside is not used; empty where it is, or where there is none.
        threshold_version: of its threshold, as verdicts name it; whoever puts the judge in force counts.
    """

    def __init__(
        self,
        *,
        calibration: CalibrationScores,
        pooling: Pooling,
        crop: Crop | None,
        alpha: float,
        leave_quantile: float = 0.95,
        enter_quantile: float | None = None,
        region_of_interest: RegionOfInterest | None = None,
        mask: npt.NDArray[np.bool_] | None = None,
        min_area: MinArea | None = None,
        external: ExternalThreshold | None = None,
        run_time: RunTimeThreshold | None = None,
        bundle_id: str = "",
        memory_version: int = 0,
        product: str = "",
        product_file: str = "",
        remark: str = "",
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
            enter_quantile: quantile of the good scores from which a frame is a hit; None for the threshold.
            region_of_interest: in pixels of the camera frame.
            mask: the region's mask, bool [H, W] of any scale, as :func:`~edge.judgement.mask_image.read_mask` reads it.
            min_area: smallest connected area that makes a frame NOK; without one any cell does.
            external: a threshold of the settings; ignored, with a notice, when it names another bundle or memory.
            run_time: a threshold given at run time, which wins over it; ignored likewise.
            bundle_id: of the bundle in use.
            memory_version: of the memory whose predictions are judged, 0 for the one packed in the bundle.
            product: whose good scores these are; empty in a bundle of one.
            product_file: digest of the file that the product is of; empty of one of the bundle's own.
            remark: what an operator should know of these scores.
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
        self._enter_quantile = enter_quantile
        self._scope = Scope.of(region_of_interest, mask, min_area)
        self._max_regions = max_regions
        self._clock_ns = clock_ns
        self._external = external
        self.bundle_id = bundle_id
        self.memory_version = memory_version
        self.product = product
        self.product_file = product_file
        self._remark = remark
        self.run_time = run_time
        self.threshold_version = 0
        self._chosen = choose_threshold(
            run_time=run_time,
            external=external,
            bundle_id=bundle_id,
            memory_version=memory_version,
            scope=self._scope.digest,
            product=product,
            product_file=product_file,
        )
        self.notice = self._chosen.notice
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
    def enter_level(self) -> float:
        """The raw score from which a frame is a hit that may begin an event; at least the threshold."""
        return self._levels.enter_level

    @property
    def scope(self) -> str:
        """Names the region of interest, mask and smallest area: under others a score is another one. 16 hex digits."""
        return self._scope.digest

    @property
    def threshold_source(self) -> str:
        """Who set the threshold in force: ``run time``, ``settings`` or ``budget``."""
        return self._chosen.source

    @property
    def warnings(self) -> tuple[str, ...]:
        """What an operator should know of the thresholds, the mask and the smallest area."""
        told = (self._remark, self.notice, *(() if self._view is None else self._view.notes))
        return tuple(text for text in told if text)

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
        judge = self._like(calibration, memory_version, self.run_time)
        seen = self._view
        if seen is not None:
            judge._take(judge._look(seen.frame_shape, seen.map_shape))  # noqa: SLF001 (of the same class)
        return judge

    def with_threshold(self, run_time: RunTimeThreshold | None) -> Judge:
        """Make the judge of the same camera and memory with another threshold given at run time, or with none."""
        judge = self._like(self._calibration, self.memory_version, run_time)
        seen = self._view
        if seen is not None:
            # The good scores stay: no map is pooled again.
            judge._take(replace(seen, levels=judge._fit(seen.levels.scores)))  # noqa: SLF001 (of the same class)
        return judge

    def _like(self, calibration: CalibrationScores, memory_version: int, run_time: RunTimeThreshold | None) -> Judge:
        return Judge(
            calibration=calibration,
            pooling=self._pooling,
            crop=self._crop,
            alpha=self._alpha,
            leave_quantile=self._leave_quantile,
            enter_quantile=self._enter_quantile,
            region_of_interest=self._scope.region,
            mask=self._scope.drawn,
            min_area=self._scope.min_area,
            external=self._external,
            run_time=run_time,
            bundle_id=self.bundle_id,
            memory_version=memory_version,
            product=self.product,
            product_file=self.product_file,
            remark=self._remark,
            max_regions=self._max_regions,
            clock_ns=self._clock_ns,
        )

    def judge(self, prediction: Prediction) -> Verdict:
        """Judge one prediction.

        Returns:
            OK, NOK, or NOT_JUDGED when the map holds NaN or infinity inside the region of interest.

        Raises:
            SettingsError: the region of interest leaves nothing of the map, its mask is not of the frame's shape, or
                the smallest area is larger than what it leaves.
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
        score = pool_score(anomaly_map, self._pooling, view.mask, view.min_cells)
        if not math.isfinite(score):
            return self.not_judged(frame, "the detector returned a score that is not finite")
        threshold = view.levels.threshold.value
        nok = score >= threshold
        regions = (
            find_regions(
                np.nan_to_num(anomaly_map),
                threshold,
                view.box,
                mask=view.mask,
                limit=self._max_regions,
                min_cells=view.min_cells,
            )
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
            moments_version=prediction.moments_version,
            threshold_version=self.threshold_version,
            subclass=prediction.subclass,
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
            threshold_version=self.threshold_version,
        )

    def _viewed(self, frame: Frame, map_shape: tuple[int, ...]) -> _View:
        frame_shape = (frame.image.shape[0], frame.image.shape[1])
        if self._view is None or (frame_shape, map_shape) != (self._view.frame_shape, self._view.map_shape):
            return self._take(self._look(frame_shape, map_shape))
        return self._view

    def _take(self, view: _View) -> _View:
        self._view, self._levels = view, view.levels
        return view

    def _look(self, frame_shape: tuple[int, int], map_shape: tuple[int, ...]) -> _View:
        cells = self._scope.look(self._crop, self._pooling, frame_shape, (map_shape[0], map_shape[1]))
        mask, min_cells = cells.mask, cells.min_cells
        whole = mask is None and min_cells == 1
        levels = self._whole if whole else self._fit(self._pooled_again(mask, min_cells, map_shape))
        return _View(
            frame_shape=frame_shape,
            map_shape=map_shape,
            box=cells.box,
            mask=mask,
            min_cells=min_cells,
            notes=cells.notes,
            levels=levels,
        )

    def _pooled_again(
        self, mask: npt.NDArray[np.bool_] | None, min_cells: int, map_shape: tuple[int, ...]
    ) -> npt.NDArray[np.float32]:
        maps = self._calibration.maps
        if maps.shape[1:] != map_shape:
            raise BundleError(
                f"calibration maps are {maps.shape[1:]}, the detector's {map_shape}: the bundle cannot be calibrated "
                "for a region of interest or a smallest area; export it again"
            )
        scores = [pool_score(one.astype(np.float32), self._pooling, mask, min_cells) for one in maps]
        return np.asarray(scores, dtype=np.float32)

    def _fit(self, scores: npt.NDArray[np.float32]) -> _Levels:
        groups = self._calibration.groups
        if self._chosen.value is None:
            threshold = fit_threshold(scores, groups, self._alpha)
        else:
            n_groups = int(np.unique(groups).size)
            threshold = Threshold(
                value=self._chosen.value,
                alpha=self._alpha,
                n=int(scores.size),
                n_groups=n_groups,
                budget_supported=False,
                smallest_supported_alpha=1 / (n_groups + 1),
                method="external",
            )
        calm = leave_level(scores, groups, self._leave_quantile, threshold.value)
        hit = enter_level(scores, groups, self._enter_quantile, threshold.value)
        return _Levels(scores=scores, threshold=threshold, enter_level=hit, leave_level=calm)
