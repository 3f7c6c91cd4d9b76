"""A box whose cameras look at different products: every message names the product, bundle and memory that judged."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import cv2
import pytest

from edge.alerts.message import Alert, Status
from edge.alerts.settings import BrokerSettings
from edge.alerts.subscriber import EVERYTHING, Subscriber
from edge.box import Box
from edge.settings import BoxSettings
from tests.edge.tiny_bundle import defective_frame, make_tiny_bundle

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mosquitto_process import Mosquitto

pytestmark = pytest.mark.broker
SOON = 30.0


def test_cameras_of_two_products_each_name_their_own(tmp_path: Path, mosquitto: Mosquitto) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for index in range(6):
        cv2.imwrite(str(images / f"{index}.png"), defective_frame(index))
    screws, lids = (make_tiny_bundle(tmp_path / name, product=name) for name in ("screws", "lids"))
    source = {"kind": "folder", "path": str(images)}
    settings = BoxSettings.model_validate(
        {
            "site": "plant", "box": "box1", "state_dir": tmp_path / "state", "bundle": screws.path, "threads": 1,
            "broker": {"url": mosquitto.url},
            "cameras": [
                {"name": "left", "source": source}, {"name": "right", "source": source, "bundle": str(lids.path)},
            ],
        }
    )  # fmt: skip
    with Subscriber(BrokerSettings(url=mosquitto.url), kinds=EVERYTHING) as subscriber:
        subscriber.wait_until_ready(SOON)
        assert Box(settings).run(drain_s=SOON)
        alerts: dict[str, Alert] = {}
        status: Status | None = None
        deadline = time.monotonic() + SOON
        while len(alerts) < 2 or status is None or not judged_all(status):
            received = subscriber.receive(deadline - time.monotonic())
            assert received is not None, (alerts, status)
            if isinstance(received.message, Alert):
                alerts[received.message.camera] = received.message
            elif isinstance(received.message, Status):
                status = received.message
    for camera, bundle in (("left", screws), ("right", lids)):
        assert alerts[camera].product == bundle.manifest.product
        assert alerts[camera].bundle.id == bundle.id
        shown: Any = status.cameras[camera]
        assert (shown["product"], shown["bundle"]["id"]) == (bundle.manifest.product, bundle.id)
        assert shown["memory_version"] == 0
    assert status.product == "screws"
    engine: Any = status.detail["engine"]
    assert [one["product"] for one in engine["bundles"]] == ["screws", "lids"]
    assert {(one["engine"], one["accelerator"]) for one in engine["bundles"]} == {("openvino", "cpu")}


def judged_all(status: Status) -> bool:
    cameras: Any = status.cameras
    return bool(cameras) and all(camera["counters"]["judged"] == 6 for camera in cameras.values())
