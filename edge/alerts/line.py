"""A published message in one line, for people who watch; what a program needs of it is the JSON."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from edge.alerts.wire import format_utc

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edge.alerts.message import AnyMessage

_FIELDS = (
    "value", "kind", "severity", "product", "subclass", "decision", "phase", "state", "part_id", "event_id", "score",
    "threshold", "p_value", "reason", "text", "evidence",
)  # fmt: skip


def line_of(topic: str, message: AnyMessage) -> str:
    """Say a message in one line: its topic, then NAME=VALUE of what it has.

    Of a signal ``at`` and ``seconds`` say when something was found, ``channels`` where; of a station ``views`` has the
    decision of each camera, and ``decided_by`` whose figures these are.

    Args:
        topic: where it was published.
        message: one of the published ones.
    """
    values = message.model_dump()
    values["subclass"] = (values.get("adaptation") or {}).get("subclass")
    parts = [topic]
    for name in _FIELDS:
        value = values.get(name)
        if value not in (None, ""):
            shown = getattr(value, "value", value)
            parts.append(f"{name}={shown:.4g}" if isinstance(shown, float) else f"{name}={shown}")
    parts += _station(values)
    if values.get("regions"):
        parts.append(f"regions={len(values['regions'])}")
    parts += _span(values)
    if values.get("late"):
        parts.append("late")
    return " ".join(parts)


def sources_of(message: AnyMessage) -> set[str]:
    """Return the names of the cameras, signals and stations that a message is of; empty where it is of the box."""
    found = (getattr(message, "camera", None), *(view.camera for view in getattr(message, "views", ())))
    return {name for name in found if name}


def _station(values: Mapping[str, Any]) -> Iterator[str]:
    views = values.get("views") or ()
    # A triggered camera alone is its own station: its verdict says it all.
    if [view["camera"] for view in views] not in ([], [values.get("camera")]):
        yield "views=" + ",".join(f"{view['camera']}:{view['decision'].value}" for view in views)
        if values["decided_by"]:
            yield f"decided_by={values['decided_by']}"


def _span(values: Mapping[str, Any]) -> Iterator[str]:
    span = values.get("span")
    if span:
        yield f"at={format_utc(span['first_ts'] + timedelta(seconds=span['from_s']))}"
        yield f"seconds={span['to_s'] - span['from_s']:.4g}"
    if values.get("channels"):
        yield f"channels={','.join(values['channels'])}"
