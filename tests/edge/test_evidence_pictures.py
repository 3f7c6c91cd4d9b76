"""Maps survive their picture to half a step; overlays show where the map is hot."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge.errors import EvidenceError
from edge.evidence.pictures import LEVELS, decode_map, draw_overlay, encode_jpeg, encode_map
from edge.frames import Region

MAPS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-1e6, 1e6, width=32),
)


@given(MAPS)
def test_a_map_comes_back_to_half_a_step(anomaly_map: np.ndarray) -> None:
    png, scale = encode_map(anomaly_map)
    found = decode_map(png, scale)

    exact = float(np.spacing(np.float32(np.abs(anomaly_map).max())))
    assert found.shape == anomaly_map.shape
    assert np.abs(found.astype(np.float64) - anomaly_map).max() <= scale["step"] / 2 + exact
    assert scale["step"] == pytest.approx(float(np.ptp(anomaly_map.astype(np.float64))) / LEVELS)
    assert scale["not_finite"] == 0


def test_values_that_are_not_finite_are_counted() -> None:
    png, scale = encode_map(np.array([[1, np.nan], [np.inf, 3]], np.float32))

    assert scale == {"minimum": 1.0, "step": 2 / LEVELS, "not_finite": 2}
    assert decode_map(png, scale).tolist() == [[1.0, 1.0], [1.0, 3.0]]


def test_a_map_without_a_finite_value_is_still_a_picture() -> None:
    assert encode_map(np.full((2, 2), np.nan, np.float32))[1]["not_finite"] == 4


def test_another_picture_is_no_map() -> None:
    with pytest.raises(EvidenceError, match="16-bit"):
        decode_map(encode_jpeg(np.zeros((4, 4, 3), np.uint8), 90), {"minimum": 0, "step": 1})


@pytest.mark.parametrize(("width", "shown"), [(640, 640), (1920, 1280)])
def test_an_overlay_is_red_where_the_map_is_hot_and_only_under_the_map(width: int, shown: int) -> None:
    height = width * 9 // 16
    frame = np.full((height, width, 3), 128, np.uint8)
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[:, 4:] = 10
    box = (0.0, 0.0, float(width), height / 2)
    drawn = draw_overlay(frame, anomaly_map, box=box, threshold=5.0, regions=())

    assert drawn.shape == (height * shown // width, shown, 3)
    top = drawn[drawn.shape[0] // 4]
    blue, _, red = (int(value) for value in top[shown * 7 // 8])
    assert red > blue
    blue, _, red = (int(value) for value in top[shown // 8])
    assert blue > red
    assert drawn[-1].tolist() == [[128, 128, 128]] * shown


def test_below_the_threshold_nothing_is_all_red() -> None:
    frame = np.zeros((80, 80, 3), np.uint8)
    box = (0.0, 0.0, 80.0, 80.0)
    anomaly_map = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    calm = draw_overlay(frame, anomaly_map, box=box, threshold=10.0, regions=())
    hot = draw_overlay(frame, anomaly_map, box=box, threshold=0.5, regions=())

    assert int(calm[..., 2].max()) < int(hot[..., 2].max()) // 2


def test_an_overlay_frames_each_region() -> None:
    frame = np.zeros((100, 100, 3), np.uint8)
    region = Region(20, 30, 40, 20, 800, 1.0)
    flat = np.zeros((4, 4), np.float32)
    plain = draw_overlay(frame, flat, box=(0, 0, 100, 100), threshold=1.0, regions=())
    framed = draw_overlay(frame, flat, box=(0, 0, 100, 100), threshold=1.0, regions=(region,))

    changed = np.argwhere((plain != framed).any(2))
    assert np.abs(changed.min(0) - (30, 20)).max() <= 2
    assert np.abs(changed.max(0) - (50, 60)).max() <= 2


def test_a_map_beside_the_frame_draws_nothing() -> None:
    frame = np.full((50, 50, 3), 7, np.uint8)
    drawn = draw_overlay(frame, np.ones((2, 2), np.float32), box=(60, 60, 10, 10), threshold=0.5, regions=())
    assert (drawn == 7).all()


def test_a_frame_too_large_for_the_format_is_refused() -> None:
    with pytest.raises(EvidenceError, match="cannot be encoded"):
        encode_jpeg(np.zeros((70_000, 1, 3), np.uint8), 90)


def test_quality_is_a_choice() -> None:
    frame = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert len(encode_jpeg(frame, 95)) > 2 * len(encode_jpeg(frame, 20))
    assert cv2.imdecode(np.frombuffer(encode_jpeg(frame, 95), np.uint8), cv2.IMREAD_COLOR).shape == (64, 64, 3)
