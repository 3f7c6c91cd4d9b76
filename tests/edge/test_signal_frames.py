"""A window as a frame: how gaps are filled and hidden, what an alert says of it, how it is drawn and set up."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pydantic import ValidationError

from edge.alerts.span import channels_of, span_of
from edge.bundle import Manifest, Modality, Preprocessing, Resize
from edge.cameras import suited
from edge.errors import CaptureError, SettingsError
from edge.evidence.drawing import TRACES_WIDTH, draw
from edge.frames import Frame, Region
from edge.inference.detector import Detector
from edge.inference.signals import lost_cells, signal_canvas
from edge.inputs import SignalLayout, SignalPreprocessing
from edge.settings import BoxSettings
from tests.edge.tiny_bundle import make_tiny_bundle
from tests.edge.tiny_senses import bearing, make_signal_bundle, scan, signal_layout
from trainer.signals.recording import filled as learned

if TYPE_CHECKING:
    from pathlib import Path

NOW = datetime(2030, 1, 2, tzinfo=timezone.utc)


def frame(window: np.ndarray, refusal: str = "") -> Frame:
    return Frame(window, "spindle", 0, 0, NOW, refusal=refusal)


def window(seed: int = 5, fault_at: float | None = None) -> np.ndarray:
    return np.ascontiguousarray(bearing(0.5, seed=seed, fault_at=fault_at, fault_s=0.1).T)


@given(
    values=arrays(np.float32, (3, 12), elements=st.floats(-1e6, 1e6, width=32)),
    lost=arrays(np.bool_, (3, 12)),
)
def test_gaps_are_filled_between_their_neighbours_and_nothing_else_changes(
    values: np.ndarray, lost: np.ndarray
) -> None:
    gappy = np.where(lost, np.float32(np.nan), values)
    canvas = signal_canvas(gappy, SignalPreprocessing(channels=3, samples=12))
    assert np.isfinite(canvas).all()
    np.testing.assert_array_equal(canvas[~lost], values[~lost])
    for row, there, filled in zip(values, ~lost, canvas, strict=True):
        if there.any():
            # To a rounding of float32.
            slack = 1e-6 * np.abs(row[there]).max()
            assert filled.min() >= row[there].min() - slack
            assert filled.max() <= row[there].max() + slack
        else:
            assert not filled.any()


@pytest.mark.parametrize("shape", [(2, 12), (3, 11), (3, 12, 1)])
def test_window_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CaptureError, match="the bundle judges float32"):
        signal_canvas(np.zeros(shape, np.float32), SignalPreprocessing(channels=3, samples=12))


def test_cells_that_lost_too_much_say_nothing() -> None:
    values = np.zeros((2, 100), np.float32)
    values[0, 30:33] = np.nan
    values[1, 71] = np.nan
    dead = lost_cells(values, (2, 10), 0.2)
    assert dead is not None
    assert np.argwhere(dead).tolist() == [[0, 3]]
    assert lost_cells(np.zeros((2, 100), np.float32), (2, 10), 0.2) is None
    # One row of cells for all channels: 4 of 200 values.
    assert lost_cells(values, (1, 1), 0.01) is not None
    assert lost_cells(values, (1, 1), 0.03) is None


def test_fault_under_lost_samples_is_hidden_and_one_beside_them_is_found(tmp_path: Path) -> None:
    detector = Detector.open(make_signal_bundle(tmp_path / "bundle"))
    faulty = window(fault_at=0.2)
    plain = detector.predict(frame(faulty)).anomaly_map
    assert plain[0, 4:6].max() > 1.2
    gappy = faulty.copy()
    gappy[0, 80:90] = np.nan
    seen = detector.predict(frame(gappy)).anomaly_map
    assert seen[0, 4] == 0
    np.testing.assert_array_equal(seen[0, 5:], plain[0, 5:])


@pytest.mark.parametrize("channels", [2, 3, 25])
def test_window_without_a_channel_is_left_out_by_the_box_and_by_whoever_learns(tmp_path: Path, channels: int) -> None:
    names = tuple(f"c{number}" for number in range(1, channels + 1))
    detector = Detector.open(make_signal_bundle(tmp_path / "bundle", signal_layout(channels=names)))
    values = np.ascontiguousarray(bearing(0.5, channels=channels).T)
    values[1, :-1] = np.nan
    # One sample of the second channel came: all depends on the share.
    judged = learned(values, 0.05) is not None
    assert judged is (channels == 25)
    if judged:
        detector.predict(frame(values))
    values[1] = np.nan
    assert learned(values, 0.05) is None
    with pytest.raises(CaptureError, match=r"nothing came of channel c2|samples were lost"):
        detector.predict(frame(values))


def test_window_that_its_source_refuses_is_not_judged(tmp_path: Path) -> None:
    detector = Detector.open(make_signal_bundle(tmp_path / "bundle"))
    with pytest.raises(CaptureError, match="another rate"):
        detector.predict(frame(window(), refusal="another rate"))


def test_span_is_of_all_regions_and_names_their_channels() -> None:
    layout = signal_layout(channels=("a", "b", "c"))
    regions = (Region(x=40, y=2, w=20, h=1, area=20, peak=1.0), Region(x=100, y=0, w=60, h=1, area=60, peak=1.0))
    span = span_of(regions, NOW, layout)
    assert (span.from_s, span.to_s, span.rate_hz) == (0.1, 0.4, 400.0)
    assert span.first_ts == NOW - timedelta(seconds=199 / 400)
    assert channels_of(regions, layout) == ("a", "c")
    whole = span_of((), NOW, layout)
    assert (whole.from_s, whole.to_s, channels_of((), layout)) == (0.0, 0.5, ())


def test_traces_show_lost_samples_and_regions_in_their_place() -> None:
    values = window()
    values[1, 100:150] = np.nan
    drawing = draw(values)
    assert drawing.picture.shape[1:] == (TRACES_WIDTH, 3)
    lane = drawing.picture.shape[0] // 2
    pink = (drawing.picture == (200, 200, 255)).all(axis=2)
    assert pink[lane + 2 :, 640:960].mean() > 0.9
    assert not pink[:lane].any()
    (region,) = drawing.regions([Region(x=100, y=1, w=50, h=1, area=50, peak=1.0)])
    assert (region.x, region.y, region.w, region.h) == (640, lane, 320, lane)


def test_depth_map_is_drawn_near_red_far_blue_invalid_black() -> None:
    points = scan(1, lost=0.0)
    points[:48, :, 2] = 0.5
    points[0, 0] = np.nan
    picture = draw(points).picture
    assert not picture[0, 0].any()
    assert picture[20, 20, 2] > picture[20, 20, 0]
    assert picture[80, 20, 0] > picture[80, 20, 2]


# -- manifests and settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"signal": None}, "lacks a layout of a signal"),
        ({"modality": "image"}, "has a layout of a signal"),
        ({"preprocessing": Preprocessing(height=32, width=32)}, "not one of modality signal"),
        ({"preprocessing": SignalPreprocessing(channels=2, samples=201)}, "other channels or samples"),
        ({"modality": "depth", "signal": None}, "lacks a layout of a depth"),
    ],
)
def test_manifest_whose_parts_are_of_different_modalities_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    manifest = make_signal_bundle(tmp_path / "bundle").manifest
    assert manifest.modality is Modality.SIGNAL
    with pytest.raises(ValidationError, match=words):
        Manifest.model_validate({**manifest.model_dump(), **changes})


def test_resize_of_depth_is_not_for_images(tmp_path: Path) -> None:
    manifest = make_tiny_bundle(tmp_path / "bundle").manifest
    with pytest.raises(ValidationError, match="resize valid is not for modality image"):
        Manifest.model_validate(
            {**manifest.model_dump(), "preprocessing": Preprocessing(height=64, width=64, resize=Resize.VALID)}
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hop": 201}, "unjudged"),
        ({"channels": ("a", "a")}, "one name"),
        ({"window": 2**20, "channels": tuple(str(index) for index in range(17))}, "values"),
    ],
)
def test_layout_that_would_lose_samples_or_memory_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SignalLayout.model_validate({**signal_layout().model_dump(), **changes})


SIGNAL = {"name": "spindle", "source": {"kind": "signal_tcp", "url": "tcp://127.0.0.1:7000"}}
BOX = {"site": "plant", "box": "box1", "state_dir": "state", "bundle": "bundle"}


def test_signals_are_watched_beside_the_cameras_and_read_twice_the_same() -> None:
    camera = {"name": "left", "source": {"kind": "folder", "path": "images"}}
    box = BoxSettings.model_validate({**BOX, "cameras": [camera], "signals": [SIGNAL]})
    assert [one.name for one in box.cameras] == ["left", "spindle"]
    again = BoxSettings.model_validate(box.model_dump())
    assert again == box


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"cameras": [SIGNAL]}, "move it under `signals`"),
        ({"signals": [{"name": "x", "source": {"kind": "folder", "path": "a"}}]}, "is a camera's"),
        ({"cameras": [{"name": "z", "health": {}, "source": {"kind": "depth_folder", "path": "a"}}]}, "not for depth"),
        ({"signals": [{**SIGNAL, "mode": "triggered"}]}, "mode: triggered is for cameras"),
        ({"signals": [{**SIGNAL, "health": {}}]}, "health is for cameras"),
        ({"signals": [SIGNAL, SIGNAL]}, "two cameras are named 'spindle'"),
        ({"signals": [{**SIGNAL, "source": {"kind": "signal_mqtt", "url": "mqtt://h"}}]}, "needs signal.topic"),
        ({"signals": [{**SIGNAL, "source": {"kind": "signal_tcp", "url": "http://h:1"}}]}, "takes no http"),
        ({}, "needs at least one entry"),
    ],
)
def test_settings_that_mix_up_signals_and_cameras_name_the_cure(content: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        BoxSettings.model_validate({**BOX, **content})


def test_adaptation_of_the_box_is_for_its_pictures_alone() -> None:
    cameras = [
        {"name": "left", "source": {"kind": "folder", "path": "a"}},
        {"name": "height", "source": {"kind": "depth_folder", "path": "a"}},
    ]
    box = BoxSettings.model_validate({**BOX, "cameras": cameras, "signals": [SIGNAL], "adaptation": {}})
    assert [box.adaptation_of(one) is not None for one in box.cameras] == [True, False, False]


def test_budget_of_a_signal_counts_its_windows(tmp_path: Path) -> None:
    (camera,) = BoxSettings.model_validate({**BOX, "signals": [SIGNAL]}).cameras
    bundle = make_signal_bundle(tmp_path / "bundle")
    assert suited(camera, bundle).frame_rate == 4.0
    with pytest.raises(SettingsError, match="gives frames of modality signal"):
        suited(camera, make_tiny_bundle(tmp_path / "images"))
