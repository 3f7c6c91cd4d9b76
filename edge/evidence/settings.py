"""Settings of the evidence that a box keeps of what it found."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class EvidenceSettings(BaseModel):
    """Frame, heat map and some frames before and after each event. Off where absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_mb: int = Field(
        1024, ge=1, le=1_048_576, title="Limit [MiB]", description="On disk; the oldest evidence goes first beyond."
    )
    before: int = Field(2, ge=0, le=16, title="Frames before", description="Each is held in memory, per camera.")
    after: int = Field(2, ge=0, le=16, title="Frames after", description="Judged frames kept after an event began.")
    quality: int = Field(90, ge=1, le=100, title="JPEG quality", description="Of frames; the heat map is lossless.")
