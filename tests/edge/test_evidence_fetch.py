"""A client believes nothing that a box says of its files before it has looked."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any, cast

import pytest

from edge.alerts.command_messages import CommandResult, EvidenceCommand
from edge.alerts.message import build
from edge.errors import BrokerError, EvidenceError
from edge.evidence.answers import answer
from edge.evidence.fetch import ATTEMPTS, MAX_FILE_BYTES, EvidenceClient
from edge.evidence.store import CHUNK_BYTES, EvidenceStore

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge.alerts.commander import Commander

REFERENCE = "cam/20300102/00ff"
CONTENT = bytes(range(256)) * 1200


class Box:
    """A box that answers from a store; ``lie`` changes an answer, ``lost`` answers do not come."""

    def __init__(self, root: Path, lie: Callable[[dict[str, Any]], None] = lambda _detail: None) -> None:
        self.lie, self.lost, self.asked = lie, 0, 0
        self._store = EvidenceStore(root, max_bytes=2**24)
        self._store.open()
        entry = {"size": len(CONTENT), "sha256": hashlib.sha256(CONTENT).hexdigest()}
        record = str({"files": {"frame.jpg": entry}}).replace("'", '"').encode()
        self._store.write(REFERENCE, {"frame.jpg": CONTENT, "event.json": record})

    def ask(self, verb: str, fields: dict[str, Any], *, timeout: float) -> CommandResult:
        assert timeout > 0
        self.asked += 1
        if self.lost:
            self.lost -= 1
            raise BrokerError("no answer")
        try:
            said = answer(self._store, build(EvidenceCommand, **fields))
        except EvidenceError as error:
            said = {"ok": False, "reason": str(error)}
        self.lie(said.get("detail", {}))
        return build(CommandResult, site="plant", box="box1", verb=verb, **said)


def client(box: Box) -> EvidenceClient:
    return EvidenceClient(cast("Commander", box), timeout=1.0)


def test_files_come_in_chunks_and_whole(tmp_path: Path) -> None:
    box = Box(tmp_path / "box")
    paths = client(box).fetch(REFERENCE, tmp_path / "got")

    assert [path.name for path in paths] == ["event.json", "frame.jpg"]
    assert paths[1].read_bytes() == CONTENT
    assert sorted(path.name for path in paths[1].parent.iterdir()) == ["event.json", "frame.jpg"]
    assert box.asked == 2 + -(-len(CONTENT) // CHUNK_BYTES)


def test_an_answer_that_is_lost_is_asked_for_again(tmp_path: Path) -> None:
    box = Box(tmp_path / "box")
    box.lost = ATTEMPTS - 1
    assert len(client(box).fetch(REFERENCE, tmp_path / "got")) == 2
    box.lost = ATTEMPTS
    with pytest.raises(BrokerError):
        client(box).fetch(REFERENCE, tmp_path / "got")


def flip(detail: dict[str, Any]) -> None:
    if "data" in detail and detail["file"] == "frame.jpg" and detail["offset"]:
        data = bytearray(base64.b64decode(detail["data"]))
        data[7] ^= 1
        detail["data"] = base64.b64encode(data).decode()


def rename(detail: dict[str, Any]) -> None:
    if "files" in detail:
        detail["files"]["../../evil.jpg"] = detail["files"].pop("frame.jpg")


def swell(detail: dict[str, Any]) -> None:
    if "files" in detail:
        detail["files"]["frame.jpg"]["size"] = MAX_FILE_BYTES + 1


def starve(detail: dict[str, Any]) -> None:
    if "data" in detail:
        detail["data"] = ""


def shift(detail: dict[str, Any]) -> None:
    if "data" in detail:
        detail["offset"] += 1


def garble(detail: dict[str, Any]) -> None:
    if "data" in detail:
        detail["data"] = "no base64!"


def forget(detail: dict[str, Any]) -> None:
    detail.clear()


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (flip, "sha256"), (rename, "no file of evidence"), (swell, "limit"), (starve, "damaged"), (shift, "damaged"),
        (garble, "cannot be read"), (forget, "names no files"),
    ],
)  # fmt: skip
def test_a_lie_is_noticed_and_leaves_no_file(tmp_path: Path, lie: Callable[[dict[str, Any]], None], words: str) -> None:
    with pytest.raises(EvidenceError, match=words):
        client(Box(tmp_path / "box", lie)).fetch(
            REFERENCE, tmp_path / "got", only=() if lie is not flip else ["frame.jpg"]
        )

    assert not [path for path in (tmp_path / "got").rglob("*") if path.is_file()]
    assert not (tmp_path / "evil.jpg").exists()


def test_a_reference_of_a_list_is_looked_at_too(tmp_path: Path) -> None:
    def lie(detail: dict[str, Any]) -> None:
        detail["evidence"][0]["reference"] = "../../etc"

    assert client(Box(tmp_path / "box")).references()[0][0] == REFERENCE
    with pytest.raises(EvidenceError, match="as in an alert"):
        client(Box(tmp_path / "other", lie)).references()


def test_no_question_is_asked_for_a_reference_that_is_none(tmp_path: Path) -> None:
    box = Box(tmp_path / "box")
    with pytest.raises(EvidenceError, match="as in an alert"):
        client(box).fetch("../../etc/passwd", tmp_path)
    with pytest.raises(EvidenceError, match="has no file"):
        client(box).fetch(REFERENCE, tmp_path, only=["map.png"])
    assert box.asked == 1
