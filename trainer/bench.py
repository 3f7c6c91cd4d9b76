"""`lineward bench`: measure what a plan rests on, here what a fleet of boxes gains and costs.

It only reads what is asked for and writes what was found; heavy imports wait until it is called.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edge.errors import UsageError

PICTURE = "fleet.png"
TABLE = "fleet.md"


def bench(
    what: Annotated[str, typer.Argument(help="fleet: boxes that share their memories, on generated images.")],
    boxes: Annotated[int, typer.Option(help="Boxes of the largest fleet; 12 are drawn, others made of their rows.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure here.")] = None,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder for {PICTURE} and {TABLE}; that of --json if absent.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of updates.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
) -> None:
    """Simulate a fleet: I-AUROC against rounds and bytes, and cost against the number of boxes."""
    if what != "fleet":
        raise UsageError(f"bench {what}: unknown; there is bench fleet")
    from pydantic import ValidationError

    from trainer.evaluation.fleet import FleetSettings
    from trainer.evaluation.fleet_bench import BenchSettings, simulate
    from trainer.evaluation.fleet_report import draw, tables
    from trainer.progress import progress_bars

    try:
        settings = BenchSettings(boxes=boxes, seed=seed, fleet=FleetSettings(rounds=rounds, late=0.1, cut_off=0.1))
    except ValidationError as error:
        fault = error.errors()[0]
        raise UsageError(f"--{fault['loc'][0]} {fault['input']}: {fault['msg']}") from error
    folder = out or (json_file.parent if json_file else Path())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {folder}: cannot be made ({error.strerror}); choose another folder") from error
    with progress_bars() as progress:
        report = simulate(settings, progress=progress)
    text = tables(report)
    typer.echo(text)
    draw(report, folder / PICTURE)
    _write(folder / TABLE, text + "\n")
    if json_file is not None:
        _write(json_file, json.dumps(report.as_json(), indent=1) + "\n")
    typer.echo(f"{folder / PICTURE}, {folder / TABLE}" + (f", {json_file}" if json_file else ""))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); choose another place") from error
