"""What the fields of all published messages have in common. It must know no message."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema

from edge.errors import MessageError

MAX_ID = 128


def format_utc(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds and ``Z``.

    Raises:
        MessageError: the moment has no time zone.
    """
    if moment.tzinfo is None:
        raise MessageError("ts: a moment without a time zone cannot be published; pass an aware datetime")
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


Utc = Annotated[
    AwareDatetime,
    PlainSerializer(format_utc, return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "date-time", "pattern": "Z$"}, mode="serialization"),
]
Epoch = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$", description="16 hex digits, drawn when an outbox is made.")]
Seq = Annotated[int, Field(ge=1, le=2**63 - 1)]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Milliseconds = dict[str, float]


class Message(BaseModel):
    """Base of all JSON payloads: immutable, closed, and free of NaN and infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)
