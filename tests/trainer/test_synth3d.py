"""`lineward synth3d` and the scan files that it reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from pypcd4 import PointCloud
from typer.testing import CliRunner

from edge.capture.scan_files import read_organised, read_scan
from edge.errors import DataError, UsageError
from trainer.data.scan_files import write_npz, write_tiff
from trainer.data.scan_folder import load_scan_mask, read_scan_folder
from trainer.data.scans import KINDS, Sensor, make_scan
from trainer.synthesis.surface3d_cli import app
from trainer.synthesis.surface3d_command import grid, settings_for, sweep, synthesise

if TYPE_CHECKING:
    from pathlib import Path

SENSOR = Sensor(height=64, width=64, focal=210.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scan") / "wavy.npz"
    write_npz(path, xyz=make_scan("wavy", seed=1, sensor=SENSOR).alone)
    return path


def test_a_sample_is_written_with_what_made_it(source: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--in", str(source), "--preset", "dent", "--seed", "7", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "wavy_dent_7.json").read_text())
    assert record["seed"] == 7
    assert record["settings"]["sign"] == "dent"
    with np.load(tmp_path / "wavy_dent_7.npz") as arrays:
        mask, xyz = arrays["mask"] > 0, arrays["xyz"]
    assert mask.sum() == record["points_moved"]
    assert np.array_equal(cv2.imread(str(tmp_path / "wavy_dent_7_mask.png"), cv2.IMREAD_GRAYSCALE) > 0, mask)
    assert np.array_equal(read_scan(tmp_path / "wavy_dent_7.tiff").xyz, xyz, equal_nan=True)
    assert cv2.imread(str(tmp_path / "wavy_dent_7.png")).std() > 10
    again = synthesise(source, tmp_path / "again", settings=settings_for("dent", {}), name="dent", seed=7)
    assert np.array_equal(again.defect.xyz, xyz, equal_nan=True)


def test_samples_of_a_test_folder_are_read_once_with_their_masks(source: Path, tmp_path: Path) -> None:
    write_npz(tmp_path / "train" / "good" / "a.npz", xyz=read_scan(source).xyz)
    sample = synthesise(source, tmp_path / "test" / "dent", settings=settings_for("dent", {}), name="dent", seed=7)
    [found] = read_scan_folder(tmp_path).test
    mask = load_scan_mask(found, sample.defect.mask.shape)
    assert mask is not None
    assert np.array_equal(mask, sample.defect.mask)


def test_a_strength_below_the_noise_is_said(source: Path, tmp_path: Path) -> None:
    arguments = ["--in", str(source), "--out", str(tmp_path), "--set", "strength=1x"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0
    assert "below noise" in result.output


def test_a_scan_in_millimetres_is_doubted(source: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "mm.npz", xyz=1000 * read_scan(source).xyz)
    result = CliRunner().invoke(app, ["--in", str(tmp_path / "mm.npz"), "--out", str(tmp_path)])
    assert "divide by 1000" in result.output
    assert "divide" not in CliRunner().invoke(app, ["--in", str(source), "--out", str(tmp_path)]).output


def test_a_sheet_under_another_ending_is_refused(source: Path, tmp_path: Path) -> None:
    for verb in (["sweep", "scale", "2"], ["grid"]):
        result = CliRunner().invoke(app, [*verb, "--in", str(source), "--out", str(tmp_path / "sheet.jpg")])
        assert isinstance(result.exception, UsageError)


def test_sheets_are_drawn(source: Path, tmp_path: Path) -> None:
    for arguments in (
        ["sweep", "scale", "2", "8", "--in", str(source), "--out", str(tmp_path / "sweep.png")],
        ["grid", "--in", str(source), "--presets", "dent,wear", "--out", str(tmp_path / "grid.png")],
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    drawn = sweep(source, settings=settings_for("dent", {}), parameter="strength", values=["4x", "16x"], seed=0)
    assert drawn.shape[1] > 480
    assert cv2.imread(str(tmp_path / "grid.png")).shape[0] > 300


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"colour": "red"}, "colour"),
        ({"scale": "-1"}, "scale"),
        ({"strength": "3kg"}, "strength"),
        ({"strength": "inf"}, "strength"),
        ({"strength": "1e300m"}, "strength"),
        ({"scale": "nan"}, "scale"),
    ],
)
def test_parameters_that_are_none_are_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        settings_for("dent", changes)


def test_sweeps_and_seeds_out_of_range_are_refused(source: Path) -> None:
    with pytest.raises(UsageError, match="colour"):
        sweep(source, settings=settings_for("dent", {}), parameter="colour", values=["1"], seed=0)
    with pytest.raises(UsageError, match="seed"):
        grid([source], presets=["dent"], seed=-1)


def test_every_kind_of_file_gives_the_same_points(tmp_path: Path) -> None:
    import trimesh

    xyz = make_scan("box", seed=2, sensor=SENSOR).alone
    known = xyz[np.isfinite(xyz).all(-1)]
    write_npz(tmp_path / "a.npz", xyz=xyz)
    write_tiff(tmp_path / "a.tiff", xyz)
    cloud = PointCloud.from_xyz_points(known)
    cloud.save(tmp_path / "a.pcd")
    trimesh.PointCloud(known).export(tmp_path / "a.ply")
    for name in ("a.npz", "a.tiff"):
        assert np.array_equal(read_organised(tmp_path / name), xyz, equal_nan=True)
    for name in ("a.pcd", "a.ply"):
        assert np.allclose(read_scan(tmp_path / name).xyz, known)
        with pytest.raises(DataError, match="rows and columns"):
            read_organised(tmp_path / name)


def test_an_npz_in_whole_numbers_is_not_taken_for_metres(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", xyz=np.full((4, 4, 3), 800, np.int16))
    with pytest.raises(DataError, match="metres"):
        read_scan(tmp_path / "a.npz")


def test_an_organised_pcd_keeps_its_rows(tmp_path: Path) -> None:
    xyz = make_scan("sphere", seed=2, sensor=SENSOR).xyz
    cloud = PointCloud.from_xyz_points(xyz.reshape(-1, 3))
    cloud.metadata = cloud.metadata.derive(width=64, height=64)
    cloud.save(tmp_path / "a.pcd")
    assert np.array_equal(read_organised(tmp_path / "a.pcd"), xyz, equal_nan=True)


@pytest.mark.parametrize("name", ["a.npz", "a.tiff", "a.pcd", "a.ply", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_scan(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    xyz = make_scan("box", seed=2, sensor=SENSOR).alone
    write_tiff(tmp_path / "a.tiff", xyz)
    PointCloud.from_xyz_points(xyz[np.isfinite(xyz).all(-1)]).save(tmp_path / "a.pcd")
    write_npz(tmp_path / "a.npz", xyz=xyz)
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=path.name):
            read_scan(path)


def test_folders_in_both_layouts(tmp_path: Path) -> None:
    xyz = make_scan("box", seed=2, sensor=SENSOR).alone
    mask = np.zeros(xyz.shape[:2], np.uint8)
    mask[3:9, 4:8] = 255
    write_npz(tmp_path / "one/train/good/0.npz", xyz=xyz)
    write_npz(tmp_path / "one/test/dent/0.npz", xyz=xyz, mask=mask)
    write_tiff(tmp_path / "two/train/good/xyz/0.tiff", xyz)
    write_tiff(tmp_path / "two/test/dent/xyz/0.tiff", xyz)
    (tmp_path / "two/test/dent/gt").mkdir()
    cv2.imwrite(str(tmp_path / "two/test/dent/gt/0.png"), mask)
    for name in ("one", "two"):
        found = read_scan_folder(tmp_path / name)
        assert len(found.train) == len(found.test) == 1
        assert found.test[0].anomalous
        assert np.array_equal(load_scan_mask(found.test[0], mask.shape), mask > 0)
    with pytest.raises(DataError, match="train/good"):
        read_scan_folder(tmp_path)
    with pytest.raises(DataError, match="mask"):
        load_scan_mask(read_scan_folder(tmp_path / "one").test[0], (3, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_generated_scans_have_noise_holes_and_a_shadow(kind: str) -> None:
    plain, hidden = (make_scan(kind, seed=4, sensor=SENSOR, occluded=bar) for bar in (False, True))
    assert 0.05 < plain.part.mean() < 0.95
    assert hidden.part.sum() < plain.part.sum()
    assert np.isnan(plain.xyz).any()
    assert np.isnan(plain.alone[~plain.part]).all()
    assert 0.5 < np.nanmedian(plain.xyz[..., 2]) < 1.0
    assert not np.array_equal(plain.xyz, make_scan(kind, seed=5, sensor=SENSOR).xyz, equal_nan=True)


def test_the_surface_of_a_generated_sphere_is_one() -> None:
    points = make_scan("sphere", seed=4, sensor=Sensor(noise_m=0.0)).alone
    known = points[np.isfinite(points).all(-1)].astype(np.float64)
    # A sphere through them: |p|^2 = 2 p.c + k.
    design = np.c_[2 * known, np.ones(len(known))]
    solution, *_ = np.linalg.lstsq(design, (known**2).sum(1), rcond=None)
    radius = np.sqrt(solution[3] + solution[:3] @ solution[:3])
    assert np.abs(np.linalg.norm(known - solution[:3], axis=1) - radius).max() < 1e-5
