"""StallGuard: ends the process when an engine does not come back, for its supervisor to start it again.

It knows calls and their age, not what is computed. A thread inside a hung engine cannot be ended any other way.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from edge.alerts.message import NoticeKind, Severity
from edge.inference.calls import IN_PROGRESS

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.inference.calls import Call, Calls
    from edge.inference.detectors import Detectors

    Notify = Callable[..., None]

_LOG = logging.getLogger(__name__)
STALLED_EXIT_CODE = 70
"""EX_SOFTWARE of sysexits.h; systemd's ``Restart=on-failure`` starts the box again."""
# TensorRT builds its kernels in a graph's first call, on a small Jetson for minutes.
FIRST_CALL_S = 900.0
LAST_WORDS_S = 2.0
_ROUND_S = 0.5


class StallGuard:
    """A part of the box: looks at the calls in progress twice a second.

    Args:
        limit_s: seconds that a call may take.
        detectors: what the status shows.
        notify: raises a notice: kind, severity and text.
        calls: in progress.
        end: ends the process at once, with an exit code and without cleaning up: what hangs would hang that too.
    """

    name = "engine"

    def __init__(
        self,
        *,
        limit_s: float,
        detectors: Callable[[], Detectors | None],
        notify: Notify,
        calls: Calls = IN_PROGRESS,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._limit_s = limit_s
        self._detectors, self._notify, self._calls, self._end = detectors, notify, calls, end
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to look."""
        self._thread = threading.Thread(target=self._run, name="stall-guard", daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Begin to end; a call that hangs while the box stops is still ended by it until then."""
        self._stop.set()

    def stop(self, timeout: float) -> bool:
        """End within ``timeout`` seconds; False where that takes longer."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout)
            return not self._thread.is_alive()
        return True

    def status(self) -> dict[str, Any]:
        """What each bundle runs on, and how long the oldest call is under way."""
        detectors = self._detectors()
        return {
            "stall_s": self._limit_s,
            "oldest_call_s": round(self._calls.oldest_s(), 3),
            "bundles": [
                {
                    "product": one.bundle.manifest.product,
                    "bundle": one.bundle.id,
                    "engine": one.status.engine.value,
                    "precision": one.status.precision.value,
                    "accelerator": one.status.accelerator,
                    "fallback_reason": one.status.fallback_reason or None,
                }
                for one in (() if detectors is None else detectors.all)
            ],
        }

    def warnings(self) -> list[str]:
        """Nothing: when there is something to say, the process ends."""
        return []

    def _run(self) -> None:
        while not self._stop.wait(min(_ROUND_S, self._limit_s / 4)):
            found = self._calls.stalled(limit_s=self._limit_s, first_limit_s=max(self._limit_s, FIRST_CALL_S))
            if found is not None:
                self._give_up(*found)
                return

    def _give_up(self, call: Call, age_s: float) -> None:
        text = (
            f"{call.what}: the engine has not come back for {age_s:.1f} s ({self._limit_s:g} s are allowed); "
            f"the process ends with code {STALLED_EXIT_CODE}, to be started again"
        )
        # Logging and the outbox may hang too: in a thread of their own, for as long as we can wait.
        words = threading.Thread(target=self._last_words, args=(text, age_s), name="last-words", daemon=True)
        words.start()
        words.join(LAST_WORDS_S)
        self._end(STALLED_EXIT_CODE)

    def _last_words(self, text: str, age_s: float) -> None:
        _LOG.critical("%s", text)
        self._notify(NoticeKind.ENGINE_STALLED, Severity.ALARM, text[:1000], seconds=round(age_s, 1))
