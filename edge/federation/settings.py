"""FederationSettings: which fleet a box belongs to and how it reaches the aggregator. Key files are read elsewhere."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 (pydantic needs it at run time)
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from edge.federation.fields import MaybeName, Name  # noqa: TC001 (pydantic needs them at run time)


class FederationSettings(BaseModel):
    """The fleet that this box shares its memory with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fleet: Name = Field(title="Fleet", description="Name of the fleet; the aggregator takes no other.")
    aggregator: str | None = Field(None, title="Aggregator", description="tcp://host:port.")
    key_file: Path | None = Field(
        None,
        title="Key of this box",
        description="Its secret certificate file (*.key_secret), mode 0600 or it is refused.",
    )
    aggregator_key_file: Path | None = Field(
        None, title="Key of the aggregator", description="Its public certificate file (*.key); nobody else is believed."
    )
    exchange: Path | None = Field(
        None,
        title="Exchange folder",
        description="Folder shared with another engine's client on this box, in place of an aggregator and its keys; "
        "see docs/flower.md.",
    )
    subclass: MaybeName = Field(
        "", title="Sub-class", description="Variant or condition of the product at this box; may be empty."
    )

    @model_validator(mode="after")
    def _one_way(self) -> FederationSettings:
        link = {
            "aggregator": self.aggregator,
            "key_file": self.key_file,
            "aggregator_key_file": self.aggregator_key_file,
        }
        missing = [name for name, value in link.items() if value is None]
        if self.exchange is None and missing:
            raise ValueError(f"{missing[0]} is missing; add it, or name an exchange folder")
        if self.exchange is not None and len(missing) < len(link):
            raise ValueError("exchange takes the place of an aggregator and its keys; leave one of the two away")
        return self

    @field_validator("aggregator")
    @classmethod
    def _valid_address(cls, value: str | None) -> str | None:
        if value is None:
            return None
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
