"""The command line: its own verbs, other rooms' verbs by name, exit codes and one-line errors."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from edge import cli
from edge.errors import GateError, LinewardError, UsageError

LINEWARD = [str(Path(sys.executable).parent / "lineward")]
OTHER_ROOMS = [entry.name for entry in importlib.metadata.entry_points(group=cli.ENTRY_POINTS)]


class Command:
    """Runs `lineward` in this process and keeps what it said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr."""
        self._monkeypatch.setattr(sys, "argv", ["lineward", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(exited.value.code or 0), out, err

    def refused(self, code: int, *arguments: object) -> str:
        """The command must give one line on stderr and this exit code; return the line."""
        found, _, err = self(*arguments)
        assert (found, len(err.strip().splitlines())) == (code, 1), err
        return err.strip()


@pytest.fixture
def lineward(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def entry(monkeypatch: pytest.MonkeyPatch, value: str, *, name: str = "verb") -> None:
    found = importlib.metadata.EntryPoint(name=name, value=value, group=cli.ENTRY_POINTS)
    monkeypatch.setattr(cli, "_entry_points", lambda: {name: found})


def test_version_is_the_distributions() -> None:
    result = subprocess.run([*LINEWARD, "--version"], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout == f"lineward {importlib.metadata.version('lineward')}\n"


def test_help_lists_every_verb_and_imports_no_other_room() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from edge import cli\n"
        "result = CliRunner().invoke(cli.app, ['--help']); print(result.output)\n"
        "print('HEAVY', [m for m in ('trainer', 'deploy', 'torch', 'onnx', 'cv2', 'openvino') if m in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    for verb in ("run", "replay", "watch", *OTHER_ROOMS):
        assert f" {verb} " in result.stdout
    assert "HEAVY []" in result.stdout


def test_every_other_verb_has_a_help_line() -> None:
    assert set(OTHER_ROOMS) <= set(cli.VERB_HELP)


def test_watching_loads_no_engine() -> None:
    script = (
        "import sys; from edge.alerts import subscriber; from edge import cli\n"
        "print([m for m in ('cv2', 'openvino', 'onnxruntime') if m in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout.strip() == "[]"


def test_verb_of_another_room_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    def greet(name: Annotated[str, typer.Option()], times: Annotated[int, typer.Option()] = 1) -> None:
        """Greet."""
        typer.echo(f"hello {name} " * times)

    room = types.ModuleType("other_room")
    room.greet = greet  # type: ignore[attr-defined]  # a module made for this test
    monkeypatch.setitem(sys.modules, "other_room", room)
    entry(monkeypatch, "other_room:greet")

    result = CliRunner().invoke(cli.app, ["verb", "--name", "line", "--times", "2"])

    assert result.exit_code == 0, result.output
    assert result.output.strip() == "hello line hello line"
    assert CliRunner().invoke(cli.app, ["verb"]).exit_code == 2


@pytest.mark.parametrize(("name", "extra"), [("verb", "no_such_room"), ("demo", "demo")])
def test_missing_room_names_its_extra(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch, "no_such_room.cli:verb", name=name)

    result = CliRunner().invoke(cli.app, [name])

    assert isinstance(result.exception, UsageError)
    assert f"pip install 'lineward[{extra}]'" in str(result.exception)


@pytest.mark.parametrize(("error", "code"), [(LinewardError("a\nb"), 3), (UsageError("a b"), 2), (GateError("a b"), 4)])
def test_error_is_one_line_and_its_exit_code(
    error: LinewardError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as exited:
        cli.main()

    assert exited.value.code == code
    assert capsys.readouterr().err == "lineward: a b\n"


def test_unknown_verb_and_option_are_usage_errors(lineward: Command) -> None:
    assert lineward("fly")[0] == 2
    assert lineward("run", "--confg", "x")[0] == 2
    assert lineward("replay")[0] == 2


def test_run_without_a_file_says_what_to_give(lineward: Command) -> None:
    assert "--config FILE" in lineward.refused(2, "run")


def test_run_with_a_missing_file_names_it(lineward: Command, tmp_path: Path) -> None:
    assert str(tmp_path / "box.yaml") in lineward.refused(3, "run", "--config", tmp_path / "box.yaml")


def test_run_with_a_missing_bundle_leaves_no_state(lineward: Command, tmp_path: Path) -> None:
    config = tmp_path / "box.yaml"
    config.write_text(
        "site: s\nbox: b\nstate_dir: state\nbundle: none\ncameras: [{name: c, source: {kind: folder, path: in}}]\n"
    )

    assert "none: no such folder" in lineward.refused(3, "run", "--config", config)
    assert not (tmp_path / "state").exists()
    assert "1 camera(s)" in lineward("run", "--config", config, "--check")[1]


def test_run_prints_the_schema(lineward: Command) -> None:
    code, out, _ = lineward("run", "--print-schema")

    assert code == 0
    assert json.loads(out)["title"] == "BoxSettings"


def test_replay_of_a_missing_source_is_refused(lineward: Command, tmp_path: Path) -> None:
    message = lineward.refused(3, "replay", "--bundle", tmp_path, "--source", tmp_path / "none")

    assert "no such folder or video" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mode", "both"), "mode"),
        (("--engine", "tensorflow"), "engine"),
        (("--enter-hits", "9"), "enter_hits must not exceed"),
        (("--false-events-per-hour", "0"), "false_events_per_hour"),
        (("--site", "a/b"), "site"),
    ],
)
def test_replay_names_a_bad_option(lineward: Command, arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    assert words in lineward.refused(2, "replay", "--bundle", tmp_path, "--source", tmp_path, *arguments)


def test_broker_address_with_a_password_is_refused_without_showing_it(lineward: Command) -> None:
    message = lineward.refused(3, "watch", "--broker", "mqtt://user:s3cret@host")

    assert "password_file" in message
    assert "s3cret" not in message


def test_watch_without_a_broker_says_so(lineward: Command) -> None:
    assert "127.0.0.1:1" in lineward.refused(3, "watch", "--broker", "mqtt://127.0.0.1:1", "--connect-timeout", "0.3")
