"""Rows of a bank in int8: a quarter of the bytes, one scale for each row, the same float32 rows at every reading.

Numpy only; it must not know files or graphs.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from edge.errors import DataError

if TYPE_CHECKING:
    import numpy.typing as npt

    Rows = npt.NDArray[np.float32]

_LARGEST = 127
_SCALE_BITS = 16  # a product of 7 and 16 bits fits the 24 of a float32: decoding rounds nothing
_LEAST, _MOST = 1e-30, 1e38  # between them no scale and no product leaves the normal float32 numbers


class RowsPrecision(str, Enum):
    """Numbers that the rows of a state are stored and shipped in.

    ``float32``: as computed. ``int8``: 8 bits a value and one float32 scale a row; the rows are rounded when the
    bank is made, so whoever reads them back has exactly the bank that was validated. ``float16``: rounded likewise.
    """

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    INT8 = "int8"


def encode_rows(rows: Rows) -> tuple[npt.NDArray[np.int8], Rows]:
    """Round rows to int8, symmetric, with one scale a row.

    The scale is the row's largest magnitude / 127, rounded up to 16 significant bits: so the decoded row is exact,
    and encoding it again gives the same bytes.

    Args:
        rows: float32 [R, D], magnitudes up to 1e38; a row below 1e-30 becomes zeros.

    Returns:
        int8 [R, D] in -127..127 and scales float32 [R, 1] > 0; a decoded value is at most half a scale away.

    Raises:
        DataError: the rows are not float32 [R, D] with D >= 1, or a value is not finite or beyond 1e38.
    """
    if rows.dtype != np.float32 or rows.ndim != 2 or not rows.shape[1]:  # noqa: PLR2004 (rows are a matrix)
        raise DataError(f"rows are {rows.dtype} {list(rows.shape)}, int8 needs float32 [rows, channels]; store float32")
    peak = np.abs(rows).max(1, keepdims=True).astype(np.float64)
    if not (peak <= _MOST).all():  # NaN compares False
        raise DataError(f"rows hold values that are not finite or beyond {_MOST:g}; make that bank again")
    fraction, exponent = np.frexp(np.where(peak >= _LEAST, peak, 1.0) / _LARGEST)
    scale = np.ldexp(np.ceil(np.ldexp(fraction, _SCALE_BITS)), exponent - _SCALE_BITS)
    return np.rint(rows / scale).astype(np.int8), scale.astype(np.float32)


def decode_rows(values: npt.NDArray[np.int8], scale: Rows) -> Rows:
    """Return the rows float32 [R, D] of int8 [R, D] and scales float32 [R, 1]; exact for what encode_rows gives."""
    return values.astype(np.float32) * scale


def round_rows(rows: Rows) -> Rows:
    """Return the rows as they come back from int8.

    Args:
        rows: as in :func:`encode_rows`.

    Raises:
        DataError: as in :func:`encode_rows`.
    """
    return decode_rows(*encode_rows(rows))
