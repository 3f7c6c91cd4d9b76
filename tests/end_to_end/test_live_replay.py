"""A box as a process of its own, seen only through the broker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import pytest
import yaml

from deploy.embedded_broker import EmbeddedBroker
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle
from trainer.evaluation.live import BoxFailedError, replay

if TYPE_CHECKING:
    from pathlib import Path

    from edge.alerts.message import Alert


def write_line(folder: Path, broker: str, **changes: Any) -> Path:
    """Write a stream of 14 frames with a defect on frames 5 to 9, a bundle and the settings of a box."""
    make_tiny_bundle(folder / "bundle")
    (folder / "stream").mkdir()
    for index in range(14):
        image = defective_frame(index) if 5 <= index <= 9 else good_frame(index)
        cv2.imwrite(str(folder / "stream" / f"{index:03d}.png"), image)
    settings = {
        "site": "s",
        "box": "b",
        "bundle": "bundle",
        "state_dir": "state",
        "broker": {"url": broker},
        "cameras": [
            {
                "name": "cam-1",
                "source": {"kind": "folder", "path": "stream"},
                "budget": {"false_events_per_hour": 1500},
                "events": {"enter_hits": 2, "enter_window": 3, "leave_calm": 2, "leave_quantile": 0.999},
            }
        ],
        **changes,
    }
    (folder / "box.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder / "box.yaml"


def test_alerts_of_a_box_arrive_with_their_phases_and_a_last_status(tmp_path: Path) -> None:
    shown: list[Alert] = []
    with EmbeddedBroker() as broker:
        config = write_line(tmp_path, broker.url)

        result = replay(config, broker=broker.url, log=tmp_path / "log", on_alert=shown.append, timeout=60)

    (event,) = result.events(13)
    assert (event.first, event.last) == (6, 11)  # the second hit begins it, the second calm frame ends it
    assert [alert.phase.value for alert in shown] == ["new", "end"]
    assert result.alerts == shown
    assert result.status is not None
    assert result.status.latency_ms["total"]["p99"] > 0
    assert (result.latency_ms() > 0).all()


def test_box_that_cannot_start_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        config = write_line(tmp_path, broker.url, bundle="elsewhere")

        with pytest.raises(BoxFailedError, match=r"code 3: lineward: .*elsewhere"):
            replay(config, broker=broker.url, log=tmp_path / "log", on_alert=lambda _: None, timeout=60)


def test_box_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    with EmbeddedBroker() as broker:
        config = write_line(tmp_path, broker.url)
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        settings["cameras"][0]["source"]["loop"] = True
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")

        with pytest.raises(BoxFailedError, match="did not come to an end within 2 s"):
            replay(config, broker=broker.url, log=tmp_path / "log", on_alert=lambda _: None, timeout=2)
