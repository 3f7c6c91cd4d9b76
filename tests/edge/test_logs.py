"""Log lines: JSON for collectors, priorities for journald, and no credentials in either."""

from __future__ import annotations

import json
import logging
import os
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.health.logs import JsonFormatter, LogFormat, TextFormatter, configure_logs

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

URL = "rtsp://admin:s3cret@camera-1/stream"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Logs through handlers of its own in place of pytest's; returns the lines."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)

    def write(
        log: Callable[[logging.Logger], None],
        form: LogFormat,
        *,
        level: int = logging.INFO,
        journal: str | None = None,
    ) -> list[str]:
        root = logging.getLogger()
        before = root.handlers, root.level
        with (tmp_path / "log").open("w+", encoding="utf-8") as stream:
            found = os.fstat(stream.fileno())
            if journal is not None:
                monkeypatch.setenv("JOURNAL_STREAM", journal or f"{found.st_dev}:{found.st_ino}")
            root.handlers = []
            try:
                configure_logs(level, form=form, stream=stream, fields={"site": "plant", "box": "box1"})
                log(logging.getLogger("edge.camera"))
            finally:
                root.handlers, root.level = before
            stream.seek(0)
            return stream.read().splitlines()

    return write


def fail(log: logging.Logger) -> None:
    try:
        int(f"{URL} is\naway")
    except ValueError:
        log.exception("camera %s: its worker failed", "cam-1")


def test_json_lines_say_when_what_and_of_which_camera(written: Callable[..., list[str]]) -> None:
    def log(logger: logging.Logger) -> None:
        logger.warning("camera %s: %s", "cam-1", f"cannot open {URL}")
        logger.info("ready", extra={"camera": "cam-2"})
        logger.debug("never")
        fail(logger)

    lines = [json.loads(line) for line in written(log, LogFormat.JSON)]

    assert [(line["level"], line.get("camera")) for line in lines] == [
        ("warning", "cam-1"), ("info", "cam-2"), ("error", "cam-1"),
    ]  # fmt: skip
    assert lines[0]["message"] == "camera cam-1: cannot open rtsp://***@camera-1/stream"
    assert {(line["site"], line["box"], line["logger"]) for line in lines} == {("plant", "box1", "edge.camera")}
    assert "ValueError" in lines[2]["exception"]
    assert "s3cret" not in json.dumps(lines)
    assert lines[0]["ts"].endswith("Z")
    age = datetime.now(timezone.utc) - datetime.fromisoformat(lines[0]["ts"].replace("Z", "+00:00"))
    assert age.total_seconds() < 600


def test_text_lines_hide_credentials_too(written: Callable[..., list[str]]) -> None:
    lines = written(fail, LogFormat.TEXT)

    assert "ERROR edge.camera: camera cam-1: its worker failed" in lines[0]
    assert "s3cret" not in "\n".join(lines)


@pytest.mark.parametrize("form", list(LogFormat))
def test_journald_gets_a_priority_before_every_line(form: LogFormat, written: Callable[..., list[str]]) -> None:
    def log(logger: logging.Logger) -> None:
        logger.debug("one")
        logger.info("two")
        logger.warning("three")
        fail(logger)

    lines = written(log, form, level=logging.DEBUG, journal="")

    assert [line[:3] for line in lines[:4]] == ["<7>", "<6>", "<4>", "<3>"]
    assert {line[:3] for line in lines[3:]} == {"<3>"}
    assert "s3cret" not in "\n".join(lines)


def test_another_streams_journal_changes_nothing(written: Callable[..., list[str]]) -> None:
    lines = written(lambda logger: logger.warning("text"), LogFormat.TEXT, journal="1:2")

    assert "WARNING edge.camera: text" in lines[0]
    assert not lines[0].startswith("<")


@given(st.text(), st.text(min_size=1))
def test_any_message_is_one_json_line(message: str, camera: str) -> None:
    record = logging.LogRecord("edge", logging.INFO, "", 0, "camera %s: %s", (camera, message), None)

    line = JsonFormatter({}).format(record)

    assert "\n" not in line
    assert json.loads(line)["camera"] == camera
    assert TextFormatter("%(message)s").format(record)
