"""The depth detector: what its trunk measures, what its head leaves out, and its way into a bundle."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.parity import ParityRules
from edge.bundle import Bundle, Modality, Resize
from edge.errors import DataError, UsageError
from trainer.data.scan_files import write_npz
from trainer.data.scans import Sensor, make_scans
from trainer.depth.command import evaluate, evaluates_depth, train
from trainer.depth.defects import Defects, jittered, measured_again, moved
from trainer.depth.evaluate import shaded_scan
from trainer.depth.export import export_depth
from trainer.depth.fit import depth_features, depth_preprocessing, fit_canvases, grid_pitch
from trainer.depth.geometry import CHANNELS, GeometryTrunk, PlaneFit
from trainer.depth.method import DepthConfig
from trainer.depth.run import DepthRun, is_depth_run

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

SIDE = 64
PITCH = 1.2e-3


def quiet(_what: str, _done: int, _total: int) -> None:
    """Report no progress."""


def surface(z: npt.NDArray[np.floating] | float, slope: tuple[float, float] = (0.0, 0.0)) -> npt.NDArray[np.float32]:
    v, u = (np.mgrid[:SIDE, :SIDE] - SIDE / 2) * PITCH
    return np.stack([u, v, 0.8 + z + slope[0] * u + slope[1] * v], -1).astype(np.float32)


def taps(xyz: npt.NDArray[np.float32], **options: float) -> dict[str, npt.NDArray[np.float32]]:
    trunk = GeometryTrunk(**options)
    with torch.no_grad():
        found = trunk(torch.from_numpy(xyz)[None])
    return {name: tap[0].numpy() for name, tap in zip(trunk.tap_names, found, strict=True)}


@given(st.floats(-1, 1), st.floats(-1, 1))
@settings(max_examples=15)
def test_a_plane_has_no_height_scatter_or_curvature(across: float, down: float) -> None:
    found = taps(surface(0.0, (across, down)))
    cosine = 1 / np.sqrt(1 + across**2 + down**2)
    for name in ("s4", "s8", "s16"):
        flat = np.delete(found[name], 4, axis=0)[:, 1:-1, 1:-1]
        assert np.abs(flat).max() < 0.02, name
        assert np.allclose(found[name][4][1:-1, 1:-1], cosine, atol=1e-3)
    normal = np.array([across, down, -1.0]) * cosine
    assert np.allclose(found["normals"][:, 4:-4, 4:-4], normal[:, None, None], atol=1e-3)


def test_a_sphere_has_the_curvature_of_its_radius() -> None:
    v, u = (np.mgrid[:SIDE, :SIDE] - SIDE / 2) * PITCH
    found = taps(surface(0.2 - np.sqrt(0.2**2 - u**2 - v**2)))
    assert found["s4"][1][8, 8] == pytest.approx(10 * 2 * PITCH / 0.2, rel=0.02)
    assert found["s4"][2][8, 8] == pytest.approx(0.0, abs=1e-3)


def test_a_dent_and_a_bump_differ_in_sign() -> None:
    v, u = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    hill = 0.002 * np.exp(-(u**2 + v**2) / 18)
    dent, bump = taps(surface(hill))["s4"], taps(surface(-hill))["s4"]
    assert dent[0].min() < -0.2
    assert bump[0].max() > 0.2
    assert np.allclose(dent[0], -bump[0], atol=0.02)


def test_lengths_are_in_units() -> None:
    rng = np.random.default_rng(0)
    rough = surface(rng.normal(0, 3e-4, (SIDE, SIDE)))
    fine, coarse = taps(rough, unit_m=1e-3)["s4"][7], taps(rough, unit_m=2e-3)["s4"][7]
    assert np.allclose(fine, 2 * coarse, rtol=0.02)


def test_what_was_not_measured_changes_nothing_and_says_nothing() -> None:
    xyz = surface(0.0, (0.3, 0.1))
    holed = xyz.copy()
    holed[20:40, 24:44] = np.nan
    found = taps(holed)
    assert all(np.isfinite(tap).all() for tap in found.values())
    for name in ("s4", "s8", "s16"):
        assert np.abs(np.delete(found[name], 4, axis=0)).max() < 0.05
    assert (found["s4"][:, 6:9, 7:10] == 0).all()
    assert (found["valid"][0, 5:10, 6:11] == 0).all()
    partly = xyz.copy()
    partly[30, 30, 0] = np.nan
    assert taps(partly)["valid"][0, 7, 7] == pytest.approx(15 / 16)


def test_an_empty_scan_has_finite_taps() -> None:
    assert all((tap == 0).all() for tap in taps(np.full((SIDE, SIDE, 3), np.nan, np.float32)).values())


def test_a_silhouette_is_no_defect() -> None:
    step = np.zeros((SIDE, SIDE))
    step[:, 32:] = 0.05
    found = taps(surface(step), jump_m=0.015)["s4"]
    assert (found[:, :, 7:9] == 0).all()
    assert np.abs(np.delete(found, 4, axis=0)[:, 1:-1, 1:-1]).max() < 0.05


@pytest.mark.parametrize("half", [1, 2, 5])
def test_planes_are_those_of_least_squares(half: int) -> None:
    rng = np.random.default_rng(half)
    points = torch.from_numpy(rng.normal(0, 0.01, (1, 3, 15, 15)).astype(np.float32))
    weight = torch.from_numpy((rng.random((1, 1, 15, 15)) < 0.8).astype(np.float32))
    planes = PlaneFit(half)(points * weight, weight)
    window = slice(7 - half, 8 + half)
    v, u = np.mgrid[-half : half + 1, -half : half + 1]
    kept = weight[0, 0, window, window].numpy() > 0
    design = np.c_[np.ones(kept.sum()), u[kept], v[kept]]
    # The module's ridge of 0.05 squared cells per point, on the slopes about their middle.
    centred = design[:, 1:] - design[:, 1:].mean(0)
    values = points[0, :, window, window].numpy().transpose(1, 2, 0)[kept]
    gram = centred.T @ centred / len(centred) + 0.05 * np.eye(2)
    slopes = np.linalg.solve(gram, centred.T @ (values - values.mean(0)) / len(centred))
    centre = values.mean(0) - design[:, 1:].mean(0) @ slopes
    assert np.allclose(planes.across[0, :, 7, 7], slopes[0], atol=1e-6)
    assert np.allclose(planes.down[0, :, 7, 7], slopes[1], atol=1e-6)
    assert np.allclose(planes.centre[0, :, 7, 7], centre, atol=1e-6)


@functools.cache
def scans() -> npt.NDArray[np.float32]:
    sensor = Sensor(height=SIDE, width=SIDE, focal=210.0)
    return np.stack([scan.alone for scan in make_scans("wavy", 30, seed=900, sensor=sensor)])


@functools.cache
def fitted() -> object:
    return fit_canvases(
        scans()[:14], scans()[14:22], depth_preprocessing((SIDE, SIDE), None), DepthConfig(rows=200), seed=0,
        progress=quiet,
    )  # fmt: skip


def test_defects_of_eight_noise_floors_are_found_on_generated_scans() -> None:
    from trainer.depth.fit import Fitted

    found = fitted()
    assert isinstance(found, Fitted)
    assert max(found.validation.values()) > 0.85
    assert found.pitch_m == pytest.approx(0.0038, rel=0.3)


def test_cells_that_were_not_measured_are_never_judged() -> None:
    found = fitted()
    taken = depth_features(
        found.trunk, scans()[22:24], depth_preprocessing((SIDE, SIDE), None), progress=quiet, what=""
    )
    levels = [taken.taps[name].float() for name in found.head.tap_names]
    maps = found.head(*levels)[0]
    unknown = levels[-1][:, 0] < 0.5
    assert unknown.any()
    assert (maps[unknown] == 0).all()
    assert (maps[~unknown] >= 0).all()
    assert maps[~unknown].mean() > 0
    assert taken.taps["s4"].shape[1] == CHANNELS


def test_copies_are_of_their_own_scan() -> None:
    copies, base = jittered(scans()[:3], 8, seed=1)
    assert np.array_equal(copies[:3], scans()[:3], equal_nan=True)
    assert base.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert not np.array_equal(copies[3], scans()[0], equal_nan=True)
    shifted = moved(scans()[0], 2, -3)
    assert np.array_equal(shifted[2:, :-3], scans()[0][:-2, 3:], equal_nan=True)
    assert np.isnan(shifted[:2]).all()
    again = measured_again(scans()[0], np.random.default_rng(0))
    assert np.array_equal(np.isnan(again), np.isnan(scans()[0]))


def test_defects_of_one_seed_differ_in_strength_alone() -> None:
    source = Defects(scans()[:4])
    weak, strong = (source.make(seed=2, strength=strength) for strength in (1.0, 8.0))
    assert np.array_equal(weak[1], strong[1])
    steps = [np.linalg.norm(made - scans()[:4], axis=-1)[mask].max() for made, mask in (weak, strong)]
    assert steps[1] == pytest.approx(8 * steps[0], rel=0.01)


def test_a_shaded_scan_shows_holes() -> None:
    drawn = shaded_scan(scans()[0])
    assert drawn.shape == (SIDE, SIDE, 3)
    assert (drawn[np.isnan(scans()[0][..., 2])] == 32).all()
    assert drawn[np.isfinite(scans()[0][..., 2])].std() > 3


def test_scans_without_neighbours_are_refused() -> None:
    with pytest.raises(DataError, match="neighbouring"):
        grid_pitch(np.full((2, 4, 4, 3), np.nan, np.float32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scans")
    for index, xyz in enumerate(scans()[:24]):
        kind = "train/good" if index < 20 else "test/good"
        write_npz(root / kind / f"{index:03d}.npz", xyz=xyz)
    made, masks = Defects(scans()[24:]).make(seed=3, strength=16.0)
    for index, (xyz, mask) in enumerate(zip(made, masks, strict=True)):
        write_npz(root / "test/dent" / f"{index:03d}.npz", xyz=xyz, mask=mask.astype(np.uint8))
    return root


def train_run(folder: Path, out: Path, **changes: object) -> DepthRun:
    options: dict[str, object] = {
        "method": "memory", "data": [folder], "out": out, "preset": "quick", "seed": 0, "size": (SIDE, SIDE),
        "crop": None, "near_m": 0.0, "far_m": None, "product": None, "settings": {"rows": "200"},
    }  # fmt: skip
    return train(**{**options, **changes})  # type: ignore[arg-type]


def test_a_run_is_trained_evaluated_and_packed(folder: Path, tmp_path: Path) -> None:
    run = train_run(folder, tmp_path / "run")
    assert is_depth_run(run.path)
    assert evaluates_depth(run.path, None)
    again = DepthRun.load(run.path)
    assert np.array_equal(again.holdout_scores(), run.holdout_scores())
    rules = ParityRules(
        good_samples=20, defect_samples=16, shift=10.0, flipped=1.0, auroc_drop=1.0, auroc_window=(0.0, 1.0)
    )
    bundle = export_depth(run.path, tmp_path / "bundle", rules=rules, progress=quiet)
    manifest = Bundle.open(bundle.path).manifest
    assert manifest.modality is Modality.DEPTH
    assert manifest.preprocessing.resize is Resize.VALID  # type: ignore[union-attr]
    assert manifest.depth is not None
    assert 0 < manifest.depth.min_valid < 0.5
    assert manifest.trunk.int8 is None
    report = tmp_path / "report.html"
    options = {"data": folder, "json": None, "report": report, "engine": None, "precision": None, "alpha": 0.05}
    of_run = evaluate(run=run.path, bundle=None, **options)  # type: ignore[arg-type]
    of_bundle = evaluate(run=None, bundle=bundle.path, **options)  # type: ignore[arg-type]
    assert of_run.figures()["image_auroc"] > 0.8
    assert of_bundle.figures()["image_auroc"] == pytest.approx(of_run.figures()["image_auroc"], abs=0.05)
    assert of_bundle.found[0].image.dtype == np.uint8
    text = report.read_text()
    assert "depth maps" in text
    assert text.count("data:image/jpeg") > 6


def test_what_cannot_be_trained_is_refused(folder: Path, tmp_path: Path) -> None:
    for changes, match in (
        ({"method": "pbas"}, "memory"),
        ({"data": [folder, folder]}, "one"),
        ({"preset": "slow"}, "preset"),
        ({"size": (50, 50)}, "height"),
        ({"near_m": 2.0, "far_m": 1.0}, "far"),
        ({"settings": {"colour": "red"}}, "colour"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(UsageError, match=match):
            train_run(folder, tmp_path / "run", **changes)
    with pytest.raises(DataError, match="train/good"):
        train_run(tmp_path, tmp_path / "run")
    with pytest.raises(UsageError, match="int8"):
        export_depth(tmp_path, tmp_path / "bundle", precision="int8", progress=quiet)
