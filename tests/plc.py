"""A control that talks to a box over Modbus TCP as docs/inspection.md tells it to."""

from __future__ import annotations

import struct
import time
from typing import TYPE_CHECKING, Any

from pymodbus.client import ModbusTcpClient

from edge.inspection.registers import (
    ENTRY_WORDS,
    RECIPE,
    RECIPE_ANSWERS,
    RECIPE_WRITTEN,
    RING,
    RING_BASE,
    STATION_BASE,
    TRIGGER_BASE,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SOON = 30.0
DECISIONS = {1: "OK", 2: "NOK", 3: "NOT_JUDGED"}


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # a PLC polls


class Plc:
    """A control that follows the manual: it triggers, and reads each verdict once, in order."""

    def __init__(self, port: int, station: int = 0) -> None:
        self._client = ModbusTcpClient("127.0.0.1", port=port, timeout=SOON)
        self._station = station
        # The counters of the box at the begin of a session are where a PLC begins.
        self.triggered, self.read = self._words(0, 2)

    def wait_until_running(self) -> None:
        wait_for(lambda: self.box()[2:4] == [1, 0])

    def trigger(self, number: int) -> None:
        self.triggered = (self.triggered + 1) % 65_536
        words = [number >> 16, number & 0xFFFF, self.triggered]
        answer = self._client.write_registers(TRIGGER_BASE + 10 * self._station, words, device_id=1)
        assert not answer.isError(), answer
        assert self._words(0, 1) == [self.triggered]

    def choose(self, number: int) -> tuple[int, int]:
        """Write a recipe number and wait for the answer; returns what is in force then, and the answer."""
        (before,) = self._words(RECIPE_ANSWERS, 1)
        address = TRIGGER_BASE + 10 * self._station + RECIPE_WRITTEN
        answer = self._client.write_register(address, number, device_id=1)
        assert not answer.isError(), answer
        wait_for(lambda: self._words(RECIPE_ANSWERS, 1) != [before])
        in_force, became = self._words(RECIPE, 2)
        return in_force, became

    @property
    def recipe(self) -> int:
        """Number of the product that runs."""
        return self._words(RECIPE, 1)[0]

    @property
    def under_way(self) -> int:
        """Parts between trigger and reading; of a PLC that triggers every part."""
        return (self.triggered - self.read) % 65_536

    def has_verdict(self) -> bool:
        return self._words(1, 1)[0] != self.read

    def verdict(self) -> dict[str, Any]:
        """The next one that was not read; none is ever skipped."""
        wait_for(self.has_verdict)
        self.read = (self.read + 1) % 65_536
        words = self._words(RING_BASE + ENTRY_WORDS * (self.read % RING), ENTRY_WORDS)
        assert words[0] == self.read
        return {
            "decision": DECISIONS[words[1]], "code": words[2], "trigger": words[3],
            "number": words[4] << 16 | words[5], "score": struct.unpack(">f", struct.pack(">HH", *words[6:8]))[0],
            "latency_ms": words[8], "nok": words[9],
        }  # fmt: skip

    def box(self) -> list[int]:
        return list(self._client.read_input_registers(0, count=10, device_id=1).registers)

    def _words(self, offset: int, count: int) -> list[int]:
        address = STATION_BASE + 100 * self._station + offset
        return list(self._client.read_input_registers(address, count=count, device_id=1).registers)
