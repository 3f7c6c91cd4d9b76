"""Settings and stations for tests of triggered cameras, without a box around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edge.inspection.inspection import Inspection
from edge.settings import BoxSettings

if TYPE_CHECKING:
    from edge.health.metrics import Metrics


def box_settings(cameras: list[dict[str, Any]], **box: Any) -> BoxSettings:
    """Settings of a box whose bundle, folders and broker nobody opens."""
    return BoxSettings.model_validate(
        {
            "site": "plant", "box": "box1", "state_dir": "/nowhere", "bundle": "/nowhere",
            "broker": {"url": "mqtt://localhost:1"}, "cameras": cameras, **box,
        }
    )  # fmt: skip


def inspect(settings: BoxSettings, *, reporter: Any, metrics: Metrics) -> Inspection:
    """The stations of a box, begun; stop them when the test is over."""
    inspection = Inspection(settings, reporter=reporter, publisher=None, metrics=metrics)
    inspection.start()
    return inspection
