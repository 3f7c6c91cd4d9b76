"""Synthetic defects: exact masks, honest contrast, any image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DataError
from trainer.synthesis.image2d import BY_NAME, FAMILIES, make_defects, synthesise
from trainer.synthesis.noise import blob, perlin


def picture(kind: str, height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    if kind == "grey":
        return np.repeat(rng.integers(60, 180, (height, width, 1)), 3, axis=2).astype(np.uint8)
    return np.full((height, width, 3), {"black": 0, "white": 255, "flat": 119}[kind], np.uint8)


@pytest.mark.parametrize("family", BY_NAME)
@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["noise", "grey", "black", "white", "flat"]),
    height=st.integers(16, 120),
    width=st.integers(16, 120),
    seed=st.integers(0, 2**32),
    contrast=st.floats(0.02, 1.0),
)
def test_defect_mask_is_exact(  # noqa: PLR0917 (hypothesis names its arguments)
    family: str, kind: str, height: int, width: int, seed: int, contrast: float
) -> None:
    image = picture(kind, height, width, seed)
    before = image.copy()
    plain = synthesise(image, rng=np.random.default_rng(seed), family=family)
    np.testing.assert_array_equal(image, before)
    assert plain.mask.any()
    np.testing.assert_array_equal((plain.image != image).any(axis=2), plain.mask)
    faint = synthesise(image, rng=np.random.default_rng(seed), family=family, contrast=contrast)
    np.testing.assert_array_equal(faint.mask, plain.mask)
    assert not (faint.image != image).any(axis=2)[~faint.mask].any()
    # Contrast scales the change of each pixel, so it is never larger than at 1.
    change = np.abs(faint.image.astype(int) - image)
    assert (change <= np.abs(plain.image.astype(int) - image)).all()
    if kind != "noise":
        np.testing.assert_array_equal(plain.image[..., 0], plain.image[..., 2])


@pytest.mark.parametrize("family", [*BY_NAME, None])
def test_defect_same_seed_same_bytes(family: str | None) -> None:
    image = picture("noise", 64, 96, 1)
    one, two = (synthesise(image, rng=np.random.default_rng(5), family=family, contrast=0.7) for _ in range(2))
    assert one.image.tobytes() == two.image.tobytes()
    assert one.mask.tobytes() == two.mask.tobytes()
    assert one.family == two.family
    other = synthesise(image, rng=np.random.default_rng(6), family=family, contrast=0.7)
    assert other.image.tobytes() != one.image.tobytes()


@pytest.mark.parametrize("family", BY_NAME)
@pytest.mark.parametrize("kind", ["flat", "grey", "black", "white"])
def test_defect_is_visible_at_contrast_1_and_fades_with_it(family: str, kind: str) -> None:
    image = picture(kind, 128, 128, 3)
    for seed in range(5):
        change = [
            np.abs(made.image.astype(float) - image).max(axis=2)[made.mask].mean()
            for contrast in (1.0, 0.5, 0.25)
            for made in [synthesise(image, rng=np.random.default_rng(seed), family=family, contrast=contrast)]
        ]
        assert change[0] >= 6
        assert change[0] > change[1] > change[2]


def test_defect_sizes_span_the_range_asked_for() -> None:
    image = picture("grey", 256, 256, 0)
    diagonal = np.hypot(256, 256)
    extents = []
    for seed in range(300):
        rows, cols = np.nonzero(synthesise(image, rng=np.random.default_rng(seed)).mask)
        extents.append(max(np.ptp(rows), np.ptp(cols)) + 1)
    assert max(extents) <= 0.25 * diagonal + 2
    assert min(extents) <= 0.015 * diagonal
    assert max(extents) > 0.15 * diagonal
    assert 0.02 * diagonal < np.median(extents) < 0.08 * diagonal  # log-uniform: small ones are as many as large ones


@settings(max_examples=40, deadline=None)
@given(height=st.integers(16, 90), width=st.integers(16, 90), seed=st.integers(0, 2**32), data=st.data())
def test_defect_middle_lies_where_it_is_asked_for(height: int, width: int, seed: int, data: st.DataObject) -> None:
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    where = np.zeros((height, width), bool)
    where[y, x] = True
    made = synthesise(
        picture("grey", height, width, seed), rng=np.random.default_rng(seed), size=(0.1, 0.3), where=where
    )
    reach = 0.3 * np.hypot(height, width) / 2 + 2
    rows, cols = np.nonzero(made.mask)
    assert rows.min() <= y + reach
    assert rows.max() >= y - reach
    assert cols.min() <= x + reach
    assert cols.max() >= x - reach
    assert max(abs(rows - y).max(), abs(cols - x).max()) <= 2 * reach


def test_defects_away_from_the_border_are_around_the_place_asked_for() -> None:
    where = np.zeros((120, 160), bool)
    where[50:60, 100:110] = True
    image = picture("grey", 120, 160, 0)
    for seed in range(30):
        rows, cols = np.nonzero(
            synthesise(image, rng=np.random.default_rng(seed), size=(0.02, 0.2), where=where, family="stain").mask
        )
        assert 45 <= (rows.min() + rows.max()) / 2 <= 65
        assert 95 <= (cols.min() + cols.max()) / 2 <= 115


def test_defects_take_the_families_asked_for_in_turns() -> None:
    canvases = np.stack([picture("noise", 64, 64, seed) for seed in range(3)])
    one, both = (make_defects(canvases, seed=4, repeats=2, families=names)[0] for names in (["spot"], ["spot", "blur"]))
    assert np.array_equal(one[::2], both[::2])
    assert all(not np.array_equal(first, second) for first, second in zip(one[1::2], both[1::2], strict=True))


def test_blur_smooths_a_rough_picture_and_is_given_by_name_only() -> None:
    image = picture("noise", 96, 96, 2)
    made = synthesise(image, rng=np.random.default_rng(0), family="blur", size=(0.3, 0.3))
    inside = made.mask & np.roll(made.mask, 3, 0) & np.roll(made.mask, -3, 0)
    assert made.image[inside].std() < 0.8 * image[inside].std()
    assert "blur" not in FAMILIES


def test_defect_every_family_is_drawn() -> None:
    image = picture("grey", 32, 32, 0)
    assert {synthesise(image, rng=np.random.default_rng(seed)).family for seed in range(150)} == set(FAMILIES)


@pytest.mark.parametrize("family", BY_NAME)
def test_defect_on_a_large_image(family: str) -> None:
    image = picture("grey", 1500, 2000, 0)
    made = synthesise(image, rng=np.random.default_rng(2), family=family, size=(0.25, 0.25))
    np.testing.assert_array_equal((made.image != image).any(axis=2), made.mask)


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32), np.zeros((15, 64, 3), np.uint8)]
)
def test_defect_on_no_picture_is_refused(image: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"expected uint8|too small"):
        synthesise(image, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"family": "rust"}, "unknown family"),
        ({"contrast": 0.0}, "contrast"),
        ({"contrast": 1.1}, "contrast"),
        ({"contrast": float("nan")}, "contrast"),
        ({"size": (0.2, 0.1)}, "size"),
        ({"size": (0.0, 0.1)}, "size"),
        ({"where": np.zeros((32, 32), bool)}, "a place in it"),
        ({"where": np.ones((32, 33), bool)}, "where is"),
    ],
)
def test_defect_settings_out_of_range_are_refused(settings_: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        synthesise(picture("flat", 32, 32, 0), rng=np.random.default_rng(0), **settings_)


def test_perlin_noise_is_smooth_zero_at_its_lattice_and_centred() -> None:
    field = perlin((256, 256), (8, 8), np.random.default_rng(0))
    assert np.abs(np.diff(field, axis=0)).max() < 0.12
    assert abs(float(field.mean())) < 0.05
    assert 0.4 < float(np.abs(field).max()) <= 0.75
    corners = field[np.ix_(range(32, 256, 32), range(32, 256, 32))]  # half a pixel beside lattice points
    assert np.abs(corners).max() < 0.05


@given(st.integers(3, 60), st.integers(3, 60), st.integers(0, 999))
def test_blob_is_opaque_inside_and_clear_at_the_corners(height: int, width: int, seed: int) -> None:
    shape = blob((height, width), np.random.default_rng(seed), irregularity=0.3, softness=0.2)
    assert shape.max() > 0.2
    assert shape.min() >= 0
    assert shape.max() <= 1
    if min(height, width) >= 8:
        assert shape[height // 2, width // 2] == 1
        assert shape[0, 0] == 0
