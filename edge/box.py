"""Box: the bundle, the cameras, the outbox and the broker link of one box, started, supervised and stopped together.

Knows the parts and their order; what each does is theirs.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from edge.alerts.message import NoticeKind, Severity, gap_maker
from edge.alerts.mqtt import LinkKind
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.topics import Identity
from edge.box_reload import Reloads, check_reloadable, plan_reload
from edge.box_status import figures_of, versions
from edge.camera import CameraWorker
from edge.cameras import Cameras, make_judge
from edge.errors import LinewardError, MessageError, OutboxError
from edge.health.metrics import Metrics
from edge.health.signals import stopped_by_signals
from edge.health.watchdog import Watchdog, clock_synchronised, notify_systemd
from edge.inference.detectors import Detectors
from edge.judgement.given_thresholds import THRESHOLDS_FILE, GivenThresholds
from edge.judgement.threshold_commands import ThresholdCommands
from edge.memory.box_memory import BoxMemory
from edge.reporter import Reporter
from edge.slots.slots import Slots
from edge.slots.watch import SlotWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge.bundle import Bundle, CalibrationScores
    from edge.camera import Observer, OnVerdict
    from edge.evidence.keeper import EvidenceKeeper
    from edge.federation.link import FleetLink
    from edge.health.exposition import Figures
    from edge.judgement.verdicts import Judge
    from edge.part import BoxPart
    from edge.settings import BoxSettings, CameraSettings

_LOG = logging.getLogger(__name__)
OUTBOX_FILE = "outbox.db"
TICK_S = 0.2
# systemd and a PLC wait; a box is down within 3 s of the signal.
WORKERS_STOP_S = 1.2
LAST_WORDS_S = 0.6
PUBLISHER_STOP_S = 1.0
WATCHDOG_LIMIT_S = 30.0
# Of TICK_S: a status that waits for a disk or a lock is no news before this.
SUPERVISED_S = 5.0
PART_STOP_S = 0.2


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
        self.settings = settings
        self.metrics = Metrics()
        self._on_verdict = on_verdict
        self._stop = threading.Event()
        self._watchdog = Watchdog(limit_s=WATCHDOG_LIMIT_S)
        self._started_ns = time.monotonic_ns()
        self._identity = Identity(site=settings.site, box=settings.box, prefix=settings.broker.prefix)
        self.cameras = Cameras(self.metrics)
        self._detectors: Detectors | None = None
        self._reporter: Reporter | None = None
        self._link = link
        self._memory: BoxMemory | None = None
        self._evidence: EvidenceKeeper | None = None
        self._slot_watch: SlotWatch | None = None
        # What runs beside the cameras, in the order of its start; the memory is one of them.
        self._parts: list[BoxPart] = []
        self._reloads = Reloads(apply=self._apply, refused=self._tell_refusal)
        self.restart_reason = ""
        self._told_damage: str | None = None
        self._status: dict[str, Any] = {}
        self._supervised_ns = self._started_ns
        self._status_key: object = None
        self._status_due_ns = 0
        self._versions: dict[str, str] = {}
        self._given = GivenThresholds(settings.state_dir / THRESHOLDS_FILE)
        self.outbox: Outbox | None = None
        self.publisher: Publisher | None = None

    @property
    def finished(self) -> bool:
        """Whether every source has ended; never so while there is a camera."""
        return self.cameras.finished

    @property
    def fallback_reason(self) -> str:
        """Why another engine or precision judges than was asked for; empty where the one asked for does."""
        return "" if self._detectors is None else self._detectors.fallback_reason

    def troubles(self) -> list[str]:
        """Why nobody should rely on the box now, such as a loop that is stuck; empty while all is well. Any thread."""
        silent_s = (time.monotonic_ns() - self._supervised_ns) / 1e9
        found = [f"{name}: stuck for more than {WATCHDOG_LIMIT_S:g} s" for name in self._watchdog.stuck()]
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
        detectors, judges = self._open_bundles()
        self._detectors = detectors
        if self._memory is not None:
            self._parts.append(self._memory)
        self._versions = versions(detector.status.engine.value for detector in detectors)
        if self.fallback_reason:
            _LOG.warning("fallback: %s", self.fallback_reason)
        try:
            self._open_outbox()
            self._make_workers(detectors, judges)
            self._serve_metrics()
            self._start_parts()
            self._start_cameras(self.cameras.workers, some=True)
        except BaseException:
            self.stop()
            raise
        notify_systemd("READY=1")

    def _open_bundles(self) -> tuple[Detectors, dict[str, Judge]]:
        """Open what judges; a bundle on trial that cannot be opened makes way for the one before."""
        settings, slots = self.settings, Slots.of(self.settings.bundle)
        watch = None if slots is None else SlotWatch(slots, settings.trial)
        if watch is not None:
            watch.before_open()
            self._parts.append(watch)
            self._slot_watch = watch
        try:
            return self._open_once(settings)
        except LinewardError as error:
            if watch is None or not watch.cannot_open(error):
                raise
            return self._open_once(settings)

    def _open_once(self, settings: BoxSettings) -> tuple[Detectors, dict[str, Judge]]:
        detectors = Detectors.open(settings)
        if settings.memory is not None:
            self._memory = BoxMemory(settings, detectors.default, link=self._link)
        return detectors, self._judges(detectors, settings.cameras)

    def supervise(self) -> None:
        """Publish the status when it has changed or is due; tell systemd that all loops go round."""
        stuck = self._watchdog.stuck()
        if not stuck:
            notify_systemd("WATCHDOG=1")
        status = self.status()
        key = (
            status["engine"], status["precision"], status["warnings"], self._link_kind(),
            tuple((name, camera["state"]) for name, camera in status["cameras"].items()), status["memory"],
        )  # fmt: skip
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
        before = self._detectors
        assert before is not None
        # The cameras go on meanwhile; a link that leads to another bundle gives another detector.
        detectors = Detectors.open(settings, reuse=before)
        plan = plan_reload(self.settings, settings, lambda name: detectors.of(name) is not before.of(name))
        if plan and self._memory is not None:
            self.restart_reason = "other cameras or another bundle, and a memory that belongs to those before"
            _LOG.warning("the box ends, to be started again: %s", self.restart_reason)
            self._stop.set()
            return
        judges = self._judges(detectors, (*plan.begun, *plan.switched))
        begun = [self._worker(camera, detectors, judges[camera.name]) for camera in plan.begun]
        # Nothing can fail any more.
        for camera in plan.switched:
            self.cameras[camera.name].replace_detector(detectors.of(camera.name), judges[camera.name])
        self.cameras.change(settings.cameras, ended=plan.ended, begun=begun)
        self._detectors, self.settings = detectors, settings
        if self.publisher is not None:
            self.publisher.keep_cameras(_names(settings))
        self._start_cameras(begun)
        _LOG.info(
            "settings reloaded: %d camera(s) ended, %d begun, %d with another bundle",
            len(plan.ended), len(plan.begun), len(plan.switched),
        )  # fmt: skip

    def _tell_refusal(self, reason: str) -> None:
        self.metrics.count("reloads_refused")
        if self._reporter is not None:
            self._reporter.notice(NoticeKind.SETTINGS_REFUSED, Severity.WARNING, reason[:1000])

    def end_sources(self) -> None:
        """Treat every source as ended; :meth:`run` then drains and stops. May be called from another thread."""
        for worker in self.cameras:
            worker.end()

    def request_stop(self) -> None:
        """Ask :meth:`run` to stop; may be called from a signal handler or another thread."""
        self._stop.set()

    def stop(self) -> None:
        """End events, publish ``stopped`` and close, within 3 s. Stopping again does nothing."""
        deadline = time.monotonic() + WORKERS_STOP_S
        self._stop.set()
        notify_systemd("STOPPING=1")
        for part in self._parts:
            part.request_stop()
        self.cameras.join(deadline)
        for part in reversed(self._parts):
            if not part.stop(max(PART_STOP_S, deadline - time.monotonic())):
                _LOG.warning("%s does not stop; left behind", part.name)
        if self.publisher is not None:
            self._publish(self.status())
            if self.publisher.state.kind is LinkKind.CONNECTED:
                # The last events and states; what the broker does not take in time stays in the outbox.
                self.publisher.wait_until_drained(LAST_WORDS_S)
            self.publisher.stop(PUBLISHER_STOP_S)
        if self.outbox is not None:
            self.outbox.close()

    def status(self) -> dict[str, Any]:
        """The fields of :class:`edge.alerts.message.Status`, as far as the box knows them."""
        detector = None if self._detectors is None else self._detectors.default
        manifest = None if detector is None else detector.bundle.manifest
        return {
            "uptime_ms": (time.monotonic_ns() - self._started_ns) // 1_000_000,
            "versions": self._versions,
            "product": None if manifest is None else manifest.product,
            "bundle": None
            if detector is None or manifest is None
            else {"id": detector.bundle.id, "method": manifest.method},
            "memory": {"version": 0, "fleet": 0} if self._memory is None else self._memory.ref(),
            "engine": None if detector is None else detector.status.engine.value,
            "precision": None if detector is None else detector.status.precision.value,
            "cameras": self.cameras.status(),
            "drops": self.metrics.counts(),
            "latency_ms": self.metrics.percentiles(),
            "clock_synced": clock_synchronised(),
            "warnings": tuple(self._warnings()),
            "detail": {part.name: said for part in self._parts if (said := part.status())},
        }

    def _judges(self, detectors: Detectors, settings: Sequence[CameraSettings]) -> dict[str, Judge]:
        """A judge per enabled camera, of the memory that judged last; of the packed one where that cannot be used."""
        found: dict[str, Judge] = {}
        for detector in detectors:
            cameras = [c for c in settings if c.enabled and detectors.of(c.name) is detector]

            def make(
                calibration: CalibrationScores,
                memory_version: int,
                cameras: list[CameraSettings] = cameras,
                bundle: Bundle = detector.bundle,
            ) -> list[Judge]:
                of = self._given.of
                return [make_judge(one, bundle, calibration, memory_version, of(one.name)) for one in cameras]

            has_memory = self._memory is not None and detector is detectors.default
            judges = self._memory.restore(make) if self._memory is not None and has_memory else None
            if judges is None:
                judges = make(detector.bundle.calibration(detector.status.engine, detector.status.precision), 0)
            found |= {camera.name: judge for camera, judge in zip(cameras, judges, strict=True)}
        return found

    def _open_outbox(self) -> None:
        settings = self.settings
        try:
            settings.state_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutboxError(
                f"{settings.state_dir}: cannot be made ({error.strerror}); set state_dir to a folder that this user "
                "may write"
            ) from error
        self.outbox = Outbox(
            settings.state_dir / OUTBOX_FILE,
            make_gap=gap_maker(self._identity),
            max_bytes=settings.outbox_max_mb * 2**20,
            replay_rows=settings.broker.replay_rows,
            replay_seconds=settings.broker.replay_seconds,
        )
        self.publisher = Publisher(settings=settings.broker, identity=self._identity, outbox=self.outbox)
        self.publisher.start()

    def _make_workers(self, detectors: Detectors, judges: dict[str, Judge]) -> None:
        assert self.outbox is not None
        assert self.publisher is not None
        self._reporter = Reporter(
            identity=self._identity,
            outbox=self.outbox,
            publisher=self.publisher,
            bundle=detectors.default.bundle,
            metrics=self.metrics,
        )
        self._tell_outbox_damage()
        self.publisher.keep_cameras(_names(self.settings))
        self._evidence = self._keep_evidence()
        thresholds = ThresholdCommands(self._given, cameras=self.cameras, notify=self._reporter.notice)
        thresholds.attach(self.publisher)
        self._parts.append(thresholds)
        workers = [
            self._worker(camera, detectors, judges[camera.name]) for camera in self.settings.cameras if camera.enabled
        ]
        self.cameras.change(self.settings.cameras, begun=workers)
        if self._slot_watch is not None:
            self._slot_watch.attach(
                switch=lambda: self._reloads.apply(lambda: self.settings),
                notify=self._reporter.notice,
                judges=lambda camera: self._detectors is not None and self._detectors.shares_memory(camera),
            )
        if self._memory is not None:
            self._memory.attach(
                cameras=[worker for worker in workers if detectors.shares_memory(worker.name)],
                reporter=self._reporter,
                publisher=self.publisher,
                metrics=self.metrics,
            )

    def _worker(self, camera: CameraSettings, detectors: Detectors, judge: Judge) -> CameraWorker:
        assert self._reporter is not None
        return CameraWorker(
            settings=camera,
            detector=detectors.of(camera.name),
            judge=judge,
            reporter=self._reporter,
            metrics=self.metrics,
            watchdog=self._watchdog,
            stop=self._stop,
            on_verdict=self._on_verdict,
            keep_evidence=None if self._evidence is None else self._evidence.keep,
            observers=self._observers(camera, detectors),
        )

    def _observers(self, camera: CameraSettings, detectors: Detectors) -> list[Observer]:
        found: list[Observer] = []
        if self._slot_watch is not None:
            found.append(self._slot_watch.observe)
        if self._memory is not None and detectors.shares_memory(camera.name):
            found.append(self._memory.offer)
        return found

    def _keep_evidence(self) -> EvidenceKeeper | None:
        settings = self.settings
        if settings.evidence is None:
            return None
        # Imported here: without evidence its pictures need no OpenCV.
        from edge.evidence.keeper import EVIDENCE_FOLDER, EvidenceKeeper  # noqa: PLC0415

        assert self.publisher is not None
        keeper = EvidenceKeeper(settings.evidence, root=settings.state_dir / EVIDENCE_FOLDER, metrics=self.metrics)
        keeper.attach(self.publisher)
        self._parts.append(keeper)
        return keeper

    def _serve_metrics(self) -> None:
        if self.settings.metrics is None:
            return
        from edge.health.metrics_server import MetricsServer  # noqa: PLC0415 (nothing else needs its library)

        def figures() -> Figures:
            # The status that was made last: who reads it here waits for no camera and no disk.
            return figures_of(
                self.settings, self._status, self.metrics, outbox=self.outbox, publisher=self.publisher,
                troubles=self.troubles(), stuck=len(self._watchdog.stuck()),
            )  # fmt: skip

        self._parts.append(MetricsServer(self.settings.metrics, figures=figures, troubles=self.troubles))

    def _start_parts(self) -> None:
        for part in self._parts:
            part.start()

    def _start_cameras(self, workers: Sequence[CameraWorker], *, some: bool = False) -> None:
        assert self._reporter is not None
        assert self._detectors is not None
        for worker in workers:
            self._reporter.judged_by(worker.name, self._detectors.of(worker.name).bundle)
        refused = self.cameras.start(workers)
        for camera in self.settings.cameras:
            if not camera.enabled:
                self._reporter.state(camera.name, "not_judged", reason="disabled")
        # Without any source there is nothing to do.
        if some and refused and len(refused) == len(self.cameras):
            raise refused[0]

    def _tell_outbox_damage(self) -> None:
        """Raise a notice once for each damage of the outbox, found at its opening or while it is used."""
        damage = None if self.outbox is None else self.outbox.damage
        if self._reporter is not None and damage is not None and damage != self._told_damage:
            self._told_damage = damage
            self._reporter.notice(NoticeKind.OUTBOX_DAMAGED, Severity.ALARM, damage)

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
        if self._reporter is not None and self._reporter.error:
            found.append(f"messages are being lost: {self._reporter.error}")
        if self.outbox is not None and self.outbox.damage:
            found.append(f"the outbox was damaged and put aside: {self.outbox.damage}")
        found += [text for part in self._parts for text in part.warnings()]
        found += [f"{name}: stuck for more than {WATCHDOG_LIMIT_S:g} s" for name in self._watchdog.stuck()]
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


def _names(settings: BoxSettings) -> list[str]:
    """Whoever has a retained state: the cameras that judge, and the stations."""
    return [camera.name for camera in settings.cameras if camera.enabled] + [one.name for one in settings.stations]
