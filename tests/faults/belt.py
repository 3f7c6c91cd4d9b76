"""A belt of numbered parts before cameras that show the part that is there, so that a wrong OK can be told.

Cameras, workers and stations are the box's own; only the sources and the detector are made up.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

import edge.camera
from edge.camera import CameraWorker
from edge.capture.capture import Capture
from edge.capture.sources import Grab
from edge.frames import Decision, Frame, Prediction
from edge.health.metrics import Metrics
from edge.health.watchdog import Watchdog
from tests.edge.inspection_values import box_settings, inspect
from tests.edge.test_camera import judge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

    from edge.frames import Verdict
    from edge.inspection.inspection import Inspection

SOON = 60.0
CAMERAS = ("a", "b")


class Belt:
    """What is in front of the cameras: part ``present``, or none (-1). Every fifth part is defective."""

    def __init__(self) -> None:
        self.present = -1
        self.pulses: dict[str, queue.Queue[int]] = defaultdict(queue.Queue)
        self.stop = threading.Event()
        self._exposing = {name: threading.Lock() for name in CAMERAS}

    def bring(self, part: int, announce: Callable[[], object]) -> None:
        """Put a part in front of the cameras and announce it, at one moment: between two exposures of each."""
        with contextlib.ExitStack() as stack:
            for lock in self._exposing.values():
                stack.enter_context(lock)
            self.present = part
            announce()

    def expose(self, camera: str) -> threading.Lock:
        """Held from a picture until its time was taken, so that a picture's time is that of what it shows."""
        return self._exposing[camera]

    @staticmethod
    def defective(part: int) -> bool:
        return part % 5 == 4

    def picture(self, part: int) -> Grab:
        """An image that tells its part to the test, and a defect to the detector."""
        image = np.zeros((8, 8, 3), np.uint8)
        image[0, 0] = (255 if part >= 0 and self.defective(part) else 0, (part + 1) & 255, (part + 1) >> 8)
        return Grab(image, "")


class FreeCamera:
    """Runs at its own rate and shows whatever is there."""

    def __init__(self, belt: Belt, name: str, interval_s: float) -> None:
        self._belt, self._interval_s = belt, interval_s
        self._lock = belt.expose(name)
        self._held = False

    def open(self) -> None: ...

    def read(self) -> Grab | None:
        # The time of the picture before was taken by now.
        self.close()
        if self._belt.stop.wait(self._interval_s):
            return None
        self._held = self._lock.acquire()
        return self._belt.picture(self._belt.present)

    def close(self) -> None:
        if self._held:
            self._held = False
            self._lock.release()


class LineCamera:
    """Shows one part per pulse of a line that it shares with other cameras."""

    def __init__(self, belt: Belt, name: str) -> None:
        self._belt, self.name = belt, name

    def open(self) -> None: ...

    def read(self) -> Grab | None:
        while not self._belt.stop.is_set():
            with contextlib.suppress(queue.Empty):
                return self._belt.picture(self._belt.pulses[self.name].get(timeout=0.05))
        return None

    def close(self) -> None: ...


class Shown:
    """A detector that takes its time, and remembers which part was seen for which."""

    def __init__(self, think_s: float) -> None:
        self._think_s = think_s
        self.seen: dict[str | None, list[int]] = defaultdict(list)
        self.bundle: Any = SimpleNamespace(manifest=SimpleNamespace(signal=None))

    def predict(self, frame: Frame) -> Prediction:
        defect, low, high = (int(value) for value in frame.image[0, 0])
        self.seen[frame.part_id].append(low + 256 * high - 1)
        time.sleep(self._think_s)  # the time that an engine takes is what overloads the box
        return Prediction(np.full((4, 4), float(defect), np.float32), frame, 1, 1)


class Verdicts:
    """Stands for the reporter."""

    def __init__(self) -> None:
        self.found: list[Verdict] = []
        self.more = threading.Condition()

    def verdict(self, verdict: Verdict, **_: Any) -> None:
        with self.more:
            self.found.append(verdict)
            self.more.notify_all()

    def state(self, *_: Any, **__: Any) -> None: ...

    def judged_by(self, *_: Any) -> None: ...

    def wait_for(self, count: int) -> None:
        with self.more:
            assert self.more.wait_for(lambda: len(self.found) >= count, SOON)


class Line:
    """A station with its cameras, at work."""

    def __init__(self, belt: Belt, detector: Shown, verdicts: Verdicts, inspection: Inspection) -> None:
        self.belt, self.detector, self.verdicts, self.inspection = belt, detector, verdicts, inspection
        self.station = inspection.stations()[0]

    def wrong_oks(self) -> list[str | None]:
        """Parts that were called OK though a view showed a defect, another part, or nothing."""
        wrong = []
        for verdict in self.verdicts.found:
            shown = self.detector.seen[verdict.part_id]
            if verdict.decision is Decision.OK and (
                len(set(shown)) != 1 or shown[0] < 0 or self.belt.defective(shown[0]) or not self._is(verdict, shown[0])
            ):
                wrong.append(verdict.part_id)
        return wrong

    def _is(self, verdict: Verdict, part: int) -> bool:
        """Where the trigger names the part, it must be the one that was seen."""
        return self.station.plan.trigger.value == "frame" or verdict.part_id == str(part)


@contextmanager
def line(
    monkeypatch: pytest.MonkeyPatch, camera: Callable[[Belt, str], Any], *, think_s: float, **station: Any
) -> Iterator[Line]:
    """Two cameras and their station, begun.

    Args:
        monkeypatch: puts the made up sources in place of drivers.
        camera: makes a source.
        think_s: of the detector, per frame.
        station: settings of the station.
    """
    belt, detector, verdicts, metrics = Belt(), Shown(think_s), Verdicts(), Metrics()

    def capture(**options: Any) -> Capture:
        return Capture(**{**options, "make_source": lambda: camera(belt, options["name"])})

    monkeypatch.setattr(edge.camera, "Capture", capture)
    cameras = [{"name": name, "mode": "triggered", "source": {"kind": "camera", "device": 0}} for name in CAMERAS]
    modbus = {"modbus": {"port": 0}} if station.get("trigger") == "modbus" else {}
    settings = box_settings(cameras, stations=[{"name": "station", "cameras": list(CAMERAS), **station}], **modbus)
    inspection = inspect(settings, reporter=verdicts, metrics=metrics)
    stop = threading.Event()
    workers = [
        CameraWorker(
            settings=one, detector=detector, judge=judge(0.05), reporter=verdicts, metrics=metrics,
            watchdog=Watchdog(limit_s=SOON), stop=stop, station=inspection.station_of(one.name),
        )  # type: ignore[arg-type]  # the test's own
        for one in settings.cameras
    ]  # fmt: skip
    for worker in workers:
        worker.start()
    try:
        yield Line(belt, detector, verdicts, inspection)
    finally:
        stop.set()
        belt.stop.set()
        ended = [worker.join(SOON) for worker in workers]
        assert inspection.stop(SOON)
        assert all(ended)
