"""Requests and replies: what goes over comes back, versions meet, and junk is only ever a typed error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from edge.errors import FederationError
from edge.federation.messages import (
    MAX_CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Chunk,
    Fetch,
    Header,
    Hello,
    Nothing,
    Offer,
    Part,
    Progress,
    Receipt,
    Refused,
    Reply,
    Request,
    Resume,
    Welcome,
    build,
    encode_message,
    parse_reply,
    parse_request,
    refused,
    request_id,
)
from edge.federation.refusals import Refusal
from tests.edge.federation_values import EMBEDDING, mutate, other_value

GOLDEN = Path(__file__).parent / "golden" / "messages-1.txt"
SHA = "cd" * 32
REQUESTS: list[Request] = [
    Hello(id=1, fleet="plant", box="north/one", product="größe 3", embedding_id=EMBEDDING, have_version=0),
    Offer(id=2, embedding_id=EMBEDDING, product="größe 3", round=4, sha256=SHA, size=161_375),
    Chunk(id=3, sha256=SHA, offset=32_768),
    Fetch(id=4, embedding_id=EMBEDDING, product="größe 3", version=0, offset=0),
]
REPLIES: list[Reply] = [
    Welcome(id=1, round=4, closes_in_ms=60_000, bank_version=3, max_chunk=32_768, max_update_bytes=2**22),
    Resume(id=2, sha256=SHA, offset=65_536),
    Progress(id=3, sha256=SHA, offset=65_536),
    Receipt(id=3, sha256=SHA, counted_in_round=5),
    Part(id=4, version=3, size=10, sha256=SHA, offset=6),
    Nothing(id=4, bank_version=0),
    Refused(id=0, code="stale_round", reason="round: 2 was closed"),
]
EVERY = [*REQUESTS, *REPLIES]
NAMES = [type(message).__name__ for message in EVERY]
EXAMPLES = 2000


def body_of(message: Header) -> bytes:
    return b"\x00\xffab" if isinstance(message, (Chunk, Part)) else b""


def frames_of(message: Any) -> list[bytes]:
    return encode_message(message, body_of(message))


def parse(message: Header, frames: list[bytes]) -> tuple[Header, bytes]:
    return parse_request(frames) if isinstance(message, get_args(Request)) else parse_reply(frames)


def code_of(message: Header, frames: list[bytes]) -> Refusal:
    with pytest.raises(FederationError) as caught:
        parse(message, frames)
    assert len(str(caught.value)) < 500
    return caught.value.code


def test_every_message_is_covered_here() -> None:
    assert {type(message) for message in EVERY} == {*get_args(Request), *get_args(Reply)}


@pytest.mark.parametrize("message", EVERY, ids=NAMES)
def test_message_comes_back_as_it_went(message: Any) -> None:
    assert parse(message, frames_of(message)) == (message, body_of(message))


def test_text_of_version_one_stays_as_it_was() -> None:
    """Written once by the program that first shipped this version; boxes of that version are in the field."""
    lines = GOLDEN.read_bytes().splitlines()
    assert lines == [frames_of(message)[0] for message in EVERY]
    for message, line in zip(EVERY, lines, strict=True):
        assert parse(message, [line, *frames_of(message)[1:]])[0] == message


def test_field_with_a_default_may_be_left_out() -> None:
    """What lets a later version add a field that earlier boxes do not send."""
    text = json.dumps(json.loads(frames_of(REQUESTS[0])[0]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert parse_request([text.replace(',"subclass":""', "").encode()])[0] == REQUESTS[0]


@pytest.mark.parametrize("message", EVERY, ids=NAMES)
def test_another_protocol_is_refused_by_its_own_code_whatever_else_it_says(message: Any) -> None:
    assert code_of(message, [b'{"kind":"greetings","v":2,"with":{"new":["things"]}}']) is Refusal.BAD_VERSION
    text = frames_of(message)[0]
    assert code_of(message, [text.replace(b'"v":1', b'"v":0'), *frames_of(message)[1:]]) is Refusal.BAD_VERSION


@pytest.mark.parametrize("message", EVERY, ids=NAMES)
def test_header_has_one_spelling_and_no_more_fields(message: Any) -> None:
    text, *body = frames_of(message)
    values = json.loads(text)
    for altered in (
        json.dumps(values, sort_keys=True).encode(),
        text[:-1] + b',"id":7}',
        text[:-1] + b',"x":1}',
        text.replace(b'"id":', b'"id":-'),
        text.replace(b'"id":', b'"id":1.5e0,"a":'),
        text.replace(b'"id":', b'"id":' + b"9" * 3000),
        text.replace(b'"id":', b'"id":NaN,"b":'),
        text.replace(b'"v":1', b'"v":true'),
        text.replace(b'"v":1', b'"v":"1"'),
        text[:-1],
        b"",
        b"[]",
        b"null",
        b"[" * 4000,
        b'{"id":' * 600,
        text.replace(b"{", b"\xff", 1),
    ):
        assert code_of(message, [altered, *body]) is Refusal.MALFORMED, altered
    assert code_of(message, [text.ljust(MAX_MESSAGE_BYTES + 1), *body]) is Refusal.TOO_LARGE


def test_request_is_no_reply() -> None:
    for request in REQUESTS:
        with pytest.raises(FederationError, match="kind"):
            parse_reply(frames_of(request))
    for reply in REPLIES:
        with pytest.raises(FederationError, match="kind"):
            parse_request(frames_of(reply))


@pytest.mark.parametrize("message", EVERY, ids=NAMES)
def test_frames_are_counted_and_bodies_stay_where_they_belong(message: Any) -> None:
    text = frames_of(message)[0]
    assert code_of(message, []) is Refusal.MALFORMED
    assert code_of(message, [text, b"a", b"b"]) is Refusal.MALFORMED
    if body_of(message):
        assert code_of(message, [text]) is Refusal.MALFORMED
        assert code_of(message, [text, b""]) is Refusal.MALFORMED
        assert code_of(message, [text, bytes(MAX_CHUNK_BYTES + 1)]) is Refusal.TOO_LARGE
        with pytest.raises(FederationError, match="body"):
            encode_message(message, b"")
    else:
        assert code_of(message, [text, b""]) is Refusal.MALFORMED
        with pytest.raises(FederationError, match="body"):
            encode_message(message, b"a")


def test_part_does_not_go_beyond_its_size() -> None:
    with pytest.raises(FederationError, match="size"):
        encode_message(Part(id=1, version=1, size=10, sha256=SHA, offset=7), b"abcd")


def test_strings_of_a_request_are_bounded() -> None:
    for change in ({"fleet": "x" * 201}, {"product": ""}, {"box": "x" * 500 + "/y"}, {"embedding_id": "AB" * 32}):
        with pytest.raises(FederationError) as caught:
            build(Hello, **(REQUESTS[0].model_dump() | change))
        assert caught.value.code is Refusal.MALFORMED
        assert next(iter(change)) in str(caught.value)


def test_longest_names_still_fit_a_header() -> None:
    wide = "\U0001f529" * 200
    hello = Hello(
        id=2**53 - 1, fleet=wide, box=f"{wide}/{wide}", product=wide, subclass=wide,
        embedding_id=EMBEDDING, have_version=2**53 - 1,
    )  # fmt: skip
    assert parse_request(encode_message(hello))[0] == hello


def test_refusal_travels_with_its_code_and_a_bounded_reason() -> None:
    for code in Refusal:
        reply = refused(FederationError(code, "x" * 1000), request=5)
        again = parse_reply(encode_message(reply))[0]
        assert isinstance(again, Refused)
        assert again.refusal is code
        assert (again.id, len(again.reason)) == (5, 300)
        assert len(code.sentence) > 20
    text = encode_message(refused(FederationError(Refusal.BUSY, "x")))[0]
    later = parse_reply([text.replace(b'"busy"', b'"on_strike"')])[0]
    assert isinstance(later, Refused)
    assert later.refusal is Refusal.OTHER


def test_final_refusals_are_those_that_sending_again_cannot_cure() -> None:
    assert not {Refusal.NO_SPACE, Refusal.BUSY, Refusal.BAD_HASH, Refusal.BAD_OFFSET, Refusal.OTHER} & {
        code for code in Refusal if code.final
    }
    assert Refusal.STALE_ROUND.final


def test_number_of_a_broken_request_is_read_where_it_can_be() -> None:
    assert request_id([b'{"id":17,"kind":"?"}', b"x"]) == 17
    for frames in ([], [b""], [b"\xff"], [b'{"id":-1}'], [b"[" * 4000], [b'{"id":1}'[:-1].ljust(9000) + b"}"]):
        assert request_id(frames) == 0


def test_message_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        REQUESTS[0].id = 3


def frames_after(how: int, program: bytes, text: bytes, body: list[bytes]) -> list[bytes]:
    """Another value in the header, other bytes in it, no header at all, or frames more or fewer."""
    if how < 3:
        return [other_value(text, program), *body]
    if how == 6:
        return [program, *body]
    frames = [mutate(text, program), *body]
    return [*frames[how % 2 :], *[program] * (program[0] % 3)] if how == 7 else frames


@given(st.integers(0, 7), st.binary(min_size=4, max_size=12))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_frames_are_a_message_or_a_typed_error(how: int, program: bytes) -> None:
    """Each example is tried on every kind of message."""
    for message in EVERY:
        text, *body = frames_of(message)
        frames = frames_after(how, program, text, body)
        request_id(frames)
        try:
            parsed, came = parse(message, frames)
        except FederationError:
            continue
        assert encode_message(parsed, came)  # type: ignore[arg-type]  # what parse gives is one of them
