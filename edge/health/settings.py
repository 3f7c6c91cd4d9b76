"""Settings of what the box watches in its cameras and shows of itself."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field, model_validator


class CameraFault(str, Enum):
    """What may be wrong with a camera that delivers frames.

    ``frozen``: the same picture again and again, without the noise of a sensor. ``dark``, ``overexposed``: against
    fixed levels and against what was learnt. ``blurred``: edges are less steep than learnt. ``moved``: what stands
    still in the view is elsewhere, or gone. ``slow``: fewer frames than asked for (stream mode).
    """

    FROZEN = "frozen"
    DARK = "dark"
    OVEREXPOSED = "overexposed"
    BLURRED = "blurred"
    MOVED = "moved"
    SLOW = "slow"


class CameraHealthSettings(BaseModel):
    """When a camera counts as not well although it delivers frames. Off where absent; docs/camera_health.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checks: tuple[CameraFault, ...] = Field(
        tuple(CameraFault),
        title="Checks",
        description="frozen, dark, overexposed, blurred, moved, slow: which are made.",
    )
    not_judged_when: tuple[CameraFault, ...] = Field(
        (),
        title="Not judged when",
        description="While one of these lasts, frames are NOT_JUDGED; by default no fault changes a verdict.",
    )
    looks_per_second: float = Field(
        2.0,
        gt=0,
        le=30,
        title="Looks per second",
        description="Frames that are looked at, at most, at irregular moments.",
    )
    baseline_frames: int = Field(
        60, ge=20, le=10_000, title="Baseline frames", description="Good frames that are learnt from, once per camera."
    )
    brightness: float | None = Field(
        None, gt=0, le=255, title="Brightness", description="Mean luma of good frames; learnt where absent."
    )
    sharpness: float | None = Field(
        None, gt=0, le=4, title="Sharpness", description="Of good frames, as the status shows it; learnt where absent."
    )
    enter_s: float = Field(
        3.0, ge=0, le=3600, title="Time to enter [s]", description="dark, overexposed and blurred must last so long."
    )
    leave_s: float = Field(5.0, ge=0, le=3600, title="Time to leave [s]", description="A fault must be gone so long.")
    frozen_s: float = Field(
        10.0,
        ge=0,
        le=3600,
        title="Time to frozen [s]",
        description="The same picture must last so long; longer than a video stream's key frame interval.",
    )
    moved_s: float = Field(10.0, ge=0, le=3600, title="Time to moved [s]", description="A shift must last so long.")
    slow_s: float = Field(10.0, ge=1, le=3600, title="Time to slow [s]", description="A low rate must last so long.")
    frozen_share: float = Field(
        0.01,
        gt=0,
        lt=0.5,
        title="Frozen share",
        description="Frames with fewer changed pixels than this share are the same picture; a clock in it may run.",
    )
    dark_level: float = Field(
        25.0, ge=0, le=255, title="Dark level", description="Dark where 99 % of the picture is below this luma ..."
    )
    dark_ratio: float = Field(
        0.4, ge=0, lt=1, title="Dark ratio", description="... or its mean is below this share of the learnt one."
    )
    overexposed_share: float = Field(
        0.3, gt=0, le=1, title="Overexposed share", description="Share of clipped pixels above the learnt one."
    )
    blurred_ratio: float = Field(
        0.7, gt=0, lt=1, title="Blurred ratio", description="Blurred below this share of the learnt sharpness."
    )
    moved_share: float = Field(
        0.012, ge=0.01, le=0.3, title="Moved share", description="Moved beyond this share of the picture's width."
    )
    slow_ratio: float = Field(
        0.8, gt=0, lt=1, title="Slow ratio", description="Slow below this share of the frame rate asked for."
    )
    frame_rate: float | None = Field(
        None,
        gt=0,
        le=1000,
        title="Frame rate asked for",
        description="Per second; the source's fps, else the camera's frame_rate, where absent.",
    )

    @model_validator(mode="after")
    def _vetoes_are_checked(self) -> CameraHealthSettings:
        unchecked = [fault.value for fault in self.not_judged_when if fault not in self.checks]
        if unchecked:
            raise ValueError(f"not_judged_when names {unchecked[0]}, which is not among checks")
        return self


class MetricsSettings(BaseModel):
    """The HTTP address where Prometheus reads. Off where absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", title="Address", description="To listen on.")
    port: int = Field(9464, ge=0, le=65535, title="Port", description="0 picks a free one; the log names it.")
