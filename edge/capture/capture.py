"""Capture: one thread per source, a bounded queue, an explicit drop policy and a named state.

It must not know what frames are judged for. Frames that never reach the consumer are counted and reported.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import Enum
from typing import TYPE_CHECKING, final

import numpy as np

from edge.capture.settings import DropPolicy, SourceSettings, redact
from edge.capture.sources import CorruptFrameError, Grab, Source, build_source
from edge.errors import CaptureError
from edge.frames import Frame

if TYPE_CHECKING:
    from types import TracebackType

_LOG = logging.getLogger(__name__)
_FIRST_WAIT_SECONDS = 0.5
_NS = 1_000_000_000
_NO_IMAGE = np.empty((0, 0, 3), np.uint8)

Wait = Callable[[threading.Event, float], bool]
"""Called with the stop event and seconds; returns True when the event was set."""


class CameraState(str, Enum):
    """What a source is doing."""

    STARTING = "starting"
    STREAMING = "streaming"
    STALLED = "stalled"
    RECONNECTING = "reconnecting"
    ENDED = "ended"
    FAILED = "failed"


_FINAL = frozenset({CameraState.ENDED, CameraState.FAILED})
_NOT_WELL = frozenset({CameraState.STALLED, CameraState.RECONNECTING, CameraState.FAILED})


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts since the start; captured = delivered + dropped + skipped + those still in the queue.

    Attributes:
        captured: frames read and decoded.
        delivered: frames handed to the consumer.
        dropped: frames lost to the drop policy, or left in the queue by ``stop``.
        corrupt: images that could not be decoded.
        reconnects: connections made after the first one was lost.
        skipped: frames that nobody wanted.
    """

    captured: int = 0
    delivered: int = 0
    dropped: int = 0
    corrupt: int = 0
    reconnects: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class LostFrame:
    """A frame that the consumer will never get.

    Attributes:
        camera: name of the camera.
        camera_seq: its number; the consumer sees a gap there.
        captured_ns: monotonic time of its capture.
        captured_at: the same moment in UTC.
        name: file name or position; may be empty.
        reason: ``dropped`` or ``corrupt``.
    """

    camera: str
    camera_seq: int
    captured_ns: int
    captured_at: datetime
    name: str
    reason: str


@final
class Capture:
    """Reads one source in a thread of its own and hands frames over.

    ``camera_seq`` counts every frame of the source, dropped and corrupt ones included, so a gap is visible
    downstream. A camera that is away is tried again for ever, with waits that double up to the settings' limit.

    Args:
        name: of the camera, as in the box's settings.
        settings: which source.
        policy: what happens when the queue is full; the settings' where None.
        capacity: frames in the queue; the settings' where None.
        source: used instead of the settings' own source.
        on_lost: called from the capture thread (or from ``stop``) for every frame that will not be delivered.
        wanted: asked in the capture thread, without a lock, for every frame as it comes, before any policy; one that
            is not wanted is counted as skipped and neither queued nor reported as lost. Must return at once.
        clock: monotonic nanoseconds.
        wait: waits on an event for some seconds.
    """

    def __init__(
        self,
        *,
        name: str,
        settings: SourceSettings,
        policy: DropPolicy | None = None,
        capacity: int | None = None,
        source: Source | None = None,
        on_lost: Callable[[LostFrame], None] | None = None,
        wanted: Callable[[Frame], bool] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        wait: Wait = threading.Event.wait,
    ) -> None:
        self.name = name
        self._settings = settings
        self._policy = settings.drop_policy if policy is None else policy
        self._capacity = settings.capacity if capacity is None else capacity
        self._source = build_source(settings) if source is None else source
        self._on_lost = on_lost
        self._wanted = wanted
        self._clock = clock
        self._wait = wait
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._queue: deque[Frame] = deque()
        self._state = CameraState.STARTING
        self._error: str | None = None
        self._reading_since: int | None = None
        self._counts = dict.fromkeys(("captured", "delivered", "dropped", "corrupt", "reconnects", "skipped"), 0)
        self._seq = 0
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Capture(name={self.name!r}, source={self._settings.label!r}, state={self._state.value})"

    def __enter__(self) -> Capture:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def state(self) -> CameraState:
        """What the source is doing now; STALLED when a read has been waiting for ``stall_seconds``."""
        with self._changed:
            self._notice_stall()
            return self._state

    @property
    def error(self) -> str | None:
        """Why the source is reconnecting or has failed, without credentials; None when all is well."""
        with self._changed:
            return self._error

    @property
    def counters(self) -> Counters:
        """A snapshot of the counts."""
        with self._changed:
            return Counters(**self._counts)

    @property
    def finished(self) -> bool:
        """Whether no frame will come any more: the source ended or failed, or was stopped, and the queue is empty."""
        with self._changed:
            return self._state in _FINAL and not self._queue

    def start(self) -> None:
        """Open a file or folder at once, a camera in the background, and begin to read.

        Raises:
            CaptureError: the file or folder cannot be opened. A camera that is away is no error: it is tried again.
        """
        if self._thread is not None:
            raise CaptureError(f"{self.name}: already started; make a new Capture to read the source again")
        if not self._settings.live:
            try:
                self._source.open()
            except CaptureError as error:
                self._enter(CameraState.FAILED, str(error))
                raise
        self._thread = threading.Thread(target=self._run, name=f"capture-{self.name}", daemon=True)
        self._thread.start()

    def get(self, timeout: float | None = None) -> Frame | None:
        """Return the next frame.

        Args:
            timeout: seconds to wait for one; None waits until there is one or the source is finished.

        Returns:
            The frame; None when the time is up or when ``finished`` is True.
        """
        with self._changed:
            self._notice_stall()
            # Waking once per stall time lets a blocked consumer notice a stall too.
            deadline = None if timeout is None else time.monotonic() + timeout
            while not self._queue and self._state not in _FINAL:
                left = self._settings.stall_seconds
                if deadline is not None:
                    left = min(left, deadline - time.monotonic())
                    if left <= 0:
                        return None
                self._changed.wait(left)
                self._notice_stall()
            if not self._queue:
                return None
            frame = self._queue.popleft()
            self._counts["delivered"] += 1
            self._changed.notify_all()
            return frame

    def stop(self, timeout: float = 10.0) -> None:
        """Stop reading; frames still in the queue are counted as dropped. May be called twice.

        Args:
            timeout: seconds to wait for the thread; one that hangs in a camera driver is left behind, with a warning.
        """
        with self._changed:
            self._stop.set()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                _LOG.warning("camera %s: its driver does not return; left behind", self.name)
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._counts["dropped"] += len(left)
        for frame in left:
            self._report_lost(frame, "dropped")
        if self._state not in _FINAL:
            self._enter(CameraState.ENDED, None)

    def _run(self) -> None:
        try:
            if not self._settings.live:
                self._stream()
                self._enter(CameraState.ENDED, None)
            else:
                self._keep_connected()
        except CaptureError as error:
            self._enter(CameraState.FAILED, redact(str(error)))
        except Exception as error:  # noqa: BLE001 the thread's rim: a driver may raise anything, and nobody else sees it
            # Not _LOG.exception: a driver's message may hold the URL with its password.
            _LOG.error("camera %s: capture failed: %s", self.name, redact(traceback.format_exc()))
            self._enter(CameraState.FAILED, redact(f"{type(error).__name__}: {error}"))
        finally:
            self._source.close()

    def _keep_connected(self) -> None:
        pause = _FIRST_WAIT_SECONDS
        connected_before = False
        while not self._stop.is_set():
            try:
                self._source.open()
                if connected_before:
                    self._count("reconnects")
                connected_before = True
                before = self._seq
                self._stream()
                reason = "the camera gives no more frames"
                if self._seq > before:
                    pause = _FIRST_WAIT_SECONDS
            except CaptureError as error:
                reason = redact(str(error))
            if self._stop.is_set():
                break
            self._source.close()
            self._enter(CameraState.RECONNECTING, reason)
            self._wait(self._stop, pause)
            pause = min(2 * pause, self._settings.reconnect_seconds)
        self._enter(CameraState.ENDED, None)

    def _stream(self) -> None:
        """Read until the source ends or ``stop`` is called."""
        interval = 0 if self._settings.fps is None or self._settings.live else round(_NS / self._settings.fps)
        due = self._clock()
        while not self._stop.is_set():
            try:
                grab = self._read()
            except CorruptFrameError as error:
                self._skip_corrupt(error)
                continue
            if grab is None:
                return
            if interval:
                # Late by more than a frame: the pace starts anew, frames are not sent in a burst.
                now = self._clock()
                due = max(due, now - interval)
                if due > now and self._wait(self._stop, (due - now) / _NS):
                    return
                due += interval
            self._offer(grab)

    def _read(self) -> Grab | None:
        with self._changed:
            self._reading_since = self._clock()
        try:
            return self._source.read()
        finally:
            with self._changed:
                self._reading_since = None

    def _skip_corrupt(self, error: CorruptFrameError) -> None:
        with self._changed:
            self._counts["corrupt"] += 1
            lost = self._frame(Grab(image=_NO_IMAGE, name=error.name))
        _LOG.warning("camera %s: skipped: %s", self.name, error)
        self._report_lost(lost, "corrupt")

    def _frame(self, grab: Grab) -> Frame:
        frame = Frame(
            image=grab.image,
            camera=self.name,
            camera_seq=self._seq,
            captured_ns=self._clock(),
            captured_at=datetime.now(timezone.utc),
            name=grab.name,
        )
        self._seq += 1
        return frame

    def _offer(self, grab: Grab) -> None:
        lost: Frame | None = None
        self._enter(CameraState.STREAMING, None)
        frame = self._frame(grab)
        wanted = self._wanted is None or self._wanted(frame)
        with self._changed:
            self._counts["captured"] += 1
            if not wanted:
                self._counts["skipped"] += 1
                return
            if self._policy is DropPolicy.WAIT:
                self._changed.wait_for(lambda: len(self._queue) < self._capacity or self._stop.is_set())
            if len(self._queue) < self._capacity:
                self._queue.append(frame)
            elif self._policy is DropPolicy.DROP_OLDEST:
                lost = self._queue.popleft()
                self._queue.append(frame)
            else:
                lost = frame
            if lost is not None:
                self._counts["dropped"] += 1
            self._changed.notify_all()
        if lost is not None:
            self._report_lost(lost, "dropped")

    def _report_lost(self, frame: Frame, reason: str) -> None:
        if self._on_lost is not None:
            self._on_lost(
                LostFrame(
                    camera=frame.camera,
                    camera_seq=frame.camera_seq,
                    captured_ns=frame.captured_ns,
                    captured_at=frame.captured_at,
                    name=frame.name,
                    reason=reason,
                )
            )

    def _count(self, counter: str) -> None:
        with self._changed:
            self._counts[counter] += 1

    def _notice_stall(self) -> None:
        """Under the lock: a read that blocks too long makes STREAMING into STALLED; the next frame undoes it."""
        since = self._reading_since
        if self._state is CameraState.STREAMING and since is not None:
            silent = (self._clock() - since) / _NS
            if silent >= self._settings.stall_seconds:
                self._enter(CameraState.STALLED, f"no frame for {silent:.1f} s")

    def _enter(self, state: CameraState, reason: str | None) -> None:
        with self._changed:
            before, self._state, self._error = self._state, state, reason
            self._changed.notify_all()
        if before is not state:
            level = logging.WARNING if state in _NOT_WELL else logging.INFO
            because = "" if reason is None else f": {reason}"
            _LOG.log(level, "camera %s: %s -> %s%s", self.name, before.value, state.value, because)
