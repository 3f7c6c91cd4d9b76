"""Synthetic surface defects: geometry, rotation, what each parameter does, shares, and the noise floor."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from deploy.metrics import image_auroc
from edge.capture.scan_files import read_scan
from edge.errors import DataError, UsageError
from trainer.data.scans import KINDS, Scan, Sensor, make_scan
from trainer.synthesis.surface3d import Part, noise_grid, perturb
from trainer.synthesis.surface3d_chart import lay_out, valid_points
from trainer.synthesis.surface3d_normals import Surface, estimate_surface
from trainer.synthesis.surface3d_perlin import GradientNoise
from trainer.synthesis.surface3d_presets import PRESETS, Sign, StrengthUnit, SurfaceNoise, Units, preset

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "3d"


@functools.cache
def scan(kind: str = "wavy") -> Scan:
    return make_scan(kind, seed=3, sensor=Sensor(height=96, width=96, focal=320.0))


@functools.cache
def part(kind: str = "wavy") -> Part:
    return Part.of(scan(kind).alone.astype(np.float64))


@pytest.mark.parametrize("name", PRESETS)
def test_points_move_along_their_normals_and_no_further_than_the_strength(name: str) -> None:
    good = part()
    defect = perturb(good, PRESETS[name], seed=7)
    moved = (defect.xyz - good.xyz)[good.valid]
    across = np.linalg.norm(np.cross(moved, good.surface.normals), axis=1)
    assert across.max() / defect.strength < 1e-10
    assert np.linalg.norm(moved, axis=1).max() <= defect.strength * (1 + 1e-9)
    signed = (moved * good.surface.normals).sum(1)
    assert np.allclose(signed, defect.displacement[good.valid], atol=1e-12)
    assert defect.mask.any()


@pytest.mark.parametrize("name", PRESETS)
def test_all_else_stays_bit_for_bit(name: str) -> None:
    xyz = scan().alone
    good = Part.of(xyz)
    defect = perturb(good, PRESETS[name], seed=1)
    assert defect.xyz.shape == xyz.shape
    assert defect.xyz.dtype == xyz.dtype
    assert defect.xyz[~defect.mask].tobytes() == xyz[~defect.mask].tobytes()
    assert not defect.mask[~good.valid].any()
    assert not defect.label[~defect.mask].any()
    assert np.isnan(defect.xyz[~good.valid]).all()
    assert (defect.displacement[~defect.mask] == 0).all()


@given(st.integers(0, 2**63 - 1))
@settings(max_examples=8)
def test_one_seed_gives_one_sample(seed: int) -> None:
    first, again = (perturb(part("box"), PRESETS["corrosion"], seed=seed) for _ in range(2))
    assert first.xyz.tobytes() == again.xyz.tobytes()
    assert first.record() == again.record()


def test_seeds_differ() -> None:
    first, second = (perturb(part(), PRESETS["corrosion"], seed=seed) for seed in (1, 2))
    assert not np.array_equal(first.mask, second.mask)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["wavy", "box", "cylinder"]))
@settings(max_examples=10)
def test_turning_the_part_turns_the_defect(seed: int, kind: str) -> None:
    good = part(kind)
    turn = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
    points, normals = good.points @ turn.T, good.surface.normals @ turn.T
    turned = Part.with_surface(points, Surface(normals, good.surface.residual))
    plain = Part.with_surface(good.points, good.surface)
    want, got = (perturb(one, PRESETS["corrosion"], seed=5) for one in (plain, turned))
    assert np.abs(want.field - got.field).max() < 1e-8
    assert np.allclose(want.xyz @ turn.T, got.xyz, atol=1e-9)


def components(scale: float, seed: int) -> int:
    import cv2

    grid = noise_grid(part().chart, SurfaceNoise(scale=scale, octaves=1), np.random.default_rng(seed))
    return cv2.connectedComponents((grid > 0.6).astype(np.uint8))[0] - 1


def roughness_of_field(seed: int, **changes: float) -> float:
    grid = noise_grid(part().chart, SurfaceNoise(scale=4, **changes), np.random.default_rng(seed))  # type: ignore[arg-type]
    return float(np.sqrt(np.mean(np.square(np.gradient(grid)))))


def test_a_finer_scale_makes_more_regions() -> None:
    means = [np.mean([components(scale, seed) for seed in range(20)]) for scale in (2, 4, 8, 16, 32)]
    assert (np.diff(means) > 0).all(), means


def test_octaves_and_persistence_make_the_field_rougher() -> None:
    by_octave = [np.mean([roughness_of_field(seed, octaves=o) for seed in range(20)]) for o in (1, 2, 3, 4, 6)]
    assert (np.diff(by_octave) > 0).all(), by_octave
    by_share = [
        np.mean([roughness_of_field(seed, octaves=4, persistence=p) for seed in range(20)])
        for p in (0.25, 0.5, 0.75, 1.0)
    ]
    assert (np.diff(by_share) > 0).all(), by_share


@pytest.mark.parametrize("kind", KINDS)
def test_a_threshold_leaves_its_share_of_the_surface(kind: str) -> None:
    shares = {
        tau: np.mean([perturb(part(kind), SurfaceNoise(scale=6, octaves=4, threshold=tau), seed=seed).mask[
            part(kind).valid].mean() for seed in range(10)])
        for tau in (0.6, 0.8)
    }  # fmt: skip
    assert 0.25 <= shares[0.6] <= 0.45
    assert 0.03 <= shares[0.8] <= 0.12


def test_a_defect_under_the_noise_floor_cannot_be_seen_and_says_so() -> None:
    found = []
    for strength in (0.5, 2.0, 8.0):
        one = SurfaceNoise(scale=8, threshold=0.65, strength=strength, strength_unit=StrengthUnit.NOISE)
        values = []
        for seed in range(4):
            defect = perturb(part(), one, seed=seed)
            residual = estimate_surface(defect.xyz[part().valid]).residual
            values.append(image_auroc(defect.mask[part().valid], residual) or 0.0)
            assert defect.below_noise or strength == 8
        found.append(np.mean(values))
    assert 0.45 < found[0] < 0.55
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.60


@pytest.mark.parametrize("name", PRESETS)
def test_a_sample_is_flagged_by_what_moved_and_not_by_what_was_asked_for(name: str) -> None:
    good, flags = part("box"), set()
    for multiple in (2.0, 4.0, 6.0, 16.0):
        asked = PRESETS[name].model_copy(update={"strength": multiple, "strength_unit": StrengthUnit.NOISE})
        for seed in range(4):
            defect = perturb(good, asked, seed=seed)
            moved = np.linalg.norm((defect.xyz - good.xyz)[defect.mask], axis=1)
            assert defect.below_noise == (np.quantile(moved, 0.95) < 4 * good.noise.p95)
            assert defect.record()["below_noise"] == defect.below_noise
            flags.add((multiple, defect.below_noise))
    assert {(2.0, True), (4.0, True), (16.0, False)} <= flags


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_by_itself_is_raised_above_the_noise_of_a_small_part(name: str) -> None:
    good = part("box")
    raised = perturb(good, PRESETS[name].model_copy(update={"strength": 1e-6}), seed=1)
    assert not raised.below_noise
    assert raised.reached == pytest.approx(4 * good.noise.p95)


def test_signs() -> None:
    for sign, expected in ((Sign.BULGE, {1.0}), (Sign.DENT, {-1.0}), (Sign.MIXED, {-1.0, 1.0})):
        defect = perturb(part(), SurfaceNoise(scale=10, sign=sign), seed=0)
        assert set(np.sign(defect.displacement[defect.mask])) == expected
    drawn = {np.sign(perturb(part(), SurfaceNoise(), seed=seed).displacement.sum()) for seed in range(8)}
    assert drawn == {-1.0, 1.0}


def test_normals_point_to_the_sensor() -> None:
    good = part("box")
    towards = -good.points / np.linalg.norm(good.points, axis=1, keepdims=True)
    assert ((good.surface.normals * towards).sum(1) > 0).mean() > 0.95


def test_normals_of_a_closed_part_point_outwards() -> None:
    points = np.random.default_rng(0).standard_normal((4000, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    assert ((estimate_surface(points).normals * points).sum(1) > 0.9).mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_normals_of_one_view_point_to_its_sensor_where_the_file_names_none(kind: str) -> None:
    seen = Part.of(part(kind).points, closed=True)
    assert ((seen.surface.normals * -seen.points).sum(1) > 0).mean() > 0.99
    bump = perturb(seen, PRESETS["bump"], seed=2)
    moved = (bump.xyz - seen.xyz)[bump.mask]
    assert ((moved * -seen.points[bump.mask]).sum(1) > 0).all()


def test_normals_of_a_closed_part_point_outwards_wherever_the_origin_is() -> None:
    points = np.random.default_rng(0).uniform(-1, 1, (4000, 3))
    points[np.arange(4000), np.arange(4000) % 3] = np.sign(points[np.arange(4000), np.arange(4000) % 3])  # a cube's
    for place in ((0, 0, 0), (0, 0, 5), (3, -2, 1)):
        normals = Part.of(points + place, closed=True).surface.normals
        assert ((normals * points).sum(1) > 0).mean() > 0.99


def test_one_region_reaches_the_whole_strength() -> None:
    defect = perturb(part(), PRESETS["dent"], seed=3)
    assert np.abs(defect.displacement).max() == pytest.approx(defect.strength)


def test_strengths_in_all_units() -> None:
    good = part()
    for unit, strength, expected in (
        (StrengthUnit.METRES, 0.003, 0.003),
        (StrengthUnit.NOISE, 5.0, 5 * good.noise.p95),
        (StrengthUnit.DIAGONAL, 0.05, 0.05 * good.diagonal),
    ):
        defect = perturb(good, SurfaceNoise(strength=strength, strength_unit=unit), seed=0)
        assert defect.strength == pytest.approx(expected)


def test_raw_units_keep_shapes_when_a_part_grows() -> None:
    """In raw units a cell is a length, so that twice the part holds more of them."""
    one = SurfaceNoise(scale=30, octaves=1, units=Units.RAW)
    small = lay_out(part().points)
    large = lay_out(2 * part().points)
    ripples = [
        np.abs(np.diff(np.sign(noise_grid(chart, one, np.random.default_rng(0)) - 0.5), axis=1)).sum()
        for chart in (small, large)
    ]
    assert ripples[1] > 1.4 * ripples[0]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.integers(0, 99))
def test_gradient_noise_is_bounded_smooth_and_zero_on_the_lattice(places: list[float], seed: int) -> None:
    x, noise = np.array(places), GradientNoise(np.random.default_rng(seed))
    assert np.abs(noise(x, x[::-1].copy())).max() <= np.sqrt(0.5) + 1e-9
    assert np.abs(noise(np.floor(x), np.floor(x))).max() == 0
    step = 1e-4
    assert np.abs(noise(x + step, x) - noise(x, x)).max() < 4 * step + 1e-6


@pytest.mark.parametrize(
    "xyz", [np.zeros((4, 4)), np.zeros((4, 4, 3), np.int32), np.full((10, 3), np.nan), np.zeros((50, 3))]
)
def test_what_is_no_scan_is_refused(xyz: np.ndarray) -> None:
    with pytest.raises(DataError):
        valid_points(xyz)


def test_an_unknown_preset_and_a_field_beyond_its_grid_are_refused() -> None:
    with pytest.raises(UsageError, match="dent"):
        preset("rust")
    with pytest.raises(ValueError, match="grid"):
        SurfaceNoise(scale=500, octaves=10)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "median", "p95"), [("obj_box_a", 0.28, 0.83), ("obj_cyl_a", 0.37, 1.11), ("milk_carton", 0.41, 1.24)]
)
def test_real_scans_have_the_noise_floor_that_was_measured(name: str, median: float, p95: float) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"EVALUATION SCANS ABSENT: {SHARED} is not there, so no real scan was read")
    found = read_scan(SHARED / f"{name}.npz")
    noise = Part.of(found.xyz, viewpoint=found.viewpoint).noise
    assert 1000 * noise.median == pytest.approx(median, rel=0.1)
    assert 1000 * noise.p95 == pytest.approx(p95, rel=0.1)
