"""The ServerApp: settings, durable rounds and Flower's grid put together. It must not know how banks are made."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.serverapp import ServerApp
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deploy.flower.book import open_book
from deploy.flower.grid import GridFleet
from deploy.flower.quiet import require_quiet
from deploy.flower.rounds import Conductor
from edge.errors import SettingsError

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

LOG = logging.getLogger("lineward.flower")


class RunConfig(BaseModel):
    """What ``flwr run --run-config`` may set; the defaults are in ``app/pyproject.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: str = Field(min_length=1)
    rounds: int = Field(1, ge=1, le=10_000)
    answer_seconds: float = Field(60.0, gt=0, le=86_400, alias="answer-seconds")
    ask_seconds: float = Field(900.0, gt=0, le=86_400, alias="ask-seconds")
    tell_seconds: float = Field(120.0, gt=0, le=86_400, alias="tell-seconds")
    poll_seconds: float = Field(0.5, gt=0, le=60, alias="poll-seconds")


def read_run_config(values: dict[str, object]) -> RunConfig:
    """The run configuration of a submitted app.

    Raises:
        SettingsError: a key is unknown or its value out of range.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise SettingsError(f"--run-config {key}: {first['msg']}; name the aggregator's settings file") from error


def run_rounds(grid: Grid, config: RunConfig) -> None:
    """Run until as many rounds as asked for have ended; those that a former run left open go on first."""
    with open_book(Path(config.settings), answer_s=config.answer_seconds) as book:
        conductor = Conductor(
            GridFleet(grid, ttl_s=config.ask_seconds),
            book,
            wait=lambda: time.sleep(config.poll_seconds),  # Flower's grid can only be polled
            clock=time.monotonic,
            ask_s=config.ask_seconds,
            tell_s=config.tell_seconds,
        )
        report = conductor.run(config.rounds)
    refused = sum(1 for outcome in report.outcomes.values() if outcome.refused is not None)
    taken = len(report.outcomes) - refused
    LOG.info("%d rounds ended: updates of %d boxes taken, of %d refused", report.ended, taken, refused)


app = ServerApp()


def main(grid: Grid, context: Context) -> None:
    """What Flower calls, in a process of its own for each submitted run."""
    require_quiet()
    handler = logging.StreamHandler()  # Flower carries what a ServerApp prints to `flwr log`
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    ours = logging.getLogger("lineward")
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False
    run_rounds(grid, read_run_config(dict(context.run_config)))


app.main()(main)
