"""A line whose lamp ages, then loses a tube: a box follows, says so, stops where it must, settles when told."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from edge.adaptation.store import ADAPTATION_FILE, AdaptationStore
from edge.alerts.message import CameraState, Notice, Status, VerdictMessage
from edge.cli import app
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle
from tests.end_to_end.test_box import SOON, listening, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edge.alerts.subscriber import Subscriber
    from edge.bundle import Bundle
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
START = datetime(2000, 1, 1, tzinfo=timezone.utc)
PARTS = 20
DEFECT = f"{PARTS - 1:02d}"
# A reset camera has settled after most of a round, a slow change is followed within one. A shorter memory would be of
# the last few parts alone, and of other ones wherever a busy machine leaves frames out.
QUICK = {
    "half_life": 10, "every_frames": 2, "least": 0.01, "settle_frames": 16, "window": 20, "freeze_rate": 0.5,
    "thaw_rate": 0.2, "drift": 2.0, "bound": 12.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", moments=True)


class Line:
    """A folder that a box reads round and round: twenty parts, the last of them defective, under one lamp."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._parts = [good_frame(4000 + index) for index in range(PARTS - 1)] + [defective_frame(4999)]

    def light(self, gain: float) -> None:
        """Have every part lit so from now on."""
        for index, part in enumerate(self._parts):
            lit = np.clip(part.astype(np.float32) * gain, 0, 255).astype(np.uint8)
            coming = self.folder / f".{index:02d}.partial"
            coming.write_bytes(cv2.imencode(".png", lit)[1].tobytes())
            os.replace(coming, self.folder / f"{index:02d}.png")  # noqa: PTH105 (a part is never half there)


@dataclass
class Heard:
    """What a subscriber received, in order."""

    subscriber: Subscriber
    messages: list[Any] = field(default_factory=list)

    def wait_for(self, wanted: Callable[[Any], bool]) -> Any:
        """Return the next message that is as wanted."""
        deadline = time.monotonic() + 2 * SOON
        while True:
            received = self.subscriber.receive(deadline - time.monotonic())
            assert received is not None, f"waited in vain; {[follower(m) for m in self.messages if follower(m)][-1:]}"
            self.messages.append(received.message)
            if wanted(received.message):
                return received.message

    def parts(self, camera: str, *, since: datetime = START, good: bool = True) -> list[VerdictMessage]:
        """Verdicts on judged parts of a camera that are good, or on the one that is not, in their order.

        Not in that of arrival: on a slow machine verdicts come late, and what is urgent before them.
        """
        found = [
            one
            for one in self.messages
            if isinstance(one, VerdictMessage)
            and (one.camera, one.part_id != DEFECT) == (camera, good)
            and one.decision.value != "NOT_JUDGED"
            and one.ts > since
        ]
        return sorted(found, key=lambda one: one.camera_seq)

    def wait_for_parts(self, camera: str, count: int, *, since: datetime = START) -> None:
        """Hear ``count`` more verdicts on parts that were captured after a moment."""
        for _ in range(count):
            self.wait_for(lambda one: isinstance(one, VerdictMessage) and one.camera == camera and one.ts > since)

    def decisions(self, camera: str, *, since: datetime = START, good: bool = True) -> set[str]:
        return {one.decision.value for one in self.parts(camera, since=since, good=good)}


def notice(kind: str, **detail: Any) -> Callable[[Any], bool]:
    return lambda one: (
        isinstance(one, Notice)
        and one.kind == kind
        and all(one.detail[name] == value for name, value in detail.items())
    )


def follower(status: Any) -> dict[str, Any]:
    found = status.detail.get("adaptation", {}).get("cameras", {}) if isinstance(status, Status) else {}
    return dict(found.get("follows", {}))


def command(url: str, verb: str, *fields: str) -> str:
    options = ["--broker", url, "--site", "plant", "--box", "box1", "--timeout", str(SOON)]
    given = [part for one in fields for part in ("--set", one)]
    result = CliRunner().invoke(app, ["command", verb, *options, *given])
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.stdout


@pytest.fixture
def line(tmp_path: Path) -> Line:
    line = Line(tmp_path / "line")
    line.light(1.0)
    return line


def write_config(folder: Path, bundle: Bundle, url: str, line: Line) -> Path:
    source = {"kind": "folder", "path": str(line.folder), "loop": True, "fps": 16}
    cameras = [
        {"name": "follows", "source": source, "mode": "triggered"},
        {"name": "stays", "source": {**source, "fps": 8}, "mode": "triggered", "adaptation": {"enabled": False}},
    ]
    content = {
        "site": "plant", "box": "box1", "state_dir": "state", "bundle": str(bundle.path), "threads": 1,
        "engine": "onnxruntime", "broker": {"url": url, "backoff_max_s": 0.5}, "status_every_s": 0.2,
        "adaptation": QUICK, "cameras": cameras,
    }  # fmt: skip
    path = folder / "box.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_lamp_that_ages_is_followed_and_one_that_breaks_is_settled_by_command(
    tmp_path: Path, mosquitto: Mosquitto, bundle: Bundle, line: Line
) -> None:
    config = write_config(tmp_path, bundle, mosquitto.url, line)
    with listening(mosquitto.url) as subscriber, running(config) as box:
        heard = Heard(subscriber)
        for camera in ("follows", "stays"):
            heard.wait_for_parts(camera, PARTS)
            assert heard.decisions(camera) == {"OK"}
        lamp_ages(heard, line)
        before = tube_fails(heard, line)
        parts_are_declared_good(heard, mosquitto.url)
        # A defect was one in every light.
        assert heard.decisions("follows", good=False) == {"NOK"}
        assert len(heard.parts("follows", good=False)) > 5
        box.send_signal(signal.SIGTERM)
        assert box.wait(SOON) == 0
        heard.wait_for(lambda one: getattr(one, "value", "") == "stopped")
    last = heard.parts("follows")[-1].adaptation

    # After a restart it goes on where it was, and knows what corrected each frame.
    with listening(mosquitto.url) as subscriber, running(config):
        heard = Heard(subscriber)
        first = heard.wait_for(lambda one: isinstance(one, VerdictMessage) and one.camera == "follows" and not one.late)
        heard.wait_for_parts("follows", PARTS, since=first.ts)
        assert heard.decisions("follows", since=first.ts) == {"OK"}
        assert first.adaptation.threshold == last.threshold
        # Not a thousand on, as after a kill: it was shut down in order. Some verdicts were never heard.
        assert last.moments <= first.adaptation.moments < last.moments + 1000
    store = AdaptationStore(tmp_path / "state" / ADAPTATION_FILE)
    bright, dark = (store.moments("follows", version) for version in (before, last.moments))
    store.close()
    assert bright is not None
    assert dark is not None
    assert (dark.mean["image"] < bright.mean["image"] * 0.9).all()


def lamp_ages(heard: Heard, line: Line) -> None:
    """By a seventh: one camera follows without an alarm, the other one, of the same parts, alarms on all of them."""
    for percent in range(99, 84, -1):
        line.light(percent / 100)
        heard.wait_for_parts("follows", 12)
    aged = heard.wait_for(lambda one: follower(one).get("drifting")).ts
    heard.wait_for_parts("follows", PARTS, since=aged)
    heard.wait_for_parts("stays", PARTS, since=aged)
    assert heard.decisions("follows") == {"OK"}
    assert heard.decisions("stays", since=aged) == {"NOK"}
    versions = [one.adaptation.moments for one in heard.parts("follows")]
    assert versions == sorted(versions)
    assert versions[-1] > versions[0] + 5
    assert {one.adaptation.moments for one in heard.parts("stays")} == {0}
    status = heard.wait_for(lambda one: follower(one).get("phase") == "following")
    assert follower(status)["shift"] > QUICK["drift"]
    shown = {name: one["moments_version"] for name, one in status.cameras.items()}
    assert shown["follows"] > 0
    assert shown["stays"] == 0
    assert {one["threshold_version"] for one in status.cameras.values()} == {0}
    assert any(text.startswith("follows: what it shows is") for text in status.warnings)
    told = [one for one in heard.messages if notice("adaptation.drift")(one)]
    (drift,) = told or [heard.wait_for(notice("adaptation.drift"))]
    assert (drift.detail["camera"], drift.detail["lasting"], drift.severity.value) == ("follows", True, "warning")


def tube_fails(heard: Heard, line: Line) -> int:
    """That is no slow change, so it alarms, and nothing is learned; returns the version of the moments."""
    line.light(0.7)
    frozen = heard.wait_for(notice("adaptation.frozen"))
    assert frozen.detail["alarm_rate"] >= QUICK["freeze_rate"]
    assert frozen.severity.value == "alarm"
    heard.wait_for_parts("follows", PARTS, since=frozen.ts)
    shown = heard.parts("follows", since=frozen.ts)
    assert {one.decision.value for one in shown} == {"NOK"}
    assert {one.adaptation.moments for one in shown} == {frozen.detail["moments_version"]}
    return int(frozen.detail["moments_version"])


def parts_are_declared_good(heard: Heard, url: str) -> None:
    """By somebody who sees them: the camera settles, and judges as before."""
    assert "reset done, count 1" in command(url, "reset", "camera=follows")
    told = heard.wait_for(notice("adaptation.reset", camera="follows"))
    assert told.detail["phase_before"] == "frozen"
    settled = heard.wait_for(lambda one: follower(one).get("phase") == "following").ts
    # Sixteen parts, the defective one among them or not, are a rough mean; a round later it has come nearer.
    heard.wait_for_parts("follows", PARTS, since=settled)
    settled = heard.parts("follows", since=settled)[-1].ts
    heard.wait_for_parts("follows", PARTS, since=settled)
    heard.wait_for_parts("stays", PARTS, since=settled)
    assert heard.decisions("follows", since=settled) == {"OK"}
    assert heard.decisions("stays", since=settled) == {"NOK"}
    assert "recipe done, count 1" in command(url, "recipe", "recipe=blue")
    heard.wait_for(lambda one: follower(one).get("recipe") == "blue")
    heard.wait_for(lambda one: follower(one).get("phase") == "following")
    state = heard.wait_for(lambda one: isinstance(one, CameraState) and one.camera == "follows" and one.adaptation)
    assert state.adaptation.moments > told.detail["moments_version"]
