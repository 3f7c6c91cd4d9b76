"""`lineward bundle`: install, list, confirm and roll back the bundle of a box. Imports wait until a verb is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from edge.settings import BoxSettings
    from edge.slots.slots import Slots

app = typer.Typer(
    no_args_is_help=True,
    help="The bundle of a box: two slots, a link to the one that serves, a way back.",
)
ConfigOption = Annotated[Path, typer.Option(help="The box's YAML file; its bundle is the link of the slots.")]


@app.command()
def install(
    bundle: Annotated[Path, typer.Argument(help="Folder of the new bundle.", show_default=False)],
    config: ConfigOption,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also one that was taken back before, or that falls back.")
    ] = False,
) -> None:
    """Copy a bundle into the free slot, try it in a process of its own, and switch to it on trial.

    A box that runs follows within a second, without losing a frame. It goes back by itself where the bundle fails.
    """
    from edge.slots.probe import Limits, examine

    settings, slots = _open(config)
    limits = Limits(max_slowdown=settings.trial.max_slowdown, allow_fallback=force)

    def look(new: Path, serving: Path | None) -> None:
        probe = examine(
            new,
            serving,
            engine=settings.engine,
            precision=settings.precision,
            threads=settings.threads,
            limits=limits,
        )
        typer.echo(
            f"golden frames within tolerance on {probe.engine} {probe.precision}, {probe.latency_ms:.1f} ms per frame"
        )

    trial = slots.install(bundle, examine=look, allow_bad=force)
    serving = slots.serving()
    typer.echo(
        f"{slots.current} -> {serving}" + ("" if trial is None else f", on trial; back to {trial.back_to} if bad")
    )


@app.command(name="list")
def list_bundles(config: ConfigOption) -> None:
    """Show both slots, the trial, and what was taken back."""
    from edge.adaptation.reference import described
    from edge.bundle import Bundle

    _, slots = _open(config)
    state = slots.state()
    for name, found in sorted(state.bundles.items()):
        text = "damaged"
        if found:
            manifest = Bundle.open(slots.root / name).manifest
            text = f"{found[:12]} {manifest.product} {manifest.method} {manifest.created:%Y-%m-%d %H:%M}, "
            text += described(manifest)
        trial = " on trial" if state.trial is not None and state.trial.slot == name else ""
        typer.echo(f"{'*' if name == state.serving else ' '} {name}  {text}{trial}")
    for bad in state.bad:
        typer.echo(f"  taken back {bad.at:%Y-%m-%d %H:%M}  {bad.id[:12]} {bad.reason}")


@app.command()
def confirm(config: ConfigOption) -> None:
    """End the trial now: the serving bundle stays."""
    _, slots = _open(config)
    found = slots.confirm()
    typer.echo("no bundle is on trial" if found is None else f"bundle {found[:12]} stays")


@app.command()
def rollback(
    config: ConfigOption,
    reason: Annotated[str, typer.Option(help="Kept with the bundle that is taken back.")] = "by hand",
) -> None:
    """Go back to the bundle in the other slot."""
    _, slots = _open(config)
    typer.echo(f"bundle {slots.roll_back(reason)[:12]} serves")


def _open(config: Path) -> tuple[BoxSettings, Slots]:
    from edge.errors import SlotError
    from edge.settings import load_settings
    from edge.slots.slots import CURRENT, Slots

    settings = load_settings(config)
    slots = Slots.of(settings.bundle)
    if slots is None:
        raise SlotError(
            f"{config}: bundle {settings.bundle} is a plain folder; name a link `{CURRENT}` in a folder of its own, "
            f"such as /var/lib/lineward/bundles/{CURRENT}"
        )
    return settings, slots
