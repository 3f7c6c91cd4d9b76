"""The published messages: what leaves the box, what is read back, and that junk is only ever a typed error."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.alerts.command_messages import AcceptCommand, RecipeCommand, ReplayCommand, ResetCommand, ShipCommand
from edge.alerts.message import (
    Alert,
    CameraState,
    Gap,
    Severity,
    VerdictMessage,
    alert_from_event,
    build,
    encode,
    gap_maker,
    json_schemas,
    mark_late,
    notice_message,
    parse,
    verdict_message,
)
from edge.alerts.topics import Identity, Kind, parse_topic, subscriptions
from edge.alerts.wire import format_utc
from edge.errors import MessageError
from edge.frames import Decision, EventPhase, Region
from tests.alert_values import IDENTITY, JUDGE, event, verdict

EPOCH = "0123456789abcdef"
SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
ALERT_KEYS = [
    "schema", "epoch", "seq", "ts", "site", "box", "uptime_ms", "camera", "camera_seq", "product", "bundle", "memory",
    "adaptation", "score", "threshold", "p_value", "p_value_floor", "regions", "span", "channels", "latency_ms",
    "evidence", "event_id", "phase", "peak_score", "frames", "late",
]  # fmt: skip


def an_alert(**changes: object) -> Alert:
    return alert_from_event(event(**changes), identity=IDENTITY, judge=JUDGE, epoch=EPOCH, seq=3)


def test_alert_has_the_published_keys_and_ends_with_late() -> None:
    payload = json.loads(encode(an_alert()))
    assert list(payload) == ALERT_KEYS
    assert payload["ts"] == "2030-01-02T03:04:05.678900Z"
    assert payload["uptime_ms"] == 5000
    assert payload["bundle"] == {"id": "ab" * 32, "method": "pbas"}
    assert payload["memory"] == {"version": 2, "fleet": 0}
    assert payload["regions"] == [{"x": 1, "y": 2, "w": 3, "h": 4, "area": 10, "peak": 2.5}]


def test_messages_name_moments_threshold_and_subclass_that_judged() -> None:
    versions = {"moments_version": 7, "threshold_version": 3, "subclass": "cloth-2"}
    expected = {"moments": 7, "threshold": 3, "subclass": "cloth-2"}
    assert json.loads(encode(an_alert(**versions)))["adaptation"] == expected
    message = verdict_message(verdict(**versions), identity=IDENTITY, judge=JUDGE, epoch=EPOCH, seq=1)
    assert json.loads(encode(message))["adaptation"] == expected


def test_parse_reads_what_an_earlier_release_has_stored() -> None:
    payload = json.loads(encode(an_alert()))
    del payload["adaptation"]
    alert = parse(IDENTITY.alert("cam"), json.dumps(payload).encode())
    assert isinstance(alert, Alert)
    assert alert == an_alert()
    state = {"schema": "lineward.state/1", "ts": "2030-01-02T03:04:05Z", "site": "plant", "box": "box1"}
    shown = parse(IDENTITY.state("cam"), json.dumps({**state, "camera": "cam", "state": "ok"}).encode())
    assert isinstance(shown, CameraState)
    assert shown.adaptation is None


def test_alert_writes_local_time_as_utc() -> None:
    moment = datetime(2030, 1, 1, 1, 0, tzinfo=timezone(timedelta(hours=2)))
    assert json.loads(encode(an_alert(captured_at=moment)))["ts"] == "2029-12-31T23:00:00.000000Z"


def test_alert_refuses_a_moment_without_zone() -> None:
    with pytest.raises(MessageError, match="ts"):
        an_alert(captured_at=datetime(2030, 1, 1))  # noqa: DTZ001 (the fault under test)
    with pytest.raises(MessageError, match="time zone"):
        format_utc(datetime(2030, 1, 1))  # noqa: DTZ001


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_alert_sends_no_nan_nor_infinity(value: float) -> None:
    region = Region(0, 0, 1, 1, 1, value)
    changes = {"score": value, "peak_score": value, "threshold": value, "p_value": value, "regions": (region,)}
    text = encode(an_alert(**changes, latency_ms={"total": value})).decode()
    assert "NaN" not in text
    assert "Infinity" not in text
    payload = json.loads(text)
    assert payload["score"] is payload["threshold"] is payload["p_value"] is payload["regions"][0]["peak"] is None
    assert payload["latency_ms"] == {}


def test_alert_keeps_the_strongest_regions_only() -> None:
    regions = tuple(Region(i, 0, 1, 1, 1, 100.0 - i) for i in range(100))
    kept = an_alert(regions=regions).regions
    assert [region.x for region in kept] == list(range(64))


def test_verdict_not_judged_says_why() -> None:
    given_up = verdict(decision=Decision.NOT_JUDGED, score=float("nan"), p_value=float("nan"), reason="frame dropped")
    message = verdict_message(given_up, identity=IDENTITY, judge=JUDGE, epoch=EPOCH, seq=1)
    payload = json.loads(encode(message))
    assert payload["decision"] == "NOT_JUDGED"
    assert payload["reason"] == "frame dropped"
    assert payload["score"] is None
    assert isinstance(parse(IDENTITY.verdict("cam"), encode(message)), VerdictMessage)


def test_parse_gives_back_what_was_sent() -> None:
    alert = an_alert(phase=EventPhase.END)
    assert parse(IDENTITY.alert("cam"), encode(alert), prefix="lineward") == alert


def test_mark_late_changes_that_flag_only() -> None:
    alert = an_alert()
    late = parse(IDENTITY.alert("cam"), mark_late(encode(alert)))
    assert late == alert.model_copy(update={"late": True})
    assert mark_late(mark_late(encode(alert))) == mark_late(encode(alert))
    assert mark_late(b"anything else") == b"anything else"


def test_gap_counts_and_refuses_impossible_counts() -> None:
    topic, payload = gap_maker(IDENTITY)(epoch=EPOCH, seq=9, first=2, last=9, dropped=4, reason="outbox full")
    gap = parse(topic, payload)
    assert isinstance(gap, Gap)
    assert (gap.first, gap.last, gap.dropped) == (2, 9, 4)
    assert json.loads(payload)["from"] == 2
    with pytest.raises(MessageError, match="dropped"):
        gap_maker(IDENTITY)(epoch=EPOCH, seq=9, first=2, last=3, dropped=4, reason="outbox full")


def test_parse_refuses_a_payload_that_claims_another_box() -> None:
    with pytest.raises(MessageError, match="claims box"):
        parse(Identity("plant", "box2").alert("cam"), encode(an_alert()))
    with pytest.raises(MessageError, match="claims camera"):
        parse(IDENTITY.alert("other"), encode(an_alert()))


def test_parse_refuses_another_prefix_and_an_oversized_payload() -> None:
    with pytest.raises(MessageError, match="not under"):
        parse(IDENTITY.alert("cam"), encode(an_alert()), prefix="elsewhere")
    with pytest.raises(MessageError, match="limit"):
        parse(IDENTITY.alert("cam"), b" " * 300_000)


@pytest.mark.parametrize(
    "change", [{"extra": 1}, {"score": "high"}, {"seq": 0}, {"phase": "middle"}, {"schema": "x/2"}]
)
def test_parse_refuses_a_wrong_field_by_name(change: dict[str, object]) -> None:
    payload = json.loads(encode(an_alert())) | change
    with pytest.raises(MessageError, match=next(iter(change))):
        parse(IDENTITY.alert("cam"), json.dumps(payload).encode())


def test_parse_refuses_nan_in_a_payload() -> None:
    payload = encode(an_alert()).replace(b'"score":2.5', b'"score":NaN')
    with pytest.raises(MessageError, match="score"):
        parse(IDENTITY.alert("cam"), payload)


KNOWN_TOPICS = [
    IDENTITY.available, IDENTITY.status, IDENTITY.gap, IDENTITY.alert("c"), IDENTITY.verdict("c"), IDENTITY.state("c"),
    IDENTITY.command("replay"), IDENTITY.result("replay"),
]  # fmt: skip
JUNK_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(ALERT_KEYS) | st.text(max_size=5), inner, max_size=6)
    ),
    max_leaves=12,
).map(lambda value: json.dumps(value).encode())


@given(topic=st.sampled_from(KNOWN_TOPICS) | st.text(max_size=40), payload=st.binary(max_size=200) | JUNK_JSON)
def test_parse_raises_only_our_error_for_junk(topic: str, payload: bytes) -> None:
    with contextlib.suppress(MessageError):
        parse(topic, payload)


@given(cut=st.integers(0, 2000), at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_parse_raises_only_our_error_for_damaged_alerts(cut: int, at: int, byte: int) -> None:
    payload = bytearray(encode(an_alert()))
    payload[at % len(payload)] = byte
    with contextlib.suppress(MessageError):
        parse(IDENTITY.alert("cam"), bytes(payload[:cut]))


def test_parse_survives_deep_json() -> None:
    with pytest.raises(MessageError):
        parse(IDENTITY.status, b'{"detail":' * 20_000)


@pytest.mark.parametrize("name", ["", "a/b", "a+", "#", "a\0b", "a\nb", " a", "$SYS", "x" * 201])
def test_topics_refuse_names_that_cannot_be_in_them(name: str) -> None:
    with pytest.raises(MessageError):
        Identity(name, "box")
    with pytest.raises(MessageError):
        Identity("site", name)
    with pytest.raises(MessageError):
        IDENTITY.alert(name)
    with pytest.raises(MessageError):
        Identity("site", "box", prefix=f"ok/{name}/ok" if name != "a/b" else "ok//ok")


def test_topics_reserve_the_command_segment() -> None:
    with pytest.raises(MessageError, match="reserved"):
        IDENTITY.alert("cmd")


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="+#/$", exclude_categories=["C", "Z"]), min_size=1, max_size=9
)


@given(site=NAMES, box=NAMES, camera=NAMES.filter(lambda n: n != "cmd"), prefix=st.lists(NAMES, min_size=1, max_size=3))
def test_topics_come_apart_as_they_were_put_together(site: str, box: str, camera: str, prefix: list[str]) -> None:
    identity = Identity(site, box, prefix="/".join(prefix))
    for topic, kind, leaf in [
        (identity.alert(camera), Kind.ALERT, camera),
        (identity.state(camera), Kind.STATE, camera),
        (identity.status, Kind.STATUS, ""),
        (identity.notice, Kind.NOTICE, ""),
        (identity.gap, Kind.GAP, ""),
        (identity.command("replay"), Kind.COMMAND, "replay"),
        (identity.result("replay"), Kind.RESULT, "replay"),
    ]:
        address = parse_topic(topic)
        assert (address.kind, address.identity, address.leaf) == (kind, identity, leaf)


def test_subscriptions_cover_the_kinds_asked_for() -> None:
    assert subscriptions("p/q", box="b", kinds=frozenset({Kind.ALERT, Kind.STATUS, Kind.COMMAND, Kind.RESULT})) == [
        "p/q/+/b/status", "p/q/+/b/+/alert", "p/q/+/b/cmd/+", "p/q/+/b/cmd/+/result",
    ]  # fmt: skip
    with pytest.raises(MessageError):
        subscriptions("p", site="#", kinds=frozenset({Kind.ALERT}))


def test_replay_command_reads_from_and_to() -> None:
    command = parse(IDENTITY.command("replay"), json.dumps({"epoch": EPOCH, "from": 1, "to": 5}).encode())
    assert command == build(ReplayCommand, epoch=EPOCH, first=1, last=5)


def test_commands_are_read_by_their_verb() -> None:
    accept = parse(IDENTITY.command("accept"), b'{"camera": "cam", "part_id": "p-1", "id": "x"}')
    ship = parse(IDENTITY.command("ship"), b"{}")
    assert accept == build(AcceptCommand, camera="cam", part_id="p-1", id="x")
    assert ship == build(ShipCommand)
    for payload in (b'{"camera": "cam"}', b'{"camera": "cam", "part_id": "p", "camera_seq": 1}', b'{"part_id": "p"}'):
        with pytest.raises(MessageError):
            parse(IDENTITY.command("accept"), payload)
    recipe = parse(IDENTITY.command("recipe"), b'{"camera": "cam", "recipe": "cloth-2"}')
    assert recipe == build(RecipeCommand, camera="cam", recipe="cloth-2")
    assert parse(IDENTITY.command("reset"), b"{}") == build(ResetCommand)
    with pytest.raises(MessageError, match="recipe"):
        parse(IDENTITY.command("recipe"), b'{"camera": "cam"}')
    with pytest.raises(MessageError, match="unknown command"):
        parse(IDENTITY.command("dance"), b"{}")


def test_notice_is_read_back_and_a_kind_that_is_not_known_too() -> None:
    notice = notice_message(
        identity=IDENTITY, epoch=EPOCH, seq=4, kind="memory.drift", severity=Severity.ALARM, text="far" * 1000,
        detail={"drift": 2.5},
    )  # fmt: skip
    payload = encode(notice)
    assert parse(IDENTITY.notice, payload) == notice
    assert len(notice.text) == 1024
    assert mark_late(payload).endswith(b'"late":true}')
    newer = payload.replace(b"memory.drift", b"weather.storm")
    assert parse(IDENTITY.notice, newer).kind == "weather.storm"  # type: ignore[union-attr]
    with pytest.raises(MessageError, match="kind"):
        parse(IDENTITY.notice, payload.replace(b"memory.drift", b"no kind"))


def test_schema_files_are_current() -> None:
    """Write them anew with: python -m edge.alerts.message docs/schemas."""
    stored = {path.name: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    assert stored == json_schemas()
