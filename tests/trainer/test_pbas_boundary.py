"""Geometry of PBAS: where anomalies are put, and which centre a patch belongs to."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.methods.pbas.boundary import CENTRE_MOMENTUM, Direction, align_centres, nearest_centre, synthesise

seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, rows: int = 40, sites: int = 9, dim: int = 152) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, dim, generator=generator) * 3 + 1
    return u, torch.randn(sites, dim, generator=generator) * 3


@settings(max_examples=40, deadline=None)
@given(seed=seeds, k=st.floats(0.01, 4.0))
def test_synthesise_outward_puts_every_anomaly_k_radii_beyond_its_patch(seed: int, k: float) -> None:
    u, centres = draw(seed)
    own = centres[nearest_centre(u, centres)]
    radius = (u - own).norm(dim=1).mean().double()
    z = synthesise(u, centres, k=k).anomalies
    moved = (z.double() - u.double()).norm(dim=1)
    # float32 rounds u + displacement to |u| ulps, so a tiny k is judged against |u|, not against itself.
    assert torch.allclose(moved / (k * radius), torch.ones_like(moved), atol=1e-5 + 1e-6 * 3 / k)
    cosine = torch.nn.functional.cosine_similarity(z - own, u - own)
    assert (cosine > 0.99999).all()
    gain = (z - own).norm(dim=1) - (u - own).norm(dim=1)
    assert torch.allclose(gain.double(), k * radius, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_synthesise_random_keeps_the_length_and_loses_the_ray(seed: int) -> None:
    u, centres = draw(seed)
    own = centres[nearest_centre(u, centres)]
    radius = (u - own).norm(dim=1).mean()
    generator = torch.Generator().manual_seed(seed + 1)  # the seed itself would draw the patches again
    z = synthesise(u, centres, k=0.5, direction=Direction.RANDOM, generator=generator).anomalies
    assert torch.allclose((z - u).norm(dim=1), 0.5 * radius, rtol=1e-4)
    assert torch.nn.functional.cosine_similarity(z - u, u - own).abs().mean() < 0.3


def test_synthesise_gradient_passes_to_the_patch_as_identity() -> None:
    u, centres = draw(3)
    u.requires_grad_()
    weights = torch.randn(u.shape, generator=torch.Generator().manual_seed(4))
    (synthesise(u, centres, k=0.25).anomalies * weights).sum().backward()
    assert torch.equal(u.grad, weights)


def test_synthesise_centre_loss_is_the_mean_distance_and_pulls_towards_the_centre() -> None:
    u, centres = draw(5)
    u.requires_grad_()
    own = centres[nearest_centre(u, centres)]
    loss = synthesise(u, centres, k=0.25).centre_loss
    assert torch.isclose(loss, (u - own).norm(dim=1).mean())
    loss.backward()
    moved = u.detach() - 10 * u.grad
    assert ((moved - own).norm(dim=1) < (u.detach() - own).norm(dim=1)).all()


def test_synthesise_patch_on_its_centre_stays_finite() -> None:
    u, centres = draw(6)
    u[0] = centres[2]
    u.requires_grad_()
    made = synthesise(u, centres, k=0.25)
    (made.anomalies.sum() + made.centre_loss).backward()
    assert torch.isfinite(made.anomalies).all()
    assert torch.isfinite(u.grad).all()


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_nearest_centre_is_the_greatest_cosine_over_all_sites(seed: int) -> None:
    u, centres = draw(seed)
    cosine = torch.nn.functional.cosine_similarity(u[:, None].double(), centres[None].double(), dim=2)
    assert torch.equal(nearest_centre(u.double(), centres.double()), cosine.argmax(dim=1))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, sites=st.integers(1, 30))
def test_align_centres_equals_the_sequential_update(seed: int, sites: int) -> None:
    means, centres = draw(seed, rows=sites, sites=sites, dim=4)  # few dimensions: several means meet on one centre
    owner = nearest_centre(means, centres)
    expected = centres.clone()
    for site, index in enumerate(owner.tolist()):
        expected[index] = CENTRE_MOMENTUM * expected[index] + (1 - CENTRE_MOMENTUM) * means[site]
    before = centres.clone()
    assert torch.allclose(align_centres(centres, means), expected, atol=1e-5)
    assert torch.equal(centres, before)
