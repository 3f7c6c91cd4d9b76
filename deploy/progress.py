"""How long work says how far it is. What is drawn of it is the caller's business."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def no_progress(_what: str, _done: int, _total: int) -> None:
    """Tell nobody."""
