"""ThresholdCommands: gives cameras of a running box their thresholds on command, and tells which are ignored.

It must not know how scores are made; judges decide whether a threshold holds for them.
"""

from __future__ import annotations

import logging
import queue
import threading
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Protocol

from edge.alerts.command_messages import ThresholdCommand
from edge.alerts.message import NoticeKind, Severity
from edge.alerts.topics import THRESHOLD_VERB
from edge.alerts.wire import format_utc
from edge.errors import LinewardError
from edge.judgement.given_thresholds import place
from edge.judgement.threshold import RunTimeThreshold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from edge.alerts.message import AnyMessage
    from edge.alerts.publisher import Publisher
    from edge.judgement.given_thresholds import GivenThresholds
    from edge.judgement.verdicts import Judge

_LOG = logging.getLogger(__name__)
# Between looks at which thresholds hold: a memory or a bundle may have been switched.
LOOK_S = 0.5
MAX_WAITING = 16


class ThresholdCamera(Protocol):
    """A camera as its threshold's giver sees it."""

    name: str

    @property
    def judge(self) -> Judge:
        """Whose thresholds its last frame met."""

    @property
    def judges(self) -> tuple[Judge, ...]:
        """Whose thresholds its next frame may meet: one for each product."""

    def set_threshold(self, given: RunTimeThreshold | None, product: str = "") -> Judge:
        """Have frames of a product from the next one on meet a threshold given at run time."""


class ThresholdCommands:
    """Obeys ``cmd/threshold`` in a thread of its own: a disk that is slow stops neither cameras nor the broker link.

    What is kept is also what holds: cameras whose judge was made meanwhile, by a reload or another bundle, are given
    theirs again.

    Args:
        kept: thresholds on disk.
        cameras: the workers at the moment.
        notify: raises a notice.
    """

    name = "thresholds"

    def __init__(
        self,
        kept: GivenThresholds,
        *,
        cameras: Iterable[ThresholdCamera],
        notify: Callable[..., None],
    ) -> None:
        self._kept = kept
        self._cameras = cameras
        self._notify = notify
        self._answer: Callable[..., None] = _nobody
        self._waiting: queue.Queue[ThresholdCommand | None] = queue.Queue(MAX_WAITING)
        self._told: dict[str, str] = {}
        self._counts = dict.fromkeys(("given", "refused"), 0)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def attach(self, publisher: Publisher) -> None:
        """Have commands brought, and answers taken."""
        self._answer = publisher.answer
        publisher.on_command(THRESHOLD_VERB, self.command)

    def command(self, command: AnyMessage) -> dict[str, Any] | None:
        """Take a command; the answer follows. Never waits."""
        assert isinstance(command, ThresholdCommand)
        try:
            self._waiting.put_nowait(command)
        except queue.Full:
            return {"ok": False, "id": command.id, "reason": "too many thresholds are being set; send it again"}
        return None

    def start(self) -> None:
        """Begin to obey."""
        if self._kept.damage:
            self._notify(NoticeKind.THRESHOLD_DAMAGED, Severity.ALARM, self._kept.damage)
        self._thread = threading.Thread(target=self._run, name="thresholds", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Begin to end; commands that wait are not done."""
        self._stopping.set()

    def stop(self, timeout: float) -> bool:
        """End within ``timeout`` seconds."""
        self._stopping.set()
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            _LOG.debug("commands wait; the thread will look up by itself")
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def status(self) -> dict[str, Any]:
        """Return what was given by camera and whether it holds; empty where nothing ever was."""
        given = self._kept.all()
        if not given and not any(self._counts.values()):
            return {}
        judges = {place(camera.name, one.product): one for camera in self._cameras for one in camera.judges}
        return {
            "counters": dict(self._counts),
            "cameras": {
                name: one.model_dump(mode="json")
                | {"in_force": name in judges and judges[name].run_time == one and not judges[name].notice}
                for name, one in given.items()
            },
        }

    def warnings(self) -> list[str]:
        """Say that thresholds were lost; those that are ignored are warned of by their cameras."""
        return [self._kept.damage] if self._kept.damage else []

    def look(self) -> None:
        """Give cameras what is kept for them, and tell once which thresholds do not hold."""
        for camera in self._cameras:
            for judge in camera.judges:
                self._look_at(camera, judge)

    def _look_at(self, camera: ThresholdCamera, judge: Judge) -> None:
        given, where = self._kept.of(camera.name, judge.product), place(camera.name, judge.product)
        if judge.run_time != given:
            judge = camera.set_threshold(given, judge.product)
        if judge.notice and judge.notice != self._told.get(where):
            text = f"camera {where}: {judge.notice}"
            self._notify(NoticeKind.THRESHOLD_IGNORED, Severity.WARNING, text, **_figures(camera.name, judge))
        self._told[where] = judge.notice

    def obey(self, command: ThresholdCommand) -> dict[str, Any]:
        """Keep a threshold and have it hold; what does not fit the camera now is neither kept nor used.

        Returns:
            Fields of the command's result.
        """
        cameras = {camera.name: camera for camera in self._cameras}
        camera = cameras.get(command.camera)
        if camera is None:
            known = ", ".join(sorted(cameras)) or "none"
            return self._refused(f"no camera {command.camera!r} is running; running are: {known}")
        judges = {one.product: one for one in camera.judges}
        before = judges.get(command.product or "")
        if before is None:
            return self._refused(_which_product(command, judges))
        given = RunTimeThreshold(
            value=command.value,
            bundle_id=command.bundle_id,
            memory_version=command.memory_version,
            product=command.product or None,
            scope=before.scope,
            product_file=before.product_file,
            given_at=format_utc(datetime.now(timezone.utc)),
        )
        other = given.mismatch(
            bundle_id=before.bundle_id,
            memory_version=before.memory_version,
            scope=before.scope,
            product=before.product,
            product_file=before.product_file,
        )
        where = place(camera.name, before.product)
        if other:
            text = f"camera {where}: {other}"
            self._notify(NoticeKind.THRESHOLD_IGNORED, Severity.WARNING, text, **_figures(camera.name, before))
            return self._refused(other)
        try:
            # On disk before it judges: a box that is killed here comes back with what its next frame would have met.
            self._kept.put(camera.name, given)
        except LinewardError as error:
            return self._refused(str(error))
        judge = camera.set_threshold(given, before.product)
        self._counts["given"] += 1
        was, now = before.threshold.value, judge.threshold.value
        text = f"camera {where}: threshold {now:.6g} by {judge.threshold_source} in place of {was:.6g}"
        self._notify(NoticeKind.THRESHOLD_SET, Severity.INFO, text, before=was, **_figures(camera.name, judge))
        return {"ok": True, "count": 1, "detail": {"before": was, **_figures(camera.name, judge)}}

    def _refused(self, reason: str) -> dict[str, Any]:
        self._counts["refused"] += 1
        return {"ok": False, "reason": reason[:500]}

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                command = self._waiting.get(timeout=LOOK_S)
                if command is not None:
                    self._answer(THRESHOLD_VERB, id=command.id, **self.obey(command))
            except queue.Empty:
                pass
            except Exception:  # noqa: BLE001 (the thread's rim: the next command may be obeyed)
                _LOG.exception("a threshold could not be set")
                self._counts["refused"] += 1
            try:
                self.look()
            except Exception:  # noqa: BLE001 (as above; a camera may be going)
                _LOG.exception("thresholds could not be looked after")


def _which_product(command: ThresholdCommand, judges: Mapping[str, Judge]) -> str:
    if "" in judges:
        return f"the bundle of camera {command.camera!r} is for one product; leave the product out"
    known = f"its bundle has: {', '.join(judges)}"
    if command.product is None:
        return f"camera {command.camera!r} has a threshold for each product; name one of them, {known}"
    return f"camera {command.camera!r} has no product {command.product!r}; {known}"


def _figures(camera: str, judge: Judge) -> dict[str, Any]:
    return {
        **({"product": judge.product} if judge.product else {}),
        "camera": camera,
        "threshold": judge.threshold.value,
        "source": judge.threshold_source,
        "enter_level": judge.enter_level,
        "leave_level": judge.leave_level,
        "bundle_id": judge.bundle_id,
        "memory_version": judge.memory_version,
    }


def _nobody(*_: object, **__: object) -> None:
    """Answer nobody: no publisher is attached."""
