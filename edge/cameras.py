"""Cameras: the workers of a box's cameras as one set, which may change while the others go on.

Knows how workers are started, stopped and put in each other's place; what one of them does is its own.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from edge.capture.states import CameraState
from edge.errors import CaptureError, SettingsError
from edge.judgement.mask_image import read_mask
from edge.judgement.verdicts import Judge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edge.bundle import Bundle, CalibrationScores
    from edge.camera import CameraWorker
    from edge.health.metrics import Metrics
    from edge.judgement.threshold import RunTimeThreshold
    from edge.settings import CameraSettings

_LOG = logging.getLogger(__name__)
# A worker that hangs in an engine or a driver is left behind after this long, and its successor begins.
REMOVE_S = 2.0


def suited(camera: CameraSettings, bundle: Bundle) -> CameraSettings:
    """Return a camera's settings under the bundle that judges it: a signal's windows come at the pace of its layout.

    Raises:
        SettingsError: the bundle does not judge what the source gives.
    """
    given, judged, signal = camera.source.modality, bundle.manifest.modality, bundle.manifest.signal
    if given is not judged:
        raise SettingsError(
            f"{camera.name}: kind {camera.source.kind.value} gives frames of modality {given.value}, its bundle "
            f"{bundle.path} judges {judged.value}; set `bundle` of this entry to one that does"
        )
    if signal is None or camera.frame_rate is not None:
        return camera
    return camera.model_copy(update={"frame_rate": signal.rate_hz / signal.hop})


def make_judge(
    camera: CameraSettings,
    bundle: Bundle,
    calibration: CalibrationScores,
    memory_version: int = 0,
    run_time: RunTimeThreshold | None = None,
    *,
    product: str = "",
    product_file: str = "",
    remark: str = "",
) -> Judge:
    """Make the judge of one camera and say its threshold in the log.

    Args:
        camera: its settings.
        bundle: that judges it.
        calibration: scores of good images, of the engine, precision and memory in use.
        memory_version: of the memory, 0 for the packed one.
        run_time: a threshold that was given to the running box.
        product: whose scores these are, of a bundle for several.
        product_file: digest of the file that the product is of; empty of one of the bundle's own.
        remark: what an operator should know of them.

    Raises:
        DataError: the calibration cannot give a threshold.
        SettingsError: the mask of its region of interest cannot be used, or the bundle judges another modality.
    """
    camera = suited(camera, bundle)
    manifest, drawn = bundle.manifest, camera.region_of_interest.mask
    judge = Judge(
        calibration=calibration,
        pooling=manifest.pooling,
        crop=manifest.preprocessing.crop,
        alpha=camera.alpha,
        leave_quantile=camera.events.leave_quantile,
        enter_quantile=camera.events.enter_quantile,
        region_of_interest=camera.region_of_interest,
        mask=None if drawn is None else read_mask(drawn),
        min_area=camera.min_area,
        external=camera.threshold,
        run_time=run_time,
        bundle_id=bundle.id,
        memory_version=memory_version,
        product=product,
        product_file=product_file,
        remark=remark,
    )
    threshold = judge.threshold
    _LOG.info(
        "camera %s: %sthreshold %.6g (%s, alpha %.2g, %d calibration scores in %d groups)",
        camera.name, f"{product}: " if product else "",
        threshold.value, threshold.method, threshold.alpha, threshold.n, threshold.n_groups,
    )  # fmt: skip
    return judge


class Cameras:
    """The cameras of a box in the order of its settings, disabled ones included. Safe to read from any thread.

    Args:
        metrics: counts ``captures_refused``.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lock = threading.Lock()
        self._order: tuple[CameraSettings, ...] = ()
        self._workers: dict[str, CameraWorker] = {}

    def __iter__(self) -> Iterator[CameraWorker]:
        return iter(self.workers)

    def __len__(self) -> int:
        return len(self.workers)

    @property
    def workers(self) -> tuple[CameraWorker, ...]:
        """Of the enabled cameras."""
        with self._lock:
            return tuple(self._workers[camera.name] for camera in self._order if camera.name in self._workers)

    @property
    def finished(self) -> bool:
        """Whether every source has ended; never so while there is a camera."""
        workers = self.workers
        return bool(workers) and all(worker.done for worker in workers)

    def __getitem__(self, name: str) -> CameraWorker:
        with self._lock:
            return self._workers[name]

    def change(
        self, order: Sequence[CameraSettings], *, ended: Sequence[str] = (), begun: Sequence[CameraWorker] = ()
    ) -> None:
        """End some cameras and take in others; those named by neither go on and notice nothing.

        Args:
            order: of all cameras of the box from now on.
            ended: names of those that end: frames in hand are finished, those in queues are reported as dropped.
            begun: workers to be started next, which number their frames on where they follow an ended one.
        """
        names = {camera.name for camera in order if camera.enabled}
        leaving = [worker for worker in self.workers if worker.name in ended]
        for worker in leaving:
            worker.end("changed" if worker.name in names else "removed")
        self.join(time.monotonic() + REMOVE_S, leaving)
        followers = {worker.name: worker for worker in begun}
        for worker in leaving:
            if worker.name in followers:
                followers[worker.name].continue_after(worker)
        with self._lock:
            known = self._workers | followers
            self._order = tuple(order)
            self._workers = {name: worker for name, worker in known.items() if name in names}

    def start(self, workers: Sequence[CameraWorker]) -> list[CaptureError]:
        """Start workers; one source that is not there does not blind the others.

        Returns:
            Why sources cannot be opened; their cameras' states say so too.
        """
        refused: list[CaptureError] = []
        for worker in workers:
            try:
                worker.start()
            except CaptureError as error:  # noqa: PERF203 (one per camera, once)
                _LOG.error("camera %s: %s", worker.name, error)
                self._metrics.count("captures_refused")
                refused.append(error)
        return refused

    def join(self, deadline: float, workers: Sequence[CameraWorker] | None = None) -> bool:
        """Wait for the end of workers until a monotonic time; returns whether all ended."""
        ended = True
        for worker in self.workers if workers is None else workers:
            if not worker.join(max(0.0, deadline - time.monotonic())):
                _LOG.warning("camera %s does not stop; left behind", worker.name)
                ended = False
        return ended

    def status(self) -> dict[str, dict[str, Any]]:
        """What the box's status says of each camera."""
        with self._lock:
            known = [(camera, self._workers.get(camera.name)) for camera in self._order]
        return {camera.name: _disabled(camera) if worker is None else worker.status() for camera, worker in known}

    def warnings(self) -> list[str]:
        """What an operator should know of the cameras."""
        return [text for worker in self.workers for text in worker.warnings()]


def _disabled(camera: CameraSettings) -> dict[str, Any]:
    return {
        "state": CameraState.DISABLED.value,
        "error": None,
        "mode": camera.mode.value,
        "source": camera.source.label,
        "counters": {},
        "threshold": None,
        "levels": None,
        "failure": None,
    }
