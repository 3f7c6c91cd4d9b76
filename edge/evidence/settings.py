"""Settings of the evidence that a box keeps of what it found."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EvidenceSettings(BaseModel):
    """Frame, heat map and some frames before and after each event. Off where absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_mb: int = Field(
        1024, ge=1, le=1_048_576, title="Limit [MiB]", description="On disk; the oldest evidence goes first beyond."
    )
    min_free_mb: int = Field(
        512,
        ge=0,
        le=1_048_576,
        title="Space left free [MiB]",
        description="With less free on its disk the evidence does not grow: new evidence takes the place of old.",
    )
    before: int = Field(2, ge=0, le=16, title="Frames before", description="Each is held in memory, per camera.")
    after: int = Field(2, ge=0, le=16, title="Frames after", description="Judged frames kept after an event began.")
    not_judged: bool = Field(
        default=False, title="Parts not judged", description="Triggered mode: keep pictures of these parts too."
    )
    quality: int = Field(90, ge=1, le=100, title="JPEG quality", description="Of frames; the heat map is lossless.")
    waiting_mb: int = Field(
        64,
        ge=8,
        le=4096,
        title="Waiting pictures [MiB]",
        description="Frames in memory that wait to be compressed; evidence beyond is not kept, and counted.",
    )
