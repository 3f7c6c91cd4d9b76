"""What a person who watches is told of each message, in one line."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest

from edge.alerts.line import line_of, sources_of
from edge.alerts.message import (
    CameraState,
    PartView,
    Severity,
    alert_from_event,
    notice_message,
    verdict_message,
)
from edge.frames import Decision, EventPhase, Region
from tests.alert_values import IDENTITY, JUDGE, event, verdict
from tests.edge.tiny_senses import signal_layout

NUMBER = {"identity": IDENTITY, "judge": JUDGE, "epoch": "00000000000000ff", "seq": 1}
VIEWS = tuple(
    PartView(camera=name, camera_seq=7, decision=decision, score=2.5, threshold=1.0)
    for name, decision in (("left", Decision.OK), ("right", Decision.NOK))
)


def test_alert_says_its_product_and_what_it_was_judged_as() -> None:
    assert " product=bolt phase=new " in line_of("t", alert_from_event(event(), **NUMBER))
    line = line_of("t", alert_from_event(event(subclass="blue"), **NUMBER))
    assert line.startswith("t product=bolt subclass=blue phase=new ")
    assert "regions=1" in line
    assert not {"at", "channels", "views"} & {part.partition("=")[0] for part in line.split()}


def test_alert_of_a_signal_says_when_and_in_which_channels() -> None:
    judge = JUDGE.model_copy(update={"signal": signal_layout()})  # 200 samples at 400 Hz
    last = datetime(2030, 1, 2, 3, 4, 5, 497500, tzinfo=timezone.utc)
    found = event(captured_at=last, regions=(Region(40, 0, 20, 1, 20, 2.5), Region(50, 1, 50, 1, 50, 2.0)))
    line = line_of("t", alert_from_event(found, **NUMBER | {"judge": judge}))
    assert "at=2030-01-02T03:04:05.100000Z seconds=0.15 channels=drive end,fan end" in line
    over = alert_from_event(event(phase=EventPhase.END, captured_at=last, regions=()), **NUMBER | {"judge": judge})
    assert line_of("t", over).endswith("at=2030-01-02T03:04:05.000000Z seconds=0.5")


def test_verdict_of_a_station_says_what_each_camera_found() -> None:
    found = verdict(camera="gate")
    message = verdict_message(found, **NUMBER, views=VIEWS, decided_by="right")
    assert "views=left:OK,right:NOK decided_by=right" in line_of("t", message)
    assert sources_of(message) == {"gate", "left", "right"}


def test_verdict_of_a_camera_alone_does_not_say_so_twice() -> None:
    view = VIEWS[0].model_copy(update={"camera": "cam"})
    line = line_of("t", verdict_message(verdict(), **NUMBER, views=(view,), decided_by="cam"))
    assert " decision=NOK part_id=p-1 " in line
    assert "views=" not in line


@pytest.mark.parametrize(("late", "ending"), [(False, "threshold=1"), (True, "late")])
def test_late_is_said_last(*, late: bool, ending: str) -> None:
    message = verdict_message(verdict(p_value=float("nan")), **NUMBER).model_copy(update={"late": late})
    assert line_of("t", message).endswith(ending)


def test_other_messages_say_what_they_have() -> None:
    text = {"kind": "bundle.confirmed", "severity": Severity.INFO, "text": "it passed", "detail": {}}
    numbers = {name: NUMBER[name] for name in ("identity", "epoch", "seq")}
    notice = notice_message(**numbers, **text)
    assert line_of("t", notice) == "t kind=bundle.confirmed severity=info text=it passed"
    assert sources_of(notice) == set()
    state = CameraState.model_validate(
        {"schema": "lineward.state/1", "ts": notice.ts, "site": "s", "box": "b", "camera": "cam", "state": "not_judged",
         "reason": "starting"}
    )  # fmt: skip
    assert line_of("t", state) == "t state=not_judged reason=starting"
    assert sources_of(state) == {"cam"}
