"""The one list of methods for signals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge.errors import UsageError
from trainer.methods.mmae_ecg.fit import MmaeMethod
from trainer.signals.baselines import PcaMethod

if TYPE_CHECKING:
    from trainer.methods.base import Method


def signal_methods() -> dict[str, type[Method]]:
    """Return every method by name."""
    return {method.name: method for method in (MmaeMethod, PcaMethod)}


def get(name: str) -> type[Method]:
    """Return one method.

    Raises:
        UsageError: no method for signals has that name.
    """
    known = signal_methods()
    if name not in known:
        raise UsageError(f"--method {name}: unknown for signals; choose one of {', '.join(sorted(known))}")
    return known[name]
