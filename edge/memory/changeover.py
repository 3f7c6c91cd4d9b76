"""Changeover: a new memory is calibrated, tried in shadow beside the one in force, and switched to, or refused.

One thread uses it. It must not know where a new memory comes from, nor threads, brokers or commands.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edge.alerts.message import NoticeKind, Severity
from edge.errors import LinewardError
from edge.frames import Decision, Prediction
from edge.memory.banks import Banks, packed_banks
from edge.memory.drift import DriftBudget, DriftSettings, good_distance, measure_drift
from edge.memory.search import anomaly_map
from edge.memory.shadow import Outcome, ShadowTrial
from edge.memory.store import MemoryInForce

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from edge.frames import Frame, Verdict
    from edge.inference.detector import Detector
    from edge.judgement.verdicts import Judge
    from edge.memory.commissioning import Commissioning
    from edge.memory.settings import MemorySettings
    from edge.memory.store import MemoryStore

    Rows = npt.NDArray[np.float32]
    Notify = Callable[..., None]

_LOG = logging.getLogger(__name__)
# A full disk, or an engine without memory, is asked again after this long.
RETRY_S = 60.0
NO_COMMISSIONING = (
    "stays in shadow: there is no commissioning set, so no thresholds can be made; name a folder of at least 10 images "
    "declared good in memory.commissioning, or export the bundle with one"
)


class JudgedCamera(Protocol):
    """A camera as the memory sees it."""

    name: str

    @property
    def judge(self) -> Judge:
        """Whose thresholds its last frame met."""

    def install_judge(self, judge: Judge) -> None:
        """Have a judge ready for the memory that will be in force next."""


@dataclass(slots=True)
class _Candidate:
    source: str
    banks: Banks
    fleet_version: int
    version: int
    trial: ShadowTrial
    drift: float
    memory: MemoryInForce | None
    old: dict[str, Judge]
    new: dict[str, Judge]
    retry_at_s: float = 0.0
    trouble: str = ""


class Changeover:
    """The memory in force, and the one that may follow it.

    Args:
        detector: whose state is switched.
        packed: the state that the bundle was packed with.
        in_force: what was restored; None where the packed memory judges.
        store: where the memory in force is kept.
        cameras: whose judges change with the memory.
        settings: of the memory.
        notify: raises a notice: kind, severity, text and figures.
        announce: learns version and fleet version of a memory before it judges.
        clock: monotonic seconds.
        utc: UTC seconds.

    Attributes:
        version: of the memory in force.
        fleet_version: of the fleet's memory inside it, 0 for none.
        banks: in force.
        commissioning: images declared good; None where there are none (yet).
        refused_fleet: versions of the fleet's memory that this box has refused.
    """

    def __init__(
        self,
        *,
        detector: Detector,
        packed: Mapping[str, npt.NDArray[Any]],
        in_force: MemoryInForce | None,
        store: MemoryStore,
        cameras: Sequence[JudgedCamera],
        settings: MemorySettings,
        notify: Notify,
        announce: Callable[[int, int], None],
        clock: Callable[[], float] = time.monotonic,
        utc: Callable[[], float] = time.time,
    ) -> None:
        layout = detector.bundle.manifest.memory
        assert layout is not None
        self._layout = layout
        self._detector, self._store, self._settings = detector, store, settings
        self._packed = dict(packed)
        self._reference = packed_banks(packed, layout)
        self._cameras = {camera.name: camera for camera in cameras}
        self._notify, self._announce, self._clock, self._utc = notify, announce, clock, utc
        self._drift = DriftBudget(
            DriftSettings(per_week=settings.drift_per_week), () if in_force is None else in_force.drift
        )
        self._unit: float | None = None
        self._candidate: _Candidate | None = None
        self._last = ""
        self._counts = dict.fromkeys(("proposed", "switched", "refused", "replaced"), 0)
        self.version = 0 if in_force is None else in_force.version
        self.fleet_version = 0 if in_force is None else in_force.fleet_version
        self.banks = self._reference if in_force is None else Banks(in_force.local, in_force.fleet)
        status = detector.status
        self._calibration = (
            detector.bundle.calibration(status.engine, status.precision) if in_force is None else in_force.calibration
        )
        self.commissioning: Commissioning | None = None
        self.refused_fleet: set[int] = set()

    @property
    def fleet_room(self) -> int:
        """Rows of the fleet's memory that the bundle has room for."""
        return len(self._packed[self._layout.fleet])

    @property
    def trying(self) -> bool:
        """Whether a candidate is in shadow."""
        return self._candidate is not None

    @property
    def trying_fleet(self) -> int:
        """Version of the fleet's memory in the candidate, 0 for none."""
        return 0 if self._candidate is None else self._candidate.fleet_version

    def propose(
        self, source: str, banks: Banks, *, fleet_version: int, stop: Callable[[], bool] = lambda: False
    ) -> bool:
        """Take a memory into shadow, in place of one that is there.

        Args:
            source: ``local`` or ``fleet``, for people.
            banks: of the new memory.
            fleet_version: of the fleet's memory in it.
            stop: the box is stopping.

        Returns:
            Whether it is in shadow now; else it was refused, and a notice says why.
        """
        self._counts["replaced"] += self._candidate is not None
        self._candidate = None
        self._counts["proposed"] += 1
        try:
            banks.fill(self._packed, self._layout)
            candidate = self._prepare(source, banks, fleet_version, stop)
        except LinewardError as error:
            if not stop():
                self.refuse(source, str(error), fleet_version=fleet_version)
            return False
        self._candidate = candidate
        return True

    def recalibrate(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Make the thresholds of the memory in force anew from the commissioning set, at once and without a trial.

        For images that people declared good at this box: where its line looks unlike the trainer's images, the packed
        thresholds call every frame an anomaly, and no trial would ever find a good one.

        Args:
            stop: the box is stopping.

        Raises:
            LinewardError: thresholds cannot be made, or the detector cannot be switched.
            OSError: the memory cannot be written; nothing has changed then.
        """
        candidate = self._prepare("recalibrated", self.banks, self.fleet_version, stop)
        assert candidate.memory is not None
        self._switch(candidate, candidate.memory)

    def observe(self, frame: Frame, verdict: Verdict, embedding: Rows, *, alarmed: bool) -> None:
        """Let the candidate, where there is one, score a frame that the memory in force has judged.

        Args:
            frame: as captured.
            verdict: of the memory in force.
            embedding: float32 [tiles, L, D] of the frame.
            alarmed: NOK, or part of an anomaly event.

        Raises:
            LinewardError: the embedding does not fit.
        """
        candidate = self._candidate
        if candidate is None or verdict.memory_version != self.version or frame.camera not in candidate.old:
            return
        old, new = candidate.old[frame.camera], candidate.new.get(frame.camera)
        before = old.judge(self._mirror(frame, embedding, self.banks, self.version))
        # Without thresholds of its own the candidate's score is still pooled under the camera's region of interest.
        scored = candidate.version if new is not None else self.version
        after = (new or old).judge(self._mirror(frame, embedding, candidate.banks, scored))
        candidate.trial.take(
            frame.camera,
            alpha=old.threshold.alpha,
            threshold=verdict.threshold,
            engine_score=verdict.score,
            mirror_score=before.score,
            new_score=after.score,
            old_ok=verdict.decision is Decision.OK and not alarmed,
            new_ok=None if new is None else after.decision is Decision.OK,
        )

    def step(self) -> bool:
        """Switch to the candidate, or refuse it, when its time has come.

        Returns:
            Whether another memory is in force now.
        """
        candidate, now = self._candidate, self._clock()
        if candidate is None or candidate.memory is None or now < candidate.retry_at_s:
            return False
        finding = candidate.trial.find(now)
        if finding.outcome is Outcome.REFUSED:
            self._candidate = None
            figures = self._figures(candidate)
            self.refuse(candidate.source, finding.reason, fleet_version=candidate.fleet_version, **figures)
        if finding.outcome is not Outcome.READY or not self._within_drift(candidate):
            return False
        try:
            self._switch(candidate, candidate.memory)
        except (LinewardError, OSError) as error:
            candidate.trouble, candidate.retry_at_s = f"cannot be switched to: {error}", now + RETRY_S
            _LOG.error("memory version %d %s", candidate.version, candidate.trouble)
            return False
        return True

    def refuse(self, source: str, reason: str, *, fleet_version: int, **figures: Any) -> None:  # noqa: ANN401 (JSON)
        """Say once why a memory will not be used; one of the fleet is not asked for again."""
        self._counts["refused"] += 1
        self._last = reason
        if fleet_version != self.fleet_version:
            self.refused_fleet.add(fleet_version)
        self._notify(
            NoticeKind.MEMORY_REFUSED,
            Severity.WARNING,
            f"a {source} memory is refused: {reason}",
            fleet_version=fleet_version,
            **figures,
        )

    def status(self) -> dict[str, Any]:
        """Say how it stands, as JSON values."""
        candidate, now = self._candidate, self._clock()
        return {
            "version": self.version,
            "fleet_version": self.fleet_version,
            "commissioning_images": 0 if self.commissioning is None else len(self.commissioning),
            "candidate": None
            if candidate is None
            else {
                "source": candidate.source,
                "fleet_version": candidate.fleet_version,
                "frames": candidate.trial.frames,
                "waits_for": self._waits_for(candidate, now),
                "cameras": candidate.trial.figures(),
            },
            "last_refusal": self._last,
            "counters": dict(self._counts),
            "drift": {
                "history": [list(entry) for entry in self._drift.history],
                "per_week": self._drift.settings.per_week,
            },
        }

    def _waits_for(self, candidate: _Candidate, now: float) -> str:
        if candidate.memory is None:
            return NO_COMMISSIONING
        return candidate.trouble or candidate.trial.find(now).reason

    def _prepare(self, source: str, banks: Banks, fleet_version: int, stop: Callable[[], bool]) -> _Candidate:
        version = self._store.next_version(self.version)
        candidate = _Candidate(
            source=source,
            banks=banks,
            fleet_version=fleet_version,
            version=version,
            trial=ShadowTrial(
                frames=self._settings.shadow_frames, seconds=self._settings.shadow_s, started_s=self._clock()
            ),
            drift=0.0,
            memory=None,
            # Judges belong to one thread: the trial has its own of the memory in force.
            old={
                name: camera.judge.recalibrated(self._calibration, memory_version=self.version)
                for name, camera in self._cameras.items()
            },
            new={},
        )
        if self.commissioning is None:
            return candidate
        calibration = self.commissioning.scores(banks.rows, self._detector.bundle.manifest, stop=stop)
        candidate.memory = MemoryInForce(
            version=version,
            fleet_version=fleet_version,
            local=banks.local,
            fleet=banks.fleet,
            calibration=calibration,
        )
        candidate.new = {
            name: camera.judge.recalibrated(calibration, memory_version=version)
            for name, camera in self._cameras.items()
        }
        candidate.drift = self._measured_drift(banks)
        return candidate

    def _measured_drift(self, banks: Banks) -> float:
        """How far the box's own rows are from the trainer's; the fleet's have the aggregator's gates behind them."""
        assert self.commissioning is not None
        if self._unit is None:
            embeddings = self.commissioning.embeddings.astype(np.float32)
            self._unit = good_distance(embeddings, np.concatenate(self._reference.rows))
        return measure_drift(banks.local, self._reference.local, self._unit).value

    def _mirror(self, frame: Frame, embedding: Rows, banks: Banks, version: int) -> Prediction:
        manifest = self._detector.bundle.manifest
        found = anomaly_map(embedding, banks.rows, self._layout, manifest.preprocessing, manifest.map_stride)
        return Prediction(found, frame, preprocess_ns=0, inference_ns=0, memory_version=version)

    def _within_drift(self, candidate: _Candidate) -> bool:
        verdict = self._drift.judge(candidate.drift, int(self._utc()))
        if verdict.allowed:
            return True
        if math.isnan(verdict.growth):  # a clock that is wrong is no fault of the memory
            candidate.trouble, candidate.retry_at_s = verdict.reason, self._clock() + RETRY_S
            return False
        self._candidate = None
        self._counts["refused"] += 1
        self._last = verdict.reason
        if candidate.fleet_version != self.fleet_version:
            self.refused_fleet.add(candidate.fleet_version)
        self._notify(
            NoticeKind.MEMORY_DRIFT,
            Severity.ALARM,
            f"a {candidate.source} memory is refused: {verdict.reason}",
            drift=candidate.drift,
            bound=self._drift.settings.per_week,
        )
        return False

    def _switch(self, candidate: _Candidate, memory: MemoryInForce) -> None:
        now = int(self._utc())
        drift = DriftBudget(self._drift.settings, self._drift.history)
        drift.record(candidate.drift, now)
        memory = replace(memory, drift=drift.history)

        def before() -> None:
            # On disk before it judges: a box that is killed here goes on with the version that messages name.
            self._store.write_in_force(memory)
            self._announce(memory.version, memory.fleet_version)
            for name, camera in self._cameras.items():
                camera.install_judge(candidate.new[name])

        state = candidate.banks.fill(self._packed, self._layout)
        self._detector.switch_state(state, memory_version=memory.version, before=before).result()
        old = self.version
        self._candidate, self._drift = None, drift
        self.version, self.fleet_version, self.banks = memory.version, memory.fleet_version, candidate.banks
        self._calibration = memory.calibration
        self._counts["switched"] += 1
        self._notify(
            NoticeKind.MEMORY_SWITCHED,
            Severity.INFO,
            f"memory version {self.version} judges in place of {old}: a {candidate.source} memory, with version "
            f"{self.fleet_version} of the fleet's",
            version=self.version,
            fleet_version=self.fleet_version,
            drift=candidate.drift,
            **self._figures(candidate),
        )

    @staticmethod
    def _figures(candidate: _Candidate) -> dict[str, Any]:
        return {
            "cameras": candidate.trial.figures(),
            "thresholds": {
                name: {"old": old.threshold.value, "new": candidate.new[name].threshold.value}
                for name, old in candidate.old.items()
                if name in candidate.new
            },
        }
