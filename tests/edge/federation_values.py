"""Updates and banks of made values, for the tests of what travels and of who receives it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import numpy as np

from edge.federation.update import FleetBank, MemoryUpdate, Order, WireRows
from edge.federation.wire_rows import on_wire

EMBEDDING = "ab" * 32
CREATED = datetime(2030, 1, 2, 3, 4, 5, 678900, tzinfo=timezone.utc)


def update(
    box: str = "north/one", *, seed: int = 0, rows: int = 3, columns: int = 4, center: float = 0.0, **changes: Any
) -> MemoryUpdate:
    """An update of ``rows`` random rows around ``center``; any field can be given."""
    rng = np.random.default_rng(seed)
    wire = changes.get("wire", WireRows.FLOAT16)
    values = rng.normal(center, 1.0, (rows, columns)).astype(np.float32)
    made = MemoryUpdate(
        fleet="plant",
        box=box,
        product="ball screw",
        subclass="",
        embedding_id=EMBEDDING,
        round=1,
        order=Order.ANCHOR,
        rows=on_wire(values, wire),
        support=np.arange(20, 20 + rows, dtype=np.float32),
        frames=np.full(rows, 9.0, np.float32),
        n_frames=40,
        mean=values.mean(0),
        std=values.std(0),
        base_version=0,
        created=CREATED,
        nonce=rng.bytes(16).hex(),
        wire=wire,
    )
    return replace(made, **changes)


def bank(*, rows: int = 3, columns: int = 4, seed: int = 0, **changes: Any) -> FleetBank:
    """A bank of ``rows`` random rows; any field can be given."""
    values = np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float16).astype(np.float32)
    made = FleetBank(
        fleet="plant",
        pool=f"{EMBEDDING}/ball screw",
        embedding_id=EMBEDDING,
        version=2,
        round=3,
        rows=values,
        mass=np.full(rows, 1 / rows, np.float32),
        boxes=np.full(rows, 2, np.uint16),
        members=("north/one", "north/two"),
        created=CREATED,
    )
    return replace(made, **changes)


def equal(first: Any, second: Any) -> bool:
    """Whether two values of one type are the same bit for bit."""
    for name in first.__dataclass_fields__:
        a, b = getattr(first, name), getattr(second, name)
        if isinstance(a, np.ndarray):
            if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
                return False
        elif a != b or type(a) is not type(b):
            return False
    return True


TOKENS = (b"null", b"1e999", b"\\ud800", b'"":{', b"[[", b"NaN", b"-0", b"\xff\xff\xff\xff", b"-1,[", b"1e99")
VALUES = (None, True, -1, 0, 2**53, 10**400, 0.5, float("nan"), float("inf"), "", "\0", "\ud800", "a/b/c", [], [[]], {})


def mutate(data: bytes, program: bytes) -> bytes:
    """The data after the changes that a program says, four bytes each: what, where, and with which value."""
    changed = bytearray(data)
    for start in range(0, len(program) - 3, 4):
        what, high, low, value = program[start : start + 4]
        at = (256 * high + low) % (len(changed) + 1)
        if what % 8 == 0:
            del changed[at:]
        elif what % 8 == 1:
            del changed[at : at + 1 + value % 8]
        elif what % 8 == 2:
            changed[at:at] = TOKENS[value % len(TOKENS)]
        elif what % 8 == 3:
            changed[at:at] = bytes([value])
        elif at < len(changed):
            changed[at] ^= 1 << value % 8
    return bytes(changed)


def other_value(text: bytes, program: bytes) -> bytes:
    """A JSON object with another value for one of its keys, in its canonical form or nearly so."""
    values = json.loads(text)
    key = sorted(values)[program[0] % len(values)]
    values[key] = VALUES[program[1] % len(VALUES)]
    form = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=bool(program[2] % 2))
    return form.encode(errors="surrogatepass")
