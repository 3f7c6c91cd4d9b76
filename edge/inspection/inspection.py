"""Inspection: all stations of a box, their triggers, and the way of each verdict to the PLC and to the outbox.

Knows who is told what and in which thread; it decides nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import queue
import threading
import time
from typing import TYPE_CHECKING, Any

from edge.alerts.command_messages import TriggerCommand
from edge.alerts.message import PartView
from edge.alerts.topics import TRIGGER_VERB
from edge.errors import MissingExtraError
from edge.frames import Decision, Verdict
from edge.inspection.plan import StationPlan, plan_stations
from edge.inspection.registers import BoxState, Registers, Trouble
from edge.inspection.settings import TriggerSource
from edge.inspection.station import Deadlines, Station

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.alerts.message import AnyMessage
    from edge.alerts.publisher import Publisher
    from edge.health.metrics import Metrics
    from edge.inspection.modbus import ModbusServer
    from edge.inspection.parts import PartVerdict, View
    from edge.reporter import Reporter
    from edge.settings import BoxSettings

_LOG = logging.getLogger(__name__)
# Verdicts that wait for the disk. At 100 parts per second this bridges 40 s.
MAX_WAITING = 4096
# A timer that was not seen for so long is no guard of deadlines any more.
SILENT_S = 2.0
FLUSH_S = 0.5
_NS = 1_000_000_000
_STOPPING = "the box stops"


class Inspection:
    """The stations of a box.

    Args:
        settings: of the box.
        reporter: takes verdicts and states.
        publisher: brings the command ``trigger``; None where there is none.
        metrics: of the box.

    Raises:
        MissingExtraError: there is a modbus section, but its library is not installed.
    """

    name = "inspection"

    def __init__(
        self, settings: BoxSettings, *, reporter: Reporter, publisher: Publisher | None, metrics: Metrics
    ) -> None:
        self._reporter = reporter
        self._metrics = metrics
        self._deadlines = Deadlines()
        self._lock = threading.Lock()
        self._stations: dict[str, Station] = {}
        self._reports = Reports(metrics)
        self._registers = Registers()
        self._modbus = None if settings.modbus is None else self._server(settings)
        self._healthy: Callable[[], bool] = lambda: False
        self._seen_healthy = False
        self._started = False
        self._stopping = False
        if publisher is not None:
            publisher.on_command(TRIGGER_VERB, self._command)
        self.change(settings)

    def change(self, settings: BoxSettings) -> None:
        """Take over other stations; those whose plan is the same go on, open parts of others are closed.

        Cameras of a station that is changed must be started anew: their places are gone.
        """
        plans = plan_stations(settings)
        with self._lock:
            before = self._stations
            after = {
                plan.name: before[plan.name]
                if plan.name in before and before[plan.name].plan == plan
                else self._new_station(plan)
                for plan in plans
            }
            self._stations = after
        for name, station in before.items():
            if after.get(name) is not station:
                station.close("the station is changed")
        self._registers.lay_out([(name, _register_trigger(station)) for name, station in after.items()])
        if self._started:
            self._begin()
        for station in after.values():
            if station is not before.get(station.plan.name) and not station.plan.own:
                self._reporter.state(station.plan.name, "not_judged", reason="starting")

    @property
    def registers(self) -> Registers:
        """What a PLC reads and writes, whether there is a server for it or not."""
        return self._registers

    def station_of(self, camera: str) -> Station | None:
        """The station that a camera belongs to; None for a camera that is not triggered."""
        with self._lock:
            return next((one for one in self._stations.values() if camera in one.plan.cameras), None)

    def stations(self) -> tuple[Station, ...]:
        """All of them, in the order of their registers."""
        with self._lock:
            return tuple(self._stations.values())

    def start(self) -> None:
        """Begin to watch deadlines and to serve registers, as soon as the server's address is free."""
        self._started = True
        self._begin()
        if self._modbus is not None:
            self._modbus.start()

    def follow(self, healthy: Callable[[], bool]) -> None:
        """Have the PLC's heartbeat follow the box: it stands still unless ``healthy``, asked in the server's thread."""
        self._healthy = healthy

    def request_stop(self) -> None:
        """Take no more triggers; parts in hand are judged until their cameras have ended."""
        self._stopping = True

    def flush(self, timeout: float = FLUSH_S) -> bool:
        """Wait until the verdicts that were decided so far are handed to the reporter; whether that was in time."""
        return self._reports.flush(timeout)

    def stop(self, timeout: float) -> bool:
        """Close open parts as NOT_JUDGED and end; False where that takes longer than ``timeout`` seconds."""
        until = time.monotonic() + timeout
        self.request_stop()
        for station in self.stations():
            station.close(_STOPPING)
            if not station.plan.own:
                state = functools.partial(self._reporter.state, station.plan.name, "not_judged", reason="stopped")
                self._reports.put(state)
        done = self._reports.stop(max(0.0, until - time.monotonic()))
        done &= self._deadlines.stop(max(0.05, until - time.monotonic()))
        if self._modbus is not None:
            done &= self._modbus.stop(max(0.05, until - time.monotonic()))
        return done

    def status(self) -> dict[str, Any]:
        """What the box's status says of the stations and of the PLC's server."""
        stations = {station.plan.name: station.status() for station in self.stations()}
        if not stations and self._modbus is None:
            return {}
        served = {} if self._modbus is None else {"modbus": self._modbus.status()}
        return {"stations": stations, "reports_waiting": self._reports.waiting, **served}

    def warnings(self) -> list[str]:
        """What an operator should know of them."""
        found = []
        if self._reports.dropped:
            found.append(f"inspection: {self._reports.dropped} verdicts were not stored, the disk is too slow")
        if self._reports.failure:
            found.append(f"inspection: a verdict could not be reported: {self._reports.failure}")
        if self._deadlines.silent_ns > SILENT_S * _NS and not self._stopping:
            found.append("inspection: the timer of deadlines is silent; restart the box")
        found += [
            f"{plan.name}: {', '.join(sorted(plan.free))} runs freely, and delay_ms is 0: the first frame after a "
            "trigger may show the part before; set delay_ms to the camera's latency"
            for plan in (station.plan for station in self.stations())
            if plan.free and not plan.delay_ns and plan.trigger is not TriggerSource.FRAME
        ]
        if self._modbus is not None:
            found += self._modbus.warnings()
        return found

    def health(self) -> tuple[BoxState, int]:
        """State of the box and bits of :class:`~edge.inspection.registers.Trouble`, for the heartbeat."""
        if self._stopping:
            return BoxState.STOPPING, 0
        trouble = 0
        if not self._healthy():
            trouble |= Trouble.BOX
        if self._deadlines.silent_ns > SILENT_S * _NS:
            trouble |= Trouble.DEADLINES
        if not trouble:
            self._seen_healthy = True
            return BoxState.RUNNING, 0
        return BoxState.UNHEALTHY if self._seen_healthy else BoxState.STARTING, trouble

    def _begin(self) -> None:
        """A box without stations needs no threads for them."""
        if self.stations():
            self._deadlines.start()
            self._reports.start()

    def _server(self, settings: BoxSettings) -> ModbusServer:
        assert settings.modbus is not None
        try:
            from edge.inspection.modbus import ModbusServer  # noqa: PLC0415 (an optional library)
        except ImportError as error:
            raise MissingExtraError(
                "modbus: pymodbus is not installed; install the extra with `pip install 'lineward[plc]'`"
            ) from error
        return ModbusServer(settings.modbus, registers=self._registers, health=self.health)

    def _new_station(self, plan: StationPlan) -> Station:
        return Station(plan, deadlines=self._deadlines, sink=self._decided, count=self._metrics.count, flush=self.flush)

    def _command(self, command: AnyMessage) -> dict[str, Any]:
        """The command ``trigger``, in the publisher's thread."""
        assert isinstance(command, TriggerCommand)
        ours = [one for one in self.stations() if one.plan.trigger is TriggerSource.MQTT]
        names = ", ".join(one.plan.name for one in ours)
        chosen = [one for one in ours if command.station in (None, one.plan.name)]
        if len(chosen) == 1:
            reason = chosen[0].trigger(command.part_id)
        elif not ours:
            reason = "no station of this box is triggered over MQTT; set a station's trigger to mqtt"
        else:
            reason = f"name one of the stations that are triggered over MQTT: {names}"
        return {"ok": not reason, "id": command.id, "count": int(not reason), "reason": reason}

    def _decided(self, station: Station, verdict: PartVerdict) -> None:
        """A verdict's first steps, under its station's lock: to the PLC at once, to the disk by the reports' thread."""
        view = deciding_view(verdict)
        score = math.nan if view is None or view.verdict is None else view.verdict.score
        self._registers.verdict(station.plan.name, verdict, score)
        self._reports.put(functools.partial(self._report, station, verdict))

    def _report(self, station: Station, decided: PartVerdict) -> None:
        verdict, judged_by, calibration_count = part_verdict(station, decided)
        started = time.monotonic_ns()
        self._reporter.verdict(
            verdict, calibration_count=calibration_count, views=part_views(decided), judged_by=judged_by
        )
        self._metrics.observe({"store": (time.monotonic_ns() - started) / 1e6, "part": decided.latency_ms})
        self._metrics.count("parts")
        self._metrics.count(f"parts_{decided.decision.value.lower()}")
        self._reporter.state(
            station.plan.name,
            decided.decision.value.lower(),
            reason=verdict.reason,
            part_id=verdict.part_id,
            verdict=verdict,
        )


class Reports:
    """A thread that hands verdicts to the reporter in order, so that no camera and no deadline waits for a disk.

    Args:
        metrics: counts ``messages_lost`` for what has no room, and ``reports_failed``.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_WAITING)
        self._thread = threading.Thread(target=self._run, name="inspection-reports", daemon=True)
        self._stopped = False
        self.dropped = 0
        self.failure = ""

    @property
    def waiting(self) -> int:
        """Reports that are not made yet."""
        return self._queue.qsize()

    def start(self) -> None:
        """Begin, or go on."""
        if self._thread.ident is None:
            self._thread.start()

    def put(self, report: Callable[[], None]) -> None:
        """Have a report made; never waits."""
        try:
            self._queue.put_nowait(report)
        except queue.Full:
            if not self.dropped:
                _LOG.error("verdicts are being lost: the disk is too slow for them")
            self.dropped += 1
            self._metrics.count("messages_lost")

    def flush(self, timeout: float) -> bool:
        """Wait until all reports that were put so far are made."""
        made = threading.Event()
        if self._thread.ident is None or not self._thread.is_alive():
            return self._queue.empty()
        self.put(made.set)
        return made.wait(timeout)

    def stop(self, timeout: float) -> bool:
        """Make what is waiting and end; returns whether that was done in time. May be called without a start."""
        if self._thread.ident is None:
            return True
        if not self._stopped:
            self._stopped = True
            try:
                self._queue.put(None, timeout=timeout)
            except queue.Full:
                return False
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (report := self._queue.get()) is not None:
            try:
                report()
            except Exception as error:  # noqa: BLE001, PERF203 (the thread's rim: one bad report must not stop the others)
                _LOG.exception("a verdict could not be reported")
                self.failure = f"{type(error).__name__}: {error}"[:200]
                self._metrics.count("reports_failed")


def deciding_view(verdict: PartVerdict) -> View | None:
    """The view whose figures stand for the part: the most anomalous one that has the part's decision.

    For a part that was not judged, the first view that has its reason; None where no view has any figures.
    """
    found = [view for view in verdict.views if view.verdict is not None and view.decision is verdict.decision]
    if verdict.decision is Decision.NOT_JUDGED:
        return next((view for view in found if view.code is verdict.code), None)
    return min(found, key=lambda view: (view.verdict.p_value, -_excess(view.verdict)), default=None)  # type: ignore[union-attr,arg-type]  # filtered


def _excess(verdict: Verdict) -> float:
    return (verdict.score - verdict.threshold) / (abs(verdict.threshold) or 1.0)


def part_verdict(station: Station, decided: PartVerdict) -> tuple[Verdict, str, int]:
    """The verdict on a part as it is published, whose bundle judged it, and the scores behind its p-value."""
    plan, part, view = station.plan, decided.part, deciding_view(decided)
    camera = plan.cameras[0] if view is None else view.camera
    count = 0
    if view is not None and view.verdict is not None:
        figures, count = view.verdict, view.calibration_count
    else:
        figures, count = _nothing_seen(station, decided)
    return (
        dataclasses.replace(
            figures,
            decision=decided.decision,
            camera=plan.name,
            camera_seq=figures.camera_seq if plan.own else part.number,
            part_id=part.part_id,
            reason=decided.reason,
            latency_ms={**figures.latency_ms, "part": decided.latency_ms},
        ),
        camera,
        count,
    )


def _nothing_seen(station: Station, decided: PartVerdict) -> tuple[Verdict, int]:
    """Figures of a part that no view speaks for: the threshold that it would have met."""
    part, judge = decided.part, station.judge_of(station.plan.cameras[0])
    nothing = Verdict(
        decision=Decision.NOT_JUDGED,
        score=math.nan,
        threshold=math.nan if judge is None else judge.threshold.value,
        p_value=math.nan,
        camera=station.plan.cameras[0],
        camera_seq=part.number,
        captured_ns=part.triggered_ns,
        captured_at=part.triggered_at,
        memory_version=0 if judge is None else judge.memory_version,
        threshold_version=0 if judge is None else judge.threshold_version,
    )
    return nothing, 0 if judge is None else judge.calibration_count


def part_views(decided: PartVerdict) -> tuple[PartView, ...]:
    """What each camera said, as it is published."""
    return tuple(
        PartView(
            camera=view.camera,
            camera_seq=None if view.verdict is None else view.verdict.camera_seq,
            decision=view.decision,
            score=None if view.verdict is None else _finite(view.verdict.score),
            threshold=None if view.verdict is None else _finite(view.verdict.threshold),
            reason=view.reason[:256],
        )
        for view in decided.views
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _register_trigger(station: Station) -> Callable[[int, int], str] | None:
    if station.plan.trigger is not TriggerSource.MODBUS:
        return None
    return lambda number, counter: station.trigger(str(number), (number, counter))
