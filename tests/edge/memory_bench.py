"""A box's memory on a bench: real detector, judges, files and keeper, with a clock that the test turns."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from edge.adaptation.look import PLAIN
from edge.federation.connection import LinkKind, LinkState
from edge.federation.update import FleetBank, MemoryUpdate
from edge.frames import Decision, Frame, Verdict
from edge.health.metrics import Metrics
from edge.inference.detector import Detector
from edge.judgement.verdicts import Judge
from edge.memory.changeover import Changeover
from edge.memory.keeper import MemoryKeeper
from edge.memory.learner import Sender
from edge.memory.opening import OpenedMemory, open_memory
from edge.memory.settings import MemorySettings
from tests.edge.tiny_bundle import defective_frame, good_frame
from tests.edge.tiny_memory import ENGINE, PRECISION, embedding_of

if TYPE_CHECKING:
    from pathlib import Path

    from edge.adaptation.look import Look
    from edge.alerts.wire import Message
    from edge.bundle import Bundle, Engine
    from edge.judgement.region_of_interest import RegionOfInterest

QUICK = {"every_s": 1, "ship_every_s": 100, "shadow_frames": 5, "shadow_s": 10, "drift_per_week": 100}


@dataclass
class Camera:
    """Stands for a camera's worker: judges as it does, and keeps the judges that are installed."""

    name: str
    judges: dict[int, Judge]
    judge: Judge

    def install_judge(self, judge: Judge) -> None:
        self.judges[judge.memory_version] = judge


@dataclass
class Fleet:
    """A link whose other end is the test."""

    updates: list[MemoryUpdate] = field(default_factory=list)
    bank: FleetBank | None = None
    round: int = 7
    state: LinkState = field(default_factory=lambda: LinkState(LinkKind.CONNECTED))
    counters: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None: ...

    def stop(self, timeout: float) -> None: ...

    def submit(self, update: MemoryUpdate) -> None:
        self.updates.append(update)

    def poll_bank(self) -> FleetBank | None:
        bank, self.bank = self.bank, None
        return bank


def fleet_bank(bundle: Bundle, version: int, seeds: range = range(700, 704)) -> FleetBank:
    """A bank of 60 rows of good frames, as the aggregator would send it."""
    rows = np.concatenate([embedding_of(bundle.path, good_frame(seed)) for seed in seeds])
    rows = rows[np.random.default_rng(version).choice(len(rows), 60, replace=False)]
    return FleetBank(
        fleet="fleet", pool="pool", embedding_id=bundle.manifest.embedding_id[PRECISION], version=version,
        round=version, rows=rows.astype(np.float16).astype(np.float32), mass=np.full(60, 1 / 60, np.float32),
        boxes=np.full(60, 2, np.uint16), members=("plant/a", "plant/b"),
        created=datetime(2030, 1, 1, tzinfo=timezone.utc),
    )  # fmt: skip


class Bench:
    """Opens the memory of a bundle in a folder, as a box does."""

    def __init__(
        self,
        bundle: Bundle,
        folder: Path,
        *,
        link: Fleet | None = None,
        region: RegionOfInterest | None = None,
        engine: Engine = ENGINE,
        drift: Any = None,
        **settings: Any,
    ) -> None:
        self.bundle, self.link, self.region = bundle, link, region
        self.settings = MemorySettings.model_validate(QUICK | settings)
        self.now, self.utc, self.seq = 1000.0, 1_900_000_000.0, 0
        self.notices: list[tuple[str, str, str, dict[str, Any]]] = []
        self.answers: list[dict[str, Any]] = []
        self.announced: list[tuple[int, int]] = []
        self.metrics = Metrics()
        self.detector = Detector.open(bundle, engine=engine, precision=PRECISION, threads=1)
        self.opened: OpenedMemory = open_memory(self.settings, self.detector, folder)
        judge = self._judge()
        self.camera = Camera("cam", {judge.memory_version: judge}, judge)
        self.changeover = Changeover(
            detector=self.detector, packed=self.opened.packed, in_force=self.opened.in_force, store=self.opened.store,
            cameras=[self.camera], settings=self.settings, notify=self._notify,
            announce=lambda version, fleet: self.announced.append((version, fleet)), clock=lambda: self.now,
            utc=lambda: self.utc,
        )  # fmt: skip
        embedding = bundle.manifest.embedding_id[PRECISION]
        self.keeper = MemoryKeeper(
            settings=self.settings, detector=self.detector, cameras={"cam": self.camera}, changeover=self.changeover,
            learner=self.opened.learner, store=self.opened.store, progress=self.opened.progress,
            sender=Sender("fleet", "plant/box1", bundle.manifest.product, "", embedding), link=link,
            notify=self._notify, answer=lambda verb, **values: self.answers.append({"verb": verb, **values}),
            metrics=self.metrics, clock=lambda: self.now, drift=drift,
        )  # fmt: skip

    @property
    def status(self) -> dict[str, Any]:
        return self.keeper.status()

    def kinds(self) -> list[str]:
        return [kind for kind, _, _, _ in self.notices]

    def capture(self, image: np.ndarray, **changes: Any) -> tuple[Frame, Verdict]:
        """Judge an image as the camera's worker does."""
        moment = datetime(2030, 1, 1, tzinfo=timezone.utc)
        frame = Frame(image, "cam", self.seq, self.seq, moment, **changes)
        self.seq += 1
        prediction = self.detector.predict(frame)
        self.camera.judge = self.camera.judges[prediction.memory_version]
        return frame, self.camera.judge.judge(prediction)

    def show(self, image: np.ndarray, *, alarmed: bool = False, look: Look = PLAIN, **changes: Any) -> Verdict:
        """Capture, judge and offer an image a sampling interval after the last one, and let the keeper work."""
        self.now += self.settings.every_s
        frame, verdict = self.capture(image, **changes)
        self.keeper.offer(frame, verdict, alarmed or verdict.decision is Decision.NOK, look)
        self.keeper.turn(0)
        return verdict

    def show_good(self, count: int, *, first: int = 3000) -> None:
        for seed in range(first, first + count):
            self.show(good_frame(seed))

    def show_defect(self, seed: int = 4000) -> Verdict:
        return self.show(defective_frame(seed))

    def order(self, command: Message) -> dict[str, Any]:
        """Send a command and return its answer."""
        assert self.keeper.command(command) is None
        self.keeper.turn(0)
        return self.answers[-1]

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.keeper.turn(0)

    def stop(self) -> None:
        """As a box that is shut down in order."""
        self.keeper.request_stop()
        self.keeper.start()
        assert self.keeper.join(10)

    def fleet_bank(self, version: int = 1, **changes: Any) -> FleetBank:
        return dataclasses.replace(fleet_bank(self.bundle, version), **changes)

    def _notify(self, kind: Any, severity: Any, text: str, **detail: Any) -> None:
        self.notices.append((kind.value, severity.value, text, detail))

    def _judge(self) -> Judge:
        manifest, kept = self.bundle.manifest, self.opened.in_force
        judge = Judge(
            calibration=self.bundle.calibration(self.detector.status.engine, PRECISION)
            if kept is None
            else kept.calibration,
            pooling=manifest.pooling,
            crop=None,
            alpha=0.05,
            region_of_interest=self.region,
            bundle_id=self.bundle.id,
            memory_version=0 if kept is None else kept.version,
        )
        self.opened.put_in_force()
        return judge
