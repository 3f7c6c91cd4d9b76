"""CameraWorker: one camera's way from frame to message, in a thread of its own.

Every frame is judged or counted. What fails on the way becomes NOT_JUDGED and a counter, never a wrong OK.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from edge.adaptation.guided import GuidedDetector
from edge.camera_status import camera_status, camera_warnings
from edge.capture.building import build_source
from edge.capture.capture import CameraState, Capture, LostFrame
from edge.capture.states import added
from edge.errors import CaptureError, DataError, LinewardError
from edge.frames import Decision, EventPhase, JudgedFrame
from edge.inspection.part_frames import PartFrames
from edge.inspection.parts import Reason
from edge.judgement.events import EventTracker
from edge.judgement.judges import Judges
from edge.judgement.verdicts import Judge
from edge.settings import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge.adaptation.guided import Guide, PendingSight, Seen
    from edge.bundle import Bundle
    from edge.frames import AnomalyEvent, Frame, Prediction, Verdict
    from edge.health.camera_watch import CameraWatch
    from edge.health.metrics import Metrics
    from edge.health.watchdog import Watchdog
    from edge.inference.detector import Detector
    from edge.inspection.station import Station
    from edge.judgement.threshold import RunTimeThreshold
    from edge.reporter import Reporter
    from edge.settings import CameraSettings

    OnVerdict = Callable[[str, Verdict], None]
    Observer = Callable[[JudgedFrame], None]
    KeepEvidence = Callable[[JudgedFrame, Bundle, Mode], JudgedFrame]

_LOG = logging.getLogger(__name__)
POLL_S = 0.2
# A capture that broke down is made anew after this long, doubled each time up to the settings' reconnect_seconds.
FIRST_RESTART_S = 1.0
CAPTURE_STOP_S = 0.5
NS_PER_MS = 1e6
CAPTURE_COUNTS = ("captured", "dropped", "corrupt", "reconnects", "resized", "abandoned", "skipped")
_LOST = frozenset({CameraState.RECONNECTING, CameraState.FAILED, CameraState.ENDED})
_NOT_WELL = frozenset({CameraState.STALLED, CameraState.RECONNECTING, CameraState.FAILED})


class CameraWorker:
    """Takes frames of one camera through inference and judgement to the reporter.

    Args:
        settings: of the camera.
        detector: shared by the cameras.
        judge: of this camera alone; of several products one for each.
        reporter: where verdicts, events and states go.
        metrics: of the box; counters are also kept per camera, see :meth:`status`.
        watchdog: hears a beat per round.
        stop: set when the box stops.
        on_verdict: called with a frame's name and its verdict, in the worker's thread.
        observers: called with each frame that came to its end, in the worker's thread, before it is reported; they
            must return at once and not raise.
        keep_evidence: called before them with the same and the bundle that judged it; returns it with the reference of
            the pictures that will be kept of it, where there are any. Must return at once and not raise.
        station: in triggered mode the one that the camera belongs to; it says which frames are parts, and reports.
        health: watches whether the camera is well, where anybody asked for that.
        follower: says how each frame is to be seen, and which show a product that is unknown; None where nobody follows
            what the camera shows. Whoever hands it in has it hear of frames as an observer.
        number_threshold: counts the changes of the threshold that frames meet; given the camera and the judge.
    """

    def __init__(
        self,
        *,
        settings: CameraSettings,
        detector: Detector,
        judge: Judge | Sequence[Judge],
        reporter: Reporter,
        metrics: Metrics,
        watchdog: Watchdog,
        stop: threading.Event,
        on_verdict: OnVerdict | None = None,
        observers: Sequence[Observer] = (),
        keep_evidence: KeepEvidence | None = None,
        station: Station | None = None,
        health: CameraWatch | None = None,
        number_threshold: Callable[[str, Judge], int] | None = None,
        follower: Guide | None = None,
    ) -> None:
        assert (station is not None) == (settings.mode is Mode.TRIGGERED)
        self.name = settings.name
        self._settings = settings
        self._sight = GuidedDetector(detector, follower)
        self._judges = _judges(judge)
        self._judges_lock = threading.Lock()
        self._observers = tuple(observers) if health is None else (*observers, health.observe)
        self._health = health
        self._number_threshold = number_threshold
        self._keep_evidence = keep_evidence
        self._event_evidence: str | None = None
        self._reporter = reporter
        self._metrics = metrics
        self._watchdog = watchdog
        self._stop = stop
        self._on_verdict = on_verdict
        self._tracker = EventTracker(settings.events)
        self._lost: queue.SimpleQueue[tuple[LostFrame, Verdict | None]] = queue.SimpleQueue()
        self._parts = PartFrames(self.name, station, reporter=reporter, metrics=metrics, judge=lambda: self._judges.met)
        self._generation = 0
        self._capture = self._new_capture()
        self._captured_before = dict.fromkeys(CAPTURE_COUNTS, 0)
        self._samples_before: dict[str, int] = {}
        self._seq_offset = 0
        self._next_seq = 0
        self._restart_s = FIRST_RESTART_S
        self._counts = dict.fromkeys(("judged", "ok", "nok", "not_judged", "failed", "events", "restarts"), 0)
        self._failure = ""
        self._successor: tuple[GuidedDetector, Judges] | None = None
        # A frame that the engine works on while the next one is prepared.
        self._ahead: PendingSight | None = None
        self._ending = threading.Event()
        self._ending_reason = ""
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def done(self) -> bool:
        """Whether no frame will come any more and everything was reported."""
        return self._done.is_set()

    @property
    def failure(self) -> str:
        """Why the last frame could not be judged; empty when it was."""
        return self._failure

    def start(self) -> None:
        """Open the source and begin.

        Raises:
            CaptureError: a file or folder cannot be opened; the camera's state says so too.
        """
        self._reporter.state(self.name, "not_judged", reason="starting")
        # Not before: until now another worker may have held the camera's place.
        self._parts.begin(self._fire)
        try:
            self._capture.start()
        except CaptureError as error:
            self._parts.show_not_judged(str(error))
            self._parts.end(str(error))
            self._done.set()
            raise
        self._thread = threading.Thread(target=self._run, name=f"judge-{self.name}", daemon=True)
        self._thread.start()

    @property
    def judge(self) -> Judge:
        """Whose thresholds the last frame met."""
        return self._judges.met

    @property
    def judges(self) -> tuple[Judge, ...]:
        """Whose thresholds its next frame may meet: one for each product."""
        return self._judges.all

    def install_judge(self, judge: Judge) -> None:
        """Have a judge ready for the memory that will be in force next, or for a product that was added.

        Until then frames meet the present one. May be called from another thread. Judges of memories before the present
        one are forgotten.
        """
        with self._judges_lock:
            to_come = None if self._successor is None else self._successor[1]
            # Made for the detector to come, it would be lost with the judges before.
            of_next = to_come is not None and to_come.met.bundle_id == judge.bundle_id
            (to_come if to_come is not None and of_next else self._judges).install(judge)

    def set_threshold(self, given: RunTimeThreshold | None, product: str = "") -> Judge:
        """Have frames of a product, from the next one on, meet a threshold given at run time, or none; any thread may.

        Returns:
            The judge of the memory in force, with it.

        Raises:
            DataError: no such product is judged.
        """
        with self._judges_lock:
            if self._successor is not None:
                # The detector to come may judge other products; whoever keeps thresholds looks again after it.
                with contextlib.suppress(DataError):
                    self._successor[1].set_threshold(given, product)
            return self._judges.set_threshold(given, product)

    def replace_detector(
        self, detector: Detector, judge: Judge | Sequence[Judge], follower: Guide | None = None
    ) -> None:
        """Have another detector, judge and follower take over between two frames; an event that lasts ends there.

        Scores of two bundles cannot be compared. May be called from another thread, before the start too.
        """
        with self._judges_lock:
            self._successor = (GuidedDetector(detector, follower), _judges(judge))

    def continue_after(self, worker: CameraWorker) -> None:
        """Number frames on from those of a worker of the same camera that has ended; before the start."""
        self._seq_offset = self._next_seq = worker._next_seq

    def end(self, reason: str = "") -> None:
        """Treat the source as ended: the frame in hand is finished, those in the queue are reported as dropped.

        Args:
            reason: why, for the camera's state.
        """
        self._ending_reason = reason
        self._ending.set()

    def join(self, timeout: float) -> bool:
        """Wait for the end of the thread after the stop event was set; returns whether it ended."""
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def status(self) -> dict[str, Any]:
        """What the box's status says of this camera."""
        counters = self._capture.counters
        captured = {name: before + getattr(counters, name) for name, before in self._captured_before.items()}
        return camera_status(
            self._settings, bundle=self._sight.detector.bundle, capture=self._capture, counts=captured | self._counts,
            judges=self._judges, failure=self._failure, health=self._health,
            samples=added(self._samples_before, self._capture.source_counts),
        )  # fmt: skip

    def warnings(self) -> list[str]:
        """What an operator should know of this camera."""
        return camera_warnings(
            self._settings, capture=self._capture, judges=self._judges, failure=self._failure, health=self._health
        )

    def _run(self) -> None:
        try:
            while not (self._stop.is_set() or self._ending.is_set()):
                self._watchdog.beat(self.name)
                frame = self._capture.get(POLL_S if self._ahead is None else 0.0)
                self._succeed()
                self._report_lost()
                if frame is not None:
                    self._take(frame)
                elif self._ahead is not None:
                    self._finish_ahead()
                elif not self._look_after_capture():
                    break
        except Exception:  # noqa: BLE001 (the thread's rim: a defect must not leave a camera silently unjudged)
            _LOG.exception("camera %s: its worker failed", self.name)
            self._counts["failed"] += 1
            self._metrics.count("workers_failed")
            self._failure = "its worker failed, see the log"
        finally:
            self._close()

    def _succeed(self) -> None:
        if self._successor is None:
            return
        # What is judged by the former detector meets the former judge.
        self._finish_ahead()
        with self._judges_lock:
            if self._successor is None:
                return
            sight, judges = self._successor
            self._successor = None
            self._report(self._tracker.finish())
            self._judges = judges
        before, self._sight = self._sight, sight
        self._reporter.judged_by(self.name, sight.detector.bundle)
        if before.detector.bundle.manifest.signal != sight.detector.bundle.manifest.signal:
            self._restart()  # windows are cut as the bundle says

    def _close(self) -> None:
        self._capture.stop(CAPTURE_STOP_S)
        # A driver that returns only now has no say any more.
        self._generation += 1
        self._report_lost()
        self._finish_ahead()
        self._report(self._tracker.finish())
        ended = self._ending_reason or self._failure or self._capture.error or "the source has ended"
        reason = "stopped" if self._stop.is_set() else ended
        self._parts.end(reason, stopped=self._stop.is_set())
        self._parts.show_not_judged(reason)
        self._watchdog.forget(self.name)
        self._done.set()

    def _take(self, frame: Frame) -> None:
        seq = frame.camera_seq + self._seq_offset
        self._next_seq = seq + 1
        frame = dataclasses.replace(frame, camera_seq=seq, part_id=self._parts.part_id(seq))
        if not self._parts.in_time(seq):
            # Its part has its verdict: the time is better spent on the next one.
            self._finish_ahead()
            self._deliver(frame.name, self._parts.too_late(frame), Reason.DEADLINE)
            return
        # Alone it is judged at once, and so is a part; in a stream where others wait, the engine works on it while the
        # next one is prepared.
        several = not self._parts.expected and (self._ahead is not None or self._capture.queued > 0)
        pending = self._begin(frame) if several else None
        self._finish_ahead()
        if pending is None:
            self._conclude(frame, lambda: self._sight.predict(frame))
        self._ahead = pending

    def _begin(self, frame: Frame) -> PendingSight | None:
        try:
            return self._sight.begin(frame)
        except LinewardError:
            # Judging it in its turn meets the same error, and says so.
            return None

    def _finish_ahead(self) -> None:
        pending, self._ahead = self._ahead, None
        if pending is not None:
            self._conclude(pending.frame, pending.result)

    def _conclude(self, frame: Frame, predict: Callable[[], Seen]) -> None:
        triggered = self._parts.expected
        prediction, verdict, code = self._judged(frame, predict)
        if code is Reason.NONE and not self._parts.in_time(frame.camera_seq):
            verdict, code = self._parts.too_late(frame), Reason.DEADLINE
        unwell = "" if self._health is None or code is not Reason.NONE else self._health.veto(frame, verdict.decision)
        if unwell:
            verdict, code = self._judges.met.not_judged(frame, unwell), Reason.CAMERA_UNWELL
        judged = verdict.decision is not Decision.NOT_JUDGED
        if judged:
            stages = verdict.latency_ms
            processing = stages["preprocess"] + stages["inference"] + stages["judgement"]
            self._metrics.observe({**stages, "processing": processing})
            self._restart_s = FIRST_RESTART_S
        events = [] if triggered else self._step(verdict)
        alarmed = verdict.decision is Decision.NOK or self._tracker.active
        done = JudgedFrame(frame, prediction, verdict, tuple(events), alarmed=alarmed)
        if self._keep_evidence is not None:
            done = self._keep_evidence(done, self._sight.detector.bundle, self._settings.mode)
            verdict, events = done.verdict, list(done.events)
        for observer in self._observers:
            observer(done)
        self._deliver(frame.name, verdict, code)
        if not triggered:
            self._report(events)
            self._show_stream(verdict)

    def _step(self, verdict: Verdict) -> list[AnomalyEvent]:
        judge = self._judges.met  # the threshold may be set anew at any moment
        return self._tracker.step(verdict, leave_level=judge.leave_level, enter_level=judge.enter_level)

    def _judged(self, frame: Frame, predict: Callable[[], Seen]) -> tuple[Prediction | None, Verdict, Reason]:
        prediction, refusal = None, ""
        try:
            seen = predict()
            prediction, refusal = seen.prediction, seen.refusal
            if refusal:
                verdict = self._judges.met.not_judged(frame, refusal[:200])
            else:
                verdict = self._numbered(self._judge_of(prediction).judge(prediction))
        except Exception as error:  # noqa: BLE001 (one frame's stage is isolated: the next may be judged again)
            self._counts["failed"] += 1
            self._metrics.count("frames_failed")
            failure = str(error) if isinstance(error, LinewardError) else f"{type(error).__name__}: {error}"
            if failure != self._failure:
                # A person's mistake says what to do; only a defect of ours needs its traceback.
                defect = None if isinstance(error, LinewardError) else error
                _LOG.error("camera %s: a frame could not be judged: %s", self.name, failure, exc_info=defect)
            self._failure = failure
            return prediction, self._judges.met.not_judged(frame, failure[:200]), Reason.FAILED
        if self._failure:
            _LOG.info("camera %s: frames are judged again", self.name)
            self._failure = ""
        if refusal:
            return prediction, verdict, Reason.UNKNOWN_PRODUCT
        return prediction, verdict, Reason.FAILED if verdict.decision is Decision.NOT_JUDGED else Reason.NONE

    def _numbered(self, verdict: Verdict) -> Verdict:
        if self._number_threshold is None:
            return verdict
        # Only now the judge has seen the frame's size, which its threshold may depend on.
        judge = self._judges.met
        judge.threshold_version = self._number_threshold(self.name, judge)
        return dataclasses.replace(verdict, threshold_version=judge.threshold_version)

    def _judge_of(self, prediction: Prediction) -> Judge:
        if self._judges.met.product not in ("", prediction.subclass):
            # Scores of two products cannot be compared.
            self._report(self._tracker.change_product())
        return self._judges.meet(prediction.memory_version, prediction.subclass)

    def _deliver(self, name: str, verdict: Verdict, code: Reason) -> None:
        self._parts.tell(verdict, code)
        self._count_verdict(name, verdict)

    def _count_verdict(self, name: str, verdict: Verdict) -> None:
        self._parts.show(verdict)
        judged = verdict.decision is not Decision.NOT_JUDGED
        self._counts["judged"] += judged
        self._counts[verdict.decision.value.lower()] += 1
        self._metrics.count("judged" if judged else "not_judged")
        if self._on_verdict is not None:
            self._on_verdict(name, verdict)

    def _report(self, events: list[AnomalyEvent]) -> None:
        for event in events:
            self._counts["events"] += event.phase is EventPhase.NEW
            if event.phase is EventPhase.NEW:
                self._event_evidence = event.evidence
            started = time.monotonic_ns()
            event = dataclasses.replace(event, evidence=self._event_evidence)  # noqa: PLW2901 (in every phase the same)
            self._reporter.event(event, calibration_count=self._judges.met.calibration_count)
            self._metrics.observe({"store": (time.monotonic_ns() - started) / NS_PER_MS})
            if event.phase is not EventPhase.UPDATE:
                _LOG.info(
                    "camera %s: anomaly %s, frame %d, score %.6g, peak %.6g, threshold %.6g",
                    self.name, event.phase.value, event.camera_seq, event.score, event.peak_score, event.threshold,
                )  # fmt: skip

    def _show_stream(self, verdict: Verdict) -> None:
        if verdict.decision is Decision.NOT_JUDGED:
            self._reporter.state(self.name, "not_judged", reason=verdict.reason, verdict=verdict)
        elif self._tracker.active:
            self._reporter.state(self.name, "nok", event_id=self._tracker.event_id, verdict=verdict)
        else:
            self._reporter.state(self.name, "ok", verdict=verdict)

    def _report_lost(self) -> None:
        """Count frames that were dropped or unreadable; in triggered mode each of them was a part."""
        with contextlib.suppress(queue.Empty):
            while True:
                lost, verdict = self._lost.get_nowait()
                self._metrics.count(f"frames_{lost.reason}")
                self._next_seq = max(self._next_seq, lost.camera_seq + self._seq_offset + 1)
                if verdict is not None:
                    self._count_verdict(lost.name, verdict)

    def _look_after_capture(self) -> bool:
        """No frame came: show why, end what cannot go on, and restart a camera that broke down.

        Returns:
            False when no frame will ever come.
        """
        state = self._capture.state
        if state in _NOT_WELL:
            self._parts.show_not_judged(self._capture.error or state.value)
        if state in _LOST:
            self._report(self._tracker.finish())
        if not self._capture.finished:
            return True
        if state is not CameraState.FAILED or not self._settings.source.live:
            return False
        # A wait on purpose is not a loop that is stuck.
        self._watchdog.forget(self.name)
        if not self._stop.wait(self._restart_s):
            self._restart_s = min(2 * self._restart_s, max(FIRST_RESTART_S, self._settings.source.reconnect_seconds))
            self._restart()
        return True

    def _restart(self) -> None:
        self._capture.stop(CAPTURE_STOP_S)
        counters = self._capture.counters
        for name in self._captured_before:
            self._captured_before[name] += getattr(counters, name)
        self._samples_before = added(self._samples_before, self._capture.source_counts)
        self._report_lost()
        self._seq_offset = self._next_seq
        self._counts["restarts"] += 1
        self._metrics.count("captures_restarted")
        self._capture = self._new_capture()
        # A live source opens in its own thread, so this cannot raise.
        self._capture.start()

    def _fire(self) -> None:
        # The capture of the moment: a camera that broke down has a new one.
        self._capture.fire()

    def _new_capture(self) -> Capture:
        self._generation += 1
        generation = self._generation

        def wanted(frame: Frame) -> bool:
            # Nobody waits for the frames of a capture that was left behind.
            return generation == self._generation and self._parts.wanted(frame.camera_seq + self._seq_offset, frame)

        def lose(lost: LostFrame) -> None:
            # The station hears of it at once, whatever the worker is busy with: a part waits.
            self._lost.put((lost, self._parts.lost(lost.camera_seq + self._seq_offset, lost)))

        source, layout = self._settings.source, self._sight.detector.bundle.manifest.signal
        build = None if layout is None else functools.partial(build_source, source, layout)
        return Capture(name=self.name, settings=source, make_source=build, on_lost=lose, wanted=wanted)


def _judges(judge: Judge | Sequence[Judge]) -> Judges:
    return Judges((judge,) if isinstance(judge, Judge) else judge)
