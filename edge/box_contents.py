"""BoxContents: what a box is put together of, made from its settings in one order; how it runs is the box's.

A part that is to run beside the cameras is made here and appended to ``parts``.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from edge.adaptation.part import Adaptation
from edge.adaptation.store import ADAPTATION_FILE, AdaptationStore
from edge.alerts.message import gap_maker
from edge.alerts.outbox import Outbox
from edge.alerts.publisher import Publisher
from edge.alerts.topics import Identity
from edge.camera import CameraWorker
from edge.cameras import Cameras, make_judge, suited
from edge.errors import LinewardError, OutboxError, SettingsError
from edge.health.camera_watch import HEALTH_FOLDER, CameraWatches
from edge.health.metrics import Metrics
from edge.health.watchdog import Watchdog
from edge.inference.detectors import Detectors
from edge.inference.stall_guard import StallGuard
from edge.inspection.inspection import Inspection
from edge.judgement.given_thresholds import THRESHOLDS_FILE, GivenThresholds
from edge.judgement.threshold_commands import ThresholdCommands
from edge.judgement.threshold_versions import VERSIONS_FILE, ThresholdVersions
from edge.memory.box_memory import BoxMemory
from edge.products.book import RECIPES_FILE, RecipeBook
from edge.products.files import prepare_products
from edge.products.judging import product_judges
from edge.products.part import Recipes
from edge.reporter import Reporter
from edge.slots.slots import Slots
from edge.slots.watch import SlotWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge.adaptation.guided import Guide
    from edge.bundle import Bundle, CalibrationScores
    from edge.camera import Observer, OnVerdict
    from edge.evidence.keeper import EvidenceKeeper
    from edge.federation.link import FleetLink
    from edge.inference.detector import Detector
    from edge.judgement.verdicts import Judge
    from edge.part import BoxPart
    from edge.products.files import PreparedProducts
    from edge.settings import BoxSettings, CameraSettings

OUTBOX_FILE = "outbox.db"
WATCHDOG_LIMIT_S = 30.0


class BoxContents:
    """The contents of one box.

    Args:
        settings: of the box; replaced when others come into force.
        on_verdict: called with a frame's name and its verdict, in the thread of its camera.
        link: to the fleet, in place of the one that the settings describe.

    Attributes:
        settings: in force.
        metrics: of the box.
        stopping: set when the box stops.
        watchdog: hears the loops.
        cameras: of the box, started or not.
        parts: what runs beside them, in the order of its start.
        detectors: that judge; None before :meth:`open`, like all that follows.
        outbox: the durable queue.
        publisher: empties it.
        reporter: where cameras hand in what they found.
        memory: the one that may change, if any.
        adaptation: followers of what cameras show.
        recipes: which product each camera runs.
        inspection: the stations of triggered cameras.
    """

    def __init__(
        self, settings: BoxSettings, *, on_verdict: OnVerdict | None = None, link: FleetLink | None = None
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.stopping = threading.Event()
        self.watchdog = Watchdog(limit_s=WATCHDOG_LIMIT_S)
        self.cameras = Cameras(self.metrics)
        self.parts: list[BoxPart] = []
        self.detectors: Detectors | None = None
        self.outbox: Outbox | None = None
        self.publisher: Publisher | None = None
        self.reporter: Reporter | None = None
        self.memory: BoxMemory | None = None
        self.adaptation: Adaptation | None = None
        self.recipes: Recipes | None = None
        self.inspection: Inspection | None = None
        self._on_verdict, self._link = on_verdict, link
        self._identity = Identity(site=settings.site, box=settings.box, prefix=settings.broker.prefix)
        self._given = GivenThresholds(settings.state_dir / THRESHOLDS_FILE)
        self._thresholds = ThresholdVersions(settings.state_dir / VERSIONS_FILE)
        self._book = RecipeBook(settings.state_dir / RECIPES_FILE)
        self._refused_files: tuple[str, ...] = ()
        self._evidence: EvidenceKeeper | None = None
        self._slot_watch: SlotWatch | None = None
        self._watches: CameraWatches | None = None

    def open(self, *, switch: Callable[[], None]) -> None:
        """Open and make everything; only the connection to the broker begins.

        Args:
            switch: brings the settings into force again, for a bundle whose link has moved.

        Raises:
            LinewardError: as :meth:`edge.box.Box.start`.
        """
        self.detectors, judges = self._open_bundles()
        if self.memory is not None:
            self.parts.append(self.memory)
        self._open_outbox()
        self._make_parts_and_workers(self.detectors, judges, switch)
        # Not before everybody has said which commands they do: one that waited at the broker comes with the connection.
        assert self.publisher is not None
        self.publisher.start()

    def start_parts(self) -> None:
        """Start what runs beside the cameras."""
        for part in self.parts:
            part.start()

    def start_cameras(self, workers: Sequence[CameraWorker], *, some: bool = False) -> None:
        """Start workers, and say of the others that they are disabled.

        Args:
            workers: not yet started.
            some: whether one source must open at least.

        Raises:
            CaptureError: none did, and one must.
        """
        assert self.reporter is not None
        assert self.detectors is not None
        for worker in workers:
            self.reporter.judged_by(worker.name, self.detectors.of(worker.name).bundle)
        refused = self.cameras.start(workers)
        for camera in self.settings.cameras:
            if not camera.enabled:
                self.reporter.state(camera.name, "not_judged", reason="disabled")
        # Without any source there is nothing to do.
        if some and refused and len(refused) == len(self.cameras):
            raise refused[0]

    def camera_status(self) -> dict[str, dict[str, Any]]:
        """What the status says of each camera, with its recipe and the version of its moments.

        The version is 0 where it does not follow its line; the recipe is told where it may have one.
        """
        owner = None if self.adaptation is None else self.adaptation.owner
        followed = {} if owner is None else {one.name: one.follower.version for one in owner.cameras}
        recipes = {} if self.recipes is None else self.recipes.of_cameras()
        return {
            name: said
            | {"moments_version": followed.get(name, 0)}
            | ({"recipe": recipes[name]} if name in recipes else {})
            for name, said in self.cameras.status().items()
        }

    def judges(
        self, detectors: Detectors, settings: Sequence[CameraSettings], products: PreparedProducts
    ) -> dict[str, tuple[Judge, ...]]:
        """The judges of each enabled camera, one for each product, those from files included.

        They are of the memory that judged last; of the packed one where that cannot be used.
        """
        found: dict[str, tuple[Judge, ...]] = {}
        for detector in detectors:
            cameras = [c for c in settings if c.enabled and detectors.of(c.name) is detector]
            if detector.products:
                added = products.of(detector)
                found |= {one.name: product_judges(one, detector, self._given.of, added) for one in cameras}
                continue

            def make(
                calibration: CalibrationScores,
                memory_version: int,
                cameras: list[CameraSettings] = cameras,
                bundle: Bundle = detector.bundle,
            ) -> list[Judge]:
                of = self._given.of
                return [make_judge(one, bundle, calibration, memory_version, of(one.name)) for one in cameras]

            has_memory = self.memory is not None and detector is detectors.default
            judges = self.memory.restore(make) if self.memory is not None and has_memory else None
            if judges is None:
                judges = make(detector.bundle.calibration(detector.status.engine, detector.status.precision), 0)
            found |= {camera.name: (judge,) for camera, judge in zip(cameras, judges, strict=True)}
        return found

    def worker(
        self, camera: CameraSettings, detectors: Detectors, judge: Sequence[Judge], settings: BoxSettings | None = None
    ) -> CameraWorker:
        """Make the worker of one camera, and its guide.

        Args:
            camera: its settings.
            detectors: that judge.
            judge: of this camera, one for each product.
            settings: of the box; those in force where None.
        """
        assert self.reporter is not None
        assert self.inspection is not None
        guide = self.guide(camera, detectors, settings or self.settings)
        return CameraWorker(
            settings=suited(camera, detectors.of(camera.name).bundle),
            detector=detectors.of(camera.name),
            judge=judge,
            reporter=self.reporter,
            metrics=self.metrics,
            watchdog=self.watchdog,
            stop=self.stopping,
            on_verdict=self._on_verdict,
            keep_evidence=None if self._evidence is None else self._evidence.keep,
            observers=self._observers(camera, detectors),
            station=self.inspection.station_of(camera.name),
            health=None if self._watches is None else self._watches.watch(camera),
            number_threshold=self._thresholds.number,
            follower=guide,
        )

    def add_products(self, products: PreparedProducts) -> None:
        """Have products from files judged; tell of files that are refused."""
        products.put_in_force()
        self._refused_files = products.refused
        if self.recipes is not None:
            self.recipes.refuse_files(self._refused_files)

    def added_judges(
        self, settings: BoxSettings, detectors: Detectors, products: PreparedProducts
    ) -> list[tuple[str, Judge]]:
        """Make judges of products from files that are new to running cameras, each with its camera's name."""
        found: list[tuple[str, Judge]] = []
        before, cameras = self.detectors, {camera.name: camera for camera in settings.cameras if camera.enabled}
        for worker in self.cameras:
            camera, known = cameras.get(worker.name), {one.product_file for one in worker.judges}
            if camera is None or before is None or detectors.of(camera.name) is not before.of(camera.name):
                continue
            detector = detectors.of(camera.name)
            added = products.of(detector)
            if any(one.digest not in known for one in added):
                judges = product_judges(camera, detector, self._given.of, added)
                found += [(worker.name, one) for one in judges if one.product_file not in known]
        return found

    def guide(self, camera: CameraSettings, detectors: Detectors, settings: BoxSettings) -> Guide | None:
        """Make what says how the frames of a camera are seen under the bundle that judges it from now on.

        Args:
            camera: its settings.
            detectors: that judge.
            settings: of the box.

        Returns:
            Its follower; where it shall not follow its line, the guide by its recipe; None where the bundle has one
            product.
        """
        assert self.adaptation is not None
        assert self.recipes is not None
        name, detector = camera.name, detectors.of(camera.name)
        products = self.recipes.products(name, detector)
        followed = self.adaptation.follow(name, settings.adaptation_of(camera), detector, products)
        return self.recipes.guide(name, detector) if followed is None else followed.follower

    def _open_bundles(self) -> tuple[Detectors, dict[str, tuple[Judge, ...]]]:
        """Open what judges; a bundle on trial that cannot be opened makes way for the one before."""
        settings, slots = self.settings, Slots.of(self.settings.bundle)
        watch = None if slots is None else SlotWatch(slots, settings.trial)
        if watch is not None:
            watch.before_open()
            self.parts.append(watch)
            self._slot_watch = watch
        try:
            return self._open_once(settings)
        except LinewardError as error:
            if watch is None or not watch.cannot_open(error):
                raise
            return self._open_once(settings)

    def _open_once(self, settings: BoxSettings) -> tuple[Detectors, dict[str, tuple[Judge, ...]]]:
        detectors = Detectors.open(settings)
        products = prepare_products(settings.products, detectors)
        if settings.memory is not None:
            if detectors.default.products:
                raise SettingsError(
                    f"memory: {settings.bundle} is for several products, and their memory does not learn on a box; "
                    "leave the section out, or use a bundle for each product"
                )
            self.memory = BoxMemory(settings, detectors.default, link=self._link)
        judges = self.judges(detectors, settings.cameras, products)
        self.add_products(products)
        return detectors, judges

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

    def _make_parts_and_workers(
        self, detectors: Detectors, judges: dict[str, tuple[Judge, ...]], switch: Callable[[], None]
    ) -> None:
        assert self.outbox is not None
        assert self.publisher is not None
        self.reporter = Reporter(
            identity=self._identity,
            outbox=self.outbox,
            publisher=self.publisher,
            bundle=detectors.default.bundle,
            metrics=self.metrics,
        )
        self.publisher.keep_cameras(names_of(self.settings))
        self.parts.append(
            StallGuard(
                limit_s=self.settings.engine_stall_s, detectors=lambda: self.detectors, notify=self.reporter.notice
            )
        )
        self._evidence = self._keep_evidence()
        thresholds = ThresholdCommands(self._given, cameras=self.cameras, notify=self.reporter.notice)
        thresholds.attach(self.publisher)
        self.parts.append(thresholds)
        self.adaptation = Adaptation(
            AdaptationStore(self.settings.state_dir / ADAPTATION_FILE),
            versions=self._thresholds,
            notify=self.reporter.notice,
        )
        self.adaptation.attach(self.publisher)
        self.parts.append(self.adaptation)
        modbus = self.settings.modbus
        self.recipes = Recipes(
            self._book,
            cameras=self._detector_of_each,
            followers=self.adaptation,
            notify=self.reporter.notice,
            numbers=None if modbus is None else modbus.products,
        )
        self.recipes.attach(self.publisher)
        self.recipes.refuse_files(self._refused_files)
        self.parts.append(self.recipes)
        health = self.settings.state_dir / HEALTH_FOLDER
        self._watches = CameraWatches(health, cameras=self.cameras, notify=self.reporter.notice)
        self.parts.append(self._watches)
        self.inspection = Inspection(
            self.settings, reporter=self.reporter, publisher=self.publisher, metrics=self.metrics
        )
        self.parts.append(self.inspection)
        inspection = self.inspection
        self.recipes.serve(
            inspection.registers, lambda: {one.plan.name: one.plan.cameras for one in inspection.stations()}
        )
        workers = [
            self.worker(camera, detectors, judges[camera.name]) for camera in self.settings.cameras if camera.enabled
        ]
        self.cameras.change(self.settings.cameras, begun=workers)
        if self._slot_watch is not None:
            self._slot_watch.attach(
                switch=switch,
                notify=self.reporter.notice,
                judges=lambda camera: self.detectors is not None and self.detectors.shares_memory(camera),
            )
        if self.memory is not None:
            self.memory.attach(
                cameras=[worker for worker in workers if detectors.shares_memory(worker.name)],
                reporter=self.reporter,
                publisher=self.publisher,
                metrics=self.metrics,
                drift=self.adaptation.owner,
            )

    def _detector_of_each(self) -> dict[str, Detector]:
        """The detector of each enabled camera at the moment."""
        detectors = self.detectors
        if detectors is None:
            return {}
        return {name: detectors.of(name) for name in detectors.cameras}

    def _observers(self, camera: CameraSettings, detectors: Detectors) -> list[Observer]:
        found: list[Observer] = []
        if self._slot_watch is not None:
            found.append(self._slot_watch.observe)
        if self.memory is not None and detectors.shares_memory(camera.name):
            found.append(self.memory.offer)
        if self.recipes is not None:
            found.append(self.recipes.observe)
        if self.adaptation is not None:
            # Last: what others make of a frame they make of it as it was seen.
            found.append(self.adaptation.observe)
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
        self.parts.append(keeper)
        return keeper


def names_of(settings: BoxSettings) -> list[str]:
    """Whoever has a retained state: the cameras that judge, and the stations."""
    return [camera.name for camera in settings.cameras if camera.enabled] + [one.name for one in settings.stations]
