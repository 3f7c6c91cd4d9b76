"""FederationSettings: which fleet a box belongs to and how it reaches the aggregator. Key files are read elsewhere."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (pydantic needs it at run time)
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from edge.federation.fields import MaybeName, Name  # noqa: TC001 (pydantic needs them at run time)


class FederationSettings(BaseModel):
    """The fleet that this box shares its memory with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fleet: Name = Field(title="Fleet", description="Name of the fleet; the aggregator takes no other.")
    aggregator: str = Field(title="Aggregator", description="tcp://host:port.")
    key_file: Path = Field(
        title="Key of this box", description="Its secret certificate file (*.key_secret), mode 0600 or it is refused."
    )
    aggregator_key_file: Path = Field(
        title="Key of the aggregator", description="Its public certificate file (*.key); nobody else is believed."
    )
    subclass: MaybeName = Field(
        "", title="Sub-class", description="Variant or condition of the product at this box; may be empty."
    )

    @field_validator("aggregator")
    @classmethod
    def _valid_address(cls, value: str) -> str:
        cure = "write it as tcp://host:port"
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"invalid host or port; {cure}") from error
        if parts.scheme != "tcp" or not parts.hostname or not port or parts.username is not None:
            raise ValueError(f"not the address of an aggregator; {cure}")
        if parts.path or parts.query or parts.fragment or any(c.isspace() for c in value):
            raise ValueError(f"nothing may follow the port; {cure}")
        return value
