"""Reader: one source in one thread, opened, paced, read and connected again with back-off.

It must not know the queue or the consumer; what it finds goes to its owner.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from edge.capture.settings import SourceSettings, TriggerMode, redact
from edge.capture.sources import (
    ALIVE,
    IDLE,
    CorruptFrameError,
    CountingSource,
    Grab,
    Idle,
    RemarkingSource,
    TriggeredSource,
)
from edge.capture.states import CameraState
from edge.errors import CaptureError, LinewardError

if TYPE_CHECKING:
    from edge.capture.sources import Source

_LOG = logging.getLogger(__name__)
FIRST_WAIT_SECONDS = 0.5
# How soon a file that waits for its trigger notices that it should stop.
_TRIGGER_POLL_S = 0.1
_NS = 1_000_000_000
_T = TypeVar("_T")

Wait = Callable[[threading.Event, float], bool]
"""Called with the stop event and seconds; returns True when the event was set."""


class Owner(Protocol):
    """Who hears of what a reader finds, in the reader's thread."""

    def took(self, reader: Reader, grab: Grab) -> None:
        """A frame was read."""

    def skipped(self, reader: Reader, error: CorruptFrameError) -> None:
        """A frame could not be used."""

    def connected(self, reader: Reader) -> None:
        """The source gives frames, or is armed."""

    def entered(self, reader: Reader, state: CameraState, reason: str | None) -> None:
        """The source's state is another one."""


class Reader:
    """Keeps one source open and reads it until told to stop. A camera that is away is tried again for ever.

    Args:
        name: of the camera.
        source: used by this reader alone.
        settings: of the source.
        owner: hears of frames and states.
        clock: monotonic nanoseconds.
        wait: waits on an event for some seconds.
    """

    def __init__(
        self,
        *,
        name: str,
        source: Source,
        settings: SourceSettings,
        owner: Owner,
        clock: Callable[[], int],
        wait: Wait,
    ) -> None:
        self._name = name
        self._source = source
        self._settings = settings
        self._owner = owner
        self._clock = clock
        self._wait = wait
        self._free = settings.trigger is TriggerMode.FREE
        self._fires = threading.Semaphore(0)
        self._frames = 0
        # Written by one thread, read by others: single assignments, no lock needed.
        self._calling_since: int | None = None
        self._waiting_since: int | None = None
        self._fired_since: int | None = None
        self._thread = threading.Thread(target=self._run, name=f"capture-{name}", daemon=True)
        self.stop = threading.Event()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the source has to say."""
        return self._source.remarks if isinstance(self._source, RemarkingSource) else ()

    @property
    def counts(self) -> dict[str, int]:
        """What the source accounts for; empty where it does not."""
        return self._source.counts if isinstance(self._source, CountingSource) else {}

    def open(self) -> None:
        """Open a file or folder, before :meth:`start`.

        Raises:
            CaptureError: it cannot be opened.
        """
        self._source.open()

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def join(self, timeout: float) -> bool:
        """Wait for the end of the thread; returns whether it ended."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def fire(self) -> None:
        """Ask for one frame.

        Raises:
            CaptureError: the source has no software trigger, is not connected or refuses.
        """
        if self._settings.trigger is not TriggerMode.SOFTWARE:
            raise CaptureError(f"{self._name}: has no software trigger; set the source's trigger to software")
        if not self._settings.live:
            self._fires.release()
            return
        if not isinstance(self._source, TriggeredSource):
            raise CaptureError(f"{self._name}: its source cannot be triggered")
        before = self._fired_since
        if before is None:
            # Before the command: its frame may come before the command has returned.
            self._fired_since = self._clock()
        try:
            self._source.fire()
        except CaptureError:
            self._fired_since = before
            raise

    def silent_seconds(self) -> float:
        """How long a frame has been due; with a trigger, since a trigger or since the driver was called."""
        since = [self._waiting_since] if self._free else [self._fired_since, self._calling_since]
        return max((self._clock() - one) / _NS if one is not None else 0.0 for one in since)

    def hung_seconds(self) -> float:
        """How long the driver has not returned from the present call; 0 between calls."""
        since = self._calling_since
        return 0.0 if since is None else (self._clock() - since) / _NS

    def _run(self) -> None:
        try:
            if self._settings.live:
                self._keep_connected()
            else:
                self._stream()
            self._owner.entered(self, CameraState.ENDED, None)
        except LinewardError as error:
            self._owner.entered(self, CameraState.FAILED, redact(str(error)))
        except Exception as error:  # noqa: BLE001 the thread's rim: a driver may raise anything, and nobody else sees it
            # Not _LOG.exception: a driver's message may hold the URL with its password.
            _LOG.error("camera %s: capture failed: %s", self._name, redact(traceback.format_exc()))
            self._owner.entered(self, CameraState.FAILED, redact(f"{type(error).__name__}: {error}"))
        finally:
            self._source.close()

    def _keep_connected(self) -> None:
        pause = FIRST_WAIT_SECONDS
        while not self.stop.is_set():
            before = self._frames
            try:
                self._called(self._source.open)
                if not self._free:
                    self._owner.connected(self)
                self._stream()
                reason = "the camera gives no more frames"
            except CaptureError as error:
                reason = redact(str(error))
            if self._frames > before:
                pause = FIRST_WAIT_SECONDS
            if self.stop.is_set():
                return
            # Said first: to let go of a GigE camera that is away takes seconds of retries.
            self._owner.entered(self, CameraState.RECONNECTING, reason)
            self._called(self._source.close)
            self._wait(self.stop, pause)
            pause = min(2 * pause, self._settings.reconnect_seconds)

    def _stream(self) -> None:
        """Read until the source ends or is stopped."""
        interval = 0 if self._settings.fps is None or self._settings.live else round(_NS / self._settings.fps)
        due = self._clock()
        first = True
        self._waiting_since = self._fired_since = None
        while not self.stop.is_set():
            if not self._triggered():
                continue
            try:
                grab = self._read()
            except CorruptFrameError as error:
                self._owner.skipped(self, error)
                continue
            if isinstance(grab, Idle):
                if grab is ALIVE:
                    self._owner.entered(self, CameraState.STREAMING, None)
                continue
            if grab is None:
                return
            if interval:
                # Late by more than a frame: the pace starts anew, frames are not sent in a burst.
                now = self._clock()
                due = max(due, now - interval)
                if due > now and self._wait(self.stop, (due - now) / _NS):
                    return
                due += interval
            if first and self._free:
                self._owner.connected(self)
            first = False
            self._frames += 1
            self._owner.took(self, grab)

    def _triggered(self) -> bool:
        """Whether to read: a file with a software trigger waits for it, a camera does so itself."""
        if self._free or self._settings.live:
            return True
        return self._fires.acquire(timeout=_TRIGGER_POLL_S)

    def _read(self) -> Grab | Idle | None:
        if self._waiting_since is None:
            self._waiting_since = self._clock()
        grab = self._called(self._source.read)
        if grab is not IDLE:
            self._waiting_since = self._fired_since = None
        return grab

    def _called(self, call: Callable[[], _T]) -> _T:
        """Call the driver; how long it takes can be seen from outside."""
        self._calling_since = self._clock()
        try:
            return call()
        finally:
            self._calling_since = None
