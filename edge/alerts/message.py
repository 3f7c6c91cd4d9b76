"""The published messages: their models, how they are made from the box's values, and how a payload is read.

With the models of commands these are the source of docs/schemas. It must not know how messages are stored or sent.
"""

from __future__ import annotations

import json
import math
import sys
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from pydantic import Field, JsonValue, ValidationError, model_validator

from edge.alerts.command_messages import COMMANDS, Command, CommandResult
from edge.alerts.span import MAX_CHANNELS, Span, channels_of, span_of
from edge.alerts.topics import Address, Identity, Kind, parse_topic
from edge.alerts.wire import Count, Epoch, Message, Milliseconds, Probability, Seq, Utc
from edge.errors import MessageError
from edge.frames import Decision, EventPhase  # noqa: TC001 (pydantic needs them at run time)
from edge.inputs import SignalLayout  # noqa: TC001 (as above)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edge.frames import AnomalyEvent, Region, Verdict

# An alert is about 1 kB. The limit bounds what a reader has to hold, whatever a broker passes on.
MAX_PAYLOAD_BYTES = 262_144
MAX_REGIONS = 64
# Every durable message ends so: flagging one late is a change of its last bytes, without parsing it.
_ON_TIME = b'"late":false}'
_LATE = b'"late":true}'


class BundleRef(Message):
    """Which bundle judged."""

    id: str = Field(min_length=1, max_length=64)
    method: str = Field(min_length=1, max_length=64)


class MemoryRef(Message):
    """Which memory judged."""

    version: Count = Field(0, description="Counts this box's switches since the bundle was packed (0).")
    fleet: Count = Field(0, description="Version of the fleet's memory inside it; 0 for the one that was packed.")


class AdaptationRef(Message):
    """What else judged: the moments that the frame was corrected by, the camera's threshold, the sub-class."""

    moments: Count = Field(0, description="Counts the camera's snapshots of moments; 0: nothing was corrected.")
    threshold: Count = Field(0, description="Counts the changes of the camera's threshold since its first one (0).")
    subclass: str = Field("", max_length=200, description="Whose expert judged; empty where the bundle has none.")


class RegionMessage(Message):
    """A region above the threshold, in pixels of the camera frame; ``peak`` is its highest raw map value.

    Of a signal x and w are in samples of the window, y and h in channels.
    """

    x: int
    y: int
    w: int = Field(ge=1)
    h: int = Field(ge=1)
    area: int = Field(ge=1)
    peak: float | None


class _Numbered(Message):
    """What every durable message carries. (site, box, epoch, seq) is its identity: drop duplicates by it."""

    schema_: str = Field(alias="schema")

    epoch: Epoch
    seq: Seq
    ts: Utc
    site: str
    box: str


class _Judged(_Numbered):
    uptime_ms: Count = Field(description="Monotonic clock of the box at capture, milliseconds since its boot.")
    camera: str
    camera_seq: Count
    product: str
    bundle: BundleRef
    memory: MemoryRef
    adaptation: AdaptationRef = AdaptationRef()
    score: float | None = Field(description="Raw pooled score; null when there is none.")
    threshold: float | None = Field(description="Raw threshold in force.")
    p_value: Probability | None = Field(description="(1 + calibration scores >= score) / (n + 1).")
    p_value_floor: Probability = Field(description="1 / (n + 1), the smallest p_value that n scores can give.")
    regions: tuple[RegionMessage, ...] = Field(default=(), max_length=MAX_REGIONS)
    span: Span | None = Field(None, description="Of a signal: when in its window; null of an image or depth map.")
    channels: tuple[str, ...] = Field(
        (), max_length=MAX_CHANNELS, description="Of a signal: names of the channels that the regions are in."
    )
    latency_ms: Milliseconds = Field(default_factory=dict)
    evidence: str | None = Field(None, max_length=1024, description="Where pictures are kept; never the pictures.")


class Alert(_Judged):
    """One phase of an anomaly event in a stream of frames."""

    schema_: Literal["lineward.alert/1"] = Field("lineward.alert/1", alias="schema")
    event_id: str = Field(pattern=r"^[0-9a-f]{32}$")
    phase: EventPhase
    peak_score: float | None
    frames: int = Field(ge=1, description="Frames judged since the event began, this one included.")
    late: bool = Field(False, description="Sent after the connection in which it was made.")


class PartView(Message):
    """What one camera of a station says of a part."""

    camera: str
    camera_seq: Count | None = Field(description="Frame number of this camera; null where no frame came.")
    decision: Decision
    score: float | None
    threshold: float | None
    reason: str = Field("", max_length=256, description="Why the view was not judged; else empty.")


class VerdictMessage(_Judged):
    """The verdict on one part, in triggered mode."""

    schema_: Literal["lineward.verdict/1"] = Field("lineward.verdict/1", alias="schema")
    decision: Decision
    part_id: str | None
    reason: str = Field("", max_length=1024, description="Why a part was not judged; else empty.")
    decided_by: str | None = Field(None, description="Camera whose score, threshold, regions and evidence these are.")
    views: tuple[PartView, ...] = Field((), description="One per camera of the station, in its order.")
    late: bool = Field(False, description="Sent after the connection in which it was made.")


class Gap(_Numbered):
    """Rows that the box dropped on purpose: ``dropped`` of the numbers ``from`` .. ``to`` will never come."""

    schema_: Literal["lineward.gap/1"] = Field("lineward.gap/1", alias="schema")
    first: Seq = Field(alias="from")
    last: Seq = Field(alias="to")
    dropped: int = Field(ge=1)
    reason: Literal["outbox full", "damaged row"]
    late: bool = False

    @model_validator(mode="after")
    def _counts_fit(self) -> Gap:
        if not self.first <= self.last or self.dropped > self.last - self.first + 1:
            raise ValueError("from <= to and dropped <= to - from + 1 do not hold")
        return self


class Severity(str, Enum):
    """How soon a person should read a notice: at leisure, in this shift, now."""

    INFO = "info"
    WARNING = "warning"
    ALARM = "alarm"


class NoticeKind(str, Enum):
    """What the box itself gives notice of; readers must expect kinds that they do not know."""

    MEMORY_SWITCHED = "memory.switched"
    MEMORY_REFUSED = "memory.refused"
    MEMORY_DRIFT = "memory.drift"
    MEMORY_DAMAGED = "memory.damaged"
    MEMORY_FAILED = "memory.failed"
    FEDERATION_REFUSED = "federation.refused"
    FEDERATION_DAMAGED = "federation.damaged"
    OUTBOX_DAMAGED = "outbox.damaged"
    THRESHOLD_SET = "threshold.set"
    THRESHOLD_IGNORED = "threshold.ignored"
    THRESHOLD_DAMAGED = "threshold.damaged"
    ADAPTATION_FROZEN = "adaptation.frozen"
    ADAPTATION_THAWED = "adaptation.thawed"
    ADAPTATION_DRIFT = "adaptation.drift"
    ADAPTATION_BOUND = "adaptation.bound"
    ADAPTATION_RESET = "adaptation.reset"
    ADAPTATION_DAMAGED = "adaptation.damaged"
    PRODUCT_UNKNOWN = "product.unknown"
    PRODUCT_REFUSED = "product.refused"
    RECIPE_SET = "recipe.set"
    RECIPE_REFUSED = "recipe.refused"
    RECIPE_UNKNOWN = "recipe.unknown"
    RECIPE_DAMAGED = "recipe.damaged"
    CAMERA_FROZEN = "camera.frozen"
    CAMERA_DARK = "camera.dark"
    CAMERA_OVEREXPOSED = "camera.overexposed"
    CAMERA_BLURRED = "camera.blurred"
    CAMERA_MOVED = "camera.moved"
    CAMERA_SLOW = "camera.slow"
    CAMERA_BASELINE = "camera.baseline"
    BUNDLE_ON_TRIAL = "bundle.on_trial"
    BUNDLE_CONFIRMED = "bundle.confirmed"
    BUNDLE_TAKEN_BACK = "bundle.taken_back"
    SETTINGS_REFUSED = "settings.refused"
    ENGINE_STALLED = "engine.stalled"


class Notice(_Numbered):
    """What a person should know of the box itself, once per occasion; what lasts is in the status."""

    schema_: Literal["lineward.notice/1"] = Field("lineward.notice/1", alias="schema")
    kind: str = Field(pattern=r"^[a-z]+(\.[a-z_]+)+$", max_length=64)
    severity: Severity
    text: str = Field(min_length=1, max_length=1024, description="For people.")
    detail: dict[str, JsonValue] = Field(default_factory=dict, description="The figures behind it.")
    late: bool = Field(False, description="Sent after the connection in which it was made.")


class OutboxStatus(Message):
    """The outbox as the status shows it."""

    epoch: Epoch
    depth: Count = Field(description="Messages not yet acknowledged by the broker.")
    bytes: Count
    dropped: Count = Field(description="Rows dropped on purpose since the outbox was made.")
    dead: Count = Field(0, description="Messages that the broker refuses for good, kept for a person to look at.")
    counters: dict[str, int] = Field(default_factory=dict)


class Status(Message):
    """Retained: how the box is doing. Only ``site``, ``box`` and ``ts`` are always there."""

    schema_: Literal["lineward.status/1"] = Field("lineward.status/1", alias="schema")
    ts: Utc
    site: str
    box: str
    uptime_ms: Count | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    product: str | None = None
    bundle: BundleRef | None = None
    memory: MemoryRef | None = None
    engine: str | None = None
    precision: str | None = None
    cameras: dict[str, JsonValue] = Field(default_factory=dict)
    outbox: OutboxStatus | None = None
    drops: dict[str, int] = Field(default_factory=dict)
    latency_ms: dict[str, Milliseconds] = Field(default_factory=dict, description="stage -> percentile -> ms")
    clock_synced: bool | None = None
    warnings: tuple[str, ...] = ()
    detail: dict[str, JsonValue] = Field(default_factory=dict, description="Whatever else the box has to say.")


class CameraState(Message):
    """Retained: what an actuator binds to. ``not_judged`` whenever the box cannot vouch for either answer."""

    schema_: Literal["lineward.state/1"] = Field("lineward.state/1", alias="schema")
    ts: Utc
    site: str
    box: str
    camera: str
    state: Literal["ok", "nok", "not_judged"]
    event_id: str | None = None
    part_id: str | None = None
    score: float | None = None
    threshold: float | None = None
    memory: MemoryRef | None = Field(None, description="That judged; null before anything was judged.")
    adaptation: AdaptationRef | None = Field(None, description="As an alert's; null before anything was judged.")
    reason: str = ""


class Availability(Message):
    """Retained, and the one payload that is not JSON but a bare word."""

    site: str
    box: str
    value: Literal["online", "stopped", "offline"]


_M = TypeVar("_M", bound=Message)
Numbered: TypeAlias = Alert | VerdictMessage | Gap | Notice
AnyMessage: TypeAlias = Numbered | Status | CameraState | Availability | Command | CommandResult

_MODELS: dict[Kind, type[Message]] = {
    Kind.ALERT: Alert,
    Kind.VERDICT: VerdictMessage,
    Kind.GAP: Gap,
    Kind.NOTICE: Notice,
    Kind.STATUS: Status,
    Kind.STATE: CameraState,
    Kind.AVAILABLE: Availability,
    Kind.RESULT: CommandResult,
}


class Judge(Message):
    """What judges on a box and therefore goes into each message.

    Attributes:
        product: name of the product.
        bundle: id and method of the bundle.
        memory: version of the memory.
        p_value_floor: 1 / (n + 1) for n calibration scores.
        signal: layout of the signal; None where it is none.
    """

    product: str
    bundle: BundleRef
    memory: MemoryRef = MemoryRef()
    p_value_floor: Probability = 0.0
    signal: SignalLayout | None = None


def alert_from_event(event: AnomalyEvent, *, identity: Identity, judge: Judge, epoch: str, seq: int) -> Alert:
    """The alert of one phase of an event. NaN and infinity become null; the strongest 64 regions are kept.

    Raises:
        MessageError: a value cannot be published (names the field).
    """
    return build(
        Alert,
        **_judged(event, identity=identity, judge=judge),
        epoch=epoch,
        seq=seq,
        event_id=event.event_id,
        phase=event.phase,
        peak_score=_finite(event.peak_score),
        frames=event.frames,
    )


def verdict_message(  # noqa: D417 (the others are the fields of VerdictMessage)
    verdict: Verdict,
    *,
    identity: Identity,
    judge: Judge,
    epoch: str,
    seq: int,
    views: Sequence[PartView] = (),
    decided_by: str | None = None,
) -> VerdictMessage:
    """The message of one verdict. NaN and infinity become null; the strongest 64 regions are kept.

    Args:
        verdict: on the part; its ``camera`` is the station.

    Raises:
        MessageError: a value cannot be published (names the field).
    """
    return build(
        VerdictMessage,
        **_judged(verdict, identity=identity, judge=judge),
        epoch=epoch,
        seq=seq,
        decision=verdict.decision,
        part_id=verdict.part_id,
        reason=verdict.reason[:1024],
        decided_by=decided_by,
        views=tuple(views),
    )


def notice_message(  # noqa: D417 (the others are the fields of Notice)
    *, identity: Identity, epoch: str, seq: int, kind: str, severity: Severity, text: str, detail: dict[str, Any]
) -> Notice:
    """The message of one notice, made now.

    Args:
        text: cut at 1,024 characters.

    Raises:
        MessageError: a value cannot be published (names the field).
    """
    return build(
        Notice,
        epoch=epoch,
        seq=seq,
        ts=datetime.now(timezone.utc),
        site=identity.site,
        box=identity.box,
        kind=kind,
        severity=severity,
        text=text[:1024],
        detail=detail,
    )


def gap_maker(identity: Identity) -> Callable[..., tuple[str, bytes]]:
    """What an outbox calls to write a gap; takes the keywords of :class:`Gap`, gives topic and payload."""

    def make(*, epoch: str, seq: int, first: int, last: int, dropped: int, reason: str) -> tuple[str, bytes]:
        gap = build(
            Gap,
            epoch=epoch,
            seq=seq,
            ts=datetime.now(timezone.utc),
            site=identity.site,
            box=identity.box,
            first=first,
            last=last,
            dropped=dropped,
            reason=reason,
        )
        return identity.gap, encode(gap)

    return make


def build(model: type[_M], **values: Any) -> _M:  # noqa: ANN401 (pydantic checks each against its field)
    """An instance of a model.

    Raises:
        MessageError: a value does not fit its field.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise MessageError(_explain(model.__name__, error)) from error


def encode(message: Message) -> bytes:
    """Compact JSON; ``late`` is its last key where the message has one, see :func:`mark_late`."""
    if isinstance(message, Availability):
        return message.value.encode()
    return message.model_dump_json(by_alias=True).encode()


def mark_late(payload: bytes) -> bytes:
    """The same message flagged late, in a time that does not depend on its content."""
    return payload[: -len(_ON_TIME)] + _LATE if payload.endswith(_ON_TIME) else payload


def parse(topic: str, payload: bytes, *, prefix: str | None = None) -> AnyMessage:
    """The typed message of a topic and its payload.

    Args:
        topic: as received.
        payload: as received.
        prefix: refuse topics under another prefix; any prefix is taken by default.

    Raises:
        MessageError: the topic is not ours, the payload is not that topic's message, or it claims another sender.
    """
    address = parse_topic(topic)
    if prefix is not None and address.identity.prefix != prefix:
        raise MessageError(f"topic {topic[:200]!r} is not under {prefix!r}")
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise MessageError(f"{topic}: a payload of {len(payload)} bytes is over the limit of {MAX_PAYLOAD_BYTES}")
    if address.kind is Kind.COMMAND and address.leaf not in COMMANDS:
        raise MessageError(f"{topic}: unknown command; known are: {', '.join(COMMANDS)}")
    model = COMMANDS[address.leaf] if address.kind is Kind.COMMAND else _MODELS[address.kind]
    if model is Availability:
        word = payload[:16].decode("utf-8", errors="replace") if len(payload) <= 16 else "a longer text"  # noqa: PLR2004
        return build(Availability, site=address.identity.site, box=address.identity.box, value=word)
    try:
        message = model.model_validate_json(payload, by_alias=True, by_name=False)
    except ValidationError as error:
        raise MessageError(f"{topic}: {_explain(model.__name__, error)}") from error
    _check_sender(message, address, topic)
    return message  # type: ignore[return-value]  # every model of _MODELS is one of AnyMessage


def _check_sender(message: Message, address: Address, topic: str) -> None:
    claimed = {"site": address.identity.site, "box": address.identity.box}
    if address.kind in (Kind.ALERT, Kind.VERDICT, Kind.STATE):
        claimed["camera"] = address.leaf
    for name, expected in claimed.items():
        found = getattr(message, name, expected)
        if found != expected:
            raise MessageError(f"{topic}: the payload claims {name} {found[:80]!r}, but its topic says {expected!r}")


def json_schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema (2020-12) of every JSON payload, by file name; docs/schemas holds the same."""
    models = {kind.value: model for kind, model in _MODELS.items() if model is not Availability}
    models |= {f"{verb}-command": model for verb, model in COMMANDS.items()}
    files: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        schema = model.model_json_schema(by_alias=True, mode="serialization")
        files[f"{name}.json"] = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return files


def adaptation_of(source: AnomalyEvent | Verdict) -> AdaptationRef:
    """Versions of moments and threshold, and the sub-class, as messages name them.

    Raises:
        MessageError: a value cannot be published (names the field).
    """
    return build(
        AdaptationRef,
        moments=source.moments_version,
        threshold=source.threshold_version,
        subclass=source.subclass[:200],
    )


def _judged(source: AnomalyEvent | Verdict, *, identity: Identity, judge: Judge) -> dict[str, Any]:
    return {
        "ts": source.captured_at,
        "uptime_ms": source.captured_ns // 1_000_000,
        "site": identity.site,
        "box": identity.box,
        "camera": source.camera,
        "camera_seq": source.camera_seq,
        "product": judge.product,
        "bundle": judge.bundle,
        "memory": judge.memory,
        "adaptation": adaptation_of(source),
        "score": _finite(source.score),
        "threshold": _finite(source.threshold),
        "p_value": _finite(source.p_value),
        "p_value_floor": judge.p_value_floor,
        "regions": _regions(source.regions),
        "span": None if judge.signal is None else span_of(source.regions, source.captured_at, judge.signal),
        "channels": () if judge.signal is None else channels_of(source.regions, judge.signal),
        "evidence": source.evidence,
        "latency_ms": {stage: float(ms) for stage, ms in source.latency_ms.items() if math.isfinite(ms)},
    }


def _regions(regions: Sequence[Region]) -> tuple[RegionMessage, ...]:
    return tuple(
        build(RegionMessage, x=r.x, y=r.y, w=r.w, h=r.h, area=r.area, peak=_finite(r.peak))
        for r in regions[:MAX_REGIONS]
    )


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _explain(name: str, error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "payload"
    return f"{name}: {where}: {first['msg']}"[:500]


def write_schemas(folder: Path) -> None:
    """Write the JSON Schema files; ``python -m edge.alerts.message docs/schemas`` does it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, schema in json_schemas().items():
        (folder / name).write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
