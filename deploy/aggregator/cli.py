"""Verbs of ``lineward aggregate``: run the aggregator, enrol and revoke boxes, look, roll back, decide on quarantine.

Commands that change something work beside a running service: keys through the folder, the rest through the store.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deploy.aggregator.records import Upload
    from deploy.aggregator.settings import AggregatorSettings
    from deploy.aggregator.store import Store

app = typer.Typer(
    name="aggregate",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Collect the fleet's memory updates and build a better memory.",
)
quarantine = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Updates that the gates held back: look and decide."
)
app.add_typer(quarantine, name="quarantine")

ConfigOption = Annotated[Path, typer.Option(help="The aggregator's YAML file.", show_default=False)]
BoxArgument = Annotated[str, typer.Argument(help="<site>/<box>.", show_default=False)]
NumberArgument = Annotated[int, typer.Argument(help="Number of the update.", show_default=False)]


@app.command()
def run(
    config: Annotated[Path | None, typer.Option(help="The aggregator's YAML file.", show_default=False)] = None,
    *,
    print_schema: Annotated[bool, typer.Option("--print-schema", help="Print the YAML file's JSON Schema.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only read the YAML file.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Serve boxes until it is told to stop."""
    from deploy.aggregator.settings import load_settings, settings_schema
    from edge.errors import UsageError

    if print_schema:
        typer.echo(settings_schema())
        return
    if config is None:
        raise UsageError("aggregate run: give the aggregator's YAML file with --config FILE, or --print-schema")
    settings = load_settings(config)
    if check:
        typer.echo(f"{config}: fleet {settings.rounds.fleet}, listens at {settings.listen}")
        return
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    from deploy.aggregator.service import Service

    service = Service(settings)
    service.run()
    if service.merging:
        # A merge of minutes holds nothing that is not begun again at the next start; whoever stops us waits 3 s.
        logging.shutdown()
        os._exit(0)


@app.command()
def enrol(
    box: BoxArgument,
    public: Annotated[Path, typer.Option(help="The box's public certificate file (*.key).", show_default=False)],
    config: ConfigOption,
) -> None:
    """Let a box take part, with the key that it made: lineward key."""
    from deploy.aggregator.identity import enrol as enrol_box
    from deploy.aggregator.settings import load_settings
    from edge.errors import UsageError
    from edge.federation.keys import read_public_key

    settings = load_settings(config)
    key = read_public_key(public)
    if key.box not in ("", box):
        raise UsageError(f"{public}: is the key of {key.box}, not of {box}; name that box, or its own file")
    path = enrol_box(settings.boxes, box, key.key)
    typer.echo(f"{box} enrolled: {path}")


@app.command()
def revoke(box: BoxArgument, config: ConfigOption) -> None:
    """Take a box's key back, in force within two seconds; what it sent and is not merged yet is held back."""
    from deploy.aggregator.identity import revoke as revoke_box
    from deploy.aggregator.settings import load_settings

    settings = load_settings(config)
    kept = revoke_box(settings.boxes, box)
    typer.echo(f"{box} revoked; its key is kept as {kept} and never taken again")


@app.command()
def status(
    config: ConfigOption,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    events: Annotated[int, typer.Option(min=0, max=1000, help="Show so many of the last events.")] = 10,
) -> None:
    """Show boxes, rounds, banks and the last events."""
    from deploy.aggregator.report import as_text, collect
    from deploy.aggregator.settings import load_settings

    found = collect(load_settings(config), events)
    if as_json:
        import json

        typer.echo(json.dumps(found, indent=1))
        return
    typer.echo(as_text(found))


@app.command()
def rollback(
    pool: Annotated[str, typer.Argument(help="Name of the pool, as `status` shows it.", show_default=False)],
    version: Annotated[int, typer.Argument(help="Version of a bank that is kept.", show_default=False)],
    config: ConfigOption,
) -> None:
    """Make an older bank the newest again; boxes fetch it, try it in shadow and switch as with any other."""
    from datetime import datetime, timezone

    from deploy.aggregator.operators import roll_back

    with _store(config) as store:
        new = roll_back(store, pool, version, now=datetime.now(timezone.utc))
    typer.echo(f"bank {new} of {pool} has the rows of bank {version}")


@quarantine.command(name="list")
def list_held(config: ConfigOption) -> None:
    """List the updates that wait for a decision, with what held them back."""
    from deploy.aggregator.records import UploadState

    with _store(config) as store:
        held = store.uploads(state=UploadState.QUARANTINED)
    for upload in held:
        typer.echo(_line(upload))
    if not held:
        typer.echo("none")


@quarantine.command()
def release(number: NumberArgument, config: ConfigOption) -> None:
    """Let an update count after all, in the round that is open now."""
    from deploy.aggregator.operators import release as let_go

    with _store(config) as store:
        round_ = let_go(store, number)
    typer.echo(f"update {number} counts in round {round_}")


@quarantine.command()
def dismiss(number: NumberArgument, config: ConfigOption) -> None:
    """Refuse an update for good."""
    from deploy.aggregator.operators import dismiss as refuse

    with _store(config) as store:
        refuse(store, number)
    typer.echo(f"update {number} is refused")


def _store(config: Path) -> Store:
    from deploy.aggregator.settings import load_settings
    from deploy.aggregator.store import Store

    settings: AggregatorSettings = load_settings(config)
    return Store(settings.store, serve=False)


def _line(upload: Upload) -> str:
    what = upload.product + (f"/{upload.subclass}" if upload.subclass else "")
    return f"{upload.id}  {upload.box}  {what}  round {upload.round_counted}  {'; '.join(upload.reasons)}"
