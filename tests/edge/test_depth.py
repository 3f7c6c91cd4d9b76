"""Depth maps: points in metres from files and noisy scenes, and canvases that know what was not measured."""

from __future__ import annotations

import dataclasses
import io
import sys
import zipfile
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edge.bundle import Preprocessing, Resize
from edge.capture.building import build_source
from edge.capture.depth_sources import points_of, read_depth
from edge.capture.scan_files import read_organised
from edge.capture.sense_settings import DepthSourceSettings
from edge.capture.settings import SourceSettings
from edge.capture.sources import CorruptFrameError, Grab
from edge.errors import CaptureError, MissingExtraError
from edge.frames import Frame
from edge.inference.depth import depth_canvas
from edge.inference.detector import Detector
from edge.inputs import DepthLayout
from tests.edge.tiny_senses import make_depth_bundle, scan

if TYPE_CHECKING:
    from pathlib import Path

LENS = DepthSourceSettings(fx=500.0)


def test_sixteen_bit_image_becomes_points_in_metres(tmp_path: Path) -> None:
    counts = np.full((40, 60), 800, np.uint16)
    counts[3, 5] = 0
    cv2.imwrite(str(tmp_path / "one.png"), counts)
    points = read_depth(tmp_path / "one.png", DepthSourceSettings(fx=500.0, fy=400.0, cx=30, cy=20))
    assert points.dtype == np.float32
    np.testing.assert_allclose(points[20, 30], [0, 0, 0.8], atol=1e-7)
    np.testing.assert_allclose(points[30, 55], [25 / 500 * 0.8, 10 / 400 * 0.8, 0.8], rtol=1e-6)
    assert np.isnan(points[3, 5]).all()
    assert np.isfinite(points).sum() == 3 * (40 * 60 - 1)


@pytest.mark.parametrize("depth", [np.full((4, 4), 800, np.uint16), np.full((4, 4), "far")])
def test_depth_in_an_npz_that_is_no_metres_is_refused(tmp_path: Path, depth: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", z=depth)
    source = build_source(SourceSettings(kind="depth_folder", path=str(tmp_path), depth={"fx": 100.0}))
    source.open()
    with pytest.raises(CorruptFrameError, match="metres"):
        source.read()


@pytest.mark.parametrize("name", ["fx", "fy", "cx", "cy"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_geometry_that_is_no_number_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=name):
        DepthSourceSettings.model_validate({name: value})


def test_depth_image_without_geometry_is_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "one.png"), np.full((4, 4), 800, np.uint16))
    with pytest.raises(CaptureError, match=r"depth\.fx"):
        read_depth(tmp_path / "one.png", DepthSourceSettings())


def write_pcd(path: Path, points: np.ndarray, *, height: int) -> None:
    """A PCD 0.7 of x, y and z; organised where ``height`` is over 1."""
    flat = np.ascontiguousarray(points.reshape(-1, 3), "<f4")
    header = (
        f"VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {len(flat) // height}\n"
        f"HEIGHT {height}\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(flat)}\nDATA binary\n"
    )
    path.write_bytes(header.encode() + flat.tobytes())


def test_folder_that_was_learned_from_is_played(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile: pip install 'lineward[three-d]'")
    pytest.importorskip("pypcd4", reason="needs pypcd4: pip install 'lineward[three-d]'")
    points = scan(1, height=60, width=80)
    points[0, 0] = 0.1, 0.1, -1.0  # behind the sensor
    write_pcd(tmp_path / "a.pcd", points, height=60)
    tifffile.imwrite(tmp_path / "b.tiff", np.nan_to_num(points), photometric="rgb", compression="zlib")
    np.savez(tmp_path / "c.npz", xyz=points)
    (tmp_path / "._b.tiff").write_bytes(b"what a file manager leaves behind")
    source = build_source(SourceSettings(kind="depth_folder", path=str(tmp_path)))
    source.open()
    wanted = points.copy()
    wanted[0, 0] = np.nan
    for name in ("a.pcd", "b.tiff", "c.npz"):
        grab = source.read()
        assert isinstance(grab, Grab)
        assert grab.name == name
        np.testing.assert_array_equal(grab.image, wanted)
        np.testing.assert_array_equal(read_organised(tmp_path / name), wanted)
    assert source.read() is None


@pytest.mark.parametrize("name", ["cloud.pcd", "cloud.ply"])
def test_cloud_without_rows_is_refused_with_what_to_save_instead(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pypcd4", reason="needs pypcd4: pip install 'lineward[three-d]'")
    write_pcd(tmp_path / name, np.ones((7, 3)), height=1)
    with pytest.raises(CorruptFrameError, match=r"without rows and columns.*organised scan as NPZ"):
        read_depth(tmp_path / name, LENS)


@pytest.mark.parametrize(("name", "package"), [("one.tiff", "tifffile"), ("one.pcd", "pypcd4")])
def test_scan_without_its_package_says_what_to_install(
    tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    cv2.imwrite(str(tmp_path / "one.tiff"), np.ones((4, 5, 3), np.float32))
    write_pcd(tmp_path / "one.pcd", np.ones((4, 5, 3)), height=4)
    with pytest.raises(MissingExtraError, match=rf"{package}.*lineward\[three-d\]"):
        read_depth(tmp_path / name, LENS)


def test_tiff_that_is_damaged_anywhere_in_its_header_is_no_scan_or_still_one(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile", reason="needs tifffile: pip install 'lineward[three-d]'")
    path = tmp_path / "one.tif"
    tifffile.imwrite(path, np.ones((4, 5, 3), np.float32), photometric="rgb", metadata=None, software=False)
    whole = path.read_bytes()
    for place in range(8, 140):
        for value in (0, 3, 255):
            path.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            with suppress(CorruptFrameError):
                assert read_depth(path, LENS).shape[2] == 3


def test_npz_that_is_encrypted_is_no_scan(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", xyz=scan(1))
    content = bytearray((tmp_path / "one.npz").read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(header) + flags] |= 1
    (tmp_path / "one.npz").write_bytes(content)
    with pytest.raises(CorruptFrameError, match="npz"):
        read_depth(tmp_path / "one.npz", LENS)


def test_npz_whose_header_is_damaged_is_no_scan(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, scan(1, height=4, width=5))
    with zipfile.ZipFile(tmp_path / "one.npz", "w") as archive:
        archive.writestr("xyz.npy", array.getvalue().replace(b"(4, 5, 3)", b"(4, 5, 3\xb8"))
    with pytest.raises(CorruptFrameError, match="npz"):
        read_depth(tmp_path / "one.npz", LENS)


@pytest.mark.parametrize("content", [b"", b"II*\0 half", b"VERSION 0.7\nFIELDS x"])
@pytest.mark.parametrize("suffix", [".tif", ".pcd", ".npz", ".png"])
def test_damaged_file_is_told_in_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    pytest.importorskip("pypcd4", reason="needs pypcd4: pip install 'lineward[three-d]'")
    path = tmp_path / f"one{suffix}"
    path.write_bytes(content)
    with pytest.raises(CorruptFrameError, match=path.name) as refused:
        read_depth(path, LENS)
    assert "\n" not in str(refused.value)


def test_file_that_is_no_depth_map_is_corrupt_and_the_next_one_read(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 half")
    np.savez(tmp_path / "c.npz", other=np.zeros(3))
    np.savez(tmp_path / "d.npz", xyz=scan(1).astype(np.float64))
    source = build_source(SourceSettings(kind="depth_folder", path=str(tmp_path)))
    source.open()
    for _ in range(3):
        with pytest.raises(CorruptFrameError):
            source.read()
    grab = source.read()
    assert isinstance(grab, Grab)
    np.testing.assert_array_equal(grab.image, scan(1))
    assert source.read() is None


def test_scene_is_seen_with_noise_along_its_rays_that_a_seed_repeats(tmp_path: Path) -> None:
    points = scan(1, lost=0.0)
    np.savez(tmp_path / "scene.npz", xyz=points)
    sensor = {"noise_m": 0.001, "dropout": 0.1, "seed": 3}
    settings = SourceSettings(kind="depth_scene", path=str(tmp_path / "scene.npz"), loop=True, depth=sensor)

    def two() -> list[np.ndarray]:
        source = build_source(settings)
        source.open()
        grabs = [source.read(), source.read()]
        return [grab.image for grab in grabs if isinstance(grab, Grab)]

    first, second = two()
    np.testing.assert_array_equal(first, two()[0])
    assert np.isnan(first[..., 2]).mean() == pytest.approx(0.1, abs=0.02)
    noise = (second - points)[..., 2]
    assert np.nanstd(noise) == pytest.approx(0.001 * 0.8**2, rel=0.05)
    ratio = first[..., 0] / first[..., 2] - points[..., 0] / points[..., 2]
    assert np.nanmax(np.abs(ratio)) < 1e-6


@given(height=st.integers(32, 80), width=st.integers(32, 80), lost=st.floats(0, 1), seed=st.integers(0, 99))
def test_canvas_cells_lie_on_the_surface_or_are_invalid(height: int, width: int, lost: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    points = np.stack([x / 100, y / 100, 1 + 0.2 * x / width - 0.1 * y / height], axis=-1).astype(np.float32)
    points[rng.random((height, width)) < lost] = np.nan
    canvas = depth_canvas(points, Preprocessing(height=32, width=32, resize=Resize.VALID))
    valid = np.isfinite(canvas).all(axis=2)
    assert (np.isfinite(canvas).any(axis=2) == valid).all()
    plane = 1 + 0.2 * canvas[..., 0] * 100 / width - 0.1 * canvas[..., 1] * 100 / height
    np.testing.assert_allclose(canvas[valid][:, 2], plane[valid], atol=1e-4)


def test_canvas_of_the_same_size_keeps_every_valid_point() -> None:
    points = scan(1, height=64, width=64)
    points[0, 0, 0] = np.inf
    canvas = depth_canvas(points, Preprocessing(height=64, width=64, resize=Resize.VALID))
    wanted = points.copy()
    wanted[0, 0] = np.nan
    np.testing.assert_array_equal(canvas, wanted)


def frame(points: np.ndarray) -> Frame:
    return Frame(points, "height", 0, 0, datetime.now(timezone.utc))


def test_frame_with_too_few_valid_points_is_refused_and_one_with_enough_is_not(tmp_path: Path) -> None:
    detector = Detector.open(make_depth_bundle(tmp_path / "bundle", min_valid=0.5))
    detector.predict(frame(scan(1, lost=0.3)))
    with pytest.raises(CaptureError, match=r"of the points are valid, 50 % must be"):
        detector.predict(frame(scan(1, lost=0.75)))


def test_point_out_of_range_is_not_judged(tmp_path: Path) -> None:
    bundle = make_depth_bundle(tmp_path / "bundle")
    detector = Detector.open(bundle)
    points = scan(1, lost=0.0)
    points[40:56, 40:56, 2] = 3.0
    assert detector.predict(frame(points)).anomaly_map.max() > 1
    layout = DepthLayout(pitch_m=0.0016, far_m=1.0)
    limited = dataclasses.replace(bundle, manifest=bundle.manifest.model_copy(update={"depth": layout}))
    assert Detector.open(limited).predict(frame(points)).anomaly_map.max() < 0.2


@pytest.mark.parametrize(("kind", "package"), [("realsense", "pyrealsense2"), ("oak", "depthai")])
def test_depth_camera_without_its_package_says_what_to_install(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    source = build_source(SourceSettings(kind=kind, device="1234"))
    with pytest.raises(MissingExtraError, match=package):
        source.open()


def test_points_follow_the_pinhole() -> None:
    points = points_of(np.full((3, 3), 2.0), LENS)
    np.testing.assert_allclose(points[1, 2], [1 / 500 * 2, 0, 2], atol=1e-7)
