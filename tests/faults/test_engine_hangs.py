"""A box whose engine hangs ends by itself, with a notice that its successor still sends."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING

import cv2
import pytest
import yaml

from edge.inference.stall_guard import STALLED_EXIT_CODE
from tests.edge.tiny_bundle import good_frame, make_tiny_bundle
from tests.faults import hanging_box

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE_S = 60.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(hanging_box.AT + 10):
        cv2.imwrite(str(folder / f"{index:03d}.png"), good_frame(index))
    path = tmp_path / "box.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "site": "plant", "box": "box1", "state_dir": "state", "engine": "onnxruntime", "engine_stall_s": 1.0,
                "bundle": str(make_tiny_bundle(tmp_path / "bundle").path), "threads": 1,
                "broker": {"url": "mqtt://127.0.0.1:9"},
                "cameras": [{"name": "cam", "source": {"kind": "folder", "path": str(folder)}}],
            }
        )
    )  # fmt: skip
    return path


def run(config: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, hanging_box.__file__, str(config), *words]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)


def notices(config: Path) -> list[str]:
    with sqlite3.connect(config.parent / "state" / "outbox.db") as database:
        rows = database.execute("SELECT payload FROM rows WHERE topic LIKE '%/notice'").fetchall()
    return [json.loads(payload)["kind"] for (payload,) in rows]


@pytest.mark.parametrize("fault", [("hang",), ("later", "30")])
def test_hanging_engine_ends_the_box_with_code_70_and_a_notice(config: Path, fault: tuple[str, ...]) -> None:
    ended = run(config, *fault)
    assert ended.returncode == STALLED_EXIT_CODE, ended.stderr
    assert "the engine has not come back for" in ended.stderr
    assert notices(config) == ["engine.stalled"]


def test_first_call_of_a_graph_longer_than_the_limit_is_no_hang(config: Path) -> None:
    ended = run(config, "first", "3")
    assert ended.returncode == 0, ended.stderr
    assert "engine.stalled" not in notices(config)
