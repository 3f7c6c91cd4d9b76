"""Rows in int8: bounded error, exact when read back, the same bytes when encoded again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge.errors import DataError
from edge.memory.rows import decode_rows, encode_rows, round_rows

ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 9)),
    elements=st.floats(-(2.0**126), 2.0**126, width=32),
)


@settings(max_examples=200, deadline=None)
@given(rows=ROWS)
def test_a_decoded_value_is_at_most_half_a_scale_away(rows: np.ndarray) -> None:
    values, scale = encode_rows(rows)
    assert values.dtype == np.int8
    assert values.min() >= -127
    assert scale.shape == (len(rows), 1)
    assert (scale > 0).all()
    decoded = decode_rows(values, scale)
    assert decoded.dtype == np.float32
    lost = np.abs(decoded.astype(np.float64) - rows)
    # A row below 1e-30 becomes zeros.
    assert (lost <= np.where(np.abs(rows).max(1, keepdims=True) < 1e-30, 1e-30, 0.5001 * scale)).all()


@settings(max_examples=200, deadline=None)
@given(rows=ROWS)
def test_rounded_rows_come_back_bit_by_bit(rows: np.ndarray) -> None:
    once = round_rows(rows)
    first, again = encode_rows(once), encode_rows(round_rows(once))
    assert np.array_equal(round_rows(once), once)
    assert first[0].tobytes() == again[0].tobytes()
    assert first[1].tobytes() == again[1].tobytes()


def test_each_row_has_a_scale_of_its_own() -> None:
    rows = np.array([[1.0, -0.5], [1000.0, 3.0]], np.float32)
    values, scale = encode_rows(rows)
    assert values[:, 0].tolist() == [127, 127]
    np.testing.assert_allclose(scale[:, 0], rows[:, 0] / 127, rtol=1e-4)


def test_rows_of_zeros_stay_zeros() -> None:
    assert not round_rows(np.zeros((3, 4), np.float32)).any()


@pytest.mark.parametrize(
    "rows",
    [
        np.zeros((2, 3)),
        np.zeros(3, np.float32),
        np.zeros((2, 0), np.float32),
        np.full((2, 3), np.nan, np.float32),
        np.full((2, 3), -np.inf, np.float32),
        np.full((2, 3), 3e38, np.float32),
    ],
)
def test_what_is_no_bank_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"float32 \[rows, channels\]|not finite"):
        encode_rows(rows)
