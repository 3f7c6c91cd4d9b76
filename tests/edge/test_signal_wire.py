"""The wire format of signals: what is written is read, however it is cut, and nothing else gets through."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.capture.signal_wire import (
    MAGIC,
    MAX_PIECES,
    Chunk,
    StreamParser,
    pack,
    read_messages,
    to_json,
    to_text,
    unpack,
)
from edge.errors import CaptureError

VALUES = st.one_of(st.floats(width=32, allow_infinity=False), st.just(float("nan")))


@st.composite
def chunks(draw: st.DrawFn) -> Chunk:
    length, channels = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    flat = draw(st.lists(VALUES, min_size=length * channels, max_size=length * channels))
    return Chunk(
        draw(st.integers(0, 2**40)),
        np.array(flat, np.float32).reshape(length, channels),
        draw(st.sampled_from((None, 250.0, 500.0))),
    )


def joined(found: list[Chunk]) -> tuple[list[int], np.ndarray]:
    return [one.first for one in found], np.concatenate([one.samples for one in found])


@settings(max_examples=100, deadline=None)
@given(sent=st.lists(chunks(), min_size=1, max_size=4), form=st.sampled_from((pack, to_json)), step=st.integers(1, 60))
def test_what_is_sent_is_read_however_it_is_cut(sent: list[Chunk], form: object, step: int) -> None:
    data = b"".join(form(one) for one in sent)
    parser = StreamParser()
    found = [one for begin in range(0, len(data), step) for one in parser.feed(data[begin : begin + step])]
    assert parser.broken == 0
    assert [(one.first, one.rate_hz) for one in found] == [(one.first, one.rate_hz) for one in sent]
    for one, other in zip(found, sent, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)


def test_text_lines_are_read_one_sample_each() -> None:
    chunk = Chunk(7, np.array([[0.5, -1], [np.nan, 2]], np.float32))
    first, values = joined(StreamParser().feed(to_text(chunk)))
    assert first == [7, 8]
    np.testing.assert_array_equal(values, chunk.samples)


def test_names_of_channels_travel_in_json() -> None:
    chunk = Chunk(0, np.ones((1, 2), np.float32), 500.0, ("I", "II"))
    assert read_messages(to_json(chunk).rstrip())[0].channels == ("I", "II")


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_rubbish_is_counted_or_refused(data: bytes) -> None:
    parser = StreamParser()
    try:
        found = parser.feed(data)
    except CaptureError:
        return
    assert all(np.isfinite(one.samples).any() or np.isnan(one.samples).all() for one in found)


@pytest.mark.parametrize(
    "line",
    [
        b'{"seq": 1}', b'{"seq": -1, "samples": [[1]]}', b'{"seq": true, "samples": [[1]]}',
        b'{"seq": 1, "samples": [[1], [1, 2]]}', b'{"seq": 1, "samples": []}', b"S 1", b"S x 1", b"[1, 2]", b"null",
        b'{"seq": 1, "samples": [[1]], "rate_hz": 0}', b'{"seq": 1, "samples": [[1, 2]], "channels": ["a"]}',
        b'{"seq": 9223372036854775808, "samples": [[1]]}',
    ],
)  # fmt: skip
def test_line_that_is_no_chunk_is_counted_and_the_next_one_read(line: bytes) -> None:
    parser = StreamParser()
    (found,) = parser.feed(line + b"\nS 4 1.5\n")
    assert (found.first, parser.broken) == (4, 1)


def test_damaged_packed_message_is_refused() -> None:
    message = bytearray(pack(Chunk(1, np.ones((3, 2), np.float32))))
    message[-1] ^= 1
    with pytest.raises(CaptureError, match="checksum"):
        StreamParser().feed(bytes(message))


def test_packed_message_that_claims_too_much_is_refused_before_it_is_awaited() -> None:
    message = bytearray(pack(Chunk(1, np.ones((1, 2), np.float32))))
    message[8:12] = (2**31).to_bytes(4, "little")
    with pytest.raises(CaptureError, match="at most"):
        StreamParser().feed(bytes(message))


def test_infinite_value_is_no_measurement() -> None:
    assert np.isnan(unpack(pack(Chunk(1, np.array([[np.inf]], np.float32)))).samples).all()


def test_message_of_a_queue_must_be_whole() -> None:
    with pytest.raises(CaptureError, match="complete"):
        read_messages(MAGIC + b"\0\0")
    whole = pack(Chunk(0, np.ones((3, 2), np.float32)))
    assert len(read_messages(whole + whole)) == 2
    with pytest.raises(CaptureError, match="complete"):
        read_messages(whole + whole[:-1])
    with pytest.raises(CaptureError, match="longer"):
        read_messages(b" " * 5 * 2**20)


@pytest.mark.parametrize("line", [b"S 7 1.5\n", b"\n"])
def test_message_of_a_queue_with_too_many_lines_is_refused_before_all_are_read(line: bytes) -> None:
    assert len(read_messages(MAX_PIECES // 2 * (line + b"S 7 1\n"))) >= MAX_PIECES // 2
    with pytest.raises(CaptureError, match="more than 65536 lines"):
        read_messages(2**22 // len(line) * line)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("line", [b"S 1 1e300\n", b'{"seq": 1, "samples": [[-1e300]]}\n'])
def test_value_that_no_sensor_has_is_no_measurement(line: bytes) -> None:
    (found,) = StreamParser().feed(line)
    assert np.isnan(found.samples).all()
