"""Ending a service when it is asked to: SIGTERM and SIGINT call back. It must not know what is stopped."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable, Iterator
    from types import FrameType


@contextmanager
def stopped_by_signals(stop: Callable[[], None], log: logging.Logger) -> Iterator[None]:
    """Call ``stop`` on SIGTERM and SIGINT; in a thread other than the main one they are left alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
