"""Requests of a box and replies of the aggregator: JSON headers, with a body where bytes travel. No sockets, no state.

A box asks one thing at a time and may ask it again: every request is idempotent. Frames: [header] or [header, body].

| a box asks | the aggregator answers |
|---|---|
| ``hello``: who I am, what I judge, the bank that I have | ``welcome``: the round, when it closes, the newest bank |
| ``offer``: I have an update of this hash and size | ``resume``: at this offset; or ``receipt``, it is stored already |
| ``chunk``: its bytes from an offset on | ``progress``: go on at this offset; after the last byte ``receipt`` |
| ``fetch``: the bytes of a bank from an offset on | ``part``; or ``none``, there is no newer one |
| anything | ``refused`` with a code and a reason |

A receipt means that the update is on the aggregator's disk: only then may the box forget it.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edge.errors import FederationError
from edge.federation.fields import BoxName, Count, Digest, MaybeName, Name, Positive, canonical, explain
from edge.federation.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

PROTOCOL = 1
PROTOCOLS = frozenset({PROTOCOL})  # that this program understands
MAX_MESSAGE_BYTES = 8192  # names of 200 characters, four bytes each, and the rest
MAX_CHUNK_BYTES = 256 * 2**10
DEFAULT_CHUNK_BYTES = 32 * 2**10  # a cut costs at most one chunk and its way back
MAX_REASON = 300


class Kind(str, Enum):
    """Which message a header is."""

    HELLO = "hello"
    OFFER = "offer"
    CHUNK = "chunk"
    FETCH = "fetch"
    WELCOME = "welcome"
    RESUME = "resume"
    PROGRESS = "progress"
    RECEIPT = "receipt"
    PART = "part"
    NONE = "none"
    REFUSED = "refused"


class Header(BaseModel):
    """What every message carries: the version of the protocol, and a number that a reply takes from its request."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    v: Literal[1] = 1
    id: Count


class Hello(Header):
    """Asks for the round; ``have_version`` is the fleet memory that the box has, 0 for none."""

    kind: Literal["hello"] = "hello"
    fleet: Name
    box: BoxName
    product: Name
    subclass: MaybeName = ""
    embedding_id: Digest
    have_version: Count


class Offer(Header):
    """Announces an encoded update: sha256 and size of its bytes, and the round that it names."""

    kind: Literal["offer"] = "offer"
    embedding_id: Digest
    product: Name
    round: Positive
    sha256: Digest
    size: Positive


class Chunk(Header):
    """Bytes of an announced update from ``offset`` on, in the body."""

    kind: Literal["chunk"] = "chunk"
    sha256: Digest
    offset: Count


class Fetch(Header):
    """Asks for a bank's bytes from ``offset`` on; ``version`` 0 asks for the newest."""

    kind: Literal["fetch"] = "fetch"
    embedding_id: Digest
    product: Name
    version: Count
    offset: Count


class Welcome(Header):
    """The pool's state. ``closes_in_ms``: until the round's deadline; ``bank_version``: the newest, 0 for none."""

    kind: Literal["welcome"] = "welcome"
    round: Positive
    closes_in_ms: Count
    bank_version: Count
    max_chunk: Annotated[int, Field(ge=1, le=MAX_CHUNK_BYTES)]
    max_update_bytes: Positive


class Resume(Header):
    """Send the announced update from ``offset`` on."""

    kind: Literal["resume"] = "resume"
    sha256: Digest
    offset: Count


class Progress(Header):
    """The bytes before ``offset`` are stored."""

    kind: Literal["progress"] = "progress"
    sha256: Digest
    offset: Count


class Receipt(Header):
    """The update is on disk, whole and checked, and is examined when ``counted_in_round`` closes."""

    kind: Literal["receipt"] = "receipt"
    sha256: Digest
    counted_in_round: Positive


class Part(Header):
    """Bytes of bank ``version`` from ``offset`` on, in the body; size and sha256 are of the whole."""

    kind: Literal["part"] = "part"
    version: Positive
    size: Positive
    sha256: Digest
    offset: Count


class Nothing(Header):
    """There is no such bank, none at all or none any more; ``bank_version`` is the newest, 0 for none."""

    kind: Literal["none"] = "none"
    bank_version: Count


class Refused(Header):
    """Why the request was not done; ``id`` is 0 where the request's could not be read."""

    kind: Literal["refused"] = "refused"
    code: Annotated[str, Field(pattern=r"^[a-z][a-z_]{0,39}$")]
    reason: Annotated[str, Field(max_length=MAX_REASON)]

    @property
    def refusal(self) -> Refusal:
        """The code; ``OTHER`` for one of a later version: a box gets along with an aggregator newer than itself."""
        return Refusal(self.code) if self.code in Refusal._value2member_map_ else Refusal.OTHER


Request: TypeAlias = Hello | Offer | Chunk | Fetch
Reply: TypeAlias = Welcome | Resume | Progress | Receipt | Part | Nothing | Refused
_REQUESTS: dict[Kind, type[Header]] = {
    Kind.HELLO: Hello,
    Kind.OFFER: Offer,
    Kind.CHUNK: Chunk,
    Kind.FETCH: Fetch,
}
_REPLIES: dict[Kind, type[Header]] = {
    Kind.WELCOME: Welcome,
    Kind.RESUME: Resume,
    Kind.PROGRESS: Progress,
    Kind.RECEIPT: Receipt,
    Kind.PART: Part,
    Kind.NONE: Nothing,
    Kind.REFUSED: Refused,
}
_WITH_BODY = (Chunk, Part)
_H = TypeVar("_H", bound=Header)


class _Peek(BaseModel):
    """Enough of any version's header to answer it."""

    model_config = ConfigDict(extra="ignore", strict=True)

    v: Count
    kind: Annotated[str, Field(max_length=32)]


class _Id(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    id: Count


def build(model: type[_H], **values: Any) -> _H:  # noqa: ANN401 (pydantic checks each against its field)
    """A header of a model.

    Raises:
        FederationError: ``malformed``; a value does not fit its field.
    """
    try:
        return model(**values)
    except ValidationError as error:
        raise FederationError(Refusal.MALFORMED, f"{model.__name__}: {explain(error)}") from error


def encode_message(message: Request | Reply, body: bytes = b"") -> list[bytes]:
    """The frames of a message; a Chunk and a Part have a body, the others have none.

    Raises:
        FederationError: ``malformed`` or ``too_large``; the body is missing, too large, or has no place.
    """
    _check_body(message, body)
    return [canonical(message), body] if isinstance(message, _WITH_BODY) else [canonical(message)]


def refused(error: FederationError, *, request: int = 0) -> Refused:
    """The reply that tells a refusal; the reason is cut where it is too long."""
    return Refused(id=request, code=error.code.value, reason=str(error)[:MAX_REASON])


def request_id(frames: Sequence[bytes]) -> int:
    """The number of a request that may be anything, for its refusal; 0 where it has none that can be read."""
    try:
        return _Id.model_validate_json(frames[0]).id if frames and len(frames[0]) <= MAX_MESSAGE_BYTES else 0
    except ValidationError:
        return 0


def parse_request(frames: Sequence[bytes]) -> tuple[Request, bytes]:
    """A box's request and its body, which is empty where the request has none.

    Raises:
        FederationError: with ``code`` bad_version, malformed or too_large; nothing else leaves it.
    """
    return _parse(frames, _REQUESTS)  # type: ignore[return-value]  # every model of _REQUESTS is a Request


def parse_reply(frames: Sequence[bytes]) -> tuple[Reply, bytes]:
    """The aggregator's reply and its body, which is empty where the reply has none.

    Raises:
        FederationError: as :func:`parse_request`.
    """
    return _parse(frames, _REPLIES)  # type: ignore[return-value]  # every model of _REPLIES is a Reply


def _parse(frames: Sequence[bytes], models: dict[Kind, type[Header]]) -> tuple[Header, bytes]:
    if not 1 <= len(frames) <= 2:  # noqa: PLR2004 (header and body)
        raise FederationError(Refusal.MALFORMED, f"message: {len(frames)} frames, expected a header and maybe a body")
    text = frames[0]
    if len(text) > MAX_MESSAGE_BYTES:
        raise FederationError(Refusal.TOO_LARGE, f"header: {len(text)} bytes are over the limit of {MAX_MESSAGE_BYTES}")
    try:
        peek = _Peek.model_validate_json(text)
        if peek.v not in PROTOCOLS:
            known = ", ".join(map(str, sorted(PROTOCOLS)))
            raise FederationError(Refusal.BAD_VERSION, f"v: protocol {peek.v} is not known, {known} is")
        model = {kind.value: model for kind, model in models.items()}.get(peek.kind)
        if model is None:
            raise FederationError(Refusal.MALFORMED, f"kind: {peek.kind!r} is not expected here")
        message = model.model_validate_json(text)
    except ValidationError as error:
        raise FederationError(Refusal.MALFORMED, explain(error)) from error
    # Only the fields that were sent: a field that a later version adds with a default stays readable.
    if canonical(message, only_set=True) != text:
        raise FederationError(Refusal.MALFORMED, "header: it is not in canonical form")
    body = frames[1] if len(frames) == 2 else b""  # noqa: PLR2004 (header and body)
    _check_body(message, body, sent=len(frames) == 2)  # noqa: PLR2004 (header and body)
    return message, body


def _check_body(message: Header, body: bytes, *, sent: bool = False) -> None:
    if not isinstance(message, _WITH_BODY):
        if body or sent:
            raise FederationError(Refusal.MALFORMED, "body: this message has none")
        return
    if not body:
        raise FederationError(Refusal.MALFORMED, "body: this message needs one")
    if len(body) > MAX_CHUNK_BYTES:
        raise FederationError(Refusal.TOO_LARGE, f"body: {len(body)} bytes are over the limit of {MAX_CHUNK_BYTES}")
    if isinstance(message, Part) and message.offset + len(body) > message.size:
        raise FederationError(Refusal.MALFORMED, "body: it goes beyond the declared size")
