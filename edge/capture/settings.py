"""Settings of one frame source; the box's YAML file embeds them.

This module must not import OpenCV: settings are read and checked on machines that have no camera library.
"""

from __future__ import annotations

import re
from enum import Enum
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# user:password@ of a URL, wherever it stands in a text. Up to the last "@" of the word: an unescaped password may hold
# "/" or "@", and hiding too much is the safe mistake.
_CREDENTIALS = re.compile(r"(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)\S*@")
# Query values that cameras use for logins, such as ?user=admin&password=1234 or &token=...
_SECRET_QUERY = re.compile(r"(?i)(?P<key>[?&;](?:user(?:name)?|pass(?:word)?|passwd|pwd|token|key|auth)=)[^&;#\s]*")
_URL_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp")


def redact(text: str) -> str:
    """Return a text with the credentials of every URL in it replaced by ``***``."""
    return _SECRET_QUERY.sub(r"\g<key>***", _CREDENTIALS.sub(r"\g<scheme>***@", text))


class SourceKind(str, Enum):
    """Where frames come from."""

    FOLDER = "folder"
    VIDEO = "video"
    CAMERA = "camera"


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


class SourceSettings(BaseModel):
    """One source of frames: exactly one of ``path``, ``url`` and ``device``, as ``kind`` asks."""

    # A rejected value may hold a password, so validation errors must not repeat their input.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    kind: SourceKind = Field(
        title="Kind", description="folder: images sorted by name; video: a file; camera: a local device or a stream."
    )
    path: str | None = Field(
        None, min_length=1, title="Path", description="The folder of images or the video file (folder, video)."
    )
    url: str | None = Field(
        None,
        min_length=1,
        repr=False,
        title="Stream URL",
        description="rtsp, http, ... address of a network camera (camera). Credentials in it are never logged.",
    )
    device: int | str | None = Field(
        None, title="Device", description="Index of a local camera, or its path such as /dev/video0 (camera)."
    )
    fps: float | None = Field(
        None,
        gt=0,
        le=1000,
        title="Frames per second",
        description="Pace of a folder or video, as fast as frames are judged where absent; asked of a local camera.",
    )
    loop: bool = Field(
        default=False, title="Loop", description="Start again at the end of a folder or video instead of ending."
    )
    width: int | None = Field(None, ge=16, le=16384, title="Width", description="Pixels, asked of a local camera.")
    height: int | None = Field(None, ge=16, le=16384, title="Height", description="Pixels, asked of a local camera.")
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
    reconnect_seconds: float = Field(
        30.0,
        gt=0,
        le=3600,
        title="Longest reconnect wait",
        description="The wait between attempts to reach a camera doubles from half a second up to this.",
    )

    @field_validator("device")
    @classmethod
    def _device_is_named(cls, device: int | str | None) -> int | str | None:
        if isinstance(device, str):
            if device.isdecimal():
                return int(device)
            if not device.startswith("/dev/"):
                raise ValueError("device is neither an index nor a path under /dev")
        elif isinstance(device, int) and device < 0:
            raise ValueError("device must be 0 or more")
        return device

    @field_validator("url")
    @classmethod
    def _url_has_scheme(cls, url: str | None) -> str | None:
        if url is not None and (urlsplit(url).scheme.lower() not in _URL_SCHEMES or not urlsplit(url).netloc):
            raise ValueError(f"url must start with one of {', '.join(_URL_SCHEMES)} and name a host")
        return url

    @model_validator(mode="after")
    def _one_place(self) -> SourceSettings:
        given = [name for name in ("path", "url", "device") if getattr(self, name) is not None]
        if self.kind is SourceKind.CAMERA:
            if len(given) != 1 or given == ["path"]:
                raise ValueError("kind camera needs exactly one of url and device, and no path")
            if self.loop:
                raise ValueError("loop is for folders and videos; a camera has no end")
        elif given != ["path"]:
            raise ValueError(f"kind {self.kind.value} needs path, and neither url nor device")
        return self

    @property
    def live(self) -> bool:
        """Whether the source is a camera: it has no end, cannot wait, and is reconnected."""
        return self.kind is SourceKind.CAMERA

    @property
    def drop_policy(self) -> DropPolicy:
        """The policy given, or the one that suits the kind."""
        if self.policy is not None:
            return self.policy
        return DropPolicy.DROP_OLDEST if self.live else DropPolicy.WAIT

    @property
    def label(self) -> str:
        """The place, for people, without credentials."""
        if self.url is not None:
            return redact(self.url)
        return str(self.path if self.path is not None else self.device)
