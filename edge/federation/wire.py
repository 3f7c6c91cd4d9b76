"""The bytes of a MemoryUpdate and of a FleetBank: a prefix, a canonical JSON header, raw little-endian buffers.

It must not know sockets, files or rounds. The format is described in :func:`encode_update`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from edge.errors import FederationError
from edge.federation.fields import (
    BoxName,
    Count,
    Digest,
    MaybeName,
    Moment,
    Name,
    Nonce,
    Positive,
    canonical,
    check_box,
    check_name,
    explain,
    format_time,
    parse_time,
)
from edge.federation.refusals import Refusal
from edge.federation.update import FleetBank, MemoryUpdate, Order, WireRows
from edge.federation.wire_rows import check_rows, decode_float16, decode_uint8, encode_rows, floats, raw

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

SCHEMA = 1
MAX_HEADER_BYTES = 8192  # five names of 200 characters, four bytes each, and the rest
_UPDATE_MAGIC, _BANK_MAGIC = b"LNWU", b"LNWB"
_PREFIX = struct.Struct("<4sHI")
_NAME_BYTES = 64  # what a decoded name costs beside its text
_M = TypeVar("_M", bound="_Header")


@dataclass(frozen=True, slots=True)
class Limits:
    """What is taken before anything is allocated for it.

    Attributes:
        max_bytes: of one payload, update or bank.
        max_rows: R.
        max_columns: D.
    """

    max_bytes: int = 4 * 2**20
    max_rows: int = 4096
    max_columns: int = 2048


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    created: Moment
    embedding_id: Digest
    fleet: Name
    round: Positive
    shape: tuple[Positive, Positive]
    lengths: tuple[Count, ...] = Field(max_length=8)


class _UpdateHeader(_Header):
    base_version: Count
    box: BoxName
    n_frames: Count
    nonce: Nonce
    order: Order
    product: Name
    subclass: MaybeName
    wire: WireRows


class _BankHeader(_Header):
    members: Count
    pool: Annotated[str, Field(min_length=64, max_length=265), AfterValidator(check_name)]
    version: Positive


def encode_update(update: MemoryUpdate) -> bytes:
    """The bytes of an update, the same for equal updates.

    Magic ``LNWU``, schema uint16, header length uint32; the header: compact JSON with sorted keys, its ``shape``
    [R, D] and the ``lengths`` of the buffers in bytes; then without gaps the buffers rows (float16, or offset float32
    [D], scale float32 [D] and uint8 [R, D]), support, frames, mean and std (float32). All numbers are little-endian.

    Raises:
        FederationError: a field has no place in the format; rows that ``wire`` cannot represent are ``malformed``:
            round them with :func:`edge.federation.wire_rows.on_wire` before.
    """
    check_rows(update.rows)
    _check_update(update)
    buffers = [*encode_rows(update.rows, update.wire)]
    buffers += [raw(values) for values in (update.support, update.frames, update.mean, update.std)]
    header = _build(
        _UpdateHeader,
        base_version=update.base_version,
        box=update.box,
        created=format_time(update.created),
        embedding_id=update.embedding_id,
        fleet=update.fleet,
        lengths=tuple(map(len, buffers)),
        n_frames=update.n_frames,
        nonce=update.nonce,
        order=update.order,
        product=update.product,
        round=update.round,
        shape=update.rows.shape,
        subclass=update.subclass,
        wire=update.wire,
    )
    return _join(_UPDATE_MAGIC, header, buffers)


def decode_update(data: bytes | memoryview, limits: Limits) -> MemoryUpdate:
    """The update that the bytes are; the inverse of :func:`encode_update`.

    Every size is declared and checked before anything is allocated; what is allocated stays below four times
    ``limits.max_bytes``.

    Raises:
        FederationError: with ``code`` too_large, bad_version, malformed, bad_shape, not_finite or bad_support.
    """
    header, view = _split(data, _UPDATE_MAGIC, _UpdateHeader, limits)
    height, width = header.shape
    uint8 = header.wire is WireRows.UINT8
    lengths = (4 * width, 4 * width, height * width) if uint8 else (2 * height * width,)
    buffers = _buffers(header, view, (*lengths, 4 * height, 4 * height, 4 * width, 4 * width))
    rows = decode_uint8(buffers, height) if uint8 else decode_float16(buffers[0], height)
    support, frames, mean, std = (floats(buffer) for buffer in buffers[-4:])
    update = MemoryUpdate(
        fleet=header.fleet,
        box=header.box,
        product=header.product,
        subclass=header.subclass,
        embedding_id=header.embedding_id,
        round=header.round,
        order=header.order,
        rows=rows,
        support=support,
        frames=frames,
        n_frames=header.n_frames,
        mean=mean,
        std=std,
        base_version=header.base_version,
        created=parse_time(header.created),
        nonce=header.nonce,
        wire=header.wire,
    )
    _check_update(update)
    return update


def encode_bank(bank: FleetBank) -> bytes:
    """The bytes of a bank, the same for equal banks.

    As :func:`encode_update` with magic ``LNWB`` and the buffers rows (float16), mass (float32), boxes (uint16) and
    members (UTF-8, one name a line).

    Raises:
        FederationError: a field has no place in the format.
    """
    check_rows(bank.rows)
    _check_bank(bank)
    members = "\n".join(bank.members).encode()
    buffers = [*encode_rows(bank.rows, WireRows.FLOAT16), raw(bank.mass), bank.boxes.astype("<u2").tobytes(), members]
    header = _build(
        _BankHeader,
        created=format_time(bank.created),
        embedding_id=bank.embedding_id,
        fleet=bank.fleet,
        lengths=tuple(map(len, buffers)),
        members=len(bank.members),
        pool=bank.pool,
        round=bank.round,
        shape=bank.rows.shape,
        version=bank.version,
    )
    return _join(_BANK_MAGIC, header, buffers)


def decode_bank(data: bytes | memoryview, limits: Limits) -> FleetBank:
    """The bank that the bytes are; the inverse of :func:`encode_bank`.

    Raises:
        FederationError: as :func:`decode_update`.
    """
    header, view = _split(data, _BANK_MAGIC, _BankHeader, limits)
    height, width = header.shape
    if header.members > limits.max_bytes // _NAME_BYTES:
        raise FederationError(Refusal.TOO_LARGE, f"members: {header.members} are too many for {limits.max_bytes} bytes")
    names = header.lengths[-1] if header.lengths else 0
    buffers = _buffers(header, view, (2 * height * width, 4 * height, 2 * height, names))
    try:
        text = bytes(buffers[3]).decode()
    except UnicodeDecodeError as error:
        raise FederationError(Refusal.MALFORMED, "members: the names are not UTF-8") from error
    if text.count("\n") + bool(text) != header.members:
        raise FederationError(Refusal.MALFORMED, f"members: {header.members} are declared, others are named")
    bank = FleetBank(
        fleet=header.fleet,
        pool=header.pool,
        embedding_id=header.embedding_id,
        version=header.version,
        round=header.round,
        rows=decode_float16(buffers[0], height),
        mass=floats(buffers[1]),
        boxes=np.frombuffer(buffers[2], "<u2").astype(np.uint16),
        members=tuple(text.split("\n")) if text else (),
        created=parse_time(header.created),
    )
    _check_bank(bank)
    return bank


def _check_vectors(named: dict[str, npt.NDArray[Any]], length: int) -> None:
    for name, values in named.items():
        if values.dtype != np.float32 or values.shape != (length,):
            found = f"{values.dtype} {list(values.shape)}"
            raise FederationError(Refusal.BAD_SHAPE, f"{name} is {found}, expected float32 [{length}]")
        if not np.isfinite(values).all():
            raise FederationError(Refusal.NOT_FINITE, f"{name} holds values that are not finite")


def _check_update(update: MemoryUpdate) -> None:
    height, width = update.rows.shape
    _check_vectors({"support": update.support, "frames": update.frames}, height)
    _check_vectors({"mean": update.mean, "std": update.std}, width)
    if not ((update.support > 0).all() and (update.frames >= 0).all() and (update.std >= 0).all()):
        raise FederationError(Refusal.BAD_SUPPORT, "support is > 0, frames and std are >= 0; one value is not")
    if not (update.frames <= update.support).all():
        raise FederationError(Refusal.BAD_SUPPORT, "frames: a row has more frames than patches")


def _check_bank(bank: FleetBank) -> None:
    height = len(bank.rows)
    _check_vectors({"mass": bank.mass}, height)
    if bank.boxes.dtype != np.uint16 or bank.boxes.shape != (height,):
        found = f"{bank.boxes.dtype} {list(bank.boxes.shape)}"
        raise FederationError(Refusal.BAD_SHAPE, f"boxes is {found}, expected uint16 [{height}]")
    if not ((bank.mass > 0).all() and abs(float(bank.mass.sum(dtype=np.float64)) - 1) < 1e-3):  # noqa: PLR2004 (float32 sum)
        raise FederationError(Refusal.BAD_SUPPORT, "mass: the shares are > 0 and sum to 1; these do not")
    if bank.pool.partition("/")[0] != bank.embedding_id:
        raise FederationError(Refusal.MALFORMED, "pool: it does not begin with the bank's embedding_id")
    if any(first >= second for first, second in zip(bank.members, bank.members[1:], strict=False)):
        raise FederationError(Refusal.MALFORMED, "members: the names are not sorted and distinct")
    try:
        for name in bank.members:
            check_box(name)
    except ValueError as error:
        raise FederationError(Refusal.MALFORMED, f"members: {error}") from error


def _build(model: type[_M], **values: Any) -> _M:  # noqa: ANN401 (pydantic checks each against its field)
    try:
        return model(**values)
    except ValidationError as error:
        raise FederationError(Refusal.MALFORMED, explain(error)) from error


def _join(magic: bytes, header: _Header, buffers: Sequence[bytes]) -> bytes:
    text = canonical(header)
    return b"".join([_PREFIX.pack(magic, SCHEMA, len(text)), text, *buffers])


def _split(data: bytes | memoryview, magic: bytes, model: type[_M], limits: Limits) -> tuple[_M, memoryview]:
    """Header and buffers of a payload, its declared sizes within the limits and equal to what is there."""
    view = memoryview(data)
    if len(view) > limits.max_bytes:
        raise FederationError(Refusal.TOO_LARGE, f"payload: {len(view)} bytes are over the limit of {limits.max_bytes}")
    if len(view) < _PREFIX.size:
        raise FederationError(Refusal.MALFORMED, "payload: it is cut off before its header")
    found, schema, size = _PREFIX.unpack(view[: _PREFIX.size])
    if found != magic:
        raise FederationError(Refusal.MALFORMED, f"payload: it does not begin with {magic.decode()}")
    if schema != SCHEMA:
        raise FederationError(Refusal.BAD_VERSION, f"payload: schema {schema} is not known, {SCHEMA} is")
    if size > MAX_HEADER_BYTES:
        raise FederationError(Refusal.TOO_LARGE, f"header: {size} bytes are over the limit of {MAX_HEADER_BYTES}")
    if len(view) < _PREFIX.size + size:
        raise FederationError(Refusal.MALFORMED, "payload: it is cut off in its header")
    text = bytes(view[_PREFIX.size : _PREFIX.size + size])
    try:
        header = model.model_validate_json(text)
    except ValidationError as error:
        raise FederationError(Refusal.MALFORMED, explain(error)) from error
    # One text for one header: repeated keys, other spellings of a number and blanks end here.
    if canonical(header) != text:
        raise FederationError(Refusal.MALFORMED, "header: it is not in canonical form")
    height, width = header.shape
    if height > limits.max_rows or width > limits.max_columns:
        most = f"{limits.max_rows} x {limits.max_columns}"
        raise FederationError(Refusal.TOO_LARGE, f"shape: {height} x {width} is over the limit of {most}")
    return header, view[_PREFIX.size + size :]


def _buffers(header: _Header, view: memoryview, expected: tuple[int, ...]) -> list[memoryview]:
    if header.lengths != expected:
        raise FederationError(Refusal.BAD_SHAPE, f"lengths: {list(header.lengths)} do not fit the shape {header.shape}")
    if len(view) != sum(expected):
        kind = "it is cut off" if len(view) < sum(expected) else "bytes follow its end"
        raise FederationError(Refusal.MALFORMED, f"payload: {kind}: {len(view)} bytes of {sum(expected)} declared")
    parts, start = [], 0
    for length in expected:
        parts.append(view[start : start + length])
        start += length
    return parts
