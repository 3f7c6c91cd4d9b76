"""What a capture says of itself: its state, its counts, the frames that it lost. Values only."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime  # noqa: TC003 (a field type of public values)
from enum import Enum


class CameraState(str, Enum):
    """What a source is doing.

    ``starting``: no frame came yet. ``streaming``: frames come; with a trigger, the camera is armed. ``stalled``: it
    is connected and silent, or its driver does not return. ``reconnecting``: it is away and tried again.
    ``disabled``: the settings say not to open it, there is no capture. ``ended``, ``failed``: no frame will come any
    more.
    """

    STARTING = "starting"
    STREAMING = "streaming"
    STALLED = "stalled"
    RECONNECTING = "reconnecting"
    DISABLED = "disabled"
    ENDED = "ended"
    FAILED = "failed"


FINAL = frozenset({CameraState.ENDED, CameraState.FAILED})
"""No frame will come any more."""
NOT_WELL = frozenset({CameraState.STALLED, CameraState.RECONNECTING, CameraState.FAILED})
"""An operator should look."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Counts since the start; captured = delivered + dropped + skipped + those still in the queue.

    Attributes:
        captured: frames read and decoded.
        delivered: frames handed to the consumer.
        dropped: frames lost to the drop policy, or left in the queue by ``stop``.
        corrupt: images that could not be decoded, or came incomplete.
        reconnects: connections made after the first one was lost.
        resized: times that a camera began to give frames of another size.
        abandoned: threads left behind in a driver that did not return.
        skipped: frames that nobody wanted.
    """

    captured: int = 0
    delivered: int = 0
    dropped: int = 0
    corrupt: int = 0
    reconnects: int = 0
    resized: int = 0
    abandoned: int = 0
    skipped: int = 0


def added(before: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """Return counts by name, summed."""
    return {name: before.get(name, 0) + more.get(name, 0) for name in {**before, **more}}


@dataclass(frozen=True, slots=True)
class LostFrame:
    """A frame that the consumer will never get.

    Attributes:
        camera: name of the camera.
        camera_seq: its number; the consumer sees a gap there.
        captured_ns: monotonic time of its capture.
        captured_at: the same moment in UTC.
        name: file name or position; may be empty.
        reason: ``dropped`` or ``corrupt``.
    """

    camera: str
    camera_seq: int
    captured_ns: int
    captured_at: datetime
    name: str
    reason: str
