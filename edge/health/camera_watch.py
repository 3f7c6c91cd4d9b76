"""CameraWatch and CameraWatches: camera health beside the judging, with its notices, status and kept baselines.

What a fault is, is :mod:`edge.health.camera_health`'s; this is threads, files and messages.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import random
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from edge.alerts.message import NoticeKind, Severity
from edge.errors import DataError
from edge.frames import Decision
from edge.health.baseline import read_baseline, write_baseline
from edge.health.camera_health import CameraHealth
from edge.health.camera_measures import take_sample
from edge.health.settings import CameraFault
from edge.settings import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from edge.frames import Frame, JudgedFrame
    from edge.health.baseline import Baseline
    from edge.health.camera_health import Change
    from edge.health.camera_measures import Sample
    from edge.settings import CameraSettings

_LOG = logging.getLogger(__name__)
HEALTH_FOLDER = "health"
NS_PER_S = 1_000_000_000
# The frame rate is looked at this often, over this long.
TICK_S = 1.0
RATE_WINDOW_S = 5.0
_STREAMING = "streaming"
_NOTICE = {
    CameraFault.FROZEN: NoticeKind.CAMERA_FROZEN,
    CameraFault.DARK: NoticeKind.CAMERA_DARK,
    CameraFault.OVEREXPOSED: NoticeKind.CAMERA_OVEREXPOSED,
    CameraFault.BLURRED: NoticeKind.CAMERA_BLURRED,
    CameraFault.MOVED: NoticeKind.CAMERA_MOVED,
    CameraFault.SLOW: NoticeKind.CAMERA_SLOW,
}


class WatchedCamera(Protocol):
    """A camera whose frame rate is looked at."""

    name: str

    def status(self) -> dict[str, Any]:
        """``state`` and ``counters`` with ``captured``."""


class CameraWatch:
    """Watches one camera. Frames are made small in the camera's thread and looked at in another one.

    A triggered camera with ``not_judged_when`` is the exception: each part's frame is looked at before its verdict, so
    that the part that shows a fault is the first that is not judged.

    Args:
        camera: its settings, with health.
        baseline: kept from an earlier run.
        hand_over: takes a sample to be looked at; False where it cannot now.
        tell: takes changes that were found in the camera's own thread.
        seed: of the irregular moments.
    """

    def __init__(
        self,
        camera: CameraSettings,
        *,
        baseline: Baseline | None,
        hand_over: Callable[[CameraWatch, Sample, int, bool], bool],
        tell: Callable[[CameraWatch, list[Change]], None],
        seed: int | None = None,
    ) -> None:
        assert camera.health is not None
        self.name = camera.name
        self._settings = camera.health
        self._triggered = camera.mode is Mode.TRIGGERED
        self._asked = None if self._triggered else _asked_rate(camera)
        self._hand_over, self._tell = hand_over, tell
        self._health = CameraHealth(camera.health, baseline)
        self._lock = threading.Lock()
        # Regular looks at a moving pattern may see it stand still, as a stroboscope does.
        self._random = random.Random(seed)  # noqa: S311 (no secret)
        self._due_ns = 0
        self._skipped = 0
        self._failed = 0
        self._rate: tuple[float, int] | None = None
        self.pending = False

    @property
    def _inline(self) -> bool:
        return self._triggered and bool(self._settings.not_judged_when)

    def observe(self, judged: JudgedFrame) -> None:
        """Take a frame now and then; in the camera's thread, returns at once and never raises."""
        frame = judged.frame
        if self._inline or frame.image.size == 0 or frame.captured_ns < self._due_ns:
            return
        period = NS_PER_S / self._settings.looks_per_second
        self._due_ns = frame.captured_ns + round(period * self._random.uniform(0.5, 1.5))
        try:
            self._skipped += not self._hand_over(self, take_sample(frame.image), frame.captured_ns, _good(judged))
        except Exception:  # noqa: BLE001 (an observer must not stop the judging)
            self._failed += 1

    def veto(self, frame: Frame, decision: Decision) -> str:
        """Return why a frame must not be judged; empty where it may. In the camera's thread; never raises."""
        wanted = self._settings.not_judged_when
        if not wanted:
            return ""
        if self._inline and frame.image.size:
            try:
                good = decision is Decision.OK
                self._tell(self, self.look(take_sample(frame.image), frame.captured_ns, good=good))
            except Exception:  # noqa: BLE001 (what cannot be looked at must not pass for well)
                self._failed += 1
                return "camera health: the frame could not be looked at"
        lasting = [fault.value for fault in self._health.faults if fault in wanted]
        return f"camera {', '.join(lasting)}" if lasting else ""

    def look(self, sample: Sample, captured_ns: int, *, good: bool) -> list[Change]:
        """Look at a sample."""
        with self._lock:
            return self._health.take(sample, captured_ns, good=good)

    def look_at_rate(self, state: str, captured: int, seconds: float) -> list[Change]:
        """Look at the frame rate, from the capture's state and its count of frames."""
        now = time.monotonic()
        if state != _STREAMING or self._rate is None or captured < self._rate[1]:
            self._rate = (now, captured)
            return []
        since, before = self._rate
        if now - since < RATE_WINDOW_S:
            return []
        self._rate = (now, captured)
        with self._lock:
            return self._health.rate((captured - before) / (now - since), self._asked, max(seconds, now - since))

    def changed_baseline(self) -> Baseline | None:
        """Return a baseline that is to be kept, once."""
        with self._lock:
            if not self._health.baseline_changed:
                return None
            self._health.baseline_changed = False
            return self._health.baseline

    def status(self) -> dict[str, Any]:
        """What the camera's status says of its health."""
        with self._lock:
            return self._health.status() | {"skipped": self._skipped, "failed": self._failed}

    def warnings(self) -> list[str]:
        """Say which faults last."""
        return [f"camera {fault.value}" for fault in self._health.faults]


class CameraWatches:
    """The watches of a box and the thread that looks: a part of the box.

    Args:
        folder: of the kept baselines.
        cameras: the workers at the moment, for their frame rates.
        notify: raises a notice.
    """

    name = "camera_health"

    def __init__(self, folder: Path, *, cameras: Iterable[WatchedCamera], notify: Callable[..., None]) -> None:
        self._folder, self._cameras, self._notify = folder, cameras, notify
        self._watches: dict[str, CameraWatch] = {}
        self._samples: queue.SimpleQueue[tuple[CameraWatch, Sample, int, bool] | None] = queue.SimpleQueue()
        self._changes: queue.SimpleQueue[tuple[CameraWatch, list[Change]]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._trouble = ""
        self._failed = 0

    def watch(self, camera: CameraSettings) -> CameraWatch | None:
        """Make the watch of a camera in place of the one before; None where its settings want none."""
        self._watches.pop(camera.name, None)
        if camera.health is None:
            return None
        baseline = None
        try:
            baseline = read_baseline(self._path(camera.name))
        except (DataError, OSError) as error:
            text = f"camera {camera.name}: {error}"
            self._notify(NoticeKind.CAMERA_BASELINE, Severity.WARNING, text, camera=camera.name)
        watch = CameraWatch(camera, baseline=baseline, hand_over=self._take, tell=self._keep_changes)
        self._watches[camera.name] = watch
        return watch

    def start(self) -> None:
        """Begin to look."""
        self._thread = threading.Thread(target=self._run, name="camera-health", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Begin to end."""
        self._stopping.set()
        self._samples.put(None)

    def stop(self, timeout: float) -> bool:
        """End within ``timeout`` seconds."""
        self.request_stop()
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def status(self) -> dict[str, Any]:
        """Return how many looks failed; each camera's status has its own health."""
        return {"failed": self._failed} if self._failed else {}

    def warnings(self) -> list[str]:
        """Say that baselines cannot be kept."""
        return [self._trouble] if self._trouble else []

    def _path(self, camera: str) -> Path:
        return self._folder / f"{quote(camera, safe='')}.npz"

    def _take(self, watch: CameraWatch, sample: Sample, captured_ns: int, good: bool) -> bool:  # noqa: FBT001
        # One sample per camera: a thread that is behind looks at fewer, and none pile up.
        if watch.pending:
            return False
        watch.pending = True
        self._samples.put((watch, sample, captured_ns, good))
        return True

    def _keep_changes(self, watch: CameraWatch, changes: list[Change]) -> None:
        if changes:
            self._changes.put((watch, changes))

    def _run(self) -> None:
        ticked = time.monotonic()
        while not self._stopping.is_set():
            self._guarded(self._take_samples)
            self._guarded(self._tell_changes)
            now = time.monotonic()
            if now - ticked >= TICK_S:
                seconds, ticked = now - ticked, now
                self._guarded(functools.partial(self._tick, seconds))

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Exception:  # noqa: BLE001 (the thread's rim: the next look may succeed)
            self._failed += 1
            _LOG.exception("camera health: a look failed")

    def _take_samples(self) -> None:
        with contextlib.suppress(queue.Empty):
            given = self._samples.get(timeout=TICK_S)
            if given is not None:
                watch, sample, captured_ns, good = given
                watch.pending = False
                self._tell(watch, watch.look(sample, captured_ns, good=good))

    def _tell_changes(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._tell(*self._changes.get_nowait())

    def _tick(self, seconds: float) -> None:
        for camera in self._cameras:
            watch = self._watches.get(camera.name)
            if watch is None:
                continue
            status = camera.status()
            captured = status["counters"].get("captured", 0)
            self._tell(watch, watch.look_at_rate(str(status["state"]), captured, seconds))
            baseline = watch.changed_baseline()
            if baseline is not None:
                self._keep(camera.name, baseline)

    def _keep(self, camera: str, baseline: Baseline) -> None:
        try:
            write_baseline(self._path(camera), baseline)
        except OSError as error:
            self._trouble = f"camera {camera}: its baseline cannot be kept ({error.strerror}); it is learnt anew later"
            _LOG.warning("%s", self._trouble)
        else:
            self._trouble = ""
            _LOG.info("camera %s: its baseline is kept", camera)

    def _tell(self, watch: CameraWatch, changes: list[Change]) -> None:
        for change in changes:
            severity = Severity.WARNING if change.lasting else Severity.INFO
            said = "" if change.lasting else "no longer "
            text = f"camera {watch.name}: {said}{change.fault.value}: {change.text}"
            detail = {"camera": watch.name, "lasting": change.lasting, **change.figures}
            self._notify(_NOTICE[change.fault], severity, text, **detail)


def _good(judged: JudgedFrame) -> bool:
    return judged.verdict.decision is Decision.OK and not judged.alarmed


def _asked_rate(camera: CameraSettings) -> float | None:
    assert camera.health is not None
    return camera.health.frame_rate or camera.source.fps or camera.frame_rate
