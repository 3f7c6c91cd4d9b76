"""Local multivariate Gaussian noise: its statistics, its locality, and that it touches nothing outside its boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.errors import DataError
from tests.trainer.test_pbas_fit import context
from trainer.methods.base import Features
from trainer.methods.pbas.fit import PbasConfig, PbasMethod
from trainer.synthesis.gaussian_noise import LocalGaussian, draw_boxes, extrude

GRID = (6, 8)
CHANNELS = 12
DRAWN = 10_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(images: int, channels: int = CHANNELS, seed: int = 0) -> torch.Tensor:
    """Maps whose mean and covariance differ from site to site: three directions of their own, and a little of all."""
    generator = seeded(seed)
    height, width = GRID
    mean = 3 * torch.randn(channels, height, width, generator=generator)
    mixing = torch.randn(height, width, channels, 3, generator=generator)
    inner = torch.randn(images, height, width, 3, 1, generator=generator)
    structured = (mixing @ inner).squeeze(4).permute(0, 3, 1, 2)
    return mean + structured + 0.2 * torch.randn(images, channels, height, width, generator=generator)


def true_moments(maps: torch.Tensor, y: int, x: int, radius: int) -> tuple[torch.Tensor, torch.Tensor]:
    window = maps[:, :, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
    rows = window.permute(0, 2, 3, 1).flatten(0, 2).double()
    return rows.mean(0), torch.cov(rows.T, correction=0)


@pytest.mark.parametrize("radius", [0, 1])
@pytest.mark.parametrize("site", [(0, 0), (3, 4), (5, 7)])
def test_sample_reproduces_mean_and_covariance_of_the_window(radius: int, site: tuple[int, int]) -> None:
    maps = places(60)
    noise = LocalGaussian.fit(maps.split(17), radius=radius, rank=CHANNELS)
    index = site[0] * GRID[1] + site[1]
    drawn = noise.sample(torch.full((DRAWN,), index), seeded(1)).double()
    mean, covariance = true_moments(maps, *site, radius)
    standard_error = (covariance.diagonal() / DRAWN).sqrt()
    assert ((drawn.mean(0) - mean).abs() <= 3.5 * standard_error).all()  # 3 for one channel; twelve are looked at
    assert torch.linalg.norm(torch.cov(drawn.T) - covariance) <= 0.1 * torch.linalg.norm(covariance)


def test_low_rank_keeps_every_variance_and_most_of_the_covariance() -> None:
    maps = places(200)
    noise = LocalGaussian.fit([maps], radius=0, rank=3)
    _, covariance = true_moments(maps, 2, 5, 0)
    modelled = noise.covariance(2 * GRID[1] + 5).double()
    torch.testing.assert_close(modelled.diagonal(), covariance.diagonal(), rtol=1e-4, atol=1e-6)
    assert torch.linalg.norm(modelled - covariance) <= 0.1 * torch.linalg.norm(covariance)


def test_sample_resembles_its_own_site_more_than_a_far_one() -> None:
    noise = LocalGaussian.fit([places(100)], radius=1, rank=4)
    near, far = 1 * GRID[1] + 1, 4 * GRID[1] + 6
    drawn = noise.sample(torch.full((200,), near), seeded(2))

    def mahalanobis(site: int) -> torch.Tensor:
        offset = drawn - noise.mean[site]
        return (offset @ torch.linalg.inv(noise.covariance(site)) * offset).sum(1)

    assert mahalanobis(near).mean() < mahalanobis(far).mean()
    assert (mahalanobis(near) < mahalanobis(far)).float().mean() > 0.95


def test_fit_batches_make_no_difference() -> None:
    maps = places(20)
    whole, parts = (LocalGaussian.fit(maps.split(size), rank=CHANNELS) for size in (20, 3))
    torch.testing.assert_close(whole.mean, parts.mean)
    for site in (0, 13, 47):
        torch.testing.assert_close(whole.covariance(site), parts.covariance(site), rtol=1e-4, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 0.6))
def test_replace_changes_the_boxes_and_not_one_bit_elsewhere(seed: int, share: float) -> None:
    noise = LocalGaussian.fit([places(8)], rank=4)
    maps = places(5, seed=9)
    before = maps.clone()
    cells = draw_boxes(5, GRID, seeded(seed), share=share)
    noisy = noise.replace(maps, cells, seeded(seed))
    assert torch.equal(maps, before)
    outside = ~cells[:, None].expand_as(maps)
    assert torch.equal(noisy[outside], maps[outside])
    assert (noisy[~outside] != maps[~outside]).all()


def test_replace_draws_each_cell_from_its_own_place() -> None:
    noise = LocalGaussian.fit([places(50)], radius=0, rank=CHANNELS)
    noisy = noise.replace(torch.zeros(400, CHANNELS, *GRID), torch.ones(400, *GRID, dtype=torch.bool), seeded())
    found = noisy.mean(0).flatten(1).T
    assert ((found - noise.mean).norm(dim=1) < 0.1 * noise.mean.norm(dim=1)).all()


def test_replace_the_same_generator_gives_the_same_bits() -> None:
    noise = LocalGaussian.fit([places(8)], rank=4)
    maps, cells = places(3, seed=4), draw_boxes(3, GRID, seeded(), share=0.3)
    first, again, other = (noise.replace(maps, cells, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_spread_scales_the_deviation_alone() -> None:
    noise = LocalGaussian.fit([places(30)], rank=CHANNELS)
    sites = torch.full((4000,), 20)
    plain, wide = (noise.sample(sites, seeded(3), spread=spread) for spread in (1.0, 3.0))
    torch.testing.assert_close(wide - noise.mean[20], 3 * (plain - noise.mean[20]), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(2, 20),
    width=st.integers(2, 20),
    share=st.floats(0.01, 0.9),
    largest=st.integers(1, 4),
)
def test_boxes_are_on_every_map_and_cover_at_most_their_share(
    seed: int, height: int, width: int, share: float, largest: int
) -> None:
    cells = draw_boxes(6, (height, width), seeded(seed), share=share, sides=(1, largest))
    assert cells.shape == (6, height, width)
    covered = cells.flatten(1).sum(1)
    assert (covered >= 1).all()
    side = min(largest, height, width)
    area = sum(s * s for s in range(1, side + 1)) / side
    assert (covered <= max(1, round(share * height * width / area)) * side * side).all()


def test_boxes_cover_about_the_share_asked_for() -> None:
    cells = draw_boxes(500, (28, 28), seeded(), share=0.05, sides=(1, 2))
    assert math.isclose(float(cells.float().mean()), 0.05, rel_tol=0.15)


def test_extruded_boxes_are_aligned() -> None:
    cells = draw_boxes(2, (4, 6), seeded(), share=0.2)
    fine = extrude(cells, 4)
    assert fine.shape == (2, 16, 24)
    assert torch.equal(fine[:, ::4, ::4], cells)
    assert torch.equal(fine[:, 3::4, 3::4], cells)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fit_maps_that_are_not_finite_are_refused(value: float) -> None:
    maps = places(3)
    maps[1, 2, 3, 4] = value
    with pytest.raises(DataError, match="not finite"):
        LocalGaussian.fit([maps])


def test_fit_no_maps_are_refused() -> None:
    with pytest.raises(DataError, match="at least one good image"):
        LocalGaussian.fit([])


def test_replace_maps_of_another_grid_are_refused() -> None:
    noise = LocalGaussian.fit([places(3)])
    with pytest.raises(DataError, match="measured on"):
        noise.replace(torch.zeros(1, CHANNELS, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), seeded())


def test_fit_one_image_and_a_channel_that_never_varies() -> None:
    maps = places(1)
    maps[:, 2] = 1.5
    noise = LocalGaussian.fit([maps], radius=1, rank=20)
    drawn = noise.sample(torch.arange(48), seeded())
    assert torch.isfinite(drawn).all()
    torch.testing.assert_close(drawn[:, 2], torch.full((48,), 1.5), rtol=0, atol=1e-2)


def drawn_by_pbas(**options: float) -> dict[str, torch.Tensor]:
    taps = {
        "s8": torch.randn(6, 40, 8, 8, generator=seeded(1)),
        "s16": torch.randn(6, 112, 4, 4, generator=seeded(2)),
    }
    given = context(Features(taps, 1, np.array(list("abcdef"))))
    return PbasMethod.fit(given, PbasConfig(steps=4, batch_rows=64, **options)).state_dict()


def test_pbas_takes_the_noise_as_a_share_of_its_anomalies(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []
    original = LocalGaussian.sample

    def sample(self: LocalGaussian, sites: torch.Tensor, generator: torch.Generator, *, spread: float) -> torch.Tensor:
        asked.append((len(sites), spread))
        assert sites.max() < 64
        return original(self, sites, generator, spread=spread)

    monkeypatch.setattr(LocalGaussian, "sample", sample)
    plain = drawn_by_pbas()
    assert asked == []
    noisy = drawn_by_pbas(noise_share=0.25, noise_spread=3.0)
    assert asked == [(16, 3.0)] * 4
    assert not torch.equal(plain["from_s8.weight"], noisy["from_s8.weight"])
    assert all(torch.isfinite(value).all() for value in noisy.values())


def test_pbas_noise_alone_replaces_every_anomaly() -> None:
    all_noise = drawn_by_pbas(noise_share=1.0, k=0.25)
    assert torch.equal(all_noise["from_s8.weight"], drawn_by_pbas(noise_share=1.0, k=2.0)["from_s8.weight"])
    assert not torch.equal(drawn_by_pbas(k=0.25)["from_s8.weight"], drawn_by_pbas(k=2.0)["from_s8.weight"])
