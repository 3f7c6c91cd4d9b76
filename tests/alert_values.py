"""Events, verdicts and alerts for the tests of everything behind the judge."""

from __future__ import annotations

from datetime import datetime, timezone

from edge.alerts.message import BundleRef, Judge, MemoryRef, alert_from_event, encode
from edge.alerts.outbox import Draft, Priority
from edge.alerts.topics import Identity
from edge.frames import AnomalyEvent, Decision, EventPhase, Region, Verdict

IDENTITY = Identity("plant", "box1")
JUDGE = Judge(
    product="bolt", bundle=BundleRef(id="ab" * 32, method="pbas"), memory=MemoryRef(version=2), p_value_floor=0.01
)
MOMENT = datetime(2030, 1, 2, 3, 4, 5, 678900, tzinfo=timezone.utc)


def event(**changes: object) -> AnomalyEvent:
    values: dict[str, object] = {
        "event_id": "0" * 31 + "1",
        "phase": EventPhase.NEW,
        "camera": "cam",
        "camera_seq": 7,
        "captured_ns": 5_000_000_000,
        "captured_at": MOMENT,
        "score": 2.5,
        "peak_score": 2.5,
        "threshold": 1.0,
        "p_value": 0.01,
        "frames": 1,
        "regions": (Region(1, 2, 3, 4, 10, 2.5),),
        "latency_ms": {"total": 12.5},
    }
    return AnomalyEvent(**(values | changes))  # type: ignore[arg-type]


def verdict(**changes: object) -> Verdict:
    values: dict[str, object] = {
        "decision": Decision.NOK,
        "score": 2.5,
        "threshold": 1.0,
        "p_value": 0.01,
        "camera": "cam",
        "camera_seq": 7,
        "captured_ns": 5_000_000_000,
        "captured_at": MOMENT,
        "part_id": "p-1",
    }
    return Verdict(**(values | changes))  # type: ignore[arg-type]


def draft(identity: Identity = IDENTITY, camera: str = "cam", priority: Priority = Priority.HIGH) -> Draft:
    def make(epoch: str, seq: int) -> bytes:
        return encode(alert_from_event(event(camera=camera), identity=identity, judge=JUDGE, epoch=epoch, seq=seq))

    return Draft(identity.alert(camera), make, priority)
