"""`lineward evidence`: list and fetch the pictures that a box keeps. Imports wait until a verb is called."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edge.alerts.options import (
    DEFAULT_BROKER,
    BrokerOption,
    CaOption,
    CertOption,
    KeyOption,
    PasswordOption,
    PrefixOption,
    broker_settings,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge.evidence.fetch import EvidenceClient

app = typer.Typer(no_args_is_help=True, help="Pictures that a box keeps of what it found.")
SiteOption = Annotated[str, typer.Option(help="Site of the box.", show_default=False)]
BoxOption = Annotated[str, typer.Option(help="Name of the box.", show_default=False)]
TimeoutOption = Annotated[float, typer.Option(min=0.1, help="Seconds to wait for each answer.")]


@app.command(name="list")
def list_evidence(
    site: SiteOption,
    box: BoxOption,
    broker: BrokerOption = DEFAULT_BROKER,
    *,
    camera: Annotated[str | None, typer.Option(help="Only of this camera.")] = None,
    day: Annotated[str | None, typer.Option(help="Only of this day in UTC, yyyymmdd.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=500, help="Most to list, the newest first.")] = 50,
    password_file: PasswordOption = None,
    ca_file: CaOption = None,
    cert_file: CertOption = None,
    key_file: KeyOption = None,
    prefix: PrefixOption = "lineward",
    timeout: TimeoutOption = 10.0,
) -> None:
    """Print the references of what a box keeps, newest first, with their size."""
    files = {"password_file": password_file, "ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
    with _client(site, box, broker, prefix=prefix, timeout=timeout, files=files) as client:
        for reference, size in client.references(camera=camera, day=day, limit=limit):
            typer.echo(f"{reference}  {size // 1024} KiB")


@app.command()
def get(
    reference: Annotated[str, typer.Argument(help="The evidence of an alert or verdict.", show_default=False)],
    site: SiteOption,
    box: BoxOption,
    broker: BrokerOption = DEFAULT_BROKER,
    *,
    out: Annotated[Path, typer.Option(help="Folder; the reference becomes folders below it.")] = Path(),
    file: Annotated[list[str] | None, typer.Option(help="Only this file; may be repeated.", show_default=False)] = None,
    password_file: PasswordOption = None,
    ca_file: CaOption = None,
    cert_file: CertOption = None,
    key_file: KeyOption = None,
    prefix: PrefixOption = "lineward",
    timeout: TimeoutOption = 10.0,
) -> None:
    """Fetch the pictures of one event from a running box, each verified, and print where they lie."""
    files = {"password_file": password_file, "ca_file": ca_file, "cert_file": cert_file, "key_file": key_file}
    with _client(site, box, broker, prefix=prefix, timeout=timeout, files=files) as client:
        for path in client.fetch(reference, out, only=file or ()):
            typer.echo(str(path))


@contextlib.contextmanager
def _client(
    site: str, box: str, broker: str, *, prefix: str, timeout: float, files: dict[str, Path | None]
) -> Iterator[EvidenceClient]:
    import logging

    from edge.alerts.commander import Commander
    from edge.evidence.fetch import EvidenceClient

    settings = broker_settings(broker, prefix=prefix, **files)
    logging.basicConfig(level=logging.ERROR)
    with Commander(settings, site=site, box=box) as commander:
        yield EvidenceClient(commander, timeout=timeout)
