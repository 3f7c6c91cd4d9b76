"""Rows in the numbers that they travel in: float16, or uint8 in powers of two. Numpy only; no headers, no sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edge.errors import FederationError
from edge.federation.refusals import Refusal
from edge.federation.update import WireRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

LARGEST = 65504.0  # of float16: a bank that comes down is float16, so nothing larger may go up
_LEVELS = 255
_POWER = 0.5  # what frexp gives as the fraction of a power of two
_LEAST_EXPONENT = -126  # of a normal float32


def on_wire(rows: Floats, wire: WireRows) -> Floats:
    """Round rows to what they are after a journey; rounding again changes nothing.

    float16: to nearest even. uint8: in each column to whole multiples of the smallest power of two that spans the
    column in 255 steps. A power of two makes every sum of offset and steps exact in float32, so that rows, and not
    only bytes, are the same on both sides; it costs at most one of the eight bits.

    Args:
        rows: float32 [R, D], magnitudes up to 65504, rounded ones included.
        wire: numbers that the rows travel in.

    Returns:
        float32 [R, D]; float16: within 2**-11 of each value, or 2**-25; uint8: within 1/254 of the column's range, or
        2**-127. A column far from zero needs no more: its values are whole multiples of the step already.

    Raises:
        FederationError: ``bad_shape`` or ``not_finite``.
    """
    check_rows(rows)
    if wire is WireRows.FLOAT16:
        return rows.astype(np.float16).astype(np.float32)
    steps = _steps(rows)
    rounded = np.asarray(np.rint(rows / steps) * steps + 0.0, np.float32)  # + 0.0: no negative zero
    check_rows(rounded)
    return rounded


def check_rows(rows: Floats) -> None:
    """Refuse rows that are not a float32 matrix of finite float16 magnitudes.

    Raises:
        FederationError: ``bad_shape`` or ``not_finite``.
    """
    if rows.dtype != np.float32 or rows.ndim != 2 or not rows.size:  # noqa: PLR2004 (rows are a matrix)
        raise FederationError(Refusal.BAD_SHAPE, f"rows are {rows.dtype} {list(rows.shape)}, expected float32 [R, D]")
    if not (float(rows.min()) >= -LARGEST and float(rows.max()) <= LARGEST):  # NaN compares False
        raise FederationError(Refusal.NOT_FINITE, f"rows hold values that are not finite or beyond {LARGEST:g}")


def _steps(rows: Floats) -> npt.NDArray[np.float64]:
    """For each column the smallest power of two whose multiples can stand for it in one byte, exactly."""
    low, high = rows.min(0).astype(np.float64), rows.max(0).astype(np.float64)
    fraction, exponent = np.frexp(np.maximum((high - low) / _LEVELS, 2.0**_LEAST_EXPONENT))
    steps = np.ldexp(1.0, np.where(fraction == _POWER, exponent - 1, exponent))
    # Rounding to even may widen a column by one step, 0.5 down and 255.5 up.
    return np.asarray(np.where(np.rint(high / steps) - np.rint(low / steps) > _LEVELS, 2 * steps, steps), np.float64)


def encode_rows(rows: Floats, wire: WireRows) -> Sequence[bytes]:
    """The buffers of rows: float16 [R, D]; or offset float32 [D], scale float32 [D] and uint8 [R, D].

    Raises:
        FederationError: ``malformed`` where ``wire`` cannot represent a value exactly, else as :func:`check_rows`.
    """
    if on_wire(rows, wire).tobytes() != rows.tobytes():
        raise FederationError(Refusal.MALFORMED, f"rows: {wire.value} cannot represent them; round them with on_wire")
    if wire is WireRows.FLOAT16:
        return [rows.astype("<f2").tobytes()]
    steps, offset = _steps(rows), rows.min(0)
    values = ((rows.astype(np.float64) - offset) / steps).astype(np.uint8)
    return [raw(offset), raw(steps.astype(np.float32)), values.tobytes()]


def decode_float16(buffer: memoryview, height: int) -> Floats:
    """Rows float32 [height, D] of their float16 bytes.

    Raises:
        FederationError: ``not_finite``.
    """
    values = np.frombuffer(buffer, "<f2").reshape(height, -1)
    if not np.isfinite(values).all():
        raise FederationError(Refusal.NOT_FINITE, "rows hold values that are not finite")
    return values.astype(np.float32)


def decode_uint8(buffers: Sequence[memoryview], height: int) -> Floats:
    """Rows float32 [height, D] of offset, scale and uint8 values; in place, four bytes for each that came.

    Raises:
        FederationError: ``not_finite``, or ``malformed`` where offset and scale are not those of :func:`encode_rows`.
    """
    offset, scale = floats(buffers[0]), floats(buffers[1])
    if not (np.abs(offset) <= LARGEST).all():  # NaN compares False
        raise FederationError(Refusal.NOT_FINITE, f"offset: a column's is not finite or beyond {LARGEST:g}")
    if not ((scale >= 2.0**_LEAST_EXPONENT) & (scale <= LARGEST) & (np.frexp(scale)[0] == _POWER)).all():
        raise FederationError(Refusal.MALFORMED, "scale: a column's step is not a power of two")
    rows = np.frombuffer(buffers[2], np.uint8).reshape(height, -1).astype(np.float32)
    rows *= scale
    rows += offset
    check_rows(rows)
    multiples = offset.astype(np.float64) / scale.astype(np.float64)
    same = raw(_steps(rows).astype(np.float32)) == raw(scale) and raw(rows.min(0)) == raw(offset)
    if not same or (np.rint(multiples) != multiples).any():
        raise FederationError(Refusal.MALFORMED, "offset and scale are not the ones of these rows")
    return rows


def raw(values: Floats) -> bytes:
    """Little-endian bytes of float32 values."""
    return values.astype("<f4").tobytes()


def floats(buffer: memoryview) -> Floats:
    """A copy of the float32 values of their little-endian bytes."""
    return np.frombuffer(buffer, "<f4").astype(np.float32)
