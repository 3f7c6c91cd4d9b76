"""The command line's options for reaching a broker, shared by the verbs that do; imports wait for a call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.errors import UsageError

if TYPE_CHECKING:
    from edge.alerts.settings import BrokerSettings

DEFAULT_BROKER = "mqtt://localhost:1883"

BrokerOption = Annotated[str, typer.Option(help="mqtt[s]://[user@]host[:port]")]
PasswordOption = Annotated[Path | None, typer.Option(help="File with the broker password.")]
CaOption = Annotated[Path | None, typer.Option(help="PEM file to check the broker's certificate with.")]
CertOption = Annotated[Path | None, typer.Option(help="PEM file of our certificate, for mutual TLS.")]
KeyOption = Annotated[Path | None, typer.Option(help="PEM file of its key; mode 0600 or 0640.")]
PrefixOption = Annotated[str, typer.Option(help="First segments of every topic.")]


def broker_settings(
    url: str,
    *,
    password_file: Path | None,
    ca_file: Path | None,
    prefix: str,
    cert_file: Path | None = None,
    key_file: Path | None = None,
) -> BrokerSettings:
    """Make settings of what stands on a command line.

    Raises:
        BrokerError: the address is not of its form.
        UsageError: the options do not fit each other.
    """
    from pydantic import ValidationError  # noqa: PLC0415 (when a verb is called)

    from edge.alerts.settings import BrokerSettings, parse_broker_url  # noqa: PLC0415 (as above)
    from edge.settings import explain  # noqa: PLC0415 (as above)

    parse_broker_url(url)
    try:
        return BrokerSettings(
            url=url, password_file=password_file, ca_file=ca_file, cert_file=cert_file, key_file=key_file, prefix=prefix
        )
    except ValidationError as error:
        raise UsageError(f"broker: {explain(error, BrokerSettings)}") from error
