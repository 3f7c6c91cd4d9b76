"""Submitting runs: what fails under Flower must not look as if it had succeeded."""

from __future__ import annotations

import json
import stat
import time

import pytest

from deploy.flower.submit import APP, RunFailedError, main, submit
from edge.errors import SettingsError

SCRIPT = """#!/bin/sh
case "$1" in
  run) echo "Using SuperLink: here"; echo '{run}' ; printf '%s\\n' "$*" "$FLWR_TELEMETRY_ENABLED" >> {seen} ;;
  log) echo "the log of $2" ; exit {log} ;;
  list) test -e {seen}.once && echo '{state}' || {{ touch {seen}.once; echo '{first}' ; }} ;;
esac
"""


@pytest.fixture
def flwr(tmp_path, monkeypatch):
    """A program that answers like ``flwr``; FLWR_HOME is set."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)

    def make(*, run='{"success": true, "run-id": "7"}', status="finished:completed", details="", log=0, first=""):
        state, before = (
            json.dumps({"success": True, "runs": [{"run-id": "7", "status": said, "status-details": details}]})
            for said in (status, first or status)
        )
        program = tmp_path / "flwr"
        program.write_text(SCRIPT.format(run=run, state=state, first=before, log=log, seen=tmp_path / "seen"))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return str(program)

    return make


def test_complete_run_gives_its_number(flwr, tmp_path):
    assert submit(tmp_path / "a b.yaml", options={"rounds": 2}, superlink="plant", flwr=flwr()) == "7"

    words, telemetry = (tmp_path / "seen").read_text().splitlines()
    assert words == f'run {APP} plant --run-config settings="{tmp_path}/a b.yaml" rounds=2 --format json'
    assert telemetry == "0"


@pytest.mark.parametrize("log", [0, 1])
def test_failed_run_is_an_error_whatever_the_log_says(flwr, tmp_path, log):
    program = flwr(status="finished:failed", details="No heartbeat received from the task", log=log)

    with pytest.raises(RunFailedError, match=r"finished:failed \(No heartbeat.*submit it again"):
        submit(tmp_path / "a.yaml", options={}, flwr=program)


@pytest.mark.parametrize("state", ["pending", "starting", "running"])
def test_log_that_breaks_off_does_not_end_the_wait(flwr, tmp_path, monkeypatch, state):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)

    assert submit(tmp_path / "a.yaml", options={}, flwr=flwr(first=state, log=1)) == "7"
    assert len(slept) == 1


@pytest.mark.parametrize("run", ['{"success": false, "error-message": "no connection"}', "no connection", "{broken"])
def test_run_that_is_not_taken_is_an_error(flwr, tmp_path, run):
    with pytest.raises(RunFailedError, match=r"no connection|broken"):
        submit(tmp_path / "a.yaml", options={}, flwr=flwr(run=run))


def test_missing_program_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    with pytest.raises(RunFailedError, match="extra flower"):
        submit(tmp_path / "a.yaml", options={}, flwr=str(tmp_path / "missing"))


def test_home_must_be_named(tmp_path, monkeypatch):
    monkeypatch.delenv("FLWR_HOME", raising=False)
    with pytest.raises(SettingsError, match="FLWR_HOME"):
        submit(tmp_path / "a.yaml", options={})


def test_command_says_in_its_exit_code_whether_the_run_is_complete(flwr, tmp_path, capsys):
    flwr()
    assert main(["--settings", str(tmp_path / "a.yaml")]) == 0
    flwr(status="finished:failed")
    assert main(["--settings", str(tmp_path / "a.yaml")]) == 3
    assert "finished:failed" in capsys.readouterr().err


def test_app_that_is_submitted_holds_no_code():
    assert [path.name for path in APP.iterdir()] == ["pyproject.toml"]
