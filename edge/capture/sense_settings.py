"""Settings of sources that are no cameras in the usual sense: signals and depth maps. Reads no device."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (pydantic needs it at run time)
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SignalSourceSettings(BaseModel):
    """How a signal comes in, beside its place."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    speed: float | None = Field(
        1.0,
        gt=0,
        le=1e6,
        title="Replay speed",
        description="signal_file: 1 is real time, null is as fast as windows are judged.",
    )
    topic: str = Field(
        "",
        max_length=256,
        title="Topic",
        description="signal_mqtt: the topic or filter to subscribe to; signal_zmq: the prefix of messages, all by "
        "default.",
    )
    baud: int = Field(115_200, ge=300, le=20_000_000, title="Baud rate", description="signal_serial: bits per second.")
    channels: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        (),
        title="Channels",
        description="Names of the stream's channels in its order, where it does not name them itself; the bundle's "
        "channels in their order where absent. The bundle's are picked from them by name.",
    )
    scale: float = Field(
        1.0, allow_inf_nan=False, title="Scale", description="Values are multiplied by it, into the bundle's unit."
    )
    username: str | None = Field(None, title="User name", description="signal_mqtt: at the broker.")
    password_file: Path | None = Field(None, title="Password file", description="signal_mqtt: holds the password.")
    ca_file: Path | None = Field(None, title="CA file", description="signal_mqtt: certificates to trust with mqtts.")

    @model_validator(mode="after")
    def _names_differ(self) -> SignalSourceSettings:
        if len(set(self.channels)) != len(self.channels):
            raise ValueError("two channels have one name")
        if self.scale == 0:
            raise ValueError("scale must not be 0")
        if self.password_file is not None and self.username is None:
            raise ValueError("password_file needs username")
        return self


class DepthSourceSettings(BaseModel):
    """How depth becomes points: a pinhole camera with square-on optics, all lengths in metres."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fx: float | None = Field(
        None, gt=0, allow_inf_nan=False, title="Focal length x", description="Pixels; of 16-bit depth images."
    )
    fy: float | None = Field(
        None, gt=0, allow_inf_nan=False, title="Focal length y", description="Pixels; fx where absent."
    )
    cx: float | None = Field(
        None, allow_inf_nan=False, title="Principal point x", description="Pixels; the middle where absent."
    )
    cy: float | None = Field(
        None, allow_inf_nan=False, title="Principal point y", description="Pixels; the middle where absent."
    )
    scale_m: float = Field(
        0.001, gt=0, le=1, title="Metres per count", description="Of 16-bit depth images; 0 counts are no measurement."
    )
    noise_m: float = Field(
        0.0,
        ge=0,
        le=1,
        title="Noise [m]",
        description="depth_scene: standard deviation of the depth at 1 m; it grows with the square of the distance.",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, title="Dropout", description="depth_scene: share of points that are missing, anew each frame."
    )
    seed: int = Field(0, ge=0, title="Seed", description="depth_scene: of noise and dropout.")
