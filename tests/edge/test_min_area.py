"""Masks and the smallest area: the score that is thresholded respects both, so the false-alarm budget still holds."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from skimage.morphology import area_opening

from edge.bundle import CalibrationScores, Crop, Pooling
from edge.errors import SettingsError
from edge.frames import Decision
from edge.judgement.area_opening import opened_score
from edge.judgement.mask_image import check_proportions, read_mask
from edge.judgement.min_area import MinArea, area_in_cells
from edge.judgement.region_of_interest import RegionOfInterest, rasterise
from edge.judgement.scope import Scope
from edge.judgement.score import pool_score
from tests.edge.test_verdicts import BOX, H, W, judge, prediction

if TYPE_CHECKING:
    from pathlib import Path

CELL = 100.0  # pixels of the camera frame under one cell of the maps here
# Few values, so that equal ones and plateaus are common.
MAPS = st.lists(st.integers(0, 6), min_size=H * W, max_size=H * W).map(
    lambda values: np.array(values, np.float32).reshape(H, W)
)


@given(anomaly_map=MAPS, cells=st.integers(1, 40), min_cells=st.integers(1, 30))
def test_score_is_that_of_the_area_opened_map(anomaly_map: np.ndarray, cells: int, min_cells: int) -> None:
    whole = area_opening(anomaly_map, min_cells, connectivity=2)

    found = opened_score(anomaly_map, cells=cells, min_cells=min_cells)

    assert found == pytest.approx(pool_score(whole, Pooling(cells=cells)), abs=1e-6)


@given(anomaly_map=MAPS, more=MAPS, cells=st.integers(1, 20), min_cells=st.integers(2, 20))
def test_score_rises_with_the_map_and_falls_with_the_area(
    anomaly_map: np.ndarray, more: np.ndarray, cells: int, min_cells: int
) -> None:
    def score(values: np.ndarray, area: int) -> float:
        return pool_score(values, Pooling(cells=cells), None, area)

    assert score(anomaly_map + more, min_cells) >= score(anomaly_map, min_cells) - 1e-6
    assert score(anomaly_map, 1) >= score(anomaly_map, min_cells - 1) - 1e-6
    assert score(anomaly_map, min_cells - 1) >= score(anomaly_map, min_cells) - 1e-6


@given(anomaly_map=MAPS, inside=MAPS, cells=st.integers(1, 20), min_cells=st.integers(2, 12))
def test_components_end_at_the_edge_of_the_region(
    anomaly_map: np.ndarray, inside: np.ndarray, cells: int, min_cells: int
) -> None:
    mask = inside >= 3
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    large = np.isin(labels, 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= min_cells))
    if not large.any():
        if mask.any():
            with pytest.raises(ValueError, match="no connected part"):
                opened_score(anomaly_map, cells=cells, min_cells=min_cells, region=mask)
        return

    found = opened_score(anomaly_map, cells=cells, min_cells=min_cells, region=mask)

    low = np.where(large, anomaly_map, -1)
    opened = area_opening(low, min_cells, connectivity=2)[large]
    highest = np.sort(opened)[-min(cells, opened.size) :]
    assert found == pytest.approx(float(highest.mean()), abs=1e-6)


@given(anomaly_map=MAPS, min_cells=st.integers(1, 20), cells=st.integers(1, 20))
def test_nok_always_names_a_region_of_at_least_that_area(anomaly_map: np.ndarray, min_cells: int, cells: int) -> None:
    one = judge(pooling=Pooling(cells=cells), min_area=MinArea(pixels=min_cells * CELL))

    verdict = one.judge(prediction(anomaly_map / 2))

    assert (verdict.decision is Decision.NOK) == bool(verdict.regions)
    assert all(region.area >= min_cells * CELL for region in verdict.regions)


def test_defect_smaller_than_the_area_does_not_alarm_and_a_larger_one_does() -> None:
    small, large = np.zeros((H, W)), np.zeros((H, W))
    small[2, 3:6] = 50
    large[2, 3:7] = 5
    one = judge(min_area=MinArea(pixels=4 * CELL))

    assert judge().judge(prediction(small)).decision is Decision.NOK
    assert one.judge(prediction(small)).decision is Decision.OK
    assert one.judge(prediction(large)).decision is Decision.NOK


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_cell_that_is_not_finite_is_not_opened_away(bad: float) -> None:
    anomaly_map = np.zeros((H, W))
    anomaly_map[4, 4] = bad

    verdict = judge(min_area=MinArea(pixels=4 * CELL)).judge(prediction(anomaly_map))

    assert verdict.decision is Decision.NOT_JUDGED


@pytest.mark.parametrize("min_cells", [1, 3, 12])
def test_budget_holds_with_mask_and_area(min_cells: int) -> None:
    """Good maps never seen before alarm as often as the budget says, whatever mask and area."""
    rng = np.random.default_rng(5)
    drawn = np.zeros((H, W), bool)
    drawn[1:7, 2:9] = True

    def maps(count: int) -> np.ndarray:
        noise = rng.standard_normal((count, H, W)).astype(np.float32)
        return np.stack([cv2.GaussianBlur(one, (0, 0), 1.0) for one in noise])

    kept = maps(999)
    calibration = CalibrationScores(
        scores=kept.reshape(len(kept), -1).max(1), maps=kept.astype(np.float16), groups=np.arange(len(kept)).astype(str)
    )
    one = judge(calibration=calibration, alpha=0.05, mask=drawn, min_area=MinArea(pixels=min_cells * CELL))

    alarms = np.mean([one.judge(prediction(good)).decision is Decision.NOK for good in maps(2000)])

    # 0.05 within 5 standard deviations of both samples.
    assert 0.01 <= alarms <= 0.09


def test_area_in_square_millimetres_is_that_in_pixels() -> None:
    assert MinArea(mm2=2.5, pixels_per_mm=8).in_pixels == 160
    assert area_in_cells(MinArea(mm2=2.5, pixels_per_mm=8), BOX, (H, W)) == 2
    assert area_in_cells(MinArea(pixels=200), BOX, (H, W)) == 2
    assert area_in_cells(MinArea(pixels=201), BOX, (H, W)) == 3
    assert area_in_cells(MinArea(pixels=1), BOX, (H, W)) == 1
    assert area_in_cells(None, BOX, (H, W)) == 1


@pytest.mark.parametrize("said", [{}, {"pixels": 1, "mm2": 1, "pixels_per_mm": 1}, {"mm2": 1}, {"pixels": 0}])
def test_area_that_says_nothing_or_two_things_is_refused(said: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        MinArea.model_validate(said)


def test_area_below_one_cell_and_mask_below_the_rule_are_warned_of() -> None:
    mask = np.zeros((H, W), bool)
    mask[2:4, 2:4] = True
    one = judge(min_area=MinArea(pixels=99), mask=mask, pooling=Pooling(cells=9))
    one.judge(prediction(np.zeros((H, W))))

    below, few = one.warnings

    assert "99 pixels are no more than one cell of the anomaly map (100 pixels)" in below
    assert "leaves 4 cells" in few


def test_area_beyond_what_the_mask_leaves_is_refused() -> None:
    mask = np.zeros((H, W), bool)
    mask[2:4, 2:4] = mask[6:8, 7:10] = True

    judge(min_area=MinArea(pixels=600), mask=mask).judge(prediction(np.zeros((H, W))))
    with pytest.raises(SettingsError, match=r"7 cells .* has 6"):
        judge(min_area=MinArea(pixels=601), mask=mask).judge(prediction(np.zeros((H, W))))


def test_recalibration_keeps_mask_and_area() -> None:
    mask = np.zeros((H, W), bool)
    mask[:, :5] = True
    first = judge(mask=mask, min_area=MinArea(pixels=400))
    first.judge(prediction(np.zeros((H, W))))

    again = first.recalibrated(first.calibration, memory_version=1)

    assert again.threshold == first.threshold
    assert again.good_scores.tolist() == first.good_scores.tolist()
    assert again.scope == first.scope
    assert first.threshold.value < judge().threshold.value


def test_scope_is_named_by_what_is_drawn() -> None:
    mask = np.ones((4, 4), bool)
    other = mask.copy()
    other[0, 0] = False
    names = [Scope.of().digest, Scope.of(drawn=mask).digest, Scope.of(drawn=other).digest]
    names += [Scope.of(min_area=MinArea(pixels=5)).digest, Scope.of(min_area=MinArea(pixels=6)).digest]

    assert len(set(names)) == 5
    assert Scope.of(drawn=mask.copy()).digest == names[1]
    assert Scope.of(min_area=MinArea(mm2=5, pixels_per_mm=1)).digest == names[3]


def test_mask_is_drawn_at_any_scale() -> None:
    drawn = np.zeros((160, 200), bool)
    drawn[40:80, 60:] = True
    expected = np.zeros((H, W), bool)
    expected[2:4, 3:] = True

    for scale in (1, 2, 4):
        mask = rasterise(RegionOfInterest(), BOX, (H, W), drawn=drawn[::scale, ::scale], frame_shape=(80, 100))
        np.testing.assert_array_equal(mask, expected)
    cropped = Crop(x=30, y=20, w=70, h=20)
    assert Scope.of(drawn=drawn).look(cropped, Pooling(), (80, 100), (4, 7)).mask is None


def write(path: Path, grey: np.ndarray) -> Path:
    assert cv2.imwrite(str(path), grey)
    return path


def test_mask_file_is_read_with_smoothed_edges(tmp_path: Path) -> None:
    grey = np.zeros((40, 60), np.uint8)
    grey[10:20] = 255
    grey[9], grey[20] = 100, 150

    drawn = read_mask(write(tmp_path / "mask.png", grey))

    assert drawn.shape == (40, 60)
    assert np.flatnonzero(drawn.all(1)).tolist() == list(range(10, 21))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def test_one_bit_mask_is_read(tmp_path: Path) -> None:
    rows = b"".join(b"\x00" + bytes([0b11110000]) for _ in range(8))
    header = struct.pack(">IIBBBBB", 8, 8, 1, 0, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))

    assert read_mask(tmp_path / "mask.png").sum(0).tolist() == [8] * 4 + [0] * 4


def test_files_that_are_no_masks_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour = write(tmp_path / "colour.png", np.full((8, 8, 3), 255, np.uint8))
    deep = write(tmp_path / "deep.png", np.full((8, 8), 65535, np.uint16))
    picture = write(tmp_path / "picture.png", rng.integers(0, 255, (64, 64), np.uint8))
    black = write(tmp_path / "black.png", np.zeros((8, 8), np.uint8))
    jpeg = write(tmp_path / "mask.jpg", np.full((8, 8), 255, np.uint8))
    cut = tmp_path / "cut.png"
    cut.write_bytes(write(tmp_path / "whole.png", rng.integers(0, 2, (99, 99), np.uint8) * 255).read_bytes()[:60])
    for path, said in [
        (colour, "one grey channel"), (deep, "one grey channel"), (picture, "it is a picture"), (jpeg, "no PNG"),
        (black, "nothing in the mask is white"), (tmp_path / "none.png", "cannot be read"), (cut, "mask"),
    ]:  # fmt: skip
        with pytest.raises(SettingsError, match=said) as error:
            read_mask(path)
        assert str(path) in str(error.value)


def test_mask_of_another_shape_than_the_frames_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.png"
    for fits in ((1080, 1920), (540, 960), (270, 480), (203, 360)):
        check_proportions(fits, (1080, 1920), path)
    with pytest.raises(SettingsError, match="960x720 pixels, which is not the shape"):
        check_proportions((720, 960), (1080, 1920), path)
    region = RegionOfInterest(mask=path)
    with pytest.raises(SettingsError, match="not the shape of the camera's frames"):
        judge(mask=np.ones((80, 90), bool), region_of_interest=region).judge(prediction(np.zeros((H, W))))


@pytest.mark.parametrize("side", [508, 514])
def test_map_with_more_components_than_16_bits_count_is_opened_rightly(side: int) -> None:
    anomaly_map = np.zeros((side, side), np.float32)
    anomaly_map[::2, ::2] = np.random.default_rng(0).random((side // 2, side // 2), dtype=np.float32) + 1
    anomaly_map[-3:-1, -3:-1] = 1.0  # the one component of four cells, below all others and among the last labels

    assert opened_score(anomaly_map, cells=1, min_cells=4) == 1.0
    assert opened_score(anomaly_map, cells=1, min_cells=1) == anomaly_map.max()


def test_area_of_a_real_sized_map_is_quick_enough_to_bisect() -> None:
    """Counts labellings, the cost of a score: a bisection of a 128 x 128 map, not a walk through its values."""
    calls = 0
    honest = cv2.connectedComponentsWithStats

    def counted(*args: object, **values: object) -> object:
        nonlocal calls
        calls += 1
        return honest(*args, **values)  # type: ignore[call-overload]

    anomaly_map = np.random.default_rng(0).random((128, 128), dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cv2, "connectedComponentsWithStats", counted)
        opened_score(anomaly_map, cells=82, min_cells=20)

    assert calls <= 30
