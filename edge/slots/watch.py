"""SlotWatch: follows the link of the slots while the box runs, and takes a bundle back that does not do.

It decides when to switch and why to go back; switching itself is the box's.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from edge.alerts.message import NoticeKind, Severity
from edge.errors import LinewardError, SlotError
from edge.slots.trial import Pace, TrialFrame, TrialRule

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.frames import JudgedFrame
    from edge.slots.settings import TrialSettings
    from edge.slots.slots import Slots

    Notify = Callable[..., None]

_LOG = logging.getLogger(__name__)
POLL_S = 0.2
# Frames that wait for the watch; more of them say nothing new.
_WAITING = 256


class SlotWatch:
    """The bundle slots of a running box: a :class:`~edge.part.BoxPart` and an observer of judged frames.

    A box calls :meth:`before_open` before it opens its bundle and :meth:`cannot_open` when that fails; it gives the
    functions that switch and notify with :meth:`attach`, before :meth:`start`.

    Args:
        slots: of the box's bundle.
        settings: of a trial.
    """

    name = "bundle"

    def __init__(self, slots: Slots, settings: TrialSettings) -> None:
        self._slots = slots
        self._settings = settings
        self._switch: Callable[[], None] = _unattached
        self._notify: Notify = _unattached
        self._judges: Callable[[str], bool] = _unattached
        self._told: list[tuple[NoticeKind, Severity, str]] = []
        self._frames: queue.Queue[TrialFrame] = queue.Queue(_WAITING)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._serving = slots.serving()
        self._pace = Pace()
        self._rule: TrialRule | None = None
        self._counted = False
        self._error = ""
        self._refused = ""

    def before_open(self) -> None:
        """Count this start where a bundle is on trial; go back where the box died too often with it.

        Raises:
            SlotError: the slots cannot be read or changed.
        """
        starts = self._slots.count_start(1)
        self._counted = starts > 0
        if starts > self._settings.max_starts:
            self._back(f"the box ended {starts - 1} times during its trial without being told to")

    def cannot_open(self, error: LinewardError) -> bool:
        """Go back where a bundle on trial cannot be opened; True when another bundle is there to be tried.

        Raises:
            SlotError: the slots cannot be read or changed.
        """
        if self._slots.trial() is None:
            return False
        self._back(f"it cannot be opened: {error}")
        return True

    def attach(self, *, switch: Callable[[], None], notify: Notify, judges: Callable[[str], bool]) -> None:
        """Say how to switch and to whom to speak.

        Args:
            switch: puts the bundle that the link leads to in place of the one that judges; returns when it judges,
                raises a LinewardError when it cannot.
            notify: as :meth:`edge.reporter.Reporter.notice`.
            judges: whether the bundle of the slots judges a camera.
        """
        self._switch, self._notify, self._judges = switch, notify, judges

    def start(self) -> None:
        """Begin to watch."""
        self._serving = self._slots.serving()
        if self._slots.trial() is not None:
            self._begin_trial()
        self._thread = threading.Thread(target=self._run, name="bundle-slots", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Begin to end."""
        self._stop.set()

    def stop(self, timeout: float) -> bool:
        """End; a start that ends in order does not count against a bundle on trial."""
        self._stop.set()
        done = True
        if self._thread is not None:
            self._thread.join(timeout)
            done = not self._thread.is_alive()
        if self._counted:
            self._counted = False
            try:
                self._slots.count_start(-1)
            except SlotError as error:
                _LOG.warning("%s", error)
        return done

    def observe(self, judged: JudgedFrame) -> None:
        """Take a frame of a camera; never waits."""
        if self._judges(judged.frame.camera) and (frame := TrialFrame.of(judged)) is not None:
            try:
                self._frames.put_nowait(frame)
            except queue.Full:
                return

    def status(self) -> dict[str, Any]:
        """Which slot serves, and how far its trial is."""
        rule = self._rule
        trial = None if rule is None else {"judged": rule.judged, "frames": self._settings.frames}
        return {"slot": self._serving, "trial": trial}

    def warnings(self) -> list[str]:
        """What stands in the way of a switch."""
        return [f"bundle slots: {text}" for text in (self._error, self._refused) if text]

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._turn()
                self._error = ""
            except LinewardError as error:  # noqa: PERF203 (slots that cannot be read today may be read tomorrow)
                if str(error) != self._error:
                    _LOG.error("bundle slots: %s", error)
                self._error = str(error)
                self._stop.wait(POLL_S)

    def _turn(self) -> None:
        """Follow the link, and look at the frames that came."""
        while self._told:
            self._notify(*self._told.pop(0))
        if self._slots.serving() != self._serving:
            self._follow()
        try:
            frame = self._frames.get(timeout=POLL_S)
        except queue.Empty:
            return
        while frame is not None:
            self._judge(frame)
            try:
                frame = self._frames.get_nowait()
            except queue.Empty:
                break

    def _judge(self, frame: TrialFrame) -> None:
        if self._rule is None:
            self._pace.feed(frame)
            return
        reason = self._rule.feed(frame)
        if reason:
            self._back(reason)
            self._follow()
        elif self._rule.passed(time.monotonic()):
            self._rule, self._pace = None, Pace()
            self._counted = False
            found = self._slots.confirm()
            if found is not None:
                self._notify(NoticeKind.BUNDLE_CONFIRMED, Severity.INFO, f"bundle {found[:12]} has passed its trial")

    def _follow(self) -> None:
        """Switch to the bundle that the link leads to; go back where that fails on trial."""
        serving = self._slots.serving()
        try:
            self._switch()
        except LinewardError as error:
            if not self.cannot_open(error):
                # What judges goes on judging; trying again at every turn would only load the machine.
                self._serving = serving
                self._refused = f"the box cannot switch to slot {serving}: {error}"
                _LOG.error("bundle slots: %s", self._refused)
                return
            serving = self._slots.serving()
            if serving != self._serving:
                self._switch()
        self._serving = serving
        self._refused = ""
        self._begin_trial()

    def _begin_trial(self) -> None:
        with self._frames.mutex:
            self._frames.queue.clear()
        before, self._pace, self._rule = self._pace.median_ms, Pace(), None
        trial = self._slots.trial()
        if trial is None:
            return
        if not self._counted:
            self._slots.count_start(1)
            self._counted = True
        self._rule = TrialRule(self._settings, begun_s=time.monotonic(), before_ms=before)
        length = f"{self._settings.seconds:g} s and {self._settings.frames} frames"
        text = f"bundle {trial.id[:12]} judges on trial, for {length}"
        self._told.append((NoticeKind.BUNDLE_ON_TRIAL, Severity.INFO, text))

    def _back(self, reason: str) -> None:
        bad = self._slots.trial()
        name = "the bundle" if bad is None else f"bundle {bad.id[:12]}"
        found = self._slots.roll_back(reason)
        self._rule = None
        self._counted = False
        text = f"{name} was taken back: {reason}; bundle {found[:12]} judges"
        self._told.append((NoticeKind.BUNDLE_TAKEN_BACK, Severity.ALARM, text[:1024]))


def _unattached(*_: object) -> Any:  # noqa: ANN401 (stands for any function)
    raise SlotError("the box has not said how to switch its bundle")
