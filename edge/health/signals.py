"""Signals of a service: SIGTERM and SIGINT end it, SIGHUP reloads it. It must not know what is stopped or reloaded."""

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
def stopped_by_signals(
    stop: Callable[[], None], log: logging.Logger, *, reload: Callable[[], None] | None = None
) -> Iterator[None]:
    """Call ``stop`` on SIGTERM and SIGINT; in a thread other than the main one they are left alone.

    Args:
        stop: must return at once.
        log: says which signal came.
        reload: called on SIGHUP, which is left alone without it; must return at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        log.info("%s: stopping", signal.Signals(number).name)
        stop()

    def handle_reload(number: int, _frame: FrameType | None) -> None:
        log.info("%s: reading the settings again", signal.Signals(number).name)
        if reload is not None:
            reload()

    handlers = {signal.SIGTERM: handle, signal.SIGINT: handle}
    if reload is not None:
        handlers[signal.SIGHUP] = handle_reload
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
