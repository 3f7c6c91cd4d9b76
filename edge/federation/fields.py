"""The kinds of field that headers are made of, and the one JSON text that a header has. No sockets, no arrays."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from edge.alerts.topics import check_segment
from edge.errors import FederationError, MessageError
from edge.federation.refusals import Refusal

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


def check_name(value: str) -> str:
    """A printable name without blanks at its ends, as it came; for pydantic fields.

    Raises:
        ValueError: it is not one.
    """
    if not value.isprintable() or value != value.strip():
        raise ValueError("a name is printable and has no blanks at its ends")
    return value


def check_box(value: str) -> str:
    """A box's name ``<site>/<box>``, as it came; for pydantic fields.

    Raises:
        ValueError: it is not one.
    """
    site, slash, box = value.partition("/")
    try:
        check_segment(site, field="site")
        check_segment(box, field="box")
    except MessageError as error:
        raise ValueError(f"a box is named <site>/<box>: {error}" if slash else "a box is named <site>/<box>") from error
    return value


def check_time(value: str) -> str:
    """A moment in UTC with microseconds and ``Z``, as it came; for pydantic fields.

    Raises:
        ValueError: it is not one.
    """
    if format_time(parse_time(value)) != value:
        raise ValueError("a moment is written as 2030-01-02T03:04:05.678900Z")
    return value


def format_time(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds and ``Z``.

    Raises:
        FederationError: the moment has no time zone.
    """
    if moment.tzinfo is None:
        raise FederationError(Refusal.MALFORMED, "created: a moment without time zone cannot travel; pass an aware one")
    # isoformat, since strftime does not pad years below 1000 on every platform.
    return moment.astimezone(timezone.utc).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def parse_time(text: str) -> datetime:
    """The moment that :func:`format_time` wrote.

    Raises:
        ValueError: the text is not one.
    """
    return datetime.strptime(text, _TIME).replace(tzinfo=timezone.utc)


def explain(error: ValidationError) -> str:
    """The first fault of a header, with its field and without its input."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "header"
    return f"{where}: {first['msg']}"[:300]


def canonical(header: BaseModel, *, only_set: bool = False) -> bytes:
    """Compact JSON with sorted keys in UTF-8: one text for one header; ``only_set`` leaves out defaults not given."""
    values = header.model_dump(mode="json", exclude_unset=only_set)
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(check_name)]
MaybeName = Annotated[str, Field(max_length=200), AfterValidator(check_name)]
BoxName = Annotated[str, Field(max_length=401), AfterValidator(check_box)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**53 - 1)]
Moment = Annotated[str, Field(max_length=32), AfterValidator(check_time)]
