"""Settings of a bundle's trial."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TrialSettings(BaseModel):
    """What a bundle that was installed into a slot has to show before it stays; else the one before comes back."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float = Field(600.0, ge=0, le=86_400, title="Time [s]", description="The trial lasts at least so long ...")
    frames: int = Field(200, ge=1, le=1_000_000, title="Frames", description="... and until so many were judged.")
    max_failed: int = Field(
        5, ge=1, le=1000, title="Failed frames", description="So many of 20 that cannot be judged end it."
    )
    max_slowdown: float = Field(
        3.0, gt=1, le=100, title="Slowdown", description="Median time per frame beside the bundle before, that ends it."
    )
    max_starts: int = Field(
        1, ge=1, le=10, title="Starts", description="A box that died more often than this on trial goes back."
    )
