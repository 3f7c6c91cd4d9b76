"""Settings of one frame source; the box's YAML file embeds them.

This module must not import OpenCV: settings are read and checked on machines that have no camera library.
"""

from __future__ import annotations

import re
import shlex
from enum import Enum
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from edge.capture.sense_settings import DepthSourceSettings, SignalSourceSettings
from edge.inputs import Modality

# user:password@ of a URL, wherever it stands in a text. Up to the last "@" of the word: an unescaped password may hold
# "/" or "@", and hiding too much is the safe mistake.
_CREDENTIALS = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)\S*@")
# Query values that cameras use for logins, such as ?user=admin&password=1234 or &token=...
_SECRET_QUERY = re.compile(r"(?i)(?P<key>[?&;](?:user(?:name)?|pass(?:word)?|passwd|pwd|token|key|auth)=)[^&;#\s]*")
# Properties of GStreamer's sources, such as user-id=admin user-pw="a b"; a caps field never has these names.
_SECRET_PROPERTY = re.compile(
    r"""(?i)(?P<key>(?<![\w-])(?:user|proxy)-(?:id|pw)|(?<![\w-])pass(?:word|wd|phrase))=(?:"[^"]*"|'[^']*'|\S+)"""
)
_FOURCC = 4
_URL_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "mqtt", "mqtts")


def redact(text: str) -> str:
    """Return a text with the credentials of every URL and GStreamer property in it replaced by ``***``."""
    text = _SECRET_QUERY.sub(r"\g<key>***", _CREDENTIALS.sub(r"\g<scheme>***@", text))
    return _SECRET_PROPERTY.sub(r"\g<key>=***", text)


class SourceKind(str, Enum):
    """Where frames come from."""

    FOLDER = "folder"
    VIDEO = "video"
    CAMERA = "camera"
    GSTREAMER = "gstreamer"
    GENICAM = "genicam"
    SIGNAL_FILE = "signal_file"
    SIGNAL_TCP = "signal_tcp"
    SIGNAL_ZMQ = "signal_zmq"
    SIGNAL_SERIAL = "signal_serial"
    SIGNAL_MQTT = "signal_mqtt"
    DEPTH_FOLDER = "depth_folder"
    DEPTH_SCENE = "depth_scene"
    REALSENSE = "realsense"
    OAK = "oak"


class TriggerMode(str, Enum):
    """What makes a source give a frame (GenICam SFNC, chapter Acquisition Control).

    ``free``: it gives frames at its own rate. ``software``: one per :meth:`edge.capture.capture.Capture.fire`.
    ``hardware``: one per pulse on a line of the camera.
    """

    FREE = "free"
    SOFTWARE = "software"
    HARDWARE = "hardware"


_TRIGGERS = {
    SourceKind.FOLDER: frozenset({TriggerMode.FREE, TriggerMode.SOFTWARE}),
    SourceKind.VIDEO: frozenset({TriggerMode.FREE, TriggerMode.SOFTWARE}),
    SourceKind.CAMERA: frozenset({TriggerMode.FREE}),
    SourceKind.GSTREAMER: frozenset({TriggerMode.FREE}),
    SourceKind.GENICAM: frozenset(TriggerMode),
}
_PLACES = {
    SourceKind.FOLDER: ("path",),
    SourceKind.VIDEO: ("path",),
    SourceKind.CAMERA: ("url", "device"),
    SourceKind.GSTREAMER: ("pipeline",),
    SourceKind.GENICAM: ("device",),
    SourceKind.SIGNAL_FILE: ("path",),
    SourceKind.SIGNAL_TCP: ("url",),
    SourceKind.SIGNAL_ZMQ: ("url",),
    SourceKind.SIGNAL_SERIAL: ("device",),
    SourceKind.SIGNAL_MQTT: ("url",),
    SourceKind.DEPTH_FOLDER: ("path",),
    SourceKind.DEPTH_SCENE: ("path",),
    SourceKind.REALSENSE: ("device",),
    SourceKind.OAK: ("device",),
}
_SIGNALS = frozenset(kind for kind in SourceKind if kind.value.startswith("signal_"))
_DEPTHS = frozenset({SourceKind.DEPTH_FOLDER, SourceKind.DEPTH_SCENE, SourceKind.REALSENSE, SourceKind.OAK})
_FILES = frozenset({
    SourceKind.FOLDER, SourceKind.VIDEO, SourceKind.SIGNAL_FILE, SourceKind.DEPTH_FOLDER, SourceKind.DEPTH_SCENE,
})  # fmt: skip
_FREE = frozenset({TriggerMode.FREE})
_MQTT = ("mqtt", "mqtts")
_SIGNAL_SCHEMES = {
    SourceKind.SIGNAL_TCP: ("tcp",),
    SourceKind.SIGNAL_ZMQ: ("tcp",),
    SourceKind.SIGNAL_MQTT: _MQTT,
}
GENICAM_FORMATS = (
    "Mono8", "BayerGR8", "BayerRG8", "BayerGB8", "BayerBG8", "RGB8", "BGR8", "YUV422_8", "YUV422_8_UYVY",
)  # fmt: skip
"""Pixel formats (GenICam PFNC) that are turned into BGR."""


class DropPolicy(str, Enum):
    """What happens when frames arrive faster than they are judged.

    ``drop_oldest`` keeps what is newest: alerts speak of now, and the past is lost first. For live cameras.
    ``drop_newest`` keeps what came first: frames in the queue stay consecutive, and latency stays at a full queue
    as long as the overload lasts. For bursts of parts where a started group must be finished.
    ``wait`` loses nothing: the source is not read until there is room. For files and folders; a live camera that is
    made to wait loses frames inside its driver, where nobody counts them.
    """

    DROP_OLDEST = "drop_oldest"
    DROP_NEWEST = "drop_newest"
    WAIT = "wait"


class GenicamSettings(BaseModel):
    """What is asked of a GenICam camera beside size, rate and pixel format; names in brackets are features (SFNC)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    exposure_us: float | None = Field(
        None, gt=0, le=1e7, title="Exposure [µs]", description="ExposureTime; the camera's own setting where absent."
    )
    gain: float | None = Field(None, title="Gain", description="Gain, in the camera's unit; its own where absent.")
    offset_x: int = Field(0, ge=0, le=65535, title="Offset x", description="OffsetX: left edge of the sensor's window.")
    offset_y: int = Field(0, ge=0, le=65535, title="Offset y", description="OffsetY: top edge of the sensor's window.")
    trigger_source: str = Field(
        "Line1", pattern=r"^[A-Za-z0-9_]+$", title="Trigger source", description="TriggerSource of a hardware trigger."
    )
    trigger_activation: Literal["RisingEdge", "FallingEdge", "AnyEdge", "LevelHigh", "LevelLow"] = Field(
        "RisingEdge", title="Trigger activation", description="TriggerActivation of a hardware trigger."
    )
    trigger_delay_us: float | None = Field(
        None, ge=0, le=1e7, title="Trigger delay [µs]", description="TriggerDelay, for either trigger."
    )
    packet_size: int | None = Field(
        None,
        ge=220,
        le=16384,
        title="Packet size [bytes]",
        description="GevSCPSPacketSize (GigE Vision); the largest that arrives is found out where absent.",
    )
    packet_delay_ns: int | None = Field(
        None, ge=0, le=10**9, title="Packet delay [ns]", description="GevSCPD, for cameras that share a network link."
    )
    buffers: int = Field(
        6, ge=2, le=64, title="Stream buffers", description="Frames that the driver may fill ahead; allocated once."
    )


class SourceSettings(BaseModel):
    """One source of frames: exactly one of ``path``, ``url``, ``device`` and ``pipeline``, as ``kind`` asks."""

    # A rejected value may hold a password, so validation errors must not repeat their input.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    kind: SourceKind = Field(
        title="Kind",
        description="folder: images sorted by name; video: a file; camera: a local device or a stream; gstreamer: a "
        "pipeline; genicam: a GigE Vision or USB3 Vision camera; depth_folder: depth maps; depth_scene: one depth map "
        "with noise; realsense, oak: a depth camera; signal_file, signal_tcp, signal_zmq, signal_serial, signal_mqtt: "
        "under `signals`.",
    )
    path: str | None = Field(
        None,
        min_length=1,
        title="Path",
        description="The folder of images or depth maps, the video, a WFDB record (no suffix) or npz (signal_file).",
    )
    url: str | None = Field(
        None,
        min_length=1,
        repr=False,
        title="Stream URL",
        description="rtsp, http, ... address of a network camera (camera); tcp, mqtt or mqtts of a signal. Credentials "
        "in it are never logged.",
    )
    device: int | str | None = Field(
        None,
        title="Device",
        description="Index or path such as /dev/video0 (camera); id, serial number or IP address (genicam, oak); "
        "serial number, 0 for any (realsense); a port such as /dev/ttyUSB0 (signal_serial).",
    )
    pipeline: str | None = Field(
        None,
        min_length=1,
        repr=False,
        title="Pipeline",
        description="As on gst-launch-1.0's command line, without a sink (gstreamer). Credentials are never logged.",
    )
    trigger: TriggerMode = Field(
        TriggerMode.FREE,
        title="Trigger",
        description="free; software: a frame per command (genicam, folder, video); hardware: per pulse (genicam).",
    )
    pixel_format: str | None = Field(
        None,
        title="Pixel format",
        description="Four letters such as YUYV, asked of a local camera; a PFNC name such as BayerRG8 (genicam).",
    )
    genicam: GenicamSettings = Field(
        GenicamSettings(), title="GenICam", description="Exposure, trigger line and network of a genicam source."
    )
    signal: SignalSourceSettings = Field(
        SignalSourceSettings(), title="Signal", description="How a signal comes in; of kinds that begin with signal."
    )
    depth: DepthSourceSettings = Field(
        DepthSourceSettings(), title="Depth", description="How depth becomes points; of depth_folder and depth_scene."
    )
    fps: float | None = Field(
        None,
        gt=0,
        le=1000,
        title="Frames per second",
        description="Pace of a folder or video, as fast as frames are judged where absent; asked of a local or genicam "
        "camera.",
    )
    loop: bool = Field(
        default=False, title="Loop", description="Start again at the end of a folder or video instead of ending."
    )
    width: int | None = Field(
        None, ge=16, le=16384, title="Width", description="Pixels, asked of the camera; not of a URL."
    )
    height: int | None = Field(
        None, ge=16, le=16384, title="Height", description="Pixels, asked of the camera; not of a URL."
    )
    policy: DropPolicy | None = Field(
        None,
        title="Drop policy",
        description="drop_oldest, drop_newest or wait; where absent a camera drops its oldest frames, a file waits.",
    )
    capacity: int = Field(
        4,
        ge=1,
        le=256,
        title="Queue capacity",
        description="Frames that may wait to be judged; each is held in memory.",
    )
    stall_seconds: float = Field(
        5.0,
        gt=0,
        le=3600,
        title="Stall time",
        description="Seconds without a frame before the source counts as stalled.",
    )
    abandon_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        title="Abandon time",
        description="A driver that does not return for so many seconds is left behind, and the camera opened anew.",
    )
    reconnect_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        title="Longest reconnect wait",
        description="The wait between attempts to reach a camera doubles from half a second up to this.",
    )

    @field_validator("device")
    @classmethod
    def _device_suits_the_kind(cls, device: int | str | None, info: ValidationInfo) -> int | str | None:
        if device is None:
            return None
        if info.data.get("kind") in (SourceKind.GENICAM, SourceKind.REALSENSE, SourceKind.OAK):
            # A serial number without quotation marks is a number in YAML.
            return str(device)
        if isinstance(device, str) and device.isdecimal():
            return int(device)
        if isinstance(device, str) and not device.startswith("/dev/"):
            raise ValueError("device is neither an index nor a path under /dev")
        if isinstance(device, int) and device < 0:
            raise ValueError("device must be 0 or more")
        return device

    @field_validator("url")
    @classmethod
    def _url_has_scheme(cls, url: str | None) -> str | None:
        if url is not None and (urlsplit(url).scheme.lower() not in _URL_SCHEMES or not urlsplit(url).netloc):
            raise ValueError(f"url must start with one of {', '.join(_URL_SCHEMES)} and name a host")
        return url

    @field_validator("pipeline")
    @classmethod
    def _pipeline_is_words(cls, pipeline: str | None) -> str | None:
        if pipeline is not None:
            try:
                words = shlex.split(pipeline)
            except ValueError:
                raise ValueError("pipeline has a quotation mark that is not closed") from None
            if not words or words[-1] == "!" or words[0] == "!":
                raise ValueError("pipeline must begin and end with an element, and name no sink")
            if any(word.startswith("-") for word in words):
                raise ValueError("pipeline takes elements and caps, no options")
        return pipeline

    @model_validator(mode="after")
    def _one_place(self) -> SourceSettings:
        kind, places = self.kind.value, _PLACES[self.kind]
        given = [name for name in ("path", "url", "device", "pipeline") if getattr(self, name) is not None]
        if len(given) != 1 or given[0] not in places:
            wanted = f"exactly one of {' and '.join(places)}" if len(places) > 1 else places[0]
            raise ValueError(f"kind {kind} needs {wanted}, and nothing else of path, url, device and pipeline")
        if self.loop and self.live:
            raise ValueError("loop is for folders and videos; a camera has no end")
        if self.trigger not in _TRIGGERS.get(self.kind, _FREE):
            can = ", ".join(sorted(mode.value for mode in _TRIGGERS.get(self.kind, _FREE)))
            raise ValueError(f"kind {kind} has no trigger {self.trigger.value}; it can: {can}")
        if self.genicam != GenicamSettings() and self.kind is not SourceKind.GENICAM:
            raise ValueError(f"genicam is for kind genicam, not for {kind}")
        return self

    @model_validator(mode="after")
    def _section_suits_the_kind(self) -> SourceSettings:
        kind = self.kind
        if kind not in _SIGNALS and self.signal != SignalSourceSettings():
            raise ValueError(f"signal is for kinds that begin with signal_, not for {kind.value}")
        if kind not in _DEPTHS and self.depth != DepthSourceSettings():
            raise ValueError(f"depth is for depth_folder and depth_scene, not for {kind.value}")
        if kind in _SIGNALS and self.fps is not None:
            raise ValueError("fps is for images; a signal's pace is its rate, and signal.speed that of a file")
        scheme = "" if self.url is None else urlsplit(self.url).scheme.lower()
        allowed = _SIGNAL_SCHEMES.get(kind, ())
        if (allowed and scheme not in allowed) or (not allowed and scheme in _MQTT):
            raise ValueError(f"kind {kind.value} takes no {scheme}:// address")
        if kind in _SIGNAL_SCHEMES:
            _check_address(kind, str(self.url))
        if kind is SourceKind.SIGNAL_MQTT:
            if not self.signal.topic:
                raise ValueError("kind signal_mqtt needs signal.topic")
            if self.signal.ca_file is not None and scheme != "mqtts":
                raise ValueError("signal.ca_file needs an mqtts:// address")
        return self

    @model_validator(mode="after")
    def _pixel_format_suits_the_kind(self) -> SourceSettings:
        name = self.pixel_format
        if name is None:
            return self
        if self.kind is SourceKind.GENICAM:
            if name not in GENICAM_FORMATS:
                raise ValueError(f"pixel_format of a genicam camera must be one of {', '.join(GENICAM_FORMATS)}")
        elif self.kind is not SourceKind.CAMERA or self.url is not None:
            raise ValueError("pixel_format is for a local camera and for genicam")
        elif len(name) != _FOURCC or not name.isascii():
            raise ValueError("pixel_format of a local camera must have four letters, such as MJPG or YUYV")
        return self

    @property
    def live(self) -> bool:
        """Whether the source is a camera: it has no end, cannot wait, and is reconnected."""
        return self.kind not in _FILES

    @property
    def modality(self) -> Modality:
        """What its frames are."""
        if self.kind in _SIGNALS:
            return Modality.SIGNAL
        return Modality.DEPTH if self.kind in _DEPTHS else Modality.IMAGE

    @property
    def drop_policy(self) -> DropPolicy:
        """The policy given, or the one that suits the kind."""
        if self.policy is not None:
            return self.policy
        return DropPolicy.DROP_OLDEST if self.live else DropPolicy.WAIT

    @property
    def label(self) -> str:
        """The place, for people, without credentials."""
        place = next(one for one in (self.url, self.pipeline, self.path, self.device) if one is not None)
        return redact(str(place))


def _check_address(kind: SourceKind, url: str) -> None:
    """Refuse what could not be connected to, without repeating it: it may hold a password."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if not parts.hostname or port == 0 or (port is None and kind is not SourceKind.SIGNAL_MQTT):
        raise ValueError(f"url of kind {kind.value} names no host and port; write {parts.scheme}://host:port")
    if "@" in parts.netloc:
        cure = "signal.username and signal.password_file" if kind is SourceKind.SIGNAL_MQTT else "no login is asked for"
        raise ValueError(f"url of kind {kind.value} takes no login; {cure}")
