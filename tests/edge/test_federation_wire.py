"""The bytes of updates and banks: equal after a journey, small, stable, and refused by a code when they are junk."""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edge.errors import FederationError
from edge.federation.refusals import Refusal
from edge.federation.update import Order, WireRows
from edge.federation.wire import Limits, decode_bank, decode_update, encode_bank, encode_update
from edge.federation.wire_rows import on_wire
from tests.edge.federation_values import CREATED, bank, equal, mutate, other_value, update

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parent / "golden"
PREFIX = struct.Struct("<4sHI")
LIMITS = Limits()
EXAMPLES = 2000
golden_values = {
    "update-float16-1.bin": lambda: update(seed=1, subclass="größe 3", round=7, base_version=6),
    "update-uint8-1.bin": lambda: update(seed=2, wire=WireRows.UINT8, order=Order.POSITIONAL),
    "bank-1.bin": lambda: bank(seed=3),
}


def encode(value: Any) -> bytes:
    return encode_bank(value) if hasattr(value, "members") else encode_update(value)


def decode(data: bytes, limits: Limits = LIMITS) -> Any:
    return decode_bank(data, limits) if data[:4] == b"LNWB" else decode_update(data, limits)


def code_of(data: bytes, limits: Limits = LIMITS) -> Refusal:
    with pytest.raises(FederationError) as caught:
        decode(data, limits)
    assert len(str(caught.value)) < 500
    return caught.value.code


def changed_header(data: bytes, change: Callable[[dict[str, Any]], object], **dump: Any) -> bytes:
    """The payload with another header, its length corrected."""
    size = PREFIX.unpack(data[: PREFIX.size])[2]
    header = json.loads(data[PREFIX.size : PREFIX.size + size])
    change(header)
    form = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False} | dump
    return with_header(data, json.dumps(header, **form).encode())


def with_header(data: bytes, text: bytes) -> bytes:
    magic, schema, size = PREFIX.unpack(data[: PREFIX.size])
    return PREFIX.pack(magic, schema, len(text)) + text + data[PREFIX.size + size :]


def buffer_start(data: bytes) -> int:
    return PREFIX.size + PREFIX.unpack(data[: PREFIX.size])[2]


@pytest.mark.parametrize("wire", WireRows)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (512, 152)])
def test_update_comes_back_bit_for_bit(wire: WireRows, shape: tuple[int, int]) -> None:
    before = update(rows=shape[0], columns=shape[1], wire=wire)
    after = decode_update(encode_update(before), LIMITS)
    assert equal(before, after)
    assert after.rows.flags.writeable, "a view into the message would keep or change it"


def test_bank_comes_back_bit_for_bit() -> None:
    for before in (bank(), bank(rows=1024, columns=152), bank(members=())):
        assert equal(before, decode_bank(encode_bank(before), LIMITS))


@given(
    arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.floats(-6e4, 6e4, width=32)),
    st.sampled_from(WireRows),
    st.sampled_from([1.0, 1e-3, 1e-30, 1e-42]),
    st.sampled_from([0.0, 1.0, -5000.0]),
)
@settings(max_examples=200, deadline=None)
def test_rounded_rows_travel_exactly_and_rounding_again_changes_nothing(
    rows: np.ndarray, wire: WireRows, factor: float, offset: float
) -> None:
    rows = np.clip(rows * np.float32(factor) + np.float32(offset), -6e4, 6e4).astype(np.float32)
    rounded = on_wire(rows, wire)
    assert on_wire(rounded, wire).tobytes() == rounded.tobytes()
    sent = replace(update(rows=rows.shape[0], columns=rows.shape[1]), rows=rounded, wire=wire)
    assert equal(sent, decode_update(encode_update(sent), LIMITS))
    if wire is WireRows.UINT8:
        spread = rows.max(0).astype(np.float64) - rows.min(0)
        bound = np.maximum(spread / 254, 2.0**-127)
        assert (np.abs(rounded.astype(np.float64) - rows) <= bound).all()


@pytest.mark.parametrize(
    "column", [[0.5, 255.5, 3.0], [-1.5, 253.5, 1.0], [7.0, 7.0, 7.0], [5000.0, 5000.0005, 5000.0], [1e-44, 3e-44, 0.0]]
)
def test_columns_at_the_edge_of_what_a_byte_spans(column: list[float]) -> None:
    """Rounding to even widens the first two by a step; the others are narrow, or far from zero."""
    rounded = on_wire(np.asarray(column, np.float32)[:, None], WireRows.UINT8)
    sent = replace(update(rows=3, columns=1), rows=rounded, wire=WireRows.UINT8)
    assert equal(sent, decode_update(encode_update(sent), LIMITS))
    assert np.abs(rounded[:, 0].astype(np.float64) - column).max() <= max((max(column) - min(column)) / 254, 2.0**-12)


def test_payload_over_the_limit_is_refused_before_it_is_read() -> None:
    for value in (update(), bank()):
        data = encode(value)
        assert code_of(data, Limits(max_bytes=len(data) - 1)) is Refusal.TOO_LARGE
        assert equal(value, decode(data, Limits(max_bytes=len(data))))


def test_rows_that_the_wire_cannot_hold_are_refused_before_they_leave() -> None:
    for wire in WireRows:
        rows = np.asarray([[0.1, 0.2], [0.3, 0.7], [0.123456, 90.0]], np.float32)
        with pytest.raises(FederationError, match="on_wire") as caught:
            encode_update(replace(update(columns=2), rows=rows, wire=wire))
        assert caught.value.code is Refusal.MALFORMED


@pytest.mark.parametrize("wire", WireRows)
def test_update_of_512_by_152_fits_its_budget(wire: WireRows) -> None:
    sent = update("a-plant-with-a-long-name/a-box-with-a-long-name", rows=512, columns=152, wire=wire)
    size = len(encode_update(sent))
    print(f"512 x 152 {wire.value}: {size} bytes")  # noqa: T201 (the figure)
    assert size <= (165_000 if wire is WireRows.FLOAT16 else 90_000)


@pytest.mark.parametrize("name", golden_values)
def test_bytes_of_version_one_stay_as_they_were(name: str) -> None:
    """Written once by the program that first shipped this version; boxes of that version are in the field."""
    golden = (GOLDEN / name).read_bytes()
    value = golden_values[name]()
    assert equal(value, decode(golden))
    assert encode(value) == golden


@pytest.mark.parametrize("value", [update(), bank()], ids=["update", "bank"])
def test_payload_of_another_schema_is_refused_by_its_own_code(value: Any) -> None:
    data = encode(value)
    for schema in (0, 2, 65535):
        assert code_of(data[:4] + struct.pack("<H", schema) + data[6:]) is Refusal.BAD_VERSION


@pytest.mark.parametrize("value", [update(), update(wire=WireRows.UINT8), bank()], ids=["float16", "uint8", "bank"])
def test_payload_cut_anywhere_or_longer_is_malformed(value: Any) -> None:
    data = encode(value)
    assert {code_of(data[:size]) for size in range(len(data))} == {Refusal.MALFORMED}
    assert code_of(data + b"\0") is Refusal.MALFORMED


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda h: h.update(extra=1), Refusal.MALFORMED),
        (lambda h: h.pop("nonce"), Refusal.MALFORMED),
        (lambda h: h.update(round=0), Refusal.MALFORMED),
        (lambda h: h.update(round=True), Refusal.MALFORMED),
        (lambda h: h.update(round=1.0), Refusal.MALFORMED),
        (lambda h: h.update(n_frames=float("nan")), Refusal.MALFORMED),
        (lambda h: h.update(n_frames=10**400), Refusal.MALFORMED),
        (lambda h: h.update(nonce="A" * 32), Refusal.MALFORMED),
        (lambda h: h.update(embedding_id="ab"), Refusal.MALFORMED),
        (lambda h: h.update(box="no slash"), Refusal.MALFORMED),
        (lambda h: h.update(box="a/b/c"), Refusal.MALFORMED),
        (lambda h: h.update(fleet="x" * 201), Refusal.MALFORMED),
        (lambda h: h.update(product="line\nbreak"), Refusal.MALFORMED),
        (lambda h: h.update(created="2030-01-02"), Refusal.MALFORMED),
        (lambda h: h.update(created="2030-01-02T03:04:05.67Z"), Refusal.MALFORMED),
        (lambda h: h.update(wire="float64"), Refusal.MALFORMED),
        (lambda h: h.update(shape=[3]), Refusal.MALFORMED),
        (lambda h: h.update(shape=[0, 4]), Refusal.MALFORMED),
        (lambda h: h.update(shape=[-3, -4]), Refusal.MALFORMED),
        (lambda h: h.update(shape=[2**32, 2**32]), Refusal.TOO_LARGE),
        (lambda h: h.update(shape=[4097, 4]), Refusal.TOO_LARGE),
        (lambda h: h.update(shape=[4, 3]), Refusal.BAD_SHAPE),
        (lambda h: h.update(shape=[3, 5]), Refusal.BAD_SHAPE),
        (lambda h: h.update(wire="uint8"), Refusal.BAD_SHAPE),
        (lambda h: h["lengths"].append(0), Refusal.BAD_SHAPE),
        (lambda h: h.update(lengths=[]), Refusal.BAD_SHAPE),
    ],
)
def test_header_that_lies_is_refused(change: Callable[[dict[str, Any]], object], code: Refusal) -> None:
    assert code_of(changed_header(encode_update(update()), change)) is code


def test_header_has_one_spelling() -> None:
    data = encode_update(update())
    header = data[PREFIX.size : buffer_start(data)]
    assert code_of(changed_header(data, lambda _: None, sort_keys=False, separators=(", ", ": "))) is Refusal.MALFORMED
    assert code_of(with_header(data, header[:-1] + b',"round":1}')) is Refusal.MALFORMED, "a key twice"
    assert code_of(with_header(data, header.replace(b'"round":1', b'"round":1e0'))) is Refusal.MALFORMED
    assert code_of(with_header(data, header.replace(b"plant", b"pl\xffnt"))) is Refusal.MALFORMED, "not UTF-8"
    assert code_of(with_header(data, b"[" * 4000)) is Refusal.MALFORMED, "deep"
    assert code_of(with_header(data, b'{"a":' * 800)) is Refusal.MALFORMED, "deep"
    assert code_of(with_header(data, b" " * 8193)) is Refusal.TOO_LARGE
    assert code_of(data[:6] + b"\xff\xff\xff\xff" + data[10:]) is Refusal.TOO_LARGE, "header of 4 GiB"
    assert equal(decode_update(with_header(data, header), LIMITS), update()), "the control: nothing changed"


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0x7C01])
def test_rows_with_infinity_or_nan_are_refused(bits: int) -> None:
    data = bytearray(encode_update(update()))
    struct.pack_into("<H", data, buffer_start(bytes(data)) + 6, bits)
    assert code_of(bytes(data)) is Refusal.NOT_FINITE


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("support", np.nan, Refusal.NOT_FINITE),
        ("support", 0.0, Refusal.BAD_SUPPORT),
        ("support", -1.0, Refusal.BAD_SUPPORT),
        ("frames", np.inf, Refusal.NOT_FINITE),
        ("frames", -1.0, Refusal.BAD_SUPPORT),
        ("frames", 99.0, Refusal.BAD_SUPPORT),
        ("mean", np.nan, Refusal.NOT_FINITE),
        ("std", -0.5, Refusal.BAD_SUPPORT),
    ],
)
def test_numbers_beside_the_rows_are_checked_on_both_sides(name: str, value: float, code: Refusal) -> None:
    good = update()
    values = getattr(good, name).copy()
    values[1] = value
    with pytest.raises(FederationError, match=name) as caught:
        encode_update(replace(good, **{name: values}))
    assert caught.value.code is code
    data = bytearray(encode_update(good))
    at = data.index(getattr(good, name).astype("<f4").tobytes())
    data[at : at + values.nbytes] = values.astype("<f4").tobytes()
    assert code_of(bytes(data)) is code


def test_update_with_fields_that_do_not_fit_does_not_leave() -> None:
    for change, code in [
        ({"rows": np.zeros((3, 4), np.float64)}, Refusal.BAD_SHAPE),
        ({"rows": np.zeros((0, 4), np.float32)}, Refusal.BAD_SHAPE),
        ({"rows": np.full((3, 4), 7e4, np.float32)}, Refusal.NOT_FINITE),
        ({"rows": np.full((3, 4), np.nan, np.float32)}, Refusal.NOT_FINITE),
        ({"support": np.ones(2, np.float32)}, Refusal.BAD_SHAPE),
        ({"box": "one"}, Refusal.MALFORMED),
        ({"created": datetime(2030, 1, 1)}, Refusal.MALFORMED),  # noqa: DTZ001 (the fault under test)
        ({"round": 2**60}, Refusal.MALFORMED),
    ]:
        with pytest.raises(FederationError) as caught:
            encode_update(replace(update(), **change))
        assert caught.value.code is code, change
    local = CREATED.astimezone(timezone(timedelta(hours=5)))
    assert encode_update(replace(update(), created=local)) == encode_update(update()), "one text for one moment"


def test_scale_and_offset_other_than_the_encoder_s_are_refused() -> None:
    sent = update(wire=WireRows.UINT8)
    data, start = encode_update(sent), buffer_start(encode_update(sent))
    offset, scale = np.frombuffer(data, "<f4", 4, start), np.frombuffer(data, "<f4", 4, start + 16)
    for at, values, code in [
        (start, offset + np.float32(1e-6), Refusal.MALFORMED),
        (start, offset * np.float32(np.nan), Refusal.NOT_FINITE),
        (start, offset + np.float32(7e4), Refusal.NOT_FINITE),
        (start + 16, scale * 3, Refusal.MALFORMED),
        (start + 16, scale * 2, Refusal.MALFORMED),
        (start + 16, -scale, Refusal.MALFORMED),
        (start + 16, scale * 0, Refusal.MALFORMED),
        (start + 16, scale * np.float32(np.inf), Refusal.MALFORMED),
    ]:
        altered = data[:at] + values.astype("<f4").tobytes() + data[at + 16 :]
        assert code_of(altered) is code, (at, values)
    narrow = data[: start + 32] + bytes(12) + data[start + 44 :]
    assert code_of(narrow) is Refusal.MALFORMED, "a finer step would do for these rows"
    raised = data[: start + 32] + bytes(value // 2 + 1 for value in data[start + 32 : start + 44]) + data[start + 44 :]
    assert code_of(raised) is Refusal.MALFORMED, "the offset is below all rows"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"mass": np.asarray([0.5, 0.5, 0.5], np.float32)}, Refusal.BAD_SUPPORT),
        ({"mass": np.asarray([1.0, 0.0, 0.0], np.float32)}, Refusal.BAD_SUPPORT),
        ({"boxes": np.ones(3, np.int64)}, Refusal.BAD_SHAPE),
        ({"members": ("north/two", "north/one")}, Refusal.MALFORMED),
        ({"members": ("north/one", "north/one")}, Refusal.MALFORMED),
        ({"members": ("one",)}, Refusal.MALFORMED),
        ({"pool": "cd" * 32}, Refusal.MALFORMED),
        ({"rows": np.full((3, 4), 0.1, np.float32)}, Refusal.MALFORMED),
    ],
)
def test_bank_with_fields_that_do_not_fit_does_not_leave(change: dict[str, Any], code: Refusal) -> None:
    with pytest.raises(FederationError) as caught:
        encode_bank(replace(bank(), **change))
    assert caught.value.code is code


def test_bank_whose_names_lie_is_refused() -> None:
    data = encode_bank(bank())
    assert code_of(changed_header(data, lambda h: h.update(members=3))) is Refusal.MALFORMED
    assert code_of(changed_header(data, lambda h: h.update(members=2**40))) is Refusal.TOO_LARGE
    assert code_of(data.replace(b"north/two", b"north/t\xffo")) is Refusal.MALFORMED
    assert code_of(data.replace(b"north/two", b"north/aaa")) is Refusal.MALFORMED
    assert code_of(data.replace(b"north/two", b"north\0two")) is Refusal.MALFORMED


def peak_of(data: bytes, limits: Limits) -> int:
    with contextlib.suppress(FederationError):
        decode(data, limits)  # what is imported and cached on first use is no cost of the message
    tracemalloc.start()
    try:
        decode(data, limits)
    except FederationError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize("wire", WireRows)
@pytest.mark.parametrize("shape", [(512, 152), (2048, 500)])
def test_decoding_stays_below_four_times_the_limit(wire: WireRows, shape: tuple[int, int]) -> None:
    data = encode_update(update(rows=shape[0], columns=shape[1], wire=wire))
    limits = Limits(max_bytes=max(len(data), 2**17))  # numpy's buffers are 32 KiB whatever the payload
    peak = peak_of(data, limits)
    print(f"{wire.value}: {len(data)} bytes, peak {peak} = {peak / len(data):.2f} x")  # noqa: T201 (the figure)
    assert peak <= 4 * limits.max_bytes
    lie = changed_header(data, lambda header: header.update(shape=[4096, 2048]))
    assert peak_of(lie, limits) < len(data), "a declared size is checked before anything is allocated for it"


def test_decoding_a_bank_of_many_names_stays_below_four_times_the_limit() -> None:
    limits = Limits(max_bytes=2**20)
    many = tuple(sorted(f"{a:x}/{b:x}" for a in range(128) for b in range(128)))
    peak = peak_of(encode_bank(bank(members=many)), limits)
    print(f"{len(many)} names: peak {peak / limits.max_bytes:.2f} x")  # noqa: T201 (the figure)
    assert peak <= 4 * limits.max_bytes


SOURCES = [encode_update(update(seed=1)), encode_update(update(wire=WireRows.UINT8)), encode_update(update(columns=1))]
BANKS = [encode_bank(bank()), encode_bank(bank(rows=1, columns=1, members=()))]


def only_typed_errors(data: bytes, magic: bytes) -> None:
    reader = decode_update if magic == b"LNWU" else decode_bank
    try:
        value = reader(data, LIMITS)
    except FederationError:
        return
    assert encode(value) == data, "what is accepted has one spelling"


def junk(sources: list[bytes], which: int, program: bytes) -> bytes:
    source = sources[which % len(sources)]
    start = buffer_start(source)
    how = which % 5
    if how == 0:
        return with_header(source, other_value(source[PREFIX.size : start], program))
    if how == 1:
        return with_header(source, mutate(source[PREFIX.size : start], program))
    return source[:10] + program if how == 2 else program if how == 3 else mutate(source, program)


programs = st.binary(min_size=4, max_size=16)


@given(st.integers(0, 99), programs)
@settings(max_examples=EXAMPLES, deadline=None)
def test_update_of_any_bytes_is_a_value_or_a_typed_error(which: int, program: bytes) -> None:
    only_typed_errors(junk(SOURCES, which, program), b"LNWU")


@given(st.integers(0, 99), programs)
@settings(max_examples=EXAMPLES, deadline=None)
def test_bank_of_any_bytes_is_a_value_or_a_typed_error(which: int, program: bytes) -> None:
    only_typed_errors(junk(BANKS, which, program), b"LNWB")
