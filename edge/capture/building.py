"""From settings to a source. Knows every kind; GStreamer and Aravis are looked for when a source is opened."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edge.capture.genicam import GenicamSource
from edge.capture.gstreamer import GstreamerSource
from edge.capture.opencv import CameraSource, VideoSource
from edge.capture.settings import SourceKind, SourceSettings
from edge.capture.sources import FolderSource
from edge.errors import CaptureError
from edge.inputs import Modality

if TYPE_CHECKING:
    from edge.capture.signal_source import Transport
    from edge.capture.sources import Source
    from edge.inputs import SignalLayout

# Beside those in the queue: the frame being judged and the one being read.
_SPARE_BUFFERS = 2


def build_source(settings: SourceSettings, layout: SignalLayout | None = None) -> Source:
    """Return the source that the settings describe, not yet opened.

    Args:
        settings: of the source.
        layout: of the bundle that judges a signal.

    Raises:
        CaptureError: it is a signal, and no layout says how long windows are.
    """
    if settings.modality is not Modality.IMAGE:
        return _signal(settings, layout) if settings.modality is Modality.SIGNAL else _depth(settings)
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


def _signal(settings: SourceSettings, layout: SignalLayout | None) -> Source:
    # Imported where they are asked for: a box without signals needs none of it.
    from edge.capture.signal_source import SignalSource  # noqa: PLC0415

    if layout is None:
        raise CaptureError(f"{settings.label}: the bundle judges no signal; set a bundle of modality signal")
    signal = settings.signal
    return SignalSource(_transport(settings), layout, channels=signal.channels, scale=signal.scale)


def _transport(settings: SourceSettings) -> Transport:
    from edge.capture import signal_links  # noqa: PLC0415 (as above)
    from edge.capture.signal_file import FileTransport  # noqa: PLC0415 (as above)

    kind, signal, url = settings.kind, settings.signal, settings.url or ""
    if kind is SourceKind.SIGNAL_FILE:
        return FileTransport(str(Path(str(settings.path)).expanduser()), speed=signal.speed, loop=settings.loop)
    if kind is SourceKind.SIGNAL_TCP:
        return signal_links.TcpTransport(url)
    if kind is SourceKind.SIGNAL_ZMQ:
        return signal_links.ZmqTransport(url, signal.topic)
    if kind is SourceKind.SIGNAL_SERIAL:
        return signal_links.SerialTransport(str(settings.device), signal.baud)
    return signal_links.MqttTransport(settings)


def _depth(settings: SourceSettings) -> Source:
    from edge.capture.depth_cameras import OakSource, RealSenseSource  # noqa: PLC0415 (as above)
    from edge.capture.depth_sources import DepthFolderSource, DepthSceneSource  # noqa: PLC0415 (as above)

    if settings.kind is SourceKind.REALSENSE:
        return RealSenseSource(settings)
    if settings.kind is SourceKind.OAK:
        return OakSource(settings)
    path = Path(str(settings.path)).expanduser()
    if settings.kind is SourceKind.DEPTH_SCENE:
        return DepthSceneSource(path, settings.depth, loop=settings.loop)
    return DepthFolderSource(path, settings.depth, loop=settings.loop)
