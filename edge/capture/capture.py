"""Capture: a source, read in a thread of its own; a bounded queue, an explicit drop policy and a named state.

It must not know what frames are judged for. Frames that never reach the consumer are counted and reported.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, final

import numpy as np

from edge.capture.building import build_source
from edge.capture.frame_queue import FrameQueue
from edge.capture.reader import Reader, Wait
from edge.capture.sources import CorruptFrameError, Grab, Source
from edge.capture.states import FINAL, NOT_WELL, CameraState, Counters, LostFrame, added
from edge.errors import CaptureError
from edge.frames import Frame

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from edge.capture.settings import DropPolicy, SourceSettings

__all__ = ["MAX_HUNG", "CameraState", "Capture", "Counters", "LostFrame"]

_LOG = logging.getLogger(__name__)
MAX_HUNG = 3
"""Threads of one capture that may hang in a driver; then no further one is started until one of them returns."""
_NO_IMAGE = np.empty((0, 0, 3), np.uint8)


@final
class Capture:
    """Reads one source in a thread of its own and hands frames over.

    ``camera_seq`` counts every frame of the source, dropped and corrupt ones included, so a gap is visible
    downstream. A camera that is away is tried again for ever, with waits that double up to the settings' limit. A
    driver that does not return for ``abandon_seconds`` is left behind in its thread and the camera opened by a new
    one; this is noticed when :meth:`get` or :attr:`state` is called.

    Args:
        name: of the camera, as in the box's settings.
        settings: which source.
        policy: what happens when the queue is full; the settings' where None.
        capacity: frames in the queue; the settings' where None.
        make_source: makes the source, and another one when it has to be abandoned; the settings' own where None.
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
        make_source: Callable[[], Source] | None = None,
        on_lost: Callable[[LostFrame], None] | None = None,
        wanted: Callable[[Frame], bool] | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        wait: Wait = threading.Event.wait,
    ) -> None:
        self.name = name
        self._settings = settings
        self._make_source = make_source or (lambda: build_source(settings))
        self._on_lost = on_lost
        self._wanted = wanted
        self._clock = clock
        self._wait = wait
        self._changed = threading.Condition()
        self._queue = FrameQueue(
            policy=settings.drop_policy if policy is None else policy,
            capacity=settings.capacity if capacity is None else capacity,
            changed=self._changed,
        )
        self._state = CameraState.STARTING
        self._error: str | None = None
        self._counts = dict.fromkeys(("corrupt", "reconnects", "resized", "abandoned", "skipped"), 0)
        self._seq = 0
        self._size: tuple[int, ...] | None = None
        self._connected_before = False
        self._corrupt_run = False
        self._reader: Reader | None = None
        self._hung: list[Reader] = []
        self._source_counts: dict[str, int] = {}

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
        """What the source is doing now; STALLED when a frame has been due for ``stall_seconds``."""
        with self._changed:
            self._look()
            return self._state

    @property
    def error(self) -> str | None:
        """Why the source is not streaming, without credentials; None when all is well."""
        with self._changed:
            return self._error

    @property
    def counters(self) -> Counters:
        """A snapshot of the counts."""
        with self._changed:
            queue = self._queue
            captured = queue.captured + self._counts["skipped"]
            return Counters(captured=captured, delivered=queue.delivered, dropped=queue.dropped, **self._counts)

    @property
    def queued(self) -> int:
        """Frames that wait to be taken."""
        with self._changed:
            return len(self._queue)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What an operator should know of an open source, such as that it does not give the size asked for."""
        reader = self._reader
        return () if reader is None else reader.remarks

    @property
    def source_counts(self) -> dict[str, int]:
        """What the source accounts for beside frames, such as samples, sources that were abandoned included."""
        reader = self._reader
        return added(self._source_counts, {} if reader is None else reader.counts)

    @property
    def finished(self) -> bool:
        """Whether no frame will come any more: the source ended or failed, or was stopped, and the queue is empty."""
        with self._changed:
            return self._state in FINAL and not len(self._queue)

    def start(self) -> None:
        """Open a file or folder at once, a camera in the background, and begin to read.

        Raises:
            CaptureError: the file or folder cannot be opened. A camera that is away is no error: it is tried again.
        """
        if self._reader is not None:
            raise CaptureError(f"{self.name}: already started; make a new Capture to read the source again")
        reader = self._reader = self._new_reader()
        if not self._settings.live:
            try:
                reader.open()
            except CaptureError as error:
                self.entered(reader, CameraState.FAILED, str(error))
                raise
        reader.start()

    def get(self, timeout: float | None = None) -> Frame | None:
        """Return the next frame.

        Args:
            timeout: seconds to wait for one; None waits until there is one or the source is finished.

        Returns:
            The frame; None when the time is up or when ``finished`` is True.
        """
        with self._changed:
            self._look()
            # Waking once per stall time lets a blocked consumer notice a stall too.
            deadline = None if timeout is None else time.monotonic() + timeout
            while not len(self._queue) and self._state not in FINAL:
                left = self._settings.stall_seconds
                if deadline is not None:
                    left = min(left, deadline - time.monotonic())
                    if left <= 0:
                        return None
                self._changed.wait(left)
                self._look()
            return self._queue.take()

    def fire(self) -> None:
        """Ask for one frame (GenICam SFNC TriggerSoftware; a file gives its next one). May be called from any thread.

        Raises:
            CaptureError: the source has no software trigger, is not connected or refuses.
        """
        with self._changed:
            reader, state = self._reader, self._state
        if reader is None or state in FINAL:
            raise CaptureError(f"{self.name}: cannot be triggered, it is {state.value}")
        # Outside the lock: the camera's answer takes a while, and frames must not wait for it.
        reader.fire()

    def stop(self, timeout: float = 10.0) -> None:
        """Stop reading; frames still in the queue are counted as dropped. May be called twice.

        Args:
            timeout: seconds to wait for the thread; one that hangs in a camera driver is left behind, with a warning.
        """
        with self._changed:
            reader = self._reader
            if reader is not None:
                reader.stop.set()
            self._changed.notify_all()
        if reader is not None and not reader.join(timeout):
            _LOG.warning("camera %s: its driver does not return; left behind", self.name)
        with self._changed:
            left = self._queue.clear()
            if self._state not in FINAL:
                self._enter(CameraState.ENDED, None)
        for frame in left:
            self._report_lost(frame, "dropped")

    def took(self, reader: Reader, grab: Grab) -> None:
        """Hear of a frame, from the reader's thread."""
        with self._changed:
            if not self._listens_to(reader):
                return
            self._corrupt_run = False
            self._enter(CameraState.STREAMING, None)
            self._notice_size(grab.image.shape)
            frame = self._frame(grab)
        # Outside the lock: whoever is asked may fire a camera, and that asks for the state.
        wanted = self._wanted is None or self._wanted(frame)
        with self._changed:
            if not wanted:
                self._counts["skipped"] += 1
                return
            # A part may wait for this frame: one that is given up in between is lost, not forgotten.
            listens = self._listens_to(reader)
            lost = self._queue.put(frame, ends=reader.stop.is_set) if listens else self._queue.refuse(frame)
        if lost is not None:
            self._report_lost(lost, "dropped")

    def skipped(self, reader: Reader, error: CorruptFrameError) -> None:
        """Hear of an image that cannot be used, from the reader's thread."""
        with self._changed:
            if not self._listens_to(reader):
                return
            self._counts["corrupt"] += 1
            # Of a camera with a bad cable one line per run of them.
            told, self._corrupt_run = self._corrupt_run and self._settings.live, True
            lost = self._frame(Grab(image=_NO_IMAGE, name=error.name))
        if not told:
            _LOG.warning("camera %s: skipped: %s", self.name, error)
        self._report_lost(lost, "corrupt")

    def connected(self, reader: Reader) -> None:
        """Hear that the source gives frames, or is armed and waits for its trigger."""
        with self._changed:
            if not self._listens_to(reader):
                return
            self._counts["reconnects"] += self._connected_before
            self._connected_before = True
            self._enter(CameraState.STREAMING, None)

    def entered(self, reader: Reader, state: CameraState, reason: str | None) -> None:
        """Hear of another state, from the reader's thread."""
        with self._changed:
            if self._listens_to(reader):
                self._enter(state, reason)

    def _listens_to(self, reader: Reader) -> bool:
        """An abandoned reader, or one that was left behind by ``stop``, has no say any more."""
        return reader is self._reader and self._state not in FINAL

    def _new_reader(self) -> Reader:
        return Reader(
            name=self.name,
            source=self._make_source(),
            settings=self._settings,
            owner=self,
            clock=self._clock,
            wait=self._wait,
        )

    def _look(self) -> None:
        """Under the lock: a frame that is due makes STREAMING into STALLED; a driver that hangs is abandoned."""
        reader = self._reader
        if reader is None or self._state in FINAL or reader.stop.is_set():
            return
        silent = reader.silent_seconds()
        if self._state is CameraState.STREAMING and silent >= self._settings.stall_seconds:
            self._enter(CameraState.STALLED, f"no frame for {silent:.1f} s")
        hung = reader.hung_seconds()
        if self._settings.live and hung >= self._settings.abandon_seconds:
            self._abandon(reader, hung)

    def _abandon(self, reader: Reader, hung: float) -> None:
        self._hung = [one for one in self._hung if one.alive]
        if len(self._hung) >= MAX_HUNG:
            self._enter(
                CameraState.STALLED,
                f"{MAX_HUNG + 1} threads hang in its driver; switch the camera off and on, and restart the box",
            )
            return
        reader.stop.set()
        self._hung.append(reader)
        self._counts["abandoned"] += 1
        self._enter(CameraState.RECONNECTING, f"its driver has not returned for {hung:.1f} s and is left behind")
        self._source_counts = added(self._source_counts, reader.counts)
        self._reader = self._new_reader()
        self._reader.start()

    def _notice_size(self, shape: tuple[int, ...]) -> None:
        before, self._size = self._size, shape
        # Images of a folder may well differ.
        if before is not None and before != shape and self._settings.live:
            self._counts["resized"] += 1
            _LOG.warning(
                "camera %s: frames are %dx%d pixels now, they were %dx%d; regions and masks are those of the old size",
                self.name, shape[1], shape[0], before[1], before[0],
            )  # fmt: skip

    def _frame(self, grab: Grab) -> Frame:
        now = self._clock()
        captured = now if grab.captured_ns is None else grab.captured_ns
        frame = Frame(
            image=grab.image,
            camera=self.name,
            camera_seq=self._seq,
            captured_ns=captured,
            captured_at=datetime.now(timezone.utc) - timedelta(microseconds=(now - captured) // 1000),
            name=grab.name,
            refusal=grab.refusal,
        )
        self._seq += 1
        return frame

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

    def _enter(self, state: CameraState, reason: str | None) -> None:
        """Under the lock."""
        before, self._state, self._error = self._state, state, reason
        self._changed.notify_all()
        if before is not state:
            level = logging.WARNING if state in NOT_WELL else logging.INFO
            because = "" if reason is None else f": {reason}"
            _LOG.log(level, "camera %s: %s -> %s%s", self.name, before.value, state.value, because)
