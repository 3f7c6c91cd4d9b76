"""A box keeps pictures of what it alerts of, and a client fetches them over a real broker."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import pytest
import yaml

from edge.alerts.commander import Commander
from edge.alerts.message import Alert, VerdictMessage
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import Subscriber
from edge.errors import EvidenceError
from edge.evidence.fetch import EvidenceClient
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edge.bundle import Bundle
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 30.0
LINEWARD = str(Path(sys.executable).parent / "lineward")
SIDE = 480


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good frames, then defective ones; noise makes each picture take more than one chunk of an answer."""
    folder = tmp_path_factory.mktemp("images")
    for index in range(12):
        make = defective_frame if index >= 6 else good_frame
        cv2.imwrite(str(folder / f"{index:03d}.png"), make(3000 + index, height=SIDE, width=SIDE))
    return folder


@pytest.fixture
def configure(tmp_path: Path, bundle: Bundle, images: Path) -> Callable[..., Path]:
    def write(url: str, **camera: Any) -> Path:
        source = {"kind": "folder", "path": str(images), "loop": True, "fps": 10}
        settings = {
            "site": "plant", "box": "box1", "state_dir": "state", "bundle": str(bundle.path), "threads": 1,
            "engine": "onnxruntime", "broker": {"url": url, "backoff_max_s": 0.5},
            "evidence": {"quality": 100, "min_free_mb": 0},
            "cameras": [{
                "name": "line 1", "source": source,
                "events": {"enter_hits": 1, "enter_window": 1, "leave_calm": 3}, **camera,
            }],
        }  # fmt: skip
        path = tmp_path / "box.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@contextlib.contextmanager
def running(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (config.parent / "box.log").open("wb") as log:
        process = subprocess.Popen([LINEWARD, "run", "--config", str(config)], stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@contextlib.contextmanager
def asking(url: str) -> Iterator[EvidenceClient]:
    with Commander(BrokerSettings(url=url), site="plant", box="box1") as commander:
        yield EvidenceClient(commander, timeout=SOON)


def collect(url: str, config: Path, until: Callable[[list[Any]], bool]) -> list[Any]:
    """What a subscriber sees of a box that runs until the condition holds, and a little longer."""
    messages: list[Any] = []
    with Subscriber(BrokerSettings(url=url)) as subscriber:
        subscriber.wait_until_ready(SOON)
        deadline = time.monotonic() + SOON
        while not until(messages):
            received = subscriber.receive(deadline - time.monotonic())
            log = (config.parent / "box.log").read_text()
            assert received is not None, f"waited in vain; received {messages}; the box says {log}"
            messages.append(received.message)
    return messages


def phases(messages: list[Any]) -> list[str]:
    return [message.phase.value for message in messages if isinstance(message, Alert)]


def fetched(client: EvidenceClient, reference: str, folder: Path) -> list[Path]:
    """Fetch once it is written: an alert leaves before the frames after it are there."""
    deadline = time.monotonic() + SOON
    while reference not in [kept for kept, _ in client.references(limit=500)]:
        assert time.monotonic() < deadline
        time.sleep(0.05)  # another process's disk: nothing to await
    return client.fetch(reference, folder)


def test_an_alerts_evidence_is_fetched(
    mosquitto: Mosquitto, configure: Callable[..., Path], tmp_path: Path, bundle: Bundle
) -> None:
    config = configure(mosquitto.url)
    with running(config), asking(mosquitto.url) as client:
        alerts = collect(
            mosquitto.url, config, lambda found: phases(found).count("end") >= 1 and "new" in phases(found)
        )
        # A subscriber may have come in the midst of an event.
        first = next(alert for alert in alerts if alert.phase.value == "new")
        assert first.evidence is not None
        assert first.evidence.endswith(first.event_id)
        assert {alert.evidence for alert in alerts if alert.event_id == first.event_id} == {first.evidence}
        paths = fetched(client, first.evidence, tmp_path / "got")
        assert first.evidence in [reference for reference, _ in client.references(camera="line 1")]
        assert client.references(camera="other") == []
        with pytest.raises(EvidenceError, match="not kept"):
            client.fetch("line%201/20300102/00", tmp_path / "got")

    kept = {path.name: path.read_bytes() for path in paths}
    written = {path.name: path.read_bytes() for path in (tmp_path / "state" / "evidence" / first.evidence).iterdir()}
    assert kept == written
    assert paths[0].parent == tmp_path / "got" / first.evidence
    record = json.loads(kept["event.json"])
    assert record["event_id"] == first.event_id
    assert record["camera_seq"] == first.camera_seq
    assert record["bundle"]["id"] == bundle.id
    assert record["score"] == pytest.approx(first.score)
    assert max(map(len, kept.values())) > 131_072  # one answer does not hold it
    assert cv2.imread(str(tmp_path / "got" / first.evidence / "frame.jpg")).shape == (SIDE, SIDE, 3)


def test_a_bad_parts_evidence_is_fetched_by_command(
    mosquitto: Mosquitto, configure: Callable[..., Path], tmp_path: Path
) -> None:
    config = configure(mosquitto.url, mode="triggered")
    common = ["--site", "plant", "--box", "box1", "--broker", mosquitto.url, "--timeout", str(SOON)]
    with running(config), asking(mosquitto.url) as client:
        decided = collect(
            mosquitto.url,
            config,
            lambda found: {"OK", "NOK"} <= {m.decision.value for m in found if isinstance(m, VerdictMessage)},
        )
        bad = next(m for m in decided if m.decision.value == "NOK")
        assert all(m.evidence is None for m in decided if m.decision.value == "OK")
        fetched(client, bad.evidence, tmp_path / "first")
        listed = lineward("list", *common)
        got = lineward("get", bad.evidence, *common, "--out", str(tmp_path / "got"), "--file", "overlay.jpg")
        missing = lineward("get", bad.evidence, *common, "--file", "other.jpg")
        elsewhere = lineward("get", "../../etc/passwd", *common)

    assert bad.evidence in listed.stdout
    assert got.stdout.split() == [str(tmp_path / "got" / bad.evidence / "overlay.jpg")]
    assert (missing.returncode, "has no file 'other.jpg'" in missing.stderr) == (3, True)
    assert (elsewhere.returncode, "write it as in an alert" in elsewhere.stderr) == (3, True)


def lineward(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LINEWARD, "evidence", *arguments], capture_output=True, text=True, timeout=2 * SOON, check=False
    )
