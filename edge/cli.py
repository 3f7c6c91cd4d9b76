"""The command `lineward`: the box's verbs, and those of other rooms by name only.

Imports of the box wait until a verb is called; rooms above are never imported to list them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

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
from edge.doctor.cli import doctor
from edge.errors import BrokerError, CommandError, LinewardError, MissingExtraError, OutboxError, UsageError
from edge.evidence.cli import app as evidence_app
from edge.judgement.cli import threshold
from edge.process_memory import use_few_arenas
from edge.products.cli import prompt
from edge.slots.cli import app as bundle_app

if TYPE_CHECKING:
    from edge.alerts.settings import BrokerSettings
    from edge.alerts.subscriber import Subscriber
    from edge.replay import ReplaySummary
    from edge.settings import BoxSettings

ENTRY_POINTS = "lineward.commands"
# A verb's own docstring is not at hand before its room is imported.
VERB_HELP = {
    "aggregate": "Collect the fleet's memory updates and build a better memory.",
    "bench": "Simulate a fleet: what shared memories gain and cost.",
    "canaries": "Make what an aggregator tries updates on: patches with known defects.",
    "demo": "Run the whole main job on an example or on your own images.",
    "distill": "Teach a small network what a large one knows.",
    "evaluate": "Measure a detector on labelled test images.",
    "export": "Turn a trained detector into a verified bundle.",
    "rollout": "Bring a bundle to the fleet in waves.",
    "synth3d": "Put a synthetic surface defect on a scan, or draw what its parameters do.",
    "train": "Learn what good parts look like.",
    "verify": "Check a bundle and the figures that it promises.",
}
EXTRAS = {"aggregate": "aggregator", "demo": "demo"}
_ROOMS = frozenset({"edge", "deploy", "trainer"})
# sysexits.h EX_TEMPFAIL: ended in order, to be started again by whoever supervises it.
RESTART_EXIT = 75


class _OtherRoomsVerb(TyperCommand):
    """Stands in --help for a verb whose room is imported only when it is called."""

    def __init__(self, entry: importlib.metadata.EntryPoint) -> None:
        super().__init__(entry.name, help=VERB_HELP.get(entry.name, f"From {entry.module}."))
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:  # noqa: ANN401 (typer's signature)
        return _load_verb(self._entry).make_context(info_name, args, parent=parent, **extra)


class _Verbs(TyperGroup):
    """The base's own commands first, then the entry points' by name."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 (typer's signature)
        own = super().list_commands(ctx)
        return [*own, *sorted(set(_entry_points()) - set(own))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 (typer's signature)
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = _entry_points().get(cmd_name)
        return None if entry is None else _OtherRoomsVerb(entry)


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Anomaly detection at the edge of a production line.",
)
app.add_typer(bundle_app, name="bundle")
app.add_typer(evidence_app, name="evidence")


app.command()(threshold)
app.command()(doctor)
app.command()(prompt)


def main() -> None:
    """Run the command; a LinewardError becomes one line on stderr and its exit code."""
    try:
        app()
    except LinewardError as error:
        line = " ".join(str(error).split())
        sys.stderr.write(f"lineward: {line}\n")
        sys.exit(error.exit_code)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lineward {importlib.metadata.version('lineward')}")
        raise typer.Exit


@app.callback()
def base(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Anomaly detection at the edge of a production line."""


@app.command()
def run(
    config: Annotated[Path | None, typer.Option(help="The box's YAML file.", show_default=False)] = None,
    *,
    print_schema: Annotated[bool, typer.Option("--print-schema", help="Print the YAML file's JSON Schema.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Only read the YAML file.")] = False,
    log_format: Annotated[str, typer.Option(help="text, or json for one object per line.")] = "text",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Run a box until it is told to stop, or until all of its files have been judged; SIGHUP reads the file again."""
    # Read when numpy is loaded. On a box its matrix products are the memory's alone, which has time: with threads of
    # their own they would spin on the cores that the engine judges with.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    use_few_arenas()
    from edge.settings import load_settings, settings_schema

    if print_schema:
        typer.echo(settings_schema())
        return
    if config is None:
        raise UsageError("run: give the box's YAML file with --config FILE, or --print-schema")
    settings = load_settings(config)
    if check:
        typer.echo(f"{config}: {len(settings.cameras)} camera(s), bundle {settings.bundle}")
        return
    _log_to_stderr(verbose=verbose, form=log_format, site=settings.site, box=settings.box)
    os.umask(0o027)  # what a box writes is for itself and its group
    from edge.box import Box
    from edge.health.leaving import leave

    threads = threading.enumerate()
    box = Box(settings)
    box.run(reread=lambda: load_settings(config))
    leave(RESTART_EXIT if box.restart_reason else 0, threads)


@app.command()
def replay(
    bundle: Annotated[Path, typer.Option(help="Folder of the bundle that judges.", show_default=False)],
    source: Annotated[Path, typer.Option(help="Folder of images, or a video file.", show_default=False)],
    broker: BrokerOption = DEFAULT_BROKER,
    *,
    password_file: PasswordOption = None,
    ca_file: CaOption = None,
    cert_file: CertOption = None,
    key_file: KeyOption = None,
    prefix: PrefixOption = "lineward",
    site: Annotated[str, typer.Option(help="Second segment of the topics.")] = "replay",
    box: Annotated[str, typer.Option(help="Third segment of the topics.")] = "box",
    camera: Annotated[str, typer.Option(help="Fourth segment of the topics.")] = "camera",
    mode: Annotated[str, typer.Option(help="stream: anomaly events; triggered: a verdict per frame.")] = "stream",
    recipe: Annotated[str | None, typer.Option(help="Product that it shows; what its router says by default.")] = None,
    fps: Annotated[float | None, typer.Option(help="Pace; as fast as judged by default.")] = None,
    frame_rate: Annotated[float | None, typer.Option(help="Frames per second that the budget counts with.")] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Start again at the end, until --seconds or Ctrl-C.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Stop after this long.")] = None,
    false_events_per_hour: Annotated[float, typer.Option(help="Budget in stream mode.")] = 1.0,
    false_nok_per_1000: Annotated[float, typer.Option(help="Budget in triggered mode.")] = 1.0,
    enter_hits: Annotated[int, typer.Option(help="Frames at or above the threshold that begin an event ...")] = 3,
    enter_window: Annotated[int, typer.Option(help="... among this many.")] = 5,
    leave_calm: Annotated[int, typer.Option(help="Calm frames that end an event.")] = 10,
    engine: Annotated[str | None, typer.Option(help="onnxruntime or openvino.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, bfloat16 or int8.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of the engine, 0 for its own choice.")] = 0,
    state_dir: Annotated[Path | None, typer.Option(help="Folder of the outbox; a temporary one by default.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the broker at the end.")] = 30.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the summary and every frame here.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
) -> None:
    """Judge a folder or video through the whole box and publish what it finds."""
    import json
    import shutil
    import tempfile

    from edge.replay import replay as run_replay
    from edge.replay import replay_source

    folder = Path(tempfile.mkdtemp(prefix="lineward-replay-")) if state_dir is None else state_dir
    try:
        settings = _replay_settings(
            site=site, box=box, state_dir=folder, bundle=bundle, engine=engine, precision=precision, threads=threads,
            broker=broker_settings(
                broker, password_file=password_file, ca_file=ca_file, prefix=prefix, cert_file=cert_file,
                key_file=key_file,
            ),
            cameras=[{
                "name": camera, "source": replay_source(source, fps=fps, loop=loop), "mode": mode,
                "frame_rate": frame_rate,
                "budget": {"false_events_per_hour": false_events_per_hour, "false_nok_per_1000": false_nok_per_1000},
                "events": {"enter_hits": enter_hits, "enter_window": enter_window, "leave_calm": leave_calm},
            }],
        )  # fmt: skip
        _log_to_stderr(verbose=verbose, level=logging.WARNING)
        summary = run_replay(
            settings, seconds=seconds, drain_s=timeout, keep_results=json_file is not None, recipe=recipe
        )
    except LinewardError:
        # The box did not start, so the outbox is empty.
        if state_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if json_file is not None:
        json_file.write_text(json.dumps(summary.as_json(), indent=1) + "\n", encoding="utf-8")
    _print_summary(summary)
    if summary.unsent:
        raise BrokerError(
            f"{summary.unsent} messages were not acknowledged by the broker at {settings.broker.address}; they are "
            f"kept in {folder}: run again with --state-dir {folder} once it can be reached"
        )
    if state_dir is None:
        shutil.rmtree(folder, ignore_errors=True)
    if summary.lost:
        raise OutboxError(f"{summary.lost} messages could not be stored in {folder}; see the notes above")


@app.command()
def key(
    out: Annotated[Path, typer.Option(help="Folder for the two files; made if missing.", show_default=False)],
    *,
    name: Annotated[str, typer.Option(help="First part of the files' names.")] = "box",
    box: Annotated[str, typer.Option(help="<site>/<box> to note in the files.", show_default=False)] = "",
) -> None:
    """Make the keys that a box proves itself with at the aggregator; print the public one."""
    from edge.federation.keys import check_box_name, make_keys, write_keys

    if not name or "/" in name:
        raise UsageError("key: --name is the first part of a file's name, such as box")
    keys = make_keys()
    public, secret = write_keys(out, keys, name=name, box=check_box_name(box) if box else "")
    typer.echo(keys.public)
    typer.echo(f"{secret} stays on this machine; take {public} to the aggregator and enrol it there", err=True)


@app.command()
def command(
    verb: Annotated[str, typer.Argument(help="accept, replay, ship, threshold, recipe, reset, evidence ...")],
    site: Annotated[str, typer.Option(help="Site of the box.", show_default=False)],
    box: Annotated[str, typer.Option(help="Name of the box.", show_default=False)],
    fields: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE of the command; may be repeated.", show_default=False)
    ] = None,
    broker: BrokerOption = DEFAULT_BROKER,
    *,
    password_file: PasswordOption = None,
    ca_file: CaOption = None,
    cert_file: CertOption = None,
    key_file: KeyOption = None,
    prefix: PrefixOption = "lineward",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the broker, then for the box.")] = 10.0,
    key: Annotated[str | None, typer.Option(help="Done once under this key; drawn by default.")] = None,
    expires: Annotated[
        float | None, typer.Option(min=0.1, help="Done within so many seconds or not at all; --timeout by default.")
    ] = None,
) -> None:
    """Ask a running box to do something, and print its answer."""
    import json

    from edge.alerts.commander import Commander

    given: dict[str, Any] = {}
    for field in fields or ():
        name, equals, value = field.partition("=")
        if not name or not equals:
            raise UsageError(f"--set {field}: write it as NAME=VALUE")
        given[name] = None if value == "null" else value
    settings = broker_settings(
        broker, password_file=password_file, ca_file=ca_file, prefix=prefix, cert_file=cert_file, key_file=key_file
    )
    _log_to_stderr(verbose=False, level=logging.ERROR)
    with Commander(settings, site=site, box=box) as commander:
        if expires is None:
            result, judged = commander.ask_fresh(verb, given, key=key, timeout=timeout)
        else:
            result, judged = commander.ask(verb, given, key=key, expires_s=expires, timeout=timeout), True
    if not judged:
        typer.echo(f"note: {site}/{box} has no clock to judge an expiry by; asked without one", err=True)
    if not result.ok:
        raise CommandError(f"{site}/{box} refuses {verb}: {result.reason}")
    typer.echo(f"{site}/{box}: {verb} done, count {result.count}")
    for name, found in result.detail.items():
        for one in found if isinstance(found, list) else [found]:
            typer.echo(f"{name}: {one if isinstance(one, str) else json.dumps(one)}")


@app.command()
def watch(
    broker: BrokerOption = DEFAULT_BROKER,
    *,
    password_file: PasswordOption = None,
    ca_file: CaOption = None,
    cert_file: CertOption = None,
    key_file: KeyOption = None,
    prefix: PrefixOption = "lineward",
    site: Annotated[str, typer.Option(help="Only this site.")] = "+",
    box: Annotated[str, typer.Option(help="Only this box.")] = "+",
    camera: Annotated[str | None, typer.Option(help="Only this camera, signal or station.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also status, states and availability.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line, as published.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after this many messages.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0.0, help="Stop after this many seconds.")] = None,
    connect_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for the broker.")] = 10.0,
) -> None:
    """Print alerts and verdicts as they come, each once."""
    from edge.alerts.line import line_of, sources_of
    from edge.alerts.subscriber import EVENTS, EVERYTHING, Subscriber

    settings = broker_settings(
        broker, password_file=password_file, ca_file=ca_file, prefix=prefix, cert_file=cert_file, key_file=key_file
    )
    # The subscriber's own words on each attempt to connect would stand between the messages.
    _log_to_stderr(verbose=False, level=logging.ERROR)
    deadline = None if timeout is None else time.monotonic() + timeout
    subscriber = Subscriber(settings, site=site, box=box, kinds=EVERYTHING if everything else EVENTS)
    printed = 0
    with contextlib.suppress(KeyboardInterrupt), subscriber:
        _wait_until_ready(subscriber, settings, connect_timeout)
        while count is None or printed < count:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            received = subscriber.receive(left)
            if received is None or (camera is not None and camera not in sources_of(received.message)):
                continue
            printed += 1
            text = received.payload.decode() if as_json else line_of(received.topic, received.message)
            typer.echo(text)
            sys.stdout.flush()


def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _load_verb(entry: importlib.metadata.EntryPoint) -> Any:  # noqa: ANN401 (a typer command)
    """Import a verb of another room: a function, or a typer app whose commands are verbs of the verb.

    Raises:
        MissingExtraError: its room, or something that the room needs, is not installed.
    """
    room = entry.module.split(".")[0]
    extra = EXTRAS.get(entry.name, room)
    missing = f"{entry.name} is not part of this installation ({{}} is missing): pip install 'lineward[{extra}]'"
    try:
        verb = entry.load()
    except ModuleNotFoundError as error:
        raise MissingExtraError(missing.format(error.name)) from error
    if isinstance(verb, typer.Typer):
        _guard_app(verb, missing)
        return typer.main.get_command(verb)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(entry.name)(_guarded(verb, missing))
    return typer.main.get_command(single)


def _guarded(function: Any, missing: str) -> Any:  # noqa: ANN401 (any signature)
    """Turn a module that a verb misses when it is called into a MissingExtraError."""

    @functools.wraps(function)
    def call(*args: Any, **values: Any) -> None:  # noqa: ANN401 (typer's)
        try:
            function(*args, **values)
        except ModuleNotFoundError as error:
            # Verbs import what they need when called. A module of our own that is missing is a defect, not an extra.
            if (error.name or "").split(".")[0] in _ROOMS:
                raise
            raise MissingExtraError(missing.format(error.name)) from error

    return call


def _guard_app(verbs: typer.Typer, missing: str) -> None:
    for command in verbs.registered_commands:
        if not hasattr(command.callback, "__wrapped__"):
            command.callback = _guarded(command.callback, missing)
    for group in verbs.registered_groups:
        if group.typer_instance is not None:
            _guard_app(group.typer_instance, missing)


def _wait_until_ready(subscriber: Subscriber, settings: BrokerSettings, timeout: float) -> None:
    try:
        subscriber.wait_until_ready(timeout)
    except BrokerError as error:
        raise BrokerError(f"{settings.address}: {error}") from error


def _replay_settings(**values: Any) -> BoxSettings:  # noqa: ANN401 (pydantic checks each)
    from pydantic import ValidationError

    from edge.settings import BoxSettings, explain

    try:
        return BoxSettings.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"replay: {explain(error, BoxSettings)}") from error


def _log_to_stderr(*, verbose: bool, level: int = logging.INFO, form: str = "text", **fields: str) -> None:
    from edge.health.logs import LogFormat, configure_logs

    forms = [one.value for one in LogFormat]
    if form not in forms:
        raise UsageError(f"--log-format {form}: choose one of {', '.join(forms)}")
    configure_logs(logging.DEBUG if verbose else level, form=LogFormat(form), fields=fields)


def _print_summary(summary: ReplaySummary) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    latency = summary.latency_ms.get("processing", {})
    rate = summary.frames_per_second
    supported = "supported" if summary.threshold["budget_supported"] else "not supported by so few good scores"
    for name, value in (
        ("frames", f"{summary.frames} ({summary.judged} judged, {summary.not_judged} not)"),
        ("NOK frames", str(summary.nok)),
        ("anomaly events", str(summary.events)),
        ("messages acknowledged", f"{summary.published} ({summary.unsent} waiting, {summary.lost} lost)"),
        ("frames per second", "-" if rate is None else f"{rate:.1f}"),
        ("latency p50 / p99", f"{latency['p50']:.1f} / {latency['p99']:.1f} ms" if latency else "-"),
        ("engine", f"{summary.engine} {summary.precision}"),
        ("threshold", f"{summary.threshold['value']:.6g} ({summary.threshold['method']}; budget {supported})"),
    ):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for warning in summary.warnings:
        typer.echo(f"note: {warning}", err=True)
