"""The one list of methods. Training, export, benchmarks and tests go through it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.errors import UsageError
from trainer.methods.fader.fit import FaderMethod
from trainer.methods.hetnet.fit import HetNetMethod
from trainer.methods.memory.fit import MemoryMethod
from trainer.methods.pbas.fit import PbasMethod

if TYPE_CHECKING:
    from trainer.methods.base import Method


def methods() -> dict[str, type[Method]]:
    """Return every method by name."""
    return {method.name: method for method in (PbasMethod, MemoryMethod, FaderMethod, HetNetMethod)}


def get(name: str) -> type[Method]:
    """Return one method.

    Raises:
        UsageError: no method of that name.
    """
    known = methods()
    if name not in known:
        raise UsageError(f"--method {name}: unknown; choose one of {', '.join(sorted(known))}")
    return known[name]
