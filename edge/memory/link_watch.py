"""LinkWatch: what a person should know of the link to the fleet, once per occasion. It must not know sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge.alerts.message import NoticeKind, Severity
from edge.federation.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from edge.federation.link import FleetLink

AGAIN_S = 3600.0
_STANDS_STILL = frozenset({"refused", "wrong_server_key"})
# Not now, says the aggregator; the link asks again by itself.
_PASSING = frozenset({Refusal.BUSY.value, Refusal.NO_SPACE.value})
# An update came too late, or a second one for the same round: nothing is wrong, and what was learned is in the next.
_ORDINARY = frozenset({Refusal.STALE_ROUND.value, Refusal.FUTURE_ROUND.value, Refusal.ALREADY_COUNTED.value})


class LinkWatch:
    """Looks at the link now and then.

    Args:
        link: to the fleet.
        notify: raises a notice: kind, severity, text and figures.
        clock: monotonic seconds.
    """

    def __init__(self, link: FleetLink, notify: Callable[..., None], clock: Callable[[], float]) -> None:
        self._link, self._notify, self._clock = link, notify, clock
        self._kind = ""
        self._damage = ""
        self._refused: dict[str, int] = {}
        self._told_at: dict[str, float] = {}

    def look(self) -> None:
        """Raise a notice where the link has come to a stand, or an update was refused; a code at most once an hour."""
        state = self._link.state
        came_to_a_stand = state.kind.value != self._kind and state.kind.value in _STANDS_STILL
        self._kind = state.kind.value
        if came_to_a_stand:
            self._notify(NoticeKind.FEDERATION_REFUSED, Severity.WARNING, state.reason or self._kind)
        counters = self._link.counters
        damage = counters.get("damage") or ""
        if damage and damage != self._damage:
            text = f"the updates that waited for the fleet were damaged: {damage}"
            self._notify(NoticeKind.FEDERATION_DAMAGED, Severity.WARNING, text)
        self._damage = damage
        counts = dict(counters.get("refused", {}))
        before, self._refused = self._refused, counts
        if self._kind in _STANDS_STILL:
            return
        for code, count in counts.items():
            if count > before.get(code, 0) and code not in _PASSING and self._clock() >= self._told_at.get(code, 0.0):
                self._told_at[code] = self._clock() + AGAIN_S
                severity = Severity.INFO if code in _ORDINARY else Severity.WARNING
                self._notify(NoticeKind.FEDERATION_REFUSED, severity, _sentence(code), code=code)

    def status(self) -> dict[str, Any]:
        """Say how the link stands, as JSON values."""
        link = self._link
        return {"state": link.state.kind.value, "reason": link.state.reason, "round": link.round, **link.counters}

    def warnings(self) -> list[str]:
        """What keeps the link from working, for the box's status."""
        state = self._link.state
        return [f"federation: {state.reason}"] if state.kind.value in _STANDS_STILL else []


def _sentence(code: str) -> str:
    known = {refusal.value: refusal.sentence for refusal in Refusal}
    return f"the aggregator refuses an update ({code}): {known.get(code, 'see its log')}"
