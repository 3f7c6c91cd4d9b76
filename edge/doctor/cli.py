"""The verb `lineward doctor`. What is looked at is imported when it is called."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path  # noqa: TC003 (typer needs it at run time)
from typing import Annotated

import typer

from edge.errors import GateError


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="The box's YAML file; else only this machine is looked at.", show_default=False)
    ] = None,
    *,
    seconds: Annotated[float, typer.Option(min=0.1, max=60.0, help="For the frames of each camera.")] = 3.0,
    pixels_per_mm: Annotated[float | None, typer.Option(min=0.001, help="Scale of the cameras' frames.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per finding and line.")] = False,
) -> None:
    """Check this machine for what a box needs: ok, warn or fail, and the cure. A failure gives exit code 4."""
    from edge.doctor.examine import examine
    from edge.doctor.findings import Level
    from edge.health.leaving import leave
    from edge.health.logs import configure_logs

    threads = threading.enumerate()
    # What the parts of a box would log stands in the findings.
    configure_logs(logging.CRITICAL)
    counts = dict.fromkeys(Level, 0)
    for finding in examine(config, seconds=seconds, scale=pixels_per_mm):
        counts[finding.level] += 1
        typer.echo(json.dumps(finding.as_json()) if as_json else finding.line)
        sys.stdout.flush()
    if not as_json:
        typer.echo(", ".join(f"{count} {level.value}" for level, count in counts.items()))
    leave(GateError.exit_code if counts[Level.FAIL] else 0, threads)
