"""How a process ends when a driver or an engine does not return. It must not know what hangs."""

from __future__ import annotations

import logging
import os
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Collection


def leave(code: int, threads: Collection[threading.Thread]) -> NoReturn:
    """End the process, without waiting for threads that were left behind; everything was closed by its owner.

    Args:
        code: to end with.
        threads: that were there before the work began; any other that is still there was left behind.

    Raises:
        SystemExit: where none was.
    """
    if set(threading.enumerate()) - set(threads):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
