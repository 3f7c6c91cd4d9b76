"""AggregatorSettings: one YAML file for the aggregator, read as strictly as a box's. Reading it opens nothing."""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003 (pydantic needs it at run time)
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deploy.aggregator.aggregate import AggregateSettings
from deploy.aggregator.gates import GateLimits
from deploy.aggregator.round_settings import RoundSettings  # noqa: TC001 (pydantic needs it at run time)
from edge.alerts.settings import BrokerSettings  # noqa: TC001 (pydantic needs it at run time)
from edge.alerts.topics import check_segment
from edge.errors import MessageError, SettingsError
from edge.settings import explain, read_yaml

STORE_FILE = "aggregator.db"
_BROKER_FILES = ("password_file", "ca_file", "cert_file", "key_file")


class AggregatorSettings(BaseModel):
    """Everything an aggregator needs to know. Relative paths are relative to the YAML file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    listen: str = Field(
        "tcp://*:5571", title="Listen", description="tcp://interface:port that boxes connect to; * is every interface."
    )
    key_file: Path = Field(
        title="Key", description="The aggregator's secret certificate file (*.key_secret), mode 0600 or it is refused."
    )
    boxes: Path = Field(
        title="Boxes",
        description="Folder with one public key for each box, read all the time; `lineward aggregate enrol` and "
        "`revoke` write it.",
    )
    state_dir: Path = Field(title="State folder", description="Where updates, rounds and banks are kept.")
    rounds: RoundSettings = Field(title="Rounds", description="The fleet's name, when rounds close, what is taken.")
    merge: AggregateSettings = Field(AggregateSettings(), title="Merging", description="How updates become a bank.")
    gates: GateLimits = Field(GateLimits(), title="Gates", description="What an update must pass before it counts.")
    canaries: Path | None = Field(
        None,
        title="Canaries",
        description="Folder of canary files (*.npz); read again when it changes. Without it poison of defect rows is "
        "not found.",
    )
    references: tuple[Path, ...] = Field(
        (),
        title="References",
        description="Folders of the bundles that boxes run: what a pool without a bank of its own is compared with.",
    )
    seed: int = Field(0, ge=0, title="Seed", description="Of the merging; the same updates give the same bank with it.")
    threads: int = Field(1, ge=1, le=64, title="Threads", description="That share the merging; the bank is the same.")
    requests_per_s: float = Field(
        100.0, gt=0, le=1e5, title="Requests", description="Of one box in a second; beyond it is told to wait."
    )
    megabytes_per_s: float = Field(50.0, gt=0, le=1e4, title="Megabytes", description="Of one box in a second.")
    broker: BrokerSettings | None = Field(
        None, title="Broker", description="The MQTT broker that notices go to; without it they are only logged."
    )
    site: str = Field("fleet", title="Site", description="Second segment of the topic of notices.")
    name: str = Field("aggregator", title="Name", description="Third segment of the topic of notices.")

    @field_validator("site", "name")
    @classmethod
    def _name_fits_a_topic(cls, name: str, info: Any) -> str:  # noqa: ANN401 (pydantic's ValidationInfo)
        try:
            return check_segment(name, field=str(info.field_name))
        except MessageError as error:
            raise ValueError(str(error)) from error

    @field_validator("listen")
    @classmethod
    def _valid_address(cls, value: str) -> str:
        cure = "write it as tcp://interface:port, such as tcp://*:5571"
        try:
            parts = urlsplit(value)
            port = parts.port
        except ValueError as error:
            raise ValueError(f"invalid interface or port; {cure}") from error
        if parts.scheme != "tcp" or not parts.hostname or port is None or parts.username is not None or parts.path:
            raise ValueError(f"not an address to listen at; {cure}")
        return value

    @model_validator(mode="after")
    def _rows_fit(self) -> AggregatorSettings:
        if self.merge.rows > self.rounds.max_rows:
            raise ValueError("merge.rows is above rounds.max_rows: boxes would refuse the bank; raise rounds.max_rows")
        return self

    @property
    def store(self) -> Path:
        """The store's file."""
        return self.state_dir / STORE_FILE


def load_settings(path: Path) -> AggregatorSettings:
    """Read an aggregator's YAML file.

    Raises:
        SettingsError: as :func:`edge.settings.load_settings`.
    """
    content = read_yaml(path, needed="key_file, boxes, state_dir and rounds")
    try:
        settings = AggregatorSettings.model_validate(content)
    except ValidationError as error:
        raise SettingsError(f"{path}: {explain(error, AggregatorSettings)}") from error
    return _resolved(settings, path.resolve().parent)


def settings_schema() -> str:
    """Return the JSON Schema of the YAML file, with title and description of each key."""
    return json.dumps(AggregatorSettings.model_json_schema(), indent=1)


def _resolved(settings: AggregatorSettings, folder: Path) -> AggregatorSettings:
    def absolute(path: Path) -> Path:
        return folder / path.expanduser()

    changes: dict[str, Any] = {name: absolute(getattr(settings, name)) for name in ("key_file", "boxes", "state_dir")}
    changes["references"] = tuple(absolute(path) for path in settings.references)
    if settings.canaries is not None:
        changes["canaries"] = absolute(settings.canaries)
    broker = settings.broker
    if broker is not None:
        files = {name: absolute(value) for name in _BROKER_FILES if (value := getattr(broker, name)) is not None}
        changes["broker"] = broker.model_copy(update=files)
    return settings.model_copy(update=changes)
