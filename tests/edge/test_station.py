"""One verdict per part: rules, deadlines, order, room, and frames that find their part or none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edge.errors import CaptureError
from edge.frames import Decision
from edge.inspection.parts import Reason, combine
from tests.edge.station_bench import EPOCH, MS, Bench, plan

if TYPE_CHECKING:
    from edge.inspection.plan import StationPlan

OK, NOK, NOT = Decision.OK, Decision.NOK, Decision.NOT_JUDGED


@pytest.mark.parametrize(
    ("decisions", "nok_views", "expected"),
    [
        ([OK, OK], 1, OK),
        ([OK, NOK], 1, NOK),
        ([NOT, NOK], 1, NOK),
        ([OK, NOT], 1, NOT),
        ([NOK, NOK], 2, NOK),
        ([OK, NOK], 2, OK),
        ([NOK, NOT], 2, NOT),
        ([OK, NOT], 2, NOT),
        ([NOK, NOK, NOT], 2, NOK),
        ([NOK, OK, OK], 2, OK),
        ([NOK, OK, NOT], 2, NOT),
    ],
)
def test_rule(decisions: list[Decision], nok_views: int, expected: Decision) -> None:
    assert combine(decisions, nok_views=nok_views) is expected


def test_part_is_decided_when_its_last_view_is_there() -> None:
    bench = Bench(plan(("a", "b")))
    a, b = bench.frame("a"), bench.frame("b")
    bench.at(20)
    bench.tell("a", a)
    assert bench.decisions == []

    bench.at(30).tell("b", b)

    assert bench.decisions == ["OK"]
    assert bench.verdicts[0].latency_ms == 30
    assert [view.camera for view in bench.verdicts[0].views] == ["a", "b"]


def test_view_that_is_missing_at_the_deadline_makes_not_judged() -> None:
    bench = Bench(plan(("a", "b")))
    bench.tell("a", bench.frame("a"))
    bench.frame("b")

    bench.at(99)
    assert bench.decisions == []
    assert list(bench.timer.due.values()) == [100 * MS]
    bench.at(100)

    assert bench.decisions == ["NOT_JUDGED"]
    assert bench.verdicts[0].code is Reason.DEADLINE
    assert bench.verdicts[0].reason == "b: not judged within 100 ms"


def test_view_after_the_deadline_is_counted_and_changes_nothing_though_the_timer_slept() -> None:
    bench = Bench(plan())
    seq = bench.frame("a")

    bench.at(100, tick=False)
    assert not bench.tell("a", seq, "OK")

    assert bench.decisions == ["NOT_JUDGED"]
    assert bench.counts == {"views_late": 1}


def test_nok_view_stands_though_the_others_are_missing() -> None:
    bench = Bench(plan(("a", "b")))
    bench.tell("a", bench.frame("a"), "NOK")
    bench.at(100)

    assert bench.decisions == ["NOK"]
    assert bench.verdicts[0].code is Reason.NONE


def test_verdicts_come_in_the_order_of_the_triggers() -> None:
    bench = Bench(plan(trigger="mqtt"))
    for part in ("one", "two", "three"):
        bench.station.trigger(part)
        bench.at(bench.now / MS + 1)
    assert bench.frame("a") is not None  # of the part that is newest
    seq = 1
    bench.tell("a", seq, "OK")
    assert bench.decisions == []

    bench.at(100)
    bench.at(101)

    assert [verdict.part.part_id for verdict in bench.verdicts] == ["one", "two", "three"]
    assert bench.decisions == ["NOT_JUDGED", "NOT_JUDGED", "OK"]


def test_part_without_room_is_not_judged_at_once_and_keeps_its_turn() -> None:
    bench = Bench(plan(trigger="mqtt", capacity=2))

    answers = [bench.station.trigger(str(index)) for index in range(3)]
    assert answers[:2] == ["", ""]
    assert "too many parts" in answers[2]
    assert bench.decisions == []
    bench.at(100)

    assert bench.decisions == ["NOT_JUDGED"] * 3
    assert [verdict.code for verdict in bench.verdicts] == [Reason.NO_FRAME, Reason.NO_FRAME, Reason.TOO_MANY]


def test_parts_that_wait_for_their_turn_are_bounded() -> None:
    bench = Bench(plan(trigger="mqtt", capacity=2, deadline_ms=600_000))

    for index in range(5_000):
        bench.station.trigger(str(index))

    assert 5_000 - len(bench.verdicts) <= 2 + 1024
    assert bench.decisions == ["NOT_JUDGED"] * len(bench.verdicts)
    bench.station.close("the box stops")
    assert [verdict.part.number for verdict in bench.verdicts] == list(range(5_000))


def test_camera_that_has_ended_lets_no_part_wait_for_it() -> None:
    bench = Bench(plan(("a", "b")))
    seq = bench.frame("a")
    bench.posts["b"].end("the source has ended")

    bench.at(20).tell("a", seq)

    assert bench.verdicts[0].reason == "b: the source has ended"
    assert bench.verdicts[0].code is Reason.SOURCE_ENDED


def test_frame_that_is_wanted_but_never_judged_ends_with_its_camera() -> None:
    bench = Bench(plan(deadline_ms=None))
    bench.frame("a")

    bench.posts["a"].end("its worker failed")

    assert bench.decisions == ["NOT_JUDGED"]
    assert bench.verdicts[0].reason == "its worker failed"


def test_disabled_camera_never_makes_ok() -> None:
    bench = Bench(plan(("a", "b"), disabled=frozenset({"b"})))
    bench.at(15).tell("a", bench.frame("a"))
    bench.at(40)

    assert bench.verdicts[0].reason == "b: the camera is disabled"


def test_whoever_lost_the_place_of_a_camera_has_no_say() -> None:
    bench = Bench(plan())
    before = bench.posts["a"]
    bench.posts["a"] = bench.station.attach("a", fire=lambda: None)

    assert not before.frame(1, at_ns=0, at=EPOCH, name="")
    before.end("left behind")
    bench.tell("a", bench.frame("a"))

    assert bench.decisions == ["OK"]


def test_files_are_matched_by_their_place_and_named_by_the_first() -> None:
    bench = Bench(plan(("a", "b"), live=False, named_by_file=frozenset({"a", "b"})))
    a = [bench.frame("a", name=f"{index}.png") for index in range(2)]
    b = [bench.frame("b", name=f"{index}.png") for index in range(2)]
    for camera, seqs in (("a", a), ("b", b)):
        bench.tell(camera, seqs[0], "OK")
        bench.tell(camera, seqs[1], "NOK")

    assert bench.decisions == ["OK", "NOK"]
    assert [verdict.part.part_id for verdict in bench.verdicts] == ["0", "1"]


def test_files_that_one_camera_begins_anew_are_not_ok_until_all_do() -> None:
    bench = Bench(plan(("a", "b"), live=False, capacity=16))

    def read(camera: str, files: int) -> list[int | None]:
        return [bench.frame(camera) for _ in range(files)]

    def judge(**seqs: list[int | None]) -> None:
        for camera, found in seqs.items():
            for seq in found:
                bench.tell(camera, seq)

    judge(a=read("a", 2), b=read("b", 2))
    bench.posts["a"] = bench.station.attach("a", fire=lambda: None)
    judge(a=read("a", 1), b=read("b", 1))
    bench.posts["b"] = bench.station.attach("b", fire=lambda: None)
    again = read("b", 2)
    assert again[0] is None  # its first file is that of a part that has its verdict
    judge(b=again[1:], a=read("a", 1))

    assert bench.decisions == ["OK", "OK", "NOT_JUDGED", "OK"]


def test_camera_that_starts_later_misses_no_file() -> None:
    bench = Bench(plan(("a", "b"), live=False))
    first = bench.frame("a")
    bench.station._posts.pop("b")
    bench.posts["b"] = bench.station.attach("b", fire=lambda: None)

    bench.tell("a", first)
    bench.tell("b", bench.frame("b"))

    assert bench.decisions == ["OK"]


def together(bench: Bench, *cameras: str, at: float) -> None:
    """Frames of one part, all OK."""
    bench.at(at)
    for camera in cameras:
        bench.tell(camera, bench.frame(camera))


def test_lost_frame_of_one_camera_costs_its_part_only() -> None:
    bench = Bench(plan(("a", "b")))
    together(bench, "a", "b", at=0)
    together(bench, "a", at=50)
    together(bench, "a", "b", at=120)
    together(bench, "a", "b", at=180)
    bench.at(400)

    assert bench.decisions == ["OK", "NOT_JUDGED", "OK", "OK"]
    assert bench.verdicts[1].reason == "b: no frame within 100 ms"


def test_parts_too_close_for_their_frames_to_be_told_apart_are_never_ok() -> None:
    bench = Bench(plan(("a", "b")))
    together(bench, "a", at=0)  # b lost its frame of this part
    together(bench, "b", at=9)  # which is of the next one
    together(bench, "a", at=12)
    bench.at(400)

    assert set(bench.decisions) == {"NOT_JUDGED"}
    assert bench.verdicts[0].code is Reason.TOO_CLOSE


def test_first_frame_after_the_trigger_is_the_part_and_others_are_skipped() -> None:
    bench = Bench(plan(trigger="mqtt", delay_ns=10 * MS))
    assert bench.frame("a") is None
    bench.at(5).station.trigger("p")
    assert bench.at(14).frame("a") is None

    seq = bench.at(15).frame("a")
    assert bench.at(20).frame("a") is None
    bench.tell("a", seq)

    assert bench.decisions == ["OK"]
    assert bench.counts == {"frames_between_parts": 3}


def test_frame_after_the_next_trigger_is_not_the_part_before() -> None:
    bench = Bench(plan(trigger="mqtt"))
    bench.station.trigger("one")
    bench.at(5).station.trigger("two")

    seq = bench.at(8).frame("a")
    assert seq is not None
    bench.tell("a", seq, "OK")
    assert bench.at(9).frame("a") is None
    bench.at(200)

    assert bench.decisions == ["NOT_JUDGED", "OK"]
    assert bench.verdicts[0].code is Reason.NO_FRAME


def test_frame_after_a_refused_trigger_is_nobodys() -> None:
    bench = Bench(plan(trigger="mqtt", capacity=1))
    bench.station.trigger("one")
    bench.at(5).station.trigger("refused")

    assert bench.at(8).frame("a") is None


def fired(**changes: object) -> StationPlan:
    return plan(("a",), trigger="modbus", fired=frozenset({"a"}), **changes)  # type: ignore[arg-type]


def test_camera_with_a_software_trigger_is_fired_once_per_part() -> None:
    shots: list[str] = []
    bench = Bench(fired(), fire=shots.append)
    bench.station.trigger("one")
    assert shots == ["a"]
    bench.at(5).station.trigger("two")
    assert shots == ["a"]

    bench.at(8).tell("a", bench.frame("a"), "OK")
    bench.at(50).station.trigger("three")
    assert shots == ["a", "a"]
    bench.tell("a", bench.at(55).frame("a"), "OK")
    bench.at(200)

    assert bench.decisions == ["OK", "NOT_JUDGED", "OK"]
    assert bench.verdicts[1].reason == "not triggered: it is busy with the part before"


def test_late_shot_is_never_taken_for_the_next_parts() -> None:
    shots: list[str] = []
    bench = Bench(fired(), fire=shots.append)
    bench.station.trigger("one")
    bench.at(110).station.trigger("two")  # the frame of one has not come
    assert bench.at(120).frame("a") is None
    assert bench.decisions == ["NOT_JUDGED", "NOT_JUDGED"]

    bench.at(130).station.trigger("three")  # it has come by now: the camera is in step
    bench.tell("a", bench.at(140).frame("a"), "OK")
    bench.at(300)

    assert shots == ["a", "a"]
    assert bench.decisions == ["NOT_JUDGED", "NOT_JUDGED", "OK"]
    assert bench.verdicts[1].code is Reason.NOT_FIRED


def test_shot_that_never_comes_blocks_its_camera_for_one_more_deadline() -> None:
    shots: list[str] = []
    bench = Bench(fired(), fire=shots.append)
    bench.station.trigger("one")
    bench.at(199).station.trigger("two")
    bench.at(300).station.trigger("three")

    assert shots == ["a", "a"]
    bench.tell("a", bench.at(310).frame("a"), "OK")
    bench.at(500)
    assert bench.decisions == ["NOT_JUDGED", "NOT_JUDGED", "OK"]


def test_camera_that_cannot_be_fired_is_said_at_once() -> None:
    def refuse(_: str) -> None:
        raise CaptureError("a: it is reconnecting")

    bench = Bench(fired(), fire=refuse)

    assert bench.station.trigger("one") == ""

    assert bench.decisions == ["NOT_JUDGED"]
    assert bench.verdicts[0].code is Reason.NOT_FIRED
    assert bench.counts == {"triggers_failed": 1}


def test_closed_station_takes_no_part() -> None:
    bench = Bench(plan(trigger="mqtt"))
    bench.station.trigger("one")
    bench.station.close("the box stops")

    assert bench.station.trigger("two") == "the box stops"
    assert bench.decisions == ["NOT_JUDGED"]
    assert bench.verdicts[0].code is Reason.STOPPED
