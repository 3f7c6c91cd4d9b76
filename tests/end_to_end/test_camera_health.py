"""A box that watches its cameras: what is told of a frozen or dark one, and what is not judged because of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

from edge.alerts.message import Notice, Status, VerdictMessage
from tests.edge.tiny_bundle import good_frame, make_tiny_bundle
from tests.end_to_end.test_threshold_command import Plant, wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from edge.bundle import Bundle
    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
QUICK = {"looks_per_second": 30, "frozen_s": 0.5, "enter_s": 0.3, "leave_s": 0.3, "baseline_frames": 20}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")


def plant(mosquitto: Mosquitto, tmp_path: Path, bundle: Bundle, frames: list[np.ndarray], **health: Any) -> Plant:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{index:03d}.png"), frame)
    made = Plant(mosquitto.url, tmp_path, bundle, folder)
    made.camera |= {"mode": "stream", "frame_rate": 40, "health": {**QUICK, **health}}
    return made


def told(kind: str, *, lasting: bool) -> Any:
    return lambda m: isinstance(m, Notice) and m.kind == kind and m.detail["lasting"] is lasting


def test_same_picture_again_and_again_is_told_and_shown(mosquitto: Mosquitto, tmp_path: Path, bundle: Bundle) -> None:
    one = plant(mosquitto, tmp_path, bundle, [good_frame(0)])
    with one.listening() as heard, one.running() as box:
        notice = wait_for(heard, told("camera.frozen", lasting=True))
        assert notice.severity.value == "warning"
        assert notice.detail["camera"] == "cam"
        status = wait_for(heard, lambda m: isinstance(m, Status) and any("camera frozen" in w for w in m.warnings))
        assert status.cameras["cam"]["health"]["faults"] == ["frozen"]
        # No verdict has changed for it.
        (worker,) = box.cameras
        assert worker.status()["counters"]["not_judged"] == 0


def test_fault_that_vetoes_is_seen_in_state_and_verdicts(mosquitto: Mosquitto, tmp_path: Path, bundle: Bundle) -> None:
    one = plant(mosquitto, tmp_path, bundle, [good_frame(0)], not_judged_when=["frozen"])
    with one.listening() as heard, one.running():
        state = wait_for(heard, lambda m: getattr(m, "reason", "") == "camera frozen")
        assert state.state == "not_judged"


def test_part_that_shows_a_fault_is_the_first_that_is_not_judged(
    mosquitto: Mosquitto, tmp_path: Path, bundle: Bundle
) -> None:
    dark = (good_frame(99) // 16).astype(np.uint8)
    frames = [*(good_frame(index) for index in range(5)), dark, dark, good_frame(9)]
    one = plant(mosquitto, tmp_path, bundle, frames, not_judged_when=["dark"], enter_s=0, leave_s=0, checks=["dark"])
    one.camera |= {"mode": "triggered"}
    one.camera["source"] |= {"loop": False, "fps": 20}
    with one.listening() as heard, one.running():
        wait_for(heard, lambda m: isinstance(m, VerdictMessage) and m.part_id == "007")
        verdicts = {m.part_id: m for m in heard.messages if isinstance(m, VerdictMessage)}
    assert [name for name, m in sorted(verdicts.items()) if m.decision.value == "NOT_JUDGED"] == ["005", "006"]
    assert verdicts["005"].reason == "camera dark"


def test_baseline_is_learnt_once_and_kept_over_a_restart(mosquitto: Mosquitto, tmp_path: Path, bundle: Bundle) -> None:
    one = plant(mosquitto, tmp_path, bundle, [good_frame(index) for index in range(40)])
    learnt = lambda m: isinstance(m, Status) and (m.cameras["cam"].get("health") or {}).get("baseline") == "learnt"  # noqa: E731
    with one.listening() as heard, one.running():
        first = wait_for(heard, learnt).cameras["cam"]["health"]["normal"]
        kept = tmp_path / "state" / "health" / "cam.npz"
        wait_for(heard, lambda _: kept.exists())
    with one.listening() as heard, one.running() as box:
        wait_for(heard, lambda _: any(worker.status()["health"]["looks"] for worker in box.cameras))
        (worker,) = box.cameras
        health = worker.status()["health"]
        assert (health["normal"], health["baseline"]) == (first, "learnt")
        assert health["looks"] < 20
    kept.write_bytes(b"PK damaged")
    with one.listening() as heard, one.running():
        notice = wait_for(heard, lambda m: isinstance(m, Notice) and m.kind == "camera.baseline")
        assert "learnt anew" in notice.text
