"""What a PLC reads and writes: addresses, encodings, counters and their wrap."""

from __future__ import annotations

import math
import struct
import threading
import time
from typing import Any

import pytest

from edge.frames import Decision
from edge.inspection.parts import Part, PartVerdict, Reason, View
from edge.inspection.registers import (
    ENTRY_WORDS,
    LATEST,
    RING,
    RING_BASE,
    STATION_BASE,
    STATION_WORDS,
    TRIGGER_BASE,
    BoxState,
    Refused,
    Registers,
    Trouble,
)
from tests.edge.station_bench import EPOCH, MS

TRIGGERED = (123_456_789, 4711)


def verdict(
    number: int = 0, decision: Decision = Decision.OK, *, mark: tuple[int, int] | None = None, ms: float = 12
) -> PartVerdict:
    part = Part(number, str(number), mark, 0, EPOCH, None)
    views = (View("a", Decision.OK), View("b", decision))
    code = Reason.DEADLINE if decision is Decision.NOT_JUDGED else Reason.NONE
    return PartVerdict(part, decision, code, "", views, round(ms * MS))


def table(*stations: str, trigger: Any = None) -> Registers:
    registers = Registers()
    registers.lay_out([(name, trigger) for name in stations])
    return registers


def entry(registers: Registers, place: int = LATEST, station: int = 0) -> list[int]:
    found = registers.read(STATION_BASE + STATION_WORDS * station + place, ENTRY_WORDS)
    assert isinstance(found, list)
    return found


def test_verdict_is_where_the_manual_says() -> None:
    registers = table("one", "two")

    registers.verdict("two", verdict(decision=Decision.NOK, mark=TRIGGERED, ms=87.6), 1.5)

    high, low = struct.unpack(">HH", struct.pack(">f", 1.5))
    assert entry(registers, station=1) == [
        1, 2, 0, 4711, 123_456_789 >> 16, 123_456_789 & 0xFFFF, high, low, 88, 0b10,
    ]  # fmt: skip
    assert registers.read(STATION_BASE + STATION_WORDS, 2) == [0, 1]
    assert entry(registers, RING_BASE + ENTRY_WORDS, station=1) == entry(registers, station=1)
    assert entry(registers) == [0] * ENTRY_WORDS


@pytest.mark.parametrize(("decision", "code"), [("OK", 1), ("NOK", 2), ("NOT_JUDGED", 3)])
def test_decision_codes(decision: str, code: int) -> None:
    registers = table("one")
    registers.verdict("one", verdict(decision=Decision(decision)), 1.0)
    assert entry(registers)[1] == code


@pytest.mark.parametrize(("score", "bits"), [(math.nan, 0x7FC00000), (1e300, 0x7F800000), (-1e300, 0xFF800000)])
def test_score_that_is_no_float32(score: float, bits: int) -> None:
    registers = table("one")
    registers.verdict("one", verdict(), score)
    assert entry(registers)[6:8] == [bits >> 16, bits & 0xFFFF]


def test_latency_stops_at_its_limit() -> None:
    registers = table("one")
    registers.verdict("one", verdict(ms=70_000), 1.0)
    assert entry(registers)[8] == 65535


def test_reader_that_is_at_most_a_ring_behind_loses_nothing_across_the_wrap() -> None:
    registers = table("one")
    read = 0
    for number in range(65_536 + 50):
        registers.verdict("one", verdict(number), float(number % 1000))
        if number % RING == RING - 1:
            while read != (counter := registers.read(STATION_BASE + 1, 1)[0]):  # type: ignore[index]  # it is there
                read = (read + 1) % 65_536
                found = entry(registers, RING_BASE + ENTRY_WORDS * (read % RING))
                assert found[0] == read
            assert counter == read
    assert read == ((65_536 + 50) // RING * RING) % 65_536


def test_reader_that_is_farther_behind_sees_that_it_is() -> None:
    registers = table("one")
    for number in range(RING + 1):
        registers.verdict("one", verdict(number), 1.0)

    assert entry(registers, RING_BASE + ENTRY_WORDS)[0] == RING + 1


def test_trigger_is_a_counter_that_changes() -> None:
    heard: list[tuple[int, int]] = []
    registers = table("one", trigger=lambda number, counter: heard.append((number, counter)) or "")

    assert registers.write(TRIGGER_BASE, [1, 2, 1]) is None
    assert registers.write(TRIGGER_BASE, [1, 2, 1]) is None  # a client's retry
    assert registers.write(TRIGGER_BASE, [0, 9]) is None  # a number alone is no part
    assert registers.write(TRIGGER_BASE + 2, [2]) is None
    for counter in (65_535, 0):
        assert registers.write(TRIGGER_BASE + 2, [counter]) is None

    assert heard == [(65_538, 1), (9, 2), (9, 65_535), (9, 0)]
    assert registers.read(STATION_BASE, 1) == [0]
    assert registers.read(TRIGGER_BASE, 3) == [0, 9, 0]


def test_accepted_counter_is_there_before_the_verdict() -> None:
    registers = Registers()
    seen: list[object] = []

    def trigger(number: int, counter: int) -> str:
        registers.verdict("one", verdict(mark=(number, counter)), math.nan)
        seen.append(registers.read(STATION_BASE, 2))
        return "too many parts"

    registers.lay_out([("one", trigger)])
    registers.write(TRIGGER_BASE, [0, 7, 5])

    assert seen == [[5, 1]]


def test_box_that_stops_accepts_no_trigger_and_forgets_the_write() -> None:
    registers = table("one", trigger=lambda *_: pytest.fail("no part"))
    registers.beat(BoxState.STOPPING, 0)

    assert registers.write(TRIGGER_BASE, [0, 7, 5]) is Refused.BUSY
    assert registers.read(STATION_BASE, 1) == [0]
    assert registers.read(TRIGGER_BASE, 3) == [0, 0, 0]


def test_words_that_do_not_exist_or_are_not_to_be_written() -> None:
    registers = table("one", "two", trigger=lambda *_: "")
    registers.lay_out([("one", lambda *_: ""), ("two", None)])

    for address, count in [(0, 11), (10, 1), (90, 20), (199, 2), (300, 1), (9_999, 1), (10_003, 1), (10_010, 1),
                           (65_535, 1)]:  # fmt: skip
        assert registers.read(address, count) is Refused.ADDRESS, address
    for address in (0, 1, 100, 101, 299, 9_999, 10_003, 10_010, 65_535):
        assert registers.write(address, [1]) is Refused.ADDRESS, address
    assert registers.write(10_001, [1, 2, 3]) is Refused.ADDRESS
    assert registers.read(0, 10)[5] == 2  # type: ignore[index]  # it is there


def test_heartbeat_stands_still_while_the_box_is_not_well() -> None:
    registers = table()
    before = registers.read(1, 1)[0]  # type: ignore[index]  # it is there

    registers.beat(BoxState.RUNNING, 0)
    registers.beat(BoxState.UNHEALTHY, Trouble.BOX)
    registers.beat(BoxState.STOPPING, 0)
    assert registers.read(1, 3) == [before + 1, BoxState.STOPPING, 0]


def test_new_stations_draw_a_new_session_and_keep_the_counters_of_those_that_stay() -> None:
    registers = table("one", "two")
    registers.verdict("two", verdict(), 1.0)
    session = registers.read(4, 1)

    registers.lay_out([("two", None)])

    assert registers.read(4, 1) != session
    assert registers.read(STATION_BASE + 1, 1) == [1]


class Slow(list[int]):
    """Words whose writing lets every other thread have a look in between."""

    def __setitem__(self, *what: Any) -> None:
        super().__setitem__(*what)
        time.sleep(0)


def test_reader_never_sees_half_a_verdict() -> None:
    registers = table("one")
    block = registers._blocks["one"]
    block.words = Slow(block.words)
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            registers.verdict("one", verdict(number, mark=(number, number % 65_536), ms=number % 60_000), float(number))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(2_000):
            time.sleep(0)
            words = registers.read(STATION_BASE, STATION_WORDS)
            assert isinstance(words, list)
            latest = words[LATEST : LATEST + ENTRY_WORDS]
            place = RING_BASE + ENTRY_WORDS * (words[1] % RING)
            assert words[place : place + ENTRY_WORDS] == latest
            assert latest[0] == words[1]
            if latest[1]:
                score = struct.unpack(">f", struct.pack(">HH", *latest[6:8]))[0]
                assert score == latest[4] << 16 | latest[5]
    finally:
        stop.set()
        writer.join()
