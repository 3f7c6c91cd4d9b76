"""The stations of a box: settings, changes while it runs, commands, health, and the way of verdicts to the disk."""

from __future__ import annotations

import dataclasses
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import ValidationError

import edge.inspection.inspection
from edge.alerts.command_messages import TriggerCommand
from edge.errors import MissingExtraError
from edge.frames import Decision
from edge.health.metrics import Metrics
from edge.inspection.inspection import Inspection, Reports, deciding_view, part_verdict, part_views
from edge.inspection.parts import Part, PartVerdict, Reason, View
from edge.inspection.plan import plan_stations
from edge.inspection.registers import BoxState, Trouble
from edge.inspection.station import Deadlines
from tests.edge.inspection_values import box_settings
from tests.edge.station_bench import EPOCH, MS, Bench, plan, view_verdict
from tests.faults.belt import Verdicts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge.settings import BoxSettings

SOON = 20.0


def camera(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "mode": "triggered", "source": {"kind": "camera", "device": 0}, **changes}


def folder(name: str, **source: Any) -> dict[str, Any]:
    return camera(name, source={"kind": "folder", "path": "/nowhere", **source})


def station(*cameras: str, name: str = "press", **changes: Any) -> dict[str, Any]:
    return {"name": name, "cameras": list(cameras), **changes}


@pytest.fixture
def make() -> Iterator[Callable[..., Inspection]]:
    made: list[Inspection] = []

    def begin(settings: BoxSettings, *, start: bool = True, reporter: Any = None) -> Inspection:
        found = Inspection(settings, reporter=reporter or Verdicts(), publisher=None, metrics=Metrics())
        made.append(found)
        if start:
            found.start()
        return found

    yield begin
    for one in made:
        assert one.stop(SOON)


def test_triggered_camera_that_no_station_names_is_its_own() -> None:
    settings = box_settings(
        [
            camera("a"),
            camera("b"),
            camera("c", timeout_ms=70),
            camera("off", enabled=False),
            camera("s", mode="stream"),
        ],
        stations=[station("b", "a", deadline_ms=300)],
    )

    named, implied = plan_stations(settings)

    assert (named.name, named.own, named.cameras, named.deadline_ns) == ("press", False, ("b", "a"), 300 * MS)
    assert (implied.name, implied.own, implied.cameras, implied.deadline_ns) == ("c", True, ("c",), 70 * MS)


@pytest.mark.parametrize(
    ("cameras", "stations", "words"),
    [
        ([camera("a")], [station("a", trigger="modbus")], "needs a modbus section"),
        ([camera("a"), folder("b")], [station("a", "b")], "files and live cameras cannot be matched"),
        ([folder("a", trigger="software")], [], "put it into a station with trigger mqtt or modbus"),
        ([folder("a", trigger="software")], [station("a")], "set the station's to mqtt or modbus"),
        ([camera("a")], [station("a", "a")], "is named twice"),
        ([camera("a"), camera("b")], [station("c")], "'press': no camera is named 'c'; cameras here: a, b"),
        ([{**folder("a"), "mode": "stream"}], [station("a")], "camera 'a' watches a stream; give it `mode: triggered`"),
        ([camera("a")], [station("a"), station("a", name="two")], "'two': camera 'a' is in another station already"),
        ([camera("a")], [station("a", name="a/b")], "station 'a/b'"),
        ([camera("a")], [station("a", rule="at_least")], "at_least goes with"),
        ([camera("a")], [station("a", rule="at_least", at_least=2)], "2 views cannot be NOK of 1"),
        ([camera("a")], [station("a", trigger="mqtt", delay_ms=500)], "below deadline_ms"),
        ([camera("a")], [station("a", delay_ms=5)], "delay_ms is for the triggers"),
        ([camera("a"), camera("b")], [station("a", "b", match_ms=300)], "at most half of deadline_ms"),
    ],
)
def test_station_that_cannot_work_is_refused_with_the_cure(cameras: Any, stations: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        box_settings(cameras, stations=stations)


def test_stations_that_stay_go_on_and_others_close_their_parts(make: Callable[..., Inspection]) -> None:
    cameras = [camera("a"), camera("b")]
    reporter = Verdicts()
    before = box_settings(
        cameras, stations=[station("a", name="one", trigger="mqtt"), station("b", name="two", trigger="mqtt")]
    )
    inspection = make(before, reporter=reporter)
    kept, changed = inspection.station_of("a"), inspection.station_of("b")
    assert kept is not None
    assert changed is not None
    kept.trigger("kept")
    changed.trigger("closed")

    inspection.change(
        box_settings(
            cameras,
            stations=[
                station("a", name="one", trigger="mqtt"),
                station("b", name="two", trigger="mqtt", deadline_ms=100),
            ],
        )
    )
    reporter.wait_for(1)

    assert inspection.station_of("a") is kept
    assert inspection.station_of("b") is not changed
    assert [(one.part_id, one.reason) for one in reporter.found] == [("closed", "the station is changed")]
    assert kept.status()["open"] == 1
    assert changed.trigger("late") == "the box stops"


def test_command_names_its_station_where_there_are_several(make: Callable[..., Inspection]) -> None:
    cameras = [camera("a"), camera("b"), camera("c")]
    stations = [station("a", name="one", trigger="mqtt"), station("b", name="two", trigger="mqtt")]
    inspection = make(box_settings(cameras, stations=stations))

    def answer(**fields: Any) -> tuple[bool, str]:
        values = inspection._command(TriggerCommand(id="x", **fields))
        assert values["id"] == "x"
        return values["ok"], values["reason"]

    assert answer(part_id="p", station="two") == (True, "")
    assert answer(part_id="p") == (False, "name one of the stations that are triggered over MQTT: one, two")
    assert not answer(part_id="p", station="c")[0]
    assert inspection.stations()[1].status()["open"] == 1


def test_box_without_such_a_station_says_so(make: Callable[..., Inspection]) -> None:
    values = make(box_settings([camera("a")]))._command(TriggerCommand(part_id="p"))
    assert (values["ok"], values["reason"]) == (
        False, "no station of this box is triggered over MQTT; set a station's trigger to mqtt",
    )  # fmt: skip


def test_heartbeat_follows_the_box_and_the_timer(
    make: Callable[..., Inspection], monkeypatch: pytest.MonkeyPatch
) -> None:
    inspection = make(box_settings([camera("a")]))
    well = False
    inspection.follow(lambda: well)

    assert inspection.health() == (BoxState.STARTING, Trouble.BOX)
    well = True
    assert inspection.health() == (BoxState.RUNNING, 0)
    well = False
    assert inspection.health() == (BoxState.UNHEALTHY, Trouble.BOX)
    well = True
    monkeypatch.setattr(Deadlines, "silent_ns", 10**12)
    assert inspection.health() == (BoxState.UNHEALTHY, Trouble.DEADLINES)
    assert "timer of deadlines is silent" in inspection.warnings()[0]
    inspection.request_stop()
    assert inspection.health() == (BoxState.STOPPING, 0)


def test_free_camera_without_a_delay_is_a_warning(make: Callable[..., Inspection]) -> None:
    cameras = [camera("a"), camera("b"), camera("c")]
    stations = [station("a", name="one", trigger="mqtt"), station("b", name="two", trigger="mqtt", delay_ms=80)]

    (text,) = make(box_settings(cameras, stations=stations)).warnings()

    assert text.startswith("one: a runs freely")


def test_timer_is_seen_alive(make: Callable[..., Inspection]) -> None:
    inspection = make(box_settings([camera("a")]))
    inspection.follow(lambda: True)
    assert inspection.health() == (BoxState.RUNNING, 0)
    assert inspection._deadlines.stop(SOON)


def test_box_of_streams_has_nothing_to_say(make: Callable[..., Inspection]) -> None:
    threads = threading.active_count()
    inspection = make(box_settings([camera("a", mode="stream")]))
    assert inspection.status() == {}
    assert inspection.warnings() == []
    assert threading.active_count() == threads


def test_port_that_is_taken_is_a_warning_and_parts_are_judged(make: Callable[..., Inspection]) -> None:
    first = make(box_settings([camera("a")], modbus={"port": 0}))
    port = first.status()["modbus"]["port"]
    stations = [station("a", trigger="mqtt", deadline_ms=30)]
    reporter = Verdicts()
    second = make(box_settings([camera("a")], stations=stations, modbus={"port": port}), reporter=reporter)

    assert any(f":{port} cannot be listened on" in warning for warning in second.warnings())
    assert second.stations()[0].trigger("p") == ""
    reporter.wait_for(1)
    assert [one.part_id for one in reporter.found] == ["p"]


def test_missing_library_is_named_with_its_extra(
    make: Callable[..., Inspection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "edge.inspection.modbus", None)

    make(box_settings([camera("a")]))
    with pytest.raises(MissingExtraError, match=r"lineward\[plc\]"):
        make(box_settings([camera("a")], modbus={"port": 0}))


def test_reports_that_find_no_room_are_counted_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge.inspection.inspection, "MAX_WAITING", 2)
    metrics, gate, made = Metrics(), threading.Event(), list[int]()
    begun = threading.Event()
    reports = Reports(metrics)
    reports.start()
    reports.put(lambda: (begun.set(), gate.wait(SOON)))
    assert begun.wait(SOON)

    for number in range(5):
        reports.put(lambda number=number: made.append(number))
    assert metrics.value("messages_lost") == 3
    gate.set()

    assert reports.stop(SOON)
    assert made == [0, 1]


def test_report_that_fails_does_not_stop_the_others() -> None:
    metrics, made = Metrics(), list[int]()
    reports = Reports(metrics)
    reports.start()
    reports.put(lambda: 1 / 0)
    reports.put(lambda: made.append(1))

    assert reports.flush(SOON)
    assert made == [1]
    assert metrics.value("reports_failed") == 1
    assert "ZeroDivisionError" in reports.failure
    assert reports.stop(SOON)


def decided(decision: Decision, *views: View, code: Reason = Reason.NONE) -> PartVerdict:
    return PartVerdict(Part(7, "p", None, 5 * MS, EPOCH, None), decision, code, "why" if code else "", views, 25 * MS)


def seen(name: str, decision: Decision, *, seq: int = 3, p_value: float = 0.5, score: float = 1.0) -> View:
    verdict = dataclasses.replace(view_verdict(name, seq, decision), p_value=p_value, score=score)
    return View(name, decision, verdict=verdict, calibration_count=40)


def test_figures_are_those_of_the_most_anomalous_view_with_the_parts_decision() -> None:
    ok, nok = Decision.OK, Decision.NOK
    worst = seen("c", nok, p_value=0.01, score=90.0)
    assert deciding_view(decided(nok, seen("a", ok), seen("b", nok, p_value=0.01, score=20.0), worst)) is worst
    nearest = seen("b", ok, p_value=0.1)
    assert deciding_view(decided(ok, seen("a", ok), nearest)) is nearest
    nothing = View("a", Decision.NOT_JUDGED, Reason.NO_FRAME, "no frame")
    assert deciding_view(decided(Decision.NOT_JUDGED, nothing, code=Reason.NO_FRAME)) is None


def test_verdict_of_a_station_names_it_and_what_each_camera_said() -> None:
    bench = Bench(plan(("a", "b")))
    what = decided(Decision.NOK, seen("a", Decision.NOK, seq=12, p_value=0.01), seen("b", Decision.OK, seq=9))

    verdict, judged_by, count = part_verdict(bench.station, what)

    assert (verdict.camera, verdict.camera_seq, verdict.part_id, judged_by, count) == ("station", 7, "p", "a", 40)
    assert verdict.latency_ms["part"] == 20
    assert [(view.camera, view.camera_seq, view.decision.value) for view in part_views(what)] == [
        ("a", 12, "NOK"), ("b", 9, "OK"),
    ]  # fmt: skip


def test_verdict_on_a_part_that_nobody_saw_has_the_time_of_its_trigger() -> None:
    bench = Bench(plan(("a",)))
    nothing = View("a", Decision.NOT_JUDGED, Reason.NO_FRAME, "no frame")

    verdict, judged_by, count = part_verdict(bench.station, decided(Decision.NOT_JUDGED, nothing, code=Reason.NO_FRAME))

    assert (verdict.captured_ns, verdict.captured_at, verdict.reason) == (5 * MS, EPOCH, "why")
    assert (judged_by, count) == ("a", 0)


def test_whoever_triggers_does_not_wait_for_a_camera(make: Callable[..., Inspection]) -> None:
    settings = box_settings(
        [folder("a", trigger="software")], stations=[station("a", trigger="mqtt", deadline_ms=60_000)]
    )
    found = make(settings).station_of("a")
    assert found is not None
    fired, gate, answered = threading.Event(), threading.Event(), list[bool]()

    def hang() -> None:
        fired.set()
        answered.append(gate.wait(SOON))

    found.attach("a", fire=hang)

    assert found.trigger("p") == ""

    assert answered == []
    assert fired.wait(SOON)
    assert found.status()["open"] == 1
    gate.set()
