"""Which messages a broker refuses, when to try one of them again, and when to give up. Knows no connection."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# A broker that refuses is asked again after this long; one that still refuses after so many tries over so long a time,
# and takes other messages meanwhile, has been asked enough: then once in a while only.
RETRY_S = 5.0
TRIES = 3
PATIENCE_S = 30.0
RARELY_S = 600.0


@dataclass(slots=True)
class _Refusal:
    reason: str
    first: float
    last: float
    times: int = 1
    others_pass: bool = False
    given_up: bool = False


class Refused:
    """Refusals by key: a topic, or one message. mosquitto 2.0 hangs up after each, so as few as possible are provoked.

    Args:
        retry_s: pause before another try.
        patience_s: tries go on for so long at least.
        rarely_s: pause before another try of what was given up.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        retry_s: float | None = None,
        patience_s: float | None = None,
        rarely_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._retry_s = RETRY_S if retry_s is None else retry_s
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._rarely_s = RARELY_S if rarely_s is None else rarely_s
        self._clock = clock
        self._refusals: dict[str, _Refusal] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._refusals

    def __len__(self) -> int:
        return len(self._refusals)

    @property
    def reasons(self) -> dict[str, str]:
        """Why, by key."""
        return {key: refusal.reason for key, refusal in self._refusals.items()}

    def note(self, key: str, reason: str) -> bool:
        """The broker has refused this; True from the moment on when it is given up."""
        now = self._clock()
        refusal = self._refusals.get(key)
        if refusal is None:
            refusal = self._refusals[key] = _Refusal(reason, first=now, last=now)
        else:
            refusal.times, refusal.last, refusal.reason = refusal.times + 1, now, reason
        if refusal.others_pass and refusal.times >= TRIES and now - refusal.first >= self._patience_s:
            refusal.given_up = True
        return refusal.given_up

    def accept(self, key: str) -> bool:
        """The broker has taken this; True where it had refused it before."""
        for other, refusal in self._refusals.items():
            refusal.others_pass = refusal.others_pass or other != key
        return self._refusals.pop(key, None) is not None

    def forget(self) -> None:
        """Try everything again."""
        self._refusals.clear()

    def given_up(self, key: str) -> bool:
        """Whether this has been refused often and long enough."""
        refusal = self._refusals.get(key)
        return refusal is not None and refusal.given_up

    def wait_s(self, key: str) -> float:
        """Seconds until the next try; 0 where one is due."""
        refusal = self._refusals.get(key)
        if refusal is None:
            return 0.0
        pause = self._rarely_s if refusal.given_up else self._retry_s
        return max(0.0, refusal.last + pause - self._clock())
