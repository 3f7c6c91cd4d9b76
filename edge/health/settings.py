"""Settings of what the box watches in its cameras and shows of itself."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CameraHealthSettings(BaseModel):
    """When a camera counts as not well although it delivers frames. Off where absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MetricsSettings(BaseModel):
    """The HTTP address where Prometheus reads. Off where absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", title="Address", description="To listen on.")
    port: int = Field(9464, ge=0, le=65535, title="Port", description="0 picks a free one; the log names it.")
