"""Registers: what a PLC reads and writes, as one table of 16-bit words. docs/inspection.md is its manual.

Knows addresses and encodings; neither sockets nor how parts are judged.
"""

from __future__ import annotations

import secrets
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING

from edge.frames import Decision

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge.inspection.parts import PartVerdict

Choose = Callable[[str, int], bool]
"""Called with a station and the number in its recipe register; returns whether it will be answered."""
Trigger = Callable[[int, int], str]
"""Called with a part's number and the trigger counter; returns why the part is refused, empty where it is not."""

MAP_VERSION = 1
BOX_WORDS = 10
STATION_BASE = 100
STATION_WORDS = 100
MAX_STATIONS = 90
ENTRY_WORDS = 10
# Verdicts that stay readable; a power of two, so that the counter's wrap at 65,536 keeps their places.
RING = 8
LATEST = 10
RING_BASE = 20
TRIGGER_BASE = 10_000
TRIGGER_WORDS = 10
WRITABLE_WORDS = 3
# In a station's block: the recipe in force, what became of the last number written, and a count of answers.
RECIPE, RECIPE_ANSWER, RECIPE_ANSWERS = 2, 3, 4
# In its trigger's block: the number of the product to come.
RECIPE_WRITTEN = 5
NO_NUMBER = 0xFFFF
_COUNTER = 2
_NO_NUMBER = 0x7FC0_0000
_LIMIT = 0x1_0000


class BoxState(IntEnum):
    """Register 2."""

    STARTING = 0
    RUNNING = 1
    UNHEALTHY = 2
    STOPPING = 3


class Trouble(IntEnum):
    """Bits of register 3: why the heartbeat stands still."""

    BOX = 1
    DEADLINES = 2


class RecipeAnswer(IntEnum):
    """Of register 3 of a station: what became of the number that was written last."""

    NONE = 0
    IN_FORCE = 1
    UNKNOWN_NUMBER = 2
    NO_SUCH_PRODUCT = 3
    NOT_KEPT = 4
    BUSY = 5


class Refused(Enum):
    """Why a request cannot be granted; Modbus has an exception code for each."""

    ADDRESS = "address"
    BUSY = "busy"


DECISIONS = {Decision.OK: 1, Decision.NOK: 2, Decision.NOT_JUDGED: 3}


@dataclass(slots=True)
class _Block:
    """Of one station."""

    trigger: Trigger | None
    words: list[int] = field(default_factory=lambda: [0] * STATION_WORDS)
    written: list[int] = field(default_factory=lambda: [0] * WRITABLE_WORDS)
    verdicts: int = 0
    recipe_written: int = 0
    recipes_open: int = 0


class Registers:
    """The table. Any thread may write verdicts; requests of PLCs come from one thread.

    Every change is made in one step under a lock, and every read takes one, so a reader never sees half a verdict.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[str, _Block] = {}
        self._order: tuple[str, ...] = ()
        self._heartbeat = 0
        self._state = BoxState.STARTING
        self._trouble = 0
        self._session = 0
        self._choose: Choose | None = None
        self._started_s = time.monotonic()

    def lay_out(self, stations: Sequence[tuple[str, Trigger | None]]) -> None:
        """Give each station its block, in this order; those of stations that are new begin at 0.

        Draws a new session, by which a PLC sees that counters began anew or moved.

        Args:
            stations: name, and what a trigger register does where the station has one.
        """
        with self._lock:
            before = self._blocks
            self._blocks = {}
            for name, trigger in stations[:MAX_STATIONS]:
                block = before.get(name) or _Block(None)
                block.trigger = trigger
                self._blocks[name] = block
            self._order = tuple(self._blocks)
            self._session = self._session % 0xFFFF + 1 if self._session else secrets.randbelow(0xFFFF) + 1

    def on_recipe(self, choose: Choose) -> None:
        """Have numbers written to recipe registers handed on; without this there are none."""
        self._choose = choose

    def show_recipe(self, station: str, number: int, answer: RecipeAnswer | None = None) -> None:
        """Show which recipe a station runs.

        Args:
            station: its name.
            number: of the product, 0 for the router's choice, ``NO_NUMBER`` where none says it.
            answer: to a number that was written; None where nobody wrote one.
        """
        with self._lock:
            block = self._blocks.get(station)
            if block is None:
                return
            block.words[RECIPE] = number
            if answer is not None:
                block.recipes_open = max(0, block.recipes_open - 1)
                _answer(block, answer)

    def beat(self, state: BoxState, trouble: int) -> None:
        """Show how the box is doing; the heartbeat counts on only while it is running."""
        with self._lock:
            self._state, self._trouble = state, trouble
            if state is BoxState.RUNNING:
                self._heartbeat = (self._heartbeat + 1) % _LIMIT

    def verdict(self, station: str, verdict: PartVerdict, score: float) -> None:
        """Take a verdict; ``score`` is that of the view that decided, NaN where there is none."""
        with self._lock:
            block = self._blocks.get(station)
            if block is None:
                return
            block.verdicts = (block.verdicts + 1) % _LIMIT
            entry = _entry(block.verdicts, verdict, score)
            place = RING_BASE + ENTRY_WORDS * (block.verdicts % RING)
            block.words[place : place + ENTRY_WORDS] = entry
            block.words[LATEST : LATEST + ENTRY_WORDS] = entry
            block.words[1] = block.verdicts

    def read(self, address: int, count: int) -> list[int] | Refused:
        """The words from an address; refused unless all of them exist."""
        with self._lock:
            end = address + count
            if end <= BOX_WORDS:
                return self._box()[address:end]
            if address >= TRIGGER_BASE:
                block, offset = self._block_at(address - TRIGGER_BASE, TRIGGER_WORDS)
                if block is not None and self._choose is not None and (offset, count) == (RECIPE_WRITTEN, 1):
                    return [block.recipe_written]
                if block is None or block.trigger is None or offset + count > WRITABLE_WORDS:
                    return Refused.ADDRESS
                return block.written[offset : offset + count]
            block, offset = self._block_at(address - STATION_BASE, STATION_WORDS)
            if block is None or offset + count > STATION_WORDS:
                return Refused.ADDRESS
            return block.words[offset : offset + count]

    def write(self, address: int, values: Sequence[int]) -> Refused | None:
        """Write words; a trigger counter that changes announces a part, a recipe number chooses the product to come.

        A repeated write, such as a client's retry, changes nothing and so triggers nothing. While a recipe is being
        changed no part is announced: nobody could say which product it is.
        """
        if address >= TRIGGER_BASE and (address - TRIGGER_BASE) % TRIGGER_WORDS == RECIPE_WRITTEN and len(values) == 1:
            return self._write_recipe(address, values[0])
        with self._lock:
            block, offset = self._block_at(address - TRIGGER_BASE, TRIGGER_WORDS)
            if block is None or block.trigger is None or offset + len(values) > WRITABLE_WORDS:
                return Refused.ADDRESS
            if block.recipes_open:
                return Refused.BUSY
            before = list(block.written)
            block.written[offset : offset + len(values)] = values
            high, low, counter = block.written
            if counter == before[_COUNTER]:
                return None
            trigger, accepted = block.trigger, block.words[0]
            # Before the part is there: its verdict may come at once, and must not be seen before the trigger is.
            block.words[0] = counter
        if self._state is not BoxState.STOPPING:
            trigger((high << 16) | low, counter)
            return None
        with self._lock:
            block.written, block.words[0] = before, accepted
        return Refused.BUSY

    def _write_recipe(self, address: int, number: int) -> Refused | None:
        with self._lock:
            block, _ = self._block_at(address - TRIGGER_BASE, TRIGGER_WORDS)
            choose = self._choose
            if block is None or choose is None:
                return Refused.ADDRESS
            station = self._order[(address - TRIGGER_BASE) // TRIGGER_WORDS]
            block.recipe_written = number
            if not block.recipes_open and number == block.words[RECIPE] != NO_NUMBER:
                # It is in force: a PLC that writes in every cycle costs nothing.
                _answer(block, RecipeAnswer.IN_FORCE)
                return None
            block.recipes_open += 1
            block.words[RECIPE_ANSWER] = RecipeAnswer.NONE
        if not choose(station, number):
            with self._lock:
                block.recipes_open = max(0, block.recipes_open - 1)
                _answer(block, RecipeAnswer.BUSY)
        return None

    def _box(self) -> list[int]:
        uptime = int(time.monotonic() - self._started_s) & 0xFFFF_FFFF
        return [
            MAP_VERSION, self._heartbeat, int(self._state), self._trouble, self._session, len(self._order),
            uptime >> 16, uptime & 0xFFFF, 0, 0,
        ]  # fmt: skip

    def _block_at(self, offset: int, words: int) -> tuple[_Block | None, int]:
        index, inner = divmod(offset, words)
        if offset < 0 or index >= len(self._order):
            return None, 0
        return self._blocks[self._order[index]], inner


def _answer(block: _Block, answer: RecipeAnswer) -> None:
    block.words[RECIPE_ANSWER] = int(answer)
    block.words[RECIPE_ANSWERS] = (block.words[RECIPE_ANSWERS] + 1) % _LIMIT


def _entry(counter: int, verdict: PartVerdict, score: float) -> list[int]:
    part = verdict.part
    number, trigger = part.mark or (part.number & 0xFFFF_FFFF, (part.number + 1) % _LIMIT)
    bits = _float_bits(score)
    nok = sum(1 << index for index, view in enumerate(verdict.views) if view.decision is Decision.NOK)
    latency = min(round(verdict.latency_ms), 0xFFFF)
    return [
        counter, DECISIONS[verdict.decision], int(verdict.code), trigger, number >> 16, number & 0xFFFF,
        bits >> 16, bits & 0xFFFF, latency, nok,
    ]  # fmt: skip


def _float_bits(value: float) -> int:
    try:
        bits = int.from_bytes(struct.pack(">f", value), "big")
    except OverflowError:
        return 0x7F80_0000 if value > 0 else 0xFF80_0000
    return _NO_NUMBER if value != value else bits  # noqa: PLR0124 (NaN)
