"""Submits rounds to a SuperLink and waits for their end: ``python -m deploy.flower.submit --settings FILE``.

``flwr run --stream`` ends with 0 although the run failed (Flower 1.41); a timer or an operator wants to know.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.flower.quiet import QUIET, require_quiet
from edge.errors import LinewardError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

APP = Path(__file__).resolve().parent / "app"
_COMPLETED = "finished:completed"
_UNDER_WAY = frozenset({"pending", "starting", "running"})
_AGAIN_S = 1.0


class RunFailedError(LinewardError):
    """A submitted run did not complete; what it stored is kept, and the next run goes on with it."""


def submit(settings: Path, *, options: Mapping[str, float], superlink: str = "", flwr: str = "flwr") -> str:
    """Submit a run, print its log, and return its run id once it is complete.

    Args:
        settings: the aggregator's settings file, as the ServerApp finds it: on SuperLink's machine.
        options: of the run, such as ``{"rounds": 1}``; see :class:`deploy.flower.server.RunConfig`.
        superlink: a connection of ``$FLWR_HOME/config.toml``; empty for its default.
        flwr: the program.

    Raises:
        RunFailedError: SuperLink did not take it, or it failed.
        SettingsError: ``FLWR_HOME`` is not set.
    """
    environment = {**os.environ, **QUIET}
    require_quiet(environment)
    connection = [superlink] if superlink else []
    config = " ".join(
        [f"settings={json.dumps(str(settings))}", *(f"{name}={value}" for name, value in options.items())]
    )
    started = _json_of([flwr, "run", str(APP), *connection, "--run-config", config, "--format", "json"], environment)
    run = started.get("run-id")
    if not isinstance(run, str):
        raise RunFailedError(f"SuperLink did not take the run: {started.get('error-message') or started}")
    while True:
        # Its exit code says nothing, and its end only that the stream ended: a run that failed ends it with 0.
        subprocess.run([flwr, "log", run, *connection], env=environment, check=False)  # noqa: S603 (our own arguments)
        found = _json_of([flwr, "list", *connection, "--run-id", run, "--format", "json"], environment).get("runs")
        state = found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}
        status = str(state.get("status", "state unknown"))
        if status not in _UNDER_WAY:
            break
        time.sleep(_AGAIN_S)
    if status != _COMPLETED:
        raise RunFailedError(
            f"run {run}: {status} ({state.get('status-details', '')}); submit it again, what is stored is kept"
        )
    return run


def _json_of(command: Sequence[str], environment: dict[str, str]) -> dict[str, object]:
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 (our own arguments)
    except OSError as error:
        raise RunFailedError(
            f"{command[0]}: {error.strerror}; run it in the environment of the extra flower"
        ) from error
    # Above its JSON the program may print notes.
    start = done.stdout.find("{")
    try:
        answer = json.loads(done.stdout[start:]) if start >= 0 else None
    except json.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RunFailedError(f"flwr {command[1]}: {said[-1] if said else f'exit code {done.returncode}'}")
    return answer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.flower.submit", description="Run rounds under Flower.")
    parser.add_argument("--settings", type=Path, required=True, help="the aggregator's settings file")
    parser.add_argument("--rounds", type=int, default=1, help="how many rounds to wait for")
    parser.add_argument("--answer-seconds", type=float, default=60.0, help="that boxes have at least to answer")
    parser.add_argument("--ask-seconds", type=float, default=900.0, help="after which a box is asked again")
    parser.add_argument("--tell-seconds", type=float, default=120.0, help="for boxes to store the last bank")
    parser.add_argument("--superlink", default="", help="a connection of $FLWR_HOME/config.toml")
    given = parser.parse_args(arguments)
    try:
        options = {
            "rounds": given.rounds,
            "answer-seconds": given.answer_seconds,
            "ask-seconds": given.ask_seconds,
            "tell-seconds": given.tell_seconds,
        }
        run = submit(given.settings.absolute(), options=options, superlink=given.superlink)
    except LinewardError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 (a command)
        return error.exit_code
    print(f"run {run} complete")  # noqa: T201 (a command)
    return 0


if __name__ == "__main__":
    sys.exit(main())
