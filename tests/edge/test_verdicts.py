"""Judging a prediction: region of interest, threshold, regions in camera pixels."""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime, timezone

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.bundle import CalibrationScores, Crop, Pooling
from edge.errors import BundleError, SettingsError
from edge.frames import Decision, Frame, Prediction
from edge.judgement.region_of_interest import Polygon, Rectangle, RegionOfInterest, covered_box, rasterise
from edge.judgement.regions import find_regions
from edge.judgement.threshold import ExternalThreshold
from edge.judgement.verdicts import Judge

H, W = 8, 10
BOX = (0.0, 0.0, 100.0, 80.0)


def calibration(n: int = 19, seed: int = 0) -> CalibrationScores:
    maps = np.random.default_rng(seed).random((n, H, W)).astype(np.float16)
    return CalibrationScores(
        scores=maps.reshape(n, -1).max(axis=1).astype(np.float32),
        maps=maps,
        groups=np.arange(n).astype(np.str_),
    )


def prediction(anomaly_map: np.ndarray, *, size: tuple[int, int] = (80, 100), seq: int = 7) -> Prediction:
    frame = Frame(
        image=np.zeros((*size, 3), np.uint8),
        camera="cam",
        camera_seq=seq,
        captured_ns=1_000_000,
        captured_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
        part_id="p1",
    )
    return Prediction(anomaly_map.astype(np.float32), frame, preprocess_ns=2_000_000, inference_ns=3_000_000)


def judge(**changes: object) -> Judge:
    arguments = {"calibration": calibration(), "pooling": Pooling(), "crop": None, "alpha": 0.05, **changes}
    return Judge(**arguments, clock_ns=lambda: 11_000_000)  # type: ignore[arg-type]  # any argument may be replaced


def test_high_cell_is_nok_with_its_region_in_camera_pixels() -> None:
    anomaly_map = np.zeros((H, W))
    anomaly_map[2, 3:5] = 5

    verdict = judge().judge(prediction(anomaly_map))

    assert verdict.decision is Decision.NOK
    assert verdict.score == 5
    assert verdict.p_value == 1 / 20
    (region,) = verdict.regions
    assert (region.x, region.y, region.w, region.h, region.area, region.peak) == (30, 20, 20, 10, 200, 5)


def test_low_map_is_ok_without_regions() -> None:
    verdict = judge().judge(prediction(np.zeros((H, W))))

    assert verdict.decision is Decision.OK
    assert verdict.regions == ()
    assert verdict.p_value == 1
    assert verdict.part_id == "p1"


def test_latency_is_reported_per_stage() -> None:
    verdict = judge().judge(prediction(np.zeros((H, W))))

    assert verdict.latency_ms == {"preprocess": 2, "inference": 3, "judgement": 0, "total": 10}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_score_that_is_not_finite_is_not_judged(bad: float) -> None:
    anomaly_map = np.zeros((H, W))
    anomaly_map[0, 0] = bad

    verdict = judge().judge(prediction(anomaly_map))

    assert verdict.decision is Decision.NOT_JUDGED
    assert "not finite" in verdict.reason
    assert math.isnan(verdict.score)


def test_crop_moves_and_scales_regions() -> None:
    anomaly_map = np.zeros((H, W))
    anomaly_map[0, 0] = 5

    verdict = judge(crop=Crop(x=40, y=30, w=20, h=40)).judge(prediction(anomaly_map))

    region = verdict.regions[0]
    assert (region.x, region.y, region.w, region.h, region.area) == (40, 30, 2, 5, 10)


def test_excluded_defect_is_ok() -> None:
    anomaly_map = np.zeros((H, W))
    anomaly_map[0, 0] = 5
    region = RegionOfInterest(exclude=(Rectangle(x=0, y=0, w=10, h=10),))

    assert judge().judge(prediction(anomaly_map)).decision is Decision.NOK
    assert judge(region_of_interest=region).judge(prediction(anomaly_map)).decision is Decision.OK


def test_nan_outside_the_region_of_interest_does_not_matter() -> None:
    anomaly_map = np.zeros((H, W))
    anomaly_map[0, 0] = math.nan
    region = RegionOfInterest(exclude=(Rectangle(x=0, y=0, w=10, h=10),))

    assert judge(region_of_interest=region).judge(prediction(anomaly_map)).decision is Decision.OK


def test_calibration_is_pooled_again_under_the_region_of_interest() -> None:
    hot = calibration()
    hot.maps[:, 0, 0] = 9
    hot = CalibrationScores(scores=np.full(19, 9, np.float32), maps=hot.maps, groups=hot.groups)
    region = RegionOfInterest(exclude=(Rectangle(x=0, y=0, w=10, h=10),))
    whole, part = judge(calibration=hot), judge(calibration=hot, region_of_interest=region)

    for one in (whole, part):
        one.judge(prediction(np.zeros((H, W))))

    assert whole.threshold.value > 9
    assert part.threshold.value < 1.1


def test_threshold_is_fitted_again_when_the_frame_size_changes() -> None:
    region = RegionOfInterest(include=(Rectangle(x=0, y=0, w=50, h=80),))
    anomaly_map = np.zeros((H, W))
    anomaly_map[4, 7] = 5
    one = judge(region_of_interest=region)

    # 100 pixels wide: column 7 is outside the left half; 50 pixels wide: everything is inside.
    assert one.judge(prediction(anomaly_map)).decision is Decision.OK
    assert one.judge(prediction(anomaly_map, size=(80, 50))).decision is Decision.NOK


def test_calibration_maps_of_another_shape_are_refused() -> None:
    region = RegionOfInterest(exclude=(Rectangle(x=0, y=0, w=10, h=10),))

    with pytest.raises(BundleError, match="calibration maps are"):
        judge(region_of_interest=region).judge(prediction(np.zeros((H + 1, W))))


def test_external_threshold_holds_for_its_bundle() -> None:
    external = ExternalThreshold(value=50, bundle_id="a" * 64, memory_version=0)
    anomaly_map = np.full((H, W), 5.0)

    matching = judge(external=external, bundle_id="a" * 64)
    other = judge(external=external, bundle_id="b" * 64)

    assert matching.judge(prediction(anomaly_map)).decision is Decision.OK
    assert matching.notice == ""
    assert matching.threshold.method == "external"
    assert other.judge(prediction(anomaly_map)).decision is Decision.NOK
    assert "ignored" in other.notice


def test_prediction_of_another_memory_is_not_judged_by_these_thresholds() -> None:
    other = dataclasses.replace(prediction(np.zeros((H, W))), memory_version=1)

    with pytest.raises(ValueError, match="memory version 1 cannot be judged by the thresholds of version 0"):
        judge().judge(other)


def test_recalibrated_judge_is_of_the_same_camera_and_ready() -> None:
    region = RegionOfInterest(include=(Rectangle(x=0, y=0, w=50, h=80),))
    external = ExternalThreshold(value=50, bundle_id="a" * 64, memory_version=0)
    first = judge(region_of_interest=region, external=external, bundle_id="a" * 64)
    first.judge(prediction(np.zeros((H, W))))

    second = first.recalibrated(calibration(seed=1), memory_version=1)

    wanted = judge(calibration=calibration(seed=1), region_of_interest=region)
    wanted.judge(prediction(np.zeros((H, W))))
    assert second.threshold == wanted.threshold
    assert second.good_scores.tolist() == wanted.good_scores.tolist()
    assert "set for memory version 0, not 1" in second.notice
    verdict = second.judge(dataclasses.replace(prediction(np.zeros((H, W))), memory_version=1))
    assert verdict.memory_version == 1
    small = dataclasses.replace(calibration(), maps=np.ones((19, 2, 2), np.float16))
    with pytest.raises(BundleError, match="calibration maps are"):
        first.recalibrated(small, memory_version=2)


def test_missing_part_is_not_judged() -> None:
    verdict = judge().missing(
        camera="cam", camera_seq=3, captured_ns=0, captured_at=datetime.now(timezone.utc), part_id="x", reason="dropped"
    )

    assert (verdict.decision, verdict.part_id, verdict.reason) == (Decision.NOT_JUDGED, "x", "dropped")


def test_regions_come_strongest_first_and_bounded() -> None:
    anomaly_map = np.zeros((H, W), np.float32)
    anomaly_map[::2, ::2] = np.arange(1, 21).reshape(4, 5)

    regions = find_regions(anomaly_map, 1, BOX, limit=3)

    assert [region.peak for region in regions] == [20, 19, 18]


def test_diagonal_cells_are_one_region() -> None:
    assert len(find_regions(np.eye(4, dtype=np.float32), 1, BOX)) == 1


@given(data=st.data())
def test_regions_hold_every_hot_cell_and_stay_inside(data: st.DataObject) -> None:
    hot = np.array(data.draw(st.lists(st.booleans(), min_size=H * W, max_size=H * W))).reshape(H, W)
    box = (5.0, 7.0, 100.0, 80.0)

    regions = find_regions(hot.astype(np.float32), 1, box, limit=H * W)

    assert sum(region.area for region in regions) == hot.sum() * 100
    for region in regions:
        assert region.x >= 5
        assert region.y >= 7
        assert region.x + region.w <= 105
        assert region.y + region.h <= 87
    for row, column in zip(*np.nonzero(hot), strict=True):
        x, y = 5 + 10 * column + 5, 7 + 10 * row + 5
        assert any(r.x <= x < r.x + r.w and r.y <= y < r.y + r.h for r in regions)


def test_polygon_is_cut_along_its_edge() -> None:
    triangle = RegionOfInterest(include=(Polygon(points=((0, -4), (84, 80), (0, 80))),))

    mask = rasterise(triangle, (0, 0, 80, 80), (8, 8))

    assert mask is not None
    np.testing.assert_array_equal(mask, np.tri(8, dtype=bool))


def test_exclusion_wins_over_inclusion() -> None:
    region = RegionOfInterest(include=(Rectangle(x=0, y=0, w=50, h=80),), exclude=(Rectangle(x=20, y=0, w=80, h=80),))

    mask = rasterise(region, BOX, (H, W))

    assert mask is not None
    assert mask[:, :2].all()
    assert not mask[:, 2:].any()


def test_region_that_leaves_everything_is_no_mask() -> None:
    assert rasterise(RegionOfInterest(), BOX, (H, W)) is None
    assert rasterise(RegionOfInterest(include=(Rectangle(x=-5, y=-5, w=500, h=500),)), BOX, (H, W)) is None


def test_region_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="region_of_interest"):
        rasterise(RegionOfInterest(include=(Rectangle(x=200, y=0, w=5, h=5),)), BOX, (H, W))


def test_covered_box_is_the_crop_or_the_frame() -> None:
    assert covered_box(None, frame_width=640, frame_height=480) == (0, 0, 640, 480)
    assert covered_box(Crop(x=1, y=2, w=3, h=4), frame_width=640, frame_height=480) == (1, 2, 3, 4)
