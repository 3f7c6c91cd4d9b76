"""One picture of an alert: the frame as the camera saw it, and the anomaly map over it.

It must not know where alerts come from.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING

import cv2
import numpy as np

from deploy.heatmap import heatmap_overlay
from edge.errors import DataError
from edge.frames import Frame
from edge.inference.detector import Detector
from trainer.data.images import load_image

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edge.alerts.message import Alert
    from edge.bundle import Bundle

_GAP = 8
_BACKGROUND_FRAMES = 16


def write_alert_picture(bundle: Bundle, frames: Sequence[Path], alert: Alert, path: Path) -> None:
    """Write the frame of an alert beside its heat map, with the regions above the threshold outlined.

    Args:
        bundle: that judged.
        frames: images in the order in which the box saw them; the first 16 give the background of the colours.
        alert: one with a threshold; its ``camera_seq`` is the index of its frame.
        path: JPEG or PNG file to write.

    Raises:
        DataError: a frame is damaged or the file cannot be written.
    """
    detector = Detector.open(bundle)
    now = datetime.now(timezone.utc)

    def anomaly_map(index: int) -> np.ndarray:
        frame = Frame(load_image(frames[index]), alert.camera, index, captured_ns=0, captured_at=now)
        return detector.predict(frame).anomaly_map

    low = float(np.median([np.median(anomaly_map(index)) for index in range(min(_BACKGROUND_FRAMES, len(frames)))]))
    threshold = low if alert.threshold is None else alert.threshold
    image = load_image(frames[alert.camera_seq])
    overlay = heatmap_overlay(
        image,
        anomaly_map(alert.camera_seq),
        low=low,
        high=threshold + max((threshold - low) / 2, 1e-6),
        threshold=alert.threshold,
        crop=bundle.manifest.preprocessing.crop,
    )
    gap = np.full((len(image), _GAP, 3), 255, np.uint8)
    if not cv2.imwrite(str(path), np.hstack([image, gap, overlay])):
        raise DataError(f"{path}: cannot be written; free space or choose another folder")
