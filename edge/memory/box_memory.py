"""BoxMemory: the memory of one box, put together from its parts: files, keeper, and the link to the fleet.

What each part does is theirs; this is their order of opening, starting and stopping.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from edge.adaptation.look import PLAIN
from edge.alerts.message import NoticeKind, Severity
from edge.alerts.topics import ACCEPT_VERB, SHIP_VERB
from edge.errors import LinewardError
from edge.federation.client import FederationClient
from edge.federation.folder_link import FolderLink
from edge.federation.keys import read_key_pair, read_public_key
from edge.frames import Decision
from edge.memory.changeover import Changeover
from edge.memory.keeper import MemoryKeeper
from edge.memory.learner import Sender
from edge.memory.opening import open_memory
from edge.settings import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge.adaptation.owner import DriftOwner
    from edge.alerts.publisher import Publisher
    from edge.bundle import CalibrationScores
    from edge.camera import CameraWorker
    from edge.federation.link import FleetLink
    from edge.frames import JudgedFrame
    from edge.health.metrics import Metrics
    from edge.inference.detector import Detector
    from edge.judgement.verdicts import Judge
    from edge.reporter import Reporter
    from edge.settings import BoxSettings

MEMORY_FOLDER = "memory"
SPOOL_FILE = "federation.db"


class BoxMemory:
    """The memory of a box whose settings have a memory section.

    Args:
        settings: of the box.
        detector: that judges with the packed memory so far.
        link: to the fleet, in place of the one that the settings describe.

    Raises:
        SettingsError: the bundle's memory cannot change.
        BundleError: the bundle is damaged.
    """

    name = "memory"

    def __init__(self, settings: BoxSettings, detector: Detector, *, link: FleetLink | None = None) -> None:
        assert settings.memory is not None
        self._box, self._settings, self._detector = settings, settings.memory, detector
        self._opened = open_memory(settings.memory, detector, settings.state_dir / MEMORY_FOLDER)
        self._link = link
        self._keeper: MemoryKeeper | None = None
        self._drift: DriftOwner | None = None

    def restore(self, make: Callable[[CalibrationScores, int], list[Judge]]) -> list[Judge] | None:
        """Put the memory that judged last in force again.

        Args:
            make: makes the judge of each camera from the scores behind the thresholds and a memory version.

        Returns:
            The judges of that memory; None where there is none that can be used, and the packed one judges.
        """
        kept = self._opened.in_force
        if kept is None:
            return None
        try:
            judges = make(kept.calibration, kept.version)
            self._opened.put_in_force()
        except LinewardError as error:
            self._opened.reject(str(error))
            return None
        return judges

    def attach(
        self,
        *,
        cameras: Sequence[CameraWorker],
        reporter: Reporter,
        publisher: Publisher,
        metrics: Metrics,
        drift: DriftOwner | None = None,
    ) -> None:
        """Make the keeper and the link, neither of them started yet.

        Args:
            cameras: of the box.
            reporter: stores notices, and learns of memories before they judge.
            publisher: brings commands.
            metrics: of the box.
            drift: says which frames may teach the memory, and when it may be switched; without one all and always.

        Raises:
            SettingsError: a key file cannot be read, or the secret one is open to others.
            StoreError: the updates that wait cannot be opened.
        """
        opened, self._drift = self._opened, drift
        for text in opened.damage:
            reporter.notice(NoticeKind.MEMORY_DAMAGED, Severity.ALARM, text)
        if opened.in_force is not None:
            reporter.know_memory(opened.in_force.version, fleet=opened.in_force.fleet_version)
        sender = self._sender()
        if self._link is None and sender is not None:
            self._link = self._open_link(sender)
        changeover = Changeover(
            detector=self._detector,
            packed=opened.packed,
            in_force=opened.in_force,
            store=opened.store,
            cameras=cameras,
            settings=self._settings,
            notify=reporter.notice,
            announce=lambda version, fleet: reporter.know_memory(version, fleet=fleet),
        )
        self._keeper = MemoryKeeper(
            settings=self._settings,
            detector=self._detector,
            cameras={camera.name: camera for camera in cameras},
            changeover=changeover,
            learner=opened.learner,
            store=opened.store,
            progress=opened.progress,
            sender=sender,
            link=self._link,
            notify=reporter.notice,
            answer=publisher.answer,
            metrics=metrics,
            # Where one frame is one part, any of them may be declared good later.
            remember=frozenset(camera.name for camera in self._box.cameras if camera.mode is Mode.TRIGGERED),
            drift=drift,
        )
        for verb in (ACCEPT_VERB, SHIP_VERB):
            publisher.on_command(verb, self._keeper.command)

    def start(self) -> None:
        """Begin to learn, and to look for the fleet."""
        if self._link is not None:
            self._link.start()
        if self._keeper is not None:
            self._keeper.start()

    def request_stop(self) -> None:
        """Begin to end."""
        if self._keeper is not None:
            self._keeper.request_stop()

    def stop(self, timeout: float) -> bool:
        """Keep what was learned and end; False where that takes longer than ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        self.request_stop()
        done = self._keeper is None or self._keeper.join(timeout)
        if self._link is not None:
            self._link.stop(max(0.1, deadline - time.monotonic()))
        return done

    def offer(self, judged: JudgedFrame) -> None:
        """Take a judged frame, or leave it; never waits. See :meth:`MemoryKeeper.offer`."""
        if self._keeper is None or judged.verdict.decision is Decision.NOT_JUDGED:
            return
        look = PLAIN if self._drift is None else self._drift.look_at(judged)
        if look is not None:
            self._keeper.offer(judged.frame, judged.verdict, judged.alarmed, look)

    def ref(self) -> dict[str, int]:
        """Version of the memory in force, and of the fleet's memory inside it."""
        return {"version": 0, "fleet": 0} if self._keeper is None else self._keeper.memory_ref()

    def status(self) -> dict[str, Any]:
        """What the box's status says of the memory in detail, as JSON values."""
        return {} if self._keeper is None else self._keeper.status()

    def warnings(self) -> list[str]:
        """What an operator should know of the memory."""
        return [] if self._keeper is None else self._keeper.warnings()

    def _sender(self) -> Sender | None:
        federation, manifest = self._box.federation, self._detector.bundle.manifest
        if federation is None:
            return None
        return Sender(
            fleet=federation.fleet,
            box=f"{self._box.site}/{self._box.box}",
            product=manifest.product,
            subclass=federation.subclass,
            embedding_id=manifest.embedding_id[self._detector.status.precision],
        )

    def _open_link(self, sender: Sender) -> FleetLink:
        federation = self._box.federation
        assert federation is not None
        if federation.exchange is not None:
            return FolderLink(
                federation.exchange, fleet=sender.fleet, product=sender.product, embedding_id=sender.embedding_id
            )
        # The settings have all three where there is no exchange folder.
        assert federation.aggregator is not None
        assert federation.key_file is not None
        assert federation.aggregator_key_file is not None
        return FederationClient(
            address=federation.aggregator,
            server_key=read_public_key(federation.aggregator_key_file).key,
            keys=read_key_pair(federation.key_file),
            fleet=sender.fleet,
            box=sender.box,
            product=sender.product,
            subclass=sender.subclass,
            embedding_id=sender.embedding_id,
            path=self._box.state_dir / SPOOL_FILE,
        )
