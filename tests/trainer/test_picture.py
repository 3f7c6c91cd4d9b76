from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from edge.errors import DataError
from tests.edge.tiny_bundle import defective_frame, good_frame, make_tiny_bundle
from tests.trainer.test_demo import alert
from trainer.evaluation.picture import write_alert_picture

if TYPE_CHECKING:
    from pathlib import Path


def frames(folder: Path) -> list[Path]:
    for index, image in enumerate([good_frame(0), good_frame(1), defective_frame(2)]):
        cv2.imwrite(str(folder / f"{index}.png"), image)
    return sorted(folder.glob("*.png"))


def test_picture_shows_the_frame_and_heat_where_the_defect_is(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    paths = frames(tmp_path)

    write_alert_picture(bundle, paths, alert(camera_seq=2, threshold=3.0), tmp_path / "alert.png")

    left, right = np.split(cv2.imread(str(tmp_path / "alert.png")), [96 + 4], axis=1)
    assert (left[:, :96] == cv2.imread(str(paths[2]))).all()
    colour = np.ptp(right[:, 4:].astype(int), axis=2)
    assert colour[48, 48] > colour[8, 8] + 20


def test_picture_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")

    with pytest.raises(DataError, match="cannot be written"):
        write_alert_picture(bundle, frames(tmp_path), alert(camera_seq=2), tmp_path / "nowhere" / "alert.png")
