"""The reference of evidence on its way from the box's values to a person's screen."""

from __future__ import annotations

import json

import pytest

from edge.alerts.command_messages import EvidenceCommand
from edge.alerts.line import line_of
from edge.alerts.message import alert_from_event, build, encode, parse, verdict_message
from edge.errors import MessageError
from tests.alert_values import IDENTITY, JUDGE, event, verdict

REFERENCE = "cam/20300102/" + "0" * 31 + "1"
NUMBER = {"identity": IDENTITY, "judge": JUDGE, "epoch": "00000000000000ff", "seq": 1}


@pytest.mark.parametrize("reference", [REFERENCE, None])
def test_alerts_and_verdicts_carry_it(reference: str | None) -> None:
    for message in (
        alert_from_event(event(evidence=reference), **NUMBER),
        verdict_message(verdict(evidence=reference), **NUMBER),
    ):
        assert json.loads(encode(message))["evidence"] == reference
        assert (f"evidence={REFERENCE}" in line_of("topic", message)) == (reference is not None)


def test_a_question_is_read_as_documented() -> None:
    topic = IDENTITY.command("evidence")
    asked = parse(topic, json.dumps({"reference": REFERENCE, "file": "frame.jpg", "offset": 5, "id": "a"}).encode())
    assert asked == build(EvidenceCommand, reference=REFERENCE, file="frame.jpg", offset=5, id="a")


@pytest.mark.parametrize(
    "fields", [{"file": "frame.jpg"}, {"offset": 7}, {"day": "today"}, {"limit": 0}, {"reference": "x" * 257}]
)
def test_questions_that_make_no_sense_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(MessageError, match="EvidenceCommand"):
        parse(IDENTITY.command("evidence"), json.dumps(fields).encode())
