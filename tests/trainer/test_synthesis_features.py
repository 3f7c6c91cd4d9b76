"""Synthetic defects on features: exact masks on every grid, honest contrast, one region on all levels."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DataError
from trainer.methods.base import Features
from trainer.synthesis.features import FEATURE_FAMILIES, corrupt, corrupt_features, deviations

STRIDES = {"s4": (6, 4), "s8": (9, 8), "s16": (12, 16)}


def taps_of(
    kind: str, height: int, width: int, seed: int, dtype: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """Taps [C, h, w] of a picture of so many pixels."""
    generator = torch.Generator().manual_seed(seed)
    taps = {}
    for name, (channels, stride) in STRIDES.items():
        shape = (channels, height // stride, width // stride)
        if kind == "noise":
            tap = torch.randn(shape, generator=generator) * torch.linspace(0.1, 4, channels)[:, None, None] + 1
        else:
            tap = torch.full(shape, {"zeros": 0.0, "constant": 3.7}[kind])
        taps[name] = tap.to(dtype)
    return taps


def stacked(taps: dict[str, torch.Tensor]) -> Features:
    return Features({name: tap[None] for name, tap in taps.items()}, 1, np.array(["a"]))


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.numpy().tobytes() == second.numpy().tobytes()


GRIDS = {"height": st.sampled_from([32, 64, 96, 224]), "width": st.sampled_from([32, 64, 160])}


@pytest.mark.parametrize("family", FEATURE_FAMILIES)
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["noise", "zeros", "constant"]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 2**32),
    contrast=st.floats(0.02, 1.0),
    **GRIDS,
)
def test_defect_masks_are_exact_and_contrast_scales_the_change(  # noqa: PLR0917 (hypothesis names its arguments)
    family: str, kind: str, dtype: torch.dtype, seed: int, contrast: float, height: int, width: int
) -> None:
    taps = taps_of(kind, height, width, seed, dtype)
    before = {name: tap.clone() for name, tap in taps.items()}
    deviation = deviations(stacked(taps))

    def at(strength: float) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
        made = corrupt(taps, deviation=deviation, rng=np.random.default_rng(seed), family=family, contrast=strength)
        return made.taps, made.masks

    (plain, masks), (faint, same_masks) = at(1.0), at(contrast)
    for name, tap in taps.items():
        assert same_bits(tap, before[name])
        assert plain[name].dtype == dtype
        assert torch.isfinite(plain[name]).all()
        assert masks[name].any()
        np.testing.assert_array_equal((plain[name] != tap).any(0).numpy(), masks[name])
        np.testing.assert_array_equal(same_masks[name], masks[name])
        assert same_bits(faint[name][:, ~masks[name]], tap[:, ~masks[name]])
        assert ((faint[name] - tap).abs() <= (plain[name] - tap).abs()).all()


@pytest.mark.parametrize("family", FEATURE_FAMILIES)
def test_defect_fades_with_contrast(family: str) -> None:
    taps = taps_of("noise", 224, 224, 0)
    deviation = deviations(stacked(taps))
    for seed in range(5):
        made = [
            corrupt(taps, deviation=deviation, rng=np.random.default_rng(seed), family=family, contrast=contrast)
            for contrast in (1.0, 0.6, 0.3, 0.1)
        ]
        for name, tap in taps.items():
            moved = [float(((one.taps[name] - tap) / deviation[name][:, None, None]).norm()) for one in made]
            assert moved[0] > moved[1] > moved[2] > moved[3] > 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), family=st.sampled_from(list(FEATURE_FAMILIES)), **GRIDS)
def test_levels_take_the_same_region(seed: int, family: str, height: int, width: int) -> None:
    taps = taps_of("noise", height, width, 0)
    deviation = deviations(stacked(taps))
    masks = corrupt(taps, deviation=deviation, rng=np.random.default_rng(seed), family=family, size=(0.1, 0.3)).masks
    fine = masks["s4"].astype(np.float32)
    for name in ("s8", "s16"):
        h, w = masks[name].shape
        touched = cv2.resize(fine, (w, h), interpolation=cv2.INTER_AREA)
        # A coarse cell that changed has a part of the fine region in it; one that is full of it has changed.
        assert (touched[masks[name]] > 0).all()
        assert masks[name][touched > 0.999].all()
    # The region does not depend on which other levels there are.
    alone = corrupt(
        {"s4": taps["s4"]}, deviation=deviation, rng=np.random.default_rng(seed), family=family, size=(0.1, 0.3)
    )
    np.testing.assert_array_equal(alone.masks["s4"], masks["s4"])


def test_same_seed_same_bytes_other_seed_other_bytes() -> None:
    features = Features(
        {name: torch.stack([taps_of("noise", 96, 96, seed)[name] for seed in range(4)]) for name in STRIDES},
        1,
        np.array(list("abcd")),
    )
    (one, masks), (again, _), (other, _) = (corrupt_features(features, seed=seed, repeats=3) for seed in (1, 1, 2))
    for name in STRIDES:
        assert same_bits(one.taps[name], again.taps[name])
        assert not same_bits(one.taps[name], other.taps[name])
        changed = (one.taps[name] != features.taps[name].repeat(3, 1, 1, 1)).any(1).numpy()
        assert not (changed & ~masks[name]).any()
        assert changed.any((1, 2)).all()
    assert one.groups.tolist() == list("abcd" * 3)
    faint, same = corrupt_features(features, seed=1, repeats=3, contrast=0.1)
    np.testing.assert_array_equal(same["s4"], masks["s4"])
    assert not same_bits(faint.taps["s4"], one.taps["s4"])


def test_families_are_taken_in_turns_or_drawn() -> None:
    taps = taps_of("noise", 64, 64, 0)
    deviation = deviations(stacked(taps))
    drawn = {corrupt(taps, deviation=deviation, rng=np.random.default_rng(seed)).family for seed in range(60)}
    assert drawn == set(FEATURE_FAMILIES)
    features = stacked(taps)
    one, both = (
        corrupt_features(features, seed=0, repeats=4, families=names)[0] for names in (["blur"], ["blur", "stain"])
    )
    assert same_bits(one.taps["s8"][::2], both.taps["s8"][::2])
    assert not same_bits(one.taps["s8"][1::2], both.taps["s8"][1::2])


def test_families_do_what_they_say() -> None:
    taps = taps_of("noise", 224, 224, 0, torch.float32)
    deviation = deviations(stacked(taps))

    def made(family: str) -> tuple[torch.Tensor, torch.Tensor]:
        one = corrupt(taps, deviation=deviation, rng=np.random.default_rng(3), family=family, size=(0.3, 0.3))
        side = 1 if family == "perlin" else 5  # its region is full of holes
        inside = torch.from_numpy(cv2.erode(one.masks["s4"].astype(np.uint8), np.ones((side, side), np.uint8)) > 0)
        assert inside.sum() > 8
        return one.taps["s4"][:, inside], taps["s4"][:, inside]

    spread = deviation["s4"]
    blurred, was = made("blur")
    assert (blurred.std(1) < 0.6 * was.std(1)).all()
    pasted, _ = made("cut_paste")
    cells = taps["s4"].flatten(1).T
    # A pasted cell that is much like the one it covers is strengthened; the others are copies.
    assert float(torch.cdist(pasted.T, cells, compute_mode="donot_use_mm_for_euclid_dist").min(1)[0].median()) < 1e-5
    stained, was = made("stain")
    shift = ((stained - was) / spread[:, None]).mean(1)
    assert 0.3 < float(shift.square().mean().sqrt()) < 4
    noisy, was = made("perlin")
    assert (((noisy - was) / spread[:, None]).std(1) > 0.2).all()
    line = corrupt(taps, deviation=deviation, rng=np.random.default_rng(3), family="scratch", size=(0.3, 0.3))
    rows, cols = np.nonzero(line.masks["s4"])
    assert line.masks["s4"].sum() < 0.5 * (np.ptp(rows) + 1) * (np.ptp(cols) + 1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), images=st.integers(1, 70))
def test_deviations_are_those_of_all_images_and_places(seed: int, images: int) -> None:
    tap = (
        torch.randn(images, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
        * torch.tensor([1.0, 5.0, 1e-5])[:, None, None]
        + 2
    )
    found = deviations(Features({"t": tap}, 1, np.array(["a"] * images)))["t"]
    expected = tap.double().transpose(0, 1).flatten(1).std(1, correction=0)
    whole = float(tap.double().square().mean().sqrt())
    np.testing.assert_allclose(found, expected.clamp_min(0.01 * whole), rtol=1e-3)


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"family": "rust"}, "unknown family"),
        ({"contrast": 0.0}, "contrast"),
        ({"contrast": float("nan")}, "contrast"),
        ({"size": (0.2, 0.1)}, "size"),
    ],
)
def test_settings_out_of_range_are_refused(settings_: dict, says: str) -> None:
    taps = taps_of("noise", 64, 64, 0)
    with pytest.raises(ValueError, match=says):
        corrupt(taps, deviation=deviations(stacked(taps)), rng=np.random.default_rng(0), **settings_)


def test_features_that_cannot_have_a_defect_are_refused() -> None:
    taps = taps_of("noise", 64, 64, 0)
    deviation = deviations(stacked(taps))
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="no room for a defect"):
        corrupt({"s4": taps["s4"][:, :1]}, deviation=deviation, rng=rng)
    with pytest.raises(DataError, match="no deviation of 9 channels"):
        corrupt(taps, deviation={**deviation, "s8": deviation["s4"]}, rng=rng)
    broken = stacked(taps)
    broken.taps["s8"][0, 0, 0, 0] = torch.nan
    with pytest.raises(DataError, match="s8 are not finite"):
        deviations(broken)
    with pytest.raises(DataError, match="no features"):
        deviations(Features({"s4": taps["s4"][None][:0]}, 1, np.array([], np.str_)))
