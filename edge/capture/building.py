"""From settings to a source. Knows every kind; GStreamer and Aravis are looked for when a source is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge.capture.genicam import GenicamSource
from edge.capture.gstreamer import GstreamerSource
from edge.capture.opencv import CameraSource, VideoSource
from edge.capture.settings import SourceKind, SourceSettings
from edge.capture.sources import FolderSource

if TYPE_CHECKING:
    from edge.capture.sources import Source

# Beside those in the queue: the frame being judged and the one being read.
_SPARE_BUFFERS = 2


def build_source(settings: SourceSettings) -> Source:
    """Return the source that the settings describe, not yet opened."""
    buffers = settings.capacity + _SPARE_BUFFERS
    if settings.kind is SourceKind.GSTREAMER:
        return GstreamerSource(settings, buffers=buffers)
    if settings.kind is SourceKind.GENICAM:
        return GenicamSource(settings, buffers=buffers)
    if settings.kind is SourceKind.FOLDER:
        return FolderSource(Path(str(settings.path)).expanduser(), loop=settings.loop)
    if settings.kind is SourceKind.VIDEO:
        return VideoSource(Path(str(settings.path)).expanduser(), loop=settings.loop, buffers=buffers)
    place = settings.url if settings.url is not None else settings.device
    assert place is not None  # the settings' validator saw to it
    return CameraSource(
        place,
        fps=settings.fps,
        width=settings.width,
        height=settings.height,
        pixel_format=settings.pixel_format,
        buffers=buffers,
    )
