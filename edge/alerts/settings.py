"""How to reach the MQTT broker: one settings model, and the parser of broker addresses.

Every secret is a file that is read when a connection is made; none is kept here, logged or shown.
"""

from __future__ import annotations

import stat
from enum import Enum
from pathlib import Path  # noqa: TC003 (pydantic needs it at run time)
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from edge.alerts.topics import check_prefix
from edge.errors import BrokerError, MessageError, SettingsError

MQTT_PORT = 1883
MQTTS_PORT = 8883
MAX_BACKOFF_S = 8.0


class Protocol(str, Enum):
    """Version of MQTT. ``auto`` tries 5 and falls back to 3.1.1 where a broker does not take it."""

    AUTO = "auto"
    V5 = "5"
    V311 = "3.1.1"


class HomeAssistantSettings(BaseModel):
    """Discovery by Home Assistant: a device per camera and station, made and removed with them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str = Field(
        "homeassistant", title="Discovery prefix", description="As set in Home Assistant's MQTT integration."
    )

    @field_validator("prefix")
    @classmethod
    def _valid_prefix(cls, value: str) -> str:
        return _checked_prefix(value)


class BrokerSettings(BaseModel):
    """The broker and how hard to hold on to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str = Field(
        "mqtt://localhost:1883",
        title="Address",
        description="mqtt://host[:1883], or mqtts://host[:8883] for TLS. A password does not belong here.",
    )
    username: str | None = Field(None, title="User name", description="Login at the broker; none by default.")
    password_file: Path | None = Field(
        None, title="Password file", description="File whose first line is the password; mode 0600 or 0640."
    )
    ca_file: Path | None = Field(
        None, title="CA file", description="PEM file that the broker's certificate is checked with; else the system's."
    )
    cert_file: Path | None = Field(None, title="Client certificate", description="PEM file, for mutual TLS.")
    key_file: Path | None = Field(
        None, title="Client key", description="PEM file of the client certificate's key; mode 0600 or 0640."
    )
    keepalive_s: int = Field(
        10,
        ge=1,
        le=600,
        title="Keep-alive [s]",
        description="A dead connection is noticed within 1.5 times this; the broker sends our will then.",
    )
    prefix: str = Field("lineward", title="Topic prefix", description="One or more segments, such as acme/lineward.")
    client_id: str | None = Field(
        None,
        min_length=1,
        max_length=65535,
        title="Client id",
        description="Unique at the broker; lineward-<site>-<box> by default.",
    )
    protocol: Protocol = Field(Protocol.AUTO, title="MQTT version", description="auto, 5 or 3.1.1.")
    max_inflight: int = Field(
        20,
        ge=1,
        le=1000,
        title="Messages in flight",
        description="QoS 1 messages sent and not yet acknowledged; a broker that allows fewer wins.",
    )
    replay_rows: int = Field(
        10_000,
        ge=0,
        title="Replay window [messages]",
        description="Acknowledged messages kept on disk, for a replay after a reconnect and on command.",
    )
    replay_seconds: float = Field(
        300.0,
        ge=0,
        title="Replay window [s]",
        description="After a reconnect, messages acknowledged within this time are sent again, flagged late. Twice the "
        "broker's save interval or more: an acknowledged message is not yet on the broker's disk.",
    )
    connect_timeout_s: float = Field(5.0, gt=0, le=60, title="Connect time-out [s]", description="Per attempt.")
    backoff_min_s: float = Field(0.5, gt=0, le=MAX_BACKOFF_S, title="First wait [s]", description="Then doubled.")
    backoff_max_s: float = Field(
        MAX_BACKOFF_S, gt=0, le=MAX_BACKOFF_S, title="Longest wait [s]", description="Between two attempts."
    )
    home_assistant: HomeAssistantSettings | None = Field(
        None, title="Home Assistant", description="Announces the cameras to Home Assistant; off where absent."
    )

    @field_validator("url")
    @classmethod
    def _valid_url(cls, value: str) -> str:
        try:
            _split(value)
        except BrokerError as error:
            raise ValueError(str(error)) from error
        return value

    @field_validator("prefix")
    @classmethod
    def _valid_prefix(cls, value: str) -> str:
        return _checked_prefix(value)

    @model_validator(mode="after")
    def _consistent(self) -> BrokerSettings:
        if self.password_file is not None and self.username is None and _split(self.url).username is None:
            raise ValueError("password_file needs username")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if not self.tls and (self.ca_file or self.cert_file):
            raise ValueError("ca_file, cert_file and key_file need an mqtts:// address")
        return self

    @property
    def host(self) -> str:
        """Host name or address."""
        return _split(self.url).hostname or ""

    @property
    def port(self) -> int:
        """TCP port, by default 1883, or 8883 with TLS."""
        return _split(self.url).port or (MQTTS_PORT if self.tls else MQTT_PORT)

    @property
    def tls(self) -> bool:
        """Whether the connection is encrypted."""
        return _split(self.url).scheme == "mqtts"

    @property
    def login(self) -> str | None:
        """The user name: of its own key, else the one in the address."""
        return self.username if self.username is not None else _split(self.url).username

    @property
    def address(self) -> str:
        """``scheme://host:port``, safe to log."""
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"

    def read_password(self) -> str | None:
        """First line of the password file, or None where there is no such file in the settings.

        Raises:
            SettingsError: it cannot be read, is empty, or can be read by everybody.
        """
        if self.password_file is None:
            return None
        check_readable("password_file", self.password_file)
        check_secret_file(self.password_file)
        try:
            lines = self.password_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"password_file {self.password_file}: {error}; write the password into it") from error
        if not lines or not lines[0]:
            raise SettingsError(f"password_file {self.password_file} is empty; its first line must be the password")
        return lines[0]


def _checked_prefix(value: str) -> str:
    try:
        return check_prefix(value)
    except MessageError as error:
        raise ValueError(str(error)) from error


def check_readable(key: str, path: Path) -> None:
    """Refuse a file that this user cannot open.

    Args:
        key: of the settings, for the error.
        path: of the file.

    Raises:
        SettingsError: it cannot be opened; names the key, the file and the cure.
    """
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        cure = "let the box's user read it: chgrp, chmod 640" if isinstance(error, PermissionError) else "correct it"
        raise SettingsError(f"{key} {path}: {error.strerror}; {cure}") from error


def check_secret_file(path: Path) -> None:
    """Refuse a secret that every user of the machine can read or change.

    Raises:
        SettingsError: it is missing, or its mode is open to others.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}; name a file that this user can read") from error
    if mode & stat.S_IRWXO:
        raise SettingsError(f"{path} is open to every user of this machine; run: chmod 600 {path}")


def parse_broker_url(url: str) -> BrokerSettings:
    """Settings for an address as given on a command line: ``mqtt[s]://[user@]host[:port]``.

    Raises:
        BrokerError: the address is not of that form.
    """
    _split(url)
    try:
        return BrokerSettings(url=url)
    except ValidationError as error:
        raise BrokerError(f"broker address: {error.errors()[0]['msg']}") from error


def _split(url: str) -> SplitResult:
    # Messages never repeat the address: a password typed into it would end up in a log.
    cure = "write it as mqtt://host:port or mqtts://host:port"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BrokerError(f"broker address: invalid host or port; {cure}") from error
    if parts.scheme not in ("mqtt", "mqtts"):
        raise BrokerError(f"broker address: the scheme must be mqtt or mqtts; {cure}")
    if not parts.hostname or any(c.isspace() or not c.isprintable() for c in url):
        raise BrokerError(f"broker address: the host is missing or has blanks; {cure}")
    if port == 0:
        raise BrokerError(f"broker address: port 0 cannot be connected to; {cure}")
    if parts.password is not None:
        raise BrokerError("broker address: it holds a password; put it into a file of mode 0600 named by password_file")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise BrokerError(f"broker address: nothing may follow the port; {cure}")
    return parts
