"""AdaptationSettings: how far and how fast a camera may follow its line, and when it must not. Values only."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class AdaptationSettings(BaseModel):
    """How the moments of a camera follow what it shows.

    Shifts are in units of what is usual: 99 of 100 single good images of the training set lie within 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: bool = Field(default=True, title="Enabled", description="Off leaves every frame as it is.")
    half_life: float = Field(
        50.0,
        ge=1,
        le=1_000_000,
        title="Half-life [frames]",
        description="Accepted frames after which half of a lasting change is followed.",
    )
    bound: float = Field(
        8.0,
        gt=0,
        title="Bound",
        description="Largest shift from the training set that is followed, in units of what is usual; frames beyond it "
        "teach nothing. It bounds what a slow drift into a defect can hide.",
    )
    clip: float = Field(
        1.0,
        gt=0,
        title="Clip",
        description="Farthest from the estimate that one frame counts, in deviations of each channel.",
    )
    scale: float = Field(
        2.0,
        gt=1,
        title="Scale limit",
        description="Largest ratio of a channel's deviation to that of the training set, or its inverse.",
    )
    settle_frames: int = Field(
        30,
        ge=1,
        le=100_000,
        title="Settling [frames]",
        description="Accepted frames after a reset or a change of recipe that are averaged whether they alarm or not.",
    )
    every_frames: int = Field(
        25,
        ge=1,
        title="Snapshot interval [frames]",
        description="Accepted frames between two snapshots that come into force, at least.",
    )
    least: float = Field(
        0.05,
        ge=0,
        title="Least change",
        description="A snapshot that differs by less from the one in force, in units of what is usual, is not made.",
    )
    window: int = Field(
        50,
        ge=2,
        le=100_000,
        title="Alarm window [frames]",
        description="Judged frames that the alarm rate is taken of.",
    )
    freeze_rate: float = Field(
        0.2,
        gt=0,
        le=1,
        title="Freeze rate",
        description="Share of alarming frames in the window from which nothing is learned.",
    )
    thaw_rate: float = Field(
        0.06, ge=0, lt=1, title="Thaw rate", description="Share of alarming frames at which learning goes on."
    )
    drift: float = Field(
        3.0,
        gt=0,
        title="Drift notice",
        description="Shift from the training set at which somebody is told, in units of what is usual.",
    )
    switch_frames: int = Field(
        3,
        ge=1,
        title="Switch [frames]",
        description="Frames in a row that the router must give to another sub-class before the camera begins with it.",
    )

    @model_validator(mode="after")
    def _thaws_below_freezing(self) -> AdaptationSettings:
        if self.thaw_rate >= self.freeze_rate:
            raise ValueError(f"thaw_rate {self.thaw_rate:g} must be below freeze_rate {self.freeze_rate:g}")
        return self
