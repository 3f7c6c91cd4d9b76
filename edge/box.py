"""Box: the bundle, the cameras, the outbox and the broker link of one box, started, supervised and stopped together.

Knows the parts and their order; what each does is theirs.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from edge.alerts.message import NoticeKind, Severity
from edge.alerts.mqtt import LinkKind
from edge.box_contents import WATCHDOG_LIMIT_S, BoxContents, names_of
from edge.box_reload import Reloads, check_reloadable, plan_reload
from edge.box_status import figures_of, versions
from edge.errors import MessageError
from edge.health.signals import stopped_by_signals
from edge.health.watchdog import clock_synchronised, notify_systemd
from edge.inference.detectors import Detectors
from edge.products.files import prepare_products

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.alerts.outbox import Outbox
    from edge.alerts.publisher import Publisher
    from edge.camera import OnVerdict
    from edge.cameras import Cameras
    from edge.federation.link import FleetLink
    from edge.health.exposition import Figures
    from edge.health.metrics import Metrics
    from edge.settings import BoxSettings

_LOG = logging.getLogger(__name__)
TICK_S = 0.2
STUCK = f"stuck for more than {WATCHDOG_LIMIT_S:g} s, or ended"
# systemd and a PLC wait; a box is down within 3 s of the signal. Seconds after it by which each must have ended.
WORKERS_STOP_S = 1.2
PARTS_STOP_S = 1.4
LAST_WORDS_S = 1.8
STOP_S = 2.4
# Of TICK_S: a status that waits for a disk or a lock is no news before this.
SUPERVISED_S = 5.0
# Whoever comes after one that hangs gets this at least.
PART_STOP_S = 0.1
# Without a drop for so long, the outbox has room again.
DROPS_END_S = 10.0


class Box:
    """One box. Use :meth:`run`, or :meth:`start`, :meth:`supervise` now and then, and :meth:`stop`.

    Args:
        settings: what the YAML file says.
        on_verdict: called with a frame's name and its verdict, in the thread of its camera.
        link: to the fleet, in place of the one that the settings describe.
    """

    def __init__(
        self, settings: BoxSettings, *, on_verdict: OnVerdict | None = None, link: FleetLink | None = None
    ) -> None:
        self._contents = BoxContents(settings, on_verdict=on_verdict, link=link)
        self._stop = self._contents.stopping
        self._started_ns = time.monotonic_ns()
        self._reloads = Reloads(apply=self._apply, refused=self._tell_refusal)
        self.restart_reason = ""
        self._told_damage: str | None = None
        self._dropped: int | None = None
        self._dropping_until = 0.0
        self._status: dict[str, Any] = {}
        self._supervised_ns = self._started_ns
        self._status_key: object = None
        self._status_due_ns = 0
        self._versions: dict[str, str] = {}

    @property
    def settings(self) -> BoxSettings:
        """In force."""
        return self._contents.settings

    @property
    def metrics(self) -> Metrics:
        """Counters and latencies."""
        return self._contents.metrics

    @property
    def cameras(self) -> Cameras:
        """Its cameras."""
        return self._contents.cameras

    @property
    def outbox(self) -> Outbox | None:
        """The durable queue, once it is open."""
        return self._contents.outbox

    @property
    def publisher(self) -> Publisher | None:
        """What empties it, once it is open."""
        return self._contents.publisher

    @property
    def finished(self) -> bool:
        """Whether every source has ended; never so while there is a camera."""
        return self.cameras.finished

    @property
    def fallback_reason(self) -> str:
        """Why another engine or precision judges than was asked for; empty where the one asked for does."""
        detectors = self._contents.detectors
        return "" if detectors is None else detectors.fallback_reason

    def _stuck(self) -> list[str]:
        """Loops that nobody hears of any more."""
        publisher = self.publisher
        # The publisher may wait for work as long as it likes; what ends it outside a stop is a defect.
        ended = publisher is not None and not publisher.alive and not self._stop.is_set()
        return [*self._contents.watchdog.stuck(), *(["publisher"] if ended else [])]

    def troubles(self) -> list[str]:
        """Why nobody should rely on the box now, such as a loop that is stuck; empty while all is well. Any thread."""
        silent_s = (time.monotonic_ns() - self._supervised_ns) / 1e9
        found = [f"{name}: {STUCK}" for name in self._stuck()]
        if self._stop.is_set():
            found.append("the box is stopping")
        elif not self._status:
            found.append("the box is starting")
        elif silent_s > SUPERVISED_S:
            found.append(f"the box has not looked after its loops for {silent_s:.0f} s")
        return found

    def healthy(self) -> bool:
        """Whether :meth:`troubles` has nothing to say; what a PLC's heartbeat follows."""
        return not self.troubles()

    def start(self) -> None:
        """Open everything and begin to judge. A broker that is down is no error: messages wait in the outbox.

        Raises:
            BundleError: the bundle is damaged or not calibrated for the engine in use.
            DataError: its calibration cannot give a threshold.
            EngineError: no engine runs it.
            OutboxError: the outbox cannot be opened.
            CaptureError: none of the files and folders that are the sources can be opened.
            SettingsError: the bundle has no memory that could change, or a key of the fleet cannot be read.
        """
        contents = self._contents
        try:
            contents.open(switch=lambda: self._reloads.apply(lambda: self.settings))
            assert contents.detectors is not None
            assert contents.inspection is not None
            contents.inspection.follow(self.healthy)
            self._versions = versions(detector.status.engine.value for detector in contents.detectors)
            if self.fallback_reason:
                _LOG.warning("fallback: %s", self.fallback_reason)
            self._tell_outbox_damage()
            self._serve_metrics()
            contents.start_parts()
            contents.start_cameras(contents.cameras.workers, some=True)
        except BaseException:
            self.stop()
            raise
        notify_systemd("READY=1")

    def supervise(self) -> None:
        """Publish the status when it has changed or is due; tell systemd that all loops go round."""
        if not self._stuck():
            notify_systemd("WATCHDOG=1")
        status = self.status()
        key = (
            status["engine"], status["precision"], status["warnings"], self._link_kind(),
            tuple((name, camera["state"], str(camera.get("recipe"))) for name, camera in status["cameras"].items()),
            status["memory"],
        )  # fmt: skip
        self._tell_outbox_drops()
        self._tell_outbox_damage()
        self._status, self._supervised_ns = status, time.monotonic_ns()
        now = self._supervised_ns
        if key != self._status_key or now >= self._status_due_ns:
            self._status_key = key
            self._status_due_ns = now + round(self.settings.status_every_s * 1e9)
            self._publish(status)

    def run(self, *, drain_s: float = 10.0, reread: Callable[[], BoxSettings] | None = None) -> bool:
        """Start, supervise until SIGTERM, SIGINT or the end of every source, and stop.

        Args:
            drain_s: once every source has ended, how long to wait for the broker to acknowledge all messages.
            reread: reads the settings again on SIGHUP, for :meth:`reload`; the signal is left alone without it.

        Returns:
            Whether every message was acknowledged.

        Raises:
            LinewardError: as :meth:`start`.
        """
        drained = False
        asked = None if reread is None else self._reloads.ask
        with stopped_by_signals(self._stop.set, _LOG, reload=asked):
            self.start()
            try:
                while not self._stop.wait(TICK_S):
                    self.supervise()
                    if reread is not None:
                        self._reloads.step(reread)
                    if self.finished:
                        break
                drained = self._drain(drain_s)
            finally:
                self.stop()
        return drained

    def reload(self, settings: BoxSettings) -> None:
        """Bring other settings into force while cameras that they do not change go on; any thread may.

        What cannot change in a running box is refused as a whole: a log line, a notice, a warning in the status, and
        the box goes on as before. A box whose memory learns ends in order instead (``restart_reason``), for its
        supervisor to start it again: the memory belongs to its cameras and its bundle.
        """
        self._reloads.run(lambda: settings)

    def _apply(self, settings: BoxSettings) -> None:
        check_reloadable(self.settings, settings)
        before = self._contents.detectors
        assert before is not None
        # The cameras go on meanwhile; a link that leads to another bundle gives another detector.
        detectors = Detectors.open(settings, reuse=before)
        plan = plan_reload(self.settings, settings, lambda name: detectors.of(name) is not before.of(name))
        if plan and self._contents.memory is not None:
            self.restart_reason = "other cameras or another bundle, and a memory that belongs to those before"
            _LOG.warning("the box ends, to be started again: %s", self.restart_reason)
            self._stop.set()
            return
        products = prepare_products(settings.products, detectors)
        judges = self._contents.judges(detectors, (*plan.begun, *plan.switched), products)
        # Of cameras that go on, too: products may be added for them.
        added = self._contents.added_judges(settings, detectors, products)
        assert self._contents.inspection is not None
        self._contents.inspection.change(settings)
        begun = [self._contents.worker(camera, detectors, judges[camera.name], settings) for camera in plan.begun]
        # Nothing can fail any more.
        for camera in plan.switched:
            guide = self._contents.guide(camera, detectors, settings)
            self.cameras[camera.name].replace_detector(detectors.of(camera.name), judges[camera.name], guide)
        for name, judge in added:
            self.cameras[name].install_judge(judge)
        # Not before their judges are there: a frame would be seen as a product that has no thresholds.
        self._contents.add_products(products)
        self.cameras.change(settings.cameras, ended=plan.ended, begun=begun)
        assert self._contents.adaptation is not None
        self._contents.adaptation.keep_only(camera.name for camera in settings.cameras if camera.enabled)
        self._contents.detectors, self._contents.settings = detectors, settings
        if self.publisher is not None:
            self.publisher.keep_cameras(names_of(settings))
        self._contents.start_cameras(begun)
        _LOG.info(
            "settings reloaded: %d camera(s) ended, %d begun, %d with another bundle",
            len(plan.ended), len(plan.begun), len(plan.switched),
        )  # fmt: skip

    def _tell_refusal(self, reason: str) -> None:
        self.metrics.count("reloads_refused")
        if self._contents.reporter is not None:
            self._contents.reporter.notice(NoticeKind.SETTINGS_REFUSED, Severity.WARNING, reason[:1000])

    def end_sources(self) -> None:
        """Treat every source as ended; :meth:`run` then drains and stops. May be called from another thread."""
        for worker in self.cameras:
            worker.end()

    def request_stop(self) -> None:
        """Ask :meth:`run` to stop; may be called from a signal handler or another thread."""
        self._stop.set()

    def stop(self) -> None:
        """End events, publish ``stopped`` and close, within 3 s. Stopping again does nothing."""
        began = time.monotonic()

        def left(until_s: float) -> float:
            return max(PART_STOP_S, began + until_s - time.monotonic())

        self._stop.set()
        notify_systemd("STOPPING=1")
        for part in self._contents.parts:
            part.request_stop()
        self.cameras.join(began + WORKERS_STOP_S)
        for part in reversed(self._contents.parts):
            if not part.stop(left(PARTS_STOP_S)):
                _LOG.warning("%s does not stop; left behind", part.name)
        if self.publisher is not None:
            self._publish(self.status())
            if self.publisher.state.kind is LinkKind.CONNECTED:
                # The last events and states; what the broker does not take in time stays in the outbox.
                self.publisher.wait_until_drained(left(LAST_WORDS_S))
            self.publisher.stop(left(STOP_S))
        if self.outbox is not None:
            self.outbox.close()

    def status(self) -> dict[str, Any]:
        """The fields of :class:`edge.alerts.message.Status`, as far as the box knows them."""
        detector = None if self._contents.detectors is None else self._contents.detectors.default
        manifest = None if detector is None else detector.bundle.manifest
        return {
            "uptime_ms": (time.monotonic_ns() - self._started_ns) // 1_000_000,
            "versions": self._versions,
            "product": None if manifest is None else manifest.product,
            "bundle": None
            if detector is None or manifest is None
            else {"id": detector.bundle.id, "method": manifest.method},
            "memory": {"version": 0, "fleet": 0} if self._contents.memory is None else self._contents.memory.ref(),
            "engine": None if detector is None else detector.status.engine.value,
            "precision": None if detector is None else detector.status.precision.value,
            "cameras": self._contents.camera_status(),
            "drops": self.metrics.counts(),
            "latency_ms": self.metrics.percentiles(),
            "clock_synced": clock_synchronised(),
            "warnings": tuple(self._warnings()),
            "detail": {part.name: said for part in self._contents.parts if (said := part.status())},
        }

    def _serve_metrics(self) -> None:
        if self.settings.metrics is None:
            return
        from edge.health.metrics_server import MetricsServer  # noqa: PLC0415 (nothing else needs its library)

        def figures() -> Figures:
            # The status that was made last: who reads it here waits for no camera and no disk.
            return figures_of(
                self.settings, self._status, self.metrics, outbox=self.outbox, publisher=self.publisher,
                troubles=self.troubles(), stuck=len(self._stuck()),
            )  # fmt: skip

        self._contents.parts.append(MetricsServer(self.settings.metrics, figures=figures, troubles=self.troubles))

    def _tell_outbox_drops(self) -> None:
        """Log when messages begin to be dropped, and when that has ended: a broker that is away cannot be told."""
        if self.outbox is None:
            return
        dropped, now = self.outbox.counters["dropped"], time.monotonic()
        if self._dropped is not None and dropped > self._dropped:
            if not self._dropping_until:
                _LOG.warning("the outbox is full: messages are dropped, the least important and oldest first")
            self._dropping_until = now + DROPS_END_S
        elif self._dropping_until and now > self._dropping_until:
            _LOG.info("the outbox has room again; %d messages were dropped since it was made", dropped)
            self._dropping_until = 0.0
        self._dropped = dropped

    def _tell_outbox_damage(self) -> None:
        """Raise a notice once for each damage of the outbox, found at its opening or while it is used."""
        damage = None if self.outbox is None else self.outbox.damage
        if self._contents.reporter is not None and damage is not None and damage != self._told_damage:
            self._told_damage = damage
            self._contents.reporter.notice(NoticeKind.OUTBOX_DAMAGED, Severity.ALARM, damage)

    def _drain(self, seconds: float) -> bool:
        """Wait for the broker to acknowledge everything, unless a signal came."""
        assert self.publisher is not None
        deadline = time.monotonic() + seconds
        while not self._stop.is_set():
            left = deadline - time.monotonic()
            if self.publisher.wait_until_drained(min(TICK_S, max(0.0, left))):
                return True
            if left <= 0:
                return False
            self.supervise()
        return self.publisher.wait_until_drained(0)

    def _warnings(self) -> list[str]:
        found = []
        if self.fallback_reason:
            found.append(f"fallback: {self.fallback_reason}")
        found += self.cameras.warnings()
        found += self._reloads.warnings()
        if self._contents.reporter is not None and self._contents.reporter.error:
            found.append(f"messages are being lost: {self._contents.reporter.error}")
        if self.outbox is not None and self.outbox.damage:
            found.append(f"the outbox was damaged and put aside: {self.outbox.damage}")
        found += [text for part in self._contents.parts for text in part.warnings()]
        found += [f"{name}: {STUCK}" for name in self._stuck()]
        return found

    def _link_kind(self) -> object:
        return None if self.publisher is None else self.publisher.state.kind

    def _publish(self, status: dict[str, Any]) -> None:
        if self.publisher is None:
            return
        try:
            self.publisher.publish_status(status)
        except MessageError as error:
            # A status that cannot be said is a defect, but no reason to stop judging.
            self.metrics.count("status_failed")
            _LOG.error("status cannot be published: %s", error)
