"""Where in a window of a signal something was found, in seconds and names; knows no message that carries it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from pydantic import Field

from edge.alerts.wire import Message, Utc

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from edge.frames import Region
    from edge.inputs import SignalLayout

MAX_CHANNELS = 64
"""Names in one message; the regions tell the others."""


class Span(Message):
    """A time within a window of a signal: of all regions together, or the whole window where there is none."""

    first_ts: Utc = Field(description="Of the window's first sample.")
    from_s: float = Field(ge=0, description="Seconds after it at which the span begins.")
    to_s: float = Field(gt=0, description="Seconds after it at which the span ends.")
    rate_hz: float = Field(gt=0, description="Samples per second: regions are in samples.")


def span_of(regions: Sequence[Region], captured_at: datetime, layout: SignalLayout) -> Span:
    """Return the span of a window.

    Args:
        regions: x and w in samples.
        captured_at: UTC of the window's last sample.
        layout: of the signal.
    """
    begin = min((region.x for region in regions), default=0)
    end = max((region.x + region.w for region in regions), default=layout.window)
    first = captured_at - timedelta(seconds=(layout.window - 1) / layout.rate_hz)
    return Span(first_ts=first, from_s=begin / layout.rate_hz, to_s=end / layout.rate_hz, rate_hz=layout.rate_hz)


def channels_of(regions: Sequence[Region], layout: SignalLayout) -> tuple[str, ...]:
    """Return the names of the channels that regions are in (y and h in channels), in the signal's order."""
    found = {index for region in regions for index in range(region.y, region.y + region.h)}
    return tuple(name for index, name in enumerate(layout.channels) if index in found)[:MAX_CHANNELS]
